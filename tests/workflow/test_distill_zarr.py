"""`gdlib distill` on volumes that are OME-Zarr, from two folders to the table."""

import re

import numpy as np
import zarr
from test_omezarr import write

from gdlib import io
from gdlib.cli.main import main


def test_a_network_of_ones_own_from_volumes_in_ome_zarr(squares, tmp_path, monkeypatch, capsys):
    """With a pyramid, of which the full resolution is learned from; a label that is changed in its
    place is noticed."""
    monkeypatch.chdir(tmp_path)
    images, labels = {}, {}
    for name, zarr_format in zip(("a", "b", "c"), (2, 3, 3), strict=True):
        (flat,), truth = squares(ord(name), shape=(64, 70))
        label = np.stack([truth] * 14)
        label[6:8] = 0
        label[8:] += (truth.max() * (truth > 0)).astype(label.dtype)
        image = np.where(label > 0, flat, flat.min())
        for folder, volume in (("images", image), ("labels", label)):
            levels = [volume, volume[:, ::2, ::2]]
            write(tmp_path / folder / f"{name}.zarr", levels, "zyx", zarr_format)
        images[name], labels[name] = image, label
    command = ["distill", "images", "labels", "--3d", "--out", "mine", "--cores", "2"]
    assert main([*command, "--dry-run"]) == 0
    assert "3 volumes of 14 x 64 x 70 pixels (z, y, x), 1 channel;" in capsys.readouterr().out
    config = tmp_path / "mine" / "config.yaml"
    text, edits = re.subn(r"steps: \d+, (.*)validate_every: \d+", r"steps: 2, \1validate_every: 2", config.read_text())  # fmt: skip
    assert edits == 2
    config.write_text(text)

    assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "| 3D ResUNet-tiny | student |" in said
    weights = tmp_path / re.search(r"^weights: (.*)$", said, re.MULTILINE)[1]
    assert io.read_header(weights)["run"]["recipe"]["steps"] == 2
    read = {}
    for split in ("train", "val", "test"):
        samples = io.read_samples(tmp_path / "mine" / "data" / "mycells" / f"{split}.h5")
        read |= {sample.id: (sample.image, sample.label) for sample in samples}
    assert sorted(read) == ["a", "b", "c"]
    for name, (image, label) in read.items():
        np.testing.assert_array_equal(image[0], images[name])
        np.testing.assert_array_equal(label, labels[name])

    assert main([*command, "--dry-run"]) == 0
    assert "there is nothing to do" in capsys.readouterr().out
    zarr.open_array(store=str(tmp_path / "labels" / "b.zarr" / "s0"), mode="a")[0, :8] = 0
    assert main([*command, "--dry-run"]) == 0
    assert "1 prepare" in capsys.readouterr().out
