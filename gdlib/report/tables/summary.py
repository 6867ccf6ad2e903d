"""Numbers behind every table and figure: means over images and seeds, and paired comparisons.

A value of a run is its mean over images; `std` is the sample standard deviation of that over seeds,
i.e. what another seed would change. Means and tests are over images with objects; of the others,
what was found in them is averaged (`gdlib.evaluate.scores`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gdlib import io
from gdlib.config import TEACHER
from gdlib.evaluate.metrics import METRICS
from gdlib.evaluate.scores import FALSE
from gdlib.report.names import NONE, ablation_of, named_teacher

SUMMARY_COLUMNS = (
    "dataset",
    "student",
    "method",
    "segmenter",
    "metric",
    "mean",
    "std",
    "n",
    "images",
)
COMPARISON_COLUMNS = (
    *("dataset", "student", "method", "segmenter", "metric", "difference", "difference_std"),
    *(
        "gap_closed",
        "gap_closed_std",
        "p_images",
        "p_images_holm",
        "p_seeds",
        "p_seeds_holm",
        "seeds",
        "images",
    ),
)
BASELINE_COLUMNS = ("dataset", "split", "baseline", "sample", "metric", "value")
# A teacher that is better by less than this is not better: a share of that difference says nothing.
# bits, bits, bits, objects
LEAST_GAPS = {"voi": 0.02, "voi_split": 0.02, "voi_merge": 0.02, "dic": 0.5}
LEAST_GAP = 0.01  # of all other metrics, which lie in [0, 1]
NOISE = 2  # standard deviations over seeds, by which it must be better too


def read_metrics(paths: Iterable[Path | str]) -> pd.DataFrame:
    """Read metrics files into one frame, in the order given.

    Raises:
        gdlib.io.DataError: columns or values are missing, something occurs twice, runs saw
            different images, or no image of a dataset has objects.
    """
    frames = []
    for path in paths:
        # Only values can be missing: a sample may well be called "NA".
        frame = pd.read_csv(
            path, dtype={"sample": str}, keep_default_na=False, na_values={"value": ["", "nan"]}
        )
        _check(path, frame, io.METRIC_COLUMNS)
        if "objects" not in set(frame["metric"]):
            raise io.DataError(
                f"{path}: it does not say how many objects the images have; evaluate this run again"
            )
        frames.append(frame)
    if not frames:
        raise io.DataError("there are no metrics to report; give at least one file")
    metrics = pd.concat(frames, ignore_index=True)
    twice = metrics[metrics.duplicated(list(io.METRIC_COLUMNS[:-1]))]
    if len(twice):
        row = twice.iloc[0]
        raise io.DataError(
            "two metrics files hold the same run: "
            f"{_run_name(row)}/{row['segmenter']}; give each once"
        )
    for dataset, block in metrics.groupby("dataset", sort=False):
        if is_empty(block).all():
            raise io.DataError(
                f"no test image of {dataset} has an object: nothing can be "
                "measured; change its splits"
            )
        images, keys, segmenters = (
            block[column].nunique() for column in ("sample", "metric", "segmenter")
        )
        for _, run in block.groupby(["network", "method", "seed"], sort=False):
            if len(run) != images * keys * segmenters:
                raise io.DataError(
                    f"{_run_name(run.iloc[0])} lacks values: other runs on {dataset} have {keys} "
                    f"metrics of {images} images with {', '.join(block['segmenter'].unique())}; "
                    "evaluate it again"
                )
    return metrics


def read_baselines(paths: Iterable[Path | str]) -> pd.DataFrame:
    """Read the files of trivial baselines into one frame with the columns `BASELINE_COLUMNS`, in
    the order given.
    """
    frames = [pd.DataFrame(columns=list(BASELINE_COLUMNS))]
    for path in paths:
        frame = pd.read_csv(
            path, dtype={"sample": str}, keep_default_na=False, na_values={"value": ["", "nan"]}
        )
        _check(path, frame, BASELINE_COLUMNS)
        frames.append(frame)
    return pd.concat(frames[1:] or frames, ignore_index=True)


def read_validation(paths: Iterable[Path | str]) -> pd.DataFrame:
    """Read from the headers of weights what was measured on validation images.

    Returns:
        Columns dataset, network, segmenter, metric, value.
    """
    rows = []
    for path in paths:
        header = io.read_header(path)
        for segmenter, scores in header.get("validation", {}).items():
            run = header["run"]
            rows += [
                (run["dataset"], run["network"], segmenter, metric, value)
                for metric, value in scores.items()
            ]
    return pd.DataFrame(rows, columns=["dataset", "network", "segmenter", "metric", "value"])


def _check(path: Path | str, frame: pd.DataFrame, columns: tuple[str, ...]) -> None:
    """Stop with one clear sentence if columns or values are missing."""
    if tuple(frame.columns) != columns:
        raise io.DataError(
            f"{path}: the columns are {', '.join(frame.columns)}, not {', '.join(columns)}; make "
            "it again"
        )
    if not np.isfinite(frame["value"]).all():
        raise io.DataError(f"{path}: a value is not a finite number; evaluate this run again")


def _run_name(row: pd.Series) -> str:
    return f"{row['dataset']}/{row['network']}/{row['method']}/seed{row['seed']}"


def read_histories(paths: Sequence[Path | str], runs: Sequence[Sequence[Any]]) -> pd.DataFrame:
    """Read history files into one frame; `runs` are their (network, method, seed)."""
    frames = []
    for path, (network, method, seed) in zip(paths, runs, strict=True):
        frame = pd.read_csv(path, dtype={"step": int, "value": float}, keep_default_na=False)
        if tuple(frame.columns) != io.HISTORY_COLUMNS:
            raise io.DataError(
                f"{path}: the columns are {', '.join(frame.columns)}, not "
                f"{', '.join(io.HISTORY_COLUMNS)}; train this run again"
            )
        frames.append(frame.assign(network=network, method=method, seed=seed))
    return pd.concat(frames, ignore_index=True)


def read_profiles(paths: Iterable[Path | str]) -> dict[tuple[str, str], dict[str, Any]]:
    """Read profile files: (dataset, network) to what was measured."""
    profiles = [json.loads(Path(path).read_text()) for path in paths]
    return {(profile["dataset"], profile["network"]): profile for profile in profiles}


def measured_on(profiles: Iterable[Mapping[str, Any]]) -> str:
    """Say of what size the image was and what computed it, for all profiles together."""
    return "; ".join(
        dict.fromkeys(
            f"{' × '.join(map(str, p['image_shape']))} "
            f"{'pixels' if len(p['image_shape']) < 3 else 'voxels'}, {p['device']}, {p['threads']} "
            f"thread{'s' * (p['threads'] != 1)}, {p['precision']}, torch {p['torch']}"
            for p in profiles
        )
    )


def require(metrics: pd.DataFrame, keys: Iterable[str]) -> None:
    """Stop with one clear sentence if a metric was not computed."""
    present = set(metrics["metric"])
    if missing := sorted(set(keys) - present):
        raise io.DataError(
            f"the metrics files do not hold {', '.join(missing)}; they hold "
            f"{', '.join(sorted(present))}"
        )


def is_empty(metrics: pd.DataFrame) -> pd.Series:
    """Say of every row whether its image has no objects.

    Where the metric `objects` is left out, all images have some.
    """
    image = pd.MultiIndex.from_frame(
        metrics[[name for name in ("dataset", "split", "sample") if name in metrics]]
    )
    none = (metrics["metric"] == "objects") & (metrics["value"] == 0)
    return pd.Series(image.isin(image[none]), index=metrics.index)


def meant(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that means are over: metrics of images with objects, and what was found in
    the others.
    """
    empty, metric = is_empty(metrics), metrics["metric"]
    return metrics[(empty & metric.isin(FALSE)) | (~empty & metric.isin(METRICS))]


