"""The loops of `gdlib.kernels.fused` over lines of pixels, from the `first` up to the `last` one.

Vectors of a line are turned, (X, D) to (D, X), so that numbers of neighbouring pixels are
neighbours in memory: then a processor computes many pixels at once, whatever D is. B images have Z
sections (one in 2D) of Y lines of X pixels; offsets are (K, 3); an array of size 0 stands for one
that is not given. Nothing here looks at shapes.
"""

import numpy as np

from gdlib import jit


@jit.kernel
def turn_to_unit(first, last, rows, unit, inverse):
    """Fill vectors of length one (B, Z, Y, D, X), and one over the lengths of rows."""
    _, depth, height, width, dim = rows.shape
    one, tiny = rows.dtype.type(1), rows.dtype.type(1e-12)
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        row, vector, length = rows[b, z, y], unit[b, z, y], inverse[b, z, y]
        for x in range(width):
            for i in range(dim):
                vector[i, x] = row[x, i]
        length[:] = 0
        for i in range(dim):
            for x in range(width):
                length[x] += vector[i, x] * vector[i, x]
        for x in range(width):
            length[x] = one / max(np.sqrt(length[x]), tiny)
        for i in range(dim):
            for x in range(width):
                vector[i, x] *= length[x]


@jit.kernel
def dot(first, last, unit, offsets, out):
    """Fill the dot products of unit vectors and their neighbours (B, K, Z, Y, X).

    0 where these are outside.
    """
    _, depth, height, dim, width = unit.shape
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        for k in range(len(offsets)):
            there_z, there_y, dx = z + offsets[k, 0], y + offsets[k, 1], offsets[k, 2]
            start, end = _span(there_z, there_y, dx, depth, height, width)
            out[b, k, z, y] = 0
            affinity = out[b, k, z, y, start:end]
            for i in range(dim if end > start else 0):
                here, there = (
                    unit[b, z, y, i, start:end],
                    unit[b, there_z, there_y, i, start + dx : end + dx],
                )
                for x in range(len(affinity)):
                    affinity[x] += here[x] * there[x]


@jit.summing_kernel
def sum_products(first, last, unit, other, sums):
    """Fill sum_x v_x v_x^T of each line, (B, Z, Y, D, D)."""
    _, depth, height, dim, width = unit.shape
    difference = np.empty((dim, width), unit.dtype)
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        vector = _difference(b, y, z, unit, other, difference)
        for i in range(dim):
            for j in range(i + 1):
                total = unit.dtype.type(0)
                for x in range(width):
                    total += vector[i, x] * vector[j, x]
                sums[b, z, y, i, j] = sums[b, z, y, j, i] = total


@jit.kernel
def relate_gradient(first, last, unit, inverse, other, offsets, affinity, factor, out):
    """Fill the gradient of rows, from that of affinities, and from the matrix (B, D, D) by which
    products multiply vectors.
    """
    _, depth, height, dim, width = unit.shape
    gradient, difference = np.empty((dim, width), unit.dtype), np.empty((dim, width), unit.dtype)
    along = np.empty(width, unit.dtype)
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        gradient[:] = 0  # of the unit vectors
        if affinity.size:
            _add_gradient_of_dots(b, y, z, unit, offsets, affinity, gradient)
        if factor.size:
            _add_gradient_of_products(
                _difference(b, y, z, unit, other, difference), factor[b], gradient
            )
        # Of the rows it is the part across the vector, over its length.
        vector, length, row = unit[b, z, y], inverse[b, z, y], out[b, z, y]
        along[:] = 0
        for i in range(dim):
            for x in range(width):
                along[x] += vector[i, x] * gradient[i, x]
        for i in range(dim):
            for x in range(width):
                gradient[i, x] = (gradient[i, x] - vector[i, x] * along[x]) * length[x]
        for x in range(width):
            for i in range(dim):
                row[x, i] = gradient[i, x]


@jit.part
def _add_gradient_of_dots(b, y, z, unit, offsets, affinity, gradient):
    _, depth, height, dim, width = unit.shape
    for k in range(len(offsets)):
        for sign in (1, -1):  # the neighbour of a pixel, and the pixel whose neighbour it is
            there_z, there_y, dx = (
                z + sign * offsets[k, 0],
                y + sign * offsets[k, 1],
                sign * offsets[k, 2],
            )
            start, end = _span(there_z, there_y, dx, depth, height, width)
            if end > start:
                there = slice(start + dx, end + dx)
                weight = (
                    affinity[b, k, z, y, start:end]
                    if sign > 0
                    else affinity[b, k, there_z, there_y, there]
                )
                for i in range(dim):
                    own, other = gradient[i, start:end], unit[b, there_z, there_y, i, there]
                    for x in range(len(own)):
                        own[x] += weight[x] * other[x]


@jit.part
def _add_gradient_of_products(vector, factor, gradient):
    dim, width = vector.shape
    for i in range(dim):
        own = gradient[i]
        for j in range(dim):
            f, other = factor[i, j], vector[j]
            for x in range(width):
                own[x] += f * other[x]


