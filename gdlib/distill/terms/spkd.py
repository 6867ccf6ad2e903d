"""SPKD, similarity-preserving distillation: images of a batch that are alike for the teacher are so
for the student.
"""

from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View

__all__ = ["SPKD"]


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`1/B^2 ||G^S - G^T||^2`, G the dot products of whole maps, with rows of length one.

    Of one image it is a differentiable 0, and of two it says little: each row of G holds one number
    of its own.

    Args:
        student: (B, [Z,] Y, X, C).
        teacher: (B, [Z,] Y, X, C'), no gradient.

    Reference: Tung and Mori, Similarity-preserving knowledge distillation, ICCV 2019, activation
        similarities of a batch.
    """
    student, teacher = (
        kernels.unit(flat @ flat.T) for flat in (student.flatten(1), teacher.flatten(1))
    )
    return (student - teacher).square().mean()


class SPKD(Term):
    """`similarity_loss` at a level, or of the embedding."""

    projected = False

    def __init__(self) -> None:
        super().__init__()

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        return similarity_loss(student.rows, teacher.rows)
