"""Axes of one pixel, which files may have anywhere, dropped without reading or copying the
array.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Ends a sentence about a volume that was read as channels.
SECTIONS = "; the sections of a volume are no channels: save them with axes ZYX"


def kept_axes(shape: Sequence[int], ndim: int) -> list[int]:
    """Return the axes that are left when axes of one pixel are dropped, from the first on, until
    there are no more than `ndim`.

    >>> kept_axes((1, 30, 1, 20), 2), kept_axes((1, 1, 30, 20), 3), kept_axes((5, 30, 20), 2)
    ([1, 3], [1, 2, 3], [0, 1, 2])
    """
    surplus = max(0, len(shape) - ndim)
    single = [axis for axis, n in enumerate(shape) if n == 1][:surplus]
    return [axis for axis in range(len(shape)) if axis not in single]


class View:
    """A dataset on disk seen without some of its axes, and with a first axis of one channel if
    wanted.

    Args:
        array: the dataset; parts of it are read by integers and slices.
        kept: its other axes, in the order wanted.
        channel: add the axis.
        at: of axes that are left out, which pixel is seen; the first if it is not said.
    """

    def __init__(
        self,
        array: Any,
        kept: Sequence[int],
        *,
        channel: bool = False,
        at: Mapping[int, int] | None = None,
    ) -> None:
        self.array = array
        self.kept, self.at = list(kept), dict(at or {})
        self.channel = channel
        self.dtype = array.dtype
        self.shape = (1,) * channel + tuple(array.shape[axis] for axis in kept)
        self.ndim = len(self.shape)
        self.chunks = array.chunks and (1,) * channel + tuple(array.chunks[axis] for axis in kept)

    def __getitem__(self, key: Any) -> np.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        first, key = (key[0], key[1:]) if self.channel and key else (slice(None), key)
        inside: list[int | slice] = [self.at.get(axis, 0) for axis in range(self.array.ndim)]
        for place, axis in enumerate(self.kept):
            inside[axis] = key[place] if place < len(key) else slice(None)
        left = [axis for axis in self.kept if isinstance(inside[axis], slice)]
        part = self.array[tuple(inside)].transpose([sorted(left).index(axis) for axis in left])
        return part[None][first] if self.channel else part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)


def fitted(array: np.ndarray, ndim: int, leading: int = 0) -> np.ndarray:
    """Return an array without surplus axes of one pixel.

    Args:
        array: any.
        ndim: number of axes wanted; other axes than of one pixel stay, however many there are.
        leading: so many axes before these stay in any case.
    """
    kept = kept_axes(array.shape[leading:], ndim)
    return array.reshape(*array.shape[:leading], *(array.shape[leading + axis] for axis in kept))


def without_single_axes(array: Any) -> np.ndarray | View:
    """Return an array, or a dataset on disk, without any axis of one pixel."""
    if isinstance(array, np.ndarray):
        return fitted(array, 0)
    return View(array, kept_axes(array.shape, 0))
