"""The slow part of `gdlib.ops`, compiled; it is used on a CPU, for float32 and float64, and tested against the plain functions.

All loops go over lines of pixels, and every thread has a part of the lines. Vectors of a line are turned, (X, D) to (D, X), so
that numbers of neighbouring pixels are neighbours in memory: then a processor computes many pixels at once, whatever D is.
"""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gdlib import jit

Offsets = Sequence[Sequence[int]]
PARTS = 4  # of the lines, for each thread: one that is late has fewer of them


def usable(*tensors: Tensor | None) -> bool:
    """Tell whether compiled code takes these tensors: all float32, or all float64, on the CPU."""
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors if tensor is not None}
    return jit.ENABLED and kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})


# --- Affinities and second moments ------------------------------------------------------------------------------------


def relate(rows: Tensor, offsets: Offsets, moments: bool, other: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """`affinity` and `gram` of `ops.relate`."""
    displacements = _displacements(offsets, rows.ndim - 2)
    _check("other rows", other, rows.shape, rows.dtype)
    if not (moments or len(offsets)):
        return None, None
    if flat := rows.ndim == 4:  # 2D is one section
        rows, other = (None if x is None else x[:, None] for x in (rows, other))
    unit = _Unit.apply(rows)
    affinity = gram = None
    if len(offsets):
        affinity = _Affinities.apply(unit, displacements)
        affinity = affinity.squeeze(2) if flat else affinity
    if moments:
        gram = _Moments.apply(unit, unit.new_empty((0,) * 5) if other is None else _Unit.apply(other))
    return affinity, gram


class _Unit(torch.autograd.Function):
    """Rows (B, Z, Y, X, D) at length one, and turned: (B, Z, Y, D, X)."""

    @staticmethod
    def forward(ctx, rows):
        unit = _empty_turned(rows)
        inverse = rows.new_empty(rows.shape[:-1])  # of the lengths
        _on_lines(_turn_to_unit, rows.shape[:3].numel(), rows, unit, inverse)
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        unit, inverse = ctx.saved_tensors
        out = _empty_turned(unit)
        _on_lines(_turn_gradient_back, unit.shape[:3].numel(), gradient, unit, inverse, out)
        return out


def _empty_turned(vectors: Tensor) -> Tensor:
    return vectors.new_empty(*vectors.shape[:-2], vectors.shape[-1], vectors.shape[-2])


class _Affinities(torch.autograd.Function):
    """Dot products of unit vectors (B, Z, Y, D, X) with their neighbours: (B, K, Z, Y, X)."""

    @staticmethod
    def forward(ctx, unit, displacements):
        ctx.save_for_backward(unit)
        ctx.displacements = displacements
        batch, depth, height, _, width = unit.shape
        out = unit.new_empty(batch, len(displacements), depth, height, width)
        _on_lines(_dot, batch * depth * height, unit, displacements, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (unit,) = ctx.saved_tensors
        out = torch.empty_like(unit)
        _on_lines(_dot_gradient, unit.shape[:3].numel(), unit, ctx.displacements, gradient, out)
        return out, None


class _Moments(torch.autograd.Function):
    """Mean over the pixels of each image of v v^T: unit vectors, or what they are more than others; (B, D, D)."""

    @staticmethod
    def forward(ctx, unit, other):
        ctx.save_for_backward(unit, other)
        batch, depth, height, dim, width = unit.shape
        sums = unit.new_empty(batch, depth, height, dim, dim)  # of each line
        _on_lines(_sum_products, batch * depth * height, unit, other, sums)
        return sums.sum((1, 2)) / (depth * height * width)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        unit, other = ctx.saved_tensors
        out = torch.empty_like(unit)
        _, depth, height, _, width = unit.shape
        factor = (gradient + gradient.mT) / (depth * height * width)
        _on_lines(_products_gradient, unit.shape[:3].numel(), unit, other, factor, out)
        return out, None


# --- Losses of pairs --------------------------------------------------------------------------------------------------


def pair_losses(
    affinity: Tensor,
    goal: Tensor | None,
    offsets: Offsets | None = None,
    weights: Tensor | None = None,
    label: Tensor | None = None,
    ignore: Tensor | None = None,
    connected: bool = False,
) -> Tensor:
    """`ops.pair_losses`, all three; those that would need what is None are 0.

    Args:
        affinity: (B, K, [Z,] Y, X).
        goal: same shape, no gradient.
        offsets: of the pairs.
        weights: (B, K, 2) of separated and of connected pairs.
        label: (B, [Z,] Y, X) int32.
        ignore: same shape, boolean.
        connected: whether two background pixels are.
    """
    batch, count, *sides = affinity.shape
    offsets = [(0,) * len(sides)] * count if offsets is None else offsets
    displacements = _displacements(offsets, len(sides))
    if len(offsets) != count:
        raise ValueError(f"there are {count} affinities of each pixel, but {len(offsets)} offsets")
    weights = None if weights is None else weights.to(affinity.dtype)
    _check("the goal", goal, affinity.shape, affinity.dtype)
    _check("weights", weights, (batch, count, 2), affinity.dtype)
    _check("the label", label, (batch, *sides), torch.int32)
    _check("what to ignore", ignore, (batch, *sides), torch.bool)
    if (weights is None) != (label is None):
        raise ValueError("weights must come with a label, and a label with weights")
    if len(sides) == 2:  # 2D is one section
        affinity, goal = (None if x is None else x[:, :, None] for x in (affinity, goal))
        label, ignore = (None if x is None else x[:, None] for x in (label, ignore))
    # Compiled code takes no None.
    goal = affinity.new_empty((0,) * 5) if goal is None else goal
    weights = affinity.new_empty((0,) * 3) if weights is None else weights
    label = torch.empty((0,) * 4, dtype=torch.int32) if label is None else label
    ignore = torch.empty((0,) * 4, dtype=torch.bool) if ignore is None else ignore
    return _PairLosses.apply(affinity, goal, displacements, weights, label, ignore, connected)


class _PairLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, affinity, goal, displacements, weights, label, ignore, connected):
        ctx.save_for_backward(affinity, goal, weights, label, ignore)
        ctx.displacements, ctx.connected = displacements, connected
        batch, _, depth, height, _ = affinity.shape
        sums = torch.empty(batch, depth, height, 3, dtype=torch.float64)  # of each line
        about = goal, displacements, weights, label, ignore, connected
        _on_lines(_sum_losses, batch * depth * height, affinity, *about, sums)
        return (sums.sum((0, 1, 2)) / affinity[:, 0].numel()).to(affinity.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        affinity, goal, *about = ctx.saved_tensors
        out = torch.empty_like(affinity, memory_format=torch.contiguous_format)
        scale = (2 * gradient.double() / affinity[:, 0].numel()).to(affinity.dtype)
        arrays = affinity, goal, ctx.displacements, *about, ctx.connected, scale, out
        _on_lines(_losses_gradient, affinity[:, 0].shape[:3].numel(), *arrays)
        return out, None, None, None, None, None, None


def count_pairs(label: Tensor, offsets: Offsets, ignore: Tensor | None = None, connected: bool = False) -> Tensor:
    """Return (B, K, 2) int64: the pairs that count, and those of them that are connected; for the arguments see `pair_losses`."""
    displacements = _displacements(offsets, label.ndim - 1)
    _check("the label", label, label.shape, torch.int32)
    _check("what to ignore", ignore, label.shape, torch.bool)
    if label.ndim == 3:
        label, ignore = (None if x is None else x[:, None] for x in (label, ignore))
    ignore = torch.empty((0,) * 4, dtype=torch.bool) if ignore is None else ignore
    counts = torch.empty(*label.shape[:3], len(offsets), 2, dtype=torch.int64)  # of each line
    _on_lines(_count, label.shape[:3].numel(), label, displacements, ignore, connected, counts)
    return counts.sum((1, 2))


# --- Calling compiled code --------------------------------------------------------------------------------------------


def _displacements(offsets: Offsets, ndim: int) -> np.ndarray:
    """Return offsets as (K, 3)."""
    if any(len(offset) != ndim for offset in offsets):
        raise ValueError(f"offsets {list(map(list, offsets))} do not fit images with {ndim} axes")
    return np.array([(0,) * (3 - ndim) + tuple(offset) for offset in offsets], np.int64).reshape(-1, 3)


def _check(name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless compiled code, which looks at no shape, may read a tensor."""
    if tensor is not None and (tensor.shape != torch.Size(shape) or tensor.dtype != dtype):
        raise ValueError(f"{name} must be {tuple(shape)} of {dtype}, not {tuple(tensor.shape)} of {tensor.dtype}")


def _on_lines(kernel: Callable, lines: int, *arguments: Tensor | np.ndarray | bool) -> None:
    """Call kernel(first, last, *arguments) on all threads of torch, for parts of the lines that together are all of them."""
    arrays = [x.detach().contiguous().numpy() if isinstance(x, Tensor) else x for x in arguments]
    threads = torch.get_num_threads()
    if threads == 1:
        return kernel(0, lines, *arrays)
    parts = min(lines, PARTS * threads)
    edges = [lines * part // parts for part in range(parts + 1)] if parts else []
    for done in [_pool(threads).submit(kernel, *pair, *arrays) for pair in itertools.pairwise(edges)]:
        done.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "gdlib")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not there any more


# --- Compiled ---------------------------------------------------------------------------------------------------------


@jit.kernel
def _turn_to_unit(first, last, rows, unit, inverse):
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
def _turn_gradient_back(first, last, gradient, unit, inverse, out):
    """Fill the gradient of rows, from that of unit vectors: the part across the vector, over its length."""
    _, depth, height, dim, width = unit.shape
    along = np.empty(width, unit.dtype)
    across = np.empty((dim, width), unit.dtype)
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        g, vector, length, row = gradient[b, z, y], unit[b, z, y], inverse[b, z, y], out[b, z, y]
        along[:] = 0
        for i in range(dim):
            for x in range(width):
                along[x] += vector[i, x] * g[i, x]
        for i in range(dim):
            for x in range(width):
                across[i, x] = (g[i, x] - vector[i, x] * along[x]) * length[x]
        for x in range(width):
            for i in range(dim):
                row[x, i] = across[i, x]


@jit.kernel
def _dot(first, last, unit, offsets, out):
    _, depth, height, dim, width = unit.shape
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        for k in range(len(offsets)):
            there_z, there_y, dx = z + offsets[k, 0], y + offsets[k, 1], offsets[k, 2]
            start, end = _span(there_z, there_y, dx, depth, height, width)
            out[b, k, z, y] = 0
            affinity = out[b, k, z, y, start:end]
            for i in range(dim if end > start else 0):
                here, there = unit[b, z, y, i, start:end], unit[b, there_z, there_y, i, start + dx : end + dx]
                for x in range(len(affinity)):
                    affinity[x] += here[x] * there[x]


@jit.kernel
def _dot_gradient(first, last, unit, offsets, gradient, out):
    _, depth, height, dim, width = unit.shape
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        out[b, z, y] = 0
        for k in range(len(offsets)):
            for sign in (1, -1):  # the neighbour of a pixel, and the pixel whose neighbour it is
                there_z, there_y, dx = z + sign * offsets[k, 0], y + sign * offsets[k, 1], sign * offsets[k, 2]
                start, end = _span(there_z, there_y, dx, depth, height, width)
                if end > start:
                    if sign > 0:
                        weight = gradient[b, k, z, y, start:end]
                    else:
                        weight = gradient[b, k, there_z, there_y, start + dx : end + dx]
                    for i in range(dim):
                        own, there = out[b, z, y, i, start:end], unit[b, there_z, there_y, i, start + dx : end + dx]
                        for x in range(len(own)):
                            own[x] += weight[x] * there[x]


@jit.summing_kernel
def _sum_products(first, last, unit, other, sums):
    """Fill sum_x v_x v_x^T of each line, (B, Z, Y, D, D)."""
    _, depth, height, dim, width = unit.shape
    difference = np.empty((dim, width), unit.dtype)
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        vector = _difference(b, z, y, unit, other, difference)
        for i in range(dim):
            for j in range(i + 1):
                total = unit.dtype.type(0)
                for x in range(width):
                    total += vector[i, x] * vector[j, x]
                sums[b, z, y, i, j] = sums[b, z, y, j, i] = total


@jit.kernel
def _products_gradient(first, last, unit, other, factor, out):
    """Fill the gradient of unit vectors: the matrix (B, D, D) times each."""
    _, depth, height, dim, width = unit.shape
    difference = np.empty((dim, width), unit.dtype)
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        vector = _difference(b, z, y, unit, other, difference)
        for i in range(dim):
            own = out[b, z, y, i]
            own[:] = 0
            for j in range(dim):
                f = factor[b, i, j]
                for x in range(width):
                    own[x] += f * vector[j, x]


@jit.part
def _difference(b, z, y, unit, other, difference):
    """Return the unit vectors of a line, less those of another map if there is one."""
    if other.size == 0:
        return unit[b, z, y]
    for i in range(len(difference)):
        for x in range(difference.shape[1]):
            difference[i, x] = unit[b, z, y, i, x] - other[b, z, y, i, x]
    return difference


@jit.kernel
def _count(first, last, label, offsets, ignore, background, counts):
    """Fill, for each line, the pairs that count and those of them that are connected: (B, Z, Y, K, 2)."""
    _, depth, height, width = label.shape
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        for k in range(len(offsets)):
            there_z, there_y, dx = z + offsets[k, 0], y + offsets[k, 1], offsets[k, 2]
            start, end = _span(there_z, there_y, dx, depth, height, width)
            total, connected = 0, 0
            if end > start:
                here, there = label[b, z, y, start:end], label[b, there_z, there_y, start + dx : end + dx]
                for x in range(len(here)):
                    known = True
                    if ignore.size:
                        known = not (ignore[b, z, y, start + x] | ignore[b, there_z, there_y, start + dx + x])
                    total += known
                    connected += known & (here[x] == there[x]) & (background | (here[x] > 0))
            counts[b, z, y, k, 0] = total
            counts[b, z, y, k, 1] = connected


@jit.summing_kernel
def _sum_losses(first, last, affinity, goal, offsets, weights, label, ignore, background, sums):
    """Fill three sums over each line: of w (a - target)^2, of w (a - goal)^2, of (a - goal)^2; 0 without what they need."""
    _, count, depth, height, width = affinity.shape
    weight, target = np.zeros(width, affinity.dtype), np.zeros(width, affinity.dtype)
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        sums[b, z, y] = 0
        for k in range(count):
            if weights.size:
                _weigh(b, k, z, y, offsets, weights, label, ignore, background, weight, target)
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
def _losses_gradient(first, last, affinity, goal, offsets, weights, label, ignore, background, scale, out):
    """Fill the gradient of affinities; `scale` is 2 x that of the three sums."""
    _, count, depth, height, width = affinity.shape
    weight, target = np.zeros(width, affinity.dtype), np.zeros(width, affinity.dtype)
    labels, balanced, plain = scale
    for line in range(first, last):
        b, y, z = _place(line, depth, height)
        for k in range(count):
            if weights.size:
                _weigh(b, k, z, y, offsets, weights, label, ignore, background, weight, target)
            a, own = affinity[b, k, z, y], out[b, k, z, y]
            to = goal[b, k, z, y] if goal.size else a
            for x in range(width):
                other = a[x] - to[x]
                own[x] = weight[x] * (labels * (a[x] - target[x]) + balanced * other) + plain * other


@jit.part
def _weigh(b, k, z, y, offsets, weights, label, ignore, background, weight, target):
    """Fill what the pairs of a line weigh, 0 where they do not count, and their targets: 1 if they are connected, else 0."""
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
            unknown, over_there = ignore[b, z, y, start:end], ignore[b, there_z, there_y, start + dx : end + dx]
            for x in range(len(here)):
                if unknown[x] | over_there[x]:
                    w[x] = 0


@jit.inlined
def _place(line, depth, height):
    """Return image, y and z of a line; lines at one y follow each other, as they are neighbours and may be in the cache."""
    return line // depth // height, line // depth % height, line % depth


@jit.inlined
def _span(z, y, dx, depth, height, width):
    """Return start and end of the pixels of a line whose neighbours, `dx` further in the line (z, y), are inside the image."""
    inside = 0 <= z < depth and 0 <= y < height and abs(dx) < width
    return (max(0, -dx), width - max(0, dx)) if inside else (0, 0)
