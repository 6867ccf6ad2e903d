"""HDF5: written atomically, read without surprise."""

import contextlib
import json
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gdlib.io.failures import DataError, sentences
from gdlib.io.failures import WriteError as WriteError
from gdlib.io.files import atomic

# Volumes are stored in blocks of so many voxels (Z, Y, X), so that a small crop is read without the
# rest; images in 2D, which are read whole, as h5py chooses.
BLOCK = (16, 64, 64)
HDF5_SUFFIXES = (".h5", ".hdf", ".hdf5")


def split_h5_path(path: Path | str) -> tuple[Path, str | None]:
    """Split the name of an HDF5 file from that of a dataset in it, None if it names none.

    Other paths have none.

    >>> path, dataset = split_h5_path("folder/volume.h5:volumes/raw")
    >>> path.name, dataset
    ('volume.h5', 'volumes/raw')
    >>> split_h5_path("stack.tif")[1] is None
    True
    """
    endings = "|".join(ending[1:] for ending in HDF5_SUFFIXES)
    match = re.fullmatch(rf"(.+?\.(?:{endings}))(?::(.+))?", str(path), re.IGNORECASE)
    return (Path(match[1]), match[2]) if match else (Path(path), None)


def is_hdf5(path: Path | str) -> bool:
    """Is this a file, or `file:dataset`, that HDF5 reads?"""
    return split_h5_path(path)[0].suffix.lower() in HDF5_SUFFIXES


# Checksums of all that is not data, and no more: what HDF5 2.0 would write no program with an older
# one could read, and these are most.
FORMAT = ("v110", "v110")


@contextlib.contextmanager
def create_h5(path: Path | str, **attrs: Any) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing, atomically.

    `attrs` become file attributes (JSON where not scalar).
    """
    # No cache of chunks: HDF5 crashes the process if it cannot write one of them when the file is
    # closed.
    with (
        atomic(path) as temporary,
        h5py.File(temporary, "w", libver=FORMAT, rdcc_nbytes=0) as file,
    ):
        for key, value in attrs.items():
            file.attrs[key] = (
                value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)
            )
        yield file


def put(
    group: h5py.Group, name: str, array: np.ndarray, block: Iterable[int] | None = None
) -> None:
    """Store an array compressed and without time stamps.

    Args:
        group: where.
        name: of the dataset.
        array: any.
        block: side lengths, along the last axes, of the pieces it is stored in; chosen by h5py if
            left out.
    """
    chunks = None
    if block is not None:
        sides = ((1,) * array.ndim + tuple(block))[-array.ndim :]
        chunks = tuple(min(pair) for pair in zip(sides, array.shape, strict=True))
    group.create_dataset(
        name,
        data=array,
        chunks=chunks,
        compression="gzip",
        compression_opts=1,
        shuffle=True,
        track_times=False,
    )


# What stands in the place of a file that was not got: how it begins, in small letters, and what to
# say of it.
STAND_INS = {
    b"version https://git-lfs.": "only a pointer of Git LFS, which stands for the file; get the "
    "file itself with `git lfs pull`",
    b"<!doctype html": "a web page, as a failed download leaves it; get it again",
    b"<html": "a web page, as a failed download leaves it; get it again",
}


def check_file(path: Path | str) -> None:
    """Raise `DataError` unless there is a file that may be read, and is not what a download left
    in its place.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing; check its name and folder") from None
    except OSError as error:
        raise DataError(*sentences(error)) from error
    for other, what in STAND_INS.items():
        if begin.startswith(other):
            raise DataError(f"{path}: this is {what}")


def h5_file(path: Path | str, mend: str = "move it away, and make it again") -> h5py.File:
    """Open an HDF5 file for reading.

    What HDF5 says against it is one clear sentence, that ends with a mend.
    """
    check_file(path)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        cause = " ".join(str(error).split())  # HDF5 writes the date with a line break
    if "unable to lock file" in cause:
        raise DataError(f"{path}: another program has it open to write; close it there, or wait")
    if "already open for write" in cause:
        raise DataError(
            f"{path}: a program has it open to write, or ended while it had; close it there, or, "
            f"if there is none, free the file with `h5clear -s {path}`"
        )
    raise DataError(f"{path}: not a readable HDF5 file ({cause}); {mend}")


@contextlib.contextmanager
def open_h5(path: Path | str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading.

    A file that is broken, or shows what is in other files, is one clear sentence.
    """
    with h5_file(path) as file, readable(file):
        _check_links(file)
        yield file


@contextlib.contextmanager
def readable(file: h5py.File) -> Iterator[None]:
    """Turn the error of a library into a `DataError` if `file` is damaged; other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, SystemError) as error:
        told = "h5py" in traceback.extract_tb(error.__traceback__)[
            -1
        ].filename and "doesn't exist" not in str(error)
        if not told or (name := _damaged(file)) is None:  # to look takes time
            raise
        raise DataError(
            f'{file.filename}: "{name}" in it is damaged; move the file away, and make it again'
        ) from error


def _damaged(file: h5py.File) -> str | None:
    """Return the first array or group of a file that cannot be read, with its attributes."""
    name = "/"
    try:
        dict(file.attrs)
        for name, link in _links(file):
            item = file[name] if isinstance(link, h5py.HardLink) else None
            dict(item.attrs if item else {})
            if isinstance(item, h5py.Dataset):
                for piece in item.iter_chunks() if item.chunks else [()]:
                    item[piece]
    except (OSError, RuntimeError, KeyError, SystemError):
        return name
    return None


def _links(file: h5py.File) -> list[tuple[str, h5py.HardLink | h5py.SoftLink | h5py.ExternalLink]]:
    """Return all links of a file by name, following none that may lead out of it."""
    found = []
    # h5py does not survive errors in here
    file.visititems_links(lambda name, link: found.append((name, link)))
    return found


_INSIDE: set[tuple[str, int, int]] = set()  # files whose links were looked at


def _check_links(file: h5py.File) -> None:
    """Raise `DataError` if any array of a file is stored in another file."""
    status = os.stat(file.filename)
    identity = (os.path.abspath(file.filename), status.st_size, status.st_mtime_ns)
    if identity in _INSIDE:
        return

    for name, link in _links(file):
        if isinstance(link, h5py.ExternalLink):
            _refuse(file, name, link.filename)
        if isinstance(link, h5py.HardLink) and isinstance(item := file[name], h5py.Dataset):
            check_inside(item, file)
    _INSIDE.add(identity)


def check_inside(array: h5py.Dataset, file: h5py.File) -> None:
    """Raise `DataError` if an array is not stored in its file: HDF5 would follow it to any file
    that we may read.
    """
    sources = [array.file.filename, *(name for name, _, _ in array.external or [])]
    if array.is_virtual:
        sources += [source.file_name for source in array.virtual_sources()]
    for source in sources:
        if source not in (".", file.filename):
            _refuse(file, array.name, source)


def _refuse(file: h5py.File, name: str, source: str) -> None:
    raise DataError(
        f'{file.filename}: "{name}" is stored in another file, {source}; if you trust it, copy it '
        "into this one"
    )
