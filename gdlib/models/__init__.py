"""Networks, in 2D and 3D.

The contract is `forward(image) -> Embedding` and these attributes of the class or the object:

| attribute | meaning; tuples have one entry per axis, in array order |
|---|---|
| `ndim` | number of axes, 2 or 3; written in the class body, where the configuration reads it |
| | without an import |
| `divisor` | an image may be moved by multiples of it, and the output moves along; if it and |
| | the next are written in the class body, the configuration refuses patches that do not fit |
| `remainder` | legal output sides are `k * divisor + remainder` |
| `margin` | pixels that the output is smaller than the image on each side; 0 if it pads |
| `halo` | pixels of context that a block needs on each side: what is farther does not change it; |
| | None if every pixel sees all |
| `vectors_by` | name of the 1x1 convolution whose output are the vectors as they are; written in |
| | the class body itself, and left out where there is none (see `shortened`) |
| `levels` | by name of a feature map its channels and its stride, in pixels per axis, from |
| | coarse to fine |

A level is named by its stride within the plane: `stride8` is the last map whose pixels are 8 image
pixels apart in y and x, that of the decoder where there is one. So networks of any two kinds can be
compared at the levels that both have.

So a block with legal sides that starts at a multiple of `divisor` and comes with `halo` pixels of
context has the same values as in the whole image at once. For networks that pad, `halo` is the
radius of the receptive field of each pixel; a pixel within a block of a network that does not may
look beyond the nearer side of the block by more, but never beyond the `halo` of both.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gdlib import io
from gdlib.registry import NETWORKS


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """Make a network: a file stem of this folder, or `package.module:Class` for one of your own.

    Args:
        name: which network.
        options: keyword arguments of its class, e.g. `{"widths": [4, 8, 16, 32, 64], "in_channels":
            1}`.
    """
    return NETWORKS.make(name, **options)


def trained(path: Path | str, *needed: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a weights file, and its header, in which there must be `needed` keys.

    It starts at random before it gets its weights; the program's random numbers go on as if it had
    not.

    Raises:
        DataError: the file cannot be used (see `io.load_weights`), or its parameters are not those
            of its network.
    """
    state, header = io.load_weights(path)
    return _made(path, header, needed, state), header


