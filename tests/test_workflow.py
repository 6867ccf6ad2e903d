"""The workflow as its users meet it: what runs, what runs again after an edit, and what a mistake
looks like.

The smoke study runs once, in a copy of the repository. What runs again after an edit is asked in
tests/test_plan.py; here a few edits are dry runs in a copy of a study whose files are empty and
count as made.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_plan import (
    CATALOGUE,
    CONTRACT,
    DATA,
    FIGURES,
    GRD,
    NETWORKS,
    NONE,
    SEGMENTERS,
    TEACHING,
    VOLUMES,
    jobs_of,
    run_of,
)

from gdlib.config import load
from gdlib.io import sha256

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "config", "config.yaml", "envs", "gdlib", "profiles", "workflow")
SNAKEMAKE = Path(sys.executable).with_name("snakemake")


def snakemake(
    repository: Path, folder: Path, *arguments: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run the workflow of a repository in a folder; its environment is not activated."""
    command = [SNAKEMAKE, "--directory", folder, *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def dry_run(
    repository: Path, folder: Path, changes: dict[str, Any]
) -> subprocess.CompletedProcess[str]:
    """Ask what would run with these changes of the configuration."""
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(changes))
    return snakemake(repository, folder, "--dry-run", "--configfile", overlay)


def planned(output: str) -> set[str]:
    """Return what a dry run calls its jobs."""
    return set(re.findall(r"^Job \d+: (.*)$", output, flags=re.MULTILINE))


