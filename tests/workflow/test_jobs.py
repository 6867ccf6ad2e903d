"""Single jobs of a study: what they need, and what is seen of what they say."""

import re

import tifffile
import yaml
from test_plan import CATALOGUE, DATA, TEACHING, run_of
from test_workflow import ROOT, dry_run, planned, snakemake


def test_prepared_data_need_no_raw_data(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / "data" / "bbbc039").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "bbbc039" / f"{split}.h5").touch()
    changes = {"study": "smoke", "raw_folders": ["nowhere"]}
    changes["studies"] = {"smoke": {"datasets": ["bbbc039"]}}
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Prepare bbbc039" not in planned(result.stdout + result.stderr)


def test_networks_of_the_package_are_teachers_by_their_names(tmp_path):
    teachers = {
        "given": {
            "model": "resunet", "options": {"widths": [4, 8, 16, 32, 64]}, "weights": "nuclei",
        },
        "several": {"members": ["given"], "augment": True},
    }  # fmt: skip
    study = {"datasets": [DATA], "teacher": "several", "students": ["resunet_tiny"], "recipes": {}}
    changes = {"study": "smoke", "teachers": teachers, "studies": {"smoke": study}}
    result = dry_run(ROOT, tmp_path, changes)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert f"Join the members of {DATA}/several/teacher/seed0" in planned(said)
    assert f"Predict {DATA}/given/teacher/seed0" in planned(said)
    assert not [job for job in planned(said) if job.startswith(f"Train {DATA}/given")]


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
