"""The workflow as its users meet it: what runs, what runs again after an edit, and what a mistake looks like.

The smoke study runs once, in a copy of the repository; every case of the rerun contract is a dry run in a copy of that.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdlib.config import Config, ConfigError

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "config.yaml", "envs", "gdlib", "profiles", "workflow")
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
CATALOGUE = yaml.safe_load((ROOT / "config.yaml").read_text())

DATA, TEACHER, STUDENT = "nuclei_phantom_small", "resunet_w8", "resunet_tiny"
TEACHING, NONE, GRD = f"{TEACHER}/teacher/seed0", f"{STUDENT}/none/seed0", f"{STUDENT}/grd/seed0"
FIGURES = ("methods", "tradeoff", "curves", "panel", "embeddings")


def jobs(*runs: str, steps: tuple[str, ...] = ("Train", "Predict", "Segment", "Evaluate")) -> set[str]:
    """Return what the workflow calls these steps of these runs."""
    return {f"{step} {DATA}/{run}" for step in steps for run in runs}


def snakemake(repository: Path, folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the workflow of a repository in a folder; its environment is not activated."""
    command = [SNAKEMAKE, "--directory", folder, *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def dry_run(repository: Path, folder: Path, changes: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Ask what would run with these changes of the configuration."""
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(changes))
    return snakemake(repository, folder, "--dry-run", "--configfile", overlay)


def planned(output: str) -> set[str]:
    """Return what a dry run calls its jobs."""
    return set(re.findall(r"^Job \d+: (.*)$", output, flags=re.MULTILINE))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """Folder with a copy of the repository in `repository` and the finished smoke study in `work`."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # one study for all workers
    folder = base / "smoke"
    with open(base / "smoke.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unneeded = lambda path, names: [n for n in names if Path(path) == ROOT and n not in PARTS]  # noqa: E731
            shutil.copytree(ROOT, folder / "repository", ignore=unneeded)
            result = snakemake(folder / "repository", folder / "work", "--cores", "all", "--config", "study=smoke")
            (folder / "output.txt").write_text(f"{result.stdout}{result.stderr}\nexit status {result.returncode}\n")
    output = (folder / "output.txt").read_text()
    assert output.endswith("exit status 0\n"), output
    return folder


def test_smoke_study_gives_tables_and_figures(smoke):
    results = smoke / "work" / "results" / "smoke"
    summary = (results / "summary.csv").read_text().splitlines()
    assert summary[0] == "dataset,student,method,metric,mean,std,n"
    assert {tuple(line.split(",")[:3]) for line in summary[1:]} == {
        (DATA, TEACHER, "teacher"), (DATA, STUDENT, "none"), (DATA, STUDENT, "grd"),
    }  # fmt: skip
    assert "gap closed" in (results / "table.md").read_text()
    assert "tabular" in (results / "table.tex").read_text()
    for figure in FIGURES:
        for ending in CATALOGUE["plot"]["formats"]:
            assert (results / "figures" / DATA / f"{figure}.{ending}").stat().st_size > 1000
    for run in (TEACHING, NONE, GRD):
        names = {path.name for path in (results / "runs" / DATA / run).iterdir()}
        assert names == {
            "weights.safetensors", "last.safetensors", "history.csv", "predictions.h5", "segmentation.h5", "metrics.csv",
        }  # fmt: skip


def test_every_job_leaves_a_log_and_a_benchmark(smoke):
    results, logs = smoke / "work" / "results" / "smoke", smoke / "work" / "logs" / "smoke"
    benchmarks = {path.relative_to(results / "benchmarks").with_suffix("") for path in results.rglob("*.tsv")}
    assert benchmarks == {path.relative_to(logs).with_suffix("") for path in logs.rglob("*.log")}
    assert len(benchmarks) == 4 * 3 + 2 + 1 + 5  # steps of runs, profiles, tables, figures


def test_second_run_does_nothing(smoke):
    result = snakemake(smoke / "repository", smoke / "work", "--cores", "all", "--config", "study=smoke")
    assert result.returncode == 0
    assert "Nothing to be done" in result.stdout + result.stderr


def test_report_holds_the_table_and_every_figure(smoke, tmp_path):
    report = tmp_path / "report.zip"
    result = snakemake(smoke / "repository", smoke / "work", "--config", "study=smoke", "--report", report)
    assert result.returncode == 0, result.stdout + result.stderr
    names = {Path(name).name for name in zipfile.ZipFile(report).namelist()}
    assert {"table.md", *(f"{figure}.{CATALOGUE['plot']['formats'][0]}" for figure in FIGURES)} <= names


def test_code_that_a_job_imports_is_its_input(smoke):
    """What trains must be complete: a module that is imported but not listed would leave old results after an edit."""
    # These do not change what is learned (judge), only carry it (io), or come in through the parameters (config).
    judges_and_carriers = {"__init__", "config", "io", "registry", "inference", "segmentation", "metrics"}
    package = smoke / "repository" / "gdlib"

    def imported(path: Path) -> set[Path]:
        modules = re.findall(r"^from (gdlib[\w.]*) import ([^#\n]*)", path.read_text(), flags=re.MULTILINE)
        files = set()
        for module, names in modules:
            folder = package.joinpath(*module.split(".")[1:])
            candidates = [folder.with_suffix(".py"), folder / "__init__.py"]
            candidates += [folder / f"{name.split()[0]}.py" for name in names.strip("() ").split(",") if name.strip()]
            files |= {candidate for candidate in candidates if candidate.exists()}
        return {f for f in files if f.relative_to(package).with_suffix("").as_posix() not in judges_and_carriers}

    records = [json.loads(p.read_text()) for p in (smoke / "work" / ".snakemake" / "metadata").iterdir()]
    checked = 0
    for record in records:
        if record["rule"].startswith("train"):
            listed = {(smoke / "work" / path).resolve() for path in record["input"] if path.endswith(".py")}
            missing = set().union(*map(imported, listed)) - listed
            if not any(path.name == "bank.py" for path in listed):
                missing.discard(package / "distill" / "bank.py")  # this run has no memory bank
            assert not missing, f"{record['rule']}: {missing}"
            checked += 1
    assert checked


def touch_everything(repository: Path) -> dict[str, Any]:
    """As `git checkout` or a copy would."""
    for path in (repository / "gdlib").rglob("*"):
        path.touch()
    return {}


def reorder(repository: Path) -> dict[str, Any]:
    """Write the same configuration with all keys in another order."""

    def reverse(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reverse(value[key]) for key in reversed(value)}
        return [reverse(item) for item in value] if isinstance(value, list) else value

    content = yaml.dump(reverse(CATALOGUE), sort_keys=False, Dumper=yaml.SafeDumper)
    (repository / "config.yaml").write_text(content)
    return {}


def edit(module: str) -> Callable[[Path], dict[str, Any]]:
    """Change a module of gdlib."""

    def change(repository: Path) -> dict[str, Any]:
        with open(repository / "gdlib" / module, "a") as file:
            file.write("\n# edited\n")
        return {}

    return change


def drawn(*figures: str) -> set[str]:
    """Return what the workflow calls the jobs of these figures."""
    return {f"Draw {figure} of {DATA}" for figure in figures}


TABLES = {"Summarize the study"}
NUMBERS = TABLES | drawn("methods", "tradeoff")  # what shows test metrics
# What is edited: (changes of the configuration, or a function that edits the repository; what runs again).
CONTRACT: dict[str, tuple[dict[str, Any] | Callable[[Path], dict[str, Any]], set[str]]] = {
    "plot option": ({"plot": {"dpi": 100}}, drawn(*FIGURES)),
    "plotted metrics": ({"plot": {"metrics": ["aji", "dice"]}}, drawn("methods")),
    "title of a dataset": ({"datasets": {DATA: {"title": "Small"}}}, TABLES),
    "segmentation parameter": (
        {"datasets": {DATA: {"segmentation": {"min_size": 30}}}},
        jobs(TEACHING, NONE, GRD, steps=("Segment", "Evaluate")) | NUMBERS | drawn("panel"),
    ),
    "weight of a method": (
        {"methods": {"grd": [{"term": "agd", "weight": 2.0, "memory": True}]}},
        jobs(GRD) | TABLES | drawn(*FIGURES),
    ),
    "memory bank": ({"recipes": {"student": {"bank": {"capacity": 16}}}}, jobs(GRD) | TABLES | drawn(*FIGURES)),
    "one more seed": (
        {"studies": {"smoke": {"seeds": [0, 1]}}},
        jobs(f"{STUDENT}/none/seed1", f"{STUDENT}/grd/seed1") | NUMBERS | drawn("curves"),
    ),
    "one more method": (
        {"studies": {"smoke": {"methods": ["none", "grd", "igd"]}}},
        jobs(f"{STUDENT}/igd/seed0") | NUMBERS | drawn("curves"),
    ),
    "order of keys": (reorder, set()),
    "touched code": (touch_everything, set()),
    "code of a loss term": (edit("distill/terms/igd.py"), jobs(GRD) | TABLES | drawn(*FIGURES)),
    "code of the training loop": (edit("training.py"), jobs(TEACHING, NONE, GRD) | TABLES | drawn(*FIGURES)),
    "code of the metrics": (edit("metrics.py"), jobs(TEACHING, NONE, GRD, steps=("Evaluate",)) | NUMBERS),
}


@pytest.mark.parametrize("what", CONTRACT)
def test_an_edit_runs_again_exactly_what_depends_on_it(what, smoke, tmp_path):
    change, expected = CONTRACT[what]
    folder = shutil.copytree(smoke, tmp_path / "copy")
    changes = change(folder / "repository") if callable(change) else change
    result = dry_run(folder / "repository", folder / "work", {"study": "smoke", **changes})
    assert result.returncode == 0, result.stdout + result.stderr
    assert planned(result.stdout + result.stderr) == expected


@pytest.mark.parametrize("study", CATALOGUE["studies"])
def test_every_study_can_be_planned(study, tmp_path):
    folders = [str(ROOT / folder) for folder in CATALOGUE["raw_folders"]]
    changes = {"study": study, "raw_folders": folders}
    config = Config.parse(CATALOGUE | changes)
    try:
        for dataset in config.selected.datasets:
            config.raw_folder(dataset)
    except ConfigError as missing:
        pytest.skip(str(missing))
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stdout + result.stderr
    trained = [message for message in planned(result.stdout + result.stderr) if message.startswith("Train ")]
    assert len(trained) == len(config.runs())


def test_a_teacher_of_ones_own_is_not_trained(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    changes = {"study": "smoke", "teachers": {TEACHER: {"weights": "mine.safetensors"}}}
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stdout + result.stderr
    found = planned(result.stdout + result.stderr)
    assert f"Train {DATA}/{TEACHING}" not in found
    assert jobs(NONE, GRD) | jobs(TEACHING, steps=("Predict", "Segment", "Evaluate")) <= found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plot": {"dpii": 100}}, 'config: there is no key "plot.dpii": did you mean "dpi"?'),
        ({"study": "smokee"}, 'config: study: there is no "smokee": did you mean "smoke"?'),
    ],
)
def test_a_typo_is_one_line(changes, message, tmp_path):
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1] == message


def test_missing_data_is_one_line(tmp_path):
    changes = {"study": "smoke", "studies": {"smoke": {"datasets": ["bbbc039"]}}, "raw_folders": ["nowhere"]}
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode != 0
    assert "nowhere/bbbc039" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stdout + result.stderr


def test_prepared_data_need_no_raw_data(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / "data" / "bbbc039").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "bbbc039" / f"{split}.h5").touch()
    changes = {"study": "smoke", "studies": {"smoke": {"datasets": ["bbbc039"]}}, "raw_folders": ["nowhere"]}
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Prepare bbbc039" not in planned(result.stdout + result.stderr)


def test_a_failing_job_shows_its_reason(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / "data" / DATA).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / DATA / f"{split}.h5").write_text("not HDF5")
    target = f"results/smoke/runs/{DATA}/{TEACHING}/weights.safetensors"
    result = snakemake(ROOT, tmp_path, "--cores", "1", "--config", "study=smoke", "--", target)
    assert result.returncode != 0
    log = tmp_path / "logs" / "smoke" / "train" / DATA / f"{TEACHING}.log"
    last = log.read_text().splitlines()[-1]
    assert last.startswith("gdlib: error:")
    assert "not a readable HDF5 file" in last
    assert last in result.stdout + result.stderr
