"""The slow part of `gdlib.ops` in C++.

Nothing needs it: without a compiler, on another device or for another type, `ops` computes the same in plain torch.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gdlib import compiled


def usable(*tensors: Tensor | None) -> bool:
    """Tell whether the compiled functions are there and take these tensors: all float32, or all float64, on the CPU."""
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors if tensor is not None}
    return kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)}) and library() is not None


class _Relate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, offsets, index, size, moments, other, window):
        ctx.set_materialize_grads(False)
        batch, *sides, dim = rows.shape
        inverse = rows.new_empty(batch, *sides)  # of the lengths
        affinity = rows.new_empty(batch, len(offsets), *sides) if offsets else None
        nodes = None if index is None else rows.new_empty(size.numel() + 1, dim)
        gram = rows.new_empty(batch, dim, dim) if moments else None
        means = None
        if window is not None:
            means = rows.new_empty(batch, *(-(-side // width) for side, width in zip(sides, window, strict=True)), dim)
            window = torch.tensor((1,) * (3 - len(window)) + tuple(window))
        ctx.save_for_backward(rows, other, inverse, index, size, window)
        ctx.offsets = offsets
        count = 0 if index is None else len(nodes)
        found = count, index, nodes, gram, affinity, window, means
        call("relate", (batch, *sides), offsets, dim, rows, other, inverse, *found)
        nodes = None if index is None else _over(nodes[:-1].reshape(*size.shape, dim), size)
        return affinity, nodes, gram / inverse[0].numel() if moments else None, means

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, affinity, nodes, gram, means):
        rows, other, inverse, index, size, window = ctx.saved_tensors
        affinity, means = (None if part is None else part.contiguous() for part in (affinity, means))
        if nodes is not None:  # what belongs to no node gets nothing
            nodes = functional.pad(_over(nodes, size).flatten(0, 1), (0, 0, 0, 1))
        gram = None if gram is None else (gram + gram.mT) / inverse[0].numel()
        out = torch.empty_like(rows)
        maps = rows.shape[-1], rows, other, inverse
        call("relate_backward", inverse.shape, ctx.offsets, *maps, index, nodes, gram, affinity, window, means, out)
        return out, None, None, None, None, None, None


def _over(nodes: Tensor, size: Tensor) -> Tensor:
    return nodes / size.to(nodes.dtype).clamp(min=1)[..., None]


def relate(
    rows: Tensor,
    offsets: Sequence[Sequence[int]],
    index: Tensor | None,
    size: Tensor | None,
    moments: bool,
    other: Tensor | None,
    window: Sequence[int] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`ops.relate`; `index` and `size` are those of the instances."""
    if window is not None and (len(window) != rows.ndim - 2 or min(window) < 1):
        raise ValueError(f"windows of {tuple(window)} pixels must have {rows.ndim - 2} sides of at least 1")
    _fit("other rows", other, rows.shape, rows.dtype)
    _fit("nodes of pixels", index, rows.shape[:-1].numel(), torch.int64)
    other = None if other is None else other.contiguous()
    return _Relate.apply(rows.contiguous(), offsets, index, size, moments, other, window)


class _PairLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, affinity, goal, offsets, weights, label, ignore, connected):
        ctx.save_for_backward(affinity, goal, weights, label, ignore)
        ctx.offsets, ctx.connected = offsets, connected
        losses = affinity.new_empty(3, dtype=torch.float64)
        images = (len(affinity), *affinity.shape[2:])
        call("pair_losses", images, offsets, affinity, goal, weights, label, ignore, connected, None, None, losses)
        return (losses / affinity[:, 0].numel()).to(affinity.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        affinity = ctx.saved_tensors[0]
        out = torch.empty_like(affinity)
        scale = 2 * gradient.double().contiguous() / affinity[:, 0].numel()
        images = (len(affinity), *affinity.shape[2:])
        call("pair_losses", images, ctx.offsets, *ctx.saved_tensors, ctx.connected, scale, out, None)
        return out, None, None, None, None, None, None


def pair_losses(
    affinity: Tensor,
    goal: Tensor | None,
    offsets: Sequence[Sequence[int]] | None = None,
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
    goal = None if goal is None else goal.contiguous()
    offsets = offsets or [()] * affinity.shape[1]
    weights = None if weights is None else weights.to(affinity.dtype)
    batch, count, *sides = affinity.shape
    if len(offsets) != count:
        raise ValueError(f"there are {count} affinities of each pixel, but {len(offsets)} offsets")
    _fit("the goal", goal, affinity.shape, affinity.dtype)
    _fit("weights", weights, (batch, count, 2), affinity.dtype)
    _fit("the label", label, (batch, *sides), torch.int32)
    _fit("what to ignore", ignore, (batch, *sides), torch.bool)
    return _PairLosses.apply(affinity.contiguous(), goal, offsets, weights, label, ignore, connected)


def count_pairs(
    label: Tensor, offsets: Sequence[Sequence[int]], ignore: Tensor | None = None, connected: bool = False
) -> Tensor:
    """Return (B, K, 2) int64: the pairs that count, and those of them that are connected; for the arguments see `pair_losses`."""
    _fit("what to ignore", ignore, label.shape, torch.bool)
    counts = torch.empty(len(label), len(offsets), 2, dtype=torch.int64)
    call("count_pairs", label.shape, offsets, label, ignore, connected, counts)
    return counts


def _fit(name: str, tensor: Tensor | None, shape: Sequence[int] | int, dtype: torch.dtype) -> None:
    """Raise unless compiled code, which looks at no shape, may read a tensor."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
        raise ValueError(f"{name} must be {shape} of {dtype}, not {tuple(tensor.shape)} of {tensor.dtype}")


def call(
    name: str, images: Sequence[int], offsets: Sequence[Sequence[int]], *arguments: Tensor | int | float | None
) -> None:
    """Call a function of `native.cpp`.

    Args:
        name: of the function; where there are several, the type of the first tensor is added.
        images: (batch, [z,] y, x).
        offsets: K displacements in array order.
        arguments: what comes after the grid: contiguous tensors, None for a null pointer, numbers.
    """
    if any(len(offset) not in (0, len(images) - 1) for offset in offsets):
        raise ValueError(f"offsets {list(map(list, offsets))} do not fit images with {len(images) - 1} axes")
    flat = [d for offset in offsets for d in (*(0,) * (3 - len(offset)), *offset)]
    batch, *sides = images
    sides = (*(1,) * (3 - len(sides)), *sides)
    grid = _Grid(batch, *sides, torch.get_num_threads(), len(offsets), (ctypes.c_int64 * len(flat))(*flat))
    kind = next(argument.dtype for argument in arguments if isinstance(argument, Tensor))
    suffix = f"_{kind}".replace("torch.", "") if kind.is_floating_point else ""
    getattr(library(), name + suffix)(ctypes.byref(grid), *map(_argument, arguments))


class _Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "z", "y", "x", "threads", "count")]
    _fields_ += [("offsets", ctypes.POINTER(ctypes.c_int64))]


def _argument(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p()
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def library() -> ctypes.CDLL | None:
    """Return the compiled functions, None where they cannot be had."""
    return compiled.library("native", "losses are computed")
