"""The mutex watershed: Wolf et al., The Mutex Watershed, ECCV 2018.

Affinities as networks give them here have 256 levels, and edges of few levels need no sorting: they
are counted, and visited level by level, in time that grows with their number
(`gdlib.segment.counting`). Others are left to bioimage-cpp, which sorts. The result is the same.
"""

from collections.abc import Sequence

import bioimage_cpp as bic
import numpy as np

from gdlib import limits
from gdlib.boxes import Box

MOST_PIXELS = 2**31  # of what is counted: a segment's size has 31 bits


def mutex_watershed(
    affinity: np.ndarray,
    mask: np.ndarray,
    offsets: Sequence[Sequence[int]],
    stride: int = 1,
    exponent: float = 1.0,
) -> np.ndarray:
    """Visit all edges, the strongest first: short ones attract with a, long ones repel with 1 - a.

    Edges that leave the mask do not count. Of equal ones, those of the first channel come first,
    and in it those of the first pixel.

    Args:
        affinity: (K, [Z,] Y, X), uint8 in [0, 255] or float in [0, 1]; the first n channels (n =
            number of axes) attract.
        mask: ([Z,] Y, X) boolean, what to partition.
        offsets: K displacements in array order.
        stride: repulsive edges count where both places in the last two axes are multiples of it.
        exponent: power of the affinities that attract.

    Returns:
        ([Z,] Y, X) int64, numbers above 0 that grow in the order in which segments are met, 0
        outside of the mask.

    Raises:
        ValueError: a stride or exponent out of range, or shapes that do not fit: compiled code
            would not notice.
    """
    from gdlib import jit  # takes a fifth of a second, and a configuration needs none

    stride = limits.checked("stride", limits.Stride, stride)
    exponent = limits.checked("exponent", limits.Positive, exponent)
    if (len(offsets), *mask.shape) != affinity.shape or {len(offset) for offset in offsets} != {
        mask.ndim
    }:
        raise ValueError(
            f"affinities of shape {affinity.shape} do not fit {len(offsets)} offsets "
            f"{list(map(list, offsets))} and a mask of shape {mask.shape}"
        )
    box = _around(mask, stride)
    label = np.zeros(mask.shape, np.int64)
    if box is not None:
        counted = jit.ENABLED and affinity.dtype == np.uint8 and mask[box].size < MOST_PIXELS
        partition = _by_counting if counted else _by_sorting
        try:
            label[box] = partition(
                affinity[(slice(None), *box)], mask[box], offsets, stride, exponent
            )
        except MemoryError:
            raise MemoryError(
                f"the mutex watershed of {' x '.join(map(str, mask[box].shape))} pixels"
            ) from None
    return label


def memory(ndim: int, channels: int, *, stride: int = 1, **_: float) -> float:
    """Return how many bytes per pixel it takes besides what it is given, if all pixels are
    foreground (measured).
    """
    edges = ndim + (channels - ndim) / stride**2  # of a pixel
    least = 100  # of what gave away small segments before; the loops that do so now need less
    return max(least, 44 + 9 * edges)


def as_float(array: np.ndarray) -> np.ndarray:
    """Return a new float32 array in [0, 1] of one that may be uint8."""
    return (
        np.divide(array, np.float32(255)) if array.dtype == np.uint8 else array.astype(np.float32)
    )


def _around(mask: np.ndarray, stride: int) -> Box | None:
    """Return the smallest box with all of a mask that begins at a multiple of the stride in the
    last two axes; None if there is nothing in it.
    """
    box = []
    for axis in range(mask.ndim):
        others = tuple(k for k in range(mask.ndim) if k != axis)
        there = np.flatnonzero(mask.any(others))
        if not there.size:
            return None
        first, step = int(there[0]), stride if axis >= mask.ndim - 2 else 1
        box.append(slice(first - first % step, int(there[-1]) + 1))
    return tuple(box)


def _weights(affinity: np.ndarray, attractive: int, exponent: float) -> np.ndarray:
    """Return how strong edges are, float32, the first channels being attractive."""
    weight = as_float(affinity)
    np.subtract(1, weight[attractive:], out=weight[attractive:])
    if exponent != 1:
        np.power(weight[:attractive], np.float32(exponent), out=weight[:attractive])
    return weight


def _by_sorting(
    affinity: np.ndarray,
    mask: np.ndarray,
    offsets: Sequence[Sequence[int]],
    stride: int,
    exponent: float,
) -> np.ndarray:
    weight = _weights(affinity, mask.ndim, exponent)
    strides = (1,) * (mask.ndim - 2) + (stride,) * 2
    return bic.segmentation.mutex_watershed(weight, offsets, mask.ndim, strides=strides, mask=mask)


def _by_counting(
    affinity: np.ndarray,
    mask: np.ndarray,
    offsets: Sequence[Sequence[int]],
    stride: int,
    exponent: float,
) -> np.ndarray:
    from gdlib.segment import counting

    levels = np.arange(256, dtype=np.uint8)
    weight = _weights(np.stack([levels, levels]), 1, exponent)
    turn = np.unique(-weight, return_inverse=True)[1]
    new = (1,) * (3 - mask.ndim)  # 2D is one section
    label = counting.watershed(
        np.ascontiguousarray(affinity).reshape(len(offsets), *new, *mask.shape),
        np.ascontiguousarray(mask).reshape(*new, *mask.shape),
        np.pad(np.array(offsets, np.int64), ((0, 0), (len(new), 0))),
        np.where(np.arange(len(offsets)) < mask.ndim, 1, stride),
        turn.reshape(2, 256).astype(np.int64),
        mask.ndim,
    )
    return label.reshape(mask.shape)
