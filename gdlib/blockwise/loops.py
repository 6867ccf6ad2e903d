"""The loops of `gdlib.blockwise.stored` over lines of pixels, from the `first` up to the `last`.

They are written as those of `gdlib.kernels`, and look at no shapes either. Offsets are (K, 3).
"""

import numpy as np

from gdlib import jit

FLAT = np.float32(6.3)  # logit, beyond which a probability is the first or the last level


@jit.kernel
def lengths(first, last, vectors, scale):
    """Fill the root of 255 over the lengths of vectors (D, Z, Y, X)."""
    dim, depth, height, width = vectors.shape
    for line in range(first, last):
        _, y, z = jit.place(line, depth, height)
        length = scale[z, y]
        length[:] = 0
        for i in range(dim):
            vector = vectors[i, z, y]
            for x in range(width):
                length[x] += vector[x] * vector[x]
        for x in range(width):
            length[x] = np.sqrt(np.float32(255) / max(length[x], np.float32(1e-24)))


@jit.kernel
def levels(first, last, vectors, scale, offsets, corner, limits, always, stride, row, out):
    """Fill affinities of 255 levels (K, Z, Y, X), of lines that begin at a corner; a neighbour
    beyond the limits (3, 2) is none. After the offsets that are `always` wanted, every `stride`-th
    row is, from `row` on.
    """
    dim = len(vectors)
    _, depth, height, width = out.shape
    product = np.empty(width, np.float32)
    for line in range(first, last):
        _, y, z = jit.place(line, depth, height)
        own_z, own_y = z + corner[0], y + corner[1]
        for k in range(len(offsets) if y % stride == row else always):
            far_z, far_y, dx = own_z + offsets[k, 0], own_y + offsets[k, 1], offsets[k, 2]
            start = max(corner[2], limits[2, 0] - dx)
            end = min(corner[2] + width, limits[2, 1] - dx)
            if not (
                limits[0, 0] <= far_z < limits[0, 1]
                and limits[1, 0] <= far_y < limits[1, 1]
                and start < end
            ):
                continue
            here, there = slice(start, end), slice(start + dx, end + dx)
            dot = product[: end - start]
            dot[:] = 0
            for i in range(dim):
                one, other = vectors[i, own_z, own_y, here], vectors[i, far_z, far_y, there]
                for x in range(len(dot)):
                    dot[x] += one[x] * other[x]
            one, other = scale[own_z, own_y, here], scale[far_z, far_y, there]
            level = out[k, z, y, start - corner[2] : end - corner[2]]
            for x in range(len(dot)):
                value = min(max(dot[x] * one[x] * other[x], np.float32(0)), np.float32(255))
                level[x] = np.int32(value + np.float32(0.5))  # cut off


@jit.kernel
def probabilities(first, last, logit, out):
    """Fill probabilities of 255 levels (lines, X) from their logits."""
    for line in range(first, last):
        one, level = logit[line], out[line]
        for x in range(len(one)):
            if abs(one[x]) < FLAT:
                value = np.float32(255) / (np.float32(1) + np.exp(-one[x]))
                level[x] = np.int32(value + np.float32(0.5))  # cut off
            else:
                level[x] = 255 if one[x] > 0 else 0
