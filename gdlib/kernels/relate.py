"""What losses need of whole maps, each computed in as few passes as can be."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from gdlib.kernels import fused
from gdlib.kernels.affinities import (
    affinities,
    affinity_targets,
    balance,
    class_weights,
    inside,
    pairs_of,
    unit,
)
from gdlib.kernels.nodes import Instances, gram, numbered, pool_instances
from gdlib.types import Offsets


class Pairs:
    """Pairs of pixels at some offsets: which are connected, and what each weighs.

    Computed on first use, once.
    """

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
        """What compiled code wants to know of the pairs instead; see `fused.pair_losses`."""
        label, ignore = (
            None if x is None else x.contiguous() for x in (numbered(self.label).int(), self.ignore)
        )
        about = label, ignore, self.background_connected
        counts = fused.count_pairs(label, self.offsets, *about[1:])
        return self.offsets, class_weights(counts, self.per_offset), *about


def pair_loss(
    affinity: Tensor, teacher: Tensor | None = None, pairs: Pairs | None = None
) -> Tensor:
    """Weighted squared error of affinities, `1/(B P) sum_b sum_k sum_p w (a - g)^2`: mean over
    pixels, sum over offsets.

    Args:
        affinity: (B, K, [Z,] Y, X).
        teacher: same shape, without gradient; if left out, the target of the pairs.
        pairs: their weights count; if left out, all weigh 1.
    """
    squared = (
        affinity - (pairs.target.to(affinity.dtype) if teacher is None else teacher)
    ).square_()
    if pairs is not None:
        squared = squared.mul_(pairs.weight)
    return squared.sum() / affinity[:, 0].numel()


PAIR_LOSSES = ("labels", "balanced", "teacher")


def pair_losses(
    affinity: Tensor,
    teacher: Tensor | None,
    pairs: Pairs | None,
    kinds: Sequence[str] = PAIR_LOSSES,
) -> dict[str, Tensor]:
    """Compute `pair_loss` of several kinds in one pass: to the `labels`, to the teacher `balanced`,
    and to the `teacher` alone.

    Args:
        affinity: (B, K, [Z,] Y, X).
        teacher: same shape, without gradient; not needed for `labels`.
        pairs: not needed for `teacher`.
        kinds: of `PAIR_LOSSES`.
    """
    if fused.usable(affinity, teacher):
        about = () if pairs is None or set(kinds) == {"teacher"} else pairs.compiled
        found = dict(zip(PAIR_LOSSES, fused.pair_losses(affinity, teacher, *about), strict=True))
        return {kind: found[kind] for kind in kinds}
    arguments = dict(
        zip(PAIR_LOSSES, ((None, pairs), (teacher, pairs), (teacher, None)), strict=True)
    )
    return {kind: pair_loss(affinity, *arguments[kind]) for kind in kinds}


class Relations(NamedTuple):
    """What `relate` computes; None where it was not asked for.

    Attributes:
        affinity: (B, K, [Z,] Y, X), `affinities` of the unit vectors.
        nodes: (B, M, D), `pool_instances` of the raw vectors.
        gram: (B, D, D), `gram` of the unit vectors.
    """

    affinity: Tensor | None = None
    nodes: Tensor | None = None
    gram: Tensor | None = None


def relate(
    rows: Tensor,
    offsets: Offsets = (),
    instances: Instances | None = None,
    moments: bool = False,
    other: Tensor | None = None,
) -> Relations:
    """Compute what losses need of a map, in as few passes over it as possible.

    Args:
        rows: (B, [Z,] Y, X, D) raw vectors.
        offsets: K displacements, for affinities.
        instances: for nodes.
        moments: also compute the Gram matrix.
        other: rows, without gradient, whose unit vectors are subtracted before that.
    """
    if fused.usable(rows, other):
        affinity, second = fused.relate(rows, offsets, moments, other)
    else:
        vectors = unit(rows)
        affinity = affinities(vectors, offsets) if offsets else None
        difference = vectors if other is None or not moments else vectors - unit(other)
        second = gram(difference.flatten(1, -2)) if moments else None
    return Relations(
        affinity,
        pool_instances(rows, instances) if instances else None,
        second,
    )
