"""Decoders that tifffile wants of `imagecodecs`: where that is not installed, those that Pillow and
NumPy can give.

Pillow brings libtiff, but as a reader of whole TIFFs it knows few kinds of pixels. So a strip or
tile alone is handed to it, as a grey image of bytes, and what the bytes mean is left to tifffile:
every type, predictor, tiling and order of planes.
"""

import contextlib
import importlib.util
import io
import struct
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

LZW, ZSTD = 5, 50000
# By number of compression: what can be decoded here, and of what bits in a number; others need
# `imagecodecs`.
WHOLE = (8, 16, 32, 64, 128)
BITS = {
    # none, zlib, PackBits, LZMA, by tifffile
    **dict.fromkeys((1, 8, 32773, 32946, 34925), (1, 2, 4, *WHOLE)),
    **dict.fromkeys((LZW, ZSTD), WHOLE),
    **dict.fromkeys((2, 3, 4), (1,)),
    7: (8,),
}


def has_imagecodecs() -> bool:
    """Is the package installed?"""
    return importlib.util.find_spec("imagecodecs") is not None


def can_decode(compression: int, bits: int) -> bool:
    """Tell whether strips of this compression, of numbers of so many bits, can be decoded."""
    return has_imagecodecs() or bits in BITS.get(compression, ())


def teach_tifffile() -> None:
    """Give tifffile the decoders below, unless `imagecodecs` is there, which has them all and is
    faster.
    """
    # Not at the head: a plain TIFF must be read also where a later tifffile keeps these things
    # elsewhere.
    with contextlib.suppress(ImportError, AttributeError):
        from tifffile import _imagecodecs
        from tifffile.tifffile import imagecodecs

        if imagecodecs is _imagecodecs:
            for decode in DECODERS:
                setattr(_imagecodecs, decode.__name__, decode)


def lzw_decode(data: bytes, /, *, out: int) -> bytes:
    """Return the `out` bytes of a strip or tile; more than there are is an error."""
    return _libtiff(data, LZW, out, 1, 8).tobytes()


def zstd_decode(data: bytes, /, *, out: int) -> bytes:
    """Return the `out` bytes of a strip or tile; more than there are is an error."""
    return _libtiff(data, ZSTD, out, 1, 8).tobytes()


def ccittrle_decode(data: bytes, height: int, width: int, /) -> np.ndarray:
    """Return the bits (height, width) of a strip or tile."""
    return _libtiff(data, 2, width, height, 1)


def ccittfax3_decode(data: bytes, height: int, width: int, /, *, t4options: int = 0) -> np.ndarray:
    """Return the bits (height, width) of a strip or tile."""
    return _libtiff(data, 3, width, height, 1, t4options)


def ccittfax4_decode(data: bytes, height: int, width: int, /) -> np.ndarray:
    """Return the bits (height, width) of a strip or tile."""
    return _libtiff(data, 4, width, height, 1)


def jpeg_decode(
    data: bytes,
    /,
    *,
    bitspersample: int,
    tables: bytes | None,
    header: bytes | None,
    colorspace: int | None,
    outcolorspace: Any,
    shape: tuple[int, int],
) -> np.ndarray:
    """Return the pixels (height, width[, 3]) of a strip or tile of grey or RGB values, uint8."""
    if bitspersample != 8 or header:
        raise ValueError("JPEG of this kind needs the package imagecodecs")
    # The file keeps the tables of all its strips in one place; and whether three components are
    # colours or luminance and chrominance it says in a tag, which a reader of JPEG does not see,
    # but it sees Adobe's mark.
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + (
        b"\x00" if colorspace == 2 else b"\x01"
    )
    stream = b"\xff\xd8" + (adobe if outcolorspace == 2 else b"") + (tables or b"")[2:-2] + data[2:]
    with Image.open(io.BytesIO(stream), formats=["JPEG"]) as image:
        if image.mode not in ("L", "RGB") or image.size != shape[::-1]:
            raise ValueError(f"JPEG of {image.mode} {image.size} needs the package imagecodecs")
        return np.asarray(image)


def floatpred_decode(data: np.ndarray, /, *, axis: int = -2, out: Any = None) -> np.ndarray:
    """Undo the predictor of floating-point numbers.

    Args:
        data: (..., width, samples); in each row the differences of bytes, the most significant
            bytes of all numbers first.
        axis: of the width, always -2.
        out: unused.
    """
    *rows, width, samples = data.shape
    size = data.dtype.itemsize
    planes = data.view(np.uint8).reshape(*rows, -1, samples).cumsum(-2, dtype=np.uint8)
    planes = np.moveaxis(planes.reshape(*rows, size, width * samples), -2, -1)
    numbers = np.ascontiguousarray(planes).view(data.dtype.newbyteorder(">"))
    return numbers.reshape(data.shape).astype(data.dtype)


DECODERS = (
    lzw_decode,
    zstd_decode,
    ccittrle_decode,
    ccittfax3_decode,
    ccittfax4_decode,
    jpeg_decode,
    floatpred_decode,
)


def _libtiff(
    data: bytes, compression: int, width: int, height: int, bits: int, t4options: int = 0
) -> np.ndarray:
    """Decode one strip as the only one of a grey TIFF of as many `bits`.

    Return (height, width) uint8, or bool of one bit.
    """
    tags = {
        256: width,
        257: height,
        258: bits,
        259: compression,
        262: 1,  # 0 is black: bits as they are
        273: 0,  # where the strip is, see below
        277: 1,
        278: height,
        279: len(data),
        292: t4options,
    }
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data
    try:
        # Not by Image.open, which takes a long strip for an attack.
        return np.asarray(TiffImagePlugin.TiffImageFile(io.BytesIO(file)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a strip or tile cannot be decoded: {error}") from error
