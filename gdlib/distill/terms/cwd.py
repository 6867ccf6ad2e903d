"""CWD, channel-wise distillation: every channel is a distribution over the pixels, and follows the
teacher's.
"""

from torch import Tensor

from gdlib.distill import Targets, Term, View, check_comparable
from gdlib.limits import Positive

__all__ = ["CWD"]


def channel_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """`T^2 KL(q^T || q^S)` with `q = softmax(f / T)` over the pixels of a channel.

    Mean over images and channels.

    Args:
        student: (B, [Z,] Y, X, D).
        teacher: same shape, no gradient.
        temperature: T; 4 is the paper's for feature maps.

    Reference: Shu et al., Channel-wise knowledge distillation for dense prediction, ICCV 2021,
        Kullback-Leibler divergence of channels.
    """
    student, teacher = ((x / temperature).flatten(1, -2).log_softmax(1) for x in (student, teacher))
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(1).mean()


class CWD(Term):
    """`channel_loss` at a level, or of the embedding.

    Args:
        temperature: see `channel_loss`.
    """

    def __init__(self, *, temperature: Positive = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        check_comparable(student.rows, teacher.rows)
        return channel_loss(student.rows, teacher.rows, self.temperature)
