"""What the phantoms share: samples that depend on their own number alone, smooth noise, uneven
light.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from gdlib.data.files import SPLITS, Splits
from gdlib.io import Sample
from gdlib.io.failures import DataError


def phantom_splits(
    source: str,
    option: str,
    counts: Mapping[str, int],
    seed: int,
    make: Callable[[np.random.Generator, str], Sample],
) -> Splits:
    """Return samples of which number `i` of a split depends on (seed, split, i) alone, not on how
    many are made.

    Args:
        source: name of the phantom, for messages.
        option: name of what says `counts`.
        counts: split -> number of samples.
        seed: of all samples.
        make: returns a sample from a random generator and its name.
    """
    if set(counts) != set(SPLITS):
        raise DataError(
            f"{source}: {option} must have one number each for {', '.join(SPLITS)}, "
            f"not {dict(counts)}"
        )

    def samples(number: int, split: str) -> Iterator[Sample]:
        for i in range(counts[split]):
            yield make(np.random.default_rng([seed, number, i]), f"{split}_{i:04d}")

    return {split: samples(number, split) for number, split in enumerate(SPLITS)}


def uneven_light(rng: np.random.Generator, size: Sequence[int], fall: float) -> np.ndarray:
    """Return a smooth field (Y, X), 1 at a random brightest place and 1 - `fall` one field diagonal
    away from it.
    """
    y, x = (np.linspace(0, 1, n) - c for n, c in zip(size, rng.uniform(0, 1, 2), strict=True))
    return 1 - fall * np.hypot(y[:, None], x[None]) ** 2 / 2


def smooth_noise(rng: np.random.Generator, size: Sequence[int], *sigmas: float) -> list[np.ndarray]:
    """Return one field (Y, X) for each scale in pixels: Gaussian noise, smoothed, with a standard
    deviation of 1.
    """
    fields = (
        gaussian_filter(rng.standard_normal(size, np.float32), sigma, mode="wrap")
        for sigma in sigmas
    )
    return [field / field.std() for field in fields]
