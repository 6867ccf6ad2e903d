"""What costs most of `gdlib.kernels`, by the compiled `loops`: on a CPU, on all threads of torch.

It takes float32 and float64, and is tested against the plain functions of `relate`, which say what
is computed.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gdlib import jit
from gdlib.kernels import loops

Offsets = Sequence[Sequence[int]]


def usable(*tensors: Tensor | None) -> bool:
    """Tell whether compiled code takes these tensors: all float32, or all float64, on the CPU."""
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors if tensor is not None}
    return jit.ENABLED and kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})


# --- Affinities and second moments ---


def relate(
    rows: Tensor, offsets: Offsets, moments: bool, other: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """`affinity` and `gram` of `kernels.relate`."""
    displacements = jit.as_triples(offsets, rows.ndim - 2)
    _check("other rows", other, rows.shape, rows.dtype)
    if not (moments or len(offsets)):
        return None, None
    if flat := rows.ndim == 4:  # 2D is one section
        rows, other = (None if x is None else x[:, None] for x in (rows, other))
    affinity, gram = _Relate.apply(rows, displacements, moments, other)
    return affinity.squeeze(2) if flat and affinity is not None else affinity, gram


class _Relate(torch.autograd.Function):
    """Rows (B, Z, Y, X, D) -> affinities (B, K, Z, Y, X) and second moments (B, D, D)."""

    @staticmethod
    def forward(ctx, rows, displacements, moments, other):
        ctx.set_materialize_grads(False)
        ctx.displacements = displacements
        batch, depth, height, width, dim = rows.shape
        lines = batch * depth * height
        unit, inverse = _unit(rows)
        theirs = rows.new_empty((0,) * 5) if other is None else _unit(other)[0]
        ctx.save_for_backward(unit, inverse, theirs)
        affinity = gram = None
        if len(displacements):
            affinity = rows.new_empty(batch, len(displacements), depth, height, width)
            on_lines(loops.dot, lines, unit, displacements, affinity)
        if moments:
            sums = rows.new_empty(batch, depth, height, dim, dim)  # of each line
            on_lines(loops.sum_products, lines, unit, theirs, sums)
            gram = sums.sum((1, 2)) / (depth * height * width)
        return affinity, gram

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, affinity, gram):
        unit, inverse, theirs = ctx.saved_tensors
        batch, depth, height, dim, width = unit.shape
        affinity = unit.new_empty((0,) * 5) if affinity is None else affinity
        factor = unit.new_empty((0,) * 3)
        if gram is not None:
            factor = (gram + gram.mT) / (depth * height * width)
        out = unit.new_empty(batch, depth, height, width, dim)
        arrays = unit, inverse, theirs, ctx.displacements, affinity, factor, out
        on_lines(loops.relate_gradient, batch * depth * height, *arrays)
        return out, None, None, None


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (B, Z, Y, X, D) at length one, (B, Z, Y, D, X), and one over their lengths."""
    unit = rows.new_empty(*rows.shape[:-2], rows.shape[-1], rows.shape[-2])
    inverse = rows.new_empty(rows.shape[:-1])
    on_lines(loops.turn_to_unit, rows.shape[:3].numel(), rows, unit, inverse)
    return unit, inverse


# --- Losses of pairs ---


