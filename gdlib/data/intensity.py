"""Intensities as networks see them: two percentiles of an image become 0 and 1, but noise alone
does not fill that range.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import h5py
import numpy as np

SLAB = 2**24  # pixels looked at at once
SAMPLE = 2**20  # pixels from which noise is estimated
LINES = 64  # of a section, whose noise is looked at in one go
STEPS = (1, 2)  # pixels between those that are compared
GAUSSIAN_MEDIAN = 1.4826  # standard deviations per median of the absolute values of a Gaussian
ROUNDING = 12**-0.5  # standard deviation of what rounding to whole numbers adds
# share of the pixels; from smaller objects, percentiles may not know that there are any
ENOUGH = 0.01
# of the range: a ground whose percentiles lie so far apart has no place of its own
WIDE = 0.6


def intensity_range(
    image: np.ndarray | h5py.Dataset,
    lower: float,
    upper: float,
    contrast: Sequence[float] | None = None,
    level: Sequence[float] | None = None,
    spread: Sequence[float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find what becomes 0 and 1: two percentiles of each channel, or its minimum and maximum where
    they are equal.

    In an image without objects these are nothing but noise. With `contrast`, the range is at least
    so many times the noise: it is widened on both sides, such that what is there comes to lie where
    networks know the background from.

    Args:
        image: (C, [Z,] Y, X), any real type, in memory or in a file; it is read slab by slab. Of
            images of more than 2^24 pixels per channel in another type than uint8 and uint16, every
            n-th section or row is looked at.
        lower: percentile, e.g. 1.
        upper: percentile, e.g. 99.8.
        contrast: for each channel, the least range in standard deviations of its noise, from
            `learn`; without it there is none.
        level: for each channel, the part of a widened range that is below the image, from 0 to 1,
            from `learn`.
        spread: from `learn`; it changes nothing here, see `ground_is_elsewhere`.

    Returns:
        Two (C,) arrays, float32, or float64 for types of which float32 does not have all numbers;
        equal values mean a flat channel.
    """
    low, high = _percentile_range(image, lower, upper)
    if contrast is None:
        return low, high
    with np.errstate(invalid="ignore"):  # NaN and infinite pixels are told where they are read
        wanted = np.float32(contrast)
        enough = np.divide(high - low, wanted, out=np.full_like(low, np.inf), where=wanted > 0)
        more = np.maximum(wanted * pixel_noise(image, enough) - (high - low), 0)
        more[(high == low) & (more == 0)] = 1
        return low - np.float32(level) * more, high + (1 - np.float32(level)) * more


