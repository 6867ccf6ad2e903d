"""The mutex watershed: Wolf et al., The Mutex Watershed, ECCV 2018 (numpy only).

Affinities as networks give them here have 256 levels, and edges of few levels need no sorting: they
are counted, and visited level by level, in time that grows with their number. Others are left to
bioimage-cpp, which sorts. The result is the same.
"""

from collections.abc import Sequence

import bioimage_cpp as bic
import numpy as np
from scipy.ndimage import find_objects

from gdlib import jit, limits

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
        stride: repulsive edges count at every so many pixels of the last two axes, from where the
            mask begins.
        exponent: power of the affinities that attract.

    Returns:
        ([Z,] Y, X) int64, numbers above 0 that grow in the order in which segments are met, 0
        outside of the mask.

    Raises:
        ValueError: a stride or exponent out of range, or shapes that do not fit: compiled code
            would not notice.
    """
    stride = limits.checked("stride", limits.Stride, stride)
    exponent = limits.checked("exponent", limits.Positive, exponent)
    if (len(offsets), *mask.shape) != affinity.shape or {len(offset) for offset in offsets} != {
        mask.ndim
    }:
        raise ValueError(
            f"affinities of shape {affinity.shape} do not fit {len(offsets)} offsets "
            f"{list(map(list, offsets))} and a mask of shape {mask.shape}"
        )
    box = next(iter(find_objects(mask.view(np.uint8))), None)
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
    least = 100  # of what gives away small segments
    return max(least, 44 + 9 * edges)


def as_float(array: np.ndarray) -> np.ndarray:
    """Return a new float32 array in [0, 1] of one that may be uint8."""
    return (
        np.divide(array, np.float32(255)) if array.dtype == np.uint8 else array.astype(np.float32)
    )


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
    levels = np.arange(256, dtype=np.uint8)
    weight = _weights(np.stack([levels, levels]), 1, exponent)
    turn = np.unique(-weight, return_inverse=True)[1]
    new = (1,) * (3 - mask.ndim)  # 2D is one section
    label = _watershed(
        np.ascontiguousarray(affinity).reshape(len(offsets), *new, *mask.shape),
        np.ascontiguousarray(mask).reshape(*new, *mask.shape),
        np.pad(np.array(offsets, np.int64), ((0, 0), (len(new), 0))),
        np.where(np.arange(len(offsets)) < mask.ndim, 1, stride),
        turn.reshape(2, 256).astype(np.int64),
        mask.ndim,
    )
    return label.reshape(mask.shape)


# --- Compiled -------------------------------------------------------------------------------------
#
# A segment is a tree of pixels. Its root keeps a list of the segments that it must not join; two
# segments that join hang their lists one behind the other, and whoever reads a list takes out what
# has become the same meanwhile.

NONE = np.uint32(0xFFFFFFFF)
ONE = np.uint32(1)
SHORT = np.uint32(16)  # a list in which nobody looks for equal items
# Of a root: first and last item of its list, how many, when to look for equal ones, and the last
# reading that met this segment.
SEGMENT = np.dtype([(name, np.uint32) for name in ("head", "tail", "count", "limit", "seen")])
# Of a list: a pixel of the other segment, and the next item.
ITEM = np.dtype([(name, np.uint32) for name in ("other", "next")])
# The first item that is free again, the first that was never used, and the number of the last
# reading of a list.
STATE = np.dtype([(name, np.uint32) for name in ("free", "unused", "reading")])


@jit.kernel
def _watershed(affinity, mask, offsets, strides, turns, attractive):
    """Label the mask.

    Args:
        affinity: (K, Z, Y, X) uint8.
        mask: (Z, Y, X) boolean.
        offsets: (K, 3).
        strides: (K,), along y and x.
        turns: (2, 256): when edges of a level are visited, attractive and repulsive ones.
        attractive: how many of the first channels are.

    Returns:
        (Z, Y, X) int64: 1, 2, ... as segments are met, 0 outside of the mask.
    """
    channels, _, height, width = affinity.shape
    # Edges have a bin for each turn, and in it for each channel.
    bins = np.empty((channels, 256), np.uint32)
    for k in range(channels):
        bins[k] = turns[int(k >= attractive)] * channels + k
    begin = np.zeros(bins.max() + 2, np.int64)
    nothing = np.empty(0, np.uint32)
    for k in range(channels):
        _bin_edges(affinity[k], mask, offsets[k], strides[k], bins[k], begin[1:], nothing)
    begin = begin.cumsum()
    edges = np.empty(begin[-1], np.uint32)  # first pixels
    end = begin.copy()
    for k in range(channels):
        _bin_edges(affinity[k], mask, offsets[k], strides[k], bins[k], end, edges)

    pixels = mask.size
    # The pixel above in the tree; of a root, minus its number of pixels.
    parent = np.full(pixels, -1, np.int32)
    segments = np.zeros(pixels, SEGMENT)
    for p in range(pixels):
        segments[p].head, segments[p].limit = NONE, SHORT
    items = np.empty(0, ITEM)
    state = np.zeros(1, STATE)
    state[0].free = NONE
    for bin in range(len(begin) - 1):
        k = bin % channels
        shift = (offsets[k, 0] * height + offsets[k, 1]) * width + offsets[k, 2]
        for i in range(begin[bin], begin[bin + 1]):
            u = _find(parent, edges[i])
            v = _find(parent, np.uint32(edges[i] + shift))
            if u == v:
                continue
            if k < attractive:
                _attract(parent, segments, items, state, u, v)
            else:
                if state[0].unused + 2 > len(items):
                    items = _more(items)
                _forbid(parent, segments, items, state, u, v)
                _forbid(parent, segments, items, state, v, u)

    number = segments.seen
    number[:] = 0
    last = np.uint32(0)
    label = np.zeros(pixels, np.int64)
    inside = mask.ravel()
    for p in range(pixels):
        if inside[p]:
            root = _find(parent, np.uint32(p))
            if number[root] == 0:
                last += ONE
                number[root] = last
            label[p] = number[root]
    return label.reshape(mask.shape)


@jit.part
def _bin_edges(affinity, mask, offset, stride, bins, place, edges):
    """Count the edges of a channel in their bins; put them where `place` says, if there is room."""
    depth, height, width = mask.shape
    dz, dy, dx = offset
    start_y = _first(dy, stride)
    start, end = _first(dx, stride), min(width, width - dx)
    if start >= end:
        return
    for z in range(max(0, -dz), min(depth, depth - dz)):
        for y in range(start_y, min(height, height - dy), stride):
            here = mask[z, y, start:end:stride]
            there = mask[z + dz, y + dy, start + dx : end + dx : stride]
            level = affinity[z, y, start:end:stride]
            first = (z * height + y) * width + start
            for i in range(len(here)):
                if here[i] and there[i]:
                    bin = bins[level[i]]
                    if len(edges):
                        edges[place[bin]] = first + i * stride
                    place[bin] += 1


@jit.inlined
def _first(d, stride):
    """Return the first multiple of the stride whose neighbour at distance d is inside the image."""
    return (max(0, -d) + stride - 1) // stride * stride


@jit.inlined
def _find(parent, u):
    """Return the root of a pixel's tree, and make the way there shorter."""
    while parent[u] >= 0:
        above = np.uint32(parent[u])
        if parent[above] < 0:
            u = above
        else:
            parent[u] = parent[above]
            u = np.uint32(parent[above])
    return u


