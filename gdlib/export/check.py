"""Is what was exported the same function? Asked of images of several sizes, numbers and ranges."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gdlib import kernels
from gdlib.blockwise.blocks import legal_shape
from gdlib.data.axes import fitted
from gdlib.data.intensity import intensity_range, rescale
from gdlib.predict.predictor import Predictor

# images (B, C, *sides) float32 as recorded, and what of them becomes 0 and 1, (C,) each, None for
# each image's own -> affinity (B, K, *sides), foreground (B, 1, *sides), ...
Run = Callable[[np.ndarray, np.ndarray | None, np.ndarray | None], Any]

LARGEST = {2: (512, 512), 3: (16, 160, 160)}  # pixels of an image that are looked at
SMALL = {2: (41, 23), 3: (5, 23, 41)}  # less than offsets reach
# of affinities and foreground, from 0 to 1; it is 0.002 from one level of their 8 bits to the next
TOLERANCE = 2e-3


class Different(ValueError):
    """What was exported is another function."""


def checked(run: Run, predictor: Predictor, image: np.ndarray, *, own_range: bool = True) -> float:
    """Compare what was exported with torch.

    Args:
        run: of what was exported.
        predictor: by torch in float32.
        image: (C, [Z,] Y, X) as recorded.
        own_range: can it find the range of an image by itself? Else images are normalised before.

    Returns:
        The largest difference of affinities and foreground.

    Raises:
        Different: it is larger than `TOLERANCE`, or the shape is another one.
    """
    largest = 0.0
    for batch, given in cases(predictor.network, image):
        if given and not own_range:
            continue
        ranges = [intensity_range(one, **predictor.header["normalisation"]) for one in batch]
        low, high = None, None
        if given:  # as if the images were parts of another one
            low, high = ranges[0][0] - 1, ranges[0][1] * 1.5 + 1
            ranges = [(low, high)] * len(batch)
        seen = [rescale(one, *pair) for one, pair in zip(batch, ranges, strict=True)]
        found = run(np.stack(batch if own_range else seen).astype(np.float32), low, high)
        for k, one in enumerate(seen):
            wanted = expected(predictor, one)
            for name, a, b in zip(("affinity", "foreground"), found, wanted, strict=False):
                shape = "x".join(map(str, one.shape))
                if tuple(a[k].shape) != b.shape:
                    raise Different(f"{name} of an image of {shape} has the shape {a[k].shape}")
                difference = float(np.abs(np.asarray(a[k]) - b).max())
                if not difference <= TOLERANCE:
                    raise Different(
                        f"{name} of an image of {shape}, one of {len(batch)}, differs from that of "
                        f"torch by {difference:.2g}"
                    )
                largest = max(largest, difference)
    return largest


def cases(network: nn.Module, image: np.ndarray) -> Iterator[tuple[list[np.ndarray], bool]]:
    """Yield images (C, *sides) of one size each, and if they are to get a range.

    The size is one that the graph of this network takes; an image that is too small is mirrored.
    """
    image = fitted(image, network.ndim, leading=1)
    largest = [min(pair) for pair in zip(image.shape[1:], LARGEST[network.ndim], strict=True)]
    odd = [max(3, n * 4 // 5 | 1) for n in largest]
    whole = cut(network, image, largest)
    yield [whole], False
    yield [whole], True
    part = cut(network, image, odd)
    yield [part, part[..., ::-1], part.astype(np.float32) ** 2], False
    yield [cut(network, image, SMALL[network.ndim])], False


def cut(network: nn.Module, image: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """Return the middle of an image, of at least these sides where the graph wants others."""
    if any(network.margin):
        sides = legal_shape(network, sides)
        sides = [n + 2 * m for n, m in zip(sides, network.margin, strict=True)]
    missing = [max(0, n - have) for n, have in zip(sides, image.shape[1:], strict=True)]
    if any(missing):
        image = np.pad(image, [(0, 0), *((0, n) for n in missing)], mode="symmetric")
    starts = [(have - n) // 2 for n, have in zip(sides, image.shape[1:], strict=True)]
    inside = (slice(a, a + n) for a, n in zip(starts, sides, strict=True))
    return image[(slice(None), *inside)]


def expected(predictor: Predictor, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return affinity (K, *sides) and foreground (1, *sides) of a normalised image (C, *sides)."""
    if any(predictor.network.margin):
        embedding, logit = predictor.forward(torch.from_numpy(np.ascontiguousarray(image)))
    else:
        source = predictor.source(image)
        source.range = np.zeros(len(image), np.float32), np.ones(len(image), np.float32)
        embedding, logit = predictor.embed(source, tuple(slice(0, n) for n in source.shape))
        logit = logit[None]
    unit = kernels.unit(kernels.rows(embedding[None]))
    affinity = kernels.affinities(unit, predictor.header["offsets"])[0]
    return affinity.clamp(0, 1).numpy(), logit.sigmoid().numpy()


def sides_of(network: nn.Module) -> tuple[int, ...]:
    """Return sides of an image to trace a network with: of no two axes equal, and not such that
    something would be taken for a constant.
    """
    multiples = itertools.islice(itertools.count(4), network.ndim)
    if any(network.margin):
        sides = [k * d for k, d in zip(multiples, network.divisor, strict=True)]
        sides = legal_shape(network, sides)
        return tuple(n + 2 * m for n, m in zip(sides, network.margin, strict=True))
    return tuple(k * d + 5 for k, d in zip(multiples, network.divisor, strict=True))
