"""Residual 2D U-Net: the paper's teacher (widths 32-64-179-349-680) and its ResUNet-tiny student (4-8-16-32-64)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.models import Embedding

__all__ = ["ResUNet"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, beside a 3x3 projection shortcut.

    The first convolution and the shortcut read the same input, so they are one convolution with twice the output channels:
    the same parameters and the same function, in half the passes over memory.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(in_channels, 2 * out_channels, 3, padding=1)
        self.enter_norm = nn.BatchNorm2d(2 * out_channels)
        self.leave = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.leave_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        main, shortcut = self.enter_norm(self.enter(x)).chunk(2, dim=1)
        return F.relu(self.leave_norm(self.leave(F.relu(main))) + shortcut)


class ResUNet(nn.Module):
    """Residual U-Net with an embedding head and a foreground head.

    Args:
        widths: channels of the stem and of the first block (both at full resolution), then of the blocks at 1/2, 1/4 and 1/8.
            The output of the last block is pooled to 1/16 and starts the decoder; stem and last block are not skips.
        in_channels: channels of the image. PAPER: the original repeats a grey image three times; one channel is the same
            function with fewer weights.
        embedding_dim: length D of the pixel vectors.
        pooled_skips: PAPER: concatenate the pooled map of the next lower resolution before upsampling, as the original does. Off:
            the full map after upsampling, which has the same cost and parameters and keeps fine boundaries.

    Reference: arXiv 2401.06370, ResUNet; foreground head: one 1x1 convolution, trained, because images in use come without
    a ground-truth mask. PAPER: the original carries a deeper head that is never trained.
    """

    divisor = 16
    ndim = 2

    def __init__(
        self,
        *,
        widths: Sequence[int] = (4, 8, 16, 32, 64),
        in_channels: int = 1,
        embedding_dim: int = 16,
        pooled_skips: bool = False,
    ) -> None:
        super().__init__()
        self.pooled_skips = pooled_skips
        f0, f1, f2, f3, f4 = widths
        self.stem = ResidualBlock(in_channels, f0)
        self.down = nn.ModuleList([ResidualBlock(*pair) for pair in ((f0, f1), (f1, f2), (f2, f3), (f3, f4))])
        self.up = nn.ModuleList(
            [ResidualBlock(*pair) for pair in ((f4, f4), (f4 + f3, f3), (f3 + f2, f2), (f2 + f1, f1))]
        )
        self.embedding = nn.Conv2d(f1, embedding_dim, 1)
        self.foreground = nn.Conv2d(f1, 1, 1)

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Y, X), sides multiples of 16, to embedding and foreground of the same size."""
        x = self.stem(x)
        skips = []
        for block in self.down:
            full = block(x)
            x = F.max_pool2d(full, 2)
            skips.append(x if self.pooled_skips else full)
        features = {}
        for level, block in enumerate(self.up):
            if level > 0 and self.pooled_skips:
                x = torch.cat([x, skips[3 - level]], 1)
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            if level > 0 and not self.pooled_skips:
                x = torch.cat([x, skips[3 - level]], 1)
            x = block(x)
            features[f"up{level + 1}"] = x
        return Embedding(self.embedding(x), self.foreground(x), features)
