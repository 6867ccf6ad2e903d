"""ENet, a student of few operations: it shrinks the image by 8 early, and finds its way back by
where the maxima were.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count, NotAll
from gdlib.models import Layer, normed, radius
from gdlib.types import Embedding

__all__ = ["ENet"]

# Of the blocks at 1/8: a dilation, or 0 for a convolution of 5 x 1 and 1 x 5.
CONTEXT = (1, 2, 0, 4, 1, 8, 0, 16)
CONTEXT_AGAIN = (1, 2, 0, 4, 8, 0, 16)


class Shrink(nn.Module):
    """Halve the sides: a convolution beside the maxima of the map itself.

    Both are normalised each by themselves, which is what normalising them together is, so that one
    can be folded.
    """

    def __init__(self, in_channels: int, out_channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(
            in_channels, out_channels - in_channels, 3, 2, padding=1, bias=False
        )
        self.convolve_norm = nn.BatchNorm2d(out_channels - in_channels)
        self.norm_pooled = nn.BatchNorm2d(in_channels)
        self.activate = activation

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.convolve_norm(self.convolve(x)), self.norm_pooled(F.max_pool2d(x, 2))]
        return self.activate(torch.cat(parts, 1))


def bottleneck(
    in_channels: int, out_channels: int, dropout: float, *middle: nn.Module
) -> nn.Sequential:
    """Return the branch of a block: narrow, work there, widen without an activation.

    Sometimes drop whole channels.
    """
    narrow = middle[-1].in_channels
    return nn.Sequential(
        normed(nn.Conv2d(in_channels, narrow, 1, bias=False), nn.PReLU()),
        *middle[:-1],
        normed(middle[-1], nn.PReLU()),
        normed(nn.Conv2d(narrow, out_channels, 1, bias=False)),
        nn.Dropout2d(dropout),
    )


class Block(nn.Module):
    """Bottleneck beside the identity; `dilation` 0 is a convolution of 5 x 1 and 1 x 5."""

    def __init__(self, channels: int, dropout: float, dilation: int = 1) -> None:
        super().__init__()
        n = channels // 4
        if dilation:
            middle = [nn.Conv2d(n, n, 3, padding=dilation, dilation=dilation, bias=False)]
        else:
            middle = [
                nn.Conv2d(n, n, k, padding=p, bias=False)
                for k, p in (((5, 1), (2, 0)), ((1, 5), (0, 2)))
            ]
        self.body = bottleneck(channels, channels, dropout, *middle)
        self.activate = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(x + self.body(x))


class Down(nn.Module):
    """Bottleneck that halves the sides, beside a pool.

    Where its maxima were is kept for the way up.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        n = out_channels // 4
        self.mix = normed(nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.body = bottleneck(
            in_channels, out_channels, dropout, nn.Conv2d(n, n, 2, 2, bias=False)
        )
        self.activate = nn.PReLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        return self.activate(self.mix(pooled) + self.body(x)), places


class Up(nn.Module):
    """Bottleneck that doubles the sides, beside an unpool to where the maxima were."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        n = out_channels // 4
        self.mix = normed(nn.Conv2d(in_channels, out_channels, 1, bias=False))
        self.body = bottleneck(
            in_channels, out_channels, dropout, nn.ConvTranspose2d(n, n, 2, 2, bias=False)
        )
        self.activate = nn.PReLU()

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.activate(F.max_unpool2d(self.mix(x), places, 2) + self.body(x))


class ENet(nn.Module):
    """ENet with an embedding head and a foreground head, each one transposed convolution.

    Args:
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.
        dropout: probability that a block loses a channel; a tenth of it at 1/4 on the way down.

    What is unpooled is 0 but at one pixel in four, that of the maximum. Where two pixels are equal
    but for rounding, which one it is may differ between machines, or between an image and its
    blocks.

    PAPER: the original builds nine blocks at 1/8 of the second kind, `CONTEXT_AGAIN`, but passes
        over bottleneck3_5 (17,795 parameters), which is left out here. Beside a pool there is a 1x1
        convolution, where ENet as published appends zeros.

    Reference: Paszke et al., ENet: a deep neural network architecture for real-time semantic
        segmentation, arXiv 1606.02147.
    """

    ndim = 2
    divisor = (8, 8)
    remainder = margin = (0, 0)
    levels = {"stride8": (128, (8, 8)), "stride4": (64, (4, 4)), "stride2": (16, (2, 2))}

    def __init__(
        self, *, in_channels: Count = 1, embedding_dim: Count = 16, dropout: NotAll = 0.1
    ) -> None:
        super().__init__()
        self.stem = Shrink(in_channels, 16, nn.PReLU())
        self.down4 = Down(16, 64, dropout / 10)
        self.blocks4 = nn.Sequential(*(Block(64, dropout / 10) for _ in range(4)))
        self.down8 = Down(64, 128, dropout)
        self.blocks8 = nn.Sequential(
            *(Block(128, dropout, dilation) for dilation in CONTEXT + CONTEXT_AGAIN)
        )
        self.up4 = Up(128, 64, dropout)
        self.refine4 = nn.Sequential(Block(64, dropout), Block(64, dropout))
        self.up2 = Up(64, 16, dropout)
        self.refine2 = Block(16, dropout)
        self.embedding = nn.ConvTranspose2d(16, embedding_dim, 2, 2, bias=False)
        self.foreground = nn.ConvTranspose2d(16, 1, 2, 2)

    @property
    def halo(self) -> tuple[int, int]:
        """Radius of the receptive field."""
        context = [Layer(3, dilation=d) if d else Layer(5) for d in CONTEXT + CONTEXT_AGAIN]
        down = [Layer(3, 2), Layer(2, 2), *[Layer(3)] * 4, Layer(2, 2), *context]
        up = [Layer(2, up=2), Layer(3), Layer(3), Layer(2, up=2), Layer(3), Layer(2, up=2)]
        return (radius(down + up),) * 2

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Y, X), sides multiples of 8, to embedding and foreground of the same
        size.
        """
        x, places4 = self.down4(self.stem(x))
        x, places8 = self.down8(self.blocks4(x))
        eighth = self.blocks8(x)
        quarter = self.refine4(self.up4(eighth, places8))
        half = self.refine2(self.up2(quarter, places4))
        features = {"stride8": eighth, "stride4": quarter, "stride2": half}
        return Embedding(self.embedding(half), self.foreground(half), features)
