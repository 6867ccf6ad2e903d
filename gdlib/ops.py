"""Pure tensor mathematics shared by losses, training and inference; dimension is data (2D = 3D).

Per-pixel vectors are kept as *rows*: (B, [Z,] Y, X, D). A channels-last network output is such an array already, and every
dot product of two pixels then reads two contiguous vectors.

What costs most of it, affinities and the losses of pairs, is computed by `gdlib/native.py` on a CPU, else by the plain functions
here, which say what it means.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gdlib import native

Offsets = Sequence[Sequence[int]]


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from the CPU to a device, for which nothing waits: CUDA copies from pinned memory while the CPU goes on."""
    kind = torch.device(device).type
    return (tensor.pin_memory() if kind == "cuda" else tensor).to(device, non_blocking=kind not in ("cpu", "mps"))


def rows(embedding: Tensor) -> Tensor:
    """View an embedding (B, D, [Z,] Y, X) as rows (B, [Z,] Y, X, D) of at least float32; free if it is channels-last in it."""
    dtype = torch.promote_types(embedding.dtype, torch.float32)
    return embedding.movedim(1, -1).to(dtype, memory_format=torch.contiguous_format).contiguous()


class _Unit(torch.autograd.Function):
    """Rows divided by their length, with a backward in half the passes over memory of autograd's."""

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


