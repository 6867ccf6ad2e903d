"""An environment for machines without internet, as docs/cluster.md makes it.

Without torch, which is large.

Wheels are fetched for a Python that need not be the one that fetches them, and installed with every
index switched off.
"""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCUMENTED = (ROOT / "docs" / "cluster.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **environment):
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_of(version):
    """Return a Python of this version, or skip."""
    program = shutil.which(f"python{version}") or sys.executable
    asked = [program, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    found = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if found != version:
        pytest.skip(f"there is no Python {version} here")
    return program


@pytest.mark.skipif(sys.platform != "linux", reason="the wheels are for Linux")
@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_an_environment_from_a_folder_of_wheels(version, tmp_path):
    target = python_of(version)
    wheels = tmp_path / "wheels"
    platforms = ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"]
    assert " ".join(platforms) in DOCUMENTED
    extras = PROJECT["optional-dependencies"]
    declared = map(
        Requirement,
        PROJECT["dependencies"]
        + extras["em"]
        + extras["fast"]
        + extras["workflow"]
        + extras["slurm"],
    )
    wanted = [str(requirement) for requirement in declared if requirement.name != "torch"]
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ".", "connection_pool==0.0.3")
    only = [
        "--python-version",
        version,
        "--only-binary=:all:",
        "--find-links",
        wheels,
        "-c",
        "constraints.txt",
    ]
    run(*pip, "download", "--dest", wheels, *platforms, *only, *wanted)

    run(target, "-m", "venv", tmp_path / "venv")
    off = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_INDEX_URL": "",
        "PIP_EXTRA_INDEX_URL": "",
    }
    install = (tmp_path / "venv/bin/pip", "install", "--no-index", "--find-links", wheels)
    run(*install, "-c", "constraints.txt", *wanted, **off)
    run(*install, "--no-deps", "gdlib", **off)
    assert "gdlib" in run(tmp_path / "venv/bin/gdlib", "--version")
    # The workflow reads its configuration without torch.
    plan = ("--dry-run", "--directory", tmp_path / "study", "--cores", 1, "--config", "study=smoke")
    assert "train_teacher" in run(tmp_path / "venv/bin/snakemake", *plan)
