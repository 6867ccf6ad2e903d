"""The workflow as its users meet it: what runs, what runs again after an edit, and what a mistake
looks like.

The smoke study runs once, in a copy of the repository. The rerun contract needs only what Snakemake
remembers of a study: each case is a dry run in a copy of one whose files are empty and count as
made.
"""

import csv
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
import tifffile
import yaml

from gdlib.config import Config, parts
from gdlib.config.words import spelt_out
from gdlib.io import sha256

ROOT = Path(__file__).parents[1]
PARTS = ("Snakefile", "config", "config.yaml", "envs", "gdlib", "profiles", "workflow")
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
CATALOGUE = spelt_out(parts.read(ROOT))

DATA, TEACHER, STUDENT = "nuclei_phantom_small", "resunet_w8", "resunet_tiny"
VOLUMES, TEACHER_3D, STUDENT_3D = "neurites_phantom_small", "resunet3d_w8", "resunet3d_tiny"
TEACHING, NONE, GRD = "teacher/seed0", "none/seed0", "grd/seed0"
NETWORKS = {DATA: (TEACHER, STUDENT), VOLUMES: (TEACHER_3D, STUDENT_3D)}
SEGMENTERS = {
    dataset: CATALOGUE["datasets"][dataset].get("segmenters", ["mutex_watershed"])
    for dataset in NETWORKS
}
FIGURES = {
    DATA: ("methods", "tradeoff", "curves", "panel", "embeddings"),
    VOLUMES: ("methods", "tradeoff", "curves", "panel", "embeddings", "neurons"),
}
STEPS = ("Train", "Predict", "Segment", "Evaluate")


def run_of(dataset: str, run: str) -> str:
    """Return what the workflow calls a run, e.g.

    `none/seed0`, of this dataset's student, or teacher.
    """
    teacher, student = NETWORKS[dataset]
    return f"{dataset}/{teacher if run.startswith('teacher') else student}/{run}"


