"""Affinities of vectors in 8 bits, as they are stored and segmented."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from gdlib import kernels
from gdlib.boxes import Box, relative

STRIP = 2**13  # pixels; their vectors, and those of their neighbours, fit into the cache of a core


def quantised_affinities(
    embedding: Tensor, offsets: Sequence[Sequence[int]], box: Box
) -> np.ndarray:
    """Cosine affinities of a part of an image, as they are stored.

    On a CPU in one pass, in strips that stay in the cache of a core and on as many cores as torch
    may use.

    Args:
        embedding: (D, [Z,] Y, X) float32, raw.
        offsets: K displacements in array order.
        box: the part.

    Returns:
        (K, *sides of the box) uint8, 255 a; 0 where a < 0 and where the neighbour is outside the
        embedding.
    """
    if embedding.device.type != "cpu":
        return _affinities_on_device(embedding, offsets, box)
    vectors = embedding.numpy()
    shape = vectors.shape[1:]
    # times the root of 255, so that a product of two is what is stored
    unit = np.empty(vectors.shape, np.float32)
    out = np.zeros((len(offsets), *(s.stop - s.start for s in box)), np.uint8)

    def normalise(strip: Box) -> None:
        part = np.ascontiguousarray(vectors[(slice(None), *strip)])
        square = np.einsum("c...,c...->...", part, part)
        np.multiply(part, np.sqrt(255 / np.maximum(square, 1e-24)), out=unit[(slice(None), *strip)])

    def relate(strip: Box) -> None:
        for k, offset in enumerate(offsets):
            sides = list(zip(strip, offset, shape, strict=True))
            here = tuple(slice(max(s.start, -d), min(s.stop, n - d)) for s, d, n in sides)
            if all(s.start < s.stop for s in here):
                there = tuple(
                    slice(s.start + d, s.stop + d) for s, d in zip(here, offset, strict=True)
                )
                product = np.einsum(
                    "c...,c...->...", unit[(slice(None), *here)], unit[(slice(None), *there)]
                )
                np.maximum(product, 0, out=product)
                product += 0.5  # what follows cuts off
                out[(k, *relative(here, box))] = product

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for work, part in ((normalise, tuple(slice(0, n) for n in shape)), (relate, box)):
            list(pool.map(work, _strips(part)))
    return out


def _strips(box: Box) -> Iterator[Box]:
    """Cut a box into rows of one section, about `STRIP` pixels at once."""
    *sections, rows, columns = box
    step = max(1, STRIP // max(1, columns.stop - columns.start))
    cuts = [slice(y, min(y + step, rows.stop)) for y in range(rows.start, rows.stop, step)]
    for section in itertools.product(*(range(s.start, s.stop) for s in sections)):
        for cut in cuts:
            yield (*(slice(z, z + 1) for z in section), cut, columns)


def _affinities_on_device(
    embedding: Tensor, offsets: Sequence[Sequence[int]], box: Box
) -> np.ndarray:
    unit = kernels.unit(kernels.rows(embedding[None]))
    out = np.empty((len(offsets), *(s.stop - s.start for s in box)), np.uint8)
    # one after the other: all at once would be the largest array of all
    for k, offset in enumerate(offsets):
        out[k] = as_uint8(kernels.affinities(unit, [offset])[0, 0][box])
    return out


def as_uint8(share: Tensor) -> np.ndarray:
    """Return numbers in [0, 1] as uint8 on the CPU, rounded; what is outside is clipped."""
    return (share.clamp(0, 1) * 255).round_().to(torch.uint8).cpu().numpy()
