"""ReKD, knowledge review: each level of the teacher teaches all levels of the student that are as
coarse or coarser.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.distill import Targets, Term, View
from gdlib.limits import Count

__all__ = ["ReKD"]

CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class Fusion(nn.Module):
    """Attention-based fusion of a student's map with what came from the coarser levels.

    Args:
        ndim: number of axes.
        channels: of the student's map.
        middle: channels of what goes on to the next finer level.
        out: channels of the teacher's map.
        coarsest: there is nothing coarser.

    Reference: Chen et al., Distilling knowledge via knowledge review, CVPR 2021, figure 3a.
    """

    def __init__(self, ndim: int, channels: int, middle: int, out: int, coarsest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            CONVOLUTION[ndim](channels, middle, 1, bias=False), NORM[ndim](middle)
        )
        self.attention = None if coarsest else CONVOLUTION[ndim](2 * middle, 2, 1)
        self.expand = nn.Sequential(
            CONVOLUTION[ndim](middle, out, 3, padding=1, bias=False), NORM[ndim](out)
        )

    def forward(self, x: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the map to be compared with the teacher's, and the one for the next finer level.

        Args:
            x: (B, channels, [Z,] Y, X).
            coarser: (B, middle, ...) of the next coarser level; it covers the same part of the
                image.
        """
        x = self.reduce(x)
        if coarser is not None:
            coarser = F.interpolate(coarser, x.shape[2:])  # to the nearest voxel
            share = self.attention(torch.cat([x, coarser], 1)).sigmoid()
            x = share[:, :1] * x + share[:, 1:] * coarser
        return self.expand(x), x


def context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of maps, and of the maps averaged to 4, 2 and 1 voxels per axis, weighted
    1, 1/2, 1/4, 1/8.

    The weights are divided by their sum. A resolution that the map does not exceed along any axis
    is left out.

    Args:
        student: (B, C, [Z,] Y, X).
        teacher: same shape, no gradient.

    Reference: Chen et al., CVPR 2021, hierarchical context loss, figure 3b; the weights are those
        of the authors' code.
    """
    shape, weight = student.shape[2:], 1.0
    total, weights = F.mse_loss(student, teacher), 1.0
    for side in (4, 2, 1):
        if max(shape) > side:
            weight /= 2
            small = [min(side, n) for n in shape]
            total = total + weight * F.mse_loss(
                *(POOL[len(shape)](x, small) for x in (student, teacher))
            )
            weights += weight
    return total / weights


class ReKD(Term):
    """Sum over levels of the `context_loss` between the teacher's map and the student's, fused with
    all coarser ones.

    PAPER: the original reviews the stages of an encoder, from the last back to the first; here the
        levels are those of the decoder where there is one, from coarse to fine, and `middle` is at
        most 64 instead of 512, which suits small students.

    Args:
        levels: feature maps from coarse to fine; used are those that both networks have. At stride
            1 the learned modules would cost more than the student.
        middle: most channels that go from level to level.
    """

    whole = True

    def __init__(
        self,
        *,
        levels: Sequence[str] = ("stride27", "stride9", "stride8", "stride4", "stride3", "stride2"),
        middle: Count = 64,
    ) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.middle = middle

    def attach(self, student: nn.Module, teacher: nn.Module) -> None:
        """Make one `Fusion` per level."""
        common = [n for n in self.levels if n in student.levels and n in teacher.levels]
        common = [n for n in common if student.levels[n][1] == teacher.levels[n][1]]
        if not common:
            raise ValueError(
                f"rekd: student and teacher have no level in common among {', '.join(self.levels)}"
            )
        self.strides = {name: student.levels[name][1] for name in common}
        channels = {n: (student.levels[n][0], teacher.levels[n][0]) for n in common}
        middle = min(self.middle, channels[common[0]][0])
        self.fusions = nn.ModuleDict(
            {
                n: Fusion(student.ndim, channels[n][0], middle, channels[n][1], n == common[0])
                for n in common
            }
        )

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss."""
        total, review = 0.0, None
        for name, stride in self.strides.items():
            fused, review = self.fusions[name](student.feature(name, stride), review)
            total = total + context_loss(fused, teacher.feature(name, stride))
        return total