def jobs(
    *runs: str, steps: tuple[str, ...] = STEPS, datasets: tuple[str, ...] = (DATA, VOLUMES)
) -> set[str]:
    """Return what the workflow calls these steps of these runs."""
    found = set()
    for dataset in datasets:
        for step in steps:
            ways = (
                [f" by {name}" for name in SEGMENTERS[dataset]]
                if step in ("Segment", "Evaluate")
                else [""]
            )
            found |= {f"{step} {run_of(dataset, run)}{way}" for run in runs for way in ways}
    return found


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


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """Folder with a copy of the repository in `repository` and the finished smoke study in
    `work`."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # one study for all workers
    folder = base / "smoke"
    with open(base / "smoke.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unneeded = lambda path, names: [
                n for n in names if Path(path) == ROOT and n not in PARTS
            ]
            shutil.copytree(ROOT, folder / "repository", ignore=unneeded)
            result = snakemake(
                folder / "repository", folder / "work", "--cores", "all", "--config", "study=smoke"
            )
            (folder / "output.txt").write_text(
                f"{result.stdout}{result.stderr}\nexit status {result.returncode}\n"
            )
    output = (folder / "output.txt").read_text()
    assert output.endswith("exit status 0\n"), output
    return folder


@pytest.fixture(scope="module")
def on_paper(tmp_path_factory) -> Path:
    """Folder with a copy of the repository, and in `work` the smoke study, for which no job has
    run: all its files are empty."""
    folder = tmp_path_factory.mktemp("on_paper")
    (folder / "repository").mkdir()
    for part in PARTS:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(
            ROOT / part, folder / "repository" / part
        )
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


# Carries or checks what is computed, or says what is, which comes in through the parameters.
CARRIERS = {
    "__init__",
    "config",
    "data/__init__",
    "io",
    "jit",
    "limits",
    "progress",
    "registry",
    "schema",
    "text",
}
# Imported by the code of these jobs, but not for what they make.
UNUSED = {
    "train_teacher": {"distill/bank", "inference", "judge", "metrics", "scores"},  # these judge
    # a bank is listed where there is one
    "train_student": {"distill/bank", "inference", "judge", "metrics", "scores"},
    "ask_teacher": {"native"},
    "predict": {"native"},
    "profile": {"native"},
    "segment": {"metrics", "scores"},  # for tuning
    **{
        rule: {"metrics", "scores"}
        for rule in ("summarize", "provenance", *(f"figure_{name}" for name in FIGURES[VOLUMES]))
    },
}


def test_code_that_a_job_imports_is_its_input(on_paper):
    """A module that is imported but not listed would leave old results after an edit."""
    package = on_paper / "repository" / "gdlib"

    def imported(path: Path) -> set[str]:
        modules = re.findall(
            r"^ *from (gdlib[\w.]*) import ([^#\n]*)", path.read_text(), flags=re.MULTILINE
        )
        files = set()
        for module, names in modules:
            folder = package.joinpath(*module.split(".")[1:])
            candidates = [folder.with_suffix(".py"), folder / "__init__.py"]
            candidates += [
                folder / f"{name.split()[0]}.py"
                for name in names.strip("() ").split(",")
                if name.strip()
            ]
            files |= {candidate for candidate in candidates if candidate.exists()}
        return {name(f) for f in files}

    def name(path: Path) -> str:
        return path.relative_to(package).with_suffix("").as_posix()

    records = [
        json.loads(p.read_text()) for p in (on_paper / "work" / ".snakemake" / "metadata").iterdir()
    ]
    rules = {record["rule"] for record in records}
    assert {"prepare", "segment", "evaluate", "baselines", *UNUSED} == rules - {"all"}
    for record in records:
        if record["rule"] != "all":
            listed = {
                (on_paper / "work" / path).resolve()
                for path in record["input"]
                if path.endswith(".py")
            }
            assert listed, record["rule"]
            missing = set().union(*map(imported, listed)) - set(map(name, listed)) - CARRIERS
            assert not missing - UNUSED.get(record["rule"], set()), record["rule"]


def test_the_data_of_each_step_are_of_the_right_split(on_paper):
    """What learns or chooses never sees the test images, and what is judged or shown is nothing
    else."""
    splits: dict[str, set[str]] = {}
    for path in (on_paper / "work" / ".snakemake" / "metadata").iterdir():
        record = json.loads(path.read_text())
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
    shutil.rmtree(repository / "config")
    return {}


def edit(module: str) -> Callable[[Path], dict[str, Any]]:
    """Change a module of gdlib."""

    def change(repository: Path) -> dict[str, Any]:
        with open(repository / "gdlib" / module, "a") as file:
            file.write("\n# edited\n")
        return {}

    return change


def drawn(*figures: str, datasets: tuple[str, ...] = (DATA, VOLUMES)) -> set[str]:
    """Return what the workflow calls the jobs of these figures."""
    return {
        f"Draw {figure} of {dataset}"
        for dataset in datasets
        for figure in figures
        if figure in FIGURES[dataset]
    }


def asking(*parts: str, datasets: tuple[str, ...] = (DATA, VOLUMES)) -> set[str]:
    """Return what the workflow calls the jobs that ask teachers for these parts of their output."""
    return {
        f"Ask {NETWORKS[dataset][0]} for the {part} of the training images of {dataset}"
        for dataset in datasets
        for part in parts
    }


TABLES = {"Summarize the study", "Record where every number comes from"}
ASKED = asking("embedding")
ALL_FIGURES = drawn(*FIGURES[VOLUMES])
NUMBERS = TABLES | drawn("methods", "tradeoff")  # what shows test metrics
JUDGED = jobs(TEACHING, NONE, GRD, steps=("Evaluate",)) | NUMBERS
# What is edited: (changes of the configuration, or a function that edits the repository; what runs
# again).
CONTRACT: dict[str, tuple[dict[str, Any] | Callable[[Path], dict[str, Any]], set[str]]] = {
    "plot option": ({"plot": {"dpi": 100}}, ALL_FIGURES),
    "plotted metrics": ({"plot": {"metrics": ["aji", "dice"]}}, drawn("methods", datasets=(DATA,))),
    "plotted metrics of volumes": (
        {"plot": {"volumes": {"metrics": ["voi", "arand"]}}},
        drawn("methods", datasets=(VOLUMES,)),
    ),
    "title of a dataset": ({"datasets": {DATA: {"title": "Small"}}}, TABLES),
    "segmentation parameter": (
        {"datasets": {DATA: {"segmentation": {"mutex_watershed": {"min_size": 30}}}}},
        jobs(TEACHING, NONE, GRD, steps=("Segment", "Evaluate"), datasets=(DATA,))
        | TABLES
        | drawn("methods", "tradeoff", "panel", datasets=(DATA,)),
    ),
    "weight of a method": (
        {"methods": {"grd": [term | {"weight": 2.0} for term in CATALOGUE["methods"]["grd"]]}},
        jobs(GRD) | TABLES | ALL_FIGURES,
    ),
    "memory bank": (
        {"recipes": {"student": {"bank": {"capacity": 16}}}},
        jobs(GRD) | TABLES | ALL_FIGURES,
    ),
    "recipe of one dataset": (
        {"studies": {"smoke": {"recipes": {VOLUMES: {"student": {"steps": 11}}}}}},
        jobs(NONE, GRD, datasets=(VOLUMES,))
        | TABLES
        | drawn(*FIGURES[VOLUMES], datasets=(VOLUMES,)),
    ),
    "one more seed": (
        {"studies": {"smoke": {"seeds": [0, 1]}}},
        jobs("none/seed1", "grd/seed1") | NUMBERS | drawn("curves"),
    ),
    "one more student": (  # of images; the teacher has been asked
        {"studies": {"smoke": {"students": [STUDENT, STUDENT_3D, "enet"]}}},
        {message.replace(STUDENT, "enet") for message in jobs(NONE, GRD, datasets=(DATA,))}
        | {f"Profile {DATA}/enet"}
        | TABLES
        | drawn(*FIGURES[DATA], datasets=(DATA,)),
    ),
    "a method that compares a feature map": (  # of the teacher's only this is asked for
        {"studies": {"smoke": {"methods": ["none", "grd", "fitnet"]}}},
        jobs("fitnet/seed0") | asking("stride8", "stride9") | NUMBERS | drawn("curves"),
    ),
    "teacher online": (
        {"recipes": {"student": {"teacher": "online"}}},
        jobs(GRD) | TABLES | ALL_FIGURES,
    ),
    "one more method": (
        {"studies": {"smoke": {"methods": ["none", "grd", "igd"]}}},
        jobs("igd/seed0") | NUMBERS | drawn("curves"),
    ),
    "order of keys": (reorder, set()),
    "touched code": (touch_everything, set()),
    "code of a loss term": (edit("distill/terms/igd.py"), jobs(GRD) | TABLES | ALL_FIGURES),
    "code of a network": (
        edit("models/resunet3d.py"),
        jobs(TEACHING, NONE, GRD, datasets=(VOLUMES,))
        | asking("embedding", datasets=(VOLUMES,))
        | {f"Profile {VOLUMES}/{network}" for network in NETWORKS[VOLUMES]}
        | TABLES
        | drawn(*FIGURES[VOLUMES], datasets=(VOLUMES,)),
    ),
    "code of the training loop": (
        edit("training.py"),
        jobs(TEACHING, NONE, GRD) | ASKED | TABLES | ALL_FIGURES,
    ),
    "code of the metrics": (
        edit("metrics.py"),
        JUDGED | {f"Evaluate trivial segmentations of {VOLUMES}"},
    ),
}


@pytest.mark.parametrize("what", CONTRACT)
def test_an_edit_runs_again_exactly_what_depends_on_it(what, on_paper, tmp_path):
    change, expected = CONTRACT[what]
    folder = shutil.copytree(on_paper, tmp_path / "copy")
    changes = change(folder / "repository") if callable(change) else change
    result = dry_run(folder / "repository", folder / "work", {"study": "smoke", **changes})
    assert result.returncode == 0, result.stdout + result.stderr
    assert planned(result.stdout + result.stderr) == expected


@pytest.mark.parametrize("study", CATALOGUE["studies"])
def test_every_study_can_be_planned(study, tmp_path):
    changes = {"study": study}
    config = Config.parse(CATALOGUE | changes)
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stdout + result.stderr
    trained = [
        message
        for message in planned(result.stdout + result.stderr)
        if message.startswith("Train ")
    ]
    assert len(trained) == len(config.runs())


def test_a_teacher_of_ones_own_is_not_trained(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    changes = {"study": "smoke", "teachers": {TEACHER: {"weights": "mine.safetensors"}}}
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stdout + result.stderr
    found = planned(result.stdout + result.stderr)
    assert not jobs(TEACHING, steps=("Train",), datasets=(DATA,)) & found
    assert jobs(NONE, GRD) | jobs(TEACHING, steps=("Predict", "Segment", "Evaluate")) <= found


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


def test_prepared_data_need_no_raw_data(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / "data" / "bbbc039").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "bbbc039" / f"{split}.h5").touch()
    changes = {"study": "smoke", "raw_folders": ["nowhere"]}
    changes["studies"] = {"smoke": {"datasets": ["bbbc039"]}}
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Prepare bbbc039" not in planned(result.stdout + result.stderr)


def test_a_failing_job_shows_its_reason(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / "data" / DATA).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / DATA / f"{split}.h5").write_text("not HDF5")
    run = run_of(DATA, TEACHING)
    target = f"results/smoke/runs/{run}/weights.safetensors"
    result = snakemake(ROOT, tmp_path, "--cores", "1", "--config", "study=smoke", "--", target)
    assert result.returncode != 0
    log = tmp_path / "logs" / "smoke" / "train" / f"{run}.log"
    last = log.read_text().splitlines()[-1]
    assert last.startswith("gdlib: error:")
    assert "not a readable HDF5 file" in last
    assert last in result.stdout + result.stderr


def test_warnings_about_data_reach_the_terminal_and_not_only_a_file(tmp_path, squares):
    """From the job at once, and again at the end of everything."""
    for folder, part in (("images", 0), ("labels", 1)):
        (tmp_path / "raw" / "mine" / folder).mkdir(parents=True)
        for seed in range(6):
            array = squares(seed, shape=(64, 64))[part].squeeze().astype("uint16")
            mirrored = array[:: 1 - 2 * part]  # the label
            tifffile.imwrite(tmp_path / "raw" / "mine" / folder / f"{seed}.tif", mirrored)
    changes = {
        "study": "mine",
        "raw_folders": [str(tmp_path / "raw")],
        "datasets": {
            "mine": {
                "source": "folder",
                "folder": "mine",
                "offsets": [[-1, 0], [0, -1], [-9, 0], [0, -9]],
                "patch": [64, 64],
            }
        },
        "studies": {"mine": CATALOGUE["studies"]["smoke"] | {"datasets": ["mine"], "recipes": {}}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(changes))
    result = snakemake(
        ROOT,
        tmp_path,
        "--cores",
        "1",
        "--configfile",
        tmp_path / "mine.yaml",
        "--",
        "data/mine/train.h5",
    )
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "logs" / "prepare" / "mine.log").read_text()
    (warning,) = re.findall("^warning: (.*)$", log, re.MULTILINE)
    assert "mirrored" in warning
    lines = result.stderr.splitlines()
    of_job, at_end = f"mine: warning: {warning}", f"logs/prepare/mine.log: warning: {warning}"
    assert lines.index(of_job) < lines.index("1 of 1 steps (100%) done") < lines.index(at_end)
