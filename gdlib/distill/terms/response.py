"""Response distillation: the student repeats what the teacher says, as probabilities."""

import torch.nn.functional as F
from torch import Tensor

from gdlib.distill import Targets, Term, View
from gdlib.limits import NotNegative, Positive

__all__ = ["Response"]

# of cosines, so that no probability is 0 or 1: its logit would be infinite and its gradient lost
SHRINK = 0.99


def bernoulli_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(p^T || p^S)` of two probabilities per entry, `p = sigmoid(logit / T)`.

    It is the cross-entropy with the teacher's probability as target, less the teacher's entropy, so
    that it is 0 at the teacher.

    Args:
        student: logits of any shape.
        teacher: same shape, no gradient.
        temperature: T; larger ones make confident answers softer. T^2 keeps the size of the
            gradient.

    Reference: Hinton et al., Distilling the knowledge in a neural network, arXiv 1503.02531,
        section 2, for two classes.
    """
    known = (teacher / temperature).sigmoid()
    crossed = F.binary_cross_entropy_with_logits(student / temperature, known, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher / temperature, known, reduction="none")
    return temperature**2 * (crossed - entropy)


def affinity_logits(affinity: Tensor) -> Tensor:
    """Logit of `p = (1 + a) / 2`, for cosines a in [-1, 1].

    Not of a clipped at 0, as it is when it is segmented: below 0 that has no gradient, and just
    above 0 one without bounds.
    """
    return 2 * (SHRINK * affinity).atanh()


class Response(Term):
    """`bernoulli_divergence` of affinities (sum over offsets, mean over pixels) and of the
    foreground (mean over pixels).

    Args:
        temperature: see `bernoulli_divergence`.
        balanced: weigh connected and separated pairs like the supervised loss does.
        foreground: weight of the foreground beside the affinities.
    """

    whole = True

    def __init__(
        self, *, temperature: Positive = 1.0, balanced: bool = False, foreground: NotNegative = 1.0
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.balanced = balanced
        self.foreground = foreground

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        logits = (affinity_logits(view.affinity) for view in (student, teacher))
        # It is 0 where the neighbour is outside, as both affinities are.
        pairs = bernoulli_divergence(*logits, self.temperature)
        if self.balanced:
            pairs = pairs * targets.balance
        logits = (view.output.foreground.float() for view in (student, teacher))
        pixels = bernoulli_divergence(*logits, self.temperature)
        return pairs.sum(1).mean() + self.foreground * pixels.mean()
