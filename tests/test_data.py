"""Preparing data: what is written, what is refused, and that a refusal leaves nothing behind."""

import os
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import label as components_of_one

from gdlib import io, trained
from gdlib.data.files import (
    open_volume,
    read_image,
    read_label,
    read_volume,
    split_components,
    voxel_size,
)
from gdlib.data.prepare import check_sample, prepare, provenance
from gdlib.data.scale import known_sizes
from gdlib.io import Sample
from gdlib.io.failures import DataError
from gdlib.registry import SOURCES, UnknownName

SIZE = (24, 32)
DEPTH = 7
RAW = Path(os.environ.get("GDLIB_RAW", Path(__file__).parents[1].parent / "shared" / "data"))


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


# What stands in the provenance of data that somebody published, or that gdlib makes.
LICENCES = {
    "ac34": ("ODC-By v1.0", "Kasthuri et al., Cell 162(3):648-661, 2015"),
    "bbbc039": ("CC0 1.0", "Caicedo et al., Cytometry A, 2019."),
    "celegans": ("CC BY 3.0", "Waehlby et al., Nat. Methods, 2012."),
    "cremi": ("licence unknown", "https://cremi.org, MICCAI challenge 2016"),
    "cvppp": ("academic use after registration", "Minervini et al., 2016."),
    "dsb2018": ("CC0 1.0", "Caicedo et al., Nat. Methods 16:1247, 2019."),
    "leaves_phantom": ("CC0 1.0", "made by gdlib"),
    "neurites_phantom": ("CC0 1.0", "made by gdlib"),
    "nuclei_phantom": ("CC0 1.0", "made by gdlib"),
    "worms_phantom": ("CC0 1.0", "made by gdlib"),
}


def test_every_source_has_a_provenance():
    assert set(SOURCES.names()) == {*LICENCES, "folder", "joined"}


@pytest.mark.parametrize("name", LICENCES)
def test_provenance_names_licence_and_origin_and_is_whole(name):
    text = provenance(name)
    for words in LICENCES[name]:
        assert words in text
    assert text.endswith(".")
    assert not re.search(r" (?:al|Nat|Proc)\.$", text), "it ends within a citation"


@pytest.mark.parametrize(
    ("network", "sources"),
    [
        ("nuclei", ["bbbc039", "dsb2018"]),
        ("worms", ["celegans"]),
        ("neurons", ["ac34"]),
        ("neurons_plain", ["ac34"]),
    ],
)
def test_provenance_is_in_the_networks_of_the_package(network, sources):
    about = io.read_header(trained.find(network))["data"]
    assert about == " ".join(map(provenance, sources))


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
    "no folder": (
        lambda r: (r / "images").rename(r / "pictures"),
        ["images", "no such folder", "check its name"],
    ),
    "no file": (
        lambda r: [p.unlink() for p in (r / "images").iterdir()],
        ["images", "no PNG, TIFF or HDF5", "put"],
    ),
    "unreadable": (
        lambda r: (r / "images/a02.tif").write_bytes(b"hello"),
        ["a02.tif", "cannot be read", "save it"],
    ),
    "truncated tiff": (
        lambda r: _truncate(r / "images/a02.tif"),
        ["a02.tif", "cannot be read", "save it"],
    ),
    "truncated png": (
        lambda r: _truncate(r / "labels/a02.png"),
        ["a02.png", "cannot be read", "save it"],
    ),
    "shapes": (
        lambda r: _write(r / "images/a02.tif", _image(2, shape=(24, 31))),
        ["a02.tif", "(24, 31)", "same shape"],
    ),
    "no label": (
        lambda r: (r / "labels/a02.png").unlink(),
        ["a02.tif", "no label", "add labels/a02"],
    ),
    "no image": (
        lambda r: (r / "images/a02.tif").unlink(),
        ["a02.png", "no image", "add images/a02"],
    ),
    "same stem": (
        lambda r: _write(r / "images/a02.png", _image(2)),
        ["a02.tif", "a02.png", "rename"],
    ),
    "float label": (
        lambda r: _label_tif(r, np.float32(_label()) / 2),
        ["a02", "float32", "probabilities", "store it as integers"],
    ),
    "negative label": (
        lambda r: _label_tif(r, _label().astype(np.int16) - 1),
        ["a02", "negative", "use 0"],
    ),
    "boolean label": (
        lambda r: _write(r / "labels/a02.png", _label() > 0),
        ["a02", "bool", "store it as integers"],
    ),
    "colour label": (
        lambda r: _write(r / "labels/a02.png", _rgb()),
        ["a02.png", "colour image", "store one integer"],
    ),
    "nan": (lambda r: _write(r / "images/a02.tif", _nan()), ["a02.tif", "NaN", "replace"]),
    "complex": (
        lambda r: _write(r / "images/a02.tif", _image(2, np.complex64)),
        ["a02.tif", "complex64", "store it"],
    ),
    "rgb tiff": (
        lambda r: _write(r / "images/a02.tif", _rgb()),
        ["a02.tif", "3 channels", "says 1", "convert"],
    ),
    "rgb png": (
        lambda r: _png(r / "images/a02.png", _rgb()),
        ["a02.png", "3 channels", "says 1", "convert"],
    ),
    "small": (
        lambda r: _small(r),
        ["a02.tif", "(12, 32)", "smaller than the patch (16, 16)", "smaller patch"],
    ),
    "volume": (lambda r: _volume(r), ["a02.tif", "3 axes", "dataset 2", "convert"]),
    "few": (
        lambda r: [p.unlink() for p in r.glob("*/a0[2-9].*")],
        ["2 images", "at least one each", "add images"],
    ),
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
    with pytest.raises(DataError, match="`folder` of the dataset, or --root"):
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
        # the alpha channel is dropped
        _write(tmp_path / f"rgb/images/a{i}.png", _image(i, shape=(*SIZE, 4)))
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
    [
        ("u1", "u1"),
        ("u2", "u2"),
        (">u2", "u2"),
        ("i2", "f4"),
        ("u4", "f4"),
        ("f2", "f4"),
        ("f4", "f4"),
        ("f8", "f4"),
    ],
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
    # one channel: a volume of two planes
    assert read_image(tmp_path / "first.tif").shape == (1, 2, *SIZE)


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