def _percentile_range(
    image: np.ndarray | h5py.Dataset, lower: float, upper: float
) -> tuple[np.ndarray, np.ndarray]:
    kind = working_type(image.dtype)
    out = np.empty((2, image.shape[0]), kind)
    thickness = max(1, SLAB // max(1, int(np.prod(image.shape[2:]))))
    slabs = [slice(k, k + thickness) for k in range(0, image.shape[1], thickness)]
    if image.dtype not in (np.uint8, np.uint16) and len(slabs) > 1:
        slabs = [slice(0, None, len(slabs))]
    for channel in range(image.shape[0]):
        if image.dtype in (np.uint8, np.uint16):
            count = sum(
                np.bincount(image[channel, slab].ravel(), minlength=2 ** (8 * image.dtype.itemsize))
                for slab in slabs
            )
            values = np.flatnonzero(count)
            low, high = _percentiles(values, count[values], (lower, upper))
            lowest, highest = values[0], values[-1]
        else:
            flat = np.concatenate([image[channel, slab].ravel() for slab in slabs]).astype(kind)
            low, high = np.percentile(flat, [lower, upper])
            lowest, highest = flat.min(), flat.max()
        out[:, channel] = (low, high) if kind.type(high) > kind.type(low) else (lowest, highest)
    return out[0], out[1]


def _percentiles(values: np.ndarray, count: np.ndarray, percents: Sequence[float]) -> list[float]:
    """`np.percentile` of sorted values that occur `count` times."""
    last = np.cumsum(count) - 1  # position of the last occurrence of each value in the sorted data
    out = []
    for percent in percents:
        position = percent / 100 * last[-1]
        before, after = (
            values[np.searchsorted(last, p)] for p in (np.floor(position), np.ceil(position))
        )
        out.append(float(before) + (position - np.floor(position)) * (float(after) - float(before)))
    return out


def pixel_noise(
    image: np.ndarray | h5py.Dataset, enough: Sequence[float] | None = None
) -> np.ndarray:
    """Estimate the standard deviation of the noise from pixel to pixel.

    As J. Immerkær does (Comput. Vis. Image Underst. 64, 1996), from second differences along both
    axes of the plane, in which even surfaces and straight edges cancel; but from their median,
    which what is left of objects moves little, and between neighbours or every other pixel,
    whichever say more: in slightly smoothed images, neighbours have nearly equal noise.

    Args:
        image: (C, [Z,] Y, X), any real type, in memory or in a file. Of a channel of more than 2^20
            pixels about so many are looked at, in 16 strips.
        enough: for each channel, a noise that is of no consequence: one below it may be said to
            be smaller than it is, without a search for the median.

    Returns:
        (C,) float32, in grey values; of whole numbers at least what rounding adds.
    """
    strips = _strips(image.shape)
    out = np.zeros(image.shape[0], np.float32)
    for channel in range(len(out)):
        parts = [np.asarray(image[channel, strip], working_type(image.dtype)) for strip in strips]
        for step in STEPS:
            with np.errstate(invalid="ignore", over="ignore"):
                sigmas = GAUSSIAN_MEDIAN / 6  # 1 + 4 + 1
                if enough is not None:
                    limit = 0.999 * enough[channel] / sigmas  # its median cannot be near
                    if _mostly_below(parts, step, limit):
                        continue
                ripples = np.concatenate([_ripples(part, step) for part in parts])
                if ripples.size:
                    out[channel] = max(out[channel], np.median(ripples) * sigmas)
    return np.maximum(out, ROUNDING) if image.dtype.kind in "ui" else out


def _mostly_below(parts: Sequence[np.ndarray], step: int, limit: float) -> bool:
    """Are more than half of the ripples at most so large?

    Lines are looked at until that is sure: mostly there is no need for the last third.
    """
    sides = [np.subtract(part.shape, (0,) * (part.ndim - 2) + (2 * step,) * 2) for part in parts]
    half = sum(math.prod(np.maximum(side, 0).tolist()) for side in sides) / 2
    below = 0
    for part in parts:
        for first in range(0, part.shape[-2] - 2 * step, LINES):
            lines = part[..., first : first + LINES + 2 * step, :]
            below += np.count_nonzero(_ripples(lines, step) <= limit)
            if below > half:
                return True
    return False


def _ripples(part: np.ndarray, step: int) -> np.ndarray:
    """Absolute values of second differences along y and x, between pixels so many steps apart, as a
    list.
    """
    for axis in (-1, -2):
        moved = np.moveaxis(part, axis, -1)
        second = moved[..., 2 * step :] - 2 * moved[..., step:-step] + moved[..., : -2 * step]
        part = np.moveaxis(second, -1, axis)
    return np.abs(part).ravel()


def _strips(shape: Sequence[int]) -> list[slice]:
    """Rows or sections of an image (C, [Z,] Y, X) that stand for the whole: all, or up to 16 groups
    of neighbours.
    """
    # As many as second differences need; in a volume they are within a section.
    least = 1 + 2 * max(STEPS) if len(shape) == 3 else 1
    count = max(least, SAMPLE // max(1, int(np.prod(shape[2:]))))
    if count >= shape[1]:
        return [slice(0, shape[1])]
    groups = min(16, count // least)
    size = count // groups
    return [
        slice(k, k + size) for k in np.linspace(0, shape[1] - size, groups).astype(int).tolist()
    ]


def learn(
    samples: Iterable[Mapping[str, Any]], lower: float, upper: float, noise: float = 1.0
) -> dict[str, Any]:
    """Find how images are to be normalised from those of a training.

    The contrast of an image is its range in standard deviations of its noise: about 5 where there
    is noise alone, 103 and more in images of BBBC039 with objects. The least contrast is that with
    which noise alone fills a given part of the range, but not more than nearly all images with
    objects have: they stay as they are.

    Args:
        samples: `image` (C, [Z,] Y, X), `label` ([Z,] Y, X), perhaps `ignore`, as arrays or
            datasets.
        lower: percentile, e.g. 1.
        upper: percentile, e.g. 99.8.
        noise: part of the range that noise alone may fill; 1 for no least contrast.

    Returns:
        Keyword arguments of `intensity_range`, for this and all other images: lower, upper and,
        unless no image has objects or `noise` is 1, contrast, level and spread. `level` is where
        the background of the images is, between 0 and 1, and `spread` how far apart its 5th and
        its 95th percentile are.
    """
    found: dict[str, Any] = {"lower": lower, "upper": upper}
    contrasts, levels, spreads = [], [], []
    for sample in samples if noise < 1 else ():
        strips = _strips(sample["image"].shape)
        objects = np.concatenate([np.asarray(sample["label"][strip]) > 0 for strip in strips])
        if objects.mean() < ENOUGH:
            continue
        low, high = _percentile_range(sample["image"], lower, upper)
        width, sigma = high - low, pixel_noise(sample["image"])
        contrasts.append(np.divide(width, sigma, out=np.full_like(width, np.inf), where=sigma > 0))
        ground = ~objects
        if sample.get("ignore") is not None:
            ground &= ~np.concatenate([sample["ignore"][strip] for strip in strips])
        if ground.any() and (width > 0).all():
            parts = (
                np.concatenate([sample["image"][c, strip] for strip in strips])
                for c in range(len(width))
            )
            darkest, middle, brightest = np.transpose(
                [np.percentile(part[ground], (5, 50, 95)) for part in parts]
            )
            levels.append((middle - low) / width)
            spreads.append((brightest - darkest) / width)
    if contrasts:
        # Of so many values the smallest: where a few images are unlike all others, or falsely
        # annotated, they do not count.
        usual = np.quantile(contrasts, 0.05, axis=0, method="lower")
        alone = [
            NormalDist().inv_cdf(min(max(percent / 100, 1e-4), 1 - 1e-4))
            for percent in (lower, upper)
        ]
        least = np.minimum(usual, (alone[1] - alone[0]) / noise)
        least[~np.isfinite(usual)] = 0  # of images without noise nothing can be learned
        level, spread = (
            np.clip(np.median(one, axis=0), 0, 1) if one else np.zeros_like(least)
            for one in (levels, spreads)
        )
        found |= {
            key: np.round(value.astype(float), 4).tolist()
            for key, value in (("contrast", least), ("level", level), ("spread", spread))
        }
    return found


def rescale(image: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map `low` to 0 and `high` to 1; values outside stay outside, a flat channel becomes 0.

    Args:
        image: (C, [Z,] Y, X), any real type.
        low: (C,), from `intensity_range`, as is `high`.
        high: (C,).

    Returns:
        float32 array of the same shape.
    """
    column = (-1,) + (1,) * (image.ndim - 1)
    # The offset is taken off first: beside 2^31, float32 has no contrast of 100.
    image = image.astype(working_type(image.dtype)) - low.reshape(column)
    return (image / span(low, high).reshape(column)).astype(np.float32, copy=False)


class Negative:
    """An image, or a dataset on disk, in which dark is bright and bright is dark.

    Whole numbers are complemented, so that none leaves its type; others change their sign. What is
    meant by a number is lost, which networks do not see.

    Args:
        array: parts of it are read by integers and slices.
    """

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape, self.dtype = tuple(array.shape), array.dtype
        self.ndim, self.chunks = len(self.shape), getattr(array, "chunks", None)

    def __getitem__(self, key: Any) -> np.ndarray:
        part = np.asarray(self.array[key])
        return -part if part.dtype.kind == "f" else ~part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)


def ground_is_elsewhere(
    image: np.ndarray | h5py.Dataset,
    low: np.ndarray,
    high: np.ndarray,
    level: Sequence[float],
    spread: Sequence[float] | None = None,
) -> bool:
    """Say whether most of an image is as bright as objects are, or as dark. Where the ground of the
    training was of all kinds itself, as in and around a well, there is no telling.

    Args:
        image: (C, [Z,] Y, X), any real type; strips of it are looked at.
        low: (C,), from `intensity_range`, as is `high`.
        high: (C,).
        level: for each channel, where the ground lies between both in the images of the training,
            from `learn`.
        spread: for each channel, how far apart the ground was there, from `learn`.
    """
    if spread is not None and max(spread) > WIDE:
        return False
    median = [
        np.median(np.concatenate([np.asarray(image[c, strip]).ravel()[::7] for strip in strips]))
        for strips in [_strips(image.shape)]
        for c in range(image.shape[0])
    ]
    place = (np.array(median) - low) / span(low, high)
    return bool((np.abs(place - np.array(level)) > 0.6).all())


def working_type(stored: np.dtype) -> np.dtype:
    """Return float32 for types all of whose numbers it has, float64 for others."""
    return np.result_type(stored, np.float32)


def as_float32(image: np.ndarray) -> np.ndarray:
    """Convert an image; of channels whose contrast float32 would not resolve beside their offset,
    the offset is taken off.

    Networks see the same, for what they see is normalised.

    Args:
        image: (C, [Z,] Y, X), any real type.

    Returns:
        float32 array of the same shape; what is too large for the type is infinite.
    """
    if working_type(image.dtype) == np.float64:
        # NaN and infinite pixels are told by who asks
        with np.errstate(invalid="ignore", over="ignore"):
            low, high = intensity_range(image, 1, 99)
            coarse = (high > low) & (
                np.maximum(abs(low), abs(high)) > 2**8 * (high - low)
            )  # less than 2^16 steps are left
            if coarse.any():
                image = image - np.where(coarse, low, 0).reshape((-1,) + (1,) * (image.ndim - 1))
    with np.errstate(over="ignore"):
        return image.astype(np.float32)


def span(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """What a value is divided by; a flat channel becomes 0."""
    return np.where(high > low, high - low, np.inf).astype(np.float32)


def normalise(image: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Map each channel's `lower` and `upper` percentile to 0 and 1.

    See `intensity_range` and `rescale`.
    """
    return rescale(image, *intensity_range(image, lower, upper))
