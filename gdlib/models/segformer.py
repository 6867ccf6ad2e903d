"""SegFormer, a 2D teacher of attention: every pixel sees the whole image, so an image is computed
in one piece.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.models import enlarged, normed
from gdlib.types import Embedding

__all__ = ["SegFormer"]

STRIDES = (4, 8, 16, 32)  # of the stages
REDUCTIONS = (8, 4, 2, 1)  # keys and values are so many times coarser than their stage, per axis
EXPANSIONS = (8, 8, 4, 4)  # of the channels within a block


def as_map(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return tokens (B, Y X, C) as a map (B, C, Y, X)."""
    return x.transpose(1, 2).unflatten(2, shape)


def as_tokens(x: Tensor) -> Tensor:
    """Return a map (B, C, Y, X) as tokens (B, Y X, C)."""
    return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Each token looks at a coarser map of all of them.

    Without biases of keys, which would be without effect.
    """

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.leave = nn.Linear(dim, dim)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.settle = nn.LayerNorm(dim) if reduction > 1 else None

    def forward(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        coarse = x if self.reduce is None else self.settle(as_tokens(self.reduce(as_map(x, shape))))
        parts = (self.query(x), *self.key_value(coarse).chunk(2, 2))
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.leave(
            F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        )


class Mix(nn.Module):
    """Widen, filter each channel with its neighbours in the plane, narrow.

    The only place where tokens learn where they are.
    """

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * dim
        self.widen = nn.Linear(dim, wide)
        self.filter = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.narrow = nn.Linear(wide, dim)

    def forward(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return self.narrow(F.gelu(as_tokens(self.filter(as_map(self.widen(x), shape)))))


class Block(nn.Module):
    """Attention and `Mix`, each on normalised tokens and beside the identity."""

    def __init__(self, dim: int, heads: int, reduction: int, expansion: int) -> None:
        super().__init__()
        self.settle_attention, self.attention = nn.LayerNorm(dim), Attention(dim, heads, reduction)
        self.settle_mix, self.mix = nn.LayerNorm(dim), Mix(dim, expansion)

    def forward(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        x = x + self.attention(self.settle_attention(x), shape)
        return x + self.mix(self.settle_mix(x), shape)


class Stage(nn.Module):
    """Overlapping patches become tokens, which pass through some blocks and become a map again."""

    def __init__(
        self, in_channels: int, dim: int, kernel: int, stride: int, blocks: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, kernel, stride, padding=kernel // 2)
        self.settle_patches, self.settle = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        shape = x.shape[2:]
        x = self.settle_patches(as_tokens(x))
        for block in self.blocks:
            x = block(x, shape)
        return as_map(self.settle(x), shape)


class SegFormer(nn.Module):
    """SegFormer with an embedding head and a foreground head, both at 1/4 and enlarged linearly.

    Args:
        dims: channels at 1/4, 1/8, 1/16 and 1/32.
        heads: of the attention there.
        depths: blocks there.
        decoder_dim: channels of the decoder, at 1/4.
        in_channels: channels of the image.
        embedding_dim: length D of the pixel vectors.

    The first levels are those of the encoder; the decoder has one map, `stride4`.

    PAPER: the original has a 1x1 convolution after each convolution within `Mix`, which doubles its
        parameters, and no normalisation in stages and decoder. This is SegFormer as published,
        without stochastic depth.

    Reference: Xie et al., SegFormer: simple and efficient design for semantic segmentation with
        transformers, NeurIPS 2021; by default B3.
    """

    ndim = 2
    divisor = (32, 32)
    remainder = margin = (0, 0)
    halo = None

    def __init__(
        self,
        *,
        dims: tuple[Count, Count, Count, Count] = (64, 128, 320, 512),
        heads: tuple[Count, Count, Count, Count] = (1, 2, 5, 8),
        depths: tuple[Count, Count, Count, Count] = (3, 3, 18, 3),
        decoder_dim: Count = 256,
        in_channels: Count = 1,
        embedding_dim: Count = 16,
    ) -> None:
        super().__init__()
        if any(dim % count for dim, count in zip(dims, heads, strict=True)):
            raise ValueError(
                f"segformer: dims {list(dims)} must be multiples of heads {list(heads)}"
            )
        self.stages = nn.ModuleList()
        channels, patches = in_channels, ((7, 4), (3, 2), (3, 2), (3, 2))
        for dim, depth, patch, *options in zip(
            dims, depths, patches, heads, REDUCTIONS, EXPANSIONS, strict=True
        ):
            self.stages.append(
                Stage(channels, dim, *patch, [Block(dim, *options) for _ in range(depth)])
            )
            channels = dim
        # Without biases: the normalisation after `fuse` takes them away.
        self.mix = nn.ModuleList(nn.Conv2d(dim, decoder_dim, 1, bias=False) for dim in dims)
        self.fuse = normed(
            nn.Conv2d(4 * decoder_dim, decoder_dim, 1, bias=False), nn.ReLU(inplace=True)
        )
        self.embedding = nn.Conv2d(decoder_dim, embedding_dim, 1)
        self.foreground = nn.Conv2d(decoder_dim, 1, 1)

    @property
    def levels(self) -> dict[str, tuple[int, tuple[int, int]]]:
        """Channels and stride of the feature maps, from coarse to fine."""
        channels = [self.embedding.in_channels, *(mix.in_channels for mix in self.mix[1:])]
        return {
            f"stride{s}": (n, (s, s))
            for n, s in reversed(list(zip(channels, STRIDES, strict=True)))
        }

    def forward(self, x: Tensor) -> Embedding:
        """Map images (B, C, Y, X), sides multiples of 32, to embedding and foreground of the same
        size.
        """
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        parts = [
            enlarged(mix(x), stride // 4)
            for mix, x, stride in zip(self.mix, maps, STRIDES, strict=True)
        ]
        quarter = self.fuse(torch.cat(parts, 1))
        features = dict(zip(self.levels, (*reversed(maps[1:]), quarter), strict=True))
        embedding, foreground = (
            enlarged(head(quarter), 4) for head in (self.embedding, self.foreground)
        )
        return Embedding(embedding, foreground, features)
