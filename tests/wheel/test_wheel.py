"""A wheel in an environment of its own, without the project around: `make test-wheel`, minutes.

Other packages are those of the environment that runs the suite, lent to the new one; with
`WHEEL_PACKAGES=anew` they are installed into it, which takes a network.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gdlib.data.sources.nuclei_phantom import nuclei_phantom

ROOT = Path(__file__).resolve().parents[2]
RAW = Path(os.environ.get("GDLIB_RAW", ROOT.parent / "shared" / "data"))
ANEW = os.environ.get("WHEEL_PACKAGES") == "anew"
REAL = RAW / "bbbc039" / "images"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return a wheel made of the files that git knows, in a folder of their own."""
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in done.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", out, project]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Return the folder of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    constraints = ["-c", ROOT / "constraints.txt"]
    what = [f"gdlib[workflow,fast,em,zarr] @ {wheel.as_uri()}"] if ANEW else ["--no-deps", wheel]
    command = [folder / "bin" / "pip", "install", "--quiet", *constraints, *what]
    subprocess.run(command, check=True)
    if not ANEW:  # files of that folder that name others, as those of a clone, are not followed
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder


@pytest.fixture
def start(environment, tmp_path):
    """Return `start(*arguments)`: a process of the command `gdlib`, far from the project."""

    def run(*arguments):
        command = [environment / "bin" / "gdlib", *arguments]
        clean = {"PATH": f"{environment / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.Popen(
            [str(part) for part in command], cwd=tmp_path, env=clean, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return run


@pytest.fixture
def gdlib(start):
    """Return `gdlib(*arguments)`: what the command says, after it has ended well."""

    def run(*arguments):
        process = start(*arguments)
        said = process.communicate()[0]
        assert process.returncode == 0, said
        return said

    return run


def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "gdlib/_workflow/Snakefile",
        "gdlib/_workflow/config.yaml",
        "gdlib/_workflow/config/datasets.yaml",
        "gdlib/_workflow/workflow/volume.smk",
        "gdlib/weights/nuclei.safetensors",
        "gdlib/napari/napari.yaml",
        "gdlib/data/splits/bbbc039/heldout/test.txt",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]
    (entries,) = (name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entries).decode()
    assert "[napari.manifest]\ngdlib = gdlib.napari:napari.yaml" in text
    assert wheel.stat().st_size < 10e6


def test_the_package_is_that_of_the_wheel(environment, tmp_path):
    code = "import gdlib; print(gdlib.__file__)"
    done = subprocess.run([environment / "bin" / "python", "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True, check=True)  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(environment)


def test_networks_that_come_with_it(gdlib):
    said = gdlib("models")
    for name in ("nuclei", "worms", "neurons"):
        assert name in said


@pytest.mark.skipif(not REAL.is_dir(), reason="BBBC039 is not there: GDLIB_RAW says where")
def test_nuclei_of_a_real_image(gdlib, tmp_path):
    image = next(REAL.rglob("IXMtest_A16_s3*.tif"))
    shutil.copy(image, tmp_path / "cells.tif")
    said = gdlib("segment", "cells.tif", "--out", "found", "--preview")
    count = int(re.search(r"cells\.tif: (\d+) objects", said)[1])
    assert 60 < count < 250
    label = tifffile.imread(tmp_path / "found" / "cells.tif")
    assert (label.max(), label.shape) == (count, (520, 696))


def test_a_network_of_ones_own_stopped_and_continued(gdlib, start, tmp_path):
    splits = nuclei_phantom(None, size=(96, 96), images={"train": 10, "val": 0, "test": 0}, radius=(5.0, 8.0))  # fmt: skip
    for sample in splits["train"]:
        for part, array in (
            ("images", sample.image[0]),
            ("labels", sample.label.astype(np.uint16)),
        ):
            path = tmp_path / part / f"{sample.id}.tif"
            path.parent.mkdir(exist_ok=True)
            tifffile.imwrite(path, array)
    command = ("distill", "images", "labels", "--out", "mycells", "--time", "20s", "--cores", 2)
    process = start(*command)
    state = tmp_path / "mycells" / "results"
    deadline = time.monotonic() + 600
    while not list(state.rglob("state*")) and not list(state.rglob("history.csv")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()  # this alone: it passes it on
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "what was trained so far is saved" in said
    assert "Traceback" not in said
    said = gdlib(*command)
    assert "is there and is used as it is" in said
    assert "weights: mycells/results" in said
    weights = re.search(r"weights: (\S+)", said)[1]
    assert (tmp_path / weights).exists()
    assert (tmp_path / "mycells" / "report.html").exists()
    assert "there is nothing to do: all is made already" in gdlib(*command)
    assert "objects" in gdlib("segment", "images", "--model", weights, "--out", "found")
