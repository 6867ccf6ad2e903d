"""Preparing data: what is written, what is refused, and that a refusal leaves nothing behind."""

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from gdlib import io
from gdlib.data.files import read_image, read_label
from gdlib.data.prepare import check_sample, prepare
from gdlib.io import DataError, Sample
from gdlib.registry import UnknownName

SIZE = (24, 32)


def _write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(array).save(path)
    else:
        tifffile.imwrite(path, array)


def _image(i, dtype=np.uint8, shape=SIZE):
    return np.random.default_rng(i).integers(0, 200, shape).astype(dtype)


def _label():
    label = np.zeros(SIZE, np.uint16)
    label[2:8, 3:9], label[10:20, 12:20], label[8:12, 3:9] = 7, 300, 2
    return label


@pytest.fixture
def raw(tmp_path):
    """Six good images and labels, `a00` to `a05`."""
    for i in range(6):
        _write(tmp_path / f"raw/images/a{i:02d}.tif", _image(i))
        _write(tmp_path / f"raw/labels/a{i:02d}.png", _label())
    return tmp_path / "raw"


def _prepare(raw, channels=1, min_size=(16, 16), source="folder", **options):
    outputs = {split: raw.parent / "out" / f"{split}.h5" for split in ("train", "val", "test")}
    return outputs, prepare(source, options, raw, outputs, min_size, channels)


def test_good_folder(raw, capsys):
    _write(raw / "labels/a03.png", np.zeros(SIZE, np.uint8))
    outputs, summary = _prepare(raw)
    samples = {s.id: s for path in outputs.values() for s in io.read_samples(path)}
    assert sorted(samples) == [f"a{i:02d}" for i in range(6)]
    assert samples["a01"].image.dtype == np.uint8
    assert samples["a01"].image.shape == (1, *SIZE)
    np.testing.assert_array_equal(samples["a01"].image[0], _image(1))
    label = samples["a01"].label
    assert label.dtype == np.uint32
    assert np.unique(label).tolist() == [0, 1, 2, 3]
    assert ((label == 3) == (_label() == 300)).all()
    assert samples["a01"].attrs["source"] == "images/a01.tif"
    assert sum(s["samples"] for s in summary.values()) == 6
    assert sum(s["empty_labels"] for s in summary.values()) == 1
    assert sum(s["instances"] for s in summary.values()) == 15
    attrs = io.read_attrs(outputs["train"])
    assert attrs == summary["train"]
    assert attrs["axes"] == "CYX"
    assert attrs["channels"] == 1
    assert attrs["provenance"].startswith("Own data")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_equal_input_gives_equal_bytes_and_other_content_another_hash(raw):
    outputs, first = _prepare(raw)
    before = {split: path.read_bytes() for split, path in outputs.items()}
    _prepare(raw)
    assert before == {split: path.read_bytes() for split, path in outputs.items()}
    for i in range(6):
        _write(raw / f"images/a{i:02d}.tif", _image(i + 100))
    _, second = _prepare(raw)
    assert all(first[split]["sha256"] != second[split]["sha256"] for split in outputs)


def test_nothing_is_left_behind_even_of_older_files(raw):
    outputs, _ = _prepare(raw)
    (raw / "images/a02.tif").write_bytes(b"no image")
    with pytest.raises(DataError):
        _prepare(raw)
    assert list(outputs["train"].parent.iterdir()) == []


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _nan():
    image = _image(2, np.float32)
    image[3, 4] = np.nan
    return image


def _png(path, array):
    path.with_suffix(".tif").unlink()
    _write(path, array)


