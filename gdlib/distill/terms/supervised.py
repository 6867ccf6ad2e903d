"""Weighted affinity loss against the ground truth: the whole loss of a teacher, and the base of every student."""

from torch import Tensor

from gdlib.distill import Term, Truth, View

__all__ = ["Supervised"]


def supervised_loss(affinity: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Class-balanced squared error, `1/(B P) sum_b sum_k sum_p w (a - t)^2`: mean over images and pixels, sum over offsets.

    Args:
        affinity: (B, K, [Z,] Y, X) cosine affinities.
        target: same shape, boolean.
        weight: same shape, from `ops.balance`; 0 where the neighbour is outside.

    Reference: arXiv 2401.06370, L_aff.
    """
    squared = (affinity - target.to(affinity.dtype)).square_().mul_(weight)
    return squared.sum() / (affinity.numel() / affinity.shape[1])


class Supervised(Term):
    """`supervised_loss` of the student's affinities."""

    needs_teacher = False

    def __init__(self) -> None:
        super().__init__()

    def forward(self, student: View, teacher: View | None, truth: Truth, memory: dict) -> Tensor:
        """Return the scalar loss."""
        return supervised_loss(student.affinity, truth.affinity, truth.balance)
