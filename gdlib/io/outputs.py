"""Files that a command is told to write: nothing that is not its own is replaced, and what cannot
be written is told first.

A file counts as a command's own if it is what the command writes: a CSV file with its columns, a
JSON file with its keys, an HDF5 file with its attributes, weights with a header. Labels, which look
like those of anybody else, say by which program and of which image they were made. Everything else
is replaced only where the user says so, and an input never is.
"""

import contextlib
import csv
import hashlib
import json
import os
import platform
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from gdlib import __version__, io

SOFTWARE = "software"  # attribute of an HDF5 dataset; in a TIFF file it is the tag `Software`
HELP = "replace what is there also if this command did not write it"


class Output(NamedTuple):
    """A file that will be written, and how to know whether one that is there may be replaced.

    Attributes:
        path: of the file; or of a folder, where `is_kind` is given.
        is_own: is it of the same command, and of the same input?
        shown: how messages name it, if not by its path.
        is_kind: is a folder that is there of the kind that will be written? Others never go.
    """

    path: Path
    is_own: Callable[[Path], bool]
    shown: str = ""
    is_kind: Callable[[Path], bool] | None = None


def check(
    outputs: Iterable[Output],
    inputs: Iterable[Path | str],
    *,
    overwrite: bool | None,
    option: str = "--out",
) -> None:
    """Raise unless all files can be written without loss; nothing is changed.

    Args:
        outputs: what will be written.
        inputs: files that the command reads, which are not written over whatever the user says.
        overwrite: replace any other file; None where the user cannot say so.
        option: with which the user chooses another place.

    Raises:
        DataError: one of them is an input, a folder, or somebody else's.
        WriteError: one of them cannot be written.
    """
    outputs = list(outputs)
    used = {identity for path in inputs if (identity := _identity(path))}
    foreign = []
    for path, is_own, shown, is_kind in outputs:
        check_writable(path)
        is_right = path.is_file() if is_kind is None else path.is_dir() and is_kind(path)
        if path.exists() and not is_right:
            what = "folder" if path.is_dir() else "file" if path.is_file() else "device"
            raise io.DataError(f"{path}: there is a {what} of this name; choose another {option}")
        if _identity(path) in used:
            raise io.DataError(
                f"{path}: it is an input of this command and would be written over; choose another "
                f"{option}"
            )
        if not overwrite and path.exists() and not is_own(path):
            foreign.append(shown or path)
    names = [str(one.shown or one.path) for one in outputs]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise io.DataError(f"{twice}: two outputs would be written there; choose another {option}")
    if foreign:
        more = f" and {len(foreign) - 1} more are" if len(foreign) > 1 else " is"
        replace = "move it away" if overwrite is None else "replace what is there with --overwrite"
        raise io.DataError(
            f"{foreign[0]}{more} there already, and not from this command; choose another "
            f"{option}, or {replace}"
        )