BAD = {
    "no folder": (lambda r: (r / "images").rename(r / "pictures"), ["images", "no such folder", "check the path"]),
    "no file": (lambda r: [p.unlink() for p in (r / "images").iterdir()], ["images", "no PNG or TIFF", "put"]),
    "unreadable": (lambda r: (r / "images/a02.tif").write_bytes(b"hello"), ["a02.tif", "cannot be read", "save it"]),
    "truncated tiff": (lambda r: _truncate(r / "images/a02.tif"), ["a02.tif", "cannot be read", "save it"]),
    "truncated png": (lambda r: _truncate(r / "labels/a02.png"), ["a02.png", "cannot be read", "save it"]),
    "shapes": (
        lambda r: _write(r / "images/a02.tif", _image(2, shape=(24, 31))),
        ["a02.tif", "(24, 31)", "same shape"],
    ),
    "no label": (lambda r: (r / "labels/a02.png").unlink(), ["a02.tif", "no label", "add labels/a02"]),
    "no image": (lambda r: (r / "images/a02.tif").unlink(), ["a02.png", "no image", "add images/a02"]),
    "same stem": (lambda r: _write(r / "images/a02.png", _image(2)), ["a02.tif", "a02.png", "rename"]),
    "float label": (lambda r: _label_tif(r, _label().astype(np.float32)), ["a02", "float32", "store it as integers"]),
    "negative label": (lambda r: _label_tif(r, _label().astype(np.int16) - 1), ["a02", "negative", "use 0"]),
    "boolean label": (lambda r: _write(r / "labels/a02.png", _label() > 0), ["a02", "bool", "store it as integers"]),
    "colour label": (lambda r: _write(r / "labels/a02.png", _rgb()), ["a02.png", "colour image", "store one integer"]),
    "nan": (lambda r: _write(r / "images/a02.tif", _nan()), ["a02.tif", "NaN", "replace"]),
    "complex": (lambda r: _write(r / "images/a02.tif", _image(2, np.complex64)), ["a02.tif", "complex64", "store it"]),
    "rgb tiff": (lambda r: _write(r / "images/a02.tif", _rgb()), ["a02.tif", "3 channels", "says 1", "convert"]),
    "rgb png": (lambda r: _png(r / "images/a02.png", _rgb()), ["a02.png", "3 channels", "says 1", "convert"]),
    "small": (lambda r: _small(r), ["a02.tif", "(12, 32)", "smaller than the patch (16, 16)", "smaller patch"]),
    "volume": (lambda r: _volume(r), ["a02.tif", "3 axes", "dataset 2", "convert"]),
    "few": (lambda r: [p.unlink() for p in r.glob("*/a0[2-9].*")], ["2 images", "at least one each", "add images"]),
}


def _rgb():
    return _image(2, shape=(*SIZE, 3))


def _label_tif(raw, label):
    (raw / "labels/a02.png").unlink()
    tifffile.imwrite(raw / "labels/a02.tif", label)


def _small(raw):
    _write(raw / "images/a02.tif", _image(2)[:12])
    _write(raw / "labels/a02.png", _label()[:12])


def _volume(raw):
    (raw / "labels/a02.png").unlink()
    _write(raw / "images/a02.tif", _image(2, shape=(5, *SIZE)))
    _write(raw / "labels/a02.tif", np.stack([_label()] * 5))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_no_file(raw, name):
    spoil, said = BAD[name]
    spoil(raw)
    with pytest.raises(DataError) as error:
        _prepare(raw)
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message
    assert not list(raw.parent.glob("out/*"))
    assert not list(raw.parent.glob("out/.*"))


def test_grey_where_colour_is_expected(raw):
    with pytest.raises(DataError, match=r"has 1 channels, but the dataset says 3; convert"):
        _prepare(raw, channels=3)


def test_no_root_and_wrong_names(raw, tmp_path):
    outputs = {split: tmp_path / f"{split}.h5" for split in ("train", "val", "test")}
    with pytest.raises(DataError, match="set `root`"):
        prepare("folder", {}, None, outputs, (16, 16), 1)
    with pytest.raises(UnknownName, match='did you mean "val_fraction"'):
        prepare("folder", {"val_fractoin": 0.1}, raw, outputs, (16, 16), 1)
    with pytest.raises(DataError, match="one file each"):
        prepare("folder", {}, raw, {"train": tmp_path / "train.h5"}, (16, 16), 1)


def test_8_and_16_bit_may_be_mixed_and_are_counted(raw):
    for i in (0, 1, 2):
        _write(raw / f"images/a{i:02d}.tif", _image(i, np.uint16))
    outputs, summary = _prepare(raw)
    types = [s.image.dtype for path in outputs.values() for s in io.read_samples(path)]
    assert types.count(np.uint8) == types.count(np.uint16) == 3
    assert "uint16: " in " ".join(s["types"] for s in summary.values())


