"""The smoke study with `--use-conda`, where there is a conda command; `make test-conda`, minutes.

The jobs must find all they need in their environments. Snakemake hides what is missing there: it
lends the Python scripts of a workflow the packages of its own environment. So each process writes
down, when it ends, what it took from elsewhere.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("Snakefile", "config", "config.yaml", "envs", "gdlib", "profiles", "workflow")
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
WATCH = """import atexit, json, sys
def tell(home=sys.prefix, out={out!r}):
    files = [(n.partition(".")[0], getattr(m, "__file__", None) or "") for n, m in list(sys.modules.items())]
    taken = sorted({{n for n, f in files if "site-packages" in f and not f.startswith(home)}})
    with open(out, "a") as file:
        file.write(json.dumps([sys.argv[:3], sorted({{n for n, _ in files}}), taken]) + chr(10))
atexit.register(tell)
"""

pytestmark = pytest.mark.skipif(shutil.which("conda") is None, reason="there is no conda command")


def run(folder: Path, *arguments: str) -> str:
    command = [SNAKEMAKE, "--use-conda", "--cores", "2", "--config", "study=smoke", *arguments]
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a copy of the project with both environments."""
    folder = tmp_path_factory.mktemp("project")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    run(folder, "--conda-create-envs-only")
    return folder


def environments(project):
    """Return name -> folder of the environments, known by what is in them."""
    folders = [path.parent for path in (project / ".snakemake" / "conda").glob("*/conda-meta")]
    return {
        "gdlib" if list(path.glob("lib/python3*/site-packages/torch")) else "report": path
        for path in folders
    }


def test_the_environments_are_what_their_files_say(project):
    found = environments(project)
    assert (
        found.keys()
        == {path.stem for path in (ROOT / "envs").glob("*.yaml")}
        == {"gdlib", "report"}
    )
    for name, folder in found.items():
        specs = yaml.safe_load((ROOT / "envs" / f"{name}.yaml").read_text())["dependencies"]
        records = [json.loads(path.read_text()) for path in (folder / "conda-meta").glob("*.json")]
        versions = {record["name"]: record["version"] for record in records}
        for spec in filter(lambda spec: isinstance(spec, str) and " " in spec, specs):
            package, _, version = spec.partition(" =")
            assert f"{versions[package]}.".startswith(f"{version}."), spec


def used_by_gdlib(project):
    """Return the packages that any file of gdlib or any script imports, also in functions."""
    files = [*(project / "gdlib").rglob("*.py"), *(project / "workflow" / "scripts").glob("*.py")]
    found = [
        re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), flags=re.MULTILINE)
        for path in files
    ]
    return set(itertools.chain(*found)) - sys.stdlib_module_names


def test_the_smoke_study_runs_in_them_and_takes_nothing_from_elsewhere(project):
    taken = project / "taken.jsonl"
    for folder in environments(project).values():
        (site,) = folder.glob("lib/python3*/site-packages")
        (site / "watch_imports.py").write_text(WATCH.format(out=str(taken)))
        (site / "watch_imports.pth").write_text("import watch_imports\n")
    output = run(project)
    assert "Activating conda environment" in output
    assert (project / "results" / "smoke" / "summary.csv").stat().st_size > 100
    processes = [json.loads(line) for line in taken.read_text().splitlines()]
    steps = [
        lent for _, loaded, lent in processes if "gdlib" in loaded and "snakemake" not in loaded
    ]
    scripts = [
        set(lent) for _, loaded, lent in processes if "gdlib" in loaded and "snakemake" in loaded
    ]
    assert len(steps) > 20
    assert not any(steps)
    # Snakemake itself loads some of its environment in order to start a script; that must not be
    # what gdlib works with.
    code = (
        "import json, sys, snakemake.script; print(json.dumps(sorted({name.partition('.')[0] "
        "for name in sys.modules})))"
    )
    own = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    assert len(scripts) > 5
    for lent in scripts:
        assert not lent & used_by_gdlib(project) - set(own)
