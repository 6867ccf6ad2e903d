"""What follows from the output of one network on a batch."""

from collections.abc import Collection, Sequence
from functools import cached_property

from torch import Tensor

from gdlib import kernels
from gdlib.distill.targets import Targets
from gdlib.kernels.levels import label_at
from gdlib.types import Embedding


class View:
    """One network's output on a batch, and the relations in it.

    Each is computed on first use, once.

    Args:
        output: of the network.
        targets: of the same batch.
        uses: relations that will be asked for, and so are computed together, in one pass; see
            `Term.uses`.
        other: the view that `gram` and `pair_loss` will be asked about.
    """

    def __init__(
        self,
        output: Embedding,
        targets: Targets,
        uses: Collection[str] = (),
        other: "View | None" = None,
    ) -> None:
        self.output = output
        self.targets = targets
        self.uses = {*uses}
        if self.uses.intersection(kernels.PAIR_LOSSES):
            self.uses.add("affinity")
        self.other = other

    def feature(self, level: str, stride: Sequence[int]) -> Tensor:
        """(B, C, [Z,] Y, X) float32 feature map, of the voxels whose centres have a label."""
        feature = self.output.features[level].float()
        _, inner = label_at(self.targets.label, feature.shape[2:], stride)
        return feature[(..., *inner)]

    @cached_property
    def rows(self) -> Tensor:
        """(B, [Z,] Y, X, D) float32 raw embedding."""
        return kernels.rows(self.output.embedding)

    @cached_property
    def unit(self) -> Tensor:
        """(B, [Z,] Y, X, D) rows of length one."""
        return kernels.unit(self.rows)

    @cached_property
    def affinity(self) -> Tensor:
        """(B, K, [Z,] Y, X) cosine affinities."""
        return self._relate("affinity").affinity

    @cached_property
    def nodes(self) -> Tensor:
        """(B, M, D) mean raw embedding of every instance."""
        return self._relate("nodes").nodes

    def gram(self, other: "View | None" = None) -> Tensor:
        """(B, D, D) `kernels.gram` of the unit vectors, or of what they are more than those of
        another view.
        """
        return self._relate("gram", other).gram

    def pair_loss(self, kind: str, other: "View | None" = None) -> Tensor:
        """Scalar of `kernels.pair_losses`, where the other view is the teacher's."""
        if kind in self.uses and (kind == "labels" or other is self.other):
            return self._pair_losses[kind]
        teacher = None if other is None else other.affinity
        return kernels.pair_losses(self.affinity, teacher, self.targets.pairs, [kind])[kind]

    @cached_property
    def _pair_losses(self) -> dict[str, Tensor]:
        kinds = [kind for kind in kernels.PAIR_LOSSES if kind in self.uses]
        teacher = None if kinds == ["labels"] else self.other.affinity
        return kernels.pair_losses(self.affinity, teacher, self.targets.pairs, kinds)

    def _relate(self, use: str, other: "View | None" = None) -> kernels.Relations:
        if use not in self.uses or (use == "gram" and other is not self.other):
            return self._compute({use}, other)
        return self._together

    @cached_property
    def _together(self) -> kernels.Relations:
        return self._compute(self.uses, self.other)

    def _compute(self, uses: Collection[str], other: "View | None") -> kernels.Relations:
        subtract = other is not None and "gram" in uses
        if subtract:
            check_comparable(self.rows, other.rows)
        return kernels.relate(
            self.rows,
            self.targets.offsets if "affinity" in uses else (),
            self.targets.instances if "nodes" in uses else None,
            "gram" in uses,
            other.rows if subtract else None,
        )


def check_comparable(student: Tensor, teacher: Tensor) -> None:
    """Raise unless the vectors (..., D) have the same length.

    Terms that compare similarities alone do not need that.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"pixel vectors of the student have length {student.shape[-1]}, those of the teacher "
            f"{teacher.shape[-1]}: give both the same embedding_dim, or use only intra-image agd "
            "and igd edges"
        )