def images_of(metrics: pd.DataFrame) -> tuple[int, int]:
    """Return the numbers of images with objects and without."""
    empty = is_empty(metrics)
    return metrics[~empty]["sample"].nunique(), metrics[empty]["sample"].nunique()


def one_metric(metrics: pd.DataFrame, key: str) -> pd.DataFrame:
    """Return the rows of one metric, and those that say which images have objects."""
    return metrics[metrics["metric"].isin((key, "objects"))]


def per_seed(metrics: pd.DataFrame) -> pd.DataFrame:
    """Average over images (`meant`): one row per dataset, network, method, seed, segmenter and
    metric; how many `images`.
    """
    keys = ["dataset", "network", "method", "seed", "segmenter", "metric"]
    groups = meant(metrics).groupby(keys, sort=False)["value"]
    return groups.agg(value="mean", images="count").reset_index()


def summarise(metrics: pd.DataFrame) -> pd.DataFrame:
    """Average over images, then over seeds.

    Args:
        metrics: columns `io.METRIC_COLUMNS`.

    Returns:
        Columns `SUMMARY_COLUMNS`: `std` is the sample standard deviation over the `n` seeds (NaN
        for one seed), `images` the number of those with objects or, for `scores.FALSE`, without.
        The teacher is a row like any other; `student` is then the teacher's network. Order of first
        appearance.
    """
    groups = per_seed(metrics).groupby(
        ["dataset", "network", "method", "segmenter", "metric"], sort=False
    )
    value = ("value", "mean"), ("value", "std"), ("value", "count"), ("images", "max")
    out = groups.agg(**dict(zip(SUMMARY_COLUMNS[-4:], value, strict=True))).reset_index()
    out.columns = list(SUMMARY_COLUMNS)
    return out


