"""Several teachers, ablations, corrected tests and the paper's tables, against hand-made
numbers."""

import itertools
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from gdlib import io
from gdlib.config import TEACHER, load
from gdlib.report import markup, names
from gdlib.report.figures import charts
from gdlib.report.provenance import record
from gdlib.report.tables import paper, results, summary

TITLES = {
    "resunet": "ResUNet",
    "nestedunet": "NestedUNet",
    "tiny": "Tiny",
    "bank_size": "bank size K",
}
LAYOUT = {"keys": ["aji", "voi"], "main": "aji", "titles": TITLES}


def frame(values, dataset="bbbc039", segmenter="mutex_watershed", metrics=("aji", "voi"), images=4):
    """Make metrics from {(network, method): mean per seed}.

    Images differ by a fixed pattern, VOI is 1 - AJI.
    """
    rows = []
    for (network, method), seeds in values.items():
        for (seed, mean), k, metric in itertools.product(enumerate(seeds), range(images), metrics):
            value = mean + 0.01 * (k - (images - 1) / 2)
            row = (
                dataset,
                network,
                method,
                seed,
                segmenter,
                f"i{k}",
                metric,
                1 - value if metric == "voi" else value,
            )
            rows.append(row)
    return pd.DataFrame(rows, columns=list(io.METRIC_COLUMNS))


TWO_TEACHERS = {
    ("resunet", TEACHER): [0.8],
    ("nestedunet", TEACHER): [0.9],
    ("tiny", "none"): [0.50, 0.52, 0.48],
    ("tiny", "grd"): [0.65, 0.66, 0.64],
    ("tiny", "grd@nestedunet"): [0.70, 0.69, 0.71],
}
ABLATION = {
    ("resunet", TEACHER): [0.8],
    ("tiny", "none"): [0.50, 0.52, 0.48],
    ("tiny", "grd"): [0.60, 0.63, 0.57],
    ("tiny", "bank_size=16"): [0.60, 0.61, 0.62],
    ("tiny", "bank_size=8"): [0.55, 0.56, 0.51],
}


def lines(table):
    """Return the rows of a table as they are read."""
    return [[cell.text for cell in row] for group in table.groups for row in group]


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


# --- Tests --------------------------------------------------------------------------------------------------------------


