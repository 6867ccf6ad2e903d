"""Affinities and foreground in 8 bits, as they are stored and segmented, of what a network says."""

from collections.abc import Sequence

import numpy as np

from gdlib import jit
from gdlib.blockwise import loops
from gdlib.boxes import Box


def affinities(
    embedding: np.ndarray,
    offsets: Sequence[Sequence[int]],
    box: Box,
    within: Box,
    rows: tuple[int, int] = (1, 0),
) -> np.ndarray:
    """Cosine affinities of a part of an image.

    Args:
        embedding: (D, [Z,] Y, X) float32, raw.
        offsets: K displacements in array order.
        box: the part, in the embedding.
        within: where the embedding is of the image; a neighbour outside of it is none.
        rows: every how many rows, from which one of the box on, are filled for offsets after the
            first n, the number of axes.

    Returns:
        (K, *sides of the box) uint8, 255 a; 0 where a < 0, where there is no neighbour and in rows
        that are not wanted.
    """
    ndim = len(box)
    sides = tuple(s.stop - s.start for s in box)
    vectors = np.ascontiguousarray(embedding)
    vectors = vectors if ndim == 3 else vectors[:, None]  # 2D is one section
    scale = np.empty(vectors.shape[1:], np.float32)
    out = np.zeros((len(offsets), *(1,) * (3 - ndim), *sides), np.uint8)
    limits = np.array([(0, 1)] * (3 - ndim) + [(s.start, s.stop) for s in within], np.int64)
    first = np.array([0] * (3 - ndim) + [s.start for s in box], np.int64)
    jit.on_lines(loops.lengths, scale[..., 0].size, vectors, scale)
    jit.on_lines(
        loops.levels,
        out[0, ..., 0].size,
        *(vectors, scale, jit.as_triples(offsets, ndim), first, limits, ndim, *rows, out),
    )
    return out.reshape(len(offsets), *sides)


def warm_up() -> None:
    """Get what is compiled ready, which takes a third of a second. Of one line there are no parts,
    which no thread would take any more when the program is about to end.
    """
    one, everything = np.ones((1, 1, 2), np.float32), (slice(0, 1), slice(0, 2))
    affinities(one, [(0, 1)], everything, everything)
    foreground(one)


def foreground(logit: np.ndarray) -> np.ndarray:
    """Probabilities of their logits.

    Args:
        logit: (..., X) float32.

    Returns:
        Same shape, uint8, 255 p.
    """
    lines = np.ascontiguousarray(logit).reshape(-1, logit.shape[-1])
    out = np.empty(lines.shape, np.uint8)
    jit.on_lines(loops.probabilities, len(lines), lines, out)
    return out.reshape(logit.shape)
