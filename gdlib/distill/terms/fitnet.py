"""FitNet hints: the student's feature map, projected, is to equal the teacher's."""

from torch import Tensor

from gdlib.distill import Targets, Term, View, check_comparable

__all__ = ["FitNet"]


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`1/(B P D) sum (s - t)^2`, mean over images, pixels and channels.

    Args:
        student: (B, [Z,] Y, X, D).
        teacher: same shape, no gradient.

    Reference: Romero et al., FitNets: hints for thin deep nets, ICLR 2015, equation 3; its hints
        come in a stage of their own before training, here they are a term beside the others, as in
        later comparisons.
    """
    return (student - teacher).square().mean()


class FitNet(Term):
    """`hint_loss` at a level, or of the embedding."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        check_comparable(student.rows, teacher.rows)
        return hint_loss(student.rows, teacher.rows)
