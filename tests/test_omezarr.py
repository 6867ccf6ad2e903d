"""OME-Zarr 0.4 and 0.5: images of any level, channel and frame are read, piece by piece where memory
is short, and labels are written in the same place of the same space."""

import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from test_large import matched
from test_use import model, segment

from gdlib import io
from gdlib.cli.images import open_image
from gdlib.cli.main import main
from gdlib.data.files import find_files, is_folder, read_image, read_label
from gdlib.data.omezarr import ZarrImage, open_zarr, split_zarr_path
from gdlib.data.sources.folder import folder
from gdlib.io import files as files_of_io
from gdlib.io.failures import DataError
from gdlib.predict.predictor import Predictor
from gdlib.volumes import grid, memory, zarr_labels
from gdlib.volumes.footprint import choose

__all__ = ["model"]
zarr = pytest.importorskip("zarr", reason="the extra `zarr` is not installed")

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"t": {"type": "time", "unit": "second"}, "c": {"type": "channel"}}
SPACE = {"type": "space", "unit": "micrometer"}
FORMATS = pytest.mark.parametrize("zarr_format", [2, 3], ids=["0.4", "0.5"])


def write(
    path,
    levels,
    axes,
    zarr_format,
    *,
    group="",
    pixel=0.5,
    channels=(),
    dtype=None,
    start=0.0,
    **options,
):
    """Write an OME-Zarr as the specification has it: each level has pixels twice as large."""
    whole = zarr.open_group(store=str(path), mode="a", path=group, zarr_format=zarr_format)
    if zarr_format == 2:
        options = {"chunk_key_encoding": {"name": "v2", "separator": "/"}} | options
    datasets = []
    for k, level in enumerate(levels):
        level = np.asarray(level, dtype)
        names = {"dimension_names": list(axes)} if zarr_format == 3 else {}
        array = whole.create_array(f"s{k}", shape=level.shape, dtype=level.dtype, **{"chunks": tuple(min(16, n) for n in level.shape), **names, **options})  # fmt: skip
        array[...] = level
        scale = [pixel * 2**k if axis in "yx" else 2.0 if axis == "z" else 1.0 for axis in axes]
        moves = [{"type": "scale", "scale": scale}]
        moves += [
            {"type": "translation", "translation": [start if a in "yx" else 0.0 for a in axes]}
        ] * bool(start)
        datasets.append({"path": f"s{k}", "coordinateTransformations": moves})
    named = [{"name": axis, **UNITS.get(axis, SPACE)} for axis in axes]
    ome = {"multiscales": [{"axes": named, "datasets": datasets}]}
    if channels:
        ome["omero"] = {"channels": [{"label": name} for name in channels]}
    if zarr_format == 2:
        ome["multiscales"][0]["version"] = "0.4"
    whole.attrs.update(ome if zarr_format == 2 else {"ome": {"version": "0.5", **ome}})
    return path


def metadata(folder):
    """Return the OME metadata of a group as any reader of JSON sees them."""
    if (folder / "zarr.json").exists():
        return json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]
    return json.loads((folder / ".zattrs").read_text())


@pytest.fixture(scope="module")
def picture(squares):
    return squares(50)[0][0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("a/b.zarr", ("a/b.zarr", "")),
        ("a/b.ome.zarr:1", ("a/b.ome.zarr", "1")),
        ("a/b.zarr/labels/n/0/", ("a/b.zarr", "labels/n/0")),
        ("A.ZARR", ("A.ZARR", "")),
        ("b.zarrs", None),
        ("b.tif", None),
    ],
)
def test_names(path, wanted):
    assert split_zarr_path(path) == (wanted and (Path(wanted[0]), wanted[1]))


