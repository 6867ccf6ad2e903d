"""OME-Zarr, versions 0.4 and 0.5 (https://ngff.openmicroscopy.org): images as pyramids of levels,
read piece by piece.

The package zarr is imported when there is something to read.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdlib.io.failures import DataError, sentences

SUFFIX = ".zarr"
MARKERS = ("zarr.json", ".zgroup", ".zarray")  # files that make a folder a group or an array
KINDS = {"time": "T", "channel": "C"}
# lengths as OME-Zarr spells them, in microns
MICRONS = {"meter": 1e6, "centimeter": 1e4, "millimeter": 1e3, "micrometer": 1.0}
MICRONS |= {"nanometer": 1e-3, "angstrom": 1e-4, "picometer": 1e-6}
DEEPEST = 3  # groups between a file and its images, as in plates: row, well, field
AGAIN = "get the image again, or save it again as OME-Zarr 0.4 or 0.5"


@dataclass(frozen=True)
class Level:
    """One resolution of a pyramid, a number per axis.

    Attributes:
        shape: pixels.
        scale: side of a pixel, in the unit of the axis.
        translation: where the centre of the first pixel is, in the same unit.
    """

    shape: tuple[int, ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]


class ZarrImage:
    """An array of a Zarr folder, of which parts are read by integers and slices, and what is said
    about it.

    Attributes:
        path: as it was given.
        root: the folder.
        group: path in it of the image whose level this is.
        zarr_format: 2, as in OME-Zarr 0.4, or 3, as in 0.5.
        letters: a letter of `TCZYX` for each axis, "" of an array without metadata.
        axes: what the metadata say of each axis.
        levels: all resolutions of the pyramid, the full one first; none of an array alone.
        level: which of them this is.
        channels: their names, as far as they are known.
    """

    def __init__(
        self,
        path: str,
        array: Any,
        root: Path,
        group: str = "",
        letters: str = "",
        axes: Sequence[Mapping[str, Any]] = (),
        levels: Sequence[Level] = (),
        level: int = 0,
        channels: Sequence[str] = (),
    ) -> None:
        self.path, self._array, self.root, self.group = path, array, root, group
        self.letters, self.axes = letters, list(axes)
        self.levels, self.level, self.channels = list(levels), level, list(channels)
        self.zarr_format = int(array.metadata.zarr_format)
        self.shape, self.ndim = tuple(map(int, array.shape)), len(array.shape)
        self.chunks = tuple(map(int, array.chunks))
        self.dtype = np.dtype(array.dtype).newbyteorder("=")

    def __getitem__(self, key: Any) -> np.ndarray:
        with readable(self.path):
            return np.asarray(self._array[key], self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[...], dtype)

    @property
    def microns(self) -> tuple[float, ...] | None:
        """Sides of a pixel in microns along those of Z, Y and X that there are, None if unknown."""
        sides = []
        for axis in "ZYX" if self.levels else "":
            if axis in self.letters:
                place = self.letters.index(axis)
                unit = MICRONS.get(str(self.axes[place].get("unit")))
                sides += [unit * self.levels[self.level].scale[place] if unit else math.nan]
        return tuple(sides) if sides and not math.isnan(sum(sides)) else None

    @property
    def file(self) -> Path:
        """The file that says of the array what it is."""
        name = MARKERS[0] if self.zarr_format == 3 else MARKERS[2]
        return Path(self.root, self._array.path, name)

    @property
    def identity(self) -> str:
        """Say which data this is without reading it: where, how many files, how large, how old."""
        folder = Path(self.root, self._array.path)
        found = [
            entry.stat()
            for place, _, names in os.walk(folder)
            for entry in (Path(place, name) for name in names)
        ]
        newest = max((one.st_mtime_ns for one in found), default=0)
        size = sum(one.st_size for one in found)
        return f"{folder.resolve()} {len(found)} {size} {newest}"


def split_zarr_path(path: Path | str) -> tuple[Path, str] | None:
    """Split the name of a Zarr folder from that of a group or an array in it, "" if it names none.

    None for another path.

    >>> split_zarr_path("a/cells.ome.zarr:1"), split_zarr_path("cells.zarr/labels/nuclei/0")
    ((PosixPath('a/cells.ome.zarr'), '1'), (PosixPath('cells.zarr'), 'labels/nuclei/0'))
    >>> split_zarr_path("cells.tif")
    """
    text = str(path)
    ends = [found.end() for found in re.finditer(r"\.zarr(?=[:/]|$)", text, re.IGNORECASE)]
    if not ends:
        return (Path(text), "") if is_node(Path(text)) else None
    if os.path.isfile(text):
        return None
    end = next((end for end in ends if is_node(Path(text[:end]))), ends[0])
    return Path(text[:end]), text[end + 1 :].strip("/")


def is_node(folder: Path) -> bool:
    """Is this folder a Zarr group or array?"""
    return any(os.path.isfile(folder / name) for name in MARKERS)


def library(path: Path | str) -> Any:
    """Return the package zarr, or say for what it is missing."""
    try:
        import zarr
    except ImportError as error:
        raise DataError(
            f"{path}: OME-Zarr needs the package zarr, which cannot be imported ({error}); install "
            "it, it is the extra `zarr`: pip install 'gdlib[zarr]'"
        ) from None
    return zarr


@contextlib.contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turn what zarr and its codecs say of a broken file into one sentence."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # codecs raise anything
        cause = sentences(error)[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read as Zarr ({cause}); {AGAIN}") from error


def open_zarr(path: Path | str) -> ZarrImage:
    """Open one level of an image of a Zarr folder without reading it.

    Args:
        path: `image.zarr`, of which the full resolution is taken; `image.zarr:1` or
            `image.zarr/1` names another one, by its path or its number from 0; or any group or
            array in the folder, as `image.zarr:labels/nuclei`.

    Raises:
        DataError: it is not there, it is no image, or its metadata make no sense.
    """
    root, inner = split_zarr_path(path) or (Path(path), "")
    zarr = library(path)
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; check its name, or put the data there")
    if not is_node(root):
        raise DataError(f"{root}: there is no Zarr in this folder ({MARKERS[0]}); {AGAIN}")
    with readable(path):
        node, group, level = _found(zarr, root, inner, path)
        if group is None:
            _check_array(node, path)
            return ZarrImage(str(path), node, root)
        return _image(zarr, node, root, group, level, path)


def _node(zarr: Any, root: Path, inner: str) -> Any:
    """Return a group or an array, None if there is none of this name."""
    if ".." in Path(inner).parts or not is_node(root / inner):
        return None
    return zarr.open(store=str(root), path=inner, mode="r")


def _found(
    zarr: Any, root: Path, inner: str, path: Path | str
) -> tuple[Any, str | None, int | str]:
    """Find the group of an image, its path, and which level of it is meant; or an array alone."""
    node = _node(zarr, root, inner)
    parent = inner.rpartition("/")[0]
    if node is None or hasattr(node, "shape"):
        while inner:  # a level of one of the groups around it, whose paths may have several parts
            group = _node(zarr, root, parent)
            if group is not None and (known := _pyramids(group)):
                names = [one.get("path") for one in _datasets(known[0], path)]
                if (name := inner[len(parent) :].strip("/")) in names:
                    return group, parent, names.index(name)
                if node is None and name.isdecimal() and int(name) < len(names):
                    return group, parent, int(name)
            if not parent:
                break
            parent = parent.rpartition("/")[0]
        if node is not None:
            return node, None, 0
        raise DataError(f'{root}: there is no group, array or level "{inner}" in it; correct it')
    if _pyramids(node):
        return node, inner, 0
    found = list(_inside(node, DEEPEST))
    if len(found) == 1:
        return (
            _node(zarr, root, f"{inner}/{found[0]}".strip("/")),
            f"{inner}/{found[0]}".strip("/"),
            0,
        )
    if not found:
        raise DataError(
            f"{path}: there is no image in this group (no `multiscales` in its metadata); name an "
            f"array in it, as in {root}:name/of/array"
        )
    listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise DataError(
        f"{path}: it is not clear which image to read, inside are {listed}; name one, as in "
        f"{root}:{f'{inner}/{found[0]}'.strip('/')}"
    )


def _inside(group: Any, depth: int) -> Iterator[str]:
    """Yield the paths of the images in a group, but for labels."""
    for name, child in sorted(group.groups(), key=lambda pair: _natural(pair[0])):
        if name == "labels" or name == "OME":
            continue
        if _pyramids(child):
            yield name
        elif depth > 1:
            yield from (f"{name}/{one}" for one in _inside(child, depth - 1))


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def about(group: Any) -> dict[str, Any]:
    """Return the OME metadata of a group: version 0.5 keeps them under a key of their own."""
    found = group.attrs.asdict()
    return found["ome"] if isinstance(found.get("ome"), dict) else found


def _pyramids(group: Any) -> Any:
    return None if hasattr(group, "shape") else about(group).get("multiscales")


def _datasets(multiscale: Any, path: Path | str) -> list[dict[str, Any]]:
    found = multiscale.get("datasets") if isinstance(multiscale, dict) else None
    if not isinstance(found, list) or not found:
        raise _unclear(path, "no `datasets`")
    if not all(isinstance(one, dict) and isinstance(one.get("path"), str) for one in found):
        raise _unclear(path, "a dataset without `path`")
    return found


def _unclear(path: Path | str, what: str) -> DataError:
    return DataError(f"{path}: the metadata `multiscales` of this image have {what}; {AGAIN}")


def _check_array(array: Any, path: Path | str) -> None:
    if array.ndim < 2 or np.dtype(array.dtype).kind not in "buif":
        raise DataError(
            f"{path}: an array of shape {tuple(array.shape)} and type {array.dtype} is no image; "
            "name another one"
        )


def _image(zarr: Any, node: Any, root: Path, group: str, first: int, path: Path | str) -> ZarrImage:
    """Return a level of an image, after a look at the metadata of it and of all below it."""
    known = _pyramids(node)
    if not isinstance(known, list):
        raise _unclear(path, "no list of pyramids")
    datasets = _datasets(known[0], path)
    arrays = []
    for one in datasets:
        array = _node(zarr, root, f"{group}/{one['path']}".strip("/"))
        if array is None or not hasattr(array, "shape"):
            raise _unclear(path, f'the level "{one["path"]}", which is not there')
        _check_array(array, path)
        if array.ndim != (arrays or [array])[0].ndim:
            raise _unclear(path, "levels of different numbers of axes")
        arrays.append(array)
    axes, letters = _axes(known[0].get("axes"), arrays[0].ndim, path)
    levels = []
    for one, array in zip(datasets, arrays, strict=True):
        ratio = [a / b for a, b in zip(arrays[0].shape, array.shape, strict=True)]
        scale, start = _transformed(one.get("coordinateTransformations"), ratio, path)
        scales, starts = _transformed(
            known[0].get("coordinateTransformations"), [1.0] * array.ndim, path
        )
        levels.append(
            Level(tuple(map(int, array.shape)), tuple(np.multiply(scale, scales).tolist()),
                  tuple((np.multiply(start, scales) + starts).tolist()))
        )  # fmt: skip
    omero = about(node).get("omero")
    channels = omero.get("channels") if isinstance(omero, dict) else None
    names = [
        str(one.get("label", "")) if isinstance(one, dict) else ""
        for one in (channels if isinstance(channels, list) else [])
    ]
    return ZarrImage(str(path), arrays[first], root, group, letters, axes, levels, first, names)


def _axes(given: Any, ndim: int, path: Path | str) -> tuple[list[dict[str, Any]], str]:
    """Return what is said of each axis, and its letter of `TCZYX`."""
    if given is None and ndim == 5:  # versions before 0.3
        given = list("tczyx")
    if not isinstance(given, list) or len(given) != ndim:
        raise _unclear(path, f"`axes` {given}, but an array of {ndim} axes")
    axes, letters = [], ""
    for one in given:
        axis = one if isinstance(one, dict) else {"name": str(one)}  # a name alone before 0.4
        name = str(axis.get("name"))
        known = name.upper() if len(name) == 1 and name.upper() in "TCZYX" else ""
        letter = known or KINDS.get(str(axis.get("type")), "")
        if not letter or letter in letters:
            raise _unclear(path, f'an axis "{name}", and axes are t, c, z, y and x, each once')
        axes.append(dict(axis))
        letters += letter
    if not set("YX") <= set(letters):
        raise _unclear(path, f"the axes {letters}, without y and x")
    return axes, letters


def _transformed(
    given: Any, scale: Sequence[float], path: Path | str
) -> tuple[list[float], list[float]]:
    """Return scale and translation; the scale that is given here where the file has none."""
    found = {"scale": list(scale), "translation": [0.0] * len(scale)}
    for one in given or []:
        kind = one.get("type") if isinstance(one, dict) else None
        values = one.get(kind) if kind in found else None
        if (
            not isinstance(values, list)
            or len(values) != len(scale)
            or not all(isinstance(v, int | float) and math.isfinite(v) for v in values)
            or (kind == "scale" and min(values) <= 0)
        ):
            raise _unclear(
                path, f"the transformation {one}: a `scale` has one number above 0 per axis"
            )
        found[kind] = [float(value) for value in values]
    return found["scale"], found["translation"]
