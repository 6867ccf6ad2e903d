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
        b, y, z = jit.place(line, depth, height)
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
    """Fill dot products of unit vectors and neighbours (B, K, Z, Y, X); outside they are 0."""
    _, depth, height, dim, width = unit.shape
    for line in range(first, last):
        b, y, z = jit.place(line, depth, height)
        for k in range(len(offsets)):
            far_y, far_z, here, there = _neighbours(y, z, offsets[k], 1, depth, height, width)
            out[b, k, z, y] = 0
            affinity = out[b, k, z, y, here]
            for i in range(dim):
                own, other = unit[b, z, y, i, here], unit[b, far_z, far_y, i, there]
                for x in range(len(affinity)):
                    affinity[x] += own[x] * other[x]


@jit.summing_kernel
def sum_products(first, last, unit, other, sums):
    """Fill sum_x v_x v_x^T of each line, (B, Z, Y, D, D)."""
    _, depth, height, dim, width = unit.shape
    difference = np.empty((dim, width), unit.dtype)
    for line in range(first, last):
        b, y, z = jit.place(line, depth, height)
        vector = _difference(b, y, z, unit, other, difference)
        for i in range(dim):
            for j in range(i + 1):
                total = unit.dtype.type(0)
                for x in range(width):
                    total += vector[i, x] * vector[j, x]
                sums[b, z, y, i, j] = sums[b, z, y, j, i] = total


@jit.kernel
def relate_gradient(first, last, unit, inverse, other, offsets, affinity, factor, out):
    """Fill the gradient of rows (B, Z, Y, X, D).

    Args:
        first: line.
        last: line.
        unit: vectors.
        inverse: of their lengths.
        other: see `_difference`.
        offsets: of the affinities.
        affinity: their gradient, or nothing.
        factor: (B, D, D), what products multiply vectors by, or nothing.
        out: the gradient.
    """
    _, depth, height, dim, width = unit.shape
    gradient, difference = np.empty((dim, width), unit.dtype), np.empty((dim, width), unit.dtype)
    along = np.empty(width, unit.dtype)
    for line in range(first, last):
        b, y, z = jit.place(line, depth, height)
        gradient[:] = 0  # of the unit vectors
        if affinity.size:
            _add_gradient_of_dots(b, y, z, unit, offsets, affinity, gradient)
        if factor.size:
            vector = _difference(b, y, z, unit, other, difference)
            _add_gradient_of_products(vector, factor[b], gradient)
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
            far_y, far_z, here, there = _neighbours(y, z, offsets[k], sign, depth, height, width)
            a, c, part = (y, z, here) if sign > 0 else (far_y, far_z, there)
            weight = affinity[b, k, c, a, part]
            for i in range(dim):
                own, other = gradient[i, here], unit[b, far_z, far_y, i, there]
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
    """Fill, for each line, the pairs that count and those of them that are connected."""
    _, depth, height, width = label.shape
    for line in range(first, last):
        b, y, z = jit.place(line, depth, height)
        for k in range(len(offsets)):
            far_y, far_z, here, there = _neighbours(y, z, offsets[k], 1, depth, height, width)
            own, other = label[b, z, y, here], label[b, far_z, far_y, there]
            unknown, far_unknown = ignore[b, z, y, here], ignore[b, far_z, far_y, there]
            total, connected = 0, 0
            for x in range(len(own)):
                known = not (unknown[x] | far_unknown[x])
                total += known
                connected += known & _connected(own[x], other[x], background)
            counts[b, z, y, k, 0] = total
            counts[b, z, y, k, 1] = connected


@jit.summing_kernel
def sum_losses(first, last, affinity, teacher, offsets, weights, label, ignore, background, sums):
    """Fill three sums over a line: of w (a - target)^2, of w (a - teacher)^2, of (a - teacher)^2.

    They are 0 without what they need.
    """
    _, count, depth, height, width = affinity.shape
    weight, target = np.zeros(width, affinity.dtype), np.zeros(width, affinity.dtype)
    for line in range(first, last):
        b, y, z = jit.place(line, depth, height)
        sums[b, z, y] = 0
        for k in range(count):
            if weights.size:
                _weigh(b, k, y, z, offsets, weights, label, ignore, background, weight, target)
            a = affinity[b, k, z, y]
            to = teacher[b, k, z, y] if teacher.size else a
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
    first, last, affinity, teacher, offsets, weights, label, ignore, background, scale, out
):
    """Fill the gradient of affinities; `scale` is 2 x that of the three sums."""
    _, count, depth, height, width = affinity.shape
    weight, target = np.zeros(width, affinity.dtype), np.zeros(width, affinity.dtype)
    labels, balanced, plain = scale
    for line in range(first, last):
        b, y, z = jit.place(line, depth, height)
        for k in range(count):
            if weights.size:
                _weigh(b, k, y, z, offsets, weights, label, ignore, background, weight, target)
            a, own = affinity[b, k, z, y], out[b, k, z, y]
            to = teacher[b, k, z, y] if teacher.size else a
            for x in range(width):
                other = a[x] - to[x]
                own[x] = (
                    weight[x] * (labels * (a[x] - target[x]) + balanced * other) + plain * other
                )


@jit.part
def _weigh(b, k, y, z, offsets, weights, label, ignore, background, weight, target):
    """Fill weights of the pairs of a line, 0 if they do not count, and targets, 1 if connected."""
    _, depth, height, width = label.shape
    far_y, far_z, here, there = _neighbours(y, z, offsets[k], 1, depth, height, width)
    own, other = label[b, z, y, here], label[b, far_z, far_y, there]
    unknown, far_unknown = ignore[b, z, y, here], ignore[b, far_z, far_y, there]
    separated, together = weights[b, k]
    weight[:] = 0
    w, t = weight[here], target[here]
    for x in range(len(own)):
        same = _connected(own[x], other[x], background)
        w[x] = together if same else separated
        t[x] = 1 if same else 0
    for x in range(len(own)):
        if unknown[x] | far_unknown[x]:
            w[x] = 0


@jit.inlined
def _connected(a, b, background):
    return (a == b) & (background | (a > 0))


@jit.inlined
def _neighbours(y, z, offset, sign, depth, height, width):
    """Return y and z of a line's neighbours at an offset, which pixels have one, and which it is.

    Of a line without neighbours inside the image, no pixel has one.
    """
    far_y, far_z, dx = y + sign * offset[1], z + sign * offset[0], sign * offset[2]
    if not (0 <= far_y < height and 0 <= far_z < depth and abs(dx) < width):
        far_y, far_z, dx, width = y, z, 0, 0
    start, end = max(0, -dx), width - max(0, dx)
    return far_y, far_z, slice(start, end), slice(start + dx, end + dx)
