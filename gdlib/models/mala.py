"""MALA, a 3D U-Net of valid convolutions: the paper's EM teacher (widths 12-60-300-1500) and
MALA-tiny (8-16-32-64).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.types import Embedding

__all__ = ["MALA"]

STRIDES = (27, 9, 3, 1)  # of the levels, in y and x


class Pair(nn.Sequential):
    """Two valid 3x3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers = []
        for channels in (in_channels, out_channels):
            layers += [nn.Conv3d(channels, out_channels, 3), nn.LeakyReLU(0.005, inplace=True)]
        super().__init__(*layers)


class Up(nn.Module):
    """Enlarge each channel by a learned 1x3x3 pattern, mix channels linearly, append the centre of
    the skip.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.enlarge = nn.ConvTranspose3d(
            in_channels, in_channels, (1, 3, 3), (1, 3, 3), groups=in_channels, bias=False
        )
        self.mix = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.mix(self.enlarge(x))
        return torch.cat([x, centre(skip, x.shape[2:])], 1)


def centre(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the central part of maps (B, C, *larger) as (B, C, *shape)."""
    starts = [(n - m) // 2 for n, m in zip(x.shape[2:], shape, strict=True)]
    return x[(..., *(slice(s, s + m) for s, m in zip(starts, shape, strict=True)))]


class MALA(nn.Module):
    """U-Net of valid convolutions that pools only within the section.

    Args:
        widths: channels at full resolution, 1/3, 1/9 and 1/27.
        decoder: channels of the decoder at 1/9, 1/3 and full resolution; those of the encoder if
            left out.
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.

    An image of 53 x 268 x 268 gives 25 x 56 x 56 voxels. Its levels are called conv8, conv11,
    conv14 and conv17 in the original.

    Reference: Funke et al., Large scale image segmentation with structured loss based deep learning
        for connectome reconstruction, IEEE TPAMI 41(7), 2019; arXiv 2401.06370 for the widths of
        both networks.
    """

    ndim = 3
    divisor = (1, 27, 27)
    remainder = (0, 2, 2)
    margin = halo = (14, 106, 106)
    vectors_by = "embedding"

    def __init__(
        self,
        *,
        widths: tuple[Count, Count, Count, Count] = (8, 16, 32, 64),
        decoder: tuple[Count, Count, Count] | None = None,
        in_channels: Count = 1,
        embedding_dim: Count = 16,
    ) -> None:
        super().__init__()
        f0, f1, f2, f3 = widths
        d2, d1, d0 = decoder or (f2, f1, f0)
        self.down = nn.ModuleList([Pair(*pair) for pair in ((in_channels, f0), (f0, f1), (f1, f2))])
        self.bottom = Pair(f2, f3)
        self.grow = nn.ModuleList([Up(f3, f2), Up(d2, f1), Up(d1, f0)])
        self.up = nn.ModuleList([Pair(2 * f2, d2), Pair(2 * f1, d1), Pair(2 * f0, d0)])
        self.embedding = nn.Conv3d(d0, embedding_dim, 1)
        self.foreground = nn.Conv3d(d0, 1, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, 0.005)
                nn.init.zeros_(module.bias)

    @property
    def levels(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Channels and stride of the feature maps, from coarse to fine."""
        channels = [pair[0].out_channels for pair in (self.bottom, *self.up)]
        return {f"stride{s}": (n, (1, s, s)) for n, s in zip(channels, STRIDES, strict=True)}

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Z, Y, X) to embedding and foreground, 14 voxels smaller in z and 106 in
        y and x on each side.
        """
        skips = []
        for pair in self.down:
            x = pair(x)
            skips.append(x)
            x = F.max_pool3d(x, (1, 3, 3))
        x = self.bottom(x)
        features = {f"stride{STRIDES[0]}": x}
        for stride, grow, pair in zip(STRIDES[1:], self.grow, self.up, strict=True):
            x = features[f"stride{stride}"] = pair(grow(x, skips.pop()))
        return Embedding(self.embedding(x), self.foreground(x), features)
