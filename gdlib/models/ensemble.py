"""Several networks as one, each seen several ways: a teacher that may cost what it likes.

Affinities of networks can be averaged although their vectors cannot: each network has a space of
its own, and one network puts two touching objects the other way round when the image is turned. The
mean of cosines is the cosine of longer vectors, all of which side by side, and these have few
directions in common. So the vectors of an ensemble are the unit vectors of all views, projected
onto the directions that keep most of their inner products (`gdlib.train.join` finds them): of the
length of a single network's, so that whatever learns from one network learns from this.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.limits import Count
from gdlib.models import build
from gdlib.types import Embedding

__all__ = ["Ensemble"]

VIEWS = 8  # quarter turns of the image and of its mirror image, in the plane


class Ensemble(nn.Module):
    """Networks whose affinities and foreground are averaged.

    Args:
        members: by `model` and `options` each network; all of them 2D or all 3D, and none that
            loses margins.
        augment: every member sees the image in the eight quarter turns and mirror images of the
            plane (Y, X).
        embedding_dim: length of the vectors; None keeps all that members say, one after the other.
        in_channels: of the image.

    Raises:
        ValueError: the members do not go together.
    """

    def __init__(
        self,
        *,
        members: Sequence[Mapping[str, Any]] = ({"model": "resunet"},),
        augment: bool = True,
        embedding_dim: Count | None = 16,
        in_channels: Count = 1,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(
            build(one["model"], {**one.get("options", {}), "in_channels": in_channels})
            for one in members
        )
        self.views = VIEWS if augment else 1
        if not self.members:
            raise ValueError("an ensemble needs at least one member")
        if len({network.ndim for network in self.members}) > 1:
            raise ValueError("members of an ensemble must all be 2D, or all 3D")
        if any(any((*network.margin, *network.remainder)) for network in self.members):
            raise ValueError("a network that loses margins cannot be a member of an ensemble")
        lengths = [_length(network, in_channels) for network in self.members]
        self.lengths = [length for length in lengths for _ in range(self.views)]
        total = sum(self.lengths)
        kept = total if embedding_dim is None else embedding_dim
        if kept > total:
            raise ValueError(
                f"the members' vectors have {total} numbers together: embedding_dim cannot be "
                f"{kept}; make it smaller"
            )
        self.register_buffer("projection", torch.eye(total)[:kept])

    @property
    def ndim(self) -> int:
        """Number of axes of all members."""
        return self.members[0].ndim

    @property
    def remainder(self) -> tuple[int, ...]:
        """Members fill their images."""
        return (0,) * self.ndim

    margin = remainder

    @property
    def divisor(self) -> tuple[int, ...]:
        """What all members can be moved by; the same along Y and X, which are exchanged."""
        sides = zip(*(network.divisor for network in self.members), strict=True)
        return _alike([math.lcm(*one) for one in sides], math.lcm)

    @property
    def halo(self) -> tuple[int, ...] | None:
        """That of the member that sees most; the same along Y and X."""
        halos = [network.halo for network in self.members]
        if None in halos:
            return None
        return _alike([max(one) for one in zip(*halos, strict=True)], max)

    @property
    def levels(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Channels and stride of the feature maps, which are those of the first member."""
        return self.members[0].levels

    @property
    def foreground(self) -> nn.ModuleList:
        """What of it is a foreground head."""
        return nn.ModuleList(network.foreground for network in self.members)

    def seen(self, image: Tensor) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Yield what every member says in every view.

        Args:
            image: (B, C, [Z,] Y, X).

        Yields:
            Unit vectors (B, D, [Z,] Y, X) and foreground probability (B, 1, [Z,] Y, X), of at least
            float32, both turned back; and the feature maps, as the view is turned.
        """
        for network in self.members:
            for view in range(self.views):
                found = network(turned(image, view))
                vectors, logit = (
                    turned(maps, view, back=True).to(torch.promote_types(maps.dtype, torch.float32))
                    for maps in (found.embedding, found.foreground)
                )
                yield F.normalize(vectors, dim=1), logit.sigmoid(), found.features

    def forward(self, image: Tensor) -> Embedding:
        """Map images (B, C, [Z,] Y, X), sides multiples of `divisor`, to embedding and foreground
        of the same size, the logit of the mean probability, and feature maps of the first member.
        """
        parts = self.projection.split(self.lengths, dim=1)
        count = len(parts)
        embedding = foreground = torch.zeros((), device=image.device)
        levels: dict[str, Tensor] = {}
        for part, (vectors, probability, features) in zip(parts, self.seen(image), strict=True):
            levels = levels or features
            embedding = embedding + torch.einsum("kd,bd...->bk...", part, vectors)
            foreground = foreground + probability / count
        foreground = foreground.clamp(1e-6, 1 - 1e-6)
        logit = foreground.log() - (1 - foreground).log()
        return Embedding(embedding / math.sqrt(count), logit, levels)


def turned(maps: Tensor, view: int, back: bool = False) -> Tensor:
    """Turn maps in the plane by `view % 4` quarters, and mirror those from the fourth on.

    Args:
        maps: (..., Y, X).
        view: in [0, 8).
        back: undo it.

    >>> maps = torch.arange(6).view(2, 3)
    >>> all(turned(turned(maps, view), view, back=True).equal(maps) for view in range(VIEWS))
    True
    """
    # by what every engine knows: a turn is an exchange of axes and a mirror
    mirrored, quarters = view >= 4, view % 4
    if back:
        maps = maps.flip(-1) if mirrored else maps
        quarters = -quarters % 4
    if quarters == 2:
        maps = maps.flip(-2, -1)
    elif quarters:
        maps = maps.transpose(-2, -1).flip(-2 if quarters == 1 else -1)
    return maps.flip(-1) if mirrored and not back else maps


def _alike(sides: list[int], common: Any) -> tuple[int, ...]:
    """The last two of these made equal."""
    plane = common(*sides[-2:])
    return (*sides[:-2], plane, plane)


def _length(network: nn.Module, channels: int) -> int:
    """How many numbers a network says of a pixel, found out without computing anything."""
    twin = copy.deepcopy(network).to("meta").eval()
    return twin(torch.empty(1, channels, *network.divisor, device="meta")).embedding.shape[1]
