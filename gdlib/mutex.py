"""The mutex watershed of bioimage-cpp, piece by piece: the same result in a fraction of the time (numpy only)."""

from collections.abc import Sequence

import bioimage_cpp as bic
import numpy as np
from scipy.ndimage import find_objects

MOST_PIECES = 1000


def mutex_watershed(
    affinity: np.ndarray, mask: np.ndarray, offsets: Sequence[Sequence[int]], stride: int = 1, exponent: float = 1.0
) -> np.ndarray:
    """Visit all edges, the strongest first: short ones attract with a, long ones repel with 1 - a.

    Edges that leave the mask do not count. No edge between two pieces of it that do not touch can change the result, and most
    of the time goes into sorting: so every piece is sorted alone, where its numbers stay in the cache.

    Args:
        affinity: (K, [Z,] Y, X), uint8 in [0, 255] or float in [0, 1]; the first n channels (n = number of axes) attract.
        mask: ([Z,] Y, X) boolean, what to partition.
        offsets: K displacements in array order.
        stride: repulsive edges count at every so many pixels of the last two axes, from where the mask begins.
        exponent: power of the affinities that attract.

    Returns:
        ([Z,] Y, X) int64, numbers above 0 that grow in the order in which segments are met, 0 outside of the mask.
    """
    ndim = mask.ndim
    pieces = _pieces(mask) if (np.abs(offsets[:ndim]).sum(1) == 1).all() else mask.view(np.uint8)
    boxes = find_objects(pieces)
    origin = [min(slices).start for slices in zip(*boxes, strict=True)]
    strides = (1,) * (ndim - 2) + (int(stride),) * 2  # sections are few and far apart: none is left out
    label = np.zeros(mask.shape, np.int64)
    count = 0
    for k, box in enumerate(boxes, 1):
        box = tuple(slice(s.start - (s.start - o) % d, s.stop) for s, o, d in zip(box, origin, strides, strict=True))
        inside = pieces[box] == k
        weight = as_float(affinity[(slice(None), *box)])
        np.subtract(1, weight[ndim:], out=weight[ndim:])
        if exponent != 1:
            np.power(weight[:ndim], np.float32(exponent), out=weight[:ndim])
        found = bic.segmentation.mutex_watershed(weight, offsets, ndim, strides=strides, mask=inside)[inside]
        label[box][inside] = found.astype(np.int64) + count
        count += int(found.max())
    return label if len(boxes) < 2 else _in_order(label, mask, count)


def as_float(array: np.ndarray) -> np.ndarray:
    """Return a new float32 array in [0, 1] of one that may be uint8."""
    return np.divide(array, np.float32(255)) if array.dtype == np.uint8 else array.astype(np.float32)


def _pieces(mask: np.ndarray) -> np.ndarray:
    """Number the pieces of a mask that touch, from 1.

    Beyond `MOST_PIECES`, the smallest have one number together: there is a price for each.
    """
    if mask.all():
        return mask.view(np.uint8)
    pieces = bic.segmentation.label(mask, connectivity=1).astype(np.int32)
    size = np.bincount(pieces.ravel())
    if len(size) - 1 <= MOST_PIECES:
        return pieces
    number = np.full(len(size), MOST_PIECES, np.int32)
    number[1 + np.argsort(-size[1:], kind="stable")[: MOST_PIECES - 1]] = np.arange(1, MOST_PIECES)
    number[0] = 0
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
