"""SKD, structured distillation: any two places of an image are as similar for the student as for
the teacher.
"""

import torch.nn.functional as F
from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View
from gdlib.limits import Count

__all__ = ["SKD"]


def places(rows: Tensor, pool: int) -> Tensor:
    """Mean vectors over windows of `pool` pixels along every axis, at length one: (B, n, C).

    Args:
        rows: (B, [Z,] Y, X, C).
        pool: side of the windows; those at the end may be smaller.
    """
    maps = rows.movedim(-1, 1)
    pooling = {4: F.avg_pool2d, 5: F.avg_pool3d}[maps.ndim]
    window = [min(pool, n) for n in maps.shape[2:]]
    return kernels.unit(kernels.rows(pooling(maps, window, ceil_mode=True))).flatten(1, -2)


def pairwise_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`mean_b 1/n^2 sum_ij (s_i . s_j - t_i . t_j)^2`.

    Args:
        student: (B, n, C) unit vectors; the n x n similarities are made, so n should be some
            hundreds.
        teacher: (B, n, C'), likewise, no gradient.

    Reference: Liu et al., Structured knowledge distillation for semantic segmentation, CVPR 2019,
        pair-wise part.
    """
    student, teacher = (x @ x.transpose(1, 2) for x in (student, teacher))
    return (student - teacher).square().mean()


class SKD(Term):
    """`pairwise_loss` of `places` at a level.

    PAPER: of the three parts of structured distillation this is the pair-wise one. The pixel-wise
        part is the term `response`; the adversarial one, a discriminator that is trained along, is
        left out.

    Args:
        pool: side of the places, in voxels of the feature map.
    """

    projected = False

    def __init__(self, *, pool: Count = 2) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        return pairwise_loss(places(student.rows, self.pool), places(teacher.rows, self.pool))
