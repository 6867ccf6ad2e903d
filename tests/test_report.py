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
from gdlib.metrics import METRICS, evaluate
from gdlib.report import charts, figures, pictures, style, summary, tables

ROOT = Path(__file__).parents[1]
DATASET, LARGE, SMALL = "cells_1", "large", "small"
TITLES = {DATASET: "Cells & co", LARGE: "Large", SMALL: "Small"}
LAYOUT = {"keys": ["aji", "voi"], "main": "aji", "titles": TITLES, "budget": "100 steps"}


def frame(values, metric="aji"):
    """Make metrics from {(method, seed): values per image}."""
    rows = [
        (DATASET, LARGE if method == TEACHER else SMALL, method, seed, f"i{k}", metric, float(value))
        for (method, seed), images in values.items()
        for k, value in enumerate(images)
    ]
    return pd.DataFrame(rows, columns=list(io.METRIC_COLUMNS))


def study(methods=("none", "igd", "grd"), seeds=(0, 1, 2), teacher=0.9, images=7):
    """Make metrics of a whole study in which every method is a bit better than the one before; VOI = 1 - AJI."""
    rng = np.random.default_rng(0)
    values = {} if teacher is None else {(TEACHER, 0): np.full(images, teacher)}
    values |= {(m, s): 0.5 + 0.1 * k + rng.normal(0, 0.03, images) for k, m in enumerate(methods) for s in seeds}
    return pd.concat([frame(values), frame({k: 1 - v for k, v in values.items()}, "voi")], ignore_index=True)


def profile(network, scale):
    return {
        "dataset": DATASET, "network": network, "parameters": int(3e5 * scale), "macs": int(2e9 * scale), "image_shape": [48, 64],
        "latency_ms": 10.0 * scale, "latency_ms_p90": 12.0 * scale, "peak_memory_mib": None, "device": "A_100% CPU", "threads": 2,
        "precision": "float32", "torch": "2.13.0",
    }  # fmt: skip


PROFILES = {(DATASET, LARGE): profile(LARGE, 50), (DATASET, SMALL): profile(SMALL, 1)}


def blobs(seed=0, shape=(48, 64)):
    """Make an image with touching discs and their label."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape)
    label = np.zeros(shape, np.uint32)
    for k, (cy, cx) in enumerate([(10, 10), (10, 21), (30, 14), (34, 40), (12, 50), (40, 58)], start=1):
        label[((y - cy) ** 2 + (x - cx) ** 2 < 36) & (label == 0)] = k
    image = np.where(label > 0, 200, 30) + rng.normal(0, 10, shape)
    return io.Sample(
        "s0", np.clip(image, 0, 255).astype(np.uint8)[None], label, {"voxel_size_nm": np.array([500.0, 500.0])}
    )


def faulty(label):
    """Miss 6, merge 1 and 2, split 4, and invent an object."""
    out = label.copy()
    out[label == 6] = 0
    out[label == 2] = 1
    out[:34][label[:34] == 4] = 7
    out[40:46, 2:8] = 9
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write all inputs of all figures, as the pipeline would; return `{figure: (inputs, params)}`."""
    root = tmp_path_factory.mktemp("study")
    metrics, profiles, histories, runs = [], [], [], []
    for (network, method, seed), block in study().groupby(["network", "method", "seed"], sort=False):
        metrics.append(root / f"{method}{seed}.csv")
        io.write_rows(metrics[-1], io.METRIC_COLUMNS, block.itertuples(index=False))
        runs.append((network, method, int(seed)))
        history = [
            (s, "train", n, 1.5 * v / s) for s in range(10, 101, 10) for n, v in (("loss", 2.0), ("loss/a", 1.0))
        ]
        history += [(s, "train", f"loss/{method}", 1.0) for s in range(10, 101, 10)]
        history += [(s, "val", "aji", 0.4 + s / 300 + seed / 50) for s in (50, 100)]
        histories.append(root / f"{method}{seed}_history.csv")
        io.write_rows(histories[-1], io.HISTORY_COLUMNS, history)
    for (_, network), content in PROFILES.items():
        profiles.append(root / f"{network}.json")
        io.write_text(profiles[-1], json.dumps(content))
    sample = blobs()
    io.write_samples(root / "test.h5", [sample])
    methods, segmentations, predictions = [TEACHER, "none", "grd"], [], []
    for k, method in enumerate(methods):
        segmentations.append(root / f"{method}_segmentation.h5")
        with io.create_h5(segmentations[-1]) as file:
            io.put(file.create_group("s0"), "label", faulty(sample.label) if method == "none" else sample.label)
        predictions.append(root / f"{method}_predictions.h5")
        embedding = np.random.default_rng(k).normal(size=(5, *sample.label.shape)) + sample.label
        with io.create_h5(predictions[-1], kept=["s0"]) as file:
            io.put(file.create_group("s0"), "embedding", embedding.astype(np.float16))
    common = {"titles": TITLES, "dpi": 80, "metric": "aji", "methods": methods, "sample": 0, "crop": 32, "runs": runs}
    inputs = {"metrics": metrics, "profiles": profiles, "histories": histories, "data": root / "test.h5"}
    inputs |= {"segmentations": segmentations, "predictions": predictions}
    inputs = {key: [str(p) for p in value] if isinstance(value, list) else str(value) for key, value in inputs.items()}
    return {
        name: (inputs, common | ({"metrics": ["aji", "voi"]} if name == "methods" else {})) for name in figures.FIGURES
    }


