"""Networks. The contract: `forward(image) -> Embedding`, for any image whose sides are multiples of `divisor`."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from gdlib.registry import NETWORKS


class Embedding(NamedTuple):
    """What a network says about a batch of images.

    Attributes:
        embedding: (B, D, [Z,] Y, X) raw per-pixel vectors.
        foreground: (B, 1, [Z,] Y, X) logit of "belongs to an object".
        features: intermediate maps by name, for terms that compare features.
    """

    embedding: Tensor
    foreground: Tensor
    features: dict[str, Tensor]


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """Make a network: a file stem of this folder, or `package.module:Class` for one of your own.

    Args:
        name: which network.
        options: keyword arguments of its class, e.g. `{"widths": [4, 8, 16, 32, 64], "in_channels": 1}`.
    """
    return NETWORKS.get(name)(**options)
