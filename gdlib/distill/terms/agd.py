"""AGD, affinity graph distillation: the student's pixel affinities follow the teacher's, within and
between images.
"""

from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View, check_comparable
from gdlib.distill.bank import mean_record
from gdlib.limits import Count

__all__ = ["AGD"]


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


class AGD(Term):
    """Affinity graph distillation: within an image, `kernels.pair_loss` of the student's affinities
    to the teacher's.

    Args:
        memory: compare with images of the memory bank instead of within the image.
        balanced: weigh connected and separated pairs like the supervised loss does (intra only).
        wrap_around: PAPER: also distil the pairs that `torch.roll` makes across opposite borders,
            as the original 2D code does.
        pool: PAPER: average-pool the unit vectors over windows of this side before they are
            compared between images, as the original code does (7); 1 compares all pixels, as the
            paper's formula does.

    Reference: arXiv 2401.06370, L_AGD^intra and L_AGD^inter.
    """

    def __init__(
        self,
        *,
        memory: bool = False,
        balanced: bool = False,
        wrap_around: bool = False,
        pool: Count = 1,
    ) -> None:
        super().__init__(memory)
        self.balanced = balanced
        self.wrap_around = wrap_around
        self.pool = pool
        if memory:
            self.uses = ("gram",) if pool == 1 else (("means", pool),)
        else:
            self.uses = () if wrap_around else ("balanced" if balanced else "teacher",)

    def _gram(self, view: View, other: View | None = None) -> Tensor:
        """(B, D, D) second moments of the unit vectors, pooled if asked, or of what they are more
        than those of another view.
        """
        if self.pool == 1:
            return view.gram(other)
        means = (
            view.means(self.pool)
            if other is None
            else view.means(self.pool) - other.means(self.pool)
        )
        return kernels.gram(means.flatten(1, -2))

    def record(self, teacher: View) -> dict[str, Tensor]:
        """Keep the Gram matrix of each image's vectors."""
        return {f"agd_gram_{self.pool}": self._gram(teacher)}

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss; a differentiable 0 while the bank has nothing to offer."""
        if self.memory:
            check_comparable(student.rows, teacher.rows)
            gram = mean_record(memory, f"agd_gram_{self.pool}")
            return (
                student.rows.sum() * 0
                if gram is None
                else agd_inter_loss(self._gram(student, teacher), gram)
            )
        if self.wrap_around:
            wrapped = (
                kernels.affinities_wrapped(view.unit, targets.offsets)
                for view in (student, teacher)
            )
            return kernels.pair_losses(*wrapped, None, ["teacher"])["teacher"]
        return student.pair_loss("balanced" if self.balanced else "teacher", teacher)
