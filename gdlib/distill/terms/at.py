"""AT, attention transfer: the student is to be active where the teacher is."""

from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View

__all__ = ["AT"]


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`mean_b ||q^S / |q^S| - q^T / |q^T| ||^2` with the attention map `q_p = sum_c f_pc^2` of an
    image as one vector.

    Args:
        student: (B, [Z,] Y, X, C).
        teacher: (B, [Z,] Y, X, C'), no gradient.

    Reference: Zagoruyko and Komodakis, Paying more attention to attention, ICLR 2017, equation 2
        with p = 2, squared.
    """
    student, teacher = (kernels.unit(x.square().sum(-1).flatten(1)) for x in (student, teacher))
    return (student - teacher).square().sum(1).mean()


class AT(Term):
    """`attention_loss` at a level, or of the embedding."""

    projected = False

    def __init__(self) -> None:
        super().__init__()

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        return attention_loss(student.rows, teacher.rows)
