"""Synthetic rosettes of leaves in colour with exact labels, made by gdlib from random numbers;
CC0 1.0, no image went into it.

Made to look like CVPPP A1 and to be hard where real images are hard: leaves of one colour that lie
on each other, from a few to thousands of pixels, on stalks of a few pixels, over soil on which moss
is green too. The youngest leaf is the smallest, in the middle and on top. A leaf that others cut in
two stays one instance.

Splits: sample `i` of a split depends on (options, seed, split, i) alone, not on how many images are
    made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter, shift

from gdlib.data.files import Splits, merge_masks
from gdlib.data.sources._phantom import phantom_splits, smooth_noise, uneven_light
from gdlib.io import Sample
from gdlib.limits import (
    Count,
    CountFromTo,
    FromTo,
    NotAll,
    NotNegative,
    PerSplit,
    Positive,
    Seed,
    Share,
)

__all__ = ["leaves_phantom"]

IMAGES = {"train": 64, "val": 16, "test": 32}
MIN_AREA = 20  # pixels; a leaf of which others leave less to see does not grow
GOLDEN = np.pi * (3 - np.sqrt(5))  # angle from one leaf to the next
SOIL, MOSS = (84, 74, 66), (88, 98, 52)  # red, green, blue
YOUNG, OLD = (150, 182, 74), (92, 138, 58)


def leaves_phantom(
    root: Path | None,
    *,
    size: tuple[Count, Count] = (256, 256),
    images: PerSplit = IMAGES,
    seed: Seed = 0,
    count: CountFromTo = (7, 18),
    radius: FromTo = (0.25, 0.48),
    smallest: Positive = 0.12,
    crowding: Positive = 1.25,
    stalk: NotAll = 0.4,
    bend: NotNegative = 0.15,
    colour: NotNegative = 0.08,
    shadow: Share = 0.45,
    moss: Share = 0.4,
    illumination: Share = 0.35,
    blur: NotNegative = 0.7,
    noise: NotNegative = 4.0,
) -> Splits:
    """Make images of one plant each.

    Args:
        root: not used; there is nothing to read.
        size: (Y, X) in pixels.
        images: split -> number of images.
        seed: of all images.
        count: fewest and most leaves; those of which too little would be seen are left out.
        radius: smallest and largest plant, as the length of its oldest leaves relative to the
            shorter side of the image.
        smallest: length of the youngest leaf relative to the oldest.
        crowding: width of the leaves relative to a natural one; more means more overlap.
        stalk: part of a leaf's length that is its stalk.
        bend: standard deviation of how far a leaf's tip is off its axis, relative to its length.
        colour: relative standard deviation of the brightness from leaf to leaf.
        shadow: part of the light that is missing right below a leaf.
        moss: part of the soil that is green; its darkness varies.
        illumination: relative fall of the light from the brightest place of the field to its far
            side.
        blur: standard deviation of the optical point spread, pixels.
        noise: standard deviation, grey values.

    Returns:
        For each split the samples: image (3, Y, X) uint8, label (Y, X), numbered from the oldest
        leaf to the youngest.
    """

    def make(rng: np.random.Generator, name: str) -> Sample:
        leaves = _plant(
            rng, size, rng.integers(*count, endpoint=True), radius, smallest, crowding, stalk, bend
        )
        canvas = _soil(rng, size, moss)
        for leaf in leaves:
            canvas = _paint(rng, canvas, leaf, colour, shadow)
        label, _ = merge_masks((leaf.mask for leaf in leaves), size, "last")
        light = gaussian_filter(canvas * uneven_light(rng, size, illumination), (0, blur, blur))
        image = np.clip(np.rint(light + noise * rng.standard_normal(light.shape)), 0, 255).astype(
            np.uint8
        )
        return Sample(name, image, label, attrs={"source": "leaves_phantom"})

    return phantom_splits("leaves_phantom", "images", images, seed, make)


class _Leaf(NamedTuple):
    """One leaf in the field (Y, X)."""

    mask: np.ndarray  # boolean
    along: np.ndarray  # 0 at the middle of the plant, 1 at the tip
    across: np.ndarray  # 0 on the middle rib, -1 and 1 at the borders
    age: float  # 0 the youngest, 1 the oldest
    length: float  # pixels


def _plant(
    rng: np.random.Generator,
    size: Sequence[int],
    count: int,
    radius: Sequence[float],
    smallest: float,
    crowding: float,
    stalk: float,
    bend: float,
) -> list[_Leaf]:
    """Let leaves grow around the middle of the field.

    Return those that can be seen, the oldest first.
    """
    centre = np.array(size) * rng.uniform(0.45, 0.55, 2)
    longest = min(size) * rng.uniform(*radius)
    first = rng.uniform(0, 2 * np.pi)
    leaves = []
    covered = np.zeros(size, bool)
    for number in range(count):  # from the youngest to the oldest, so that what is covered is known
        age = number / max(1, count - 1)
        length = longest * (smallest + (1 - smallest) * age**0.8) * rng.lognormal(0, 0.12)
        angle = first + number * GOLDEN + rng.normal(0, 0.2)
        # Young leaves hardly have a stalk.
        leaf = _leaf(
            rng, size, centre, angle, age, length, crowding, stalk * (0.3 + 0.7 * age), bend
        )
        if (leaf.mask & ~covered).sum() >= MIN_AREA:
            leaves.append(leaf)
            covered |= leaf.mask
    return leaves[::-1]


def _leaf(
    rng: np.random.Generator,
    size: Sequence[int],
    centre: np.ndarray,
    angle: float,
    age: float,
    length: float,
    crowding: float,
    stalk: float,
    bend: float,
) -> _Leaf:
    """Return a stalk and a blade, widest beyond its middle, on an axis that bends to one side."""
    y, x = (np.arange(n) - c for n, c in zip(size, centre, strict=True))
    along = (y[:, None] * np.sin(angle) + x[None] * np.cos(angle)) / length
    across = (x[None] * np.sin(angle) - y[:, None] * np.cos(angle)) / length
    across = across - rng.normal(0, bend) * along * np.abs(along)
    place = np.clip((along - stalk) / (1 - stalk), 0, 1)  # 0 where the blade begins, 1 at the tip
    blade = (
        crowding * (1 - stalk) * rng.uniform(0.26, 0.36) * 1.6 * place**0.75 * (1 - place) ** 0.45
    )
    half = np.maximum(blade, np.where(along < 1 - 0.5 * (1 - stalk), max(0.018, 1.2 / length), 0))
    return _Leaf(
        (np.abs(across) < half) & (along > 0) & (along < 1),
        along,
        across / np.maximum(half, 1e-6),
        age,
        length,
    )


def _soil(rng: np.random.Generator, size: Sequence[int], moss: float) -> np.ndarray:
    """Return soil (3, Y, X) in grey values: grains of all sizes, stones, and green patches."""
    grain, lump, patch, fleck = smooth_noise(rng, size, 0.9, 3.0, 14.0, 1.5)
    green = moss * np.clip(patch + 0.3 * lump, 0, 1)
    colour = np.array(SOIL)[:, None, None] * (1 - green) + np.array(MOSS)[:, None, None] * green
    out = colour * (1 + 0.22 * grain + 0.2 * lump + 0.1 * patch)
    return np.clip(out + 70 * np.clip(fleck - 2.6, 0, 1), 8, 255)


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, leaf: _Leaf, colour: float, shadow: float
) -> np.ndarray:
    """Return the canvas (3, Y, X) with a leaf on it that shades what is below."""
    height = 1.5 + 0.02 * leaf.length
    below = shift(gaussian_filter(leaf.mask.astype(float), height), (height, 0.6 * height), order=1)
    canvas = canvas * (1 - shadow * below)
    (vein,) = smooth_noise(rng, leaf.mask.shape, 1.2)
    rib = np.exp(-((leaf.across / 0.12) ** 2))
    veins = np.cos(2 * np.pi * (7 * leaf.along - 1.5 * np.abs(leaf.across)))
    light = (
        1
        + rng.normal(0, colour)
        + rng.normal(0, 0.12) * leaf.across
        + rng.normal(0.05, 0.1) * (leaf.along - 0.5)
    )
    light = (
        light
        + 0.13 * rib
        + 0.03 * veins
        + 0.03 * vein
        - 0.2 * np.clip(np.abs(leaf.across), 0, 1) ** 6
    )
    base = np.array(YOUNG) * (1 - leaf.age) + np.array(OLD) * leaf.age + rng.normal(0, 5, 3)
    return np.where(leaf.mask, base[:, None, None] * light, canvas)
