"""U-Net for processors in 2D: two convolutions at each level of each way, without shortcuts."""

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.models import Layer, normed, radius
from gdlib.models.resunet import CONVOLUTION, POOL
from gdlib.types import Embedding

__all__ = ["LeanUNet"]

ENLARGE = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class LeanUNet(nn.Module):
    """U-Net whose time on a processor is that of its convolutions.

    Of the time of ResUNet-tiny, the most goes into maps that are as large as the image: projection
    shortcuts, linear upsampling, concatenation, and convolutions that read 24 channels there. Here
    no block has a shortcut; what comes from below is made as large by a transposed convolution
    that has the channels of the place where it goes, and is added to a convolution of the skip.

    Args:
        widths: channels at full resolution and at 1/2, 1/4, 1/8 and 1/16.
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.
    """

    ndim = 2
    pools = ((2, 2), (2, 2), (2, 2), (2, 2))
    divisor = (16, 16)  # the product of all pools
    kernels = ((3, 3), (3, 3), (3, 3), (3, 3), (3, 3))  # of the levels, from fine to coarse
    remainder = margin = (0, 0)
    vectors_by = "embedding"

    def __init__(
        self,
        *,
        widths: tuple[Count, Count, Count, Count, Count] = (8, 16, 32, 64, 64),
        in_channels: Count = 1,
        embedding_dim: Count = 16,
    ) -> None:
        super().__init__()

        def convolution(channels: int, out_channels: int, kernel: Sequence[int]) -> nn.Module:
            padding = tuple(k // 2 for k in kernel)
            return CONVOLUTION[self.ndim](
                channels, out_channels, kernel, padding=padding, bias=False
            )

        self.down = nn.ModuleList(
            nn.Sequential(
                normed(convolution(above, width, kernel), nn.ReLU()),
                normed(convolution(width, width, kernel), nn.ReLU()),
            )
            for above, width, kernel in zip(
                (in_channels, *widths[:-1]), widths, self.kernels, strict=True
            )
        )
        self.skip, self.below, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        levels = zip(itertools.pairwise(widths), self.pools, self.kernels[:-1], strict=True)
        for (width, below), pool, kernel in reversed(list(levels)):
            self.skip.append(normed(convolution(width, width, kernel)))
            self.below.append(normed(ENLARGE[self.ndim](below, width, pool, pool, bias=False)))
            self.up.append(normed(convolution(width, width, kernel), nn.ReLU()))
        self.embedding = CONVOLUTION[self.ndim](widths[0], embedding_dim, 1)
        self.foreground = CONVOLUTION[self.ndim](widths[0], 1, 1)

    @property
    def halo(self) -> tuple[int, ...]:
        """Radius of the receptive field of a pixel."""

        def layers(axis: int) -> list[Layer]:
            # two convolutions at each level on the way down, one behind the sum on the way up
            first, *others = ([Layer(kernel[axis])] * 2 for kernel in self.kernels)
            pools = [pool[axis] for pool in self.pools]
            down = [
                layer
                for pool, block in zip(pools, others, strict=True)
                for layer in (Layer(pool, pool), *block)
            ]
            # what is added to what comes from below saw no more
            up = [
                layer
                for pool, (_, *block) in zip(pools[::-1], [*others[-2::-1], first], strict=True)
                for layer in (Layer(pool, up=pool), *block)
            ]
            return [*first, *down, *up]

        return tuple(radius(layers(axis)) for axis in range(self.ndim))

    @property
    def levels(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Channels and stride of the feature maps, from coarse to fine."""
        out, stride = {}, self.divisor
        for layer, pool in zip(self.skip, reversed(self.pools), strict=True):
            stride = tuple(n // p for n, p in zip(stride, pool, strict=True))
            out[f"stride{stride[-1]}"] = (layer.convolve.out_channels, stride)
        return out

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, [Z,] Y, X), sides multiples of `divisor`, to embedding and foreground
        of the same size.
        """
        x = self.down[0](x)
        skips = []
        for block, pool in zip(self.down[1:], self.pools, strict=True):
            skips.append(x)
            x = block(POOL[self.ndim](x, pool))
        features = []
        for skip, below, block in zip(self.skip, self.below, self.up, strict=True):
            x = block(F.relu(skip(skips.pop()) + below(x)))
            features.append(x)
        return Embedding(
            self.embedding(x), self.foreground(x), dict(zip(self.levels, features, strict=True))
        )
