"""Read the one image of a TIFF file, wholly or not at all.

What a reader would only warn of is an error here.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from gdlib.data.decoders import can_decode, teach_tifffile
from gdlib.io.failures import DataError, writing

teach_tifffile()

MIN_IS_WHITE, PALETTE = 0, 3
GREY_OR_COLOUR = (MIN_IS_WHITE, 1, 2, PALETTE)
JPEG = (6, 7, 34892, 33007)  # decoders give RGB whatever is in the file
NATIVE = "<" if sys.byteorder == "little" else ">"
MAPPED = 2**28  # bytes; larger images need not be in memory
# microscopes and ImageJ have palettes too, of how numbers are shown
PLAIN = ("generic", "uniform", "shaped")


def read_tiff(
    path: Path, *, indices: bool, scratch: Path | None = None
) -> tuple[np.ndarray, str, bool]:
    """Read an image or a label.

    Args:
        path: TIFF, ImageJ TIFF or OME-TIFF; of a pyramid the full resolution is read.
        indices: it is a label: numbers of colours in a palette stay what they are.
        scratch: folder. A large image is then not read but mapped; one that is compressed, as a
            copy in a file without a name in this folder, which is gone when the array is.

    Returns:
        The array; one letter per axis, as tifffile names them: S are colours, C channels, T time, I
        and Q have no name; and whether the last of the colours is opacity.

    Raises:
        DataError: for anything that tifffile finds odd, several images in one file, and values
            whose meaning is not clear.
    """
    with open_tiff(path) as series:
        page, axes = series.keyframe, series.axes
        with reading(path):
            photometric = int(page.photometric)
        if photometric not in GREY_OR_COLOUR and page.compression not in JPEG:
            raise DataError(
                f"{path}: its colours are {page.photometric.name}; save it again as "
                "grey or RGB image"
            )
        # tifffile, by which most masks of single bits are written, marks them so, but stores them
        # as they are.
        inverted = photometric == MIN_IS_WHITE and not (
            page.bitspersample == 1 and page.software == "tifffile.py"
        )
        if inverted and indices:
            raise DataError(
                f"{path}: the file says that 0 is white (WhiteIsZero), so that it is not clear "
                "which number is the background; save the label again with 0 as black"
            )
        place = None if scratch is None or series.nbytes < MAPPED else _file(series, scratch)
        with reading(path):
            array, colours = series.asarray(out=place), page.colormap
    if inverted:
        array = _inverted(array, page.bitspersample)
    if photometric == PALETTE and colours is not None and not indices and series.kind in PLAIN:
        array, axes = np.moveaxis(colours[:, array], 0, -1), axes + "S"
    alpha = "S" in axes and bool(page.extrasamples) and int(page.extrasamples[-1]) in (1, 2)
    return array, axes, alpha


def _file(series: tifffile.TiffPageSeries, scratch: Path) -> np.ndarray | str:
    """Return where pixels go that need not be in memory: they stay where they are, or go to a map
    of a new file.
    """
    page = series.keyframe
    if series.dataoffset is not None and page.is_memmappable and page.parent.byteorder == NATIVE:
        return "memmap"
    with writing(scratch / "a decoded copy of the image"):
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as file:
            # a map of more than the disk has would end the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, series.nbytes)
            return np.memmap(file, series.dtype, "w+", shape=series.shape)


def _inverted(array: np.ndarray, bits: int) -> np.ndarray:
    """Return values of which 0 is white, so that bright is high."""
    if array.dtype.kind in "bi":
        return ~array
    return array.dtype.type(2**bits - 1) - array if array.dtype.kind == "u" else -array


@contextlib.contextmanager
def open_tiff(path: Path) -> Iterator[tifffile.TiffPageSeries]:
    """Open the one image of a file, to be read within `reading`.

    No other file is opened, whatever this one says.

    Yields:
        A series of tifffile; of a pyramid, the full resolution.
    """
    with contextlib.ExitStack() as stack:
        with reading(path):
            file = stack.enter_context(tifffile.TiffFile(path))
            series = _only_series(path, file)
            _check_complete(path, file, series)
        yield series


def _only_series(path: Path, file: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    file.is_mmstack = file.is_ndtiff = False  # their readers look for files beside this one
    if not len(file.pages):
        raise DataError(f"{path}: there is no image in this file; get or save it again")
    _forget_other_files(path, file)
    full = [one for one in file.series if not one.keyframe.is_reduced]
    series = [one for one in full if not one.keyframe.is_subifd] or full or file.series
    if len(series) != 1:
        shapes = ", ".join(str(one.shape) for one in series[:10])
        raise DataError(
            f"{path}: there are {len(series)} images in this file, of {shapes} pixels; save each "
            "that is wanted as a file of its own"
        )
    return series[0]


def _check_complete(path: Path, file: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> None:
    """Raise `DataError` unless all bytes of an image are there, and known how to decode."""
    page, size = series.keyframe, file.filehandle.size
    if not can_decode(int(page.compression), page.bitspersample):
        raise DataError(
            f"{path}: {page.bitspersample} bits with the compression "
            f"{getattr(page.compression, 'name', page.compression)} need the package imagecodecs; "
            "install it (it is the extra `tiff`), or save the image again as PNG or uncompressed "
            "TIFF"
        )
    if series.dataoffset is not None:  # one piece, of which not every page is described
        if series.dataoffset + series.nbytes > size:
            raise DataError(
                f"{path}: cannot be read, its end is missing; get it again, or save it again"
            )
        return
    for number, part in enumerate(series.pages, start=1):
        # Readers fill a strip of no bytes with zeros.
        if part is None or any(
            count == 0 or start + count > size
            for start, count in zip(part.dataoffsets, part.databytecounts, strict=True)
        ):
            raise DataError(
                f"{path}: cannot be read, a part of page {number} is missing; get it again, or "
                "save it again"
            )


def _forget_other_files(path: Path, file: tifffile.TiffFile) -> None:
    """Make tifffile forget what an OME-TIFF says of images in other files.

    A single plane is read without its text.
    """
    if not file.is_ome:
        return
    try:
        root = ElementTree.fromstring(file.ome_metadata)
    except ElementTree.ParseError:  # which tifffile will tell
        return
    blocks = [block for block in root.iter() if block.tag.endswith("TiffData")]
    names = {name.text: name.get("FileName", "") for block in blocks for name in block}
    own = {root.get("UUID")} | {
        uuid for uuid, name in names.items() if name.lower() == path.name.lower()
    }
    if len(names) == 1:  # then the file was renamed
        own |= set(names)
    elsewhere = {block for block in blocks if any(name.text not in own for name in block)}
    images = [child for child in root if child.tag.endswith("Image")]
    whole = [image for image in images if elsewhere.isdisjoint(image.iter())]
    if not whole and len(file.pages) == 1:
        file.is_ome = False
        return
    if not whole or any(
        set(blocks).intersection(image.iter()) - elsewhere for image in images if image not in whole
    ):
        raise DataError(
            f"{path}: what its {len(file.pages)} pages are is said in other files, or a part of "
            "the image is in them, and no other file is opened; save the image as one file"
        )
    for image in images:
        if image not in whole:
            root.remove(image)
    for block in blocks:
        for name in list(block):
            block.remove(name)
    file.pages.first.description = ElementTree.tostring(root, encoding="unicode")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make one error of what tifffile raises, and of what it only says, in this thread, about a
    file that is odd.
    """
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = " ".join(re.sub(r"<tifffile[^>]*>", "", record.getMessage()).split())
            # a text in other letters does no harm
            if record.thread == threading.get_ident() and "ASCII" not in text:
                said.append(text)

    logger, listener = logging.getLogger("tifffile"), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything, from struct.error to zlib.error
        said.append(str(error) or type(error).__name__)
    finally:
        logger.removeHandler(listener)
    if said:
        raise DataError(
            f"{path}: cannot be read ({said[0]}); get it again, or save it again as PNG or "
            "uncompressed TIFF"
        )
