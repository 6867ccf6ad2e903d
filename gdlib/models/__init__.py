"""Networks, in 2D and 3D.

The contract is `forward(image) -> Embedding` and six attributes of the class or the object:

| attribute | meaning; tuples have one entry per axis, in array order |
|---|---|
| `ndim` | number of axes, 2 or 3; written in the class body, where the configuration reads it without an import |
| `divisor` | an image may be moved by multiples of it, and the output moves along |
| `remainder` | legal output sides are `k * divisor + remainder` |
| `margin` | pixels that the output is smaller than the image on each side: 0 for networks that pad |
| `halo` | pixels of context that a block needs on each side: what is farther does not change it |
| `levels` | by name of a feature map its channels and its stride, in pixels per axis |

So a block with legal sides that starts at a multiple of `divisor` and comes with `halo` pixels of context has the same values as
in the whole image at once. For networks that pad, `halo` is the radius of the receptive field of each pixel; a pixel within
a block of a network that does not may look beyond the nearer side of the block by more, but never beyond the `halo` of both.
"""

import copy
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gdlib.registry import NETWORKS


class Embedding(NamedTuple):
    """What a network says about a batch of images.

    Attributes:
        embedding: (B, D, [Z,] Y, X) raw per-pixel vectors, `margin` smaller than the image on each side.
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