# --- Numbers -------------------------------------------------------------------------------------------------------------


def test_summary_is_mean_over_images_then_seeds():
    out = summary.summarise(frame({(TEACHER, 0): [0.8, 1.0], ("none", 0): [0.2, 0.4], ("none", 1): [0.6, 0.8]}))
    assert tuple(out.columns) == ("dataset", "student", "method", "metric", "mean", "std", "n")
    teacher, none = out.itertuples(index=False)
    assert teacher[:5] == (DATASET, LARGE, TEACHER, "aji", pytest.approx(0.9))
    assert np.isnan(teacher.std)
    assert teacher.n == 1
    assert none[1:] == (SMALL, "none", "aji", pytest.approx(0.5), pytest.approx(np.sqrt(0.08)), 2)


def test_gap_closed_in_closed_form():
    share, std = summary.gap_closed([0.7, 0.8, 0.6], [0.5, 0.5, 0.5], 0.9)
    assert (share, std) == (pytest.approx(0.5), pytest.approx(0.25))
    lower, _ = summary.gap_closed([0.3], [0.5], 0.1, better="lower")
    assert lower == pytest.approx(0.5)
    assert np.isnan(summary.gap_closed([0.7], [0.5], 0.9)[1])
    worse, _ = summary.gap_closed([0.4], [0.5], 0.9)
    assert worse == pytest.approx(-0.25)


@pytest.mark.parametrize(("teacher", "better"), [(0.5, "higher"), (0.4, "higher"), (0.5, "lower"), (0.6, "lower")])
def test_gap_needs_a_better_teacher(teacher, better):
    assert np.isnan(summary.gap_closed([0.7, 0.8], [0.5, 0.5], teacher, better)).all()


def test_comparison_agrees_with_scipy_and_with_the_means():
    metrics = study()
    out = summary.compare(metrics).set_index(["method", "metric"])
    mean = summary.summarise(metrics).set_index(["method", "metric"])["mean"]
    table = metrics[metrics["metric"] == "aji"].pivot_table(index="sample", columns="method", values="value")
    for method in ("igd", "grd"):
        row = out.loc[(method, "aji")]
        assert row["p"] == pytest.approx(stats.wilcoxon(table[method], table["none"]).pvalue)
        gap = (mean[method, "aji"] - mean["none", "aji"]) / (mean[TEACHER, "aji"] - mean["none", "aji"])
        assert row["gap_closed"] == pytest.approx(gap)
        assert out.loc[(method, "voi"), "gap_closed"] == pytest.approx(gap)  # lower is better there
        pairs = summary.per_seed(metrics).query("metric == 'aji'").pivot(index="seed", columns="method", values="value")
        pairs = (pairs[method] - pairs["none"]).dropna()
        assert row["difference"] == pytest.approx(pairs.mean())
        assert row["difference_std"] == pytest.approx(pairs.std(ddof=1))
        assert (row["seeds"], row["images"]) == (3, 7)


def test_only_common_seeds_are_paired():
    out = summary.compare(frame({("none", 0): [0.5, 0.5], ("grd", 0): [0.6, 0.6], ("grd", 1): [0.9, 0.9]})).iloc[0]
    assert out["difference"] == pytest.approx(0.1)
    assert out["seeds"] == 1
    assert np.isnan(out["difference_std"])
    assert np.isnan(out["gap_closed"])  # no teacher


def test_p_without_differences_is_one():
    assert summary.image_p([0.0, 0.0]) == 1
    assert summary.image_p([0.1 + 0.2 - 0.3, 0.0]) == 1  # rounding is no difference


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
        (lambda m: m[(m["method"] != "grd") | (m["metric"] != "voi")], "small/grd/seed0 lacks values"),
        (lambda m: m.assign(value=m["value"].where(m["value"] < 0.85)), "not a finite number"),
    ],
)
def test_broken_metrics_are_one_clear_sentence(change, message, tmp_path):
    with pytest.raises(io.DataError, match=message):
        summary.read_metrics([write_metrics(tmp_path / "a.csv", change(study()))])


