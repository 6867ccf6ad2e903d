"""IFVD, intra-class feature variation: how far each pixel is from the mean of its class is what the
teacher says.
"""

import torch.nn.functional as F
from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View

__all__ = ["IFVD"]


def variation(rows: Tensor, classes: kernels.Instances) -> Tensor:
    """Cosine of every pixel's vector with the mean vector of its class: (B * pixels,), 0 for pixels
    without one.

    Args:
        rows: (B, [Z,] Y, X, D).
        classes: of the same batch.
    """
    prototypes = kernels.unit(kernels.pool_instances(rows, classes)).flatten(0, 1)
    prototypes = F.pad(prototypes, (0, 0, 0, 1))  # and a zero for pixels without
    return (
        kernels.unit(rows.reshape(-1, rows.shape[-1])) * prototypes.index_select(0, classes.index)
    ).sum(1)


def variation_loss(student: Tensor, teacher: Tensor, classes: kernels.Instances) -> Tensor:
    """`mean_b mean_p (m^S_p - m^T_p)^2` of the `variation` m, over the pixels p of image b that
    have a class.

    Args:
        student: (B, [Z,] Y, X, C).
        teacher: (B, [Z,] Y, X, C'), no gradient.
        classes: of the same batch.

    Reference: Wang et al., Intra-class feature variation distillation for semantic segmentation,
        ECCV 2020, feature variation maps.
    """
    squared = (variation(student, classes) - variation(teacher, classes)).square()
    total = squared.reshape(len(classes.size), -1).sum(1)
    return (total / classes.size.sum(1).clamp(min=1)).mean()


class IFVD(Term):
    """`variation_loss`; a class is one instance, or the background, of one image.

    PAPER: the original's classes are those of semantic segmentation, whose prototype joins all
        objects of a kind.
    """

    projected = False

    def __init__(self) -> None:
        super().__init__()

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        return variation_loss(student.rows, teacher.rows, targets.instances_and_background)
