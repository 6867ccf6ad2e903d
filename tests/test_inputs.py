"""Inputs of the real world: each row is a file, or a folder, as people have them, with the labels
that come of it, or the one sentence that names file, cause and a mend. What cannot be used leaves
nothing behind, and no input is changed.

How the pixels of a file are read is tested in `test_files.py`, to the last one; here it is whether
whole commands do the right thing with it.
"""

import csv
import os
import re
import resource
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import gdlib
from gdlib.cli.main import main
from gdlib.data import decoders

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def model(teacher):
    return gdlib.load(teacher, device="cpu", precision="float32", engine="torch")


@pytest.fixture(scope="module")
def image(squares):
    """Return (Y, X) uint8 with squares, up to 230 bright."""
    return squares(50)[0][0]


def command(model, out, *images):
    words = ["segment", *images, "--model", model, "--out", out, "--device", "cpu"]
    return [str(word) for word in (*words, "--precision", "float32", "--engine", "torch")]


def contents(folder):
    """Return what is in a folder, links as what they are."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def refused(capsys, words):
    """Return the one sentence of a command that must fail."""
    capsys.readouterr()
    assert main(words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("gdlib: error: ")
    return lines[0].removeprefix("gdlib: error: ")


# --- images -----------------------------------------------------------------------------------------------------------


def wide(image):
    return image.astype(np.uint16) * 257


def twelve(image):
    return image.astype(np.uint16) * 16


def bits(image):
    return image > 60


def frames(image):
    return np.stack([image, image[::-1], image[:, ::-1]])


def colours(image):
    """(Y, X, 3), the objects in the second channel."""
    return np.stack([image.T.reshape(image.shape), image, image // 2], -1)


def tiff(of=lambda image: image, **options):
    """Return a function that writes an image, or what a function makes of it."""
    return lambda path, image: tifffile.imwrite(
        path, of(image), **{"photometric": "minisblack"} | options
    )


def pillow(of=lambda image: image, **options):
    """Return the same with the compressions of Pillow's libtiff, and with PNG."""
    return lambda path, image: Image.fromarray(of(image)).save(path, **options)


def pyramid(path, image):
    with tifffile.TiffWriter(path, ome=True) as file:
        options = {"photometric": "minisblack", "tile": (16, 16)}
        file.write(image, subifds=1, metadata={"axes": "YX"}, **options)
        file.write(image[::2, ::2], subfiletype=1, **options)


