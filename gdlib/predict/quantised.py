"""Affinities and foreground in 8 bits, of tensors on any device; on a CPU by `gdlib.blockwise`."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gdlib import jit, kernels
from gdlib.blockwise import stored
from gdlib.boxes import Box, relative


def quantised_affinities(
    embedding: Tensor,
    offsets: Sequence[Sequence[int]],
    box: Box,
    within: Box,
    rows: tuple[int, int] = (1, 0),
) -> np.ndarray:
    """Cosine affinities of a part of an image, as they are stored: see `stored.affinities`."""
    if _is_for_loops(embedding):
        return stored.affinities(embedding.numpy(), offsets, box, within, rows)
    return _affinities_on_device(embedding, offsets, box, within, rows)


def _affinities_on_device(
    embedding: Tensor,
    offsets: Sequence[Sequence[int]],
    box: Box,
    within: Box,
    rows: tuple[int, int],
) -> np.ndarray:
    unit = kernels.unit(kernels.rows(embedding[(None, slice(None), *within)]))
    box = relative(box, within)
    out = np.empty((len(offsets), *(s.stop - s.start for s in box)), np.uint8)
    # one after the other: all at once would be the largest array of all
    for k, offset in enumerate(offsets):
        out[k] = as_uint8(kernels.affinities(unit, [offset])[0, 0][box])
    stride, row = rows
    unwanted = np.arange(out.shape[-2]) % stride != row
    out[len(box) :, ..., unwanted, :] = 0
    return out


def quantised_foreground(logit: Tensor) -> np.ndarray:
    """Probabilities of their logits (..., X), as they are stored: see `stored.foreground`."""
    if _is_for_loops(logit):
        return stored.foreground(logit.numpy())
    return as_uint8(logit.sigmoid())


def _is_for_loops(tensor: Tensor) -> bool:
    return jit.ENABLED and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def as_uint8(share: Tensor) -> np.ndarray:
    """Return numbers in [0, 1] as uint8 on the CPU, rounded; what is outside is clipped."""
    return (share.clamp(0, 1) * 255).round_().to(torch.uint8).cpu().numpy()
