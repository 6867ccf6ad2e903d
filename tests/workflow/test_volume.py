"""One volume as many jobs: killed, gone on with, and the same as in one piece."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
from test_blockwise import assert_same, config_of, volume
from test_omezarr import write

from gdlib import io
from gdlib.cli.main import main
from gdlib.data.omezarr import open_zarr
from gdlib.volumes.grid import options

__all__ = ["volume"]
ROOT = Path(__file__).parents[2]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")


def snakemake(folder, config, *arguments, **kwargs):
    command = [
        SNAKEMAKE,
        "--snakefile",
        ROOT / "workflow" / "volume.smk",
        "--directory",
        folder,
        *arguments,
    ]
    command += ["--config", *(f"{key}={value}" for key, value in config.items())]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def test_the_workflow_is_killed_and_goes_on(volume, teacher, tmp_path):
    config = config_of(volume, teacher, "out")
    first = snakemake(tmp_path, config, "--cores", "1")
    segments = tmp_path / "out" / "segments"
    # the first of them is certainly done
    while first.poll() is None and len(list(segments.glob("[!.]*.h5"))) < 2:
        time.sleep(0.05)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "out" / "labels.h5").exists()
    assert snakemake(tmp_path, config, "--unlock").wait() == 0
    second = snakemake(tmp_path, config, "--cores", "2")
    output, _ = second.communicate()
    assert second.returncode == 0, output
    blocks = len(options(config)["grid"].names)
    assert blocks == 3
    done = re.findall(r"^Job \d+: Segment block (\S+)$", output, flags=re.MULTILINE)
    assert 0 < len(done) < blocks
    assert (
        main(["segment", f"{volume}:main", "--model", str(teacher), "--out", str(tmp_path / "one")])
        == 0
    )
    with (
        io.open_h5(tmp_path / "out" / "labels.h5") as file,
        h5py.File(tmp_path / "one" / "image.h5") as one,
    ):
        assert_same(file["main"][()], one["main"][()])
        assert json.loads(file.attrs["overlap"]) == [16, 16]
        assert file.attrs["weights_sha256"] == io.sha256(teacher)
    # Only the result and the plan stay, and nothing is done twice.
    assert not list((tmp_path / "out").rglob("*-*.h5"))
    output, _ = snakemake(tmp_path, config, "--cores", "1").communicate()
    assert "Nothing to be done" in output
    output, _ = snakemake(tmp_path, config | {"block": "64x3x2"}, "--cores", "1").communicate()
    assert "block: 64x3x2 is not one side, or 2" in output
    assert "Traceback" not in output


def test_an_ome_zarr_gives_an_ome_zarr(volume, teacher, tmp_path):
    """With the labels of the same image in an HDF5 file, and a pyramid."""
    with h5py.File(volume) as file:
        image = file["main"][()]
    path = write(tmp_path / "image.zarr", [image[None], image[None, ::2, ::2]], "cyx", 3)
    config = config_of(volume, teacher, "h5")
    for arguments in (config, config | {"input": str(path), "out": "zarr"}):
        output, _ = (run := snakemake(tmp_path, arguments, "--cores", "2")).communicate()
        assert run.returncode == 0, output
    label = open_zarr(tmp_path / "zarr" / "labels.zarr")
    with h5py.File(tmp_path / "h5" / "labels.h5") as file:
        expected = file["main"][()]
    assert expected.max() > 3
    assert np.array_equal(np.asarray(label), expected)
    assert [level.shape for level in label.levels] == [expected.shape, expected[::2, ::2].shape]
    assert label.microns == (0.5, 0.5)
    assert not list((tmp_path / "zarr").rglob("*.h5"))
    output, _ = snakemake(tmp_path, arguments, "--cores", "1").communicate()
    assert "Nothing to be done" in output, output
    label.file.unlink()  # not one of ours any more
    (tmp_path / "zarr" / "labels.zarr" / "zarr.json").write_text("{}")
    output, _ = snakemake(tmp_path, arguments, "--cores", "1").communicate()
    assert "labels.zarr: there is a folder of this name; choose another out" in output, output


def test_the_workflow_is_clean(volume, teacher, tmp_path):
    process = snakemake(tmp_path, config_of(volume, teacher, "out"), "--lint")
    output, _ = process.communicate()
    assert process.returncode == 0, output