@FORMATS
@pytest.mark.parametrize("dtype", ["u1", ">u2", "<f4"])
def test_levels_and_what_is_said_of_them(zarr_format, dtype, tmp_path):
    full = np.arange(2 * 3 * 4 * 20 * 30).reshape(2, 3, 4, 20, 30) % 251
    half = full[..., ::2, ::2]
    path = write(tmp_path / "a.zarr", [full, half], "tczyx", zarr_format, channels=["GFP", "DAPI", "x"], dtype=dtype)  # fmt: skip
    image = open_zarr(path)
    assert (image.letters, image.shape, image.channels) == (
        "TCZYX",
        full.shape,
        ["GFP", "DAPI", "x"],
    )
    assert image.dtype == np.dtype(dtype).newbyteorder("=")
    assert image.microns == (2.0, 0.5, 0.5)
    assert np.array_equal(image, full)
    assert np.array_equal(image[1, 2, :, 3:9, ::4], full[1, 2, :, 3:9, ::4])
    for name in (f"{path}:1", f"{path}/1", f"{path}:s1", f"{path}/s1/"):
        small = open_zarr(name)
        assert np.array_equal(small, half)
        assert (small.level, small.microns) == (1, (2.0, 1.0, 1.0))
    assert is_folder(tmp_path)
    assert not is_folder(path)
    assert find_files(tmp_path) == {"a": path}


@FORMATS
def test_images_in_groups(zarr_format, picture, tmp_path):
    one = tmp_path / "one.zarr"
    zarr.create_group(str(one), zarr_format=zarr_format)
    write(one, [picture], "yx", zarr_format, group="0")
    write(one, [picture], "yx", zarr_format, group="0/labels/cells")
    assert np.array_equal(open_zarr(one), picture)  # as bioformats2raw writes it
    assert open_zarr(one).group == "0"
    plate = tmp_path / "plate.zarr"
    for group in ("A/1/0", "A/1/1", "B/2/0"):
        write(plate, [picture], "yx", zarr_format, group=group)
    assert np.array_equal(open_zarr(f"{plate}:A/1/1"), picture)
    assert np.array_equal(open_zarr(f"{plate}/B"), picture)
    with pytest.raises(DataError, match="inside are A/1/0, A/1/1, B/2/0; name one"):
        open_zarr(plate)


@FORMATS
def test_an_array_without_metadata(zarr_format, picture, tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), data=picture, zarr_format=zarr_format)
    image = open_zarr(tmp_path / "a.zarr")
    assert (image.letters, image.microns, image.levels) == ("", None, [])
    assert np.array_equal(read_image(tmp_path / "a.zarr"), picture[None])


def spoilt(change):
    def spoil(path):
        file = path / ".zattrs"
        content = json.loads(file.read_text())
        change(content["multiscales"][0], content)
        file.write_text(json.dumps(content))

    return spoil


def _scale(one, values):
    one["datasets"][0]["coordinateTransformations"][0]["scale"] = values


