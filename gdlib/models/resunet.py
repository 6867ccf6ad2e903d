"""Residual U-Net in 2D: the paper's teacher (widths 32-64-179-349-680) and its ResUNet-tiny student
(4-8-16-32-64).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.models import Layer, radius
from gdlib.types import Embedding

__all__ = ["ResUNet"]

CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {2: F.max_pool2d, 3: F.max_pool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation, beside a projection shortcut of the same kernel.

    The first convolution and the shortcut read the same input, so they are one convolution with
    twice the output channels:
    the same parameters and the same function, in half the passes over memory.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = (3, 3)) -> None:
        super().__init__()
        convolution, norm = CONVOLUTION[len(kernel)], NORM[len(kernel)]
        padding = tuple(k // 2 for k in kernel)
        self.enter = convolution(in_channels, 2 * out_channels, tuple(kernel), padding=padding)
        self.enter_norm = norm(2 * out_channels)
        self.leave = convolution(out_channels, out_channels, tuple(kernel), padding=padding)
        self.leave_norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() and isinstance(self.enter_norm, nn.Identity):
            # For an engine that merges convolutions with what follows them, but not with a split: a
            # fifth less time.
            convolve = F.conv2d if self.enter.weight.ndim == 4 else F.conv3d
            halves = zip(self.enter.weight.chunk(2), self.enter.bias.chunk(2), strict=True)
            main, shortcut = (
                convolve(x, weight, bias, padding=self.enter.padding) for weight, bias in halves
            )
        else:
            main, shortcut = self.enter_norm(self.enter(x)).chunk(2, dim=1)
        return F.relu(self.leave_norm(self.leave(F.relu(main))) + shortcut)


class ResUNet(nn.Module):
    """Residual U-Net with an embedding head and a foreground head.

    Args:
        widths: channels of the stem and of the first block (both at full resolution), then of the
            blocks at 1/2, 1/4 and 1/8. The output of the last block is pooled to 1/16 and starts
            the decoder; stem and last block are not skips.
        in_channels: channels of the image. PAPER: the original repeats a grey image three times;
            one channel is the same function with fewer weights.
        embedding_dim: length D of the pixel vectors.
        pooled_skips: PAPER: concatenate the pooled map of the next lower resolution before
            upsampling, as the original does. Off: the full map after upsampling, which has the same
            cost and parameters and keeps fine boundaries.

    PAPER: the original upsamples with aligned corners, by a factor that depends on the size of the
        map. Here pixel centres keep their places, so that the output moves with the image and large
        images can be computed block by block, exactly.

    Reference: arXiv 2401.06370, ResUNet; foreground head: one 1x1 convolution, trained, because
        images in use come without a ground-truth mask. PAPER: the original carries a deeper head
        that is never trained.
    """

    ndim = 2
    pools = ((2, 2), (2, 2), (2, 2), (2, 2))
    divisor = (16, 16)  # the product of all pools
    # Of the blocks before each pool, and of those that meet their maps again.
    kernels = ((3, 3), (3, 3), (3, 3), (3, 3))
    remainder = margin = (0, 0)
    vectors_by = "embedding"

    def __init__(
        self,
        *,
        widths: tuple[Count, Count, Count, Count, Count] = (4, 8, 16, 32, 64),
        in_channels: Count = 1,
        embedding_dim: Count = 16,
        pooled_skips: bool = False,
    ) -> None:
        super().__init__()
        self.pooled_skips = pooled_skips
        f0, f1, f2, f3, f4 = widths
        k0, k1, k2, k3 = self.kernels
        self.stem = ResidualBlock(in_channels, f0, k0)
        self.down = nn.ModuleList(
            [
                ResidualBlock(f0, f1, k0),
                ResidualBlock(f1, f2, k1),
                ResidualBlock(f2, f3, k2),
                ResidualBlock(f3, f4, k3),
            ]
        )
        self.up = nn.ModuleList(
            [
                ResidualBlock(f4, f4, k3),
                ResidualBlock(f4 + f3, f3, k2),
                ResidualBlock(f3 + f2, f2, k1),
                ResidualBlock(f2 + f1, f1, k0),
            ]
        )
        self.embedding = CONVOLUTION[self.ndim](f1, embedding_dim, 1)
        self.foreground = CONVOLUTION[self.ndim](f1, 1, 1)

    @property
    def halo(self) -> tuple[int, ...]:
        """Radius of the receptive field of a pixel; a block is two convolutions."""

        def layers(axis: int) -> list[Layer]:
            steps = [
                (pool[axis], [Layer(kernel[axis])] * 2)
                for pool, kernel in zip(self.pools, self.kernels, strict=True)
            ]
            down = [layer for pool, block in steps for layer in (*block, Layer(pool, pool))]
            up = [
                layer for pool, block in reversed(steps) for layer in (Layer.linear(pool), *block)
            ]
            return [*steps[0][1], *down, *up]

        return tuple(radius(layers(axis)) for axis in range(self.ndim))

    @property
    def levels(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Channels and stride of the feature maps, from coarse to fine."""
        out, stride = {}, self.divisor
        for block, pool in zip(self.up, reversed(self.pools), strict=True):
            stride = tuple(n // p for n, p in zip(stride, pool, strict=True))
            out[f"stride{stride[-1]}"] = (block.leave.out_channels, stride)
        return out

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, [Z,] Y, X), sides multiples of `divisor`, to embedding and foreground
        of the same size.
        """
        x = self.stem(x)
        skips = []
        for block, pool in zip(self.down, self.pools, strict=True):
            full = block(x)
            x = POOL[self.ndim](full, pool)
            skips.append(x if self.pooled_skips else full)
        features = []
        for level, (block, pool) in enumerate(zip(self.up, reversed(self.pools), strict=True)):
            if level > 0 and self.pooled_skips:
                x = torch.cat([x, skips[3 - level]], 1)
            x = F.interpolate(
                x,
                scale_factor=[float(p) for p in pool],
                mode=LINEAR[self.ndim],
                align_corners=False,
            )
            if level > 0 and not self.pooled_skips:
                x = torch.cat([x, skips[3 - level]], 1)
            x = block(x)
            features.append(x)
        return Embedding(
            self.embedding(x), self.foreground(x), dict(zip(self.levels, features, strict=True))
        )