def test_holm_is_the_closed_test_of_bonferroni():
    """A hypothesis is rejected when every set of hypotheses that holds it is: another definition of
    the same."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.uniform(0, 0.4, rng.integers(1, 6)) ** 2
        sets = [s for n in range(1, p.size + 1) for s in itertools.combinations(range(p.size), n)]
        expected = [
            max(min(1, len(s) * p[list(s)].min()) for s in sets if k in s) for k in range(p.size)
        ]
        np.testing.assert_allclose(summary.holm(p), expected)
        at = rng.integers(0, p.size + 1)
        np.testing.assert_allclose(
            summary.holm(np.insert(p, at, np.nan)), np.insert(expected, at, np.nan)
        )


def test_test_over_seeds():
    assert np.isnan(summary.seed_p([0.3]))
    assert summary.seed_p([0.0, 0.0, 0.1 + 0.2 - 0.3]) == 1
    assert summary.seed_p([0.1, 0.1, 0.1]) == pytest.approx(0, abs=1e-12)
    # t = 2 / (1 / sqrt 3) = sqrt 12; with two degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    assert summary.seed_p([1.0, 2.0, 3.0]) == pytest.approx(1 - np.sqrt(12 / 14))


def test_methods_and_ablations_are_families_of_their_own():
    more = {("tiny", "igd"): [0.51, 0.55, 0.51]}
    out = summary.compare(frame(ABLATION | more)).query("metric == 'aji'").set_index("method")
    for family in (["grd", "igd"], ["bank_size=16", "bank_size=8"]):
        for test in ("p_images", "p_seeds"):
            np.testing.assert_allclose(
                out.loc[family, f"{test}_holm"], summary.holm(out.loc[family, test])
            )


# --- Several teachers ---------------------------------------------------------------------------------------------------


def test_gap_is_that_to_the_teacher_a_method_learned_from():
    out = summary.compare(frame(TWO_TEACHERS)).set_index(["method", "metric"])
    for metric in ("aji", "voi"):
        assert out.loc[("grd", metric), "gap_closed"] == pytest.approx(0.15 / 0.3)
        assert out.loc[("grd@nestedunet", metric), "gap_closed"] == pytest.approx(0.2 / 0.4)
    absent = frame({key: v for key, v in TWO_TEACHERS.items() if key[0] != "nestedunet"})
    out = summary.compare(absent).set_index(["method", "metric"])
    assert np.isnan(out.loc["grd@nestedunet", "gap_closed"]).all()
    assert np.isfinite(out.loc["grd", "gap_closed"]).all()


def test_tables_list_every_teacher():
    ((_, (table,)),) = results.result_tables(frame(TWO_TEACHERS), **LAYOUT)
    assert [line[:2] for line in lines(table)] == [
        ["ResUNet", "teacher"], ["NestedUNet", "teacher"],
        ["Tiny", "student"], ["", "IGD + AGD"], ["", "IGD + AGD from NestedUNet"],
    ]  # fmt: skip
    assert "teachers: seed 0" in table.caption
    assert any("the teacher that the method learned from" in note for note in table.notes)


def test_teachers_stand_beside_baselines_by_name(tmp_path):
    trivial = pd.DataFrame(
        [("bbbc039", split, "one_segment", "i0", "aji", 0.1) for split in ("val", "test")],
        columns=list(summary.BASELINE_COLUMNS),
    )
    for network, value in (("resunet", 0.7), ("nestedunet", 0.75)):
        run = {"dataset": "bbbc039", "network": network}
        header = {"run": run, "validation": {"mutex_watershed": {"aji": value}}}
        io.save_weights(tmp_path / f"{network}.safetensors", {}, header)
    validation = summary.read_validation(sorted(tmp_path.iterdir()))
    layout = {
        "keys": ["aji"],
        "main": "aji",
        "titles": TITLES,
        "baselines": trivial,
        "validation": validation,
    }
    ((_, (_, table)),) = results.result_tables(frame(TWO_TEACHERS), **layout)
    assert lines(table) == [
        ["one segment", "0.100", "0.100"],
        ["teacher ResUNet", "0.700", "0.800"],
        ["teacher NestedUNet", "0.750", "0.900"],
    ]


def test_other_teachers_look_alike_but_hollow():
    look = names.looks(["grd", "grd@nestedunet", "mine@nestedunet", "mine"], TITLES)
    assert look["grd@nestedunet"] == look["grd"]._replace(
        title="IGD + AGD from NestedUNet", hollow=True
    )
    assert look["mine@nestedunet"]._replace(title="mine", hollow=False) == look["mine"]
    assert look["mine"].colour != look["grd"].colour


def test_figures_show_every_teacher(tmp_path):
    metrics = frame(TWO_TEACHERS)
    figure = charts.methods(metrics, ["aji"], TITLES)
    marks = {
        line.get_xdata()[0]: line.get_linestyle()
        for line in figure.axes[0].lines
        if len(set(line.get_xdata())) == 1
    }
    assert {0.8, 0.9} <= {round(x, 12) for x in marks}
    assert {"teacher, ResUNet", "teacher, NestedUNet", "IGD + AGD from NestedUNet"} <= set(
        texts(figure)
    )
    cost = {
        "image_shape": [4, 4],
        "device": "CPU",
        "threads": 1,
        "precision": "float32",
        "torch": "2",
    }
    profiles = {
        n: cost | {"parameters": p, "latency_ms": p}
        for n, p in (("resunet", 8), ("nestedunet", 9), ("tiny", 1))
    }
    assert {"ResUNet", "Tiny\n8.0 × fewer"} <= set(
        texts(charts.tradeoff(metrics, profiles, "aji", TITLES))
    )
    history = pd.concat([
        pd.DataFrame([(s, split, name, s / 100) for s in (10, 20) for split, name in (("train", "loss"), ("val", "aji"))],
                     columns=list(io.HISTORY_COLUMNS)).assign(network=network, method=method, seed=0)
        for network, method in [*TWO_TEACHERS, ("tiny", "bank_size=8")]
    ])  # fmt: skip
    history.loc[history["network"] == "nestedunet", "value"] = 9
    right = charts.curves(history, "aji", TITLES).axes[1]
    assert len(right.lines) == 3, "two methods and one teacher"
    assert right.lines[-1].get_ydata()[0] == 0.2


# --- Ablations ----------------------------------------------------------------------------------------------------------


def test_results_list_an_ablation_as_a_block_of_its_own():
    ((_, (table, _)),) = results.result_tables(
        frame(ABLATION), **LAYOUT, ablations={"bank_size": "grd"}
    )
    shown = [line[:2] for line in lines(table)]
    assert shown == [
        ["ResUNet", "teacher"], ["Tiny", "student"], ["", "IGD + AGD"],
        ["ablation of IGD + AGD: bank size K"], ["Tiny", "bank size K = 16"], ["", "bank size K = 8"],
    ]  # fmt: skip
    bold = {row[1].text for group in table.groups for row in group if len(row) > 1 and row[2].bold}
    assert bold == {"IGD + AGD", "bank size K = 16"}, "the best of each block"


def test_table_of_an_ablation_compares_with_its_method():
    metrics = frame(ABLATION)
    ((_, (_, table)),) = results.result_tables(metrics, **LAYOUT, ablations={"bank_size": "grd"})
    assert table.header == [
        "network",
        "bank size K",
        "AJI ↑",
        "VOI ↓",
        "Δ AJI",
        "p (images)",
        "p (seeds)",
    ]
    student, base, sixteen, eight = lines(table)
    assert [student[1], base[1], sixteen[1], eight[1]] == ["student", "IGD + AGD", "16", "8"]
    assert student[4:] == base[4:] == ["", "", ""]
    assert sixteen[2] == "0.610 ± 0.010"
    # Differences of the seeds: 0, -0.02, 0.05 and -0.05, -0.07, -0.06.
    assert sixteen[4] == "+0.010 ± 0.036"
    assert eight[4] == "−0.060 ± 0.010"
    t = 0.06 / (0.01 / np.sqrt(3))
    assert eight[6] == f"{1 - t / np.sqrt(t**2 + 2):.3f}*"
    assert "*" not in sixteen[6]
    assert any(note.startswith("Δ AJI: difference to IGD + AGD") for note in table.notes)


def test_figure_of_an_ablation_is_ordered_and_has_its_references():
    numbers = frame(ABLATION)
    figure = charts.ablation(numbers, "bank_size", "grd", ["aji", "voi"], TITLES)
    left, right = figure.axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["8", "16"]
    for axis, values in ((left, [0.54, 0.61]), (right, [0.46, 0.39])):
        means = next(
            line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"
        )
        assert means.get_ydata() == pytest.approx(values)
    levels = {
        round(line.get_ydata()[0], 9) for line in left.lines if len(set(line.get_ydata())) == 1
    }
    assert {0.5, 0.6} <= levels
    assert {"bank size K", "AJI ↑\nteacher 0.800", "IGD + AGD, as in the catalogue"} <= set(
        texts(figure)
    )
    words = frame(
        {(n, m.replace("16", "nodes").replace("8", "edges")): v for (n, m), v in ABLATION.items()}
    )
    (axis,) = charts.ablation(words, "bank_size", "grd", ["aji"]).axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["nodes", "edges"], (
        "as they come"
    )
    with pytest.raises(io.DataError, match='no run of the ablation "pooling"'):
        charts.ablation(numbers, "pooling", "grd", ["aji"])


def test_other_figures_leave_ablations_out():
    with_it, without = (
        frame(ABLATION),
        frame({key: v for key, v in ABLATION.items() if "=" not in key[1]}),
    )
    drawn = [
        [line.get_xydata().tolist() for line in charts.methods(m, ["aji"]).axes[0].lines]
        for m in (with_it, without)
    ]
    assert drawn[0] == drawn[1]


# --- The paper's tables -------------------------------------------------------------------------------------------------


def em(segmenters=("multicut", "waterz")):
    values = {
        ("mala", TEACHER): [0.8],
        ("mala_tiny", "none"): [0.5, 0.5],
        ("mala_tiny", "grd"): [0.65, 0.75],
    }
    values |= {
        ("mala_tiny", "at"): [0.55, 0.56],
        ("mala_tiny", "rkd"): [0.5, 0.4],
        ("mala_tiny", "bank_size=8"): [0.6, 0.6],
    }
    keys = ("voi_split", "voi_merge", "voi", "arand")
    one = [frame(values, "ac34", segmenter, keys, images=1) for segmenter in segmenters]
    out = pd.concat(one, ignore_index=True)
    # lower is better
    return out.assign(value=1 - out["value"].where(out["metric"] != "voi", 1 - out["value"]))


def laid_out(metrics, **more):
    budget = dict.fromkeys(metrics["dataset"], "9 steps")
    main = {d: "voi" if d in ("ac34", "cremi") else "aji" for d in budget}
    return paper.paper_tables(metrics, main=main, budget=budget, titles=TITLES, **more)


def test_rows_and_columns_are_the_papers():
    ((heading, (table,)),) = laid_out(em(), trained={"ac34": "A100, torch 2"}, code="abc123")
    assert heading == "ac34"
    rows = lines(table)
    known = [f"+ {names.title(method)}" for method in ("at", "spkd", "rekd", "biskd")]
    block = ["teacher", "student", *known, "+ ours: IGD + AGD", "+ RKD"]
    assert [row[1] if len(row) > 1 else row[0] for row in rows] == [
        "waterz",
        *block,
        "multicut",
        *block,
    ]
    assert table.header[:10:2] == ["network", "VOI split ↓", "VOI merge ↓", "VOI ↓", "ARAND ↓"]
    assert table.header[3:11:2] == ["paper"] * 4
    assert table.header[10:] == ["gap in VOI closed", "paper", "p (seeds)", "seeds"]
    assert rows[3][1] == known[0]
    ours = rows[7]
    assert ours[6] == "0.300 ± 0.071"
    assert ours[10] == "67 ± 24 %"  # 0.2 of the gap of 0.3
    assert ours[11] == f"93.3 %{paper.OF_ANY}"
    assert set(rows[4][2:]) == {""}, "SPKD was not run"
    for fact in (
        "ac34, test split, 1 image",
        "seeds 0, 1",
        "9 steps",
        "trained on A100, torch 2",
        "code: abc123",
    ):
        assert fact in table.caption
    others = [row[11] for row in rows if len(row) > 1 and "ours" not in row[1]]
    assert set(others) == {""}, "nothing else is known"
    assert any("93.3 %" in note for note in table.notes)


def test_no_share_of_a_gap_that_is_none():
    metrics = em()
    # as bad as the plain student but for 0.01
    metrics.loc[metrics["method"] == TEACHER, "value"] += 0.29
    ((_, (table,)),) = laid_out(metrics)
    shown = {row[1]: row[10] for row in lines(table)[:9] if len(row) > 1}
    assert (shown["student"], shown["+ ours: IGD + AGD"], shown["+ RKD"]) == (
        "",
        results.NO_GAP,
        results.NO_GAP,
    )
    why = (
        "no teacher is better than the plain student by at least 0.02 VOI and 2 standard "
        "deviations over seeds"
    )
    assert f"{results.NO_GAP} Not defined: {why}." in table.notes


def test_the_papers_numbers_belong_to_its_students():
    metrics = em().replace({"network": {"mala_tiny": "resunet3d_tiny"}})
    ((_, (table,)),) = laid_out(metrics)
    assert not any("93.3" in cell for row in lines(table) for cell in row)
    assert any("93.3 %" in note and "mala_tiny" in note for note in table.notes)


def test_numbers_of_the_paper_stand_beside_ours():
    told = paper.read_paper()
    cell = {
        "dataset": "ac34",
        "student": "mala_tiny",
        "method": "at",
        "metric": "arand",
        "quantity": "mean",
        "value": 0.1234,
    }
    ((_, (table,)),) = laid_out(em(), paper=told | {"value": [cell | {"segmenter": "waterz"}]})
    found = [
        (k, j, text)
        for k, row in enumerate(lines(table))
        for j, text in enumerate(row)
        if text == "0.123"
    ]
    assert [(k, j) for k, j, _ in found] == [(3, 9)], "in the block of waterz alone"


def test_every_teacher_has_its_rows():
    ((_, (table,)),) = laid_out(frame(TWO_TEACHERS, metrics=("aji", "dice", "f1", "pq")))
    rows = [row[:2] for row in lines(table)]
    assert [row for row in rows if row[0]] == [
        ["ResUNet", "teacher"], ["Tiny", "student"], ["NestedUNet", "teacher"], ["Tiny", "student"],
    ]  # fmt: skip
    assert rows[6] == ["", "+ ours: IGD + AGD"]
    assert rows[-1] == ["", "+ ours: IGD + AGD from NestedUNet"]


def test_images_without_objects_are_in_no_mean_and_have_a_table():
    metrics = frame(TWO_TEACHERS, metrics=("aji", "dice", "f1", "pq"), images=5)
    first = metrics["sample"] == "i0"
    runs = metrics[metrics["metric"] == "aji"]
    counts = [
        runs.assign(metric=key, value=np.where(runs["sample"] == "i0", *v))
        for key, v in (
            ("objects", (0, 7)),
            ("false_objects", (2, 0)),
            ("false_pixels", (30, 0)),
            ("pixels", (90, 90)),
        )
    ]
    hidden = pd.concat([metrics.assign(value=metrics["value"].where(~first, 0)), *counts])
    ((_, (table, own)),) = laid_out(hidden)
    ((_, (without,)),) = laid_out(metrics[~first])
    assert lines(table) == lines(without)
    assert "4 images with objects and 1 without" in table.caption
    assert [row[2:] for row in lines(own)] == [["2.0", "30 (33.3 %)"]] * 2 + [
        ["2.0 ± 0.0", "30 ± 0 (33.3 %)"]
    ] * 3


def test_datasets_that_the_paper_does_not_have_are_left_out():
    planes = ("aji", "dice", "f1", "pq")
    parts = [
        frame(TWO_TEACHERS, dataset, metrics=planes)
        for dataset in ("phantom", "bbbc039", "bbbc039_official")
    ]
    found = [heading for heading, _ in laid_out(pd.concat([em(), *parts]))]
    assert found == ["bbbc039_official", "bbbc039", "ac34"], "in the paper's order"
    with pytest.raises(io.DataError, match="do not hold arand"):
        laid_out(em().query("metric != 'arand'"))


def test_what_the_paper_says_is_well_formed():
    told = paper.read_paper()
    assert set(told["dataset"]) == {"cvppp", "bbbc039", "celegans", "ac34", "cremi"}
    shares = {(v["dataset"], v["value"]) for v in told["value"] if v["quantity"] == "gap_closed"}
    assert shares == {("ac34", 0.933), ("cremi", 0.729)}
    assert all(v["source"] and v["quantity"] in ("mean", "gap_closed") for v in told["value"])
    catalogue = load(Path(__file__).parents[1])
    for layout in told["dataset"].values():
        assert set(layout["ours"]) <= set(catalogue.datasets)
        assert set(layout["metrics"]) <= set(paper.METRICS)


def test_written_tables_say_where_they_come_from(tmp_path):
    source, run = tmp_path / "m.csv", {"dataset": "ac34", "network": "mala"}
    metrics = em()
    counts = metrics[metrics["metric"] == "voi"].assign(metric="objects", value=5)
    metrics = pd.concat([metrics, counts])
    io.write_rows(source, metrics.columns, metrics.itertuples(index=False))
    for k, device in enumerate(("GPU a", "GPU a", "GPU b")):
        header = {
            "run": run,
            "device": device,
            "precision": "bfloat16",
            "torch": "2.13",
            "gdlib": "0.1",
        }
        io.save_weights(tmp_path / f"{k}.safetensors", {}, header)
    weights = sorted(tmp_path.glob("*.safetensors"))
    assert record.trained_on(weights) == {
        "ac34": "GPU a, bfloat16, torch 2.13, gdlib 0.1; GPU b, bfloat16, torch 2.13, gdlib 0.1"
    }
    out = {"markdown": tmp_path / "paper.md", "tex": tmp_path / "paper.tex"}
    paper.write(
        [source],
        [],
        weights,
        **out,
        main={"ac34": "voi"},
        budget={"ac34": "9 steps"},
        titles=TITLES,
    )
    text = out["markdown"].read_text()
    assert "GPU a, bfloat16, torch 2.13, gdlib 0.1; GPU b" in text
    assert f"code: {record.commit()}." in text
    tex = out["tex"].read_text()
    assert tex.isascii()
    for body in re.findall(r"\\begin{tabular}{([lr]+)}\n(.*?)\\end{tabular}", tex, flags=re.DOTALL):
        rows = [
            line
            for line in body[1].splitlines()
            if line.endswith(r"\\") and "multicolumn" not in line
        ]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(body[0])}


def test_commit_is_that_of_the_code_or_unknown(tmp_path):
    def git(*arguments):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *names, *arguments], check=True, capture_output=True)

    code, installed = tmp_path / "code", tmp_path / "installed"
    for folder in (code, installed):
        folder.mkdir()
        (folder / "a.py").write_text("1")
    if record.commit(tmp_path) != "unknown":
        pytest.skip("temporary files are in a repository")
    git("init")
    git("add", "code")
    assert record.commit(code) == "unknown", "nothing is committed"
    git("commit", "-m", "first")
    name = record.commit(code)
    assert re.fullmatch(r"[0-9a-f]{10}", name)
    assert record.commit(installed) == "unknown", "not part of the repository"
    (code / "a.py").write_text("2")
    assert record.commit(code) == f"{name} with later changes"
    assert record.commit(Path(tmp_path, "nowhere")) == "unknown"


def test_numbers_as_they_are_read():
    assert markup.p_value(float("nan")) == ""
    assert (markup.p_value(0.0004), markup.p_value(0.0206)) == ("< 0.001", "0.021")
