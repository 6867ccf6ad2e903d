"""Affinities of vectors in 8 bits, as they are stored and segmented."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gdlib import kernels
from gdlib.boxes import Box, relative
from gdlib.kernels import fused, loops


def quantised_affinities(
    embedding: Tensor, offsets: Sequence[Sequence[int]], box: Box, within: Box
) -> np.ndarray:
    """Cosine affinities of a part of an image, as they are stored.

    Args:
        embedding: (D, [Z,] Y, X) float32, raw.
        offsets: K displacements in array order.
        box: the part, in the embedding.
        within: where the embedding is of the image; a neighbour outside of it is none.

    Returns:
        (K, *sides of the box) uint8, 255 a; 0 where a < 0 and where there is no neighbour.
    """
    if not fused.usable(embedding):
        return _affinities_on_device(embedding, offsets, box, within)
    ndim = len(box)
    sides = tuple(s.stop - s.start for s in box)
    vectors = embedding.contiguous()
    vectors = vectors if ndim == 3 else vectors[:, None]  # 2D is one section
    scale = np.empty(vectors.shape[1:], np.float32)
    out = np.zeros((len(offsets), *(1,) * (3 - ndim), *sides), np.uint8)
    limits = np.array([(0, 1)] * (3 - ndim) + [(s.start, s.stop) for s in within], np.int64)
    first = np.array([0] * (3 - ndim) + [s.start for s in box], np.int64)
    fused.on_lines(loops.lengths, scale[..., 0].size, vectors, scale)
    fused.on_lines(
        loops.levels,
        out[0, ..., 0].size,
        *(vectors, scale, fused.as_triples(offsets, ndim), first, limits, out),
    )
    return out.reshape(len(offsets), *sides)


def _affinities_on_device(
    embedding: Tensor, offsets: Sequence[Sequence[int]], box: Box, within: Box
) -> np.ndarray:
    unit = kernels.unit(kernels.rows(embedding[(None, slice(None), *within)]))
    box = relative(box, within)
    out = np.empty((len(offsets), *(s.stop - s.start for s in box)), np.uint8)
    # one after the other: all at once would be the largest array of all
    for k, offset in enumerate(offsets):
        out[k] = as_uint8(kernels.affinities(unit, [offset])[0, 0][box])
    return out


def as_uint8(share: Tensor) -> np.ndarray:
    """Return numbers in [0, 1] as uint8 on the CPU, rounded; what is outside is clipped."""
    return (share.clamp(0, 1) * 255).round_().to(torch.uint8).cpu().numpy()
