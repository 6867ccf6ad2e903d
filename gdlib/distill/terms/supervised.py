"""Weighted affinity loss against the ground truth: the whole loss of a teacher, and the base of
every student.
"""

from torch import Tensor

from gdlib.distill import Targets, Term, View

__all__ = ["Supervised"]


class Supervised(Term):
    """Class-balanced squared error of the student's affinities, `kernels.pair_loss`.

    Reference: arXiv 2401.06370, L_aff.
    """

    needs_teacher = False
    uses = ("labels",)

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, student: View, teacher: View | None, targets: Targets, memory: dict
    ) -> Tensor:
        """Return the scalar loss."""
        return student.pair_loss("labels")
