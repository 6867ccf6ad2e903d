"""Image and label files as people have them: the right array, or one sentence that names file,
cause and a mend."""

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from gdlib.blockwise.blocks import Source
from gdlib.cli.main import main
from gdlib.data import decoders
from gdlib.data.axes import fitted, without_single_axes
from gdlib.data.calibration import calibration, written
from gdlib.data.files import expanded, find_files, open_volume, read_image, read_label
from gdlib.data.intensity import rescale
from gdlib.data.prepare import check_sample
from gdlib.io import Sample
from gdlib.io.failures import DataError

SIZE = (24, 32)
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 200, SIZE).astype(np.uint8)
WIDE = RNG.integers(0, 60000, SIZE).astype(np.uint16)
STACK = RNG.integers(0, 200, (5, *SIZE)).astype(np.uint8)
COLOUR = RNG.integers(0, 200, (*SIZE, 3)).astype(np.uint8)
LABEL = np.zeros(SIZE, np.uint16)
LABEL[2:8, 3:9], LABEL[10:20, 12:20] = 7, 300
FLAT = Image.fromarray(COLOUR // 100 * 100)  # few colours, as a palette has


def tiff(array, **options):
    """Return a function that writes a TIFF."""
    return lambda path: tifffile.imwrite(path, array, **{"photometric": "minisblack"} | options)


def pillow(array, **options):
    """Return a function that writes by Pillow, whose libtiff compresses in ways that tifffile alone
    does not."""
    first, *others = [Image.fromarray(a) for a in (array if isinstance(array, list) else [array])]
    return lambda path: first.save(path, append_images=others, save_all=bool(others), **options)


def several(*arrays, **options):
    """Return a function that writes images one after the other into one TIFF."""

    def write(path):
        with tifffile.TiffWriter(path) as file:
            for array in arrays:
                file.write(array, **{"photometric": "minisblack"} | options)

    return write


def cut(write, keep):
    """Return a function that writes a file and cuts off its end."""

    def write_and_cut(path):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return write_and_cut


def pyramid(path):
    with tifffile.TiffWriter(path, ome=path.name.endswith(".ome.tif")) as file:
        options = {"photometric": "minisblack", "tile": (16, 16)}
        file.write(STACK, subifds=1, metadata={"axes": "ZYX"}, **options)
        file.write(STACK[:, ::2, ::2], subfiletype=1, **options)


def spread(path, planes, *, pages, own=0, images=1, name=None, uuid=True):
    """Write one of several files of an OME-TIFF: `planes` in all, and in each file so many `pages`
    one after the other.

    Args:
        path: of the file, which is the one of number `own`; beside it is another one of no use.
        planes: of each image.
        pages: that are in a file.
        own: number of this file.
        images: how many have so many planes.
        name: of this file as the text has it.
        uuid: does the file say which it is?
    """
    blocks, k = [], 0
    for image in range(images):
        lines = []
        for z in range(planes):
            file = f"other{k // pages}.tif" if k // pages != own else name or path.name
            lines.append(
                f'<TiffData FirstZ="{z}" IFD="{k % pages}" PlaneCount="1"><UUID '
                f'FileName="{file}">urn:uuid:{k // pages}</UUID>'
                "</TiffData>"
            )
            k += 1
        blocks.append(
            f'<Image ID="Image:{image}"><Pixels DimensionOrder="XYZCT" Type="uint8" '
            f'SizeX="{SIZE[1]}" SizeY="{SIZE[0]}" SizeZ="{planes}" SizeC="1" SizeT="1"><Channel '
            f'SamplesPerPixel="1"/>{"".join(lines)}</Pixels></Image>'
        )
    own_uuid = f'UUID="urn:uuid:{own}" ' * uuid
    text = f'<OME {own_uuid}xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{"".join(blocks)}</OME>'
    tifffile.imwrite(path, STACK[:pages], photometric="minisblack", description=text, metadata=None)
    tifffile.imwrite(
        path.with_name(f"other{own + 1}.tif"),
        np.zeros_like(STACK[:pages]),
        photometric="minisblack",
    )


def binary_only(pages):
    text = '<OME xmlns="x"><BinaryOnly MetadataFile="all.companion.ome" UUID="urn:uuid:1"/></OME>'
    return tiff(STACK[:pages], description=text, metadata=None)


def palette(kind):
    """Return a function that writes an image of few colours as PNG or TIFF with a palette."""
    return lambda path: FLAT.convert("P", palette=Image.Palette.ADAPTIVE).save(path, kind)


# Name of the file, how it is made, channels expected, and the image read from it: (C, [Z,] Y, X).
IMAGES = {
    "plain": ("a.tif", tiff(GREY), 1, GREY[None]),
    "ending": ("a.TIFF", tiff(GREY), 1, GREY[None]),
    "dots": ("a.b.1.ome.tif", tiff(GREY), 1, GREY[None]),
    "big-endian": ("a.tif", tiff(WIDE, byteorder=">"), 1, WIDE[None]),
    "BigTIFF": ("a.tif", tiff(WIDE, bigtiff=True), 1, WIDE[None]),
    "tiled": ("a.tif", tiff(STACK, tile=(16, 16), compression="zlib"), 1, STACK[None]),
    "zlib, predictor": ("a.tif", pillow(WIDE, compression="tiff_adobe_deflate", tiffinfo={317: 2}), 1, WIDE[None]),
    "LZW": ("a.tif", pillow(GREY, compression="tiff_lzw"), 1, GREY[None]),
    "LZW, 16 bit": ("a.tif", pillow(WIDE, compression="tiff_lzw"), 1, WIDE[None]),
    "LZW, float": ("a.tif", pillow(np.float32(GREY) / 7, compression="tiff_lzw"), 1, np.float32(GREY)[None] / 7),
    "LZW, predictor": ("a.tif", pillow(COLOUR, compression="tiff_lzw", tiffinfo={317: 2}), 3, np.moveaxis(COLOUR, -1, 0)),
    "LZW, pages": ("a.tif", pillow(list(STACK), compression="tiff_lzw"), 1, STACK[None]),
    "zstd": ("a.tif", pillow(WIDE, compression="zstd"), 1, WIDE[None]),
    "CCITT": ("a.tif", pillow(GREY > 99, compression="group4"), 1, GREY[None] > 99),
    "CCITT 3": ("a.tif", pillow(GREY > 99, compression="group3"), 1, GREY[None] > 99),
    "CCITT RLE": ("a.tif", pillow(GREY > 99, compression="tiff_ccitt"), 1, GREY[None] > 99),
    "WhiteIsZero": ("a.tif", tiff(255 - GREY, photometric="miniswhite"), 1, GREY[None]),
    "WhiteIsZero, 16 bit": ("a.tif", tiff(65535 - WIDE, photometric="miniswhite"), 1, WIDE[None]),
    "WhiteIsZero, signed": ("a.tif", tiff(np.int16([[5, -6]]), photometric="miniswhite"), 1, np.int16([[[-6, 5]]])),
    "WhiteIsZero, float": ("a.tif", tiff(np.float32(GREY), photometric="miniswhite"), 1, -np.float32(GREY)[None]),
    "WhiteIsZero, 1 bit": ("a.tif", lambda path: retagged(path, GREY > 99, 262, 0), 1, GREY[None] <= 99),
    "bits by tifffile": ("a.tif", tiff(GREY > 99, photometric=None), 1, GREY[None] > 99),
    "palette TIFF": ("a.tif", palette("TIFF"), 3, np.moveaxis(np.asarray(FLAT), -1, 0) * np.uint16(256)),
    "palette PNG": ("a.png", palette("PNG"), 3, np.moveaxis(np.asarray(FLAT), -1, 0)),
    "grey palette": ("a.png", pillow(GREY, bits=8), 1, GREY[None]),
    "palette of ImageJ": (
        "a.tif",
        tiff(GREY, imagej=True, colormap=np.uint16(RNG.integers(0, 65535, (3, 256))), photometric="palette"),
        1,
        GREY[None],
    ),
    "grey as RGB": ("a.tif", tiff(np.repeat(GREY[..., None], 3, 2), photometric="rgb"), 1, GREY[None]),
    "grey as RGB planes": ("a.tif", tiff(np.stack([GREY] * 3), photometric="rgb", planarconfig="separate"), 1, GREY[None]),
    "grey as RGBA PNG": ("a.png", pillow(np.stack([GREY] * 3 + [GREY.T.reshape(SIZE)], -1)), 1, GREY[None]),
    "RGB stays RGB": ("a.png", pillow(np.repeat(GREY[..., None], 3, 2)), 3, np.stack([GREY] * 3)),
    "RGBA": ("a.tif", pillow(np.dstack([COLOUR, GREY])), 3, np.moveaxis(COLOUR, -1, 0)),
    "grey and opacity": ("a.png", pillow(np.dstack([GREY, GREY // 2])), 1, GREY[None]),
    "four channels": ("a.tif", pillow(np.dstack([COLOUR, GREY])), 4, np.moveaxis(np.dstack([COLOUR, GREY]), -1, 0)),
    "1 bit PNG": ("a.png", pillow(GREY > 99), 1, GREY[None] > 99),
    "float16": ("a.tif", tiff(np.float16(GREY)), 1, np.float16(GREY)[None]),
    "pyramid": ("a.tif", pyramid, 1, STACK[None]),
    "OME pyramid": ("a.ome.tif", pyramid, 1, STACK[None]),
    "thumbnail that says so": ("a.tif", lambda path: thumbnail(path, subfiletype=1), 1, GREY[None]),
    "OME, single plane": ("a.tif", lambda path: spread(path, 3, pages=1), 1, STACK[None, 0]),
    "OME, one of the positions": ("a.tif", lambda path: spread(path, 3, pages=3, images=2), 1, STACK[None, :3]),
    "OME, renamed": ("a.tif", lambda path: spread(path, 3, pages=3, name="was.tif", uuid=False), 1, STACK[None, :3]),
    "OME, single plane, renamed": ("a.tif", lambda path: spread(path, 3, pages=1, name="b.tif", uuid=False), 1, STACK[None, 0]),
    "OME, text elsewhere": ("a.tif", binary_only(1), 1, STACK[None, 0]),
    "channels named": ("a.tif", tiff(STACK[:2], imagej=True, metadata={"axes": "CYX"}), 2, STACK[:2]),
    "channels, leading axis": ("a.tif", tiff(STACK[None, :2]), 2, STACK[:2, None]),
    "text in other letters": ("a.tif", tiff(GREY, description=b"\x81\xff", metadata=None), 1, GREY[None]),
}  # fmt: skip


def thumbnail(path, **options):
    several(GREY[::4, ::4], metadata=None, **options)(path)
    tifffile.imwrite(path, GREY, photometric="minisblack", metadata=None, append=True)


@pytest.mark.parametrize("name", IMAGES)
def test_image(tmp_path, name):
    file, write, channels, expected = IMAGES[name]
    write(tmp_path / file)
    image = read_image(tmp_path / file, channels)
    assert image.dtype == expected.dtype
    np.testing.assert_array_equal(image.reshape(expected.shape), expected)
    assert image.shape[0] == expected.shape[0]
    assert list(find_files(tmp_path)) == sorted(path.stem for path in tmp_path.iterdir())


REFUSED_IMAGES = {
    "three images": ("a.tif", several(*STACK[:3], metadata={"axes": "YX"}), ["3 images in " "this file", "(24, 32)", "save each"]),
    "three positions": ("a.ome.tif", several(*STACK[:3], metadata={"axes": "YX"}), ["3 images in " "this file", "save each"]),
    "thumbnail": ("a.tif", thumbnail, ["2 images in this file", "(6, 8), (24, 32)", "save each"]),
    "animation": ("a.png", pillow([GREY, GREY.T.reshape(SIZE)]), ["2 images in this file", "save each"]),
    "time": ("a.tif", tiff(STACK, imagej=True, metadata={"axes": "TYX"}), ["TYX (5, 24, 32)", "time", "no depth", "Image >"]),
    "another axis": ("a.tif", tiff(STACK, metadata={"axes": "LYX"}), ["LYX (5, 24, 32)", '"L"', "no depth"]),
    "two axes of channels": ("a.tif", tiff(np.stack([COLOUR] * 2), photometric="rgb", metadata={"axes": "CYXS"}), ["CYXS"]),
    "OME of which a part is elsewhere": ("a.tif", lambda path: spread(path, 4, pages=2), ["2 pages", "other files", "one file"]),
    "OME whose text is elsewhere": ("a.tif", binary_only(2), ["2 pages", "said in other files", "as one file"]),
    "OME that has more planes": ("a.tif", lambda path: spread(path, 7, pages=9), ["cannot be read", "get it again"]),
    "cut stack": ("a.tif", cut(tiff(STACK, compression="zlib", metadata=None), 0.7), ["cannot be read", "page", "get it again"]),
    "cut pages": ("a.tif", cut(tiff(STACK, metadata=None, contiguous=False), 0.7), ["cannot be read", "get it again"]),
    "cut ImageJ stack": ("a.tif", cut(tiff(STACK, imagej=True), 0.7), ["cannot be read", "get it again"]),
    "cut OME stack": ("a.tif", cut(tiff(STACK, ome=True), 0.7), ["cannot be read", "get it again"]),
    "cut PNG": ("a.png", cut(pillow(GREY), 0.7), ["cannot be read", "save it again"]),
    "no page": ("a.tif", lambda path: path.write_bytes(b"II*\0" + bytes(4)), ["no image in " "this file", "get or save " "it again"]),
    "no photometric": ("a.tif", lambda path: retagged(path, GREY, 262, 999), ["cannot be read", "999", "get it again"]),
    "empty": ("a.tif", lambda path: path.write_bytes(b""), ["cannot be read", "get it again"]),
    "1 bit LZW": ("a.tif", pillow(GREY > 99, compression="tiff_lzw"), ["LZW", "imagecodecs", "extra `tiff`", "or save"]),
    "LERC": ("a.tif", lambda path: retagged(path, GREY, 259, 34887), ["LERC", "imagecodecs", "extra `tiff`", "or save"]),
    "unknown compression": ("a.tif", lambda path: retagged(path, GREY, 259, 4711), ["4711", "imagecodecs", "or save"]),
    "CMYK": ("a.tif", lambda path: FLAT.convert("CMYK").save(path), ["SEPARATED", "grey or RGB"]),
    "a strip of no bytes": ("a.tif", lambda path: empty_strip(path), ["a part of page 1 " "is missing", "get it again"]),
    "16 bit grey and opacity": ("a.png", lambda path: wide_png(path, 4), ["16-bit PNG", "save it as TIFF"]),
}  # fmt: skip


def retagged(path, array, tag, value):
    Image.fromarray(array).save(path)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[tag].overwrite(value)


def empty_strip(path):
    tifffile.imwrite(path, GREY, photometric="minisblack", compression="zlib", rowsperstrip=8)
    with tifffile.TiffFile(path, mode="r+b") as file:
        counts = file.pages[0].tags[279]
        counts.overwrite([*counts.value[:-1], 0])


def wide_png(path, colour):
    Image.fromarray(WIDE).save(path)
    png = bytearray(path.read_bytes())
    png[25] = colour
    path.write_bytes(png)


@pytest.mark.parametrize("name", REFUSED_IMAGES)
def test_image_that_is_refused(tmp_path, name, monkeypatch):
    monkeypatch.setattr(decoders, "has_imagecodecs", lambda: False)
    file, write, said = REFUSED_IMAGES[name]
    write(tmp_path / file)
    with pytest.raises(DataError) as error:
        read_image(tmp_path / file)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / file}: ")
    assert all(part in message for part in said), message
    assert "\n" not in message


FORMATS = {
    "shaped": {},
    "shaped, zlib": {"compression": "zlib"},
    "pages": {"metadata": None, "contiguous": False},
    "pages, zlib": {"metadata": None, "compression": "zlib"},
    "ImageJ": {"imagej": True},
    "OME": {"ome": True},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_anywhere_is_whole_or_refused(tmp_path, name):
    stack = STACK[:, :12, :12]
    metadata = {"axes": "ZYX"} if "metadata" not in FORMATS[name] else {}
    tifffile.imwrite(
        tmp_path / "a.tif",
        stack,
        photometric="minisblack",
        **({"metadata": metadata} if metadata else {}) | FORMATS[name],
    )
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0], stack)
    content = (tmp_path / "a.tif").read_bytes()
    for length in range(0, len(content), 37):
        (tmp_path / "a.tif").write_bytes(content[:length])
        try:
            image = read_image(tmp_path / "a.tif")
        except DataError:
            continue
        np.testing.assert_array_equal(image[0], stack)


# The same for labels: name of the file, how it is made, and the label read from it.
LABELS = {
    "integers": ("a.tif", tiff(LABEL), LABEL),
    "64 bit": ("a.tif", tiff(LABEL.astype(np.int64)), LABEL),
    "LZW": ("a.tif", pillow(LABEL, compression="tiff_lzw"), LABEL),
    "whole numbers as floats": ("a.tif", tiff(LABEL.astype(np.float32), imagej=True), LABEL),
    "negative floats": ("a.tif", tiff(LABEL.astype(np.float64) - 1), LABEL.astype(int) - 1),
    "equal RGB": ("a.png", pillow(np.repeat(GREY[..., None], 3, 2)), GREY),
    "opacity": ("a.png", pillow(np.dstack([GREY, GREY // 2])), GREY),
    "palette PNG": ("a.png", lambda path: indexed(path), GREY),
    "palette TIFF": ("a.tif", lambda path: indexed(path), GREY),
    "stack": ("a.tif", tiff(STACK, imagej=True, metadata={"axes": "ZYX"}), STACK),
    "bits by tifffile": ("a.tif", tiff(GREY > 99, photometric=None), GREY > 99),
}  # fmt: skip


def indexed(path):
    image = Image.fromarray(GREY)
    image.putpalette(bytes(range(256)) * 3)
    image.save(path)


@pytest.mark.parametrize("name", LABELS)
def test_label(tmp_path, name):
    file, write, expected = LABELS[name]
    write(tmp_path / file)
    label = read_label(tmp_path / file)
    assert label.dtype.kind in "iub"
    np.testing.assert_array_equal(label, expected)


REFUSED_LABELS = {
    "WhiteIsZero": ("a.tif", tiff(255 - GREY, photometric="miniswhite"), ["0 is white", "background", "0 as black"]),
    "colours": ("a.png", pillow(COLOUR), ["colour image", "one integer per pixel"]),
    "channels": ("a.tif", tiff(STACK, imagej=True, metadata={"axes": "CYX"}), ["5 channels (axes CYX)", "one integer"]),
    "floats that merge": ("a.tif", tiff(np.float32([[0, 2**24 + 4]])), ["up to 16777220", "float32", "as integers"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_LABELS)
def test_label_that_is_refused(tmp_path, name):
    file, write, said = REFUSED_LABELS[name]
    write(tmp_path / file)
    with pytest.raises(DataError) as error:
        read_label(tmp_path / file)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / file}: ")
    assert all(part in message for part in said), message


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_floats_that_are_no_numbers_of_instances_stay_floats(tmp_path, value):
    """So that the check of labels tells them."""
    tifffile.imwrite(tmp_path / "a.tif", np.float32([[0, 1, value]]), photometric="minisblack")
    assert read_label(tmp_path / "a.tif").dtype == np.float32


def test_files_that_systems_leave_in_folders(tmp_path):
    tiff(GREY)(tmp_path / "a.1.TIF")
    for name in ("._a.1.TIF", "Thumbs.db", ".DS_Store", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert find_files(tmp_path) == {"a.1": tmp_path / "a.1.TIF"}
    image = str(tmp_path / "a.1.TIF")
    assert expanded(["b.h5:raw", str(tmp_path)]) == ["b.h5:raw", image]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("samples", [1, 3])
def test_predictor_of_floats(dtype, samples):
    """Encoded as the standard says: all first bytes, all second bytes, ..., then differences."""
    numbers = RNG.normal(size=(2, 5, 7, samples)).astype(dtype)
    big = (
        numbers.astype(numbers.dtype.newbyteorder(">"))
        .view(np.uint8)
        .reshape(2, 5, 7 * samples, -1)
    )
    planes = np.moveaxis(big, -1, -2).reshape(2, 5, -1, samples)
    differences = np.diff(planes, axis=2, prepend=np.zeros((2, 5, 1, samples), np.uint8))
    stored = (
        np.ascontiguousarray(differences)
        .reshape(2, 5, -1)
        .view(numbers.dtype)
        .reshape(numbers.shape)
    )
    np.testing.assert_array_equal(decoders.floatpred_decode(stored), numbers)


@pytest.mark.parametrize("colours", [GREY, COLOUR // 4 + 90])
def test_jpeg(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.tif", compression="jpeg", quality=95)
    expected = np.asarray(Image.open(tmp_path / "a.tif"))
    image = read_image(tmp_path / "a.tif", colours.ndim)
    np.testing.assert_array_equal(
        image, np.moveaxis(expected, -1, 0) if colours.ndim == 3 else expected[None]
    )


# --- axes of one pixel ------------------------------------------------------------------------------------------------

# Shape in the file, channels and axes that a network wants, and what it gets; of TIFF and of HDF5.
SINGLE_AXES = [
    ((24, 32), 1, 2, (24, 32)),
    ((1, 24, 32), 1, 2, (24, 32)),
    ((1, 1, 24, 32), 1, 2, (24, 32)),
    ((5, 24, 32), 1, 3, (5, 24, 32)),
    ((1, 5, 24, 32), 1, 3, (5, 24, 32)),
    ((5, 1, 24, 32), 1, 3, (5, 24, 32)),
    ((1, 5, 1, 24, 32), 1, 3, (5, 24, 32)),
    ((1, 24, 32), 1, 3, (1, 24, 32)),
    ((1, 1, 24, 32), 1, 3, (1, 24, 32)),
    ((3, 24, 32), 3, 2, (24, 32)),
    ((1, 3, 24, 32), 3, 2, (24, 32)),
    ((3, 1, 24, 32), 3, 2, (24, 32)),
    ((3, 1, 5, 24, 32), 3, 3, (5, 24, 32)),
]


@pytest.mark.parametrize(("shape", "channels", "ndim", "expected"), SINGLE_AXES)
def test_axes_of_one_pixel(tmp_path, shape, channels, ndim, expected):
    array = RNG.integers(0, 60000, shape).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", data=array, chunks=(*[1] * (len(shape) - 2), 8, 8))
    image, label = read_image(tmp_path / "a.tif", channels), array.reshape(channels, *expected)[0]
    with open_volume(tmp_path / "a.h5") as volume:
        for given in (image, volume):
            source = Source(given, channels, ndim, {"lower": 0, "upper": 100})
            assert source.shape == expected
            negative = Source(given, channels, ndim, {"lower": 0, "upper": 100}, invert=True)
            for seen in (source, negative):
                np.testing.assert_array_equal(seen.as_recorded, array.reshape(channels, *expected))
            low, high = (v.reshape(-1, *[1] * ndim) for v in source.range)
            whole = (array.reshape(channels, *expected) - low) / (high - low)
            np.testing.assert_allclose(source.read([0] * ndim, expected), whole, rtol=1e-6)
            corner = [n // 2 for n in expected]
            np.testing.assert_allclose(
                source.read(corner, expected),
                whole[:, *(slice(n, None) for n in corner)],
                rtol=1e-6,
            )
        if channels == 1:
            squeezed = without_single_axes(volume)
            assert squeezed.shape == squeezed[:].shape == tuple(n for n in shape if n > 1)
            np.testing.assert_array_equal(squeezed[2:4], fitted(array, 0)[2:4])
            assert squeezed.chunks[-2:] == (8, 8)
    sample = check_sample(
        Sample("a", image, label.reshape(shape) if channels == 1 else label), channels, (1,) * ndim
    )
    assert sample.image.shape == (channels, *expected)
    assert sample.label.shape == expected


@pytest.mark.parametrize(("stored", "said"), [
    (tiff(STACK[:3], photometric="rgb", planarconfig="separate"), "read as 3 channel(s) of 2 axes"),
    (tiff(STACK, imagej=True, metadata={"axes": "CYX"}), "read as 5 channel(s) of 2 axes"),
])  # fmt: skip
def test_sections_that_a_file_calls_channels(tmp_path, stored, said):
    stored(tmp_path / "a.tif")
    image = read_image(tmp_path / "a.tif")
    with pytest.raises(DataError) as error:
        Source(image, 1, 3, {"lower": 0, "upper": 100})
    assert all(
        part in str(error.value) for part in (said, "1 channel(s) and 3 axes", "axes ZYX")
    ), str(error.value)
    with pytest.raises(DataError, match=r"says 1; convert .*axes ZYX"):
        check_sample(Sample("a", image, LABEL), 1, (1, 1, 1))


def test_evaluate_labels_of_other_axes_and_types(tmp_path, capsys):
    """One pixel more or less along an axis, floats that are whole, in TIFF and in HDF5: the scores
    are the same."""
    tiff(LABEL)(tmp_path / "a.tif")
    tiff(LABEL[None].astype(np.float32))(tmp_path / "b.tif")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["whole"], file["deep"] = LABEL.astype(np.float64), LABEL[:, None, :, None]
    for one, other in [
        ("a.tif", "b.tif"),
        ("b.tif", "a.h5:whole"),
        ("a.h5:deep", "a.tif"),
        ("a.h5:deep", "a.h5:whole"),
    ]:
        assert main(["evaluate", f"{tmp_path}/{one}", f"{tmp_path}/{other}"]) == 0
        header, row, _ = capsys.readouterr().out.splitlines()
        assert dict(zip(header.split(","), row.split(","), strict=True))["aji"] == "1"


# --- numbers beside which float32 has no contrast ---------------------------------------------------------------------

OFFSETS = [
    ("uint32", 2**31),
    ("uint32", 0),
    ("int32", -(2**31)),
    ("int64", 2**45),
    ("uint64", 2**45),
    ("float64", 1e12),
    ("float64", -3e9),
    (">u4", 2**31),
]


@pytest.mark.parametrize(("dtype", "offset"), OFFSETS)
def test_an_offset_leaves_the_contrast(tmp_path, dtype, offset):
    """Networks see the same image, straight from a file and prepared for training, with a hot and a
    dead pixel in it too."""
    normalisation = {"lower": 1, "upper": 99, "contrast": [30.0], "level": [0.2]}
    plain = np.minimum(GREY, 150).astype(np.uint16)
    plain[0, :2] = 0, 60000
    expected = Source(plain[None], 1, 2, normalisation).read([0, 0], SIZE)
    image = (plain.astype(object) + int(offset)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = image
    read = read_image(tmp_path / "a.tif")
    with open_volume(tmp_path / "a.h5") as volume:
        prepared = check_sample(Sample("a", read, LABEL), 1, (1, 1)).image
        assert prepared.dtype == np.float32
        for given in (read, volume, prepared):
            seen = Source(given, 1, 2, normalisation).read([0, 0], SIZE)
            assert seen.dtype == np.float32
            np.testing.assert_allclose(seen, expected, atol=1e-3)


def test_numbers_that_float32_resolves_are_prepared_as_they_are():
    for image in (GREY.astype(np.uint32) + 2**14, GREY.astype(np.float64) * 1e30 - 7):
        np.testing.assert_array_equal(
            check_sample(Sample("a", image[None], LABEL), 1, (1, 1)).image[0], np.float32(image)
        )


def test_rescaling_takes_the_offset_off_first():
    image = np.array([[[2**31, 2**31 + 1, 2**31 + 2]]], np.uint32)
    np.testing.assert_array_equal(
        rescale(image, np.array([2.0**31]), np.array([2.0**31 + 2])), [[[0, 0.5, 1]]]
    )


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def missing_filter(path):
    """Write a dataset that says it was compressed in a way of which nobody knows."""
    with h5py.File(path, "w") as file:
        stored = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        stored.set_chunk(SIZE)
        stored.set_filter(32_999, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(SIZE)
        volume = h5py.h5d.create(file.id, b"raw", h5py.h5t.NATIVE_UINT8, space, stored)
        volume.write_direct_chunk((0, 0), GREY.tobytes())


def damaged(path):
    """Write a dataset of which one block cannot be unpacked."""
    with h5py.File(path, "w") as file:
        volume = file.create_dataset(
            "raw", data=np.stack([LABEL] * 4), chunks=(2, *SIZE), compression="gzip"
        )
        block = volume.id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[block.byte_offset : block.byte_offset + block.size] = bytes(block.size)
    path.write_bytes(content)


def test_a_filter_that_is_not_installed(tmp_path):
    missing_filter(tmp_path / "a.h5")
    with pytest.raises(DataError) as error, open_volume(tmp_path / "a.h5"):
        pass
    message = str(error.value)
    assert all(
        part in message
        for part in (f"{tmp_path / 'a.h5'}: the dataset raw", "32999", "hdf5plugin", "or store it")
    )


def test_a_block_that_cannot_be_read_names_its_file(tmp_path, capsys):
    damaged(tmp_path / "a.h5")
    tiff(np.stack([LABEL] * 4))(tmp_path / "b.tif")
    for one, other in [("a.h5", "b.tif"), ("b.tif", "a.h5")]:
        assert main(["evaluate", f"{tmp_path}/{one}", f"{tmp_path}/{other}"]) == 1
        assert capsys.readouterr().err.startswith(
            f"gdlib: error: {tmp_path}/a.h5: cannot be read as HDF5"
        )
    with open_volume(tmp_path / "a.h5") as volume:
        source = Source(volume, 1, 3, {"lower": 0, "upper": 100})
        with pytest.raises(DataError, match=r"a\.h5: cannot be read as HDF5"):
            source.read([2, 0, 0], [4, 24, 32])


# --- size of pixels ---------------------------------------------------------------------------------------------------

MICRON = {
    "axes": "ZYX",
    "PhysicalSizeX": 0.2,
    "PhysicalSizeY": 250,
    "PhysicalSizeYUnit": "nm",
    "PhysicalSizeZ": 0.4,
}
PER_CM = {"resolution": (50000, 40000), "resolutionunit": "CENTIMETER"}
# How an image is written, then its unit (by number, by name), pixels per unit along x and y, and
# distance of sections.
SCALES = {
    "ImageJ": ({"imagej": True, "resolution": (5, 4), "metadata": {"axes": "ZYX", "unit": "um", "spacing": 0.4}}, 1, "um", 0.4),
    "ImageJ, escaped": (
        {"imagej": True, "resolution": (5, 4), "metadata": {"axes": "ZYX", "unit": "\\u00B5m", "spacing": 0.4}},
        1,
        "\\u00B5m",
        0.4,
    ),
    "OME": ({"ome": True, "metadata": MICRON}, 1, "micron", 0.4),
    "tags": (PER_CM, 3, None, None),
    "nothing": ({"metadata": None}, 1, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_the_label_has_the_scale_of_its_image(tmp_path, name):
    options, unit, unit_name, spacing = SCALES[name]
    tiff(STACK, **options)(tmp_path / "a.tif")
    found = calibration(tmp_path / "a.tif")
    for label in (STACK, STACK[:1], STACK[0]):
        tifffile.imwrite(
            tmp_path / "b.tif",
            label.astype(np.uint32),
            photometric="minisblack",
            compression="zlib",
            **written(found, label.shape),
        )
        np.testing.assert_array_equal(read_label(tmp_path / "b.tif"), label)
        with tifffile.TiffFile(tmp_path / "b.tif") as file:
            page, text = file.pages[0], file.imagej_metadata or {}
            assert file.series[0].axes == "ZYX"[-label.ndim :]
            assert len(file.pages) == (len(label) if label.ndim == 3 else 1)
        if unit_name and len(label) > 1:
            assert text["unit"] == unit_name
            assert text.get("spacing") == (spacing if label.ndim == 3 else None)
        per_unit = {"tags": (50000, 40000), "nothing": (1, 1)}.get(name, (5, 4))
        assert page.tags[296].value == unit
        assert [
            page.tags[tag].value[0] / page.tags[tag].value[1] for tag in (282, 283)
        ] == pytest.approx(per_unit)


def test_the_scale_of_a_png_and_of_one_that_has_none(tmp_path):
    pillow(GREY, dpi=(254, 254))(tmp_path / "a.png")
    assert calibration(tmp_path / "a.png") == {
        "resolution": pytest.approx((254, 254), rel=1e-4),
        "resolutionunit": 2,
    }
    pillow(GREY)(tmp_path / "b.png")
    assert calibration(tmp_path / "b.png") == {}


@pytest.mark.parametrize("size", ["0", "inf", "nan", "-1", "two"])
def test_a_size_that_is_none_is_left_out(tmp_path, size):
    text = (
        '<OME xmlns="x"><Image ID="Image:0"><Pixels DimensionOrder="XYZCT" Type="uint8" '
        'SizeX="32" SizeY="24" SizeZ="1" '
    )
    text += (
        f'SizeC="1" SizeT="1" PhysicalSizeX="{size}" '
        'PhysicalSizeY="1"><TiffData/></Pixels></Image></OME>'
    )
    tiff(GREY, description=text, metadata=None)(tmp_path / "a.tif")
    assert "unit" not in calibration(tmp_path / "a.tif")