# --- volumes ---------------------------------------------------------------------------------------------------------


def _write_h5(path, array, dataset="main", **attrs):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "a") as file:
        file[dataset] = array
        file[dataset].attrs.update(attrs)


def _volume_of(i):
    return _image(i, shape=(DEPTH, *SIZE)), np.stack([_label()] * DEPTH)


@pytest.fixture
def raw3d(tmp_path):
    """Three good volumes, `v0` to `v2`; every file holds one array."""
    for i in range(3):
        image, label = _volume_of(i)
        _write_h5(tmp_path / f"raw/images/v{i}.h5", image, resolution=[30.0, 6.0, 6.0])
        _write_h5(tmp_path / f"raw/labels/v{i}.h5", label, "deep/inside")
    return tmp_path / "raw"


def _replace(raw, part, array, **attrs):
    (raw / f"{part}/v1.h5").unlink()
    _write_h5(raw / f"{part}/v1.h5", array, **attrs)


@pytest.mark.parametrize(("name", "expected"), [
    ("volume.h5:main", ("volume.h5", "main")),
    ("a.h5/b.HDF5:volumes/raw", ("a.h5/b.HDF5", "volumes/raw")),
    ("a/b.hdf", ("a/b.hdf", None)),
    ("a.h5:b.h5", ("a.h5", "b.h5")),
    ("a/b.tif", ("a/b.tif", None)),
    ("C:/a.h5:x", ("C:/a.h5", "x")),
])  # fmt: skip
def test_split_h5_path(name, expected):
    assert (
        io.split_h5_path(name) == io.split_h5_path(Path(name)) == (Path(expected[0]), expected[1])
    )


def test_volumes_in_hdf5(raw3d):
    outputs, summary = _prepare(raw3d, min_size=(4, 16, 16))
    samples = {s.id: s for path in outputs.values() for s in io.read_samples(path)}
    assert sorted(samples) == ["v0", "v1", "v2"]
    image, label = _volume_of(1)
    np.testing.assert_array_equal(samples["v1"].image, image[None])
    assert ((samples["v1"].label == 3) == (label == 300)).all()
    assert samples["v1"].attrs == {"source": "images/v1.h5", "voxel_size_nm": [30.0, 6.0, 6.0]}
    assert summary["val"]["axes"] == "CZYX"


