"""Where every number comes from, and the pages and captions that tell it, against a study whose
files are made by hand."""

import io as streams
import itertools
import json
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import h5py
import jinja2
import numpy as np
import pytest
from docutils.core import publish_parts

from gdlib import io
from gdlib.config import load
from gdlib.report import markup
from gdlib.report.provenance import record, story

ROOT = Path(__file__).parents[1]
CAPTIONS = sorted((ROOT / "workflow" / "report").glob("*.rst"))
STUDIES = {name: study.model_dump(mode="json") for name, study in load(ROOT).studies.items()}
DATASET, TITLES = "cells", {"cells": "Cells & co", "large": "Large", "tiny": "Tiny"}
RUNS = [
    ("large", "teacher", 0),
    *(("tiny", method, seed) for method in ("none", "grd") for seed in (0, 1)),
]
SUMMARY = ("dataset", "student", "method", "segmenter", "metric", "mean", "std", "n")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Make the files of a study below the working directory.

    Return the arguments of `provenance.record`.
    """
    monkeypatch.chdir(tmp_path)
    data = {split: f"data/{DATASET}/{split}.h5" for split in ("train", "val", "test")}
    for split, path in data.items():
        about = {
            "samples": 1,
            "instances": 1,
            "types": "uint8: 1",
            "source": "folder",
            "options": {"channels": 1},
        }
        with io.create_h5(path, sha256=f"{split:x<64}", provenance="Made <by hand>.", **about):
            pass
    measure(f"data/{DATASET}/benchmark.tsv", 2)
    rows, metrics = [], []
    for network, method, seed in RUNS:
        key = f"{DATASET}/{network}/{method}/seed{seed}"
        folder = tmp_path / "results" / "s" / "runs" / key
        header = {
            "run": {"seed": seed, "method": method},
            "device": "GPU a",
            "precision": "bfloat16",
            "torch": "2.13",
            "gdlib": "0.1",
        }
        io.save_weights(folder / "weights.safetensors", {}, header | {"step": 7})
        with io.create_h5(
            folder / "mws" / "segmentation.h5",
            parameters={"stride": 2},
            weights_sha256=io.sha256(folder / "weights.safetensors"),
        ):
            pass
        path = f"results/s/runs/{key}/mws/metrics.csv"
        io.write_rows(
            path, io.METRIC_COLUMNS, [(DATASET, network, method, seed, "mws", "a", "aji", 0.5)]
        )
        metrics.append(path)
        measure(f"benchmarks/train/{key}.tsv", 100)
        measure(f"benchmarks/segment/{key}/mws.tsv", 1, "NA")
        rows.append((DATASET, network, method, "mws", "aji", 0.5, "", 1))
    measure(f"benchmarks/maps/{DATASET}/large/embedding.tsv", 30)
    measure(f"benchmarks/train/{DATASET}/tiny/igd/seed0.tsv", 1e6)  # of an earlier configuration
    io.write_rows("results/s/summary.csv", SUMMARY, dict.fromkeys(rows))
    io.write_text(
        "profile.json", json.dumps({"dataset": DATASET, "network": "tiny", "device": "A CPU"})
    )
    return {
        "summary": "results/s/summary.csv", "metrics": metrics, "profiles": ["profile.json"], "study": "s",
        "configuration": "steps: 7 # <few>\n", "benchmarks": "benchmarks", "data": {DATASET: data},
        "teachers": {DATASET: "large/teacher/seed0"}, "given": {},
    }  # fmt: skip


def test_warnings_about_data_are_problems_and_stand_below_their_table(study):
    sentence = "images/a.tif: the image is its label, drawn; put <it> there"
    for path in study["data"][DATASET].values():
        with h5py.File(path, "r+") as file:
            file.attrs["warnings"] = json.dumps([sentence])
    found = record.record(**study)
    assert found["problems"] == [f"{DATASET}: {sentence}"]
    assert f"Warning: {sentence}." in unescape(story.data_page(found, TITLES))
    assert sentence in unescape(story.provenance_page(found, TITLES))


def measure(path, seconds, mib=64.5):
    io.write_text(path, f"s\th:m:s\tmax_rss\n{seconds}\t0:00:00\t{mib}\n")


def test_every_cell_knows_its_runs_and_every_run_its_origin(study):
    found = record.record(**study)
    assert [(row["network"], row["method"]) for row in found["rows"]] == [
        ("large", "teacher"), ("tiny", "none"), ("tiny", "grd")
    ]  # fmt: skip
    row = found["rows"][-1]
    assert row["runs"] == [f"{DATASET}/tiny/grd/seed{seed}" for seed in (0, 1)]
    assert row["compared_with"] == [f"{DATASET}/tiny/none/seed{seed}" for seed in (0, 1)]
    assert row["metrics"] == {"aji": {"mean": 0.5, "std": None}}
    run = found["runs"][row["runs"][1]]
    weights = run["weights"]["file"]
    assert run["weights"] == {"file": weights, "sha256": io.sha256(weights), "given": False}
    assert (run["seed"], run["device"], run["precision"], run["torch"], run["step"]) == (
        1,
        "GPU a",
        "bfloat16",
        "2.13",
        7,
    )
    assert run["teacher"] == f"{DATASET}/large/teacher/seed0"
    assert found["runs"][f"{DATASET}/tiny/none/seed0"]["teacher"] is None
    assert run["segmenters"]["mws"]["parameters"] == {"stride": 2}
    assert found["data"][DATASET]["test"]["sha256"] == f"{'test':x<64}"
    assert found["code"]["commit"] == record.commit()
    assert found["costs"] == {
        f"{DATASET}/tiny": {"dataset": DATASET, "network": "tiny", "device": "A CPU"}
    }
    assert found["problems"] == []
    assert found["software"]["numpy"] == np.__version__


def test_the_configuration_of_a_run_has_a_hash_of_its_own(study):
    runs = record.record(**study)["runs"].values()
    assert len({run["configuration_sha256"] for run in runs}) == len(RUNS)


def test_weights_that_did_not_make_the_numbers_are_a_problem(study):
    path = f"results/s/runs/{DATASET}/tiny/grd/seed0/weights.safetensors"
    io.save_weights(path, {}, io.read_header(path) | {"step": 8})
    (problem,) = record.record(**study)["problems"]
    assert path in problem
    assert "made with other weights" in problem


def test_files_that_are_no_longer_there_are_not_asked_for(study, tmp_path):
    for path in [
        *tmp_path.rglob("*.safetensors"),
        *tmp_path.rglob("*.h5"),
        *tmp_path.rglob("*.tsv"),
    ]:
        path.unlink()
    found = record.record(**study)
    run = found["runs"][f"{DATASET}/tiny/grd/seed1"]
    assert (run["weights"]["sha256"], run["device"], run["seed"]) == (None, None, 1)
    assert found["data"][DATASET] == {"train": None, "val": None, "test": None}
    assert found["jobs"] == []
    pages = write(found, tmp_path)
    assert "no longer there" in pages["provenance"]
    assert "no longer there" in pages["data"]
    assert "0 jobs" in pages["time"]


def test_given_weights_and_another_teacher(study, tmp_path):
    io.save_weights(tmp_path / "mine.safetensors", {}, {"run": {"seed": 3}})
    path = f"results/s/runs/{DATASET}/tiny/grd@other/seed0/mws/metrics.csv"
    io.write_rows(
        path, io.METRIC_COLUMNS, [(DATASET, "tiny", "grd@other", 0, "mws", "a", "aji", 0.5)]
    )
    changes = {
        "metrics": [*study["metrics"], path],
        "given": {"large": str(tmp_path / "mine.safetensors")},
    }
    runs = record.record(**(study | changes))["runs"]
    assert runs[f"{DATASET}/large/teacher/seed0"]["weights"]["given"]
    assert runs[f"{DATASET}/tiny/grd@other/seed0"]["teacher"] == f"{DATASET}/other/teacher/seed0"


def write(found, folder):
    names = ("record", "configuration", "data", "time", "provenance")
    story.write(found, **{name: folder / f"{name}.html" for name in names}, titles=TITLES)
    return {name: (folder / f"{name}.html").read_text() for name in names}


def cells(page):
    rows = re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL)
    return [
        [unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
        for row in rows
    ]


def test_pages(study, tmp_path):
    found = record.record(**study)
    pages = write(found, tmp_path)
    assert json.loads(pages["record"]) == found
    assert "steps: 7 # &lt;few&gt;" in pages["configuration"]
    assert "Made &lt;by hand&gt;. Source folder (channels 1)." in pages["data"]
    assert ["test", "1", "1", "uint8: 1", f"{'test':x<64}"] in cells(pages["data"])
    times = {row[0]: row[2:] for row in cells(pages["time"]) if row}
    assert times["train teachers"] == ["1", "1 min 40 s", "1 min 40 s", "64"]
    assert times["train students"] == ["4", "6 min 40 s", "1 min 40 s", "64"], (
        "not those of an earlier configuration"
    )
    assert times["ask teachers about the training images"] == ["1", "30.0 s", "30.0 s", "64"]
    assert times["find objects"] == ["5", "5.0 s", "1.0 s", "–"]
    assert times["prepare the data"][0] == "1"
    row = next(row for row in cells(pages["provenance"]) if row[:3] == ["Tiny", "IGD + AGD", "1"])
    run = found["runs"][f"{DATASET}/tiny/grd/seed1"]
    assert row[3:6] == ["7", "GPU a, bfloat16", "torch 2.13, gdlib 0.1"]
    assert run["configuration_sha256"].startswith(row[6])
    assert run["weights"]["sha256"].startswith(row[7])
    for name in ("configuration", "data", "time", "provenance"):
        assert pages[name].startswith("<!doctype html>")
        assert "Cells & co" not in pages[name]


def test_code_sha256_is_of_names_and_content(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = io.code_sha256(tmp_path)
    (tmp_path / "b.txt").write_text("no code")
    assert io.code_sha256(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = io.code_sha256(tmp_path)
    (tmp_path / "b.py").write_text("2")
    assert len({first, second, io.code_sha256(tmp_path)}) == 3


def test_tables_as_a_page():
    group = [[markup.Cell("block")], [markup.Cell("a<b"), markup.Cell("0.5", bold=True)]]
    table = markup.Table("key", "A & B", ["name", "value\nval"], [group], ["a note"], names=1)
    text = markup.html([("Cells & co", [table])])
    assert cells(text) == [[], ["block"], ["a<b", "0.5"]]
    assert '<td class="block" colspan="2">block</td>' in text
    assert '<td class="number"><b>0.5</b></td>' in text
    assert "<h2>Cells &amp; co</h2>" in text
    assert "<p>A &amp; B</p>" in text
    assert '<p class="note">a note</p>' in text


# --- Captions -------------------------------------------------------------------------------------------------------------


def rendered(path, **snakemake):
    """Render a caption as Snakemake does, links behind it included.

    Return the page and what docutils has to say.
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    links = (
        "\n\n.. _Workflow: javascript:show_panel('workflow')\n\n.. _2. Tables: "
        "javascript:app.showCategory('2.%20Tables')\n"
    )
    text = environment.from_string(path.read_text() + links).render(
        snakemake=SimpleNamespace(**snakemake)
    )
    said = streams.StringIO()
    page = publish_parts(text, writer_name="html", settings_overrides={"warning_stream": said})[
        "html_body"
    ]
    return page, said.getvalue()


