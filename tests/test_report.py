"""Tables against closed forms and SciPy, figures by what they show and by their bytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from scipy import stats

from gdlib import io
from gdlib.config import TEACHER
from gdlib.evaluate.metrics import METRICS, evaluate, overlaps
from gdlib.report import names
from gdlib.report.figures import charts, make, neurons, pictures, sections, style, surfaces
from gdlib.report.tables import results, summary

ROOT = Path(__file__).parents[1]
DATASET, LARGE, SMALL = "cells_1", "large", "small"
TITLES = {DATASET: "Cells & co", LARGE: "Large", SMALL: "Small"}
LAYOUT = {"keys": ["aji", "voi"], "main": "aji", "titles": TITLES, "budget": "100 steps"}


def frame(values, metric="aji", segmenter="mutex_watershed"):
    """Make metrics from {(method, seed): values per image}."""
    rows = [
        (
            DATASET,
            LARGE if method == TEACHER else SMALL,
            method,
            seed,
            segmenter,
            f"i{k}",
            metric,
            float(value),
        )
        for (method, seed), images in values.items()
        for k, value in enumerate(images)
    ]
    return pd.DataFrame(rows, columns=list(io.METRIC_COLUMNS))


def with_counts(metrics, empty=(), false=lambda method, seed: 0):
    """Add how many objects the images have: none in those called empty, where `false` objects of
    ten pixels are found."""
    runs = metrics.drop_duplicates(
        [name for name in io.METRIC_COLUMNS if name not in ("metric", "value")]
    )
    none = runs["sample"].isin(empty)
    found = np.array([false(*run) for run in zip(runs["method"], runs["seed"], strict=True)]) * none
    counts = {"objects": np.where(none, 0, 9), "object_pixels": np.where(none, 0, 90)}
    counts |= {
        "false_objects": found,
        "false_pixels": 10 * found,
        "pixels": np.full(len(runs), 400),
    }
    return pd.concat(
        [metrics, *(runs.assign(metric=key, value=one) for key, one in counts.items())],
        ignore_index=True,
    )


def study(methods=("none", "igd", "grd"), seeds=(0, 1, 2), teacher=0.9, images=7):
    """Make metrics of a whole study in which every method is a bit better than the one before.

    VOI = 1 - AJI.
    """
    rng = np.random.default_rng(0)
    values = {} if teacher is None else {(TEACHER, 0): np.full(images, teacher)}
    values |= {
        (m, s): 0.5 + 0.1 * k + rng.normal(0, 0.03, images)
        for k, m in enumerate(methods)
        for s in seeds
    }
    return with_counts(
        pd.concat(
            [frame(values), frame({k: 1 - v for k, v in values.items()}, "voi")], ignore_index=True
        )
    )


def profile(network, scale):
    return {
        "dataset": DATASET, "network": network, "parameters": int(3e5 * scale), "macs": int(2e9 * scale), "image_shape": [48, 64],
        "latency_ms": 10.0 * scale, "latency_ms_p90": 12.0 * scale, "peak_memory_mib": None, "device": "A_100% CPU", "threads": 2,
        "precision": "float32", "torch": "2.13.0",
    }  # fmt: skip


def em_study(segmenters=("waterz", "multicut"), images=3):
    """Make metrics of volumes, where lower is better and the order of methods depends on the
    segmenter."""
    rng = np.random.default_rng(1)
    frames = []
    for k, segmenter in enumerate(segmenters):
        level = {TEACHER: 0.3, "none": 0.9, "igd": 0.7 - 0.1 * k, "grd": 0.6 + 0.2 * k}
        for metric in ("voi_split", "voi"):
            runs = {
                (m, s): level[m] + rng.normal(0, 0.02, images)
                for m in level
                for s in ((0,) if m == TEACHER else (0, 1))
            }
            frames.append(frame(runs, metric, segmenter))
    return with_counts(pd.concat(frames, ignore_index=True).assign(dataset="tissue"))


PROFILES = {(DATASET, LARGE): profile(LARGE, 50), (DATASET, SMALL): profile(SMALL, 1)}


def blobs(seed=0, shape=(48, 64)):
    """Make an image with touching discs and their label."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape)
    label = np.zeros(shape, np.uint32)
    for k, (cy, cx) in enumerate(
        [(10, 10), (10, 21), (30, 14), (34, 40), (12, 50), (40, 58)], start=1
    ):
        label[((y - cy) ** 2 + (x - cx) ** 2 < 36) & (label == 0)] = k
    image = np.where(label > 0, 200, 30) + rng.normal(0, 10, shape)
    return io.Sample(
        "s0",
        np.clip(image, 0, 255).astype(np.uint8)[None],
        label,
        attrs={"voxel_size_nm": np.array([500.0, 500.0])},
    )


def faulty(label):
    """Miss 6, merge 1 and 2, split 4, and invent an object."""
    out = label.copy()
    out[label == 6] = 0
    out[label == 2] = 1
    out[:34][label[:34] == 4] = 7
    out[40:46, 2:8] = 9
    return out


def tubes(ignore=False):
    """Make a volume of four tubes that run through its sections.

    The voxels are three times as deep as they are wide.
    """
    rng = np.random.default_rng(5)
    z, y, x = np.indices((14, 40, 48))
    label = np.zeros(z.shape, np.uint32)
    for k, (cy, cx, slope) in enumerate(
        [(9, 9, 0.4), (28, 12, -0.5), (12, 34, 0.3), (30, 36, 0.0)], start=1
    ):
        label[((y - cy - slope * z) ** 2 + (x - cx) ** 2 < 40) & (label == 0)] = k
    label[:5][label[:5] == 4] = 0
    image = np.clip(np.where(label > 0, 190, 60) + rng.normal(0, 12, label.shape), 0, 255).astype(
        np.uint8
    )[None]
    attrs = {"voxel_size_nm": [30.0, 10.0, 10.0]}
    return io.Sample("v0", image, label, x >= 44 if ignore else None, attrs)


