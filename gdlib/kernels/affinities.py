"""Pure tensor mathematics shared by losses, training and inference; dimension is data (2D = 3D).

Per-pixel vectors are kept as *rows*: (B, [Z,] Y, X, D). A channels-last network output is such an
array already, and every dot product of two pixels then reads two contiguous vectors.

What costs most of it, affinities and the losses of pairs, is computed by `gdlib/kernels/fused.py`
on a CPU, else by the plain functions here, which say what it means.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gdlib.types import Offsets


def rows(embedding: Tensor) -> Tensor:
    """View an embedding (B, D, [Z,] Y, X) as rows (B, [Z,] Y, X, D) of at least float32.

    Free if it is channels-last in it.
    """
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    return embedding.movedim(1, -1).to(dtype, memory_format=torch.contiguous_format).contiguous()


class _Unit(torch.autograd.Function):
    """Rows divided by their length, with a backward in half the passes over memory of
    autograd's.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_(min=1e-12)
        unit = rows / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        along = (unit * gradient).sum(-1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1).div_(length)


def unit(rows: Tensor) -> Tensor:
    """Divide vectors (..., D) by their length; a zero vector stays zero."""
    return _Unit.apply(rows)


def overlap(
    offset: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the slices of all `p` for which `p + offset` is inside the image, and of those `p +
    offset`.

    >>> overlap((-1, 0), (4, 5))
    ((slice(1, 4, None), slice(0, 5, None)), (slice(0, 3, None), slice(0, 5, None)))
    """
    here = tuple(
        slice(max(0, -d), max(0, min(n, n - d))) for d, n in zip(offset, shape, strict=True)
    )
    there = tuple(
        slice(max(0, d), max(0, min(n, n + d))) for d, n in zip(offset, shape, strict=True)
    )
    return here, there


class _Affinities(torch.autograd.Function):
    """Dot products of each row with its neighbours.

    A hand-written backward: autograd through the slices would build one full-size map per offset
    and direction. Here each offset costs two fused multiply-adds (measured 6 times faster than
    autograd on rows, 3 times than on channels-first maps, forward and backward together, on an
    Intel Xeon).
    """

    @staticmethod
    def forward(ctx, unit: Tensor, offsets: Offsets) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.offsets = offsets
        batch, *shape, _ = unit.shape
        out = unit.new_zeros(batch, len(offsets), *shape)
        for k, offset in enumerate(offsets):
            here, there = overlap(offset, shape)
            out[(slice(None), k, *here)] = (
                unit[(slice(None), *here)] * unit[(slice(None), *there)]
            ).sum(-1)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (unit,) = ctx.saved_tensors
        shape = unit.shape[1:-1]
        out = torch.zeros_like(unit)
        for k, offset in enumerate(ctx.offsets):
            here, there = ((slice(None), *part) for part in overlap(offset, shape))
            g = gradient[:, k][here].unsqueeze(-1)
            out[here].addcmul_(g, unit[there])
            out[there].addcmul_(g, unit[here])
        return out, None


def affinities(unit: Tensor, offsets: Offsets) -> Tensor:
    """Cosine affinity of every pixel with its neighbours, `a[k, p] = <unit[p], unit[p + offset]>`.

    Args:
        unit: (B, [Z,] Y, X, D) rows of length one.
        offsets: K displacements in array order.

    Returns:
        (B, K, [Z,] Y, X) in [-1, 1]; 0 where the neighbour is outside the image.

    Reference: arXiv 2401.06370, pixel affinities of AGD.
    """
    return _Affinities.apply(unit, tuple(map(tuple, offsets)))


def inside(offsets: Offsets, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Boolean (K, [Z,] Y, X): is the neighbour inside the image?"""
    out = torch.zeros(len(offsets), *shape, dtype=torch.bool, device=device)
    for k, offset in enumerate(offsets):
        out[(k, *overlap(offset, shape)[0])] = True
    return out


def affinity_targets(label: Tensor, offsets: Offsets, background_connected: bool = True) -> Tensor:
    """Boolean (B, K, [Z,] Y, X): do pixel and neighbour carry the same label? False outside the
        image.

    Args:
        label: (B, [Z,] Y, X) integer, 0 = background.
        offsets: K displacements in array order.
        background_connected: two background pixels count as the same object, as in the paper's 2D
            code: the background is one more segment. Off: they are apart, as in its 3D code, where
            the background is membrane.
    """
    batch, *shape = label.shape
    out = torch.zeros(batch, len(offsets), *shape, dtype=torch.bool, device=label.device)
    for k, offset in enumerate(offsets):
        here, there = overlap(offset, shape)
        torch.eq(
            label[(slice(None), *here)],
            label[(slice(None), *there)],
            out=out[(slice(None), k, *here)],
        )
    return out if background_connected else out & (label > 0)[:, None]


def widen_borders(label: Tensor, width: int = 1) -> Tensor:
    """Make pixels background that see another instance within `width` pixels, diagonals too, in the
    last two axes.

    Args:
        label: (B, [Z,] Y, X) integer, 0 = background.
        width: in pixels.

    Reference: arXiv 2401.06370, EM targets; a window of 3 x 3 pixels is width 1.
    """
    out = label.clone()
    shape = label.shape[1:]
    for dy in range(width + 1):
        for dx in range(-width if dy else 1, width + 1):  # each pair of places once
            here, there = (
                (slice(None), *part) for part in overlap((0,) * (len(shape) - 2) + (dy, dx), shape)
            )
            a, b = label[here], label[there]
            keep = (a == b) | (a == 0) | (b == 0)
            out[here] *= keep
            out[there] *= keep
    return out


def pairs_of(mask: Tensor, offsets: Offsets) -> Tensor:
    """Boolean (B, K, [Z,] Y, X): is the pixel, or its neighbour, in the mask (B, [Z,] Y, X)?"""
    out = mask[:, None].repeat(1, len(offsets), *(1,) * (mask.ndim - 1))
    for k, offset in enumerate(offsets):
        here, there = overlap(offset, mask.shape[1:])
        out[(slice(None), k, *here)] |= mask[(slice(None), *there)]
    return out


def count_pairs(target: Tensor, valid: Tensor) -> Tensor:
    """Pairs that are valid, and those of them that are connected: (B, K, ...) boolean and
    broadcastable -> (B, K, 2) int64.
    """
    valid = valid.expand_as(target)
    return torch.stack([part.flatten(2).sum(2) for part in (valid, target & valid)], 2)


def class_weights(counts: Tensor, per_offset: bool = False) -> Tensor:
    """Weights of separated and of connected pairs that give both classes equal total weight.

    With f = share of connected pairs, clipped to [0.05, 0.99]: if f > 0.5, separated pairs weigh f
    / (1 - f) and connected ones 1; else connected pairs weigh (1 - f) / f and separated ones 1.
    Where there is one class only, it weighs 1. PAPER: the original counts pairs across the border
    as connected in f; here only pairs inside the image count.

    Args:
        counts: (B, K, 2) of `count_pairs`.
        per_offset: one f per offset (the paper's 3D code) instead of one per image (its 2D code).

    Returns:
        (B, K, 2) float32.
    """
    total, connected = (
        counts if per_offset else counts.sum(1, keepdim=True).expand_as(counts)
    ).unbind(2)
    f = (connected / total.clamp(min=1)).clamp(0.05, 0.99)
    return torch.stack(
        [torch.where(f > 0.5, f / (1 - f), 1.0), torch.where(f > 0.5, 1.0, (1 - f) / f)], 2
    )


def balance(target: Tensor, valid: Tensor, per_offset: bool = False) -> Tensor:
    """`class_weights` of every pair: (B, K, ...) float32, 0 where not valid.

    Args:
        target: (B, K, ...) boolean.
        valid: broadcastable boolean; pairs that count.
        per_offset: see `class_weights`.
    """
    weights = class_weights(count_pairs(target, valid), per_offset)
    separated, connected = (
        part.reshape(*part.shape, *(1,) * (target.ndim - 2)) for part in weights.unbind(2)
    )
    return torch.where(target, connected, separated) * valid