def overlap(offset: Sequence[int], shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the slices of all `p` for which `p + offset` is inside the image, and of those `p + offset`.

    >>> overlap((-1, 0), (4, 5))
    ((slice(1, 4, None), slice(0, 5, None)), (slice(0, 3, None), slice(0, 5, None)))
    """
    here = tuple(slice(max(0, -d), max(0, min(n, n - d))) for d, n in zip(offset, shape, strict=True))
    there = tuple(slice(max(0, d), max(0, min(n, n + d))) for d, n in zip(offset, shape, strict=True))
    return here, there


class _Affinities(torch.autograd.Function):
    """Dot products of each row with its neighbours.

    A hand-written backward: autograd through the slices would build one full-size map per offset and direction. Here each
    offset costs two fused multiply-adds (measured 6 times faster than autograd on rows, 3 times than on channels-first
    maps, forward and backward together, on an Intel Xeon).
    """

    @staticmethod
    def forward(ctx, unit: Tensor, offsets: Offsets) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.offsets = offsets
        batch, *shape, _ = unit.shape
        out = unit.new_zeros(batch, len(offsets), *shape)
        for k, offset in enumerate(offsets):
            here, there = overlap(offset, shape)
            out[(slice(None), k, *here)] = (unit[(slice(None), *here)] * unit[(slice(None), *there)]).sum(-1)
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
    """Cosine affinity of every pixel with its neighbours, `a[k, p] = unit[p] . unit[p + offsets[k]]`.

    Args:
        unit: (B, [Z,] Y, X, D) rows of length one.
        offsets: K displacements in array order.

    Returns:
        (B, K, [Z,] Y, X) in [-1, 1]; 0 where the neighbour is outside the image.

    Reference: arXiv 2401.06370, pixel affinities of AGD.
    """
    return _Affinities.apply(unit, tuple(map(tuple, offsets)))


def affinities_wrapped(unit: Tensor, offsets: Offsets) -> Tensor:
    """Like `affinities`, but the image is a torus. PAPER: what the original 2D code distils (`torch.roll`)."""
    dims = tuple(range(1, unit.ndim - 1))
    return torch.stack([(unit * unit.roll([-d for d in o], dims)).sum(-1) for o in offsets], 1)


def inside(offsets: Offsets, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Boolean (K, [Z,] Y, X): is the neighbour inside the image?"""
    out = torch.zeros(len(offsets), *shape, dtype=torch.bool, device=device)
    for k, offset in enumerate(offsets):
        out[(k, *overlap(offset, shape)[0])] = True
    return out


def affinity_targets(label: Tensor, offsets: Offsets, background_connected: bool = True) -> Tensor:
    """Boolean (B, K, [Z,] Y, X): do pixel and neighbour carry the same label? False outside the image.

    Args:
        label: (B, [Z,] Y, X) integer, 0 = background.
        offsets: K displacements in array order.
        background_connected: two background pixels count as the same object, as in the paper's 2D code: the background is one
            more segment. Off: they are apart, as in its 3D code, where the background is membrane.
    """
    batch, *shape = label.shape
    out = torch.zeros(batch, len(offsets), *shape, dtype=torch.bool, device=label.device)
    for k, offset in enumerate(offsets):
        here, there = overlap(offset, shape)
        torch.eq(label[(slice(None), *here)], label[(slice(None), *there)], out=out[(slice(None), k, *here)])
    return out if background_connected else out & (label > 0)[:, None]


def widen_borders(label: Tensor, width: int = 1) -> Tensor:
    """Make pixels background that see another instance within `width` pixels, diagonals too, in the last two axes.

    Args:
        label: (B, [Z,] Y, X) integer, 0 = background.
        width: in pixels.

    Reference: arXiv 2401.06370, EM targets; a window of 3 x 3 pixels is width 1.
    """
    out = label.clone()
    shape = label.shape[1:]
    for dy in range(width + 1):
        for dx in range(-width if dy else 1, width + 1):  # each pair of places once
            here, there = ((slice(None), *part) for part in overlap((0,) * (len(shape) - 2) + (dy, dx), shape))
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
    """Pairs that are valid, and those of them that are connected: (B, K, ...) boolean and broadcastable -> (B, K, 2) int64."""
    valid = valid.expand_as(target)
    return torch.stack([part.flatten(2).sum(2) for part in (valid, target & valid)], 2)


def class_weights(counts: Tensor, per_offset: bool = False) -> Tensor:
    """Weights of separated and of connected pairs that give both classes equal total weight.

    With f = share of connected pairs, clipped to [0.05, 0.99]: if f > 0.5, separated pairs weigh f / (1 - f) and connected
    ones 1; else connected pairs weigh (1 - f) / f and separated ones 1. Where there is one class only, it weighs 1.
    PAPER: the original counts pairs across the border as connected in f; here only pairs inside the image count.

    Args:
        counts: (B, K, 2) of `count_pairs`.
        per_offset: one f per offset (the paper's 3D code) instead of one per image (its 2D code).

    Returns:
        (B, K, 2) float32.
    """
    total, connected = (counts if per_offset else counts.sum(1, keepdim=True).expand_as(counts)).unbind(2)
    f = (connected / total.clamp(min=1)).clamp(0.05, 0.99)
    return torch.stack([torch.where(f > 0.5, f / (1 - f), 1.0), torch.where(f > 0.5, 1.0, (1 - f) / f)], 2)


def balance(target: Tensor, valid: Tensor, per_offset: bool = False) -> Tensor:
    """`class_weights` of every pair: (B, K, ...) float32, 0 where not valid.

    Args:
        target: (B, K, ...) boolean.
        valid: broadcastable boolean; pairs that count.
        per_offset: see `class_weights`.
    """
    weights = class_weights(count_pairs(target, valid), per_offset)
    separated, connected = (part.reshape(*part.shape, *(1,) * (target.ndim - 2)) for part in weights.unbind(2))
    return torch.where(target, connected, separated) * valid


def numbered(label: Tensor) -> Tensor:
    """Number instances anew, all images together, where an id is larger than an image has pixels, as in cuts of large volumes."""
    if int(label.max()) <= label[0].numel():
        return label
    return torch.unique(label, return_inverse=True)[1].reshape(label.shape) + int(label.min() > 0)


class Pairs:
    """Pairs of pixels at some offsets: which are connected, and what each weighs; computed on first use, once."""

    def __init__(
        self,
        label: Tensor,
        offsets: Offsets,
        *,
        ignore: Tensor | None = None,
        background_connected: bool = True,
        per_offset: bool = False,
    ) -> None:
        """Describe the pairs of a batch.

        Args:
            label: (B, [Z,] Y, X) int64, 0 = background.
            offsets: K displacements in array order.
            ignore: same shape, boolean; pairs with such a pixel weigh 0.
            background_connected: see `affinity_targets`.
            per_offset: see `class_weights`.
        """
        self.label = label
        self.offsets = offsets
        self.ignore = ignore
        self.background_connected = background_connected
        self.per_offset = per_offset

    @cached_property
    def target(self) -> Tensor:
        """(B, K, [Z,] Y, X) boolean `affinity_targets`."""
        return affinity_targets(self.label, self.offsets, self.background_connected)

    @cached_property
    def valid(self) -> Tensor:
        """Boolean, expands to (B, K, [Z,] Y, X): both pixels are inside the image and known."""
        valid = inside(self.offsets, self.label.shape[1:], self.label.device)
        return valid if self.ignore is None else valid & ~pairs_of(self.ignore, self.offsets)

    @cached_property
    def weight(self) -> Tensor:
        """(B, K, [Z,] Y, X) float32, `balance`."""
        return balance(self.target, self.valid, self.per_offset)

    @cached_property
    def compiled(self) -> tuple[Offsets, Tensor, Tensor, Tensor | None, bool]:
        """What compiled code wants to know of the pairs instead; see `native.pair_losses`."""
        label, ignore = (None if x is None else x.contiguous() for x in (numbered(self.label).int(), self.ignore))
        about = label, ignore, self.background_connected
        counts = native.count_pairs(label, self.offsets, *about[1:])
        return self.offsets, class_weights(counts, self.per_offset), *about


def pair_loss(affinity: Tensor, goal: Tensor | None = None, pairs: Pairs | None = None) -> Tensor:
    """Weighted squared error of affinities, `1/(B P) sum_b sum_k sum_p w (a - g)^2`: mean over pixels, sum over offsets.

    Args:
        affinity: (B, K, [Z,] Y, X).
        goal: same shape, without gradient; if left out, the target of the pairs.
        pairs: their weights count; if left out, all weigh 1.
    """
    squared = (affinity - (pairs.target.to(affinity.dtype) if goal is None else goal)).square_()
    if pairs is not None:
        squared = squared.mul_(pairs.weight)
    return squared.sum() / affinity[:, 0].numel()


PAIR_LOSSES = ("labels", "balanced", "goal")


def pair_losses(
    affinity: Tensor, goal: Tensor | None, pairs: Pairs | None, kinds: Sequence[str] = PAIR_LOSSES
) -> dict[str, Tensor]:
    """Compute `pair_loss` of several kinds in one pass: to the `labels`, to the goal `balanced`, and to the `goal` alone.

    Args:
        affinity: (B, K, [Z,] Y, X).
        goal: same shape, without gradient; not needed for `labels`.
        pairs: not needed for `goal`.
        kinds: of `PAIR_LOSSES`.
    """
    if native.usable(affinity, goal):
        about = () if pairs is None or set(kinds) == {"goal"} else pairs.compiled
        found = dict(zip(PAIR_LOSSES, native.pair_losses(affinity, goal, *about), strict=True))
        return {kind: found[kind] for kind in kinds}
    arguments = dict(zip(PAIR_LOSSES, ((None, pairs), (goal, pairs), (goal, None)), strict=True))
    return {kind: pair_loss(affinity, *arguments[kind]) for kind in kinds}


class Instances:
    """Which node every pixel belongs to, for a batch, computed once and used for student and teacher.

    Every image has room for as many nodes as any: nodes are (B, M, D), and rows without an instance are 0.

    Attributes:
        index: (B * pixels,) int64, node of each pixel, counted through all images; B * M stands for no node.
        size: (B, M) float32, pixels of each node; 0 where an image has fewer.
        count: (B,) int64, nodes of each image.
    """

    def __init__(self, label: Tensor, background: bool = False, largest: int | None = None) -> None:
        """Number the instances of a batch.

        Args:
            label: (B, [Z,] Y, X) integer, 0 = background.
            background: make the background of each image a node too (PAPER: the original 3D code does).
            largest: no id is larger. It makes room for so many nodes; without it there is room for as many as there are, and
                to know that one must wait for the device.
        """
        batch = len(label)
        first = torch.arange(batch, device=label.device)[:, None]
        known = largest is not None
        if not known:
            label = numbered(label)
            largest = int(label.max())
        size = torch.zeros(batch, largest + 1, device=label.device)
        key = (label.reshape(batch, -1) + size.shape[1] * first).reshape(-1)
        size.view(-1).index_add_(0, key, size.new_ones(1).expand(len(key)))
        wanted = size > 0
        if not background:
            wanted[:, 0] = False
        self.count = wanted.sum(1)
        room = largest + background if known else int(self.count.max())
        node = torch.where(wanted, wanted.cumsum(1) - 1 + room * first, batch * room).reshape(-1)
        self.index = node[key]
        self.size = size.new_zeros(batch * room + 1).index_add_(0, node, size.reshape(-1))[:-1].reshape(batch, room)


def pool_instances(rows: Tensor, instances: Instances) -> Tensor:
    """Mean vector of every instance: the nodes of the instance graph.

    Args:
        rows: (B, [Z,] Y, X, D).
        instances: of the same batch.

    Returns:
        (B, M, D); 0 where an image has fewer than M instances.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    size = instances.size.to(flat.dtype)
    total = flat.new_zeros(size.numel() + 1, flat.shape[1]).index_add(0, instances.index, flat)
    return total[:-1].reshape(*size.shape, flat.shape[1]) / size.clamp(min=1)[..., None]


def pool_windows(rows: Tensor, window: Sequence[int]) -> Tensor:
    """Mean over windows that lie side by side; the last one of an axis may be cut off.

    One matrix product for each axis, forward and backward faster on a CPU than torch's pooling.

    Args:
        rows: (B, [Z,] Y, X, D).
        window: ([z,] y, x) side lengths, in pixels.

    Returns:
        (B, [ceil(Z / z),] ceil(Y / y), ceil(X / x), D).
    """
    for axis, width in enumerate(window, 1):
        before, sides = rows.shape[:axis], rows.shape[axis + 1 :]
        number = torch.arange(rows.shape[axis], device=rows.device) // width
        member = (number == torch.arange(-(-rows.shape[axis] // width), device=rows.device)[:, None]).to(rows.dtype)
        mean = member / member.sum(1, keepdim=True)
        flat = rows.reshape(before.numel(), rows.shape[axis], sides.numel())
        rows = (mean @ flat).reshape(*before, len(mean), *sides)
    return rows


def gram(rows: Tensor) -> Tensor:
    """Second-moment matrix of the vectors of each image, `1/n sum_p r_p r_p^T`.

    Args:
        rows: (B, n, D).

    Returns:
        (B, D, D). With G_M = gram(m) and G_D = gram(d), the mean over all pairs of `(m_p . d_q)^2` is `sum(G_M * G_D)`: relations
        between two images never need the pixel-pair matrix.
    """
    return rows.transpose(1, 2) @ rows / rows.shape[1]


class Relations(NamedTuple):
    """What `relate` computes; None where it was not asked for.

    Attributes:
        affinity: (B, K, [Z,] Y, X), `affinities` of the unit vectors.
        nodes: (B, M, D), `pool_instances` of the raw vectors.
        gram: (B, D, D), `gram` of the unit vectors.
        means: `pool_windows` of the unit vectors.
    """

    affinity: Tensor | None = None
    nodes: Tensor | None = None
    gram: Tensor | None = None
    means: Tensor | None = None


def relate(
    rows: Tensor,
    offsets: Offsets = (),
    instances: Instances | None = None,
    moments: bool = False,
    other: Tensor | None = None,
    window: Sequence[int] | None = None,
) -> Relations:
    """Compute what losses need of a map, in as few passes over it as possible.

    Args:
        rows: (B, [Z,] Y, X, D) raw vectors.
        offsets: K displacements, for affinities.
        instances: for nodes.
        moments: also compute the Gram matrix.
        other: rows, without gradient, whose unit vectors are subtracted before that.
        window: side lengths, for means.
    """
    vectors = unit(rows) if window or not native.usable(rows, other) else None
    if native.usable(rows, other):
        affinity, second = native.relate(rows, offsets, moments, other)
    else:
        affinity = affinities(vectors, offsets) if offsets else None
        difference = vectors if other is None or not moments else vectors - unit(other)
        second = gram(difference.flatten(1, -2)) if moments else None
    return Relations(
        affinity,
        pool_instances(rows, instances) if instances else None,
        second,
        pool_windows(vectors, window) if window else None,
    )


def node_grams(nodes: Tensor, count: Tensor) -> Tensor:
    """`gram` of the nodes of each image, of which `count` (B,) are not 0: (B, M, D) -> (B, D, D); zero without nodes."""
    return nodes.mT @ nodes / count.clamp(min=1)[:, None, None]