as_snakemake_calls_it = pytest.mark.filterwarnings(
    "ignore:Argument .writer_name.:PendingDeprecationWarning"
)


def assert_clean(page, said):
    assert said == ""
    assert "system-message" not in page
    assert "problematic" not in page
    assert not re.search(r"\*\*|``|\{\{|\{%|mailto:", page), "markup that did not become anything"


@as_snakemake_calls_it
@pytest.mark.parametrize("path", CAPTIONS, ids=lambda path: path.stem)
def test_captions_say_nothing_of_docutils(path):
    for dataset, ndim, crop in itertools.product(
        ("bbbc039", "my_cells_", "a*b"), (2, 3), (None, 256)
    ):
        wildcards = SimpleNamespace(dataset=dataset, ablation="bank_size")
        params = SimpleNamespace(ndim=ndim, crop=crop, sample=3)
        page, said = rendered(
            path, wildcards=wildcards, params=params, config={"study": "quick", "studies": STUDIES}
        )
        assert_clean(page, said)
        assert (dataset in page) == ("wildcards.dataset" in path.read_text())


@as_snakemake_calls_it
@pytest.mark.parametrize("only", [None, "bbbc039,celegans", ["my_cells_"]])
@pytest.mark.parametrize("name", [*STUDIES, "my_study_"])
def test_the_front_page_fits_every_study(name, only):
    awkward = (
        "1. *Cells_ `in` |3D|* and a title that is far longer than the line that is usually "
        "put below titles\n"
    )
    own = {
        "title": awkward,
        "datasets": ["my_cells_"],
        "teacher": "big",
        "students": ["tiny_"],
        "methods": ["none", "grd@big"],
    }
    studies = STUDIES | {"my_study_": own | {"seeds": [0]}}
    config = {"study": name, "studies": studies} | ({"only": only} if only else {})
    page, said = rendered(ROOT / "workflow" / "report" / "workflow.rst", config=config)
    assert_clean(page, said)
    text = " ".join(unescape(re.sub("<.*?>", "", page)).split())
    assert " ".join(studies[name]["title"].split()) in text
    chosen = only.split(",") if isinstance(only, str) else only
    command = (
        f"snakemake --cores all --config study={name}"
        + f" only={','.join(chosen or [])}" * bool(only)
    )
    assert f'<pre class="literal-block">\n{command}\n</pre>' in page
    assert ("more datasets" in text) == bool(only)
    assert f"On {', '.join(chosen or studies[name]['datasets'])}, a teacher (" in text
    seeds = len(studies[name]["seeds"])
    assert (
        f"each with {seeds} seed{'s' * (seeds > 1)} and by each of these methods: "
        f"{', '.join(studies[name]['methods'])}" in text
    )


def test_every_caption_is_used_and_there():
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    used = set(re.findall(r"report/(\w+)\.rst", rules)) | set(
        re.findall(r'\b(?:page|figure)\(\s*f?"([a-z]+)', rules)
    )
    drawn = rules[rules.index("DRAWN = {") : rules.index("for NAME_OF")]
    used |= set(re.findall(r'^    "([a-z]+)', drawn, re.MULTILINE))
    assert {path.stem for path in CAPTIONS} == used


def test_pages_have_only_characters_that_fonts_have():
    """All but ASCII is in the set that fonts of every common system share (WGL4), so that no icon
    is an empty box."""
    common = set("±×÷²³¹½µ°·§«»éäöüßÖÄÜ–—‘’“”…−≈≠≤≥√∞∑∂∆Ωλμπσ ΔΣαβγδε←↑→↓↔█▌░■□●")
    for path in [
        *CAPTIONS,
        *(ROOT / "gdlib" / "report").glob("*.py"),
        *(ROOT / "workflow").rglob("*.smk"),
    ]:
        found = {c for c in path.read_text() if not c.isascii()} - common
        assert not found, f"{path.name}: {found}"
