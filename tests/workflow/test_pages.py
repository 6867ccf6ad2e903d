"""What README says about images of one's own, docs/extend.md about a dataset, a student and a loss,
and docs/tutorial.md from its beginning to its end, done as they say."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from test_workflow import ROOT, copied, planned, snakemake

README = (ROOT / "README.md").read_text()
EXTEND = (ROOT / "docs" / "extend.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
FILES = dict(
    re.findall(
        r"^`(gdlib/\S+\.py)`[^\n]*\n\n```python\n(.*?)^```", EXTEND, flags=re.MULTILINE | re.DOTALL
    )
)
(IMAGES,), (PLUGINS,) = (
    re.findall(r"^```yaml\n(datasets:.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    for page in (README, EXTEND)
)
FEW = {"batch_size": 2, "patch": [32, 32], "validate_every": 2}


@pytest.fixture
def project(tmp_path):
    """Return `add(entry)` -> folder with the project, the files of docs/extend.md, and an entry of
    the configuration."""
    folder = copied(tmp_path / "project")
    for path, text in FILES.items():
        assert not (folder / path).exists()
        (folder / path).write_text(text)

    def add(entry):
        own = yaml.safe_load(entry)
        for study in own["studies"].values():  # as said, but small
            study |= {"teacher_recipe": FEW | {"steps": 4}, "student_recipe": FEW | {"steps": 2}}
        (folder / "mycells.yaml").write_text(yaml.safe_dump(own))
        return folder

    return add


def test_the_files_are_there():
    assert set(FILES) == {
        "gdlib/data/sources/pairs.py",
        "gdlib/models/plain.py",
        "gdlib/distill/terms/cosine.py",
    }


def test_a_dataset_a_student_and_a_loss_are_a_file_each_and_an_entry(project, squares, tmp_path):
    folder = project(PLUGINS)
    (folder / "raw" / "pairs").mkdir(parents=True)
    for seed, name in enumerate(("a1", "a2", "b1", "c1")):
        image, label = squares(seed, shape=(64, 64))
        tifffile.imwrite(folder / "raw" / "pairs" / f"{name}.tif", image[0])
        tifffile.imwrite(folder / "raw" / "pairs" / f"{name}.cells.tif", label.astype(np.uint16))
    result = snakemake(
        folder,
        folder,
        "--cores",
        "1",
        "--configfile",
        folder / "mycells.yaml",
        "--config",
        "study=mine",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = (folder / "results" / "mine" / "summary.csv").read_text().splitlines()[1:]
    methods = [("resunet_w8", "teacher"), ("plain", "none"), ("plain", "cosine")]
    assert {tuple(row.split(",")[1:3]) for row in rows} == set(methods)


def test_images_of_ones_own_in_two_folders(project, squares):
    folder = project(IMAGES)
    for part in ("images", "labels"):
        (folder / "raw" / "mycells" / part).mkdir(parents=True)
    for seed in range(10):
        image, label = squares(seed, shape=(128, 128))
        tifffile.imwrite(folder / "raw" / "mycells" / "images" / f"{seed}.tif", image[0])
        tifffile.imwrite(
            folder / "raw" / "mycells" / "labels" / f"{seed}.tif", label.astype(np.uint16)
        )
    weights = "results/mycells/runs/mycells/resunet_tiny/grd/seed0/weights.safetensors"
    assert weights in README
    command = "snakemake --cores all --configfile mycells.yaml --config study=mycells"
    assert command in README
    result = snakemake(folder, folder, *command.replace("all", "1").split()[1:], "--", weights)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / weights).exists()


@pytest.fixture
def tutorial(tmp_path, squares):
    """Return a folder with the project and the tutorial's images, but few and small."""
    folder = copied(tmp_path / "project")
    shutil.copytree(ROOT / "docs", folder / "docs")
    for place, count in ((folder, 9), (folder / "new", 2)):
        for part in ("images", "labels"):
            (place / part).mkdir(parents=True)
        for seed in range(count):
            image, label = squares(seed, shape=(128, 128))
            tifffile.imwrite(place / "images" / f"{seed}.tif", image[0])
            tifffile.imwrite(place / "labels" / f"{seed}.tif", label.astype(np.uint16))
    return folder


def shortened(config):
    """Edit what `gdlib distill` wrote, as a reader may: few steps."""
    text, count = re.subn(
        r"steps: \d+, batch_size: \d+, validate_every: \d+",
        "steps: 2, batch_size: 2, validate_every: 2",
        config.read_text(),
    )
    assert count == 2
    config.write_text(text)


def test_the_tutorial_works(tutorial):
    blocks = re.findall(r"^```sh\n(.*?)^```", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
    commands = [command for block in blocks[2:] for command in block.splitlines()]
    assert "pip install" in blocks[0]
    assert blocks[1] == "gdlib download bbbc039\n"
    assert len(commands) == 7
    environment = os.environ | {"PYTHONPATH": str(tutorial)}
    said = {}
    for command in commands:
        program, *arguments = shlex.split(command)
        start = {
            "gdlib": [sys.executable, "-m", "gdlib"],
            "snakemake": [Path(sys.executable).with_name("snakemake")],
        }.get(program, [program])
        done = subprocess.run(
            [*start, *arguments], cwd=tutorial, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said[command] = done.stdout + done.stderr
        if "--dry-run" in command:
            shortened(tutorial / "mycells" / "config.yaml")
    looked, written, trained, *_, scored, _, again = said.values()
    assert "found: 9 images of 128 x 128 pixels" in looked
    assert "jobs would be run" in looked
    assert "offsets: [[-1, 0]" in written
    assert "ResUNet-tiny" in trained
    assert scored.splitlines()[-1].startswith("mean,")
    assert "Nothing to be done" in again
    assert (tutorial / "mycells" / "report.html").stat().st_size > 1_000_000
    assert len(list((tutorial / "new" / "found").glob("*.tif"))) == 2


def test_the_workflow_is_where_the_catalogue_looks_for_it(tmp_path):
    plans = []
    for start in ("Snakefile", "workflow/Snakefile"):
        result = snakemake(
            ROOT, tmp_path, "--dry-run", "--snakefile", ROOT / start, "--config", "study=smoke"
        )
        assert result.returncode == 0, result.stdout + result.stderr
        plans.append(planned(result.stdout + result.stderr))
    assert plans[0] == plans[1]
    assert len(plans[0]) > 50