def test_one_file_with_image_and_label(raw3d):
    """An option names the dataset; a TIFF beside it needs none.

    An option replaces the voxel size of the file.
    """
    image, label = _volume_of(1)
    for part in ("images", "labels"):
        (raw3d / f"{part}/v1.h5").unlink()
        for name, array in (("volumes/raw", image), ("volumes/labels/ids", label)):
            _write_h5(raw3d / f"{part}/v1.h5", array, name)
        for i in (0, 2):
            (raw3d / f"{part}/v{i}.h5").unlink()
            _write(raw3d / f"{part}/v{i}.tif", _volume_of(i)[part == "labels"])
    options = {
        "image_dataset": "volumes/raw",
        "label_dataset": "/volumes/labels/ids",
        "voxel_size_nm": [40, 4, 4],
    }
    outputs, _ = _prepare(raw3d, min_size=(4, 16, 16), **options)
    samples = {s.id: s for path in outputs.values() for s in io.read_samples(path)}
    np.testing.assert_array_equal(samples["v1"].image[0], image)
    np.testing.assert_array_equal(samples["v1"].label > 0, label > 0)
    assert all(s.attrs["voxel_size_nm"] == [40.0, 4.0, 4.0] for s in samples.values())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"ome": True, "metadata": {"axes": "YX", "PhysicalSizeX": 0.65, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.65, "PhysicalSizeYUnit": "µm"}}, [650.0, 650.0]),
        ({"imagej": True, "resolution": (2.0, 4.0), "metadata": {"unit": "micron"}}, [250.0, 500.0]),
        ({"imagej": True, "resolution": (2.0, 4.0), "metadata": {"unit": "pixel"}}, None),
        ({"resolution": (300, 300), "resolutionunit": 2}, None),
    ],
    ids=["OME", "ImageJ", "pixels", "a printer's"],
)  # fmt: skip
def test_the_pixel_size_of_a_tiff(options, wanted, raw):
    for path in (raw / "images").iterdir():
        path.unlink()
    for i in range(6):
        tifffile.imwrite(raw / f"images/a{i:02d}.tif", _image(i), **options)
    outputs, _ = _prepare(raw)
    for path in outputs.values():
        for sample in io.read_samples(path):
            assert sample.attrs.get("voxel_size_nm") == wanted


def test_a_level_of_files_that_have_none(raw):
    with pytest.raises(DataError, match="only OME-Zarr has a level 1; leave the level out"):
        _prepare(raw, level=1)


def test_sizes_that_training_images_say(tmp_path):
    """Against every object by itself, and where pixels are not the same everywhere."""
    rng = np.random.default_rng(0)
    labels = [np.kron(rng.integers(0, 5, (6, 6)), np.ones((k, k), int)) for k in (3, 4, 5)]
    wanted = []
    for label in labels:
        for number in np.unique(label)[1:]:
            wanted.append(2 * np.sqrt((label == number).sum() / np.pi))

    def known(*sizes):
        samples = [
            io.Sample(f"s{k}", np.zeros((1, *label.shape), np.uint8), label.astype(np.uint32), attrs={"voxel_size_nm": size} if size else {})
            for k, (label, size) in enumerate(zip(labels, sizes, strict=True))
        ]  # fmt: skip
        io.write_samples(tmp_path / "train.h5", samples)
        return known_sizes(tmp_path / "train.h5")

    same = known([500.0, 250.0], [510.0, 250.0], [500.0, 260.0])
    assert same["pixel_size"] == [0.5, 0.25]
    np.testing.assert_allclose(same["diameter"], np.percentile(wanted, (5, 50, 95)), atol=0.051)
    assert known([500.0, 250.0], [600.0, 250.0], [500.0, 250.0]).keys() == {"diameter"}
    assert known([500.0, 250.0], None, [500.0, 250.0]).keys() == {"diameter"}
    volume = io.Sample("v", np.zeros((1, 2, 8, 8), np.uint8), np.ones((2, 8, 8), np.uint32), attrs={"voxel_size_nm": [30, 6, 6]})  # fmt: skip
    io.write_samples(tmp_path / "train.h5", [volume])
    assert known_sizes(tmp_path / "train.h5") == {"pixel_size": [0.03, 0.006, 0.006]}


def test_readers_take_the_notation_of_the_command_line(raw3d):
    image, label = _volume_of(0)
    np.testing.assert_array_equal(read_volume(f"{raw3d}/images/v0.h5:main"), image)
    np.testing.assert_array_equal(read_volume(raw3d / "images/v0.h5"), image)
    np.testing.assert_array_equal(read_image(Path(f"{raw3d}/images/v0.h5:/main")), image[None])
    np.testing.assert_array_equal(read_label(f"{raw3d}/labels/v0.h5:deep/inside"), label)
    with h5py.File(raw3d / "images/v0.h5", "a") as file:
        file["a link"] = h5py.SoftLink("/main")
        file["number"] = 3
        file["text"] = "text"
    np.testing.assert_array_equal(read_volume(raw3d / "images/v0.h5", "a link"), image)
    colour = np.moveaxis(np.stack([image] * 3), 0, -1)
    _write_h5(raw3d / "images/rgb.h5", colour)
    assert read_image(raw3d / "images/rgb.h5", channels=3).shape == (3, DEPTH, *SIZE)


