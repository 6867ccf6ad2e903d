"""Cross-entropy of the foreground head: images in use come without a ground-truth mask."""

import torch.nn.functional as F
from torch import Tensor

from gdlib.distill import Targets, Term, View

__all__ = ["Foreground"]


class Foreground(Term):
    """Mean binary cross-entropy of "this pixel belongs to an object"."""

    needs_teacher = False

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, student: View, teacher: View | None, targets: Targets, memory: dict
    ) -> Tensor:
        """Return the scalar loss."""
        logit = student.output.foreground[:, 0].float()
        weight = None if targets.ignore is None else (~targets.ignore).to(logit.dtype)
        return F.binary_cross_entropy_with_logits(
            logit, (targets.label > 0).to(logit.dtype), weight
        )