MISTAKES = {
    "no axes": (spoilt(lambda one, all: one.pop("axes")), "`axes` None, but an array of 2 axes"),
    "too many axes": (spoilt(lambda one, all: one["axes"].append({"name": "z"})), "an array of 2 axes"),
    "an unknown axis": (spoilt(lambda one, all: one["axes"].__setitem__(0, {"name": "angle"})), 'an axis "angle"'),
    "an axis twice": (spoilt(lambda one, all: one["axes"].__setitem__(0, {"name": "x"})), "each once"),
    "no y": (spoilt(lambda one, all: one["axes"].__setitem__(0, {"name": "z"})), "without y and x"),
    "an axis that is a number": (spoilt(lambda one, all: one["axes"].__setitem__(0, 7)), "each once"),
    "no datasets": (spoilt(lambda one, all: one.pop("datasets")), "no `datasets`"),
    "a dataset without path": (spoilt(lambda one, all: one["datasets"][0].pop("path")), "without `path`"),
    "a missing level": (spoilt(lambda one, all: one["datasets"][0].update(path="s7")), 'the level "s7", which is not'),
    "a level elsewhere": (spoilt(lambda one, all: one["datasets"][0].update(path="../b.zarr/s0")), "which is not there"),
    "no pyramid": (spoilt(lambda one, all: all.update(multiscales={"a": 1})), "no `datasets`|no list"),
    "a scale of 0": (spoilt(lambda one, all: _scale(one, [0, 1])), "one number above 0"),
    "a scale too short": (spoilt(lambda one, all: _scale(one, [1])), "one number above 0"),
    "a scale of words": (spoilt(lambda one, all: _scale(one, ["a", "b"])), "one number above 0"),
    "broken metadata": (lambda path: (path / "s0" / ".zarray").write_text("{"), "cannot be read as Zarr"),
    "broken group": (lambda path: (path / ".zattrs").write_text("{"), "cannot be read as Zarr"),
    "a broken chunk": (lambda path: (path / "s0" / "1" / "1").write_bytes(b"none"), "cannot be read as Zarr"),
    "an unknown codec": (lambda path: (path / "s0" / ".zarray").write_text((path / "s0" / ".zarray").read_text().replace('"id": "', '"id": "un')), "cannot be read as Zarr"),
    "nothing in it": (lambda path: (shutil.rmtree(path), path.mkdir()), "there is no Zarr in this folder"),
    "not there": (shutil.rmtree, "there is no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_are_one_sentence(kind, teacher, picture, tmp_path, capsys):
    spoil, words = MISTAKES[kind]
    write(tmp_path / "b.zarr", [picture], "yx", 2)
    path = write(tmp_path / "a.zarr", [picture], "yx", 2)
    spoil(path)
    segment(teacher, tmp_path / "out", path, code=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert re.search(words, line)
    assert not list(tmp_path.rglob("out/*"))


def test_what_is_not_in_it(picture, tmp_path):
    path = write(tmp_path / "a.zarr", [picture, picture[::2, ::2]], "yx", 3)
    for inner in ("2", "s2", "labels", "../b"):
        with pytest.raises(DataError, match=f'no group, array or level "{inner}"'):
            open_zarr(f"{path}:{inner}")
    zarr.create_group(str(tmp_path / "c.zarr"))
    with pytest.raises(DataError, match="there is no image in this group"):
        open_zarr(tmp_path / "c.zarr")


def test_without_the_package(picture, tmp_path):
    path = write(tmp_path / "a.zarr", [picture], "yx", 3)
    code = (
        "import sys; sys.modules['zarr'] = None\nfrom gdlib.cli.main import main\n"
        f"sys.exit(main(['segment', {str(path)!r}, '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'gdlib[zarr]'" in done.stderr
    assert not (tmp_path / "out").exists()


# --- Labels of their own -------------------------------------------------------------------------------


@FORMATS
def test_an_image_gives_a_label_in_the_same_place(
    zarr_format, teacher, model, picture, tmp_path, capsys
):
    path = write(tmp_path / "a.zarr", [picture, picture[::2, ::2]], "yx", zarr_format, start=3.0)
    before = files(path)
    segment(teacher, tmp_path / "out", path, "--preview", "--table", tmp_path / "t.csv")
    wanted = model.segment(picture)
    assert f"{path}: {wanted.max()} objects" in capsys.readouterr().out
    label = open_zarr(tmp_path / "out" / "a.zarr")
    assert label.dtype == np.uint32
    assert np.array_equal(label, wanted)
    assert label.zarr_format == zarr_format
    image = open_zarr(path)
    assert (label.levels, label.axes) == (image.levels, image.axes)
    small = open_zarr(tmp_path / "out" / "a.zarr:1")
    assert np.array_equal(small, wanted[1::2, 1::2])  # the nearest of four
    assert "image-label" in metadata(tmp_path / "out" / "a.zarr")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.preview.png", "a.zarr"]
    assert files(path) == before
    rows = (tmp_path / "t.csv").read_text().splitlines()
    assert len(rows) == 1 + wanted.max()
    assert float(rows[1].rpartition(",")[2]) == (wanted == 1).sum() / 4  # pixels of 0.5 microns


@FORMATS
def test_a_level_gives_the_label_of_that_level(zarr_format, teacher, model, picture, tmp_path):
    path = write(tmp_path / "a.zarr", [np.kron(picture, np.ones((2, 2), np.uint8)), picture, picture[::2, ::2]], "yx", zarr_format)  # fmt: skip
    segment(teacher, tmp_path / "out", f"{path}:1")
    label = open_zarr(tmp_path / "out" / "a_1.zarr")
    assert np.array_equal(label, model.segment(picture))
    assert label.levels == open_zarr(path).levels[1:]


@FORMATS
@pytest.mark.parametrize("channel", ["2", "dapi"])
def test_a_channel_of_a_movie_frame_by_frame(
    zarr_format, channel, teacher, model, squares, tmp_path, capsys
):
    images = np.stack([squares(seed)[0][0] for seed in (50, 51)])
    stack = np.stack([np.zeros_like(images), images], axis=1)[:, :, None]  # TCZYX
    path = write(tmp_path / "movie.zarr", [stack], "tczyx", zarr_format, channels=["GFP", "DAPI"])
    segment(teacher, tmp_path / "out", path, "--channel", channel)
    wanted = model.segment(images, "TYX")
    label = open_zarr(tmp_path / "out" / "movie.zarr")
    assert label.letters == "TZYX"
    assert np.array_equal(label, wanted[:, None])
    assert label.levels[0].scale == (1.0, 2.0, 0.5, 0.5)
    assert "in 2 frames" in capsys.readouterr().out
    segment(teacher, tmp_path / "out", path, "--overwrite", code=1)
    assert "choose one channel with --channel" in capsys.readouterr().err


@FORMATS
def test_axes_that_are_not_named_and_sections(
    zarr_format, teacher, model, squares, tmp_path, capsys
):
    images = np.stack([squares(seed)[0][0] for seed in (50, 51)])
    zarr.create_array(str(tmp_path / "plain.zarr"), data=images.transpose(1, 2, 0), zarr_format=zarr_format)  # fmt: skip
    segment(teacher, tmp_path / "out", tmp_path / "plain.zarr", "--axes", "YXC", "--channel", 2)
    label = open_zarr(tmp_path / "out" / "plain.zarr")
    assert np.array_equal(label, model.segment(images[1]))
    assert (label.letters, label.microns) == ("YX", None)
    path = write(tmp_path / "z.zarr", [images], "zyx", zarr_format)
    segment(teacher, tmp_path / "out", path)
    assert "every section is segmented on its own" in capsys.readouterr().err
    assert np.array_equal(open_zarr(tmp_path / "out" / "z.zarr"), model.segment(images, "ZYX"))


@pytest.fixture
def small_blocks(monkeypatch, teacher):
    """Return `share(path, channel)`: blocks are small, and so is the memory, in GiB, that one piece
    of an image would not fit into."""
    monkeypatch.setattr(grid, "BLOCK", {2: (128, 128), 3: (8, 16, 16)})
    monkeypatch.setattr(grid, "OVERLAP", {2: (16, 16), 3: (4, 8, 8)})
    monkeypatch.setattr(memory, "resident", lambda: 0)
    predictor = Predictor.load(teacher, device="cpu", precision="float32", engine="torch")
    parameters = predictor.header["segmentation"]["mutex_watershed"]

    def share(shape):
        whole = choose(predictor, shape, "mutex_watershed", parameters, held=0, budget=2**60).whole
        return ["--memory", f"{0.999 * whole / memory.GIB:.12f}"]

    return share


@pytest.mark.parametrize(
    ("inside", "axes", "zarr_format"),
    [(False, "yx", 2), (False, "tczyx", 3), (True, "yx", 3), (True, "tczyx", 2)],
)
def test_in_blocks_no_more_than_a_block_is_read(inside, axes, zarr_format, teacher, squares, small_blocks, tmp_path, monkeypatch, capsys):  # fmt: skip
    image = squares(7, (240, 800))[0][0]
    stack = image if axes == "yx" else np.stack([np.zeros_like(image), image])[None, :, None]
    path = write(tmp_path / "large.zarr", [stack, stack[..., ::2, ::2]], axes, zarr_format)
    channel = [] if axes == "yx" else ["--channel", "2"]
    monkeypatch.setattr("gdlib.data.intensity.SLAB", 2**14)
    monkeypatch.setattr("gdlib.data.intensity.SAMPLE", 2**12)
    segment(teacher, tmp_path / "whole", path, *channel)
    capsys.readouterr()
    largest = []
    read = ZarrImage.__getitem__

    def watched(self, key):
        part = read(self, key)
        largest.append(part.size)
        return part

    monkeypatch.setattr(ZarrImage, "__getitem__", watched)
    out = f"{path}:labels/cells" if inside else tmp_path / "out"
    segment(teacher, out, path, *small_blocks(image.shape), *channel)
    assert "blocks of 128x128 pixels" in capsys.readouterr().err
    assert max(largest) < image.size / 2
    monkeypatch.undo()
    found = path / "labels" / "cells" if inside else tmp_path / "out" / "large.zarr"
    assert not list(found.parent.glob(".*.*"))
    label, whole = open_zarr(found), open_zarr(tmp_path / "whole" / "large.zarr")
    assert (label.shape, label.levels) == (whole.shape, whole.levels)
    label, whole = np.asarray(label).astype(int), np.asarray(whole)
    assert np.array_equal(np.unique(label), np.arange(label.max() + 1))
    assert label.max() > 1000
    assert matched(whole, label).mean() > 0.99
    assert np.array_equal(open_zarr(f"{found}/1"), label[..., 1::2, 1::2])


def test_a_volume_of_a_channel_is_read_in_parts(tmp_path):
    """Any order of axes, with one frame: as the network sees it, whatever part is read."""
    array = np.random.default_rng(0).integers(0, 200, (1, 2, 6, 20, 30)).astype(np.uint8)
    path = write(tmp_path / "a.zarr", [array.transpose(0, 1, 4, 3, 2)], "tcxyz", 3)
    with open_image(path, 3, 1, tmp_path, channel="2") as (image, attributes):
        frame = image[()]
        assert frame.shape == (1, 6, 20, 30)
        assert np.array_equal(frame, array[:1, 1])
        for key in (
            (0, slice(1, 3), slice(None), slice(4, 9)),
            (slice(None), 2),
            (0, slice(0, None, 2), 3, 4),
        ):
            assert np.array_equal(frame[key], array[:1, 1][key])
    assert attributes["element_size_um"] == (2.0, 0.5, 0.5)
    with open_image(path, 3, 2, tmp_path) as (image, _):
        assert np.array_equal(image[()], array[0])
        assert np.array_equal(image[()][1, 2:4], array[0, 1, 2:4])
    flat = write(tmp_path / "b.zarr", [array[0, :, 0]], "cyx", 3)
    with pytest.raises(DataError, match="axes CYX has no depth"), open_image(flat, 3, 1, tmp_path):
        pass


# --- Labels in their image, and what is there already ---------------------------------------------------


@FORMATS
@pytest.mark.parametrize("consolidated", [False, True])
def test_labels_in_their_image(consolidated, zarr_format, teacher, model, picture, tmp_path):
    path = write(tmp_path / "a.zarr", [picture, picture[::2, ::2]], "yx", zarr_format)
    write(path, [picture // 9], "yx", zarr_format, group="labels/mine")
    listed = zarr.open_group(store=str(path), path="labels", mode="a", zarr_format=zarr_format)
    listed.attrs.update({"labels": ["mine"]} if zarr_format == 2 else {"ome": {"version": "0.5", "labels": ["mine"]}})  # fmt: skip
    if consolidated:
        zarr.consolidate_metadata(str(path))
    content = {name: (path / name).read_bytes() for name in files(path)}
    segment(teacher, f"{path}:labels/cells", path, "--preview")
    wanted = model.segment(picture)
    label = open_zarr(f"{path}:labels/cells")
    assert np.array_equal(label, wanted)
    assert label.levels == open_zarr(path).levels
    assert metadata(path / "labels")["labels"] == ["mine", "cells"]
    assert metadata(path / "labels" / "cells")["image-label"]["source"] == {"image": "../../"}
    assert "labels/cells/0" in dict(zarr.open_group(str(path), mode="r").members(max_depth=None))
    for name, before in content.items():
        if name not in ("labels/.zattrs", "labels/zarr.json", ".zmetadata", "zarr.json"):
            assert (path / name).read_bytes() == before
    assert (tmp_path / "a.cells.preview.png").exists()
    main(
        [
            "evaluate",
            f"{path}:labels/cells",
            f"{path}/labels/cells/0",
            "--out",
            str(tmp_path / "s.csv"),
        ]
    )
    assert "mean" in (tmp_path / "s.csv").read_text()


@FORMATS
def test_labels_of_a_level_are_there_for_all_levels(zarr_format, teacher, model, picture, tmp_path):
    large = np.kron(picture, np.ones((2, 2), np.uint8))
    path = write(tmp_path / "a.zarr", [large, picture, picture[::2, ::2]], "yx", zarr_format)
    segment(teacher, path, f"{path}:1")
    label = open_zarr(path / "labels" / teacher.stem)
    assert label.levels == open_zarr(path).levels
    wanted = model.segment(picture)
    assert np.array_equal(label, np.kron(wanted, np.ones((2, 2), int)))
    assert np.array_equal(open_zarr(path / "labels" / teacher.stem / "1"), wanted)
    assert np.array_equal(open_zarr(path / "labels" / teacher.stem / "2"), wanted[1::2, 1::2])


@FORMATS
def test_nothing_of_the_user_is_replaced(zarr_format, teacher, picture, tmp_path, capsys):
    path = write(tmp_path / "a.zarr", [picture], "yx", zarr_format)
    other = write(tmp_path / "b.zarr", [picture[:20]], "yx", zarr_format)
    out = f"{path}:labels/cells"
    segment(teacher, out, path)
    segment(teacher, out, path)  # its own
    segment(teacher, tmp_path / "out", path)
    shutil.move(other, tmp_path / "c" / "a.zarr")
    other = tmp_path / "c" / "a.zarr"
    before = files(tmp_path)
    refused = {
        (tmp_path, path): "there is a folder of this name",  # the image itself
        (tmp_path, other): "there is a folder of this name",  # another image
        (tmp_path / "out", other): "is there already, and not from this command",
        (f"{path}:labels/cells", other): "put labels into their own image",
        (f"{path}:labels", path): "say --out",
        (f"{path}:cells", path): "say --out",
        (f"{path}:labels/a/b", path): "say --out",
    }
    for (place, image), words in refused.items():
        capsys.readouterr()
        segment(teacher, place, image, code=1)
        assert words in capsys.readouterr().err
        assert files(tmp_path) == before
    segment(teacher, tmp_path, other, "--overwrite", code=1)  # an image is never replaced
    assert np.array_equal(open_zarr(path), picture)
    segment(teacher, tmp_path / "out", other, "--overwrite")
    assert open_zarr(tmp_path / "out" / "a.zarr").shape == (20, picture.shape[1])
    tifffile.imwrite(tmp_path / "t.tif", picture)
    segment(teacher, f"{path}:labels/t", tmp_path / "t.tif", code=1)
    assert "is no OME-Zarr, cannot be put into one" in capsys.readouterr().err
    assert not (path / "labels" / "t").exists()


def test_no_label_is_half_written(teacher, picture, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.zarr", [picture, picture[::2, ::2]], "yx", 3)
    segment(teacher, tmp_path / "out", path)
    before = open_zarr(tmp_path / "out" / "a.zarr")[...]

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr_labels, "_resample", full)
    for place in (tmp_path / "out", tmp_path / "new", path):
        segment(teacher, place, path, code=1)
        assert "free some space and run the same command again" in capsys.readouterr().err
    assert np.array_equal(open_zarr(tmp_path / "out" / "a.zarr"), before)
    assert not files(tmp_path / "new")
    assert not files(path / "labels")
    # a killed process left this
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)  # fmt: skip
    left = io.beside(tmp_path / "out" / "a.zarr", f".{platform.node()}.{dead.stdout.strip()}.tmp")
    (left / "0").mkdir(parents=True)
    monkeypatch.undo()
    files_of_io._unfinished.cache_clear()  # a new process looks for what others left
    segment(teacher, tmp_path / "out", path)
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["a.zarr"]


def test_folders_and_evaluation(teacher, model, squares, tmp_path, capsys):
    for name, seed in (("a", 50), ("b", 51)):
        image, label = squares(seed)
        write(tmp_path / "images" / f"{name}.zarr", [image[0]], "yx", 3)
        write(tmp_path / "truth" / f"{name}.zarr", [label], "yx", 2)
    tifffile.imwrite(tmp_path / "images" / "c.tif", squares(52)[0][0])
    (tmp_path / "images" / "d.zarr").mkdir()
    segment(teacher, tmp_path / "out", tmp_path / "images", code=1)
    (line, *_) = (line for line in capsys.readouterr().err.splitlines() if "d.zarr" in line)
    assert "there is no Zarr in this folder" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.zarr",
        "b.zarr",
        "c.tif",
    ]
    assert np.array_equal(read_label(tmp_path / "truth" / "a.zarr"), squares(50)[1])
    assert main(["evaluate", str(tmp_path / "truth"), str(tmp_path / "out"), "--out", str(tmp_path / "s.csv")]) == 0  # fmt: skip
    mean = (tmp_path / "s.csv").read_text().splitlines()[-1]
    assert mean.startswith("mean,0.")


def test_folders_to_learn_from(squares, tmp_path):
    for k in range(10):
        image, label = squares(k)
        write(tmp_path / "images" / f"{k}.zarr", [image[0], image[0, ::2, ::2]], "yx", 3)
        write(tmp_path / "labels" / f"{k}.zarr", [label], "yx", 2)
    found = [sample for samples in folder(tmp_path).values() for sample in samples]
    assert sorted(sample.id for sample in found) == [str(k) for k in range(10)]
    for sample in found:
        image, label = squares(int(sample.id))
        assert np.array_equal(sample.image, image)
        assert np.array_equal(sample.label, label)
        assert sample.attrs["voxel_size_nm"] == [500.0, 500.0]


def test_another_resolution_to_learn_from(squares, tmp_path, monkeypatch, capsys):
    """By the source `folder`, and by `gdlib distill`, which says what it found."""
    for k in range(9):
        image, label = squares(k, shape=(128, 128))
        for part, array in (("images", image[0]), ("labels", label)):
            write(tmp_path / part / f"{k}.zarr", [array, array[::2, ::2]], "yx", 3)
    for samples in folder(tmp_path, level=1).values():
        for sample in samples:
            image, label = squares(int(sample.id), shape=(128, 128))
            assert np.array_equal(sample.image[0], image[0, ::2, ::2])
            assert np.array_equal(sample.label, label[::2, ::2])
            assert sample.attrs["voxel_size_nm"] == [1000.0, 1000.0]
            assert sample.attrs["source"] == f"images/{sample.id}.zarr"
    monkeypatch.chdir(tmp_path)
    assert main(["distill", "images", "labels", "--out", "own", "--level", "1", "--dry-run"]) == 0
    assert "found: 9 images of 64 x 64 pixels" in capsys.readouterr().out
    assert 'options: {"level": 1}' in (tmp_path / "own" / "config.yaml").read_text()
    with pytest.raises(DataError, match=r'level "5" in it'):
        list(folder(tmp_path, level=5)["train"])


def test_axes_of_a_volume_of_many_jobs(teacher, tmp_path):
    def wanted(axes, shape):
        path = write(tmp_path / f"{axes}{shape[1]}.zarr", [np.zeros(shape, np.uint8)], axes, 3)
        return grid.options({"input": str(path), "model": str(teacher), "out": str(tmp_path / "o")})

    assert wanted("tcyx", (1, 1, 40, 50))["grid"].shape == (40, 50)
    for axes, shape in (("tcyx", (1, 2, 40, 50)), ("tyx", (3, 40, 50)), ("xy", (50, 40))):
        with pytest.raises(DataError, match=f"its axes are {axes.upper()} .*gdlib segment"):
            wanted(axes, shape)


def test_a_network_that_knows_the_size_of_pixels(teacher, squares, tmp_path, capsys):
    state, header = io.load_weights(teacher)
    known = tmp_path / "known.safetensors"
    io.save_weights(known, state, header | {"pixel_size": [0.5, 0.5]})
    picture, large = squares(50)[0][0], np.kron(squares(50)[0][0], np.ones((2, 2), np.uint8))
    same = write(tmp_path / "same.zarr", [picture], "yx", 3, pixel=0.5)
    fine = write(tmp_path / "fine.zarr", [large], "yx", 3, pixel=0.25)
    segment(known, tmp_path / "out", same, fine)
    assert "its pixels are 0.25 x 0.25 microns" in capsys.readouterr().err
    one, two = (open_zarr(tmp_path / "out" / path.name) for path in (same, fine))
    assert two.shape == large.shape
    assert np.max(two) == pytest.approx(np.max(one), abs=2)
    assert two.microns == (0.25, 0.25)