def _damage(path):
    """Spoil the compressed numbers of an array; the file opens, but reading it fails."""
    with h5py.File(path, "w") as file:
        item = file.create_dataset(
            "main", data=_volume_of(1)[0], chunks=(DEPTH, *SIZE), compression="gzip"
        )
        chunk = item.id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)


def _huge():
    return _volume_of(1)[1].astype(np.uint64) * (2**64 // 301)


BAD_VOLUMES = {
    "order of axes": (
        lambda r: _replace(r, "labels", np.moveaxis(_volume_of(1)[1], 0, -1)),
        [
            "v1.h5",
            "(7, 24, 32)",
            "(24, 32, 7)",
            "same axes in another order",
            "store both in the order z, y, x",
        ],
    ),
    "shapes": (
        lambda r: _replace(r, "labels", _volume_of(1)[1][:, 1:]),
        ["v1.h5", "(7, 24, 32)", "(7, 23, 32)", "give both the same shape"],
    ),
    "voxel sizes": (
        lambda r: _replace(r, "labels", _volume_of(1)[1], resolution=[40, 6, 6]),
        [
            "labels/v1.h5:main",
            "[40.0, 6.0, 6.0]",
            "images/v1.h5:main [30.0, 6.0, 6.0]",
            "correct one",
        ],
    ),
    "order of voxel size": (
        lambda r: _replace(r, "images", _volume_of(1)[0], resolution=[6, 6, 30]),
        ["images/v1.h5:main", "[6.0, 6.0, 30.0]", "look like the order x, y, z", "store"],
    ),
    "voxel size": (
        lambda r: _replace(r, "images", _volume_of(1)[0], resolution=[30, 0, 6]),
        ["images/v1.h5:main", "`resolution` is [30  0  6]", "one positive number per axis"],
    ),
    "voxel size of an image": (
        lambda r: _replace(r, "images", _volume_of(1)[0], resolution=[6, 6]),
        ["v1.h5", "the voxel size [6.0, 6.0] has 2 numbers", "one for each of 3 axes"],
    ),
    "several": (
        lambda r: _write_h5(r / "images/v1.h5", _image(1), "other"),
        ["v1.h5", "not clear which dataset", "main (7, 24, 32), other (24, 32)", "name one"],
    ),
    "no array": (
        lambda r: _replace(r, "images", 3),
        ["v1.h5", "not clear which dataset", "inside is no array"],
    ),
    "truncated": (
        lambda r: _truncate(r / "images/v1.h5"),
        ["images/v1.h5", "not a readable HDF5 file", "truncated", "save it again"],
    ),
    "damaged": (
        lambda r: _damage(r / "images/v1.h5"),
        ["images/v1.h5", "cannot be read as HDF5", "save it again"],
    ),
    "not HDF5": (
        lambda r: (r / "labels/v1.h5").write_text("hello"),
        ["labels/v1.h5", "not a readable HDF5 file"],
    ),
    "constant": (
        lambda r: _replace(r, "images", np.full((DEPTH, *SIZE), 7, np.uint8)),
        ["v1.h5", "all voxels of the image are 7", "export"],
    ),
    "small": (
        lambda r: [
            _replace(r, part, _volume_of(1)[k][:3]) for k, part in enumerate(("images", "labels"))
        ],
        ["v1.h5", "(3, 24, 32)", "smaller than the patch (4, 16, 16)", "smaller patch"],
    ),
    "negative": (
        lambda r: _replace(r, "labels", _volume_of(1)[1].astype(np.int64) - 1),
        ["v1.h5", "negative", "use 0 for background"],
    ),
    "float": (
        lambda r: _replace(r, "labels", _volume_of(1)[1] / 2),
        ["v1.h5", "float64", "store it as integers"],
    ),
    "flat": (
        lambda r: [
            _replace(r, part, _volume_of(1)[k][0]) for k, part in enumerate(("images", "labels"))
        ],
        ["v1.h5", "2 axes", "dataset 3", "convert"],
    ),
}


@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_a_bad_volume_is_one_sentence_and_no_file(raw3d, name):
    spoil, said = BAD_VOLUMES[name]
    spoil(raw3d)
    with pytest.raises(DataError) as error:
        _prepare(raw3d, min_size=(4, 16, 16))
    message = str(error.value)
    assert all(part in message for part in said), message
    assert "\n" not in message
    assert not list(raw3d.parent.glob("out/*"))
    assert not list(raw3d.parent.glob("out/.*"))


def test_a_dataset_that_is_not_there(raw3d):
    with pytest.raises(
        DataError,
        match=r'v0.h5: there is no dataset "raw", inside is main \(7, 24, 32\); correct '
        r"the name",
    ):
        read_volume(raw3d / "images/v0.h5", "raw")
    # a group
    with pytest.raises(DataError, match='there is no dataset "deep", inside is deep/inside'):
        read_volume(raw3d / "labels/v0.h5", "deep")
    with pytest.raises(DataError, match="the file is missing"):
        read_volume(raw3d / "images/none.h5:main")


def test_huge_ids(raw3d):
    _replace(raw3d, "labels", _huge())
    assert _huge().max() > 2**63
    outputs, _ = _prepare(raw3d, min_size=(4, 16, 16))
    stored = {s.id: s.label for path in outputs.values() for s in io.read_samples(path)}
    np.testing.assert_array_equal(stored["v0"], stored["v1"])


@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "u4", "u8", "i1", "i2", "i4", "i8"])
def test_split_components_is_the_components_of_each_id(dtype):
    label = np.random.default_rng(0).integers(0, 4, (6, 7, 8))
    if dtype == "u8":
        label = label.astype(dtype) * 2**62
    label = label.astype(dtype)
    split = split_components(label)
    assert split.dtype == np.uint32
    count = 0
    for number in np.unique(label[label > 0]):
        regions, k = components_of_one(label == number)  # faces only, as in 6-connected
        count += k
        for region in range(1, k + 1):
            inside = split[regions == region]
            assert (inside == inside[0]).all()
            assert (split == inside[0]).sum() == inside.size
    assert sorted(np.unique(split[split > 0])) == list(range(1, count + 1))
    assert ((split == 0) == (label == 0)).all()


