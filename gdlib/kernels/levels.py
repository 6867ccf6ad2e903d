"""Where the voxels of a coarser map are in the image."""

from collections.abc import Sequence

import torch
from torch import Tensor


def label_at(
    label: Tensor, shape: Sequence[int], stride: Sequence[int]
) -> tuple[Tensor, tuple[slice, ...]]:
    """Find the label of every voxel of a feature map that is coarser than the label, larger, or
    both.

    Args:
        label: (B, [Z,] Y, X).
        shape: of the map, without batch and channels; label and map have one centre.
        stride: pixels from one voxel of the map to the next.

    Returns:
        The label at the centres of those voxels that lie inside it (of the two middle pixels of an
        even stride, the first), and where these voxels are in the map.
    """
    places, inner = [], []
    for n, first, m, s in zip(
        label.shape[1:], first_centre(label.shape[1:], shape, stride), shape, stride, strict=True
    ):
        start, stop = max(0, -(first // s)), min(m, (n - 1 - first) // s + 1)
        places.append(torch.arange(first + s * start, first + s * stop, s, device=label.device))
        inner.append(slice(start, stop))
    return label[(slice(None), *torch.meshgrid(*places, indexing="ij"))], tuple(inner)


def first_centre(sides: Sequence[int], shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return at which pixel of a label the first voxel of a feature map has its centre.

    It may be outside. See `label_at`.
    """
    return [(n - s * m) // 2 + (s - 1) // 2 for n, m, s in zip(sides, shape, stride, strict=True)]
