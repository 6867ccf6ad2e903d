"""What a network sees at once of an image that has more: time, sections of a stack, one of several
channels.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from gdlib.data.axes import View
from gdlib.io.failures import DataError
from gdlib.registry import nearest

COLOURS = ("red", "green", "blue")


class Frames:
    """An array, or a dataset on disk, seen frame by frame.

    Args:
        array: parts of it are read by integers and slices.
        axes: a letter of `TCZYX` for each axis, in any order.
        ndim: axes that the network sees at once: 2 (Y, X) or 3 (Z, Y, X).
        channel: the only one to be seen, counted from 0; all if left out.

    Attributes:
        axes: letters of the frames, of `TZ`.
        shape: how many there are along these axes; () for one frame.
        sides: ([Z,] Y, X) of a frame.
        channels: of a frame.

    Raises:
        DataError: the letters are not those of an image.
    """

    def __init__(self, array: Any, axes: str, ndim: int, channel: int | None = None) -> None:
        own, axes = "ZYX"[-ndim:], axes.upper()
        known = sorted(set(axes)) == sorted(axes) and set(own) <= set(axes) <= set("TCZYX")
        if "T" in axes and "Z" in set(own) - set(axes):
            raise DataError(
                f"an image of shape {tuple(array.shape)}, axes {axes}, is a time series without "
                "depth, which this network wants; choose a 2D network, or, if these are the "
                f"sections of a volume, say so by the axes {axes.replace('T', 'Z')}"
            )
        if not known or len(axes) != array.ndim:
            raise DataError(
                f"an image of shape {tuple(array.shape)} does not have the axes {axes}; give a "
                "letter of TCZYX for each axis, once, "
                f"with {' and '.join(own)} among them, as in axes={f'C{own}'!r}"
            )
        self._array, self._letters, self._own = array, axes, own
        sizes = dict(zip(axes, array.shape, strict=True))
        if channel is not None and channel >= sizes.get("C", 1):
            raise DataError(
                f"an image of shape {tuple(array.shape)}, axes {axes}, has no channel {channel + 1}"
            )
        self._channel = slice(None) if channel is None else slice(channel, channel + 1)
        self.axes = "".join(axis for axis in "TZ" if axis in axes and axis not in own)
        self.shape = tuple(sizes[axis] for axis in self.axes)
        self.sides = tuple(sizes[axis] for axis in own)
        self.channels = sizes.get("C", 1) if channel is None else 1

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray | View:
        """Return one frame, (C, [Z,] Y, X); of a dataset on disk, without reading it."""
        if not isinstance(self._array, np.ndarray):
            return self._view(index)
        where = dict(zip(self.axes, index, strict=True)) | {"C": self._channel}
        frame = self._array[tuple(where.get(axis, slice(None)) for axis in self._letters)]
        left = [axis for axis in self._letters if axis not in self.axes]
        if "C" not in left:
            return frame.transpose([left.index(axis) for axis in self._own])[None]
        return frame.transpose([left.index(axis) for axis in ("C", *self._own)])

    def _view(self, index: tuple[int, ...]) -> View:
        at = dict(zip(self.axes, index, strict=True))
        one = "C" not in self._letters or self._channel != slice(None)
        if "C" in self._letters and one:
            at["C"] = self._channel.start
        kept = [self._letters.index(axis) for axis in ("C" * (not one) + self._own)]
        where = {self._letters.index(axis): place for axis, place in at.items()}
        return View(self._array, kept, channel=one, at=where)


def named(shape: Sequence[int], axes: str, ndim: int) -> tuple[list[int], str]:
    """Say which axes of a file are which, so that `Frames` understands them.

    Args:
        shape: of the array.
        axes: letters of the file as of `gdlib.data.tiff.read_tiff`, "" if it has none.
        ndim: axes that the network sees at once.

    Returns:
        The axes that stay (those of one pixel need not), and their letters of `TCZYX`. An axis
        without a name is depth for a network that sees depth, else time, the last two are Y and X.

    >>> named((5, 1, 30, 20), "QQYX", 2), named((5, 30, 20), "QYX", 3), named((30, 20, 3), "YXS", 2)
    (([0, 2, 3], 'TYX'), ([0, 1, 2], 'ZYX'), ([0, 1, 2], 'YXC'))
    """
    axes = axes.replace("S", "C") or "Q" * (len(shape) - 2) + "YX"
    kept = [k for k, n in enumerate(shape) if n > 1 or axes[k] in "ZYX"[-ndim:]]
    letters = [axes[k] for k in kept]
    free = [axis for axis in ("ZTC" if ndim == 3 else "TZC") if axis not in letters]
    for place, letter in enumerate(letters):
        if letter not in "TCZYX" and free:
            letters[place] = free.pop(0)
    return kept, "".join(letters)


def channel_number(text: str, names: Sequence[str], count: int) -> int:
    """Return which channel is meant, counted from 0.

    Args:
        text: a number from 1 on, or a name.
        names: of the channels, as far as they are known.
        count: how many there are.

    >>> channel_number("2", [], 3), channel_number("dapi", ["GFP", "DAPI"], 2)
    (1, 1)
    """
    if text.isdecimal() and 1 <= int(text) <= count:
        return int(text) - 1
    found = [k for k, name in enumerate(names) if name.casefold() == text.casefold()]
    if found and found[0] < count:
        return found[0]
    hint = nearest(text, list(names)) if names else "its channels have no names"
    raise DataError(f'there is no channel "{text}" of {count}: {hint}; give a number from 1 on')


def channel_names(path: Path) -> list[str]:
    """Return what an OME-TIFF or ImageJ TIFF calls its channels, and colours of other images."""
    import tifffile

    if path.suffix.lower() == ".png":
        return list(COLOURS)
    with tifffile.TiffFile(path) as file:
        if file.is_ome and file.ome_metadata:
            image = next(
                (e for e in ElementTree.fromstring(file.ome_metadata).iter() if _is(e, "Pixels")),
                (),
            )
            return [channel.get("Name", "") for channel in image if _is(channel, "Channel")]
        about = file.imagej_metadata or {}
        if "Labels" in about:  # of all planes, the channels of the first come first
            labels = about["Labels"][: int(about.get("channels", 1))]
            return [re.sub(r"^c:\d+/\d+\s*(?:[zt]:\d+/\d+\s*)*(?:- )?", "", one) for one in labels]
        return list(COLOURS) if "S" in file.series[0].axes else []


def _is(element: ElementTree.Element, name: str) -> bool:
    return element.tag.rpartition("}")[2] == name