def test_constant_images_are_accepted_without_objects_only():
    flat = np.full((1, *SIZE), 7, np.uint8)
    assert check_sample(Sample("a", flat, np.zeros(SIZE, np.uint8)), 1, SIZE).image.max() == 7
    with pytest.raises(
        DataError, match="a: all pixels of the image are 7, but its label has 3 objects; export"
    ):
        check_sample(Sample("a", flat, _label()), 1, SIZE)


def test_what_to_ignore(tmp_path, capsys, monkeypatch):
    image, label = _volume_of(0)

    def check(ignore):
        return check_sample(Sample("a", image[None], label, ignore=ignore), 1, (4, 16, 16))

    assert check(np.zeros(label.shape, bool)).ignore is None
    np.testing.assert_array_equal(check(label == 2).ignore, label == 2)
    with pytest.raises(
        DataError,
        match=r"\(7, 24, 31\) of type bool; it must be boolean and of the label's shape "
        r"\(7, 24, 32\)",
    ):
        check((label == 2)[..., 1:])
    with pytest.raises(DataError, match="of type uint8; it must be boolean"):
        check((label == 2).astype(np.uint8))
    with pytest.raises(DataError, match="every pixel is to be ignored"):
        check(np.ones(label.shape, bool))

    (tmp_path / "other.py").write_text(
        "import numpy as np\nfrom gdlib.io import Sample\n"
        "def read(root, *, ignored=0):\n"
        "    def one(name):\n"
        "        label = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)\n"
        "        yield Sample(name, label[None] + len(name), label, ignore=label < ignored)\n"
        "    return {split: one(split) for split in ('train', 'val', 'test')}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    hashes = set()
    for ignored in (0, 7, 8):
        outputs, summary = _prepare(
            tmp_path / "raw", min_size=(2, 2, 2), source="other:read", ignored=ignored
        )
        assert summary["val"]["ignored"] == io.read_attrs(outputs["val"])["ignored"] == ignored
        assert (", 7 ignored voxels" in capsys.readouterr().out) == (ignored == 7)
        stored = next(io.read_samples(outputs["val"])).ignore
        assert stored.sum() == ignored if ignored else stored is None
        hashes.add(summary["val"]["sha256"])
    assert len(hashes) == 3


@pytest.mark.skipif(
    not (RAW / "plantseg_ovules").is_dir(),
    reason="no raw data in plantseg_ovules; set GDLIB_RAW to their folder",
)
def test_real_hdf5_of_two_arrays():
    path = RAW / "plantseg_ovules/sample_ovule.h5"
    with pytest.raises(
        DataError, match=r"inside is label \(32, 128, 128\), raw \(32, 128, 128\); " r"name one"
    ):
        read_image(path)
    with open_volume(path, "raw") as image, open_volume(path, "label") as label:
        assert voxel_size(image, label) == [235.0, 150.0, 150.0]
    assert len(np.unique(read_label(path, "label"))) == 51  # as its description says
