"""From the metrics of all runs to a summary, paired comparisons, and the tables of a paper (Markdown and LaTeX).

Numbers are means over images first and over seeds then, so that `±` (sample standard deviation over seeds) is what another
seed would change.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from gdlib import io
from gdlib.config import TEACHER
from gdlib.metrics import METRICS, is_better
from gdlib.report.style import NONE, Titles, metric_title, title

SUMMARY_COLUMNS = ("dataset", "student", "method", "metric", "mean", "std", "n")
COMPARISON_COLUMNS = (
    *("dataset", "student", "method", "metric", "difference", "difference_std"),
    *("gap_closed", "gap_closed_std", "p", "seeds", "images"),
)
NO_GAP = "¹"
Profiles = Mapping[tuple[str, str], Mapping[str, Any]]


def read_metrics(paths: Iterable[Path | str]) -> pd.DataFrame:
    """Read metrics files into one frame, in the order given.

    Raises:
        gdlib.io.DataError: columns or values are missing, something occurs twice, or runs saw different images.
    """
    frames = []
    for path in paths:
        # Only values can be missing: a sample may well be called "NA".
        frame = pd.read_csv(path, dtype={"sample": str}, keep_default_na=False, na_values={"value": ["", "nan"]})
        if tuple(frame.columns) != io.METRIC_COLUMNS:
            raise io.DataError(f"{path}: the columns are {', '.join(frame.columns)}, not {', '.join(io.METRIC_COLUMNS)}")
        if not np.isfinite(frame["value"]).all():
            raise io.DataError(f"{path}: a value is not a finite number; evaluate this run again")
        frames.append(frame)
    if not frames:
        raise io.DataError("there are no metrics to report; give at least one file")
    metrics = pd.concat(frames, ignore_index=True)
    twice = metrics[metrics.duplicated(list(io.METRIC_COLUMNS[:-1]))]
    if len(twice):
        raise io.DataError(f"two metrics files hold the same run: {_run_name(twice.iloc[0])}; give each once")
    for dataset, block in metrics.groupby("dataset", sort=False):
        images = block["sample"].nunique()
        counts = block.groupby(["dataset", "network", "method", "seed", "metric"], sort=False)["sample"].count().reset_index()
        if (counts["sample"] != images).any():
            fewest = counts.loc[counts["sample"].idxmin()]
            raise io.DataError(
                f"{_run_name(fewest)} has {fewest['metric']} of {fewest['sample']} images, but dataset {dataset} has {images}; "
                "evaluate it again"
            )
    return metrics


def _run_name(row: pd.Series) -> str:
    return f"{row['dataset']}/{row['network']}/{row['method']}/seed{row['seed']}"


def read_profiles(paths: Iterable[Path | str]) -> list[dict[str, Any]]:
    """Read profile files, in the order given."""
    return [json.loads(Path(path).read_text()) for path in paths]


def per_seed(metrics: pd.DataFrame) -> pd.DataFrame:
    """Average over images: one row per dataset, network, method, seed and metric."""
    keys = ["dataset", "network", "method", "seed", "metric"]
    return metrics.groupby(keys, sort=False, as_index=False)["value"].mean()


def summarise(metrics: pd.DataFrame) -> pd.DataFrame:
    """Average over images, then over seeds.

    Args:
        metrics: columns `io.METRIC_COLUMNS`.

    Returns:
        Columns `SUMMARY_COLUMNS`: `std` is the sample standard deviation over the `n` seeds (NaN for one seed). The teacher is
        a row like any other; `student` is then the teacher's network. Order of first appearance.
    """
    groups = per_seed(metrics).groupby(["dataset", "network", "method", "metric"], sort=False)["value"]
    out = groups.agg(["mean", "std", "count"]).reset_index()
    out.columns = list(SUMMARY_COLUMNS)
    return out


def gap_closed(method: Sequence[float], none: Sequence[float], teacher: float, better: str = "higher") -> tuple[float, float]:
    """Return the share of the gap between student and teacher that a method closes, with its standard deviation over seeds.

    (method - none) / (teacher - none), method and none paired by seed, over the mean gap: the share then equals the share of
    the means in the table, and one seed with a small gap cannot dominate.

    Args:
        method: (S,) values of the students with distillation, one per seed.
        none: (S,) values of the students without, same seeds.
        teacher: value of the teacher.
        better: `"higher"` or `"lower"`.

    Returns:
        Share (1 = as good as the teacher) and sample standard deviation (NaN for one seed). Both NaN if the teacher is not
        better than the students without distillation.

    >>> gap_closed([0.7, 0.8], [0.6, 0.6], 0.9)
    (0.5, 0.2357022603955159)
    """
    method, none = np.asarray(method, float), np.asarray(none, float)
    gap = teacher - none.mean()
    if gap == 0 or (gap > 0) != (better == "higher"):
        return float("nan"), float("nan")
    return _mean_std((method - none) / gap)


def image_p(difference: Sequence[float]) -> float:
    """Two-sided p of the Wilcoxon signed-rank test that paired differences, one per image, are symmetric about 0."""
    difference = np.round(difference, 12)  # equal values must be equal after averaging over seeds too
    return float(stats.wilcoxon(difference).pvalue) if np.any(difference) else 1.0


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def compare(metrics: pd.DataFrame) -> pd.DataFrame:
    """Compare every method with the same student trained without distillation.

    Args:
        metrics: columns `io.METRIC_COLUMNS`, as `read_metrics` returns them.

    Returns:
        Columns `COMPARISON_COLUMNS`. `difference` (method - none) and `gap_closed` (see there; the teacher is the mean over its
        seeds) are means over the seeds that both have, with standard deviations of the pairs; `p` is `image_p` of the
        per-image differences averaged over these seeds.
    """
    rows = []
    students = metrics[metrics["method"] != TEACHER]
    for (dataset, student, metric), block in students.groupby(["dataset", "network", "metric"], sort=False):
        values = {
            method: runs.pivot(index="sample", columns="seed", values="value")
            for method, runs in block.groupby("method", sort=False)
        }
        none = values.pop(NONE, None)
        teacher = metrics.query("dataset == @dataset and method == @TEACHER and metric == @metric")
        for method, table in values.items() if none is not None else ():
            seeds = table.columns.intersection(none.columns)
            if len(seeds) == 0:
                continue
            pairs = table[seeds] - none[seeds]
            share = (float("nan"), float("nan"))
            if len(teacher):
                share = gap_closed(
                    table[seeds].mean(), none[seeds].mean(), per_seed(teacher)["value"].mean(), METRICS[metric].better
                )
            difference = _mean_std(pairs.mean())
            rows.append((dataset, student, method, metric, *difference, *share, image_p(pairs.mean(axis=1)), len(seeds), len(pairs)))
    return pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS))


class Cell(NamedTuple):
    """Text of a table as it is read, before it is escaped."""

    text: str
    bold: bool = False


class Table(NamedTuple):
    """A table, ready to be written in any language. Rows are grouped by rules."""

    key: str
    caption: str
    header: list[str]
    groups: list[list[list[Cell]]]
    notes: list[str]


def _number(mean: float, std: float = float("nan"), digits: int = 3, sign: str = "") -> str:
    text = f"{mean:{sign}.{digits}f}" + (f" ± {std:.{digits}f}" if np.isfinite(std) else "")
    return text.replace("-", "−")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def result_tables(
    metrics: pd.DataFrame,
    profiles: Profiles | None = None,
    *,
    keys: Sequence[str],
    main: str,
    titles: Titles = None,
    budget: str = "",
) -> list[tuple[str, list[Table]]]:
    """Lay out the tables of all datasets; `table_markdown` and `table_tex` say what the arguments are.

    Returns:
        For every dataset its title and its tables: results, and costs of the networks where there are profiles.
    """
    present = set(metrics["metric"])
    if missing := [key for key in (*keys, main) if key not in present]:
        raise io.DataError(f"the metrics files do not hold {', '.join(missing)}; they hold {', '.join(sorted(present))}")
    summary, comparison = summarise(metrics), compare(metrics[metrics["metric"] == main])
    out = []
    for dataset in dict.fromkeys(metrics["dataset"]):
        tables = [_results(dataset, metrics, summary, comparison, keys, main, titles, budget)]
        costs = {network: profile for (data, network), profile in (profiles or {}).items() if data == dataset}
        if costs:
            teachers = summary.query("dataset == @dataset and method == @TEACHER")["student"]
            tables.append(_costs(dataset, costs, next(iter(teachers), None), titles))
        out.append((title(dataset, titles), tables))
    return out


def _results(dataset, metrics, summary, comparison, keys, main, titles, budget) -> Table:
    runs = metrics[metrics["dataset"] == dataset]
    rows = summary[summary["dataset"] == dataset]
    paired = comparison[comparison["dataset"] == dataset].set_index(["student", "method"])
    digits = {key: 3 if rows[rows["metric"] == key]["mean"].abs().max() < 10 else 1 for key in (*keys, main)}
    name = METRICS[main].title
    header = ["network", "method", *map(metric_title, keys), f"Δ {name}", "gap closed", "p"]
    groups: list[list[list[Cell]]] = []
    marks = False
    teachers, students = rows[rows["method"] == TEACHER], rows[rows["method"] != TEACHER]
    for student, block in (*teachers.groupby("student", sort=False), *students.groupby("student", sort=False)):
        mean, std = (block.pivot(index="method", columns="metric", values=v) for v in ("mean", "std"))
        methods = list(dict.fromkeys(block["method"]))
        methods.sort(key=lambda m: m != NONE)  # stable: the plain student first, the others as they came
        best = {
            key: max(mean[key], key=lambda v, key=key: v if METRICS[key].better == "higher" else -v) for key in keys
        }
        group = []
        for method in methods:
            cells = [Cell(title(student, titles) if not group else ""), Cell(title(method, titles))]
            for key in keys:
                value, d = mean.loc[method, key], digits[key]
                top = len(methods) > 1 and f"{value:.{d}f}" == f"{best[key]:.{d}f}"  # what reads the same is as good
                cells.append(Cell(_number(value, std.loc[method, key], d), top))
            extra = ["", "", ""]
            if (student, method) in paired.index:
                pair = paired.loc[(student, method)]
                share, spread = 100 * pair["gap_closed"], 100 * pair["gap_closed_std"]
                no_gap = not np.isfinite(share)
                marks |= no_gap
                extra = [
                    _number(pair["difference"], pair["difference_std"], digits[main], "+"),
                    NO_GAP if no_gap else f"{_number(share, spread, 0)} %",
                    _p(pair["p"]),
                ]
            group.append([*cells, *map(Cell, extra)])
        groups.append(group)

    images = runs["sample"].nunique()
    seeds = {role: sorted(set(runs[mask]["seed"])) for role, mask in (
        ("students", runs["method"] != TEACHER), ("teacher", runs["method"] == TEACHER),
    ) if mask.any()}  # fmt: skip
    facts = [f"{title(dataset, titles)}, test split, {images} image{'s' * (images != 1)}"]
    facts += [f"{role}: seed{'s' * (len(s) > 1)} {', '.join(map(str, s))}" for role, s in seeds.items()]
    caption = "; ".join([*facts, budget] if budget else facts) + "."
    notes = []
    if any(len(s) > 1 for s in seeds.values()):
        notes.append("Mean over images, then mean ± sample standard deviation over seeds.")
    if any(len(s) == 1 for s in seeds.values()):
        alone = " and ".join(role for role, s in seeds.items() if len(s) == 1)
        notes.append(f"One seed only ({alone}): there is no standard deviation, so another seed may change the order.")
    if len(paired):
        notes += [
            "Bold: best of each student.",
            f"Δ {name}: difference to the student without distillation, paired by seed.",
            "Gap closed: (method − student) / (teacher − student).",
            f"p: two-sided Wilcoxon signed-rank test of Δ {name} over the {images} images (averaged over seeds), not corrected "
            f"for {len(paired)} comparison{'s' * (len(paired) > 1)}; it holds for these trained networks, the ± tells about others.",
        ]
    if marks:
        why = "the teacher is not better than the student without distillation" if len(teachers) else "there is no teacher"
        notes.append(f"{NO_GAP} Not defined: {why}.")
    return Table(dataset, caption, header, groups, notes)


def _costs(dataset: str, costs: Mapping[str, Mapping[str, Any]], teacher: str | None, titles: Titles) -> Table:
    columns = {
        "parameters (M)": ("parameters", 1e-6),
        "GMACs": ("macs", 1e-9),
        "latency (ms)": ("latency_ms", 1),
        "90th percentile (ms)": ("latency_ms_p90", 1),
        "peak memory (MiB)": ("peak_memory_mib", 1),
    }
    group = []
    for network, profile in costs.items():
        cells = [title(network, titles)]
        for key, factor in columns.values():
            value, whole = profile.get(key), costs.get(teacher, {}).get(key)
            text = "–" if value is None else f"{value * factor:#.3g}".rstrip(".")
            share = f" ({100 * value / whole:.2g} %)" if value is not None and whole and network != teacher else ""
            cells.append(text + share)
        group.append([Cell(cell) for cell in cells])
    some = next(iter(costs.values()))
    devices = dict.fromkeys(
        f"{p.get('device')}, {p.get('threads')} thread{'s' * (p.get('threads') != 1)}, {p.get('precision')}, torch {p.get('torch')}"
        for p in costs.values()
    )
    shape = " × ".join(map(str, some.get("image_shape", [])))
    caption = (
        f"Cost of the networks on one image of {title(dataset, titles)} ({shape} pixels); {'; '.join(devices)}."
        + (" In parentheses: share of the teacher's." if teacher in costs else "")
    )
    return Table(f"{dataset}-cost", caption, ["network", *columns], [group], [])


def table_markdown(metrics: pd.DataFrame, profiles: Profiles | None = None, **layout: Any) -> str:
    """Return the results as Markdown.

    Args:
        metrics: columns `io.METRIC_COLUMNS`.
        profiles: (dataset, network) to profile; leave it out for no table of costs.
        layout: `keys`, the metrics to show; `main`, the metric of differences, gap and p; `titles` of datasets, networks and
            methods; `budget`, a text about the training for the caption.
    """
    parts = []
    for heading, tables in result_tables(metrics, profiles, **layout):
        parts.append(f"## {_markdown(heading)}")
        for table in tables:
            lines = [[_markdown(text) for text in table.header]]
            lines.append(["---"] * 2 + ["---:"] * (len(table.header) - 2) if table.notes else ["---"] + ["---:"] * (len(table.header) - 1))
            for row in (row for group in table.groups for row in group):
                lines.append([f"**{_markdown(c.text)}**" if c.bold else _markdown(c.text) for c in row])
            parts.append(_markdown(table.caption))
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            if table.notes:
                parts.append(_markdown(" ".join(table.notes)))
    return "\n\n".join(parts) + "\n"


def table_tex(metrics: pd.DataFrame, profiles: Profiles | None = None, **layout: Any) -> str:
    """Return the results as LaTeX tables (package `booktabs`); the arguments are those of `table_markdown`."""
    parts = [r"% Needs \usepackage{booktabs}; read it with \input."]
    for table in (table for _, tables in result_tables(metrics, profiles, **layout) for table in tables):
        left = 2 if table.notes else 1
        body = [
            " \\\\\n".join(" & ".join(rf"\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in row) for row in group)
            for group in table.groups
        ]
        parts.append("\n".join([
            r"\begin{table*}[t]", r"\centering", r"\footnotesize",
            rf"\caption{{{_tex(table.caption)}}}", rf"\label{{tab:{table.key}}}",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(table.header) - left)}}}", r"\toprule",
            " & ".join(map(_tex, table.header)) + r" \\", r"\midrule",
            " \\\\\n\\midrule\n".join(body) + r" \\", r"\bottomrule", r"\end{tabular}",
            *([rf"\par\smallskip\raggedright {_tex(' '.join(table.notes))}"] if table.notes else []),
            r"\end{table*}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


_MARKDOWN = str.maketrans({c: "\\" + c for c in "\\|*`"})
_TEX = str.maketrans({
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": "$|$", "<": "$<$", ">": "$>$",
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "Δ": r"$\Delta$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "¹": "$^1$", "–": "--",
})  # fmt: skip


def _markdown(text: str) -> str:
    return text.translate(_MARKDOWN)


def _tex(text: str) -> str:
    return text.translate(_TEX)


def write(
    metrics: Iterable[Path | str],
    profiles: Mapping[tuple[str, str], Path | str],
    *,
    summary: Path | str,
    comparison: Path | str | None = None,
    markdown: Path | str | None = None,
    tex: Path | str | None = None,
    **layout: Any,
) -> None:
    """Read metrics and profiles, and write summary, comparison and tables; `layout` as for `table_markdown`."""
    frame = read_metrics(metrics)
    costs = dict(zip(profiles, read_profiles(profiles.values()), strict=True))
    for path, table in ((summary, summarise(frame)), (comparison, compare(frame) if comparison else None)):
        if table is not None:
            rows = table.astype(object).where(table.notna(), "")  # an empty field where there is no number
            io.write_rows(path, table.columns, rows.itertuples(index=False))
    for path, table in ((markdown, table_markdown), (tex, table_tex)):
        if path is not None:
            io.write_text(path, table(frame, costs, **layout))
