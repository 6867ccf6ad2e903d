"""Data that a study lacks: what is told before anything runs, and how the workflow fetches them."""

import io
from pathlib import Path

import numpy as np
import tifffile
import yaml
from test_download import server, sha256, zipped
from test_workflow import dry_run, planned, snakemake

from gdlib.data.download import RECORD

__all__ = ["server"]
ROOT = Path(__file__).resolve().parents[2]

STUDY = {
    "title": "Test", "datasets": ["bbbc039", "nuclei_phantom_small", "dsb2018", "ac34"], "methods": ["none"], "seeds": [0],
    "teacher": ["resunet_w8", "resunet3d_w8"], "students": ["resunet_tiny", "resunet3d_tiny"],
}  # fmt: skip


def start(folder, **changes):
    """Start the study, which lacks data.

    Nothing is found but what is in `raw` and `more` of the folder.
    """
    changes = {
        "study": "test",
        "studies": {"test": STUDY},
        "raw_folders": ["raw", "more"],
        **changes,
    }
    (folder / "overlay.yaml").write_text(yaml.safe_dump(changes))
    return snakemake(ROOT, folder, "--cores", "1", "--configfile", folder / "overlay.yaml")


def test_all_that_is_missing_is_told_before_anything_runs(tmp_path):
    (tmp_path / "more" / "ac3ac4" / "files").mkdir(parents=True)
    result = start(tmp_path)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-5:] == [
        'config: study "test" has no data of bbbc039, dsb2018 in raw or more:',
        "  bbbc039: `gdlib download bbbc039` fetches it from data.broadinstitute.org into "
        "raw/bbbc039",
        "  dsb2018: `gdlib download dsb2018` fetches it from github.com into raw/dsb2018",
        "To download bbbc039, dsb2018 first: --config study=test download=true",
        "To go on with the rest: --config study=test only=nuclei_phantom_small,ac34",
    ]


def test_the_whole_study_can_be_planned_without_data(tmp_path):
    changes = {"study": "test", "studies": {"test": STUDY}, "raw_folders": ["raw"]}
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stderr
    assert 'config: study "test" has no data of bbbc039, dsb2018, ac34 in raw:' in result.stderr
    assert "Planned as if all were there." in result.stderr
    found = planned(result.stdout + result.stderr)
    assert {job for job in found if job.startswith("Prepare ")} == {
        f"Prepare {name}" for name in STUDY["datasets"]
    }
    assert not [job for job in found if job.startswith("Download ")]


def test_what_cannot_be_downloaded_is_told_even_where_downloads_are_allowed(tmp_path):
    result = start(tmp_path, download=True)
    assert result.returncode != 0
    first, second, third = result.stderr.splitlines()[-3:]
    assert first == 'config: study "test" has no data of ac34 in raw or more:'
    assert second.startswith("  ac34: get AC3 and AC4 from https://")
    assert "raw/ac3ac4" in second
    assert (
        third == "To go on with the rest: --config study=test download=true "
        "only=bbbc039,nuclei_phantom_small,dsb2018"
    )


def test_the_advice_works(tmp_path):
    result = start(tmp_path)
    download_them, go_on = (
        line.partition("--config ")[2].split() for line in result.stderr.splitlines()[-2:]
    )
    assert download_them == [
        "study=test",
        "download=true",
        "only=bbbc039,nuclei_phantom_small,dsb2018",
    ]
    overlay = tmp_path / "overlay.yaml"
    for arguments, names in ((download_them, {"bbbc039", "dsb2018"}), (go_on, set())):
        result = snakemake(
            ROOT, tmp_path, "--dry-run", "--configfile", overlay, "--config", *arguments
        )
        assert result.returncode == 0, result.stderr
        found = planned(result.stdout + result.stderr)
        assert {job for job in found if job.startswith("Download ")} == {
            f"Download raw/{name}" for name in names
        }
        assert {job for job in found if job.startswith("Prepare ")} == {
            f"Prepare {name}" for name in {*names, "nuclei_phantom_small"}
        }
        left_out = [
            line
            for line in result.stderr.splitlines()
            if line.startswith("Left out of study test: ")
        ]
        assert left_out == [
            "Left out of study test: "
            + ", ".join(n for n in STUDY["datasets"] if n not in arguments[-1])
        ]
    assert not (tmp_path / "raw").exists()


def overlay_of(remote, folder):
    """Write a configuration whose only data set is this file, in `folder/raw`, and return its
    path."""
    mine = {
        "source": "folder",
        "folder": "cells",
        "offsets": [[-1, 0], [0, -1]],
        "patch": [32, 32],
        "download": [remote],
    }
    path = folder / "overlay.yaml"
    study = {"study": "test", "studies": {"test": STUDY | {"datasets": ["cells"]}}}
    path.write_text(yaml.safe_dump(study | {"datasets": {"cells": mine}, "raw_folders": ["raw"]}))
    return path


def test_the_workflow_downloads_once_and_goes_on(server, squares, tmp_path):
    members = {}
    for number in range(6):
        for part, array in zip(("images", "labels"), squares(number), strict=True):
            file = io.BytesIO()
            tifffile.imwrite(file, np.squeeze(array))
            members[f"{part}/{number}.tif"] = file.getvalue()
    remote = server.add("cells.zip", zipped(members), into=".")
    overlay = overlay_of(remote.model_dump(), tmp_path)
    more = ("--configfile", overlay, "--cores", "1")
    target = ("--", "data/cells/test.h5")

    result = snakemake(ROOT, tmp_path, *more, "--config", "download=true", *target)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path.name for path in (tmp_path / "raw" / "cells").iterdir()} == {
        "images",
        "labels",
        RECORD,
    }
    assert (
        sha256(server.files["cells.zip"])
        in (tmp_path / "logs" / "download" / "cells.log").read_text()
    )
    # The switch is not needed any more, and changes nothing.
    for switch in (("--config", "download=true"), ()):
        result = snakemake(ROOT, tmp_path, *more, *switch, *target)
        assert "Nothing to be done" in result.stdout + result.stderr
    result = snakemake(ROOT, tmp_path, *more, "--", "download")
    assert result.returncode == 0, result.stderr
    assert len(server.requests) == 1


def test_a_download_that_fails_leaves_the_data_missing(server, tmp_path):
    overlay = overlay_of({"url": server.url("gone.zip"), "into": "."}, tmp_path)
    result = snakemake(
        ROOT, tmp_path, "--configfile", overlay, "--cores", "1", "--config", "download=true"
    )
    assert result.returncode != 0
    assert "404 Client Error: Not Found" in result.stderr
    result = snakemake(ROOT, tmp_path, "--configfile", overlay, "--dry-run")
    assert 'config: study "test" has no data of cells in raw:' in result.stderr