@jit.inlined
def _attract(parent, segments, items, state, u, v):
    """Join two segments, unless they must not."""
    if segments[u].count >= segments[v].count:  # the shorter list is read
        u, v = v, u
    if segments[u].count != 0 and _forbids(parent, segments, items, state, u, v):
        return
    if parent[u] > parent[v]:
        u, v = v, u
    parent[u] += parent[v]
    parent[v] = u
    if segments[v].head != NONE:
        if segments[u].head == NONE:
            segments[u].tail = segments[v].tail
        else:
            items[segments[v].tail].next = segments[u].head
        segments[u].head = segments[v].head
        segments[u].count += segments[v].count
        segments[u].limit = max(segments[u].limit, segments[v].limit)
        _shrink(parent, segments, items, state, u)


@jit.inlined
def _forbid(parent, segments, items, state, u, v):
    """Put v in the list of u."""
    head = segments[u].head
    if head == NONE or items[head].other != v:
        _put(segments, items, state, u, v)
        _shrink(parent, segments, items, state, u)


@jit.inlined
def _put(segments, items, state, u, v):
    item = state[0].free
    if item == NONE:
        item = state[0].unused
        state[0].unused += ONE
    else:
        state[0].free = items[item].next
    items[item].other = v
    items[item].next = segments[u].head
    if segments[u].head == NONE:
        segments[u].tail = item
    segments[u].head = item
    segments[u].count += ONE


@jit.inlined
def _shrink(parent, segments, items, state, u):
    """Take out equal items when a list has become long."""
    if segments[u].count > segments[u].limit:
        _forbids(parent, segments, items, state, u, NONE)
        segments[u].limit = max(SHORT, np.uint32(2) * segments[u].count)


@jit.part
def _forbids(parent, segments, items, state, u, v):
    """Tell whether v is in the list of u, which gets shorter; what is found comes first."""
    if state[0].reading == NONE:  # all numbers were used
        segments.seen[:] = 0
        state[0].reading = 0
    state[0].reading += ONE
    reading = state[0].reading
    item, before = segments[u].head, NONE
    while item != NONE:
        after, other = items[item].next, _find(parent, items[item].other)
        found = other == v
        if found or segments[other].seen == reading:
            if before == NONE:
                segments[u].head = after
            else:
                items[before].next = after
            if segments[u].tail == item:
                segments[u].tail = before
            segments[u].count -= ONE
            items[item].next = state[0].free
            state[0].free = item
            if found:
                _put(segments, items, state, u, v)
                return True
        else:
            segments[other].seen = reading
            items[item].other = other
            before = item
        item = after
    return False


@jit.part
def _more(items):
    """Return twice as many items."""
    had = len(items)
    have = max(1024, min(2 * had, int(NONE)))
    if have < had + 2:  # there is no number for one more
        raise MemoryError
    more = np.empty(have, ITEM)
    more[:had] = items
    return more
