"""U-Net for processors: it works at half resolution and below, on pixels made channels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.models import Layer, enlarged, normed, radius
from gdlib.models.resunet import ResidualBlock
from gdlib.types import Embedding

__all__ = ["ShuffleUNet"]


class ShuffleUNet(nn.Module):
    """Residual U-Net between a pixel unshuffle and a pixel shuffle.

    On a CPU, a tiny network is bound by memory: ResUNet-tiny spends most of its time on maps of few
    channels at full resolution. Here four pixels are four channels from the start, no map but the
    output has full resolution, and what is saved goes into channels.

    Args:
        widths: channels at 1/2, 1/4, 1/8 and 1/16.
        head: channels of the last map, from which the vectors of four pixels are read. More than
            `embedding_dim`, so that vectors are not confined to a part of their space.
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.

    Reference: pixel shuffle: Shi et al., Real-time single image and video super-resolution, CVPR
        2016; the blocks are those of `gdlib.models.resunet`.
    """

    ndim = 2
    divisor = (16, 16)
    remainder = margin = (0, 0)

    def __init__(
        self,
        *,
        widths: tuple[Count, Count, Count, Count] = (16, 24, 32, 64),
        head: Count = 32,
        in_channels: Count = 1,
        embedding_dim: Count = 16,
    ) -> None:
        super().__init__()
        f0, f1, f2, f3 = widths
        self.down = nn.ModuleList(
            [
                ResidualBlock(4 * in_channels, f0),
                ResidualBlock(f0, f1),
                ResidualBlock(f1, f2),
                ResidualBlock(f2, f3),
            ]
        )
        self.up = nn.ModuleList(
            [ResidualBlock(f3 + f2, f2), ResidualBlock(f2 + f1, f1), ResidualBlock(f1 + f0, f0)]
        )
        self.head = normed(nn.Conv2d(f0, head, 3, padding=1, bias=False), nn.ReLU())
        self.embedding = nn.Conv2d(head, 4 * embedding_dim, 1)
        self.foreground = nn.Conv2d(head, 4, 1)

    @property
    def halo(self) -> tuple[int, int]:
        """Radius of the receptive field of a pixel; a block is two convolutions."""
        block: Sequence[Layer] = [Layer(3)] * 2
        down = [Layer(2, 2), *block] * 4
        up = [Layer.linear(2), *block] * 3
        return (radius([*down, *up, Layer(3), Layer(2, up=2)]),) * 2

    @property
    def levels(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """Channels and stride of the feature maps, from coarse to fine."""
        strides = (8, 4, 2)
        return {
            f"stride{s}": (block.leave.out_channels, (s, s))
            for s, block in zip(strides, self.up, strict=True)
        }

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Y, X), sides multiples of 16, to embedding and foreground of the same
        size.
        """
        x = F.pixel_unshuffle(x, 2)
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        features = []
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([enlarged(x, 2), skip], 1))
            features.append(x)
        x = self.head(x)
        embedding, foreground = (
            F.pixel_shuffle(layer(x), 2) for layer in (self.embedding, self.foreground)
        )
        return Embedding(embedding, foreground, dict(zip(self.levels, features, strict=True)))
