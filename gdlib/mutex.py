"""The mutex watershed: Wolf et al., The Mutex Watershed, ECCV 2018 (numpy only).

Affinities as networks give them here have 256 levels, and edges of few levels need no sorting: `mutex.cpp` counts them. For
other affinities, and without a compiler, bioimage-cpp does it, piece by piece. The result is the same.
"""

import ctypes
from collections.abc import Sequence

import bioimage_cpp as bic
import numpy as np
from scipy.ndimage import find_objects

from gdlib import compiled, limits

MOST_PIECES = 1000
TILE = {2: 1024, 3: 128}  # sides, in pixels, of where the smallest pieces are one
MOST_PIXELS = 2**31  # of `mutex.cpp`, where a segment's size has 31 bits


def mutex_watershed(
    affinity: np.ndarray, mask: np.ndarray, offsets: Sequence[Sequence[int]], stride: int = 1, exponent: float = 1.0
) -> np.ndarray:
    """Visit all edges, the strongest first: short ones attract with a, long ones repel with 1 - a.

    Edges that leave the mask do not count. Of equal ones, those of the first channel come first, and in it those of the first
    pixel.

    Args:
        affinity: (K, [Z,] Y, X), uint8 in [0, 255] or float in [0, 1]; the first n channels (n = number of axes) attract.
        mask: ([Z,] Y, X) boolean, what to partition.
        offsets: K displacements in array order.
        stride: repulsive edges count at every so many pixels of the last two axes, from where the mask begins.
        exponent: power of the affinities that attract.

    Returns:
        ([Z,] Y, X) int64, numbers above 0 that grow in the order in which segments are met, 0 outside of the mask.

    Raises:
        ValueError: a stride or exponent out of range, or shapes that do not fit: compiled code would not notice.
    """
    stride = limits.checked("stride", limits.Stride, stride)
    exponent = limits.checked("exponent", limits.Positive, exponent)
    if (len(offsets), *mask.shape) != affinity.shape or {len(offset) for offset in offsets} != {mask.ndim}:
        raise ValueError(
            f"affinities of shape {affinity.shape} do not fit {len(offsets)} offsets {list(map(list, offsets))} and a mask of "
            f"shape {mask.shape}"
        )
    box = next(iter(find_objects(mask.view(np.uint8))), None)
    label = np.zeros(mask.shape, np.int64)
    if box is not None:
        fast = affinity.dtype == np.uint8 and mask[box].size < MOST_PIXELS and _library() is not None
        partition = _by_counting if fast else _piece_by_piece
        label[box] = partition(affinity[(slice(None), *box)], mask[box], offsets, stride, exponent)
    return label


def memory(ndim: int, channels: int, *, stride: int = 1, **_: float) -> float:
    """Return how many bytes per pixel it takes besides what it is given, if all pixels are foreground (measured)."""
    edges = ndim + (channels - ndim) / stride**2  # of a pixel
    least = 100  # of what gives away small segments
    return max(least, 44 + 9 * edges if _library() is not None else 30 + 58 * edges)


def _library() -> ctypes.CDLL | None:
    return compiled.library("mutex", "the mutex watershed runs")


def _by_counting(
    affinity: np.ndarray, mask: np.ndarray, offsets: Sequence[Sequence[int]], stride: int, exponent: float
) -> np.ndarray:
    """Call `mutex.cpp`; affinities are uint8."""
    levels = np.arange(256, dtype=np.uint8)
    weight = _weights(np.stack([levels, levels]), 1, exponent)
    strengths, turn = np.unique(-weight, return_inverse=True)
    more = 3 - mask.ndim
    sides = np.array((*(1,) * more, *mask.shape), np.int64)
    displacements = np.pad(np.array(offsets, np.int64), ((0, 0), (more, 0)))
    turns = turn.astype(np.int64).ravel()
    maps = np.ascontiguousarray(affinity), np.ascontiguousarray(mask)
    label = np.empty(mask.shape, np.int64)
    given = sides, len(offsets), mask.ndim, displacements, stride, *maps, turns, len(strengths), label
    if not _library().mutex_watershed(*map(_argument, given)):
        raise MemoryError(f"the mutex watershed of {' x '.join(map(str, mask.shape))} pixels")
    return label


def _argument(value: np.ndarray | int) -> ctypes.c_void_p | ctypes.c_int64:
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_void_p(value.ctypes.data)


def _piece_by_piece(
    affinity: np.ndarray, mask: np.ndarray, offsets: Sequence[Sequence[int]], stride: int, exponent: float
) -> np.ndarray:
    """Call bioimage-cpp.

    No edge between two pieces of the mask that do not touch can change the result, and most of the time goes into sorting: so
    every piece is sorted alone, where its numbers stay in the cache.
    """
    ndim = mask.ndim
    pieces = _pieces(mask) if (np.abs(offsets[:ndim]).sum(1) == 1).all() else mask.view(np.uint8)
    strides = (1,) * (ndim - 2) + (stride,) * 2
    label = np.zeros(mask.shape, np.int64)
    count = 0
    for k, box in enumerate(find_objects(pieces), 1):
        box = tuple(slice(s.start - s.start % d, s.stop) for s, d in zip(box, strides, strict=True))
        inside = pieces[box] == k
        weight = _weights(affinity[(slice(None), *box)], ndim, exponent)
        found = bic.segmentation.mutex_watershed(weight, offsets, ndim, strides=strides, mask=inside)[inside]
        label[box][inside] = found.astype(np.int64) + count
        count += int(found.max())
    return _in_order(label, mask, count)


def _weights(affinity: np.ndarray, attractive: int, exponent: float) -> np.ndarray:
    """Return how strong edges are, float32, the first channels being attractive."""
    weight = as_float(affinity)
    np.subtract(1, weight[attractive:], out=weight[attractive:])
    if exponent != 1:
        np.power(weight[:attractive], np.float32(exponent), out=weight[:attractive])
    return weight


def as_float(array: np.ndarray) -> np.ndarray:
    """Return a new float32 array in [0, 1] of one that may be uint8."""
    return np.divide(array, np.float32(255)) if array.dtype == np.uint8 else array.astype(np.float32)


def _pieces(mask: np.ndarray) -> np.ndarray:
    """Number the pieces of a mask that touch, from 1.

    Beyond `MOST_PIECES`, the smallest that begin in the same tile have one number together: there is a price for each, and for
    the box around all of them another.
    """
    if mask.all():
        return mask.view(np.uint8)
    pieces = bic.segmentation.label(mask, connectivity=1).astype(np.int32)
    size = np.bincount(pieces.ravel())
    if len(size) - 1 <= MOST_PIECES:
        return pieces
    smallest = 1 + np.argsort(-size[1:], kind="stable")[MOST_PIECES - 1 :]
    tile = np.array([[s.start for s in box] for box in find_objects(pieces)])[smallest - 1] // TILE[mask.ndim]
    number = np.arange(len(size))
    number[smallest] = len(size) + np.unique(tile, axis=0, return_inverse=True)[1].ravel()
    number = np.unique(number, return_inverse=True)[1].astype(np.int32)  # without gaps; the background stays 0
    return number[pieces]


def _in_order(label: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Number labels as they are met."""
    ids = label[mask]
    first = np.full(count + 1, len(ids))
    first[ids[::-1]] = np.arange(len(ids))[::-1]
    number = np.empty(count + 1, np.int64)
    number[1 + np.argsort(first[1:])] = np.arange(1, count + 1)
    label[mask] = number[ids]
    return label
