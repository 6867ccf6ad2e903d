"""Networks. The contract: `forward(image) -> Embedding`, for any image whose sides are multiples of `divisor`."""

import copy
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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


def folded(network: nn.Module) -> nn.Module:
    """Return a copy for inference: the same function with every batch normalisation merged into its convolution.

    By the naming convention of this package, the normalisation of the convolution `x` is called `x_norm`.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for block in list(network.modules()):
        for name, norm in list(block.named_children()):
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d) and name.endswith("_norm"):
                convolution = name.removesuffix("_norm")
                setattr(block, convolution, fuse_conv_bn_eval(getattr(block, convolution), norm))
                setattr(block, name, nn.Identity())
    return network