def hyperstack(image):
    """(T, Z, C, Y, X), the objects in the second channel."""
    return np.stack(
        [np.stack([image // 3, image])[None], np.stack([image // 3, image[::-1]])[None]]
    )


def palette(path, image):
    Image.fromarray(np.stack([image // 16 * 16] * 3, -1)).quantize(16).save(path)


def few(image):
    """What comes back of 16 grey values, by Pillow itself."""
    rgb = Image.fromarray(np.stack([image // 16 * 16] * 3, -1)).quantize(16).convert("RGB")
    return np.asarray(rgb)[..., 0]


class Good(NamedTuple):
    """A file of an image that is segmented.

    Args:
        file: its name.
        write: of the path and the image.
        sees: what the network has to see, of the image.
        axes: of what it sees.
        options: of the command.
    """

    file: str
    write: Callable[[Path, np.ndarray], Any]
    sees: Callable[[np.ndarray], np.ndarray] = lambda image: image
    axes: str | None = None
    options: tuple[str, ...] = ()


GOOD = {
    "8 bits": Good("a.tif", tiff()),
    "12 bits in 16": Good("a.tif", tiff(twelve), twelve),
    "16 bits": Good("a.tif", tiff(wide), wide),
    "32 bits": Good("a.tif", tiff(lambda i: wide(i).astype(np.uint32)), wide),
    "signed": Good("a.tif", tiff(lambda i: i.astype(np.int16) - 100), lambda i: i.astype(np.int16) - 100),
    "float16": Good("a.tif", tiff(np.float16), np.float16),
    "float32": Good("a.tif", tiff(lambda i: np.float32(i) / 255), lambda i: np.float32(i) / 255),
    "big-endian": Good("a.tif", tiff(wide, byteorder=">"), wide),
    "BigTIFF": Good("a.tif", tiff(bigtiff=True)),
    "tiled": Good("a.tif", tiff(tile=(16, 16), compression="zlib")),
    "LZW": Good("a.tif", pillow(compression="tiff_lzw")),
    "zstd": Good("a.tif", pillow(compression="zstd")),
    "JPEG": Good("a.tif", pillow(compression="jpeg"), lambda i: jpeg(i)),
    "PNG": Good("a.png", pillow()),
    "PNG, 16 bits": Good("a.png", pillow(wide), wide),
    "PNG, 1 bit": Good("a.png", pillow(bits), bits),
    "PNG, palette": Good("a.png", palette, few),
    "RGBA": Good("a.png", pillow(lambda i: np.dstack([i, i, i, np.full_like(i, 255)]))),
    "grey and opacity": Good("a.png", pillow(lambda i: np.dstack([i, i // 2]))),
    "dark on bright": Good("a.tif", tiff(lambda i: 255 - i), options=("--invert",)),
    "dark on bright, 16 bits": Good("a.tif", tiff(lambda i: 65535 - wide(i)), wide, options=("--invert",)),
    "dark on bright, float32": Good("a.tif", tiff(lambda i: 1 - np.float32(i)), np.float32, options=("--invert",)),
    "inverted contrast": Good("a.tif", tiff(lambda i: 255 - i, photometric="miniswhite")),
    "inverted contrast, 16 bits": Good("a.tif", tiff(lambda i: 65535 - wide(i), photometric="miniswhite"), wide),
    "OME-TIFF with a pyramid": Good("a.ome.tif", pyramid),
    "pages without names": Good("a.tif", tiff(frames, metadata=None), frames, "ZYX"),
    "time series": Good("a.tif", tiff(frames, imagej=True, metadata={"axes": "TYX"}), frames, "TYX"),
    "sections": Good("a.tif", tiff(frames, ome=True, metadata={"axes": "ZYX"}), frames, "ZYX"),
    "hyperstack of ImageJ": Good(
        "a.tif", tiff(hyperstack, imagej=True, metadata={"axes": "TZCYX"}),
        lambda i: np.stack([i, i[::-1]]), "TYX", ("--channel", "2"),
    ),
    "CYX": Good(
        "a.tif", tiff(lambda i: np.moveaxis(colours(i), -1, 0), metadata={"axes": "CYX"}, imagej=True),
        options=("--channel", "2"),
    ),
    "YXC": Good("a.tif", tiff(colours, metadata=None), options=("--channel", "2", "--axes", "YXC")),
    "colours": Good("a.png", pillow(colours), options=("--channel", "green")),
    "narrower than a block": Good("a.tif", tiff(lambda i: i[:, :7]), lambda i: i[:, :7], options=("--block", "32")),
    "one line": Good("a.tif", tiff(lambda i: i[:1]), lambda i: i[:1]),
    "one pixel": Good("a.tif", tiff(lambda i: i[:1, :1]), lambda i: i[:1, :1]),
    "capitals": Good("A.TIF", tiff()),
    "spaces": Good("a cell, or two (1).tif", tiff()),
    "accents": Good(unicodedata.normalize("NFD", "Zélle µ.tiff"), tiff()),
    "several dots": Good("exp.2.w1.c3.tif", tiff()),
    "leading minus": Good("-a.tif", tiff()),
}  # fmt: skip
NOTHING = ("one line", "one pixel", "narrower than a block")  # where no square need be found


def jpeg(image):
    """Return what libjpeg itself makes of it."""
    import io

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="TIFF", compression="jpeg")
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("name", GOOD)
def test_an_image_gives_its_labels(name, teacher, model, image, tmp_path, capsys):
    row, folder = GOOD[name], tmp_path / "in"
    folder.mkdir()
    row.write(folder / row.file, image)
    before = contents(folder)
    words = command(teacher, tmp_path / "out", folder / row.file)
    assert main([*words, *row.options]) == 0
    assert contents(folder) == before
    (found,) = (tmp_path / "out").iterdir()
    label = tifffile.imread(found)
    np.testing.assert_array_equal(label, model.segment(row.sees(image), row.axes))
    assert label.dtype == np.uint32
    assert label.max() > 3 or name in NOTHING
    said = (
        f"{folder / row.file}: {sum(each.max() for each in label.reshape(-1, *label.shape[-2:]))}"
    )
    assert capsys.readouterr().out.startswith(f"{said} objects")


class Bad(NamedTuple):
    """A file that cannot be used.

    Args:
        file: its name.
        write: of the path and the image.
        words: that the sentence must have, beside the name.
        options: of the command.
    """

    file: str
    write: Callable[[Path, np.ndarray], Any]
    words: tuple[str, ...]
    options: tuple[str, ...] = ()


def text(content):
    return lambda path, image: path.write_bytes(content)


def cut(write, keep=0.6):
    """Return a function that writes a file, and cuts off its end."""

    def write_and_cut(path, image):
        write(path, image)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return write_and_cut


def with_one(value, dtype=np.float32):
    """Return a function that writes an image with one pixel of a value."""

    def change(image):
        changed = image.astype(dtype)
        changed[3, 5] = value
        return changed

    return tiff(change)


def packed(path, image):
    """12 bits per pixel, two pixels in three bytes."""
    tifffile.imwrite(path, np.zeros((image.shape[0], image.shape[1] * 3 // 2), np.uint8), photometric="minisblack")  # fmt: skip
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags["ImageWidth"].overwrite(image.shape[1])
        file.pages[0].tags["BitsPerSample"].overwrite(12)


def retagged(tag, value):
    """Return a function that writes a TIFF, and changes what it says of itself."""

    def write(path, image):
        tifffile.imwrite(path, image, photometric="minisblack")
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags[tag].overwrite(value)

    return write


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
NEURONS = ("--model", "neurons")  # a network of volumes
BAD = {
    "empty": Bad("a.tif", text(b""), ("cannot be read", "get it again")),
    "empty PNG": Bad("a.png", text(b""), ("cannot be read", "get it again")),
    "truncated": Bad("a.tif", cut(tiff()), ("cannot be read", "get it again")),
    "truncated, compressed": Bad("a.tif", cut(tiff(wide, compression="zlib")), ("cannot be read", "get it again")),
    "truncated PNG": Bad("a.png", cut(pillow()), ("cannot be read", "save it again")),
    "missing": Bad("a.tif", lambda path, image: None, ("missing", "check its name")),
    "no image": Bad("a.tif", text(b"some words\n"), ("cannot be read", "get it again")),
    "a page of HTML": Bad("a.tif", text(PAGE), ("a web page", "get it again")),
    "a pointer of Git LFS": Bad("a.png", text(POINTER), ("pointer of Git LFS", "git lfs pull")),
    "a link to nothing": Bad("a.tif", lambda path, image: path.symlink_to("b.tif"), ("missing", "check its name")),
    "another kind": Bad("a.docx", text(b"PK"), ("a.docx", "TIFF")),
    "NaN": Bad("a.tif", with_one(np.nan), ("NaN or infinite", )),
    "infinity": Bad("a.tif", with_one(np.inf, np.float16), ("NaN or infinite", )),
    "minus infinity": Bad("a.tif", with_one(-np.inf), ("NaN or infinite", )),
    "complex": Bad("a.tif", tiff(np.complex64), ("complex",)),
    "packed 12 bits": Bad("a.tif", packed, ("imagecodecs", "extra `tiff`", "or save")),
    "JPEG XL": Bad("a.tif", retagged("Compression", 50002), ("JPEGXL", "imagecodecs", "extra `tiff`", "or save")),
    "LERC": Bad("a.tif", retagged("Compression", 34887), ("LERC", "imagecodecs", "extra `tiff`", "or save")),
    "colours, no channel chosen": Bad("a.png", pillow(colours), ("3 channel", "1 channel", "--channel")),
    "channels, none chosen": Bad(
        "a.tif", tiff(lambda i: np.moveaxis(colours(i), -1, 0), imagej=True, metadata={"axes": "CYX"}),
        ("3 channel", "1 channel", "--channel"),
    ),
    "a channel that is not there": Bad("a.png", pillow(colours), ("there is no channel", "red"), ("--channel", "DAPI")),
    "axes that are others": Bad("a.tif", tiff(), ("axes", "ZYX"), ("--axes", "ZYX")),
    "several images": Bad(
        "a.tif", lambda path, image: several(path, image, image[:20]), ("2 images in this file", "save each"),
    ),
    "one section for a network of volumes": Bad("a.tif", tiff(), ("3 axes", "networks, nuclei, nuclei_fast and worms take images"), NEURONS),
    "time for a network of volumes": Bad(
        "a.tif", tiff(frames, imagej=True, metadata={"axes": "TYX"}), ("time series without depth", "the axes ZYX"), NEURONS,
    ),
}  # fmt: skip


def several(path, *images):
    with tifffile.TiffWriter(path) as file:
        for image in images:
            file.write(image, photometric="minisblack", metadata=None)


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_used_is_one_sentence(
    name, teacher, image, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(decoders, "has_imagecodecs", lambda: False)
    row, folder = BAD[name], tmp_path / "in"
    folder.mkdir()
    row.write(folder / row.file, image)
    before = contents(folder)
    line = refused(capsys, [*command(teacher, tmp_path / "out", folder / row.file), *row.options])
    assert line.startswith(f"{folder / row.file}: ")
    assert all(word in line for word in row.words), line
    assert re.search("; .", line), line  # a mend
    assert contents(folder) == before
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# --- weights ----------------------------------------------------------------------------------------------------------


def saved_by_torch(path, **options):
    torch.save({"weight": torch.zeros(3)}, path, **options)


# Name of the file, how it is made, and what is said of it.
WEIGHTS = {
    "PyTorch": ("cells.pth", saved_by_torch, ("PyTorch saved this", "give a .safetensors")),
    "PyTorch, old": (
        "cells.pt", lambda path: saved_by_torch(path, _use_new_zipfile_serialization=False),
        ("PyTorch saved this", "give a .safetensors"),
    ),
    "ONNX that is none": ("cells.onnx", lambda path: path.write_bytes(b"\x08\x07"), ("ONNX",)),
    "a page of HTML": ("cells.safetensors", lambda path: path.write_bytes(PAGE), ("a web page", "get it again")),
    "a pointer of Git LFS": ("cells.safetensors", lambda path: path.write_bytes(POINTER), ("git lfs pull",)),
    "a pointer, ONNX": ("cells.onnx", lambda path: path.write_bytes(POINTER), ("git lfs pull",)),
    "empty": ("cells.safetensors", lambda path: path.write_bytes(b""), ("not a readable safetensors file",)),
    "Keras": ("cells.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), ("this is no weights file", "give the .safetensors")),
    "an image": ("cells.tif", lambda path: tifffile.imwrite(path, np.ones((9, 9), np.uint8)), ("this is no weights file",)),
    "a text": ("cells.tif", lambda path: path.write_text("weights"), ("this is no weights file",)),
    "a folder": ("cells", lambda path: path.mkdir(), ("a directory",)),
    "a name that there is not": ("nuclie", lambda path: None, ("missing",)),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_other_programs(name, image, tmp_path, capsys):
    file, write, words = WEIGHTS[name]
    write(tmp_path / file)
    tifffile.imwrite(tmp_path / "a.tif", image)
    before = contents(tmp_path)
    line = refused(capsys, command(tmp_path / file, tmp_path / "out", tmp_path / "a.tif"))
    assert line.startswith(f"{tmp_path / file}: ")
    assert all(word in line for word in words), line
    assert re.search("; .", line) or "pip install" in line, line
    assert contents(tmp_path) == before


# --- folders ----------------------------------------------------------------------------------------------------------


def left_by_systems(folder, image):
    tiff()(folder / "a.tif", image)
    for name in ("._a.tif", "._b.tif", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (folder / name).write_bytes(b"\0\5\x16\7")


def links(folder, image):
    (folder.parent / "elsewhere").mkdir()
    tiff()(folder.parent / "elsewhere" / "far.tif", image)
    (folder / "near.tif").symlink_to(folder.parent / "elsewhere" / "far.tif")


def odd_names(folder, image):
    for name in ("with a space.tif", "é.b.c.TIF", "α-β.tiff", "1.PNG", "a,b;c'd.tif"):
        (pillow() if name.endswith("PNG") else tiff())(folder / name, image)


def some_bad(folder, image):
    for name in ("a.tif", "c.tif"):
        tiff()(folder / name, image)
    (folder / "b.tif").write_bytes(b"")
    cut(tiff())(folder / "d.tif", image)
    (folder / "e.tif").symlink_to("nowhere.tif")


# How it is made, names of the labels, and of what is told that it cannot be used.
FOLDERS = {
    "files that systems leave": (left_by_systems, ["a.tif"], []),
    "links": (links, ["near.tif"], []),
    "odd names": (odd_names, ["1.tif", "a,b;c'd.tif", "with a space.tif", "é.b.c.tif", "α-β.tif"], []),
    "some bad": (some_bad, ["a.tif", "c.tif"], ["b.tif", "d.tif", "e.tif"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder(name, teacher, model, image, tmp_path, capsys):
    make, good, bad = FOLDERS[name]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in", image)
    before, out = contents(tmp_path), tmp_path / "out"
    assert main(command(teacher, out, tmp_path / "in")) == bool(bad)
    assert sorted(path.name for path in out.iterdir()) == good
    for path in out.iterdir():
        np.testing.assert_array_equal(tifffile.imread(path), model.segment(image))
    lines = [line for line in capsys.readouterr().err.splitlines() if "gdlib: error: " in line]
    for line, file in zip(lines, bad, strict=False):
        assert line.startswith(f"gdlib: error: {tmp_path / 'in' / file}: ")
    if bad:
        assert lines[-1].endswith(
            f"{len(bad)} of {len(good) + len(bad)} images could not be segmented; all others are done"
        )
    assert {path: content for path, content in contents(tmp_path).items() if path.parts[0] != "out"} == before  # fmt: skip


def test_a_folder_without_an_image(teacher, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "Thumbs.db").write_bytes(b"")
    line = refused(capsys, command(teacher, tmp_path / "out", tmp_path / "in"))
    assert line.startswith(f"{tmp_path / 'in'}: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "in"]


# --- labels -----------------------------------------------------------------------------------------------------------


def pixels(label):
    """Return objects of one pixel beside those that are there."""
    changed = label.copy()
    free = np.argwhere(label == 0)[::7]
    changed[tuple(free.T)] = label.max() + 1 + np.arange(len(free))
    return changed


def many(label):
    """Return objects of one pixel, more than 16 bits can count."""
    found = np.zeros((516, 516), np.uint32)
    found[::2, ::2] = np.arange(1, 258 * 258 + 1).reshape(258, 258)
    return found


LABELS = {
    "gaps": lambda label: label.astype(np.uint16) * 5000,
    "ids above 65,535": lambda label: np.where(label, label + 70_000, 0).astype(np.uint32),
    "ids near the end of 32 bits": lambda label: np.where(label, 2**32 - label.astype(np.int64), 0).astype(np.uint32),
    "ids in 64 bits": lambda label: np.where(label, label.astype(np.int64) + 2**40, 0),
    "objects of one pixel": pixels,
    "66,564 objects": many,
    "no object": lambda label: np.zeros_like(label, np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_compared(name, squares, tmp_path, capsys):
    """With themselves: every object is counted and found."""
    label = LABELS[name](squares(50)[1])
    count = len(np.unique(label)) - 1
    for part in ("true", "found"):
        tifffile.imwrite(tmp_path / f"{part}.tif", label, photometric="minisblack", compression="zlib")  # fmt: skip
    out = tmp_path / "scores.csv"
    assert main(["evaluate", *(str(tmp_path / f"{part}.tif") for part in ("true", "found")), "--out", str(out)]) == 0  # fmt: skip
    with out.open(newline="") as file:
        row = next(csv.DictReader(file))
    assert int(row["objects"]) == count
    assert int(row["false_objects"]) == int(row["false_pixels"]) == 0
    if count:
        assert float(row["aji"]) == float(row["pq"]) == 1


def test_labels_are_learned_from(squares, tmp_path, capsys):
    """Each image with labels of another row: objects are counted as they are, up to the training
    that is planned."""
    count = 0
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    rows = [name for name in LABELS if name not in ("66,564 objects", "no object")]
    for seed, name in enumerate(rows):
        image, label = squares(seed, shape=(64, 70))
        label = LABELS[name](label)
        count += len(np.unique(label)) - 1
        for part, array in (("images", image[0]), ("labels", label)):
            tifffile.imwrite(tmp_path / part / f"{name}.tif", array, photometric="minisblack")
    words = ["distill", tmp_path / "images", tmp_path / "labels", "--out", tmp_path / "new"]
    assert main([*map(str, words), "--dry-run"]) == 0
    assert f"{len(rows)} images of 64 x 70 pixels (y, x), 1 channel; {count} objects" in (
        capsys.readouterr().out
    )


# --- outputs ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_full(teacher, image, tmp_path, capsys):
    """A limit of the size of files stands for it."""
    tifffile.imwrite(tmp_path / "a.tif", image)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        line = refused(capsys, command(teacher, tmp_path / "out", tmp_path / "a.tif"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith(f"{tmp_path / 'out' / 'a.tif'}: cannot be written (file too large); ")
    assert contents(tmp_path) == before


def test_a_folder_that_is_read_only(teacher, image, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", image)
    line = refused(capsys, command(teacher, "/sys/kernel/new", tmp_path / "a.tif"))
    assert line.startswith("/sys/kernel/new")
    assert "; make its folder writable" in line


def test_the_same_output_folder_twice(teacher, image, tmp_path, capsys):
    """The same image gives the same bytes; another one of that name is not written over it."""
    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        tifffile.imwrite(tmp_path / part / "a.tif", image if part == "one" else image[::-1])
    assert main(command(teacher, tmp_path / "out", tmp_path / "one")) == 0
    before = contents(tmp_path)
    assert main(command(teacher, tmp_path / "out", tmp_path / "one")) == 0
    assert contents(tmp_path) == before
    line = refused(capsys, command(teacher, tmp_path / "out", tmp_path / "two"))
    assert line.startswith(f"{tmp_path / 'out' / 'a.tif'} is there already")
    assert "--overwrite" in line
    assert contents(tmp_path) == before


# --- heavy ones -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_runs_at_once(teacher, model, image, tmp_path):
    """On the same images and folder: both end well, and nothing is left of either."""
    (tmp_path / "in").mkdir()
    for number in range(40):
        tifffile.imwrite(tmp_path / "in" / f"{number}.tif", image)
    words = [sys.executable, "-m", "gdlib", *command(teacher, tmp_path / "out", tmp_path / "in")]
    runs = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]  # fmt: skip
    for run in runs:
        said = run.communicate(timeout=300)
        assert run.returncode == 0, said
    found = {path.name: tifffile.imread(path) for path in (tmp_path / "out").iterdir()}
    assert sorted(found) == sorted(f"{number}.tif" for number in range(40))
    for label in found.values():
        np.testing.assert_array_equal(label, model.segment(image))


@pytest.mark.long
def test_60_000_objects(teacher, squares, tmp_path, capsys):
    """Of nine pixels across; in one piece, and in the label, its table and its picture."""
    image, truth = squares(3, shape=(3000, 3000))
    assert truth.max() > 60_000
    tifffile.imwrite(tmp_path / "a.tif", image[0])
    table = tmp_path / "all.csv"
    words = command(teacher, tmp_path / "out", tmp_path / "a.tif")
    assert main([*words, "--preview", "--table", str(table)]) == 0
    label = tifffile.imread(tmp_path / "out" / "a.tif")
    assert label.max() > 50_000
    areas = np.bincount(label.ravel())[1:]
    assert areas.min() > 0
    with table.open(newline="") as file:
        rows = {int(row["label"]): float(row["area"]) for row in csv.DictReader(file)}
    assert rows == dict(enumerate(areas.tolist(), start=1))


def processor_seconds(process):
    """Return what a process and its threads have used, whatever else the machine does."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.long
def test_10_000_small_images(teacher, image, tmp_path):
    """Neither memory nor the time of an image grows with their number."""
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "00000.tif", image)
    content = (tmp_path / "in" / "00000.tif").read_bytes()
    for number in range(1, 10_000):
        (tmp_path / "in" / f"{number:05}.tif").write_bytes(content)
    words = [sys.executable, "-m", "gdlib", *command(teacher, tmp_path / "out", tmp_path / "in")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:  # fmt: skip
        seen = []
        for number, _ in enumerate(run.stdout, start=1):
            if number % 500 == 0 and number < 10_000:  # of the last, it may have ended
                status = Path(f"/proc/{run.pid}/status").read_text()
                kib = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
                seen.append((processor_seconds(run.pid), kib / 1024))
    assert run.returncode == 0
    assert len(list((tmp_path / "out").iterdir())) == 10_000
    times, memory = np.diff([at for at, _ in seen]), [mib for _, mib in seen]
    print(f"{times.mean() * 2:.1f} ms of a processor per image; {memory[1]:.0f} MiB")
    assert memory[-1] < memory[1] + 40
    assert np.median(times[-5:]) < 1.5 * np.median(times[1:6])


# --- what the table has to have -----------------------------------------------------------------------------------------

# What people have, and the rows above, or tests elsewhere, that it is in.
LISTED = {
    "multi-page": ["GOOD: pages without names", "BAD: several images"],
    "several channels": ["GOOD: CYX", "GOOD: YXC", "BAD: channels, none chosen"],
    "hyperstacks of ImageJ": ["GOOD: hyperstack of ImageJ"],
    "OME-TIFF with pyramids": ["GOOD: OME-TIFF with a pyramid", "test_files.py: test_image"],
    "BigTIFF": ["GOOD: BigTIFF", "test_large.py: test_large_tiff_files_are_mapped"],
    "big-endian": ["GOOD: big-endian"],
    "tiled": ["GOOD: tiled"],
    "compressed": ["GOOD: LZW", "GOOD: JPEG", "GOOD: zstd", "BAD: LERC", "BAD: JPEG XL"],
    "floats": ["GOOD: float16", "GOOD: float32", "BAD: NaN", "BAD: infinity"],
    "bits and palettes": ["GOOD: PNG, 1 bit", "GOOD: PNG, palette"],
    "RGBA": ["GOOD: RGBA", "GOOD: grey and opacity"],
    "8, 12 and 16 bits": ["GOOD: 8 bits", "GOOD: 12 bits in 16", "GOOD: 16 bits", "BAD: packed 12 bits"],
    "inverted contrast": ["GOOD: inverted contrast", "GOOD: dark on bright"],
    "names": ["GOOD: spaces", "GOOD: accents", "GOOD: several dots", "GOOD: capitals", "FOLDERS: odd names"],
    "what systems leave": ["FOLDERS: files that systems leave"],
    "links": ["FOLDERS: links", "BAD: a link to nothing"],
    "empty and truncated": ["BAD: empty", "BAD: truncated", "FOLDERS: some bad"],
    "ids": ["LABELS: ids above 65,535", "LABELS: gaps"],
    "60,000 objects": ["LABELS: 66,564 objects", "test_inputs.py: test_60_000_objects"],
    "objects of one pixel": ["LABELS: objects of one pixel"],
    "narrower than a block": ["GOOD: narrower than a block"],
    "time for 2D": ["GOOD: time series"],
    "sections for 3D": ["BAD: one section for a network of volumes", "BAD: time for a network of volumes"],
    "read-only": ["test_inputs.py: test_a_folder_that_is_read_only", "test_messages.py: test_a_folder_that_becomes_read_only"],
    "full": ["test_inputs.py: test_a_folder_that_is_full", "test_large.py: test_too_small_a_disk_is_said_before"],
    "the same folder twice": ["test_inputs.py: test_the_same_output_folder_twice"],
    "weights of others": ["WEIGHTS: PyTorch", "WEIGHTS: ONNX that is none", "WEIGHTS: a page of HTML", "WEIGHTS: a pointer of Git LFS",
                          "export/test_export.py: test_files_of_others_are_one_sentence"],
    "two runs at once": ["test_inputs.py: test_two_runs_at_once", "test_large.py: test_two_processes_do_not_share_blocks"],
    "10,000 images": ["test_inputs.py: test_10_000_small_images"],
}  # fmt: skip


@pytest.mark.parametrize("what", LISTED)
def test_the_table_has_what_people_have(what):
    for where in LISTED[what]:
        table, _, name = where.partition(": ")
        if table.endswith(".py"):
            assert f"\ndef {name}(" in (TESTS / table).read_text()
        else:
            assert name in globals()[table]
