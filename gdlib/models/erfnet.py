"""ERFNet, a student of residual blocks whose convolutions are 3 x 1 and 1 x 3."""

from torch import Tensor, nn

from gdlib.limits import Count, NotAll
from gdlib.models import Layer, normed, radius
from gdlib.models.enet import Shrink
from gdlib.types import Embedding

__all__ = ["ERFNet"]

CONTEXT = (2, 4, 8, 16) * 2  # dilations of the blocks at 1/8


class Block(nn.Module):
    """Two pairs of a 3 x 1 and a 1 x 3 convolution, the second one dilated, beside the identity."""

    def __init__(self, channels: int, dropout: float, dilation: int = 1) -> None:
        super().__init__()

        def pair(d: int, *activation: nn.Module) -> list[nn.Module]:
            # A bias before a normalisation would be without effect.
            y = nn.Conv2d(channels, channels, (3, 1), padding=(d, 0), dilation=(d, 1))
            x = nn.Conv2d(channels, channels, (1, 3), padding=(0, d), dilation=(1, d), bias=False)
            return [y, nn.ReLU(inplace=True), normed(x, *activation)]

        self.body = nn.Sequential(
            *pair(1, nn.ReLU(inplace=True)), *pair(dilation), nn.Dropout2d(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


def up(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a transposed convolution that doubles the sides."""
    enlarge = nn.ConvTranspose2d(
        in_channels, out_channels, 3, 2, padding=1, output_padding=1, bias=False
    )
    return normed(enlarge, nn.ReLU(inplace=True))


class ERFNet(nn.Module):
    """ERFNet with an embedding head and a foreground head, each one transposed convolution.

    Args:
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.
        dropout: probability that a block at 1/8 loses a channel; a tenth of it at 1/4 on the way
            down, none on the way up.

    PAPER: left out are what the original carries without effect, a classifier of the encoder (2,064
        parameters) and biases before batch normalisations (3,213).

    Reference: Romera et al., ERFNet: efficient residual factorized ConvNet for real-time semantic
        segmentation, IEEE T-ITS 19(1), 2018.
    """

    ndim = 2
    divisor = (8, 8)
    remainder = margin = (0, 0)
    levels = {"stride8": (128, (8, 8)), "stride4": (64, (4, 4)), "stride2": (16, (2, 2))}

    def __init__(
        self, *, in_channels: Count = 1, embedding_dim: Count = 16, dropout: NotAll = 0.3
    ) -> None:
        super().__init__()
        self.down8 = nn.Sequential(
            Shrink(in_channels, 16, nn.ReLU(inplace=True)),
            Shrink(16, 64, nn.ReLU(inplace=True)),
            *(Block(64, dropout / 10) for _ in range(5)),
            Shrink(64, 128, nn.ReLU(inplace=True)),
            *(Block(128, dropout, dilation) for dilation in CONTEXT),
        )
        self.up4 = nn.Sequential(up(128, 64), Block(64, 0), Block(64, 0))
        self.up2 = nn.Sequential(up(64, 16), Block(16, 0), Block(16, 0))
        self.embedding = nn.ConvTranspose2d(16, embedding_dim, 2, 2)
        self.foreground = nn.ConvTranspose2d(16, 1, 2, 2)

    @property
    def halo(self) -> tuple[int, int]:
        """Radius of the receptive field."""
        down = [Layer(3, 2), Layer(3, 2), *[Layer(3)] * 10, Layer(3, 2)]
        context = [layer for d in CONTEXT for layer in (Layer(3), Layer(3, dilation=d))]
        up = [Layer(3, up=2), *[Layer(3)] * 4] * 2
        return (radius([*down, *context, *up, Layer(2, up=2)]),) * 2

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Y, X), sides multiples of 8, to embedding and foreground of the same
        size.
        """
        eighth = self.down8(x)
        quarter = self.up4(eighth)
        half = self.up2(quarter)
        features = {"stride8": eighth, "stride4": quarter, "stride2": half}
        return Embedding(self.embedding(half), self.foreground(half), features)
