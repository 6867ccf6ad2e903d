"""Small segments, given to larger ones that they touch: the loops, compiled.

They go level by level: a pixel of a small segment that has neighbours in a larger one becomes part
of it, then its neighbours in small ones, and so on. Of several larger ones it takes the first in
the order of the neighbours: that of the array within a section, then other sections, which are
farther away in most volumes. What has no way to a larger one stays.
"""

import numpy as np

from gdlib import jit


def given_away(label: np.ndarray, small: np.ndarray) -> np.ndarray:
    """Give small segments away.

    Args:
        label: ([Z,] Y, X) int64, contiguous, 0 = background, 1, 2, ... = segments; it is
            overwritten.
        small: (largest number + 1,) boolean, which segments are; not the background.

    Returns:
        The label.
    """
    sections = label.reshape((1,) * (3 - label.ndim) + label.shape)  # 2D is one section
    give = _give if jit.ENABLED else _give_plainly
    give(sections, small)
    return label


def sizes(label: np.ndarray) -> np.ndarray:
    """Return how many pixels each number of a label has, as `np.bincount` does.

    Args:
        label: any shape, int64, contiguous, not negative.
    """
    flat = label.ravel()
    return _sizes(flat) if jit.ENABLED else np.bincount(flat)


@jit.kernel
def _sizes(flat):
    largest = np.int64(-1)
    for number in flat:
        largest = max(largest, number)
    size = np.zeros(largest + 1, np.int64)
    for number in flat:
        size[number] += 1
    return size


@jit.kernel
def _give(label, small):
    depth, height, width = label.shape
    shifts = (-width, -1, 1, width, -height * width, height * width)
    flat = label.ravel()
    found = np.zeros(len(flat), np.bool_)
    count = 0
    for p in range(len(flat)):
        count += small[flat[p]]
    # pixels of small segments that have a larger one beside them, and its number
    pixels, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
    first = last = 0
    for p in range(len(flat)):
        if small[flat[p]]:
            number = _larger_neighbour(flat, small, p, shifts, depth, height, width)
            if number:
                pixels[last], numbers[last], found[p] = p, number, True
                last += 1
    while first < last:
        for i in range(first, last):
            flat[pixels[i]] = numbers[i]
        end = last
        for i in range(first, end):
            p = pixels[i]
            for k in range(6):
                if _is_inside(p, k, depth, height, width):
                    q = p + shifts[k]
                    if small[flat[q]] and not found[q]:
                        number = _larger_neighbour(flat, small, q, shifts, depth, height, width)
                        pixels[last], numbers[last], found[q] = q, number, True
                        last += 1
        first = end


@jit.inlined
def _larger_neighbour(flat, small, p, shifts, depth, height, width):
    """Return the number of the first neighbour in a segment that is not small, or 0."""
    number = 0
    for k in range(6):
        if number == 0 and _is_inside(p, k, depth, height, width):
            other = flat[p + shifts[k]]
            if not small[other]:
                number = other
    return number


@jit.inlined
def _is_inside(p, k, depth, height, width):
    """Is there a k-th neighbour?"""
    if k == 0:
        return p // width % height > 0
    if k == 1:
        return p % width > 0
    if k == 2:
        return p % width < width - 1
    if k == 3:
        return p // width % height < height - 1
    if k == 4:
        return p >= height * width
    return p < (depth - 1) * height * width


def _give_plainly(label: np.ndarray, small: np.ndarray) -> None:
    waiting = small[label]
    while True:
        kept = np.pad(np.where(waiting, 0, label), 1)
        number = np.zeros_like(label)
        for axis, side in ((1, 0), (2, 0), (2, 2), (1, 2), (0, 0), (0, 2)):
            places = [slice(1, -1)] * 3
            places[axis] = slice(side, side + label.shape[axis])
            number = np.where(number == 0, kept[tuple(places)], number)
        given = waiting & (number > 0)
        if not given.any():
            return
        label[given] = number[given]
        waiting &= ~given