def gap_closed(
    method: Sequence[float], none: Sequence[float], teacher: Sequence[float], metric: str = "aji"
) -> tuple[float, float]:
    """Return the share of the gap between student and teacher that a method closes, with its
    standard deviation over seeds.

    (method - none) / (teacher - none), method and none paired by seed, over the mean gap: the share
    then equals the share of the means in the table, and one seed with a small gap cannot dominate.

    Args:
        method: (S,) values of the students with distillation, one per seed.
        none: (S,) values of the students without, same seeds.
        teacher: (T,) values of the teacher, one per seed of its own.
        metric: what the values are, a key of `metrics.METRICS`.

    Returns:
        Share (1 = as good as the teacher) and sample standard deviation (NaN for one seed). Both
        NaN unless the teacher is better than the students without distillation by at least
        `least_gap` and by more than `NOISE` standard deviations of their difference over seeds, as
        far as there are several.

    >>> gap_closed([0.75, 0.75], [0.5, 0.5], [1.0])
    (0.5, 0.0)
    >>> gap_closed([0.0124], [0.004], [0.0095])
    (nan, nan)
    """
    method, none, teacher = (np.asarray(values, float) for values in (method, none, teacher))
    gap = teacher.mean() - none.mean() if teacher.size else float("nan")
    noise = NOISE * np.sqrt(
        sum(values.var(ddof=1) for values in (none, teacher) if values.size > 1)
    )
    ahead = gap if METRICS[metric].better == "higher" else -gap
    if not (ahead >= least_gap(metric) and ahead > noise):
        return float("nan"), float("nan")
    return _mean_std((method - none) / gap)


def least_gap(metric: str) -> float:
    """Return by how much a teacher must at least be better than the plain student, in the unit of
    the metric.
    """
    return LEAST_GAPS.get(metric, LEAST_GAP)


