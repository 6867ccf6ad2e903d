"""A study with unlabelled images and a teacher of several networks, from folders to the table."""

import subprocess
import sys

import yaml
from test_unlabelled import written

from gdlib import io
from gdlib.config import parts


def test_a_study_with_unlabelled_images_from_folders_to_table(squares, tmp_path):
    """A folder with images that another program has labelled: a joined teacher labels them too, one
    student learns from its maps, one from its instances, one from the other program's."""
    written(tmp_path / "raw" / "mine", squares, range(20, 23))
    steps = {"steps": 4, "batch_size": 4, "patch": [32, 32], "validate_every": 4}
    content = {
        "study": "mine",
        "raw_folders": ["raw"],
        "datasets": {
            "mine": {"source": "folder", "folder": "mine", "unlabelled": True, "offsets": "nuclei"}
            | {"patch": [32, 32]}
        },
        "teachers": {"two": {"members": ["resunet_w8"], "member_seeds": [1, 0], "augment": True}},
        "studies": {
            "mine": {"datasets": ["mine"], "teacher": "two", "students": ["resunet_tiny"]}
            | {"methods": ["none", "grd", "pseudo", "foreign"], "seeds": [0], "recipe": steps}
        },
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", parts.home() / "Snakefile"),
        *("--directory", tmp_path, "--configfile", tmp_path / "mine.yaml", "--cores", "1"),
        *("--", "results/mine/table.md"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    results = tmp_path / "results" / "mine"
    rows = [
        line.split("|")[2:4]
        for line in (results / "table.md").read_text().splitlines()
        if "|" in line
    ]
    images = {method.strip(): count.strip() for method, count in rows[:8]}
    assert images == {
        "method": "images", "---": "---:", "teacher": "5", "student": "5", "IGD + AGD": "5 + 3",
        "pseudo-labels": "5 + 3", "labels of another program": "5 + 3",
    }  # fmt: skip
    found = results / "unlabelled" / "mine" / "two.h5"
    one, two = (
        [teachers / f"seed{seed}" / "weights.safetensors" for seed in seeds]
        for teachers, seeds in (
            (results / "runs" / "mine" / "two" / "teacher", (0,)),
            (results / "runs" / "mine" / "resunet_w8" / "teacher", (1, 0)),
        )
    )
    assert io.read_attrs(found)["teacher"] == io.sha256(*one)
    assert io.read_header(*one)["members"] == [io.sha256(path) for path in two]
    assert (found.with_suffix("") / "embedding.h5").exists()
    log = (tmp_path / "logs/mine/train/mine/resunet_tiny/foreign/seed0.log").read_text()
    assert "validation:" in log
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Nothing to be done" in again.stdout + again.stderr