def test_colour_and_volumes_are_accepted_where_expected(tmp_path):
    for i in range(3):
        _write(tmp_path / f"rgb/images/a{i}.png", _image(i, shape=(*SIZE, 4)))  # the alpha channel is dropped
        _write(tmp_path / f"rgb/labels/a{i}.png", _label())
        _write(tmp_path / f"volume/images/a{i}.tif", _image(i, shape=(5, *SIZE)))
        _write(tmp_path / f"volume/labels/a{i}.tif", np.stack([_label()] * 5))
    outputs, summary = _prepare(tmp_path / "rgb", channels=3)
    assert next(io.read_samples(outputs["val"])).image.shape == (3, *SIZE)
    outputs, summary = _prepare(tmp_path / "volume", min_size=(4, 16, 16))
    assert next(io.read_samples(outputs["val"])).image.shape == (1, 5, *SIZE)
    assert summary["val"]["axes"] == "CZYX"


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("u1", "u1"), ("u2", "u2"), (">u2", "u2"), ("i2", "f4"), ("u4", "f4"), ("f2", "f4"), ("f4", "f4"), ("f8", "f4")],
)
def test_image_types(dtype, stored):
    sample = check_sample(Sample("a", _image(0, dtype)[None], _label().astype(">i8")), 1, SIZE)
    assert sample.image.dtype == np.dtype(stored)
    assert sample.label.dtype == np.uint32
    np.testing.assert_array_equal(sample.image[0], _image(0))


@pytest.mark.parametrize("value", [np.inf, 1e300])
def test_infinite_pixels(value):
    with pytest.raises(DataError, match="infinite"):
        check_sample(Sample("a", np.full((1, *SIZE), value), _label()), 1, SIZE)


def test_channel_axis_of_tiff(tmp_path):
    """Channels are found by the name of their axis, or by their number where axes have no names."""
    image = _image(0, np.uint16, (2, *SIZE))
    tifffile.imwrite(tmp_path / "named.tif", image, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "first.tif", image, photometric="minisblack")
    tifffile.imwrite(tmp_path / "last.tif", np.moveaxis(image, 0, -1), photometric="minisblack")
    tifffile.imwrite(tmp_path / "big_endian.tif", image, photometric="minisblack", byteorder=">")
    for name in ("named", "first", "last", "big_endian"):
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.tif", channels=2), image)
    assert read_image(tmp_path / "first.tif").shape == (1, 2, *SIZE)  # one channel: a volume of two planes


def test_png_kinds(tmp_path):
    indexed = Image.fromarray(_label().astype(np.uint8), mode="P")
    indexed.putpalette(bytes(range(256)) * 3)
    indexed.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_label(tmp_path / "palette.png"), _label().astype(np.uint8))
    assert read_image(tmp_path / "palette.png").shape == (3, *SIZE)
    wide = _image(0, np.uint16) * 300
    _write(tmp_path / "wide.png", wide)
    np.testing.assert_array_equal(read_image(tmp_path / "wide.png")[0], wide)
    png = bytearray((tmp_path / "wide.png").read_bytes())
    png[25] = 2  # colour type: RGB
    (tmp_path / "colour.png").write_bytes(png)
    with pytest.raises(DataError, match="save it as TIFF"):
        read_image(tmp_path / "colour.png")


def test_one_name_in_two_splits_is_refused(raw):
    for split, names in {"train": "a00\na01", "val": "a02.tif", "test": "a01"}.items():
        (raw / f"{split}.txt").write_text(names)
    with pytest.raises(DataError, match='"a01" is in split train and again in test'):
        _prepare(raw)


def test_empty_split_is_refused(raw):
    for split, names in {"train": "a00\na01", "val": "\n", "test": "a02"}.items():
        (raw / f"{split}.txt").write_text(names)
    with pytest.raises(DataError, match='split "val" has no image'):
        _prepare(raw)


def test_files_are_plain_hdf5(raw):
    outputs, _ = _prepare(raw)
    with h5py.File(outputs["train"]) as file:
        assert all(set(group) == {"image", "label"} for group in file.values())
