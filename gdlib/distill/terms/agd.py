"""AGD, affinity graph distillation: the student's pixel affinities follow the teacher's, within and
between images.
"""

from torch import Tensor

from gdlib.distill import Targets, Term, View, check_comparable
from gdlib.distill.bank import mean_record

__all__ = ["AGD"]


class AGD(Term):
    """Affinity graph distillation: within an image, `kernels.pair_loss` of the student's affinities
    to the teacher's.

    Args:
        memory: compare with images of the memory bank instead of within the image.
        balanced: weigh connected and separated pairs like the supervised loss does (intra only).

    Reference: arXiv 2401.06370, L_AGD^intra and L_AGD^inter.
    """

    def __init__(self, *, memory: bool = False, balanced: bool = False) -> None:
        super().__init__(memory)
        self.kind = "balanced" if balanced else "teacher"
        self.uses = ("gram",) if memory else (self.kind,)

    def record(self, teacher: View) -> dict[str, Tensor]:
        """Keep the Gram matrix of each image's unit vectors."""
        return {"gram": teacher.gram()}

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss; a differentiable 0 while the bank has nothing to offer."""
        if not self.memory:
            return student.pair_loss(self.kind, teacher)
        check_comparable(student.rows, teacher.rows)
        if not memory:
            return student.rows.sum() * 0
        return agd_inter_loss(student.gram(teacher), mean_record(memory, "gram"))


def agd_inter_loss(difference: Tensor, memory: Tensor) -> Tensor:
    """Inter-image AGD, `mean_b mean_l mean_(q in memory l, p) (m_q . s_p - m_q . t_p)^2`.

    With the mean Gram matrix G of the memory vectors and D = s - t this is `mean_b sum(G *
    gram(D_b))`: exact, at full resolution, in O(P D^2) instead of O(P^2 D).

    Args:
        difference: (B, D, D) `kernels.gram` of the student's unit vectors minus the teacher's.
        memory: (D, D), mean over the sampled images of `kernels.gram` of their unit vectors.

    Reference: arXiv 2401.06370, L_AGD^inter. PAPER: the original code sums over the batch and, on
        most datasets, over the 12 memory images; with our mean its weight 1 is 24 on those
        datasets (batch 2), and 4 on CVPPP.
    """
    return (difference * memory).sum((1, 2)).mean()
