"""What README says about images of one's own, and docs/extend.md about a dataset, a student and a
loss, done as they say."""

import re
import shutil

import numpy as np
import pytest
import tifffile
import yaml
from test_workflow import PARTS, ROOT, snakemake

README = (ROOT / "README.md").read_text()
EXTEND = (ROOT / "docs" / "extend.md").read_text()
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
    folder = tmp_path / "project"
    folder.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
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
