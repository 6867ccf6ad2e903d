"""The study, run once undisturbed, and copies of it to disturb."""

import shutil
from pathlib import Path

import pytest
from study import PARTS, ROOT, Study


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """Return a copy of the project."""
    folder = tmp_path_factory.mktemp("repository")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    return folder


@pytest.fixture(scope="session")
def reference(repository, tmp_path_factory) -> Study:
    """Return the undisturbed study, with its `output`."""
    study = Study(repository, tmp_path_factory.mktemp("reference"))
    study.output = study.finish()
    assert {"summary.csv", "weights.safetensors", "metrics.csv"} <= {
        Path(name).name for name in study.exact()
    }
    return study


@pytest.fixture
def fresh(repository, tmp_path_factory) -> Study:
    """Return a study that has not begun."""
    return Study(repository, tmp_path_factory.mktemp("fresh"))


@pytest.fixture
def finished(reference, tmp_path_factory) -> Study:
    """Return a finished study to spoil, as far from the code as the first, or all of it would run
    again."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(reference.folder, folder, dirs_exist_ok=True)
    return Study(reference.repository, folder)
