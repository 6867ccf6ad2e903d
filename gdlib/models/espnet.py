"""ESPNet, the smallest of the 2D students: five dilations side by side in every block."""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.models import Layer, normed, radius
from gdlib.types import Embedding

__all__ = ["ESPNet"]

DILATIONS = (1, 2, 4, 8, 16)
BLOCKS = {4: 2, 8: 3}  # by stride; p and q in the paper
WIDTH = 16  # channels of the decoder; in the original the number of outputs


def settled(channels: int) -> nn.Sequential:
    """Return normalisation and activation of maps of several origins."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.PReLU(channels))


class Pyramid(nn.Module):
    """Narrow, look through all dilations, and add these maps up from small to large, so that no
    grid remains.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, shortcut: bool = False
    ) -> None:
        super().__init__()
        n = out_channels // len(DILATIONS)
        kernel = 1 if stride == 1 else 3
        self.narrow = nn.Conv2d(in_channels, n, kernel, stride, padding=kernel // 2, bias=False)
        widths = [out_channels - n * (len(DILATIONS) - 1), *[n] * (len(DILATIONS) - 1)]
        self.look = nn.ModuleList(
            nn.Conv2d(n, width, 3, padding=d, dilation=d, bias=False)
            for width, d in zip(widths, DILATIONS, strict=True)
        )
        self.settle = settled(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.narrow(x)
        nearest, *others = (look(narrow) for look in self.look)
        out = torch.cat([nearest, *accumulate(others)], 1)
        return self.settle(x + out if self.shortcut else out)


class ESPNet(nn.Module):
    """ESPNet with an embedding head and a foreground head, each one transposed convolution.

    Args:
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.

    Reference: Mehta et al., ESPNet: efficient spatial pyramid of dilated convolutions for semantic
        segmentation, ECCV 2018.
    """

    ndim = 2
    divisor = (8, 8)
    remainder = margin = (0, 0)
    levels = {f"stride{s}": (WIDTH, (s, s)) for s in (8, 4, 2)}

    def __init__(self, *, in_channels: Count = 1, embedding_dim: Count = 16) -> None:
        super().__init__()
        self.stem = normed(nn.Conv2d(in_channels, 16, 3, 2, padding=1, bias=False), nn.PReLU(16))
        self.settle2 = settled(16 + in_channels)
        self.down4 = Pyramid(16 + in_channels, 64, stride=2)
        self.blocks4 = nn.Sequential(*(Pyramid(64, 64, shortcut=True) for _ in range(BLOCKS[4])))
        self.settle4 = settled(128 + in_channels)
        self.down8 = Pyramid(128 + in_channels, 128, stride=2)
        self.blocks8 = nn.Sequential(*(Pyramid(128, 128, shortcut=True) for _ in range(BLOCKS[8])))
        self.settle8 = settled(256)
        self.narrow8 = normed(nn.Conv2d(256, WIDTH, 1, bias=False))
        self.narrow4 = nn.Conv2d(128 + in_channels, WIDTH, 1, bias=False)
        self.up4 = nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2, bias=False)
        self.merge4 = nn.Sequential(settled(2 * WIDTH), Pyramid(2 * WIDTH, WIDTH))
        self.up2 = normed(nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2, bias=False), nn.PReLU(WIDTH))
        self.merge2 = normed(
            nn.Conv2d(WIDTH + 16 + in_channels, WIDTH, 3, padding=1, bias=False), nn.PReLU(WIDTH)
        )
        self.embedding = nn.ConvTranspose2d(WIDTH, embedding_dim, 2, 2, bias=False)
        self.foreground = nn.ConvTranspose2d(WIDTH, 1, 2, 2)

    @property
    def halo(self) -> tuple[int, int]:
        """Radius of the receptive field."""
        widest = Layer(3, dilation=max(DILATIONS))
        down = [
            Layer(3, 2),
            *(layer for n in BLOCKS.values() for layer in (Layer(3, 2), *[widest] * (n + 1))),
        ]
        up = [Layer(2, up=2), widest, Layer(2, up=2), Layer(3), Layer(2, up=2)]
        return (radius(down + up),) * 2

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Y, X), sides multiples of 8, to embedding and foreground of the same
        size.
        """
        image2 = F.avg_pool2d(x, 3, 2, padding=1)
        image4 = F.avg_pool2d(image2, 3, 2, padding=1)
        skip2 = self.settle2(torch.cat([self.stem(x), image2], 1))
        x = self.down4(skip2)
        skip4 = self.settle4(torch.cat([self.blocks4(x), x, image4], 1))
        x = self.down8(skip4)
        eighth = self.narrow8(self.settle8(torch.cat([x, self.blocks8(x)], 1)))
        quarter = self.merge4(torch.cat([self.narrow4(skip4), self.up4(eighth)], 1))
        half = self.merge2(torch.cat([self.up2(quarter), skip2], 1))
        features = {"stride8": eighth, "stride4": quarter, "stride2": half}
        return Embedding(self.embedding(half), self.foreground(half), features)