def _identity(path: Path | str) -> tuple[int, int] | None:
    """Return what all names of a file have in common; None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def check_writable(path: Path) -> None:
    """Raise `WriteError` unless a file of this name can be made; neither it nor its folder is."""
    with io.writing(path, io.SPACE | io.ACCESS):
        path.exists()  # is an error where the name is too long
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        probe = io.beside(folder / path.name, f".{platform.node()}.{os.getpid()}.tmp")
        probe.touch()
        probe.unlink()


def has_columns(*names: str) -> Callable[[Path], bool]:
    """Return a test whether a CSV file has these columns."""

    def test(path: Path) -> bool:
        with open(path, newline="") as file:
            return set(names) <= set(next(csv.reader(file), ()))

    return _no_if_unreadable(test)


def has_keys(*names: str) -> Callable[[Path], bool]:
    """Return a test whether a JSON file has these keys."""
    return _no_if_unreadable(lambda path: set(names) <= set(json.loads(path.read_text())))


def has_attributes(*names: str) -> Callable[[Path], bool]:
    """Return a test whether an HDF5 file has these attributes."""

    def test(path: Path) -> bool:
        with h5py.File(path, "r") as file:
            return set(names) <= set(file.attrs)

    return _no_if_unreadable(test)


def is_weights(path: Path) -> bool:
    """Is this a weights file of ours?"""
    return _no_if_unreadable(lambda path: bool(io.read_header(path)))(path)


def is_export(path: Path) -> bool:
    """Is this a file of `gdlib export`?"""

    def test(path: Path) -> bool:
        if io.is_onnx(path):
            return bool(io.read_header(path))
        with zipfile.ZipFile(path) as archive:
            return any(Path(name).name == io.EXPORTED for name in archive.namelist())

    return _no_if_unreadable(test)(path)


def mark(image: Path, dataset: str | None = None) -> str:
    """Return what a label says of itself: the program and, as a digest, the image that it was made
    of.
    """
    # not `Path.resolve`, for which a link to itself is no mistake of the user
    place = os.path.realpath(image)
    digest = hashlib.sha256(f"{place}:{dataset or ''}".encode()).hexdigest()
    return f"gdlib {__version__}, image {digest[:16]}"


def is_mark(text: str) -> bool:
    """Is this what labels of this package, of any version, say of themselves?

    >>> is_mark(mark(Path("a.tif"))), is_mark("tifffile.py")
    (True, False)
    """
    return re.fullmatch(r"gdlib \S+, image [0-9a-f]{16}", text) is not None


def has_mark(mark: str, dataset: str | None = None) -> Callable[[Path], bool]:
    """Return a test whether a label file, or its dataset, is of the same image as `mark`, or is
    still to be added to a file.
    """
    image = mark.partition(", ")[2]

    def tiff(path: Path) -> bool:
        import tifffile

        with tifffile.TiffFile(path) as file:
            return file.pages.first.software.endswith(image)

    def hdf5(path: Path) -> bool:
        with h5py.File(path, "r") as file:
            item, *parts = file, *dataset.split("/")
            while parts and isinstance(item, h5py.Group):
                if (name := parts.pop(0)) not in item:
                    return True
                item = item[name]
            return (
                not parts
                and isinstance(item, h5py.Dataset)
                and str(item.attrs.get(SOFTWARE)).endswith(image)
            )

    return _no_if_unreadable(hdf5 if dataset else tiff)


def _no_if_unreadable(test: Callable[[Path], bool]) -> Callable[[Path], bool]:
    def safe(path: Path) -> bool:
        try:
            return test(path)
        except Exception:  # what readers raise about a file of another kind, they alone know
            return False

    return safe


@contextlib.contextmanager
def added_h5(path: Path, **attrs: Any) -> Iterator[h5py.File]:
    """Open a new HDF5 file, as `io.create_h5`.

    What else is in an HDF5 file at `path` goes there too in the end.

    Raises:
        DataError: another process has written to the file in the meantime, or it is damaged.
    """
    with io.create_h5(path, **attrs) as file:
        yield file
        before = _version(path)
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as old, io.readable(old):
                _copy_others(old, file)
        file.flush()
        if _version(path) != before:
            raise io.DataError(
                f"{path}: another process has written to it as well; run the same command again"
            )


def _version(path: Path) -> tuple[int, ...] | None:
    return (os.stat(path).st_ino, os.stat(path).st_mtime_ns) if path.exists() else None


def _copy_others(old: h5py.Group, new: h5py.Group) -> None:
    """Copy all that is in one group and not in another."""
    for key, value in old.attrs.items():
        if key not in new.attrs:
            new.attrs[key] = value
    for key in old:
        link = old.get(key, getlink=True)
        if key in new:
            if isinstance(new[key], h5py.Group) and old.get(key, getclass=True) is h5py.Group:
                _copy_others(old[key], new[key])
        elif isinstance(link, h5py.HardLink):
            old.copy(key, new)
        else:
            new[key] = link