def untrained(path: Path | str, *needed: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of an ONNX file of `gdlib export` at random, and the header.

    Such a network only says of which sides and how much of an image the graph wants.

    Raises:
        DataError: the file cannot be used, or there is no such network.
    """
    header = io.read_header(path)
    io.check_trusted(path, header)
    return _made(path, header, needed), header


def _made(
    path: Path | str,
    header: dict[str, Any],
    needed: Sequence[str],
    state: dict[str, Any] | None = None,
) -> nn.Module:
    io.check_header(path, header, ("model", "options", *needed))
    try:
        with torch.random.fork_rng([]):
            network = build(header["model"], header["options"])
        if state is not None:
            network.load_state_dict(state)
    except (ValueError, TypeError, RuntimeError) as error:
        # torch says first that there are errors
        cause = (str(error).splitlines()[1:] or [str(error)])[0].strip()
        raise io.DataError(
            f"{path}: it does not fit the network that its header names, {header['model']} "
            f"{header['options']} ({cause[:200]}); get it again, or train again"
        ) from error
    channels = header.get("channels")
    if channels is not None and header["options"].get("in_channels", channels) != channels:
        raise io.DataError(
            f"{path}: its network takes {header['options']['in_channels']} channel(s), and its "
            f"header says {channels}; get it again, or train again"
        )
    if "offsets" in header and len(header["offsets"][0]) != network.ndim:
        raise io.DataError(
            f"{path}: its network takes images with {network.ndim} axes, and its offsets have "
            f"{len(header['offsets'][0])} numbers; get it again, or train again"
        )
    return network


def normed(convolution: nn.Module, activation: nn.Module | None = None) -> nn.Sequential:
    """Return a convolution, its batch normalisation and an activation, named so that `folded` finds
    them.
    """
    norm = nn.BatchNorm2d if convolution.weight.ndim == 4 else nn.BatchNorm3d
    parts = {"convolve": convolution, "convolve_norm": norm(convolution.out_channels)}
    return nn.Sequential(
        OrderedDict(parts if activation is None else parts | {"activate": activation})
    )


def enlarged(x: Tensor, factor: int) -> Tensor:
    """Return maps (B, C, Y, X) `factor` times as large, linear between the centres of pixels, which
    keep their places.
    """
    return F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)


class Layer(NamedTuple):
    """A layer along one axis, as far as it matters which pixels it looks at.

    Attributes:
        kernel: of a convolution or pool, padded by just so much that sides are divided by `stride`;
            where `up` is above 1, of a transposed convolution.
        stride: input pixels per output pixel.
        dilation: of the kernel.
        up: output pixels per input pixel; `stride` and `dilation` are 1 then.
    """

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    up: int = 1

    @classmethod
    def linear(cls, factor: int) -> "Layer":
        """Linear upsampling: each pixel looks at the two nearest centres, as in a transposed
        convolution of this kernel.
        """
        return cls(2 * factor - factor % 2, up=factor)


def radius(layers: Sequence[Layer]) -> int:
    """Return how far a pixel sees along one axis, at the place within the product of all strides
    where that is farthest.

    Args:
        layers: from the image to the output; where ways through the network part, those of the way
            that sees most.
    """
    pixels = range(math.prod(layer.stride for layer in layers))
    # of what each of these sees, layer by layer back to the image
    first, last = list(pixels), list(pixels)
    for kernel, stride, dilation, up in reversed(layers):
        if up > 1:
            padding = (kernel - up + 1) // 2
            first = [-(-(k + padding - kernel + 1) // up) for k in first]
            last = [(k + padding) // up for k in last]
        else:
            reach = dilation * (kernel - 1)
            padding = (reach - stride + 2) // 2
            first = [k * stride - padding for k in first]
            last = [k * stride - padding + reach for k in last]
    return max(max(pixel - a, b - pixel) for pixel, a, b in zip(pixels, first, last, strict=True))


def folded(network: nn.Module) -> nn.Module:
    """Return a copy for inference: the same function with every batch normalisation merged into its
    convolution.

    By the naming convention of this package, the normalisation of the convolution `x` is called
    `x_norm`. A normalisation of something else, as of maps of several origins, stays; it is a
    multiplication and an addition.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for block in list(network.modules()):
        for name, norm in list(block.named_children()):
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d) and name.endswith("_norm"):
                key = name.removesuffix("_norm")
                convolution = getattr(block, key)
                transposed = isinstance(convolution, nn.ConvTranspose2d | nn.ConvTranspose3d)
                setattr(block, key, fuse_conv_bn_eval(convolution, norm, transpose=transposed))
                setattr(block, name, nn.Identity())
    return network


def shortened(network: nn.Module) -> tuple[nn.Module, Tensor | None]:
    """Return a copy for inference whose vectors are shorter, with the same lengths and angles.

    Vectors of D numbers that one convolution makes of C channels and a bias span no more than C + 1
    dimensions. In an orthonormal basis of these they have C + 1 numbers, with nothing lost. A tiny
    network spends a good part of its time on writing its vectors, and so do the affinities on
    reading them.

    Args:
        network: without batch normalisation (see `folded`).

    Returns:
        The copy, and the basis, (D, C + 1) float32 on the CPU with orthonormal columns: it times a
        vector is that of the network given. Where there is nothing to shorten, that network and
        None.
    """
    # of the class itself: a subclass may go on with what the convolution says
    last = getattr(network, vars(type(network)).get("vectors_by", ""), None)
    if last is None or last.out_channels <= last.in_channels + (last.bias is not None):
        return network, None
    parts = [last.weight.flatten(1)] + ([] if last.bias is None else [last.bias[:, None]])
    whole = torch.cat(parts, 1).detach().cpu().double()  # some devices have no doubles
    if not whole.isfinite().all():
        return network, None
    basis, values, rows = torch.linalg.svd(whole, full_matrices=False)
    rows = (values[:, None] * rows).to(last.weight)
    network = copy.deepcopy(network)
    last = getattr(network, network.vectors_by)
    weight = rows[:, : last.in_channels].reshape(-1, *last.weight.shape[1:])
    last.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if last.bias is not None:
        last.bias = nn.Parameter(rows[:, -1].contiguous(), requires_grad=False)
    last.out_channels = len(rows)
    return network, basis.float()
