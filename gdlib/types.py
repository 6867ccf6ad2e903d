"""What travels between the rooms: an image becomes a `Batch` or a `Prediction`, what a network says
is an `Embedding`.

Nothing here imports torch, so that what works on files alone starts without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Offsets = Sequence[Sequence[int]]  # one displacement per affinity, in array order


class Embedding(NamedTuple):
    """What a network says about a batch of images.

    Attributes:
        embedding: (B, D, [Z,] Y, X) raw per-pixel vectors, `margin` smaller than the image on each
            side.
        foreground: (B, 1, [Z,] Y, X) logit of "belongs to an object".
        features: intermediate maps by name, for terms that compare features.
    """

    embedding: Tensor
    foreground: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Augmented patches.

    Attributes:
        image: (B, C, [Z,] Y, X) float32, larger than the label by a margin where a network needs
            it.
        label: (B, [Z,] Y, X) int64, 0 = background.
        ids: (B,) int64 numbers of the patches, of which no two of a training are equal: the memory
            bank tells them apart by it.
        ignore: (B, [Z,] Y, X) boolean, where the label is not known.
        teacher: what the teacher says of these patches, if it was asked before (`gdlib.data.maps`).
        largest: no id in the label is larger; known where a device is better not asked.
        unlabelled: so many of the last patches are of unlabelled images: their label is what a
            teacher or another program found there, and `ignore` where it is not sure.
    """

    image: Tensor
    label: Tensor
    ids: Tensor
    ignore: Tensor | None = None
    teacher: Embedding | None = None
    largest: int | None = None
    unlabelled: int = 0


@dataclass(frozen=True)
class Prediction:
    """What a network says about an image, or about a part of it.

    Attributes:
        affinity: (K, [Z,] Y, X) uint8, 255 a; negative cosines are 0.
        foreground: ([Z,] Y, X) uint8, 255 p.
        embedding: (D, [Z,] Y, X) float32, raw; None unless it was asked for.
    """

    affinity: np.ndarray
    foreground: np.ndarray
    embedding: np.ndarray | None = None