def pair_losses(
    affinity: Tensor,
    teacher: Tensor | None,
    offsets: Offsets | None = None,
    weights: Tensor | None = None,
    label: Tensor | None = None,
    ignore: Tensor | None = None,
    connected: bool = False,
) -> Tensor:
    """`kernels.pair_losses`, all three; those that would need what is None are 0.

    Args:
        affinity: (B, K, [Z,] Y, X).
        teacher: same shape, no gradient.
        offsets: of the pairs.
        weights: (B, K, 2) of separated and of connected pairs.
        label: (B, [Z,] Y, X) int32.
        ignore: same shape, boolean.
        connected: whether two background pixels are.
    """
    batch, count, *sides = affinity.shape
    offsets = [(0,) * len(sides)] * count if offsets is None else offsets
    displacements = jit.as_triples(offsets, len(sides))
    if len(offsets) != count:
        raise ValueError(f"there are {count} affinities of each pixel, but {len(offsets)} offsets")
    weights = None if weights is None else weights.to(affinity.dtype)
    _check("the teacher", teacher, affinity.shape, affinity.dtype)
    _check("weights", weights, (batch, count, 2), affinity.dtype)
    _check("the label", label, (batch, *sides), torch.int32)
    _check("what to ignore", ignore, (batch, *sides), torch.bool)
    if (weights is None) != (label is None):
        raise ValueError("weights must come with a label, and a label with weights")
    if len(sides) == 2:  # 2D is one section
        affinity, teacher = (None if x is None else x[:, :, None] for x in (affinity, teacher))
        label, ignore = (None if x is None else x[:, None] for x in (label, ignore))
    # Compiled code takes no None.
    teacher = affinity.new_empty((0,) * 5) if teacher is None else teacher
    weights = affinity.new_empty((0,) * 3) if weights is None else weights
    label = torch.empty((0,) * 4, dtype=torch.int32) if label is None else label
    ignore = torch.zeros_like(label, dtype=torch.bool) if ignore is None else ignore
    return _PairLosses.apply(affinity, teacher, displacements, weights, label, ignore, connected)


class _PairLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, affinity, teacher, displacements, weights, label, ignore, connected):
        ctx.save_for_backward(affinity, teacher, weights, label, ignore)
        ctx.displacements, ctx.connected = displacements, connected
        batch, _, depth, height, _ = affinity.shape
        sums = torch.empty(batch, depth, height, 3, dtype=torch.float64)  # of each line
        about = teacher, displacements, weights, label, ignore, connected
        on_lines(loops.sum_losses, batch * depth * height, affinity, *about, sums)
        return (sums.sum((0, 1, 2)) / affinity[:, 0].numel()).to(affinity.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        affinity, teacher, *about = ctx.saved_tensors
        out = torch.empty_like(affinity, memory_format=torch.contiguous_format)
        scale = (2 * gradient.double() / affinity[:, 0].numel()).to(affinity.dtype)
        arrays = affinity, teacher, ctx.displacements, *about, ctx.connected, scale, out
        on_lines(loops.losses_gradient, affinity[:, 0].shape[:3].numel(), *arrays)
        return out, None, None, None, None, None, None


def count_pairs(
    label: Tensor, offsets: Offsets, ignore: Tensor | None = None, connected: bool = False
) -> Tensor:
    """Return (B, K, 2) int64: the pairs that count, and those of them that are connected.

    For the arguments see `pair_losses`.
    """
    displacements = jit.as_triples(offsets, label.ndim - 1)
    _check("the label", label, label.shape, torch.int32)
    _check("what to ignore", ignore, label.shape, torch.bool)
    if label.ndim == 3:
        label, ignore = (None if x is None else x[:, None] for x in (label, ignore))
    ignore = torch.zeros_like(label, dtype=torch.bool) if ignore is None else ignore
    counts = torch.empty(*label.shape[:3], len(offsets), 2, dtype=torch.int64)  # of each line
    on_lines(loops.count, label.shape[:3].numel(), label, displacements, ignore, connected, counts)
    return counts.sum((1, 2))


# --- Calling compiled code ---


def _check(name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless compiled code, which looks at no shape, may read a tensor."""
    if tensor is not None and (tensor.shape != torch.Size(shape) or tensor.dtype != dtype):
        raise ValueError(
            f"{name} must be {tuple(shape)} of {dtype}, not {tuple(tensor.shape)} of {tensor.dtype}"
        )


def on_lines(kernel: Callable, lines: int, *arguments: Tensor | np.ndarray | bool) -> None:
    """Call kernel(first, last, *arguments) for parts of the lines that together are all of them."""
    arrays = [x.detach().contiguous().numpy() if isinstance(x, Tensor) else x for x in arguments]
    jit.on_lines(kernel, lines, *arrays)