def entangled(label):
    """Merge 2 into 1, cut 3 between sections 7 and 8, take a tenth from 4, and miss it in the last
    section."""
    out = label.copy()
    out[label == 2] = 1
    out[8:][label[8:] == 3] = 5
    out[6][label[6] == 4] = 6
    out[13][label[13] == 4] = 0
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write all inputs of all figures, as the pipeline would.

    Return `{figure: (inputs, params)}`.
    """
    root = tmp_path_factory.mktemp("study")
    metrics, profiles, histories, runs = [], [], [], []
    for (network, method, seed), block in study().groupby(
        ["network", "method", "seed"], sort=False
    ):
        metrics.append(root / f"{method}{seed}.csv")
        io.write_rows(metrics[-1], io.METRIC_COLUMNS, block.itertuples(index=False))
        runs.append((network, method, int(seed)))
        history = [
            (s, "train", n, 1.5 * v / s)
            for s in range(10, 101, 10)
            for n, v in (("loss", 2.0), ("loss/a", 1.0))
        ]
        history += [(s, "train", f"loss/{method}", 1.0) for s in range(10, 101, 10)]
        history += [(s, "val", "aji", 0.4 + s / 300 + seed / 50) for s in (50, 100)]
        histories.append(root / f"{method}{seed}_history.csv")
        io.write_rows(histories[-1], io.HISTORY_COLUMNS, history)
    varied = root / "varied.csv"
    write_metrics(varied, study(methods=("bank_size=8", "bank_size=16"), teacher=None))
    for (_, network), content in PROFILES.items():
        profiles.append(root / f"{network}.json")
        io.write_text(profiles[-1], json.dumps(content))
    sample = blobs()
    io.write_samples(root / "test.h5", [sample])
    methods, segmentations, predictions = [TEACHER, "none", "grd"], [], []
    for k, method in enumerate(methods):
        segmentations.append(root / f"{method}_segmentation.h5")
        with io.create_h5(segmentations[-1]) as file:
            io.put(
                file.create_group("s0"),
                "label",
                faulty(sample.label) if method == "none" else sample.label,
            )
        predictions.append(root / f"{method}_predictions.h5")
        embedding = np.random.default_rng(k).normal(size=(5, *sample.label.shape)) + sample.label
        with io.create_h5(predictions[-1], kept=["s0"]) as file:
            io.put(file.create_group("s0"), "embedding", embedding.astype(np.float16))
    volume, cubes = tubes(), []
    io.write_samples(root / "volumes.h5", [volume])
    for method in methods:
        cubes.append(root / f"{method}_cubes.h5")
        with io.create_h5(cubes[-1]) as file:
            io.put(
                file.create_group("v0"),
                "label",
                entangled(volume.label) if method == "none" else volume.label,
            )
    common = {
        "titles": TITLES,
        "dpi": 80,
        "metric": "aji",
        "methods": methods,
        "sample": 0,
        "crop": 32,
        "runs": runs,
    }
    inputs = {
        "metrics": metrics,
        "profiles": profiles,
        "histories": histories,
        "data": root / "test.h5",
    }
    inputs |= {"segmentations": segmentations, "predictions": predictions}
    text = lambda one: [str(p) for p in one] if isinstance(one, list) else str(one)
    inputs = {key: text(value) for key, value in inputs.items()}
    of_volumes = inputs | {"data": text(root / "volumes.h5"), "segmentations": text(cubes)}
    own_inputs = {
        "neurons": of_volumes,
        "ablation": inputs | {"metrics": [*inputs["metrics"], str(varied)]},
    }
    both = {"metrics": ["aji", "voi"]}
    own_params = {"methods": both, "ablation": both | {"ablation": "bank_size", "base": "grd"}}
    return {
        name: (own_inputs.get(name, inputs), common | own_params.get(name, {}))
        for name in make.FIGURES
    }


# --- Numbers -------------------------------------------------------------------------------------------------------------


def test_summary_is_mean_over_images_then_seeds():
    out = summary.summarise(
        frame({(TEACHER, 0): [0.8, 1.0], ("none", 0): [0.2, 0.4], ("none", 1): [0.6, 0.8]})
    )
    assert ",".join(out.columns) == "dataset,student,method,segmenter,metric,mean,std,n,images"
    teacher, none = out.itertuples(index=False)
    assert teacher[:6] == (DATASET, LARGE, TEACHER, "mutex_watershed", "aji", pytest.approx(0.9))
    assert np.isnan(teacher.std)
    assert teacher.n == 1
    assert none[1:] == (
        SMALL,
        "none",
        "mutex_watershed",
        "aji",
        pytest.approx(0.5),
        pytest.approx(np.sqrt(0.08)),
        2,
        2,
    )


def test_gap_closed_in_closed_form():
    share, std = summary.gap_closed([0.7, 0.8, 0.6], [0.5, 0.5, 0.5], [0.9])
    assert (share, std) == (pytest.approx(0.5), pytest.approx(0.25))
    lower, _ = summary.gap_closed([0.3], [0.5], [0.1], "voi")
    assert lower == pytest.approx(0.5)
    assert np.isnan(summary.gap_closed([0.7], [0.5], [0.9])[1])
    worse, _ = summary.gap_closed([0.4], [0.5], [0.9])
    assert worse == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("none", "teacher", "metric", "is_gap"),
    [
        ([0.5, 0.5], [0.5], "aji", False),
        ([0.5, 0.5], [0.4], "aji", False),
        ([0.5, 0.5], [0.5], "voi", False),
        ([0.5, 0.5], [0.6], "voi", False),
        ([0.004], [0.0095], "aji", False),  # six steps: 160 % of nothing
        ([0.5], [0.511], "aji", True),
        ([0.5], [0.509], "aji", False),
        ([0.5], [0.489], "arand", True),
        ([0.5], [0.491], "arand", False),
        ([0.5], [0.479], "voi", True),
        ([0.5], [0.481], "voi", False),
        ([0.5], [0.481], "voi_merge", False),
        ([7.0], [6.6], "dic", False),
        ([7.0], [6.4], "dic", True),
        ([0.5, 0.5], [0.509], "aji", False),  # whatever two seeds happen to agree on
        ([0.48, 0.50, 0.52], [0.539], "aji", False),  # their standard deviation is 0.02
        ([0.48, 0.50, 0.52], [0.541], "aji", True),
        ([0.48, 0.50, 0.52], [0.461], "voi", False),
        ([0.5], [0.55, 0.65], "aji", False),  # of the teacher 0.07
        ([0.48, 0.50, 0.52], [0.53, 0.55, 0.57], "aji", False),  # of the difference 0.028
        ([0.48, 0.50, 0.52], [0.54, 0.56, 0.58], "aji", True),
        ([0.5], [], "aji", False),
        ([0.5], [float("nan")], "aji", False),
    ],
)
def test_gap_needs_a_teacher_that_is_better_beyond_noise(none, teacher, metric, is_gap):
    share, std = summary.gap_closed(np.add(none, 0.1), none, teacher, metric)
    assert np.isfinite(share) == is_gap
    assert np.isfinite(std) == (is_gap and len(none) > 1)


def test_comparison_agrees_with_scipy_and_with_the_means():
    metrics = study()
    out = summary.compare(metrics).set_index(["method", "metric"])
    mean = summary.summarise(metrics).set_index(["method", "metric"])["mean"]
    table = metrics[metrics["metric"] == "aji"].pivot_table(
        index="sample", columns="method", values="value"
    )
    for method in ("igd", "grd"):
        row = out.loc[(method, "aji")]
        assert row["p_images"] == pytest.approx(stats.wilcoxon(table[method], table["none"]).pvalue)
        gap = (mean[method, "aji"] - mean["none", "aji"]) / (
            mean[TEACHER, "aji"] - mean["none", "aji"]
        )
        assert row["gap_closed"] == pytest.approx(gap)
        assert out.loc[(method, "voi"), "gap_closed"] == pytest.approx(gap)  # lower is better there
        pairs = (
            summary.per_seed(metrics)
            .query("metric == 'aji'")
            .pivot(index="seed", columns="method", values="value")
        )
        pairs = (pairs[method] - pairs["none"]).dropna()
        assert row["difference"] == pytest.approx(pairs.mean())
        assert row["difference_std"] == pytest.approx(pairs.std(ddof=1))
        assert row["p_seeds"] == pytest.approx(stats.ttest_1samp(pairs, 0).pvalue)
        assert (row["seeds"], row["images"]) == (3, 7)


def test_only_common_seeds_are_paired():
    out = summary.compare(
        frame({("none", 0): [0.5, 0.5], ("grd", 0): [0.6, 0.6], ("grd", 1): [0.9, 0.9]})
    ).iloc[0]
    assert out["difference"] == pytest.approx(0.1)
    assert out["seeds"] == 1
    assert np.isnan(out["difference_std"])
    assert np.isnan(out["gap_closed"])  # no teacher


def test_p_without_differences_is_one():
    assert summary.image_p([0.0, 0.0]) == 1
    assert summary.image_p([0.1 + 0.2 - 0.3, 0.0]) == 1  # rounding is no difference


def test_one_image_has_no_p():
    assert np.isnan(summary.image_p([0.3]))
    assert np.isnan(summary.compare(study(images=1))[["p_images", "p_images_holm"]]).all(axis=None)


def test_every_segmenter_is_compared_with_its_own_student_and_teacher():
    metrics = em_study()
    rows = list(metrics.itertuples())

    def mean(method, segmenter, seed):
        found = [
            r.value
            for r in rows
            if (r.method, r.segmenter, r.seed, r.metric) == (method, segmenter, seed, "voi")
        ]
        return sum(found) / len(found)

    out = summary.compare(metrics)
    assert tuple(out.columns) == summary.COMPARISON_COLUMNS
    assert len(out) == 2 * 2 * 2
    table = out.query("metric == 'voi'").set_index(["method", "segmenter"])
    for method in ("igd", "grd"):
        for segmenter in ("waterz", "multicut"):
            pairs = [
                mean(method, segmenter, seed) - mean("none", segmenter, seed) for seed in (0, 1)
            ]
            gap = (
                mean(TEACHER, segmenter, 0)
                - (mean("none", segmenter, 0) + mean("none", segmenter, 1)) / 2
            )
            row = table.loc[(method, segmenter)]
            assert row["difference"] == pytest.approx(sum(pairs) / 2)
            assert row["gap_closed"] == pytest.approx(sum(pairs) / 2 / gap)
            assert row["gap_closed"] > 0, "lower is better and every method is lower"
    means = summary.summarise(metrics).set_index(["method", "segmenter", "metric"])["mean"]
    assert means["grd", "multicut", "voi"] == pytest.approx(
        (mean("grd", "multicut", 0) + mean("grd", "multicut", 1)) / 2
    )


def test_no_comparison_without_a_plain_student():
    assert summary.compare(study(methods=("igd", "grd"))).empty


def write_metrics(path, metrics):
    io.write_rows(path, metrics.columns, metrics.itertuples(index=False))
    return path


def test_names_that_look_missing_are_names(tmp_path):
    metrics = study(images=2).replace({"sample": {"i0": "NA", "i1": "007"}})
    read = summary.read_metrics([write_metrics(tmp_path / "a.csv", metrics)])
    assert set(read["sample"]) == {"NA", "007"}
    assert "none" in set(read["method"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.drop(columns="seed"), "the columns are"),
        (lambda m: pd.concat([m, m]), "hold the same run"),
        (lambda m: m.drop(index=5), "lacks values"),
        (
            lambda m: m[(m["method"] != "grd") | (m["metric"] != "voi")],
            "small/grd/seed0 lacks values",
        ),
        (
            lambda m: pd.concat([m, m[m["method"] == TEACHER].assign(segmenter="waterz")]),
            "seed0 lacks values.*waterz",
        ),
        (lambda m: pd.concat([m, m[m["method"] == "grd"]]), "small/grd/seed0/mutex_watershed"),
        (lambda m: m.assign(value=m["value"].where(m["value"] < 0.85)), "not a finite number"),
    ],
)
def test_broken_metrics_are_one_clear_sentence(change, message, tmp_path):
    with pytest.raises(io.DataError, match=message):
        summary.read_metrics([write_metrics(tmp_path / "a.csv", change(study()))])


def test_absent_metric_is_named():
    with pytest.raises(io.DataError, match="do not hold pq"):
        results.table_markdown(study(), keys=["aji", "pq"], main="aji")


# --- Tables --------------------------------------------------------------------------------------------------------------


def cells(markdown):
    """Split the rows of the first table of a text."""
    lines = [line for line in markdown.split("\n\n")[2].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_says_everything():
    text = results.table_markdown(study(), PROFILES, **LAYOUT)
    header, _, teacher, none, _igd, grd = cells(text)
    assert header == [
        "network",
        "method",
        "AJI ↑",
        "VOI ↓",
        "Δ AJI",
        "gap closed",
        "p (images)",
        "p (seeds)",
    ]
    assert teacher == ["Large", "teacher", "0.900", "0.100", "", "", "", ""]
    assert none[:2] == ["Small", "student"]
    assert none[4:] == ["", "", "", ""]
    assert grd[:2] == ["", "IGD + AGD"]
    assert all(re.fullmatch(r"\*\*0\.\d{3} ± 0\.\d{3}\*\*", cell) for cell in grd[2:4])
    assert "**" not in "".join(none + teacher)
    assert re.fullmatch(r"\+0\.\d{3} ± 0\.\d{3}", grd[4])
    assert re.fullmatch(r"\d+ ± \d+ %", grd[5])
    assert grd[6] == r"0.016\*"  # 2 / 2**7: all seven images agree; twice that is still below 0.05
    for fact in (
        "Cells & co",
        "test split",
        "7 images",
        "seeds 0, 1, 2",
        "100 steps",
        "A_100% CPU",
        "2 threads",
    ):
        assert fact in text
    assert "0.300 (2 %)" in text  # parameters in millions, share of the teacher's
    assert results.NO_GAP not in text


def test_what_reads_the_same_is_equally_good():
    text = results.table_markdown(
        frame({("none", 0): [0.5000], ("grd", 0): [0.50001], ("igd", 0): [0.4]}),
        keys=["aji"],
        main="aji",
    )
    assert [row[2] for row in cells(text)[2:]] == ["**0.500**", "**0.500**", "0.400"]


@pytest.mark.parametrize("teacher", [0.3, 0.5, None])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_gap_share_is_left_out_with_a_note(teacher, seeds, tmp_path):
    metrics = study(teacher=teacher, seeds=seeds)
    noise = " and 2 standard deviations over seeds" * (len(seeds) > 1)
    for metric, least in (("aji", "0.01 AJI"), ("voi", "0.02 VOI")):
        layout = LAYOUT | {"main": metric}
        why = (
            f"Not defined: no teacher is better than the plain student by at least {least}{noise}."
        )
        text = results.table_markdown(metrics, **layout)
        assert cells(text)[-1][5] == results.NO_GAP
        assert f"{results.NO_GAP} {why}" in text
        tex = results.table_tex(metrics, **layout)
        assert f"$^1$ {why}" in tex
        assert r"\%" not in tex
    out = {name: tmp_path / name for name in ("summary", "comparison", "markdown", "tex")}
    results.write([write_metrics(tmp_path / "m.csv", metrics)], [], **out, **LAYOUT)
    written = pd.read_csv(out["comparison"])
    assert written[["gap_closed", "gap_closed_std"]].isna().all(axis=None), "empty there too"
    assert written["difference"].notna().all()


def test_one_seed_has_no_deviation():
    text = results.table_markdown(study(seeds=(0,)), **LAYOUT)
    assert "±" not in text
    assert "One seed" in text


def test_every_segmenter_has_its_block_of_rows():
    metrics = em_study()
    text = results.table_markdown(
        metrics, keys={"tissue": ["voi_split", "voi"]}, main={"tissue": "voi"}
    )
    header, _, *lines = cells(text)
    assert header == [
        "network",
        "method",
        "VOI split ↓",
        "VOI ↓",
        "Δ VOI",
        "gap closed",
        "p (images)",
        "p (seeds)",
    ]
    assert [line[1] for line in lines] == 2 * ["", "teacher", "student", "IGD", "IGD + AGD"]
    assert [lines[0], lines[5]] == [["*waterz*", *[""] * 7], ["*multicut*", *[""] * 7]]
    names = {"teacher": TEACHER, "student": "none", "IGD": "igd", "IGD + AGD": "grd"}
    rows = list(metrics.itertuples())
    for segmenter, block in (("waterz", lines[1:5]), ("multicut", lines[6:])):
        for column, metric in ((2, "voi_split"), (3, "voi")):
            shown = {}
            for line in block:
                values = {}
                for r in rows:
                    if (r.method, r.segmenter, r.metric) == (names[line[1]], segmenter, metric):
                        values.setdefault(r.seed, []).append(r.value)
                means = [sum(v) / len(v) for v in values.values()]
                shown[line[1]] = sum(means) / len(means)
                assert line[column].strip("*").startswith(f"{shown[line[1]]:.3f}")
                assert ("±" in line[column]) == (len(means) == 2)
            best = min(("student", "IGD", "IGD + AGD"), key=shown.__getitem__)
            assert [line[1] for line in block if line[column].startswith("**")] == [best], (
                "lower is better"
            )
    assert "Bold: best of each student in its block." in text
    assert "cannot be below 0.250" in text  # 2 / 2**3
    tex = results.table_tex(metrics, keys=["voi_split", "voi"], main="voi")
    assert tex.count(r"\multicolumn{8}{l}{\textit{") == 2


def test_metrics_of_every_dataset_are_its_own():
    both = pd.concat([study(), em_study(("waterz",), images=1)], ignore_index=True)
    keys, main = (
        {DATASET: ["aji"], "tissue": ["voi_split", "voi"]},
        {DATASET: "aji", "tissue": "voi"},
    )
    budget = {DATASET: "9 steps", "tissue": "8 steps"}
    text = results.table_markdown(both, keys=keys, main=main, budget=budget)
    planes, volume = text.split("## ")[1:]
    assert "| network | method | AJI ↑ | Δ AJI | gap closed | p (images) | p (seeds) |" in planes
    assert (
        "| network | method | VOI split ↓ | VOI ↓ | Δ VOI | gap closed | p (seeds) |\n" in volume
    ), "one image has no p"
    assert "9 steps" in planes
    assert "8 steps" in volume
    assert "waterz" not in text, "a dataset with one segmenter needs no name of it"
    with pytest.raises(io.DataError, match="do not hold aji"):
        results.table_markdown(both, keys=keys | {"tissue": ["aji"]}, main=main)


def test_teacher_stands_beside_trivial_baselines(tmp_path):
    metrics = em_study()
    rng = np.random.default_rng(2)
    rows = [
        ("tissue", split, name, f"i{k}", metric, rng.uniform(0.4, 20 if metric == "voi" else 2))
        for split in ("val", "test") for name in ("one_segment", "components")
        for k in range(3) for metric in ("voi_split", "voi")
    ]  # fmt: skip
    io.write_rows(tmp_path / "b.csv", summary.BASELINE_COLUMNS, rows)
    scores = {
        "waterz": {"voi": 0.25, "voi_split": 0.125},
        "multicut": {"voi": 0.75, "voi_split": 0.5},
    }
    weights = []
    for seed, factor in ((0, 1.0), (1, 3.0)):
        weights.append(tmp_path / f"teacher{seed}.safetensors")
        validation = {
            s: {key: factor * value for key, value in one.items()} for s, one in scores.items()
        }
        run = {"dataset": "tissue", "network": "given weights know another name"}
        io.save_weights(weights[-1], {}, {"run": run, "validation": validation})
    source = write_metrics(tmp_path / "m.csv", metrics)
    out = {name: tmp_path / name for name in ("summary", "comparison", "markdown", "tex")}
    layout = {
        "keys": ["voi_split", "voi"],
        "main": "voi",
        "titles": {"components": "threshold and components"},
    }
    results.write([source], [], **out, baselines=[tmp_path / "b.csv"], weights=weights, **layout)
    text = out["markdown"].read_text()
    body = text[text.index("Trivial baselines and the teacher") :]
    header, _, *lines = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in body.splitlines()
        if line.startswith("|")
    ]
    columns = [("voi_split", "val"), ("voi_split", "test"), ("voi", "val"), ("voi", "test")]
    assert header[1:] == ["VOI split ↓ val", "VOI split ↓ test", "VOI ↓ val", "VOI ↓ test"]
    assert [line[0] for line in lines] == [
        "one segment",
        "threshold and components",
        "teacher, waterz",
        "teacher, multicut",
    ]
    for column, (metric, split) in enumerate(columns, start=1):
        expected = []
        for name in ("one_segment", "components"):
            values = [row[5] for row in rows if (row[1], row[2], row[4]) == (split, name, metric)]
            expected.append(sum(values) / len(values))
        for segmenter in ("waterz", "multicut"):
            values = [2 * scores[segmenter][metric]]  # mean of one and three times
            if split == "test":
                found = metrics.query(
                    "method == @TEACHER and segmenter == @segmenter and metric == @metric"
                )
                values = list(found["value"])
            expected.append(sum(values) / len(values))
        digits = 1 if max(expected) >= 10 else 3
        assert [line[column] for line in lines] == [f"{value:.{digits}f}" for value in expected]
    assert r"\shortstack[r]{VOI split $\downarrow$ \\ val}" in out["tex"].read_text()
    results.write([source], [], **out, **layout)
    assert "Trivial" not in out["markdown"].read_text()
    io.write_rows(tmp_path / "b.csv", summary.BASELINE_COLUMNS[1:], [])
    with pytest.raises(io.DataError, match=r"b\.csv: the columns are split"):
        summary.read_baselines([tmp_path / "b.csv"])


def test_tex_is_escaped_and_well_formed():
    titles = TITLES | {SMALL: r"a_b & c% #1 {x} ~ ^ $ \ <|>"}
    text = results.table_tex(study(), PROFILES, **(LAYOUT | {"titles": titles}))
    assert (
        r"a\_b \& c\% \#1 \{x\} \textasciitilde{} \textasciicircum{} \$ \textbackslash{} "
        r"$<$$|$$>$"
    ) in text
    assert text.isascii()
    assert r"\textbf{" in text
    bare = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    for name in ("table*", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 2
    for body in re.findall(
        r"\\begin{tabular}{([lr]+)}\n(.*?)\\end{tabular}", text, flags=re.DOTALL
    ):
        rows = [line for line in body[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(body[0])}
    assert re.findall(r"^\\(toprule|midrule|bottomrule)", text, flags=re.MULTILINE)[:4] == [
        "toprule", "midrule", "midrule", "bottomrule",
    ]  # fmt: skip


def test_written_tables(files, tmp_path):
    inputs, _ = files["methods"]
    paths = {name: tmp_path / name for name in ("summary", "comparison", "markdown", "tex")}
    results.write(inputs["metrics"], inputs["profiles"], **paths, **LAYOUT)
    first = {name: path.read_bytes() for name, path in paths.items()}
    results.write(inputs["metrics"], inputs["profiles"], **paths, **LAYOUT)
    assert first == {name: path.read_bytes() for name, path in paths.items()}
    lines = paths["summary"].read_text().splitlines()
    assert lines[0] == ",".join(summary.SUMMARY_COLUMNS)
    assert lines[1] == f"{DATASET},{LARGE},{TEACHER},mutex_watershed,aji,0.9,,1,7"
    assert len(lines) == 1 + 4 * 2
    assert len(paths["comparison"].read_text().splitlines()) == 1 + 2 * 2


# --- Images without objects ----------------------------------------------------------------------------------------------


EMPTY = ("i1", "i4")
ALL = study()
WITHOUT = ALL[~ALL["sample"].isin(EMPTY)]


def hidden(methods=("none", "igd", "grd"), images=7, seeds=(0, 1, 2)):
    """Make a study in which two images have no objects: IGD finds 3 + seed there, the others
    nothing, which scores 1."""
    metrics = study(methods, images=images, seeds=seeds)
    metrics = metrics[metrics["metric"].isin(METRICS)]
    empty = metrics["sample"].isin(EMPTY)
    clean = (metrics["method"] != "igd") == (metrics["metric"] == "aji")
    metrics = metrics.assign(value=metrics["value"].where(~empty, clean.astype(float)))
    return with_counts(metrics, EMPTY, lambda method, seed: (3 + seed) * (method == "igd"))


def of_metrics(table):
    return table[table["metric"].isin(METRICS)].reset_index(drop=True)


def test_means_tests_and_figures_are_of_images_with_objects():
    assert summary.images_of(hidden()) == (5, 2)
    assert summary.images_of(ALL) == (7, 0)
    pd.testing.assert_frame_equal(summary.compare(hidden()), summary.compare(WITHOUT))
    pd.testing.assert_frame_equal(
        of_metrics(summary.summarise(hidden())), summary.summarise(WITHOUT)
    )
    assert set(summary.compare(hidden())["images"]) == {5}
    for draw in (
        lambda m: charts.methods(m, ["aji"]),
        lambda m: charts.tradeoff(m, {n: PROFILES[DATASET, n] for n in (LARGE, SMALL)}, "aji"),
    ):
        drawn = [
            [line.get_xydata().tolist() for axis in draw(m).axes for line in axis.lines]
            for m in (hidden(), WITHOUT)
        ]
        assert drawn[0] == drawn[1]


def test_what_is_found_in_images_without_objects_is_a_mean_of_its_own():
    out = summary.summarise(hidden()).set_index(["method", "metric"])
    for metric, factor in (("false_objects", 1), ("false_pixels", 10)):
        assert tuple(out.loc[("igd", metric), ["mean", "std", "n", "images"]]) == (
            4 * factor,
            factor,
            3,
            2,
        )
        assert tuple(out.loc[("none", metric), ["mean", "n", "images"]]) == (0, 3, 2)
    assert set(of_metrics(out.reset_index())["images"]) == {5}
    assert not set(summary.summarise(ALL)["metric"]) - set(METRICS), (
        "where every image has objects, nothing is added"
    )


def test_tables_list_images_without_objects_apart(tmp_path):
    source = write_metrics(tmp_path / "m.csv", hidden())
    out = {name: tmp_path / name for name in ("summary", "comparison", "markdown", "tex")}
    results.write([source], [], **out, **LAYOUT)
    text, tex = out["markdown"].read_text(), out["tex"].read_text()
    assert cells(text) == cells(results.table_markdown(WITHOUT, **LAYOUT))
    for words in (
        "5 images with objects and 2 without",
        "over the 5 images",
        "table of its own",
        "in the 2 test images of",
    ):
        assert words in text
        assert words in tex.replace("\\&", "&")
    own = text[text.index("What was found in the 2 test images of Cells & co without objects") :]
    lines = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in own.splitlines()
        if line.startswith("|")
    ]
    assert lines == [
        ["network", "method", "objects ↓", "their pixels ↓"], ["---", "---", "---:", "---:"],
        ["Large", "teacher", "0.0", "0 (0.0 %)"],
        ["Small", "student", "0.0 ± 0.0", "0 ± 0 (0.0 %)"],
        ["", "IGD", "4.0 ± 1.0", "40 ± 10 (10.0 %)"],
        ["", "IGD + AGD", "0.0 ± 0.0", "0 ± 0 (0.0 %)"],
    ]  # fmt: skip
    assert r"\label{tab:cells_1-empty}" in tex
    assert r" & IGD & 4.0 $\pm$ 1.0 & 40 $\pm$ 10 (10.0 \%) \\" in tex
    written = pd.read_csv(out["summary"]).set_index(["method", "metric"])
    assert tuple(written.loc[("igd", "false_objects"), ["mean", "std", "images"]]) == (4, 1, 2)
    assert written.loc[("igd", "aji"), "images"] == 5
    assert set(pd.read_csv(out["comparison"])["images"]) == {5}
    plain = results.table_markdown(ALL, **LAYOUT)
    assert "without objects" not in plain
    assert "table of its own" not in plain


def test_every_segmenter_found_its_own_in_images_without_objects():
    metrics = with_counts(
        em_study()[lambda m: m["metric"].isin(METRICS)], ["i0"], lambda method, seed: 1 + seed
    )
    ((_, (_, table)),) = results.result_tables(metrics, keys=["voi"], main="voi")
    rows = [[cell.text for cell in row] for group in table.groups for row in group]
    block = [
        ["large", "teacher", "1.0", "10 (2.5 %)"],
        ["small", "student", "1.5 ± 0.7", "15 ± 7 (3.8 %)"],
    ]
    block += [["", method, "1.5 ± 0.7", "15 ± 7 (3.8 %)"] for method in ("IGD", "IGD + AGD")]
    assert rows == [["waterz"], *block, ["multicut"], *block]


def test_one_image_with_objects_is_one_image():
    text = results.table_markdown(
        hidden(images=2).replace({"sample": {"i0": "i1", "i1": "i0"}}), **LAYOUT
    )
    assert "1 image with objects and 1 without" in text
    assert "One image: there is no test over images" in text
    assert "p (images)" not in text


def test_baselines_are_means_over_images_with_objects():
    rows = [("tissue", "test", "one_segment", s, m, v) for s, m, v in (
        ("a", "voi", 2.0), ("a", "objects", 3.0), ("b", "voi", 0.0), ("b", "objects", 0.0), ("b", "false_objects", 1.0),
    )]  # fmt: skip
    # The same name in another split is another image.
    rows += [
        ("tissue", "val", "one_segment", "b", m, v) for m, v in (("voi", 4.0), ("objects", 2.0))
    ]
    trivial = pd.DataFrame(rows, columns=list(summary.BASELINE_COLUMNS))
    ((_, (_, table)),) = results.result_tables(
        em_study(("waterz",)), keys=["voi"], main="voi", baselines=trivial
    )
    assert [cell.text for cell in table.groups[0][0]] == ["one segment", "4.000", "2.000"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[m["metric"] != "objects"], r"m\.csv: it does not say how many objects"),
        (
            lambda m: with_counts(m[m["metric"].isin(METRICS)], set(m["sample"])),
            "no test image of cells_1 has an object",
        ),
    ],
)
def test_metrics_that_cannot_be_averaged_are_one_clear_sentence(change, message, tmp_path):
    with pytest.raises(io.DataError, match=message):
        summary.read_metrics([write_metrics(tmp_path / "m.csv", change(study()))])


# --- Figures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, pytest.param(None, marks=pytest.mark.long)])
def test_figures_have_the_same_bytes_in_another_process_without_torch(count, files, tmp_path):
    """Also with other hashes of text and at another time."""
    files = dict(list(files.items())[:count])
    program = (
        "import json, sys\n"
        "from gdlib.report.figures import make\nfrom gdlib.report.tables import results\n"
        "for name, (inputs, params) in json.load(sys.stdin).items():\n"
        "    make.draw(name, inputs, params, [f'other/{name}.png', f'other/{name}.pdf'])\n"
        "assert not {'torch', 'snakemake'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(files),
        text=True,
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    for name, (inputs, params) in files.items():
        make.draw(name, inputs, params, [tmp_path / f"{name}.png", tmp_path / f"{name}.pdf"])
        for ending in ("png", "pdf"):
            content = (tmp_path / f"{name}.{ending}").read_bytes()
            assert content == (tmp_path / "other" / f"{name}.{ending}").read_bytes(), (
                f"{name}.{ending}"
            )
        assert b"/FontFile2" in content, "fonts are embedded as TrueType"
        assert b"/Type3" not in content
        assert b"CreationDate" not in content
    assert len(list(tmp_path.iterdir())) == 2 * len(files) + 1, "nothing temporary is left"


def texts(figure):
    return {text.get_text() for text in figure.findobj(Text)}


def test_names_of_the_pipeline_have_their_titles():
    from gdlib.evaluate.trivial import BASELINES
    from gdlib.segment.segmenters import SEGMENTERS

    assert {name: names.title(name) for name in BASELINES} == {
        name: one[0] for name, one in BASELINES.items()
    }
    assert not any("_" in names.title(name) for name in (*BASELINES, *SEGMENTERS))


def test_methods_look_the_same_everywhere():
    look = names.looks(["mine", TEACHER, "none", "grd", "other"], {"grd": "GRD"})
    assert look["grd"] == names.looks(["grd"])["grd"]._replace(title="GRD")
    assert (look["mine"].title, look["none"].title) == ("mine", "student")
    assert len({one.colour for one in names.METHODS.values()}) == len(names.METHODS)
    assert look["mine"].colour != look["other"].colour


def test_methods_figure_shows_all():
    metrics = pd.concat([study(), study().query("method != @TEACHER").assign(network="tiny")])
    figure = charts.methods(metrics, ["aji", "voi", "aji"], TITLES)
    assert {"AJI ↑", "VOI ↓", "Small", "tiny", "IGD + AGD", "student"} <= texts(figure)
    assert len(charts.methods(study(seeds=(0,), teacher=None), ["aji"]).axes) == 1


def test_figures_show_the_main_segmenter():
    metrics = em_study()
    only = metrics[metrics["segmenter"] == "waterz"]
    costs = {LARGE: profile(LARGE, 50), SMALL: profile(SMALL, 1)}
    for draw in (lambda m: charts.methods(m, ["voi"]), lambda m: charts.tradeoff(m, costs, "voi")):
        drawn = [
            [line.get_xydata().tolist() for axis in draw(m).axes for line in axis.lines]
            for m in (metrics, only)
        ]
        assert drawn[0] == drawn[1]


def test_figures_of_numbers_without_teacher_and_with_one_seed(tmp_path):
    metrics = study(seeds=(0,), teacher=None)
    for figure in (
        charts.methods(metrics, ["aji"]),
        charts.tradeoff(metrics, {SMALL: profile(SMALL, 1)}, "aji"),
    ):
        assert style.save(figure, tmp_path / "f", ["svg"]) == [tmp_path / "f.svg"]


def test_tradeoff_says_how_much_cheaper():
    figure = charts.tradeoff(
        study(), {network: p for (_, network), p in PROFILES.items()}, "voi", TITLES
    )
    assert {"Small\n50 × fewer", "Small\n50 × faster", "VOI ↓"} <= texts(figure)
    with pytest.raises(io.DataError, match="no profile of large"):
        charts.tradeoff(study(), {SMALL: profile(SMALL, 1)}, "aji")


def test_curves_compare_only_what_methods_share(files):
    inputs, params = files["curves"]
    history = summary.read_histories(inputs["histories"], params["runs"])
    left, right = charts.curves(history, "aji", TITLES).axes
    assert [line.get_ydata()[0] for line in left.lines] == [pytest.approx(0.15)] * 3  # loss/a alone
    assert right.lines[-1].get_ydata()[0] == pytest.approx(0.4 + 100 / 300)  # the teacher
    assert len(right.collections) == 3  # bands of three seeds


def test_a_figure_shows_one_dataset():
    with pytest.raises(io.DataError, match="one dataset"):
        charts.methods(pd.concat([study(), study().assign(dataset="other")]), ["aji"])


def test_every_error_has_its_colour():
    label = blobs().label
    status = pictures._status(label, faulty(label))
    assert {name: sorted(ids) for name, ids in status.items()} == {
        "merged": [1], "split": [4, 7], "missed": [6], "spurious": [9], "correct": [3, 5],
    }  # fmt: skip


def test_panel_prints_the_metric_of_the_whole_image():
    sample = blobs()
    found = faulty(sample.label)
    expected = evaluate(sample.label, found)["pq"]
    for crop in (None, 20, 1000):
        figure = pictures.panel(sample, {TEACHER: sample.label, "none": found}, "pq", crop=crop)
        assert {"PQ 1.000", f"PQ {expected:.3f}", "teacher", "student", *pictures.STATUS} <= texts(
            figure
        )
        side = crop or 1000
        assert figure.axes[0].images[0].get_array().shape == (min(48, side), min(64, side), 3)


def test_planes_heed_what_is_ignored():
    sample = blobs()
    found = faulty(sample.label)
    blind = io.Sample(sample.id, sample.image, sample.label, found != sample.label, sample.attrs)
    assert "AJI 1.000" in texts(pictures.panel(blind, {"none": found}))


def test_embeddings_of_a_volume_show_its_fullest_section():
    sample = tubes()
    shown = pictures.embeddings(
        sample, {TEACHER: np.random.default_rng(0).normal(size=(4, *sample.label.shape))}
    )
    section = max(range(14), key=lambda z: (sample.label[z] > 0).sum())
    assert shown.axes[2].images[0].get_array().shape == (40, 48, 3)
    np.testing.assert_array_equal(
        shown.axes[0].images[0].get_array(), pictures.grey(sample.image[:, section])
    )


def test_embeddings_may_be_a_part_of_a_volume(tmp_path):
    sample, origin, shape = tubes(), (5, 8, 4), (3, 20, 30)
    part = tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))
    io.write_samples(tmp_path / "test.h5", [sample])
    paths = [tmp_path / "a.h5", tmp_path / "b.h5"]
    for path in paths:
        with io.create_h5(path, kept=["v0"]) as file:
            group = file.create_group("v0")
            io.put(
                group,
                "embedding",
                np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float16),
            )
            group["embedding"].attrs["origin"] = origin
    inputs, params = (
        {"data": tmp_path / "test.h5", "predictions": paths},
        {"methods": [TEACHER, "none"]},
    )
    drawn = make.FIGURES["embeddings"](inputs, params).axes[0].images[0].get_array()
    choices = [pictures.grey(sample.image[:, z])[part[1:]] for z in range(5, 8)]
    inside = [pictures.grey(sample.image[(slice(None), z, *part[1:])]) for z in range(5, 8)]
    assert drawn.shape == (20, 30, 3) == choices[0].shape
    assert any(np.array_equal(drawn, one) for one in inside)
    import h5py

    with h5py.File(paths[1], "r+") as file:
        file["v0"]["embedding"].attrs["origin"] = (0, 0, 0)
    with pytest.raises(io.DataError, match="another part of v0"):
        make.FIGURES["embeddings"](inputs, params)


# --- Volumes -------------------------------------------------------------------------------------------------------------


def overlap(label, segmentation, a, s):
    return sum(
        1
        for v, w in zip(label.ravel().tolist(), segmentation.ravel().tolist(), strict=True)
        if (v, w) == (a, s)
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_voxel_has_its_mistake(seed):
    rng = np.random.default_rng(seed)
    label, found = rng.integers(0, 5, (2, 3, 6, 7)), rng.integers(0, 7, (2, 3, 6, 7))[0]
    label = label[0]
    kind = sections.mistakes(label, found, overlaps(label, found))
    shared = {(a, s): overlap(label, found, a, s) for a in range(1, 5) for s in range(1, 7)}
    for place in np.ndindex(label.shape):
        a, s = int(label[place]), int(found[place])
        if a == 0:
            assert kind[place] == 0
        elif s == 0:
            assert kind[place] == 3
        else:
            of_segment, of_object = (
                [shared[b, s] for b in range(1, 5)],
                [shared[a, t] for t in range(1, 7)],
            )
            # ties may go either way
            if of_segment.count(max(of_segment)) == of_object.count(max(of_object)) == 1:
                assert kind[place] == (
                    2 if shared[a, s] < max(of_segment) else shared[a, s] < max(of_object)
                )


def test_a_perfect_segmentation_has_no_mistakes_under_other_names():
    label = tubes().label
    assert not sections.mistakes(label, (label * 7) % 29, overlaps(label, (label * 7) % 29)).any()


def test_panel_of_a_volume_is_where_students_differ():
    sample = tubes(ignore=True)
    grd = sample.label.copy()
    grd[9][sample.label[9] == 1] = 0  # the only difference of the students, in section 9
    none = sample.label.copy()
    none[:, :, 44:] = 9  # does not count
    figure = sections.panel(
        sample, {TEACHER: sample.label, "none": none, "grd": grd}, "voi", crop=20
    )
    expected = evaluate(sample.label, grd, sample.ignore)["voi"]
    assert {
        "xy\nsection 9",
        "VOI 0.000",
        f"VOI {expected:.3f}",
        "student",
        "teacher",
        "image",
    } <= texts(figure)
    legend = {text.partition(":")[0] for text in texts(figure) if ":" in text}
    assert legend == {"split", "merged", "missed"}
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == 2 * 5 + 2 * 3
    # Half as deep as wide, in nm: 20 x 10 nm wide, 3 sections of 30 nm deep.
    assert [axis.images[0].get_array().shape[:2] for axis in axes[:10:5]] == [(20, 20), (3, 20)]
    assert [axis.get_aspect() for axis in axes[:10:5]] == [1, 3]


def test_panel_of_a_volume_without_students_differences_or_voxel_size():
    sample = tubes()
    plain = io.Sample("v", sample.image, sample.label)
    fullest = max(range(14), key=lambda z: (sample.label[z] > 0).sum())
    for segmentations in ({TEACHER: sample.label}, {"none": sample.label}):
        figure = sections.panel(plain, segmentations)
        assert any(text.startswith("xy") and text.endswith(str(fullest)) for text in texts(figure))
        assert not any("µm" in text for text in texts(figure))
    same = entangled(sample.label)
    assert any("µm" in text for text in texts(sections.panel(sample, {"none": same, "grd": same})))


def test_segments_have_the_colour_of_their_object():
    label = tubes().label
    found = entangled(label)
    colours = sections.palette(4)
    assert len({tuple(one) for one in colours}) == 5
    own = sections._colours_of(overlaps(label, found), colours, 6)
    larger = 1 if (label == 1).sum() > (label == 2).sum() else 2
    assert own[1].tolist() == colours[larger].tolist()
    first, second = (3, 5) if (label[:8] == 3).sum() > (label[8:] == 3).sum() else (5, 3)
    assert own[first].tolist() == colours[3].tolist()
    assert own[second].tolist() == pytest.approx(0.45 * colours[3] + 0.55)


def test_figures_of_volumes_from_files(files, tmp_path):
    inputs, params = files["neurons"]
    make.draw("panel", inputs, params | {"metric": "voi"}, [tmp_path / "panel.png"])
    make.draw("neurons", inputs, params, [tmp_path / "neurons.png"])
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 1000
    with pytest.raises(io.DataError, match="no volumes"):
        make.draw("neurons", *files["panel"], [])


def test_worst_merge_and_best_object_are_found_by_counting():
    sample = tubes()
    found = {TEACHER: sample.label, "none": entangled(sample.label), "grd": sample.label}
    label = sample.label
    # Segment 1 of the student joins 1 and 2: its first object is the larger.
    sizes = {k: int((label == k).sum()) for k in (1, 2, 3, 4)}
    first, other = sorted((1, 2), key=lambda k: -sizes[k])
    tables_of = [overlaps(label, found[m]) for m in ("none", "grd")]
    fit = {}
    for k in (1, 2, 3, 4):
        fit[k] = 0
        for one in ("none", "grd"):
            segment = max(
                range(1, 7), key=lambda s, one=one: ((label == k) & (found[one] == s)).sum()
            )
            both, either = (
                (label == k) & (found[one] == segment),
                (label == k) | (found[one] == segment),
            )
            fit[k] += both.sum() / either.sum()
    best = max((k for k in fit if k != first), key=fit.__getitem__)
    assert neurons._examples(tables_of) == {"worst merge": first, "best of ten": best}
    assert neurons._held(tables_of[0], first) == (1, {other: sizes[other]}, 1.0)
    segment, joined, share = neurons._held(tables_of[0], 4)
    assert (segment, joined) == (4, {})
    assert share == pytest.approx(((label == 4) & (found["none"] == 4)).sum() / sizes[4])
    shown = texts(neurons.neurons(sample, found))
    assert {
        f"object {first}",
        f"object {best}",
        "100 % of it, with 1 other",
        "100 % of it",
        "worst merge",
    } <= shown


def test_inaccurate_borders_join_nothing():
    label = tubes().label
    wide = label.copy()
    y, x = np.nonzero(label[7] == 2)
    wide[7, y.min(), x] = 1  # a few voxels of 2
    assert neurons._held(overlaps(label, wide), 1)[1] == {}


def test_neurons_that_are_missed_or_absent():
    sample = tubes()
    assert "missed" in texts(neurons.neurons(sample, {"none": sample.label * 0}))
    empty = io.Sample("e", sample.image, sample.label * 0)
    with pytest.raises(io.DataError, match='"e" has no objects'):
        neurons.neurons(empty, {"none": empty.label})


# --- Surfaces ------------------------------------------------------------------------------------------------------------


def ball(radius=300.0, voxel=(30.0, 10.0, 10.0), centre=(420.0, 400.0, 380.0), shape=(28, 80, 80)):
    """Make the mask of a ball; lengths in nm."""
    z, y, x = ((np.arange(n) + 0.5) * v for n, v in zip(shape, voxel, strict=True))
    square = (
        (z[:, None, None] - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2 + (x - centre[2]) ** 2
    )
    return square < radius**2


@pytest.mark.parametrize(
    ("voxel", "shape"), [((30.0, 10.0, 10.0), (28, 80, 80)), ((10.0, 10.0, 10.0), (84, 80, 80))]
)
@pytest.mark.parametrize("cell", [10.0, 24.0])
def test_surface_of_a_ball(voxel, shape, cell):
    points, normals = surfaces.surface(ball(voxel=voxel, shape=shape), voxel, cell)
    away = points - np.array([420.0, 400.0, 380.0])
    distance = np.linalg.norm(away, axis=1)
    assert abs(distance.mean() - 300) < cell / 2
    assert np.abs(distance - 300).max() < 1.5 * max(cell, voxel[0])
    assert (np.einsum("nd,nd->n", normals, away) / distance).mean() > 0.97
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-9)
    assert np.abs(points.mean(axis=0) - [420, 400, 380]).max() < cell / 2


def test_surface_closes_at_the_border_and_of_nothing_is_empty():
    points, _ = surfaces.surface(np.ones((4, 10, 10), bool), (10.0, 10.0, 10.0), 10.0)
    assert np.abs(points.min(axis=0)).max() < 6
    assert np.abs(points.max(axis=0) - [40, 100, 100]).max() < 6
    assert surfaces.surface(np.zeros((4, 10, 10), bool), (10.0, 10.0, 10.0), 10.0).points.shape == (
        0,
        3,
    )


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 90), (30, 25), (210, 0), (300, 60)])
def test_views_are_rotations_that_mirror_nothing(azimuth, elevation):
    axes = surfaces.view(azimuth, elevation)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    # x to the right, y down and z away are right-handed, and so are right, up and towards the
    # reader.
    right, up, away = axes[:, ::-1]  # as (x, y, z)
    np.testing.assert_allclose(np.cross(right, up), -away, atol=1e-12)
    assert up[2] <= 1e-12, "the first section is on top"


def test_picture_of_balls():
    """From above, the picture is that of the sections.

    The nearer ball hides the other, and the area is that of a disc.
    """
    mask = ball(voxel=(10.0, 10.0, 10.0), shape=(84, 80, 80), radius=150.0)
    near = surfaces.surface(mask, (10.0, 10.0, 10.0), 10.0)
    deep = near._replace(points=near.points + np.array([400.0, 100.0, 0.0]))
    red, green = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0])
    frame = (0.0, 800.0, -1000.0, 0.0)  # x, and y downwards
    axes = surfaces.view(0, 90)
    alone = surfaces.render([(near, red)], axes, frame, 5.0, 10.0)
    assert alone.shape == (200, 160, 4)
    covered = alone[..., 3].sum() * 25
    assert covered == pytest.approx(np.pi * 150**2, rel=0.08)
    y, x = (np.arange(n) * 5 + 2.5 for n in (200, 160))
    weight = alone[..., 3] / alone[..., 3].sum()
    assert (weight.sum(axis=1) @ y, weight.sum(axis=0) @ x) == (
        pytest.approx(400, abs=5),
        pytest.approx(380, abs=5),
    )
    for order in ([(near, red), (deep, green)], [(deep, green), (near, red)]):
        both = surfaces.render(order, axes, frame, 5.0, 10.0)
        assert both[80, 76, 0] > both[80, 76, 1], "the near ball is seen at its centre"
        assert both[124, 76, 1] > both[124, 76, 0], "the far ball beside it"
        assert both[0, 0, 3] == 0
        assert both.min() >= 0
        assert both.max() <= 1
    part = surfaces.render([(near, red)], axes, (300.0, 500.0, -450.0, -300.0), 5.0, 10.0)[..., 3]
    assert (part[3:-3, 3:-3] == alone[63:87, 63:97, 3]).all(), "the frame cuts, and no more"


def test_window_stays_inside_and_finds_what_matters():
    interest = np.zeros((50, 60))
    interest[2, 57] = 1
    for side in (10, 33, 50, 55):
        y, x = pictures.window(interest, side)
        assert interest[y, x].shape == (min(side, 50), side)
        assert interest[y, x].any()


def test_colours_ignore_what_affinities_ignore():
    """Rotations and lengths of embeddings do not change an affinity, so they change no colour."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 20, 30)) * np.array([3, 2, 1.5, 0.5, 0.3, 0.2])[:, None, None]
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    turned = np.einsum("de,eyx->dyx", rotation, vectors) * rng.uniform(0.5, 2, size=(20, 30))
    colours = pictures.embedding_colours({TEACHER: vectors, "grd": turned})
    np.testing.assert_allclose(colours[TEACHER], colours["grd"], atol=1e-6)
    assert colours[TEACHER].shape == (20, 30, 3)
    assert colours[TEACHER].min() == 0
    assert colours[TEACHER].max() == 1


@pytest.mark.parametrize("vectors", [np.zeros((4, 5, 6)), np.ones((2, 5, 6)), np.eye(6)[None, :5]])
def test_colours_of_poor_embeddings_are_finite(vectors):
    colours = pictures.embedding_colours({TEACHER: vectors, "none": vectors.astype(np.float16)})
    assert all(np.isfinite(rgb).all() and rgb.shape == (5, 6, 3) for rgb in colours.values())


def test_missing_samples_and_shapes_are_named(files):
    for name, message in (("panel", "no number 3"), ("embeddings", "no number 3")):
        inputs, params = files[name]
        with pytest.raises(io.DataError, match=message):
            make.draw(name, inputs, params | {"sample": 3}, [])
    with pytest.raises(io.DataError, match="shape"):
        pictures.embeddings(blobs(), {TEACHER: np.zeros((3, 9, 9))})


def test_every_figure_has_a_caption_and_every_metric_an_arrow():
    captions = {path.stem for path in (ROOT / "workflow" / "report").glob("*.rst")}
    pages = {"table", "paper", "workflow", "configuration", "data", "time", "provenance"}
    assert captions == {*make.FIGURES, *pages}
    assert all(names.metric_title(key)[-1] in "↑↓" for key in METRICS)