@jit.part
def _difference(b, y, z, unit, other, difference):
    """Return the unit vectors of a line, less those of another map if there is one."""
    if other.size == 0:
        return unit[b, z, y]
    for i in range(len(difference)):
        for x in range(difference.shape[1]):
            difference[i, x] = unit[b, z, y, i, x] - other[b, z, y, i, x]
    return difference


@jit.kernel
def count(first, last, label, offsets, ignore, background, counts):
    """Fill, for each line, the pairs that count and those of them that are connected: (B, Z, Y, K,
    2).
    """
    _, depth, height, width = label.shape
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        for k in range(len(offsets)):
            there_z, there_y, dx = z + offsets[k, 0], y + offsets[k, 1], offsets[k, 2]
            start, end = _span(there_z, there_y, dx, depth, height, width)
            total, connected = 0, 0
            if end > start:
                here, there = (
                    label[b, z, y, start:end],
                    label[b, there_z, there_y, start + dx : end + dx],
                )
                for x in range(len(here)):
                    known = True
                    if ignore.size:
                        known = not (
                            ignore[b, z, y, start + x] | ignore[b, there_z, there_y, start + dx + x]
                        )
                    total += known
                    connected += known & (here[x] == there[x]) & (background | (here[x] > 0))
            counts[b, z, y, k, 0] = total
            counts[b, z, y, k, 1] = connected


@jit.summing_kernel
def sum_losses(first, last, affinity, goal, offsets, weights, label, ignore, background, sums):
    """Fill three sums over each line: of w (a - target)^2, of w (a - goal)^2, of (a - goal)^2.

    0 without what they need.
    """
    _, count, depth, height, width = affinity.shape
    weight, target = np.zeros(width, affinity.dtype), np.zeros(width, affinity.dtype)
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        sums[b, z, y] = 0
        for k in range(count):
            if weights.size:
                _weigh(b, k, y, z, offsets, weights, label, ignore, background, weight, target)
            a = affinity[b, k, z, y]
            to = goal[b, k, z, y] if goal.size else a
            labels = balanced = plain = affinity.dtype.type(0)
            for x in range(width):
                error, other = a[x] - target[x], a[x] - to[x]
                labels += weight[x] * error * error
                balanced += weight[x] * other * other
                plain += other * other
            sums[b, z, y, 0] += labels
            sums[b, z, y, 1] += balanced
            sums[b, z, y, 2] += plain


@jit.kernel
def losses_gradient(
    first, last, affinity, goal, offsets, weights, label, ignore, background, scale, out
):
    """Fill the gradient of affinities; `scale` is 2 x that of the three sums."""
    _, count, depth, height, width = affinity.shape
    weight, target = np.zeros(width, affinity.dtype), np.zeros(width, affinity.dtype)
    labels, balanced, plain = scale
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        for k in range(count):
            if weights.size:
                _weigh(b, k, y, z, offsets, weights, label, ignore, background, weight, target)
            a, own = affinity[b, k, z, y], out[b, k, z, y]
            to = goal[b, k, z, y] if goal.size else a
            for x in range(width):
                other = a[x] - to[x]
                own[x] = (
                    weight[x] * (labels * (a[x] - target[x]) + balanced * other) + plain * other
                )


@jit.part
def _weigh(b, k, y, z, offsets, weights, label, ignore, background, weight, target):
    """Fill what the pairs of a line weigh, 0 where they do not count, and their targets: 1 if they
    are connected, else 0.
    """
    _, depth, height, width = label.shape
    there_z, there_y, dx = z + offsets[k, 0], y + offsets[k, 1], offsets[k, 2]
    start, end = _span(there_z, there_y, dx, depth, height, width)
    separated, together = weights[b, k]
    weight[:] = 0
    if end > start:
        here, there = label[b, z, y, start:end], label[b, there_z, there_y, start + dx : end + dx]
        w, t = weight[start:end], target[start:end]
        for x in range(len(here)):
            same = (here[x] == there[x]) & (background | (here[x] > 0))
            w[x] = together if same else separated
            t[x] = 1 if same else 0
        if ignore.size:
            unknown, over_there = (
                ignore[b, z, y, start:end],
                ignore[b, there_z, there_y, start + dx : end + dx],
            )
            for x in range(len(here)):
                if unknown[x] | over_there[x]:
                    w[x] = 0


@jit.inlined
def _place(line, depth, height):
    """Return image, y and z of a line.

    Lines at one y follow each other, as they are neighbours and may be in the cache.
    """
    return line // depth // height, line // depth % height, line % depth


@jit.inlined
def _span(z, y, dx, depth, height, width):
    """Return start and end of the pixels of a line whose neighbours, `dx` further in the line (z,
    y), are inside the image.
    """
    inside = 0 <= z < depth and 0 <= y < height and abs(dx) < width
    return (max(0, -dx), width - max(0, dx)) if inside else (0, 0)
