"""AGD, affinity graph distillation: the student's pixel affinities follow the teacher's, within and between images."""

import torch.nn.functional as F
from torch import Tensor

from gdlib import ops
from gdlib.distill import Term, Truth, View, check_comparable
from gdlib.distill.bank import mean_record

__all__ = ["AGD"]


def agd_loss(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Intra-image AGD, `1/(B P) sum_b sum_k sum_p w (a^S - a^T)^2`.

    Args:
        student: (B, K, [Z,] Y, X) affinities, 0 where the neighbour is outside the image.
        teacher: same shape, no gradient.
        weight: same shape; 1 if left out.

    Reference: arXiv 2401.06370, L_AGD^intra.
    """
    squared = (student - teacher).square_()
    if weight is not None:
        squared = squared.mul_(weight)
    return squared.sum() / (student.numel() / student.shape[1])


def agd_inter_loss(student: Tensor, teacher: Tensor, memory_gram: Tensor) -> Tensor:
    """Inter-image AGD, `mean_b mean_l mean_(q in memory l, p) (m_q . s_p - m_q . t_p)^2`.

    With the mean Gram matrix G of the memory vectors and D = s - t this is `mean_b sum(G * gram(D_b))`: exact, at full
    resolution, in O(P D^2) instead of O(P^2 D).

    Args:
        student: (B, n, D) unit vectors.
        teacher: same shape, no gradient.
        memory_gram: (D, D), mean over the sampled images of `ops.gram` of their unit vectors.

    Reference: arXiv 2401.06370, L_AGD^inter. PAPER: the original code sums over the batch and, on most datasets, over the 12
    memory images; with our mean its weight 1 is 24 on those datasets (batch 2), and 4 on CVPPP.
    """
    return (ops.gram(student - teacher) * memory_gram).sum((1, 2)).mean()


class AGD(Term):
    """Affinity graph distillation.

    Args:
        memory: compare with images of the memory bank instead of within the image.
        balanced: weigh connected and separated pairs like the supervised loss does (intra only).
        wrap_around: PAPER: also distil the pairs that `torch.roll` makes across opposite borders, as the original 2D code does.
        pool: PAPER: average-pool the unit vectors over windows of this side before they are compared between images, as the
            original code does (7); 1 compares all pixels, as the paper's formula does.
    """

    def __init__(
        self, *, memory: bool = False, balanced: bool = False, wrap_around: bool = False, pool: int = 1
    ) -> None:
        super().__init__(memory)
        self.balanced = balanced
        self.wrap_around = wrap_around
        self.pool = pool

    def _vectors(self, view: View) -> Tensor:
        """(B, n, D) unit vectors, pooled if asked."""
        unit = view.unit
        if self.pool > 1:
            maps = unit.movedim(-1, 1)
            pooling = {2: F.avg_pool2d, 3: F.avg_pool3d}[maps.ndim - 2]
            window = (self.pool,) * 2 if maps.ndim == 4 else (3, self.pool, self.pool)
            window = [min(w, n) for w, n in zip(window, maps.shape[2:], strict=True)]
            unit = ops.rows(pooling(maps, window, ceil_mode=True))
        return unit.flatten(1, -2)

    def record(self, teacher: View) -> dict[str, Tensor]:
        """Keep the Gram matrix of each image's vectors."""
        return {f"agd_gram_{self.pool}": ops.gram(self._vectors(teacher))}

    def forward(self, student: View, teacher: View, truth: Truth, memory: dict) -> Tensor:
        """Return the scalar loss; a differentiable 0 while the bank has nothing to offer."""
        if self.memory:
            check_comparable(student.rows, teacher.rows)
            gram = mean_record(memory, f"agd_gram_{self.pool}")
            if gram is None:
                return student.unit.sum() * 0
            return agd_inter_loss(self._vectors(student), self._vectors(teacher), gram)
        if self.wrap_around:
            pair = (ops.affinities_wrapped(view.unit, truth.offsets) for view in (student, teacher))
            return agd_loss(*pair)
        return agd_loss(student.affinity, teacher.affinity, truth.balance if self.balanced else None)