def copied(folder: Path) -> Path:
    """Copy what a study needs of the repository."""
    folder.mkdir()
    for part in PARTS:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)
    return folder


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """Folder with a copy of the repository in `repository` and the finished smoke study in
    `work`."""
    folder = tmp_path_factory.mktemp("smoke")
    result = snakemake(
        copied(folder / "repository"), folder / "work", "--cores", "all", "--config", "study=smoke"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def on_paper(tmp_path_factory) -> Path:
    """Folder with a copy of the repository, and in `work` the smoke study, for which no job has
    run: all its files are empty."""
    folder = tmp_path_factory.mktemp("on_paper")
    copied(folder / "repository")
    study = folder / "repository", folder / "work"
    for line in snakemake(*study, "--summary", "--config", "study=smoke").stdout.splitlines()[1:]:
        file = folder / "work" / line.split("\t")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    result = snakemake(*study, "--touch", "--forceall", "--cores", "1", "--config", "study=smoke")
    assert result.returncode == 0, result.stderr
    return folder


def test_smoke_study_gives_tables_and_figures(smoke):
    results = smoke / "work" / "results" / "smoke"
    summary = (results / "summary.csv").read_text().splitlines()
    assert summary[0] == "dataset,student,method,segmenter,metric,mean,std,n,images"
    assert {tuple(line.split(",")[:4]) for line in summary[1:]} == {
        (dataset, network, method, segmenter)
        for dataset, (teacher, student) in NETWORKS.items()
        for network, method in ((teacher, "teacher"), (student, "none"), (student, "grd"))
        for segmenter in SEGMENTERS[dataset]
    }
    markdown = (results / "table.md").read_text()
    assert markdown.count("gap closed") >= 2
    assert "Trivial baselines and the teacher" in markdown
    assert "tabular" in (results / "table.tex").read_text()
    for dataset, figures in FIGURES.items():
        for figure in figures:
            for ending in CATALOGUE["plot"]["formats"]:
                assert (results / "figures" / dataset / f"{figure}.{ending}").stat().st_size > 1000
        for run in (TEACHING, NONE, GRD):
            names = {path.name for path in (results / "runs" / run_of(dataset, run)).iterdir()}
            files = {"weights.safetensors", "last.safetensors", "history.csv", "predictions.h5"}
            assert names == files | set(SEGMENTERS[dataset])
            for segmenter in SEGMENTERS[dataset]:
                found = {
                    path.name
                    for path in (results / "runs" / run_of(dataset, run) / segmenter).iterdir()
                }
                assert found == {"segmentation.h5", "metrics.csv"}


def test_every_job_leaves_a_log_and_a_benchmark(smoke):
    results, logs = smoke / "work" / "results" / "smoke", smoke / "work" / "logs" / "smoke"
    benchmarks = {
        path.relative_to(results / "benchmarks").with_suffix("") for path in results.rglob("*.tsv")
    }
    assert benchmarks == {path.relative_to(logs).with_suffix("") for path in logs.rglob("*.log")}
    runs = sum(3 * (2 + 2 * len(segmenters)) for segmenters in SEGMENTERS.values())
    asked = len(SEGMENTERS)
    assert len(benchmarks) == runs + asked + 4 + 1 + 2 + sum(
        map(len, FIGURES.values())
    )  # profiles, baselines, tables and provenance, figures


def test_second_run_does_nothing(smoke):
    result = snakemake(
        smoke / "repository", smoke / "work", "--cores", "all", "--config", "study=smoke"
    )
    assert result.returncode == 0
    assert "Nothing to be done" in result.stdout + result.stderr


def test_report_holds_the_table_and_every_figure(smoke, tmp_path):
    report = tmp_path / "report.zip"
    result = snakemake(
        smoke / "repository", smoke / "work", "--config", "study=smoke", "--report", report
    )
    assert result.returncode == 0, result.stdout + result.stderr
    files = zipfile.ZipFile(report)
    names = {Path(name).name for name in files.namelist()}
    assert {f"{figure}.{CATALOGUE['plot']['formats'][0]}" for figure in FIGURES[VOLUMES]} <= names
    assert {
        f"{page}.html" for page in ("table", "configuration", "data", "time", "provenance")
    } <= names
    landing = files.read("report/report.html").decode()
    assert "Smoke test" in landing
    assert "snakemake --cores all --config study=smoke" in landing
    for name in files.namelist():
        if name.endswith(".html"):
            assert "System Message" not in files.read(name).decode(), name


def test_provenance_knows_the_runs_behind_every_number(smoke):
    work = smoke / "work"
    found = json.loads((work / "results" / "smoke" / "provenance.json").read_text())
    with open(work / "results" / "smoke" / "summary.csv", newline="") as file:
        rows = {
            (r["dataset"], r["student"], r["method"], r["segmenter"], r["metric"]): r
            for r in csv.DictReader(file)
        }
    for row in found["rows"]:
        assert row["runs"]
        for metric, cell in row["metrics"].items():
            line = rows.pop(
                (row["dataset"], row["network"], row["method"], row["segmenter"], metric)
            )
            assert cell["mean"] == float(line["mean"])
    assert not rows
    assert found["problems"] == []
    for run in found["runs"].values():
        assert run["weights"]["sha256"] == sha256(work / run["weights"]["file"])
        assert run["configuration_sha256"]
        assert {job["step"] for job in found["jobs"] if job["run"]} == {
            "teacher",
            "train",
            "predict",
            "segment",
            "evaluate",
        }
    assert found["data"][DATA]["test"]["samples"] == 3


@pytest.fixture(scope="module")
def records(on_paper) -> list[dict[str, Any]]:
    """Return what Snakemake remembers of the files of the study."""
    found = [
        json.loads(p.read_text()) for p in (on_paper / "work" / ".snakemake" / "metadata").iterdir()
    ]
    return [record for record in found if record["rule"] != "all"]


def test_the_rules_are_those_of_which_the_plan_is_tested(on_paper, records):
    """In names of jobs, in what they are told of the configuration, and in their code.

    See tests/test_plan.py.
    """
    expected = jobs_of(load(ROOT, changes={"study": "smoke"}))
    found = dry_run(on_paper / "repository", on_paper / "work" / "..", {"study": "smoke"})
    assert planned(found.stdout + found.stderr) - {"all"} == expected.keys()
    package = on_paper / "repository" / "gdlib"
    for rule in {record["rule"] for record in records}:
        mine = [job for job in expected.values() if job.rule == rule]
        theirs = [record for record in records if record["rule"] == rule]
        inputs = [
            [(on_paper / "work" / path).resolve() for path in record["input"]] for record in theirs
        ]
        code = {
            frozenset(p.relative_to(package).as_posix() for p in paths if package in p.parents)
            for paths in inputs
        }
        assert code == {job.code for job in mine}, rule
        told = [
            set(job.told[:1] if rule == "provenance" else job.told) for job in mine
        ]  # the rest is written otherwise
        params = [set(record["params"]) for record in theirs]
        assert all(any(one <= other for other in params) for one in told), rule
        assert all(any(one <= other for one in told) for other in params), rule


def test_the_data_of_each_step_are_of_the_right_split(records):
    """What learns or chooses never sees the test images, and what is judged or shown is nothing
    else."""
    splits: dict[str, set[str]] = {}
    for record in records:
        found = re.findall(r"data/\w+/(\w+)\.h5", " ".join(record["input"]))
        splits.setdefault(record["rule"], set()).update(found)
    assert {rule: found for rule, found in splits.items() if found} == {
        **{rule: {"train", "val"} for rule in ("train_teacher", "train_student")},
        "ask_teacher": {"train"},
        "baselines": {"val", "test"},
        **{
            rule: {"test"}
            for rule in (
                "predict",
                "evaluate",
                "profile",
                "figure_panel",
                "figure_embeddings",
                "figure_neurons",
            )
        },
    }


def touch_everything(repository: Path) -> None:
    """As `git checkout` or a copy would."""
    for path in (repository / "gdlib").rglob("*"):
        path.touch()


@pytest.mark.parametrize(
    "what", ["weight of a method", "plot option", "code of a loss term", "touched code"]
)
def test_an_edit_runs_again_exactly_what_depends_on_it(what, on_paper, tmp_path):
    """All edits are in tests/test_plan.py; here Snakemake itself says it of some."""
    change, expected = CONTRACT.get(what, ({}, set()))
    folder = shutil.copytree(on_paper, tmp_path / "copy")
    if what == "touched code":
        touch_everything(folder / "repository")
    elif isinstance(change, str):
        with open(folder / "repository" / "gdlib" / change, "a") as file:
            file.write("\n# edited\n")
        change = {}
    result = dry_run(folder / "repository", folder / "work", {"study": "smoke", **change})
    assert result.returncode == 0, result.stdout + result.stderr
    assert planned(result.stdout + result.stderr) == expected


def test_the_largest_study_can_be_planned(tmp_path):
    result = dry_run(ROOT, tmp_path, {"study": "paper"})
    assert result.returncode == 0, result.stdout + result.stderr
    expected = jobs_of(load(ROOT, changes={"study": "paper"}))
    assert (
        planned(result.stdout + result.stderr) - {"Lay out the tables of the paper"}
        == expected.keys()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"plot": {"dpii": 100}},
            'overlay.yaml, line 2: there is no key "plot.dpii": did you mean "dpi"?',
        ),
        (
            {"study": "smokee"},
            'overlay.yaml, line 1: study: there is no "smokee": did you mean "smoke"?',
        ),
    ],
)
def test_a_typo_is_one_line(changes, message, tmp_path):
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1] == message
