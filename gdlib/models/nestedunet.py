"""UNet++, a 2D teacher: between encoder and decoder, every map is refined by all maps of its size
and the one below.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.models import Layer, enlarged, normed, radius
from gdlib.types import Embedding

__all__ = ["NestedUNet"]


def pair(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3x3 convolutions.

    Their biases would be without effect before the normalisations.
    """
    return nn.Sequential(
        normed(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.ReLU(inplace=True)
        ),
        normed(
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), nn.ReLU(inplace=True)
        ),
    )


class NestedUNet(nn.Module):
    """UNet++ with an embedding head and a foreground head.

    Args:
        widths: channels at full resolution, 1/2, 1/4, 1/8 and 1/16.
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.

    PAPER: the original enlarges with aligned corners, see `ResUNet`, and has biases before its
        batch normalisations.

    Reference: Zhou et al., UNet++: redesigning skip connections to exploit multiscale features in
        image segmentation, IEEE TMI 39(6), 2020; without deep supervision.
    """

    ndim = 2
    divisor = (16, 16)
    remainder = margin = (0, 0)
    vectors_by = "embedding"

    def __init__(
        self,
        *,
        widths: tuple[Count, Count, Count, Count, Count] = (64, 128, 256, 512, 1024),
        in_channels: Count = 1,
        embedding_dim: Count = 16,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        enter = [in_channels, *widths]
        # by resolution; the first of a row belongs to the encoder, the last to the decoder
        self.rows = nn.ModuleList()
        for row, width in enumerate(widths):
            below = [(k * width + widths[row + 1]) for k in range(1, len(widths) - row)]
            self.rows.append(
                nn.ModuleList([pair(enter[row], width), *(pair(n, width) for n in below)])
            )
        self.embedding = nn.Conv2d(widths[0], embedding_dim, 1)
        self.foreground = nn.Conv2d(widths[0], 1, 1)

    @property
    def halo(self) -> tuple[int, int]:
        """Radius of the receptive field."""
        pools, block = len(self.widths) - 1, [Layer(3)] * 2
        return (
            radius([*[*block, Layer(2, 2)] * pools, *block, *[Layer.linear(2), *block] * pools]),
        ) * 2

    @property
    def levels(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """Channels and stride of the last map of every resolution, from coarse to fine."""
        rows = reversed(list(enumerate(self.widths)))
        return {f"stride{2**row}": (width, (2**row, 2**row)) for row, width in rows}

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Y, X), sides multiples of `divisor`, to embedding and foreground of the
        same size.
        """
        maps: list[list[Tensor]] = []
        for row, blocks in enumerate(self.rows):
            maps.append([blocks[0](F.max_pool2d(x, 2) if row else x)])
            x = maps[row][0]
            # What can be computed now: one more map of every row above.
            for above in reversed(range(row)):
                sources = [*maps[above], enlarged(maps[above + 1][-1], 2)]
                maps[above].append(self.rows[above][len(maps[above])](torch.cat(sources, 1)))
        last = [row[-1] for row in maps]
        features = dict(zip(self.levels, reversed(last), strict=True))
        return Embedding(self.embedding(last[0]), self.foreground(last[0]), features)