def image_p(difference: Sequence[float]) -> float:
    """Two-sided p of the Wilcoxon signed-rank test that paired differences, one per image, are
    symmetric about 0.

    One image alone says nothing: NaN.
    """
    if len(difference) < 2:
        return float("nan")
    from scipy import stats  # half a second, and most figures test nothing

    # equal values must be equal after averaging over seeds too
    difference = np.round(difference, 12)
    return float(stats.wilcoxon(difference).pvalue) if np.any(difference) else 1.0


def seed_p(difference: Sequence[float]) -> float:
    """Two-sided p of the t test that paired differences, one per seed, have mean 0: would other
    seeds show the same?

    One seed alone says nothing: NaN.
    """
    if len(difference) < 2:
        return float("nan")
    from scipy import special

    difference = np.round(difference, 12)
    mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    if error == 0:
        return float(mean == 0)
    return float(2 * special.stdtr(len(difference) - 1, -abs(mean) / error))


def holm(p: Sequence[float]) -> np.ndarray:
    """Correct the p of several tests so that one false alarm among all of them is as rare as in one
    test.

    Holm 1979, Scandinavian Journal of Statistics 6: the k-th smallest of n is multiplied by n + 1 -
    k, and none gets smaller than one before it. NaN is no test.

    >>> holm([0.01, 0.04, 0.03, float("nan")]).tolist()
    [0.03, 0.06, 0.06, nan]
    """
    p = np.asarray(p, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN comes last
    out = np.full(p.size, np.nan)
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(order.size, 0, -1)), 1)
    return out


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float(
        "nan"
    )


def compare(metrics: pd.DataFrame, reference: str = NONE) -> pd.DataFrame:
    """Compare every method with a method of reference of the same student.

    Args:
        metrics: columns `io.METRIC_COLUMNS`, as `read_metrics` returns them.
        reference: usually the student trained without distillation.

    Returns:
        Columns `COMPARISON_COLUMNS`. `difference` (method - reference) and `gap_closed` (see there;
        the teacher is the one that the method learned from, the mean over its seeds) are means over
        the seeds that both have, with standard deviations of the pairs. `p_images` is `image_p` of
        the per-image differences averaged over these seeds, `p_seeds` is `seed_p` of the per-seed
        differences averaged over images; `..._holm` is corrected for the methods that are compared
        with the same student, those of an ablation among themselves.
    """
    metrics = meant(metrics)
    metrics = metrics[metrics["metric"].isin(METRICS)]
    teachers = metrics[metrics["method"] == TEACHER]
    first = teachers.groupby("dataset")["network"].first()
    of_teachers = (
        per_seed(teachers).groupby(["dataset", "network", "segmenter", "metric"])["value"].agg(list)
    )
    keys = ["dataset", "network", "segmenter", "metric"]
    rows = []
    for (dataset, student, segmenter, metric), block in metrics[
        metrics["method"] != TEACHER
    ].groupby(keys, sort=False):
        values = {
            method: runs.pivot(index="sample", columns="seed", values="value")
            for method, runs in block.groupby("method", sort=False)
        }
        base = values.pop(reference, None)
        for method, table in values.items() if base is not None else ():
            seeds = table.columns.intersection(base.columns)
            if len(seeds) == 0:
                continue
            of_teacher = of_teachers.get(
                (dataset, named_teacher(method) or first.get(dataset), segmenter, metric), ()
            )
            share = gap_closed(table[seeds].mean(), base[seeds].mean(), of_teacher, metric)
            pairs = table[seeds] - base[seeds]
            tests = image_p(pairs.mean(axis=1)), float("nan"), seed_p(pairs.mean()), float("nan")
            numbers = (*_mean_std(pairs.mean()), *share, *tests, len(seeds), len(pairs))
            rows.append((dataset, student, method, segmenter, metric, *numbers))
    out = pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))
    family = [out[key] for key in ("dataset", "student", "segmenter", "metric")] + [
        out["method"].map(ablation_of)
    ]
    for test in ("p_images", "p_seeds") if rows else ():
        out[f"{test}_holm"] = out.groupby(family)[test].transform(holm)
    return out