def test_absent_metric_is_named():
    with pytest.raises(io.DataError, match="do not hold pq"):
        tables.table_markdown(study(), keys=["aji", "pq"], main="aji")


# --- Tables --------------------------------------------------------------------------------------------------------------


def cells(markdown):
    """Split the rows of the first table of a text."""
    lines = [line for line in markdown.split("\n\n")[2].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_says_everything():
    text = tables.table_markdown(study(), PROFILES, **LAYOUT)
    header, _, teacher, none, _igd, grd = cells(text)
    assert header == ["network", "method", "AJI ↑", "VOI ↓", "Δ AJI", "gap closed", "p"]
    assert teacher == ["Large", "teacher", "0.900", "0.100", "", "", ""]
    assert none[:2] == ["Small", "student"]
    assert none[4:] == ["", "", ""]
    assert grd[:2] == ["", "IGD + AGD"]
    assert all(re.fullmatch(r"\*\*0\.\d{3} ± 0\.\d{3}\*\*", cell) for cell in grd[2:4])
    assert "**" not in "".join(none + teacher)
    assert re.fullmatch(r"\+0\.\d{3} ± 0\.\d{3}", grd[4])
    assert re.fullmatch(r"\d+ ± \d+ %", grd[5])
    assert grd[6] == "0.016"  # 2 / 2**7: all seven images agree
    for fact in ("Cells & co", "test split", "7 images", "seeds 0, 1, 2", "100 steps", "A_100% CPU", "2 threads"):
        assert fact in text
    assert "0.300 (2 %)" in text  # parameters in millions, share of the teacher's
    assert tables.NO_GAP not in text


def test_what_reads_the_same_is_equally_good():
    text = tables.table_markdown(
        frame({("none", 0): [0.5000], ("grd", 0): [0.50001], ("igd", 0): [0.4]}), keys=["aji"], main="aji"
    )
    assert [row[2] for row in cells(text)[2:]] == ["**0.500**", "**0.500**", "0.400"]


@pytest.mark.parametrize(("teacher", "why"), [(0.3, "the teacher is not better"), (None, "there is no teacher")])
def test_gap_share_is_left_out_with_a_note(teacher, why):
    text = tables.table_markdown(study(teacher=teacher), **LAYOUT)
    assert cells(text)[-1][5] == tables.NO_GAP
    assert f"{tables.NO_GAP} Not defined: {why}" in text


def test_one_seed_has_no_deviation():
    text = tables.table_markdown(study(seeds=(0,)), **LAYOUT)
    assert "±" not in text
    assert "One seed" in text


def test_tex_is_escaped_and_well_formed():
    titles = TITLES | {SMALL: r"a_b & c% #1 {x} ~ ^ $ \ <|>"}
    text = tables.table_tex(study(), PROFILES, **(LAYOUT | {"titles": titles}))
    assert r"a\_b \& c\% \#1 \{x\} \textasciitilde{} \textasciicircum{} \$ \textbackslash{} $<$$|$$>$" in text
    assert text.isascii()
    assert r"\textbf{" in text
    bare = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    for name in ("table*", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 2
    for body in re.findall(r"\\begin{tabular}{([lr]+)}\n(.*?)\\end{tabular}", text, flags=re.DOTALL):
        rows = [line for line in body[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(body[0])}
    assert re.findall(r"^\\(toprule|midrule|bottomrule)", text, flags=re.MULTILINE)[:4] == [
        "toprule", "midrule", "midrule", "bottomrule",
    ]  # fmt: skip


def test_written_tables(files, tmp_path):
    inputs, _ = files["methods"]
    paths = {name: tmp_path / name for name in ("summary", "comparison", "markdown", "tex")}
    tables.write(inputs["metrics"], inputs["profiles"], **paths, **LAYOUT)
    first = {name: path.read_bytes() for name, path in paths.items()}
    tables.write(inputs["metrics"], inputs["profiles"], **paths, **LAYOUT)
    assert first == {name: path.read_bytes() for name, path in paths.items()}
    lines = paths["summary"].read_text().splitlines()
    assert lines[0] == ",".join(summary.SUMMARY_COLUMNS)
    assert lines[1] == f"{DATASET},{LARGE},{TEACHER},aji,0.9,,1"
    assert len(lines) == 1 + 4 * 2
    assert len(paths["comparison"].read_text().splitlines()) == 1 + 2 * 2


# --- Figures -------------------------------------------------------------------------------------------------------------


def test_figures_have_the_same_bytes_in_another_process_without_torch(files, tmp_path):
    """Also with other hashes of text and at another time."""
    program = (
        "import json, sys\n"
        "from gdlib.report import figures, tables\n"
        "for name, (inputs, params) in json.load(sys.stdin).items():\n"
        "    figures.draw(name, inputs, params, [f'other/{name}.png', f'other/{name}.pdf'])\n"
        "assert not {'torch', 'snakemake'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(files), text=True, cwd=tmp_path, env=environment, check=True
    )
    for name, (inputs, params) in files.items():
        figures.draw(name, inputs, params, [tmp_path / f"{name}.png", tmp_path / f"{name}.pdf"])
        for ending in ("png", "pdf"):
            content = (tmp_path / f"{name}.{ending}").read_bytes()
            assert content == (tmp_path / "other" / f"{name}.{ending}").read_bytes(), f"{name}.{ending}"
        assert b"/FontFile2" in content, "fonts are embedded as TrueType"
        assert b"/Type3" not in content
        assert b"CreationDate" not in content
    assert len(list(tmp_path.iterdir())) == 2 * len(files) + 1, "nothing temporary is left"


def texts(figure):
    return {text.get_text() for text in figure.findobj(Text)}


def test_methods_look_the_same_everywhere():
    look = style.looks(["mine", TEACHER, "none", "grd", "other"], {"grd": "GRD"})
    assert look["grd"] == style.looks(["grd"])["grd"]._replace(title="GRD")
    assert (look["mine"].title, look["none"].title) == ("mine", "student")
    assert len({one.colour for one in style.METHODS.values()}) == len(style.METHODS)
    assert look["mine"].colour != look["other"].colour


def test_methods_figure_shows_all():
    metrics = pd.concat([study(), study().query("method != @TEACHER").assign(network="tiny")])
    figure = charts.methods(metrics, ["aji", "voi", "aji"], TITLES)
    assert {"AJI ↑", "VOI ↓", "Small", "tiny", "IGD + AGD", "student"} <= texts(figure)
    assert len(charts.methods(study(seeds=(0,), teacher=None), ["aji"]).axes) == 1


def test_figures_of_numbers_without_teacher_and_with_one_seed(tmp_path):
    metrics = study(seeds=(0,), teacher=None)
    for figure in (charts.methods(metrics, ["aji"]), charts.tradeoff(metrics, {SMALL: profile(SMALL, 1)}, "aji")):
        assert style.save(figure, tmp_path / "f", ["svg"]) == [tmp_path / "f.svg"]


def test_tradeoff_says_how_much_cheaper():
    figure = charts.tradeoff(study(), {network: p for (_, network), p in PROFILES.items()}, "voi", TITLES)
    assert {"Small\n50 × fewer", "Small\n50 × faster", "VOI ↓"} <= texts(figure)
    with pytest.raises(io.DataError, match="no profile of large"):
        charts.tradeoff(study(), {SMALL: profile(SMALL, 1)}, "aji")


def test_curves_compare_only_what_methods_share(files):
    inputs, params = files["curves"]
    history = figures.read_histories(inputs["histories"], params["runs"])
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
        assert {"PQ 1.000", f"PQ {expected:.3f}", "teacher", "student", *pictures.STATUS} <= texts(figure)
        side = crop or 1000
        assert figure.axes[0].images[0].get_array().shape == (min(48, side), min(64, side), 3)


def test_volumes_are_shown_by_their_fullest_slice():
    flat = blobs()
    label = np.stack([flat.label * 0, flat.label, np.where(flat.label == 1, 1, 0)]).astype(np.uint32)
    volume = io.Sample("v", np.repeat(flat.image[:, None], 3, axis=1), label)
    figure = pictures.panel(volume, {"none": label * 0}, crop=16)
    assert "AJI 0.000" in texts(figure)
    shown = pictures.embeddings(volume, {TEACHER: np.random.default_rng(0).normal(size=(4, *label.shape))})
    assert shown.axes[2].images[0].get_array().shape == (48, 64, 3)


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
            figures.draw(name, inputs, params | {"sample": 3}, [])
    with pytest.raises(io.DataError, match="shape"):
        pictures.embeddings(blobs(), {TEACHER: np.zeros((3, 9, 9))})


def test_every_figure_has_a_caption_and_every_metric_an_arrow():
    captions = {path.stem for path in (ROOT / "workflow" / "report").glob("*.rst")}
    assert captions == {*figures.FIGURES, "table", "workflow"}
    assert all(style.metric_title(key)[-1] in "↑↓" for key in METRICS)
