"""RKD, relational distillation: distances and angles between the images of a batch are those that
the teacher sees.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View
from gdlib.limits import NotNegative

__all__ = ["RKD"]


def distances(x: Tensor) -> Tensor:
    """`|x_i - x_j|` over its mean over all ordered pairs of different images: (B, B), 0 of an image
    with itself.

    Args:
        x: (B, D), a vector per image.
    """
    squared = (x[:, None] - x[None]).square().sum(-1)
    # the root has no gradient at 0
    length = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    return length / (length.sum() / max(1, len(x) * (len(x) - 1))).clamp(min=1e-12)


def angles(x: Tensor) -> Tensor:
    """Cosine of the angle at `x_j` between `x_i` and `x_k`: (B, B, B), 0 where two of the three
    images are the same.

    Args:
        x: (B, D), a vector per image.
    """
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    different = ~(same[:, :, None] | same[:, None, :] | same[None])
    difference = x[:, None] - x[None]
    # Equal vectors have no direction, and get no gradient.
    # [i, j] from j to i
    towards = kernels.unit(torch.where((difference != 0).any(-1, keepdim=True), difference, 0.0))
    return torch.einsum("ijd,kjd->ijk", towards, towards) * different


def huber_mean(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Huber loss (1/2 d^2 up to d = 1, linear beyond) of relations of different images.

    A differentiable 0 of none.

    Args:
        student: (B, B), or (B, B, B), 0 where images are not different.
        teacher: likewise.
    """
    count = math.perm(len(student), student.ndim)
    return F.smooth_l1_loss(student, teacher, reduction="sum") / max(1, count)


class RKD(Term):
    """Weighted `huber_mean` of `distances` and `angles`.

    The vector of an image is the mean over its pixels.

    Of one image it is a differentiable 0. Two images have one distance, which over its own mean is
    1, so that is 0 too.

    Args:
        distance: weight of the distances.
        angle: weight of the angles.

    Reference: Park et al., Relational knowledge distillation, CVPR 2019, distance-wise and
        angle-wise loss, and the ratio of their weights.
    """

    projected = False

    def __init__(self, *, distance: NotNegative = 1.0, angle: NotNegative = 2.0) -> None:
        super().__init__()
        self.distance = distance
        self.angle = angle

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        both = [view.rows.flatten(1, -2).mean(1) for view in (student, teacher)]
        distance = huber_mean(*map(distances, both))
        return self.distance * distance + self.angle * huber_mean(*map(angles, both))
