"""The mutex watershed of edges that are counted: its loops, compiled.

A segment is a tree of pixels. Its root keeps a list of the segments that it must not join; two
segments that join hang their lists one behind the other, and whoever reads a list takes out what
has become the same meanwhile.
"""

import numpy as np

from gdlib import jit

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
def watershed(affinity, mask, offsets, strides, turns, attractive):
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
    segments = np.empty(pixels, SEGMENT)
    inside = mask.ravel()
    for p in range(pixels):
        if inside[p]:
            segments[p].head, segments[p].limit = NONE, SHORT
            segments[p].count = segments[p].seen = 0
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

    number = np.zeros(pixels, np.uint32)
    last = np.uint32(0)
    label = np.zeros(pixels, np.int64)
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
