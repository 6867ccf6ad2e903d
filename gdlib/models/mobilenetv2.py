"""MobileNetV2 as a dense network: the paper's second student, eight times coarser than the image
inside.
"""

from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.models import Layer, enlarged, normed, radius
from gdlib.types import Embedding

__all__ = ["MobileNetV2"]

# By stride, groups of equal blocks: (expansion, channels, number). At a new stride the first block
# is the one that shrinks.
PLAN = {
    2: [(1, 16, 1), (6, 24, 2)],
    4: [(6, 32, 3), (6, 64, 4), (6, 96, 3)],
    8: [(6, 160, 3), (6, 320, 1)],
}
STEM, TOP = 32, 1280  # channels


class Inverted(nn.Module):
    """Widen, filter each channel by itself, narrow without an activation.

    Around it a shortcut where shapes allow.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * in_channels
        filters = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        parts = [
            normed(filters, nn.ReLU6(inplace=True)),
            normed(nn.Conv2d(wide, out_channels, 1, bias=False)),
        ]
        if expansion > 1:
            parts.insert(
                0, normed(nn.Conv2d(in_channels, wide, 1, bias=False), nn.ReLU6(inplace=True))
            )
        self.body = nn.Sequential(*parts)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1, shrunk by 8 instead of 32, with an embedding head and a foreground
    head.

    Args:
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.

    There is no decoder: both heads are 1x1 convolutions at 1/8, enlarged linearly. So objects that
    are closer than about 8 pixels are hard to tell apart.

    PAPER: the original enlarges with aligned corners, see `ResUNet`, and carries a classifier of
        20,496 parameters that is never used; it is left out here.

    Reference: Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, CVPR 2018;
        arXiv 2401.06370 for the strides.
    """

    ndim = 2
    divisor = (8, 8)
    remainder = margin = (0, 0)
    levels = {f"stride{s}": (TOP if s == 8 else PLAN[s][-1][1], (s, s)) for s in (8, 4, 2)}

    def __init__(self, *, in_channels: Count = 1, embedding_dim: Count = 16) -> None:
        super().__init__()
        self.stem = normed(
            nn.Conv2d(in_channels, STEM, 3, 2, padding=1, bias=False), nn.ReLU6(inplace=True)
        )
        self.stages = nn.ModuleList()
        channels = STEM
        for stride, groups in PLAN.items():
            stage = nn.Sequential()
            for expansion, width, number in groups:
                for _ in range(number):
                    stage.append(
                        Inverted(
                            channels, width, expansion, 2 if stride > 2 and len(stage) == 0 else 1
                        )
                    )
                    channels = width
            self.stages.append(stage)
        self.stages[-1].append(
            normed(nn.Conv2d(channels, TOP, 1, bias=False), nn.ReLU6(inplace=True))
        )
        # of the heads, which come after this, it would make the outputs large
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        self.embedding = nn.Conv2d(TOP, embedding_dim, 1)
        self.foreground = nn.Conv2d(TOP, 1, 1)

    @property
    def halo(self) -> tuple[int, int]:
        """Radius of the receptive field."""
        layers = [Layer(3, 2)]
        for stride, groups in PLAN.items():
            layers += [
                Layer(3, 2 if stride > 2 else 1),
                *[Layer(3)] * (sum(number for *_, number in groups) - 1),
            ]
        return (radius([*layers, Layer.linear(8)]),) * 2

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Y, X), sides multiples of 8, to embedding and foreground of the same
        size.
        """
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.insert(0, x)
        embedding, foreground = (enlarged(head(x), 8) for head in (self.embedding, self.foreground))
        return Embedding(embedding, foreground, dict(zip(self.levels, features, strict=True)))
