"""Synthetic worms in bright field with exact labels, made by gdlib from random numbers;
CC0 1.0, no image went into it.

Made to look like BBBC010 and to be hard where real images are hard: thin worms that curl, touch and
cross, in a well that is bright in one place and black outside. Worms absorb light, so that they are
darkest where they cross; to which of two worms such a pixel belongs cannot be seen, and by default
it is ignored, as in the source `celegans`.

Splits: sample `i` of a split depends on (options, seed, split, i) alone, not on how many images are
    made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter

from gdlib.data.files import Splits, merge_masks
from gdlib.data.sources._phantom import phantom_splits, smooth_noise, uneven_light
from gdlib.io import Sample
from gdlib.limits import Count, CountFromTo, FromTo, NotNegative, PerSplit, Positive, Seed, Share

__all__ = ["worms_phantom"]

IMAGES = {"train": 64, "val": 16, "test": 32}
DARK = 90  # camera counts without light
TRIES = 20  # positions tried for a worm before it is left out
STEP = 0.5  # pixels from one point of a centre line to the next


def worms_phantom(
    root: Path | None,
    *,
    size: tuple[Count, Count] = (256, 256),
    images: PerSplit = IMAGES,
    seed: Seed = 0,
    count: CountFromTo = (5, 9),
    length: FromTo = (90.0, 125.0),
    width: FromTo = (9.0, 13.0),
    curled: Share = 0.5,
    crossing: Share = 0.35,
    shared: Share = 0.12,
    overlap: Literal["ignore", "first", "last"] = "ignore",
    well: Positive = 0.9,
    absorption: Share = 0.75,
    texture: NotNegative = 0.25,
    dirt: NotNegative = 12.0,
    brightness: Positive = 2600.0,
    illumination: Share = 0.9,
    blur: NotNegative = 0.7,
    noise: NotNegative = 25.0,
) -> Splits:
    """Make images of worms.

    Args:
        root: not used; there is nothing to read.
        size: (Y, X) in pixels.
        images: split -> number of images.
        seed: of all images.
        count: fewest and most worms per 256 x 256 pixels; those that find no place are left out.
        length: shortest and longest worm, pixels.
        width: thinnest and thickest worm at its middle, pixels.
        curled: probability that most worms of an image live and curl; else most are straight.
        crossing: probability that a worm is put across or against an earlier one.
        shared: largest part of its area that a worm may share with earlier ones.
        overlap: what becomes of pixels of several worms: `"ignore"`, or they go to the `"first"` or
            `"last"`.
        well: side of the well relative to the image's; outside it is dark.
        absorption: part of the light that the darkest places of a worm take.
        texture: relative standard deviation of the absorption within a worm.
        dirt: specks on the glass per 256 x 256 pixels, sharp and blurred.
        brightness: of the well at its brightest place, counts.
        illumination: relative fall of the light from the brightest place of the field to its far
            side.
        blur: standard deviation of the optical point spread, pixels.
        noise: standard deviation at full brightness, counts; it grows with the root of the light.

    Returns:
        For each split the samples: image (1, Y, X) uint16, label (Y, X), `ignore` where worms
        overlap.
    """

    def make(rng: np.random.Generator, name: str) -> Sample:
        inside = _well(rng, size, well)
        per_area = size[0] * size[1] / 256**2
        light = np.exp(-_dirt(rng, size, rng.poisson(dirt * per_area)))
        wanted = max(1, round(rng.uniform(*count) * per_area))
        worms = _worms(
            rng, inside > 0.5, wanted, length, width, rng.random() < curled, crossing, shared
        )
        for depth in worms:
            light *= 1 - absorption * _density(rng, depth, texture)
        label, ignore = merge_masks((depth > 0 for depth in worms), size, overlap)
        light = gaussian_filter(light * inside, blur) * uneven_light(rng, size, illumination)
        counts = (
            DARK + brightness * light + noise * np.sqrt(light + 0.01) * rng.standard_normal(size)
        )
        image = np.clip(np.rint(counts), 0, 65535).astype(np.uint16)
        return Sample(name, image[None], label, ignore=ignore, attrs={"source": "worms_phantom"})

    return phantom_splits("worms_phantom", "images", images, seed, make)


def _well(rng: np.random.Generator, size: Sequence[int], side: float) -> np.ndarray:
    """Return a square with round corners, 1 inside and 0 outside with a soft border (Y, X)."""
    place = rng.uniform(-0.5, 0.5, 2) * (1 - side)
    y, x = ((np.arange(n) + 0.5) / n - 0.5 - shift for n, shift in zip(size, place, strict=True))
    distance = (np.abs(y[:, None]) ** 6 + np.abs(x[None]) ** 6) ** (1 / 6) - side / 2
    return 1 / (1 + np.exp(np.clip(distance * min(size) / 0.7, -50, 50)))


def _dirt(rng: np.random.Generator, size: Sequence[int], count: int) -> np.ndarray:
    """Return the optical density (Y, X) of specks, most of them faint and out of focus."""
    out = np.zeros(size)
    for radius, strength in zip(
        np.exp(rng.uniform(0, 1.6, count)), rng.exponential(1.0, count), strict=True
    ):
        speck = np.zeros(size)
        speck[tuple(rng.integers(0, size))] = 1
        out += (
            strength
            * (0.25 if radius > 1.5 else 1.0)
            * gaussian_filter(speck, radius)
            * radius**2
            * 3
        )
    return out


def _worms(
    rng: np.random.Generator,
    inside: np.ndarray,
    wanted: int,
    length: Sequence[float],
    width: Sequence[float],
    alive: bool,
    crossing: float,
    shared: float,
) -> list[np.ndarray]:
    """Put worms into a well (Y, X) boolean.

    Returns:
        For each worm its depth (Y, X): 1 on its centre line, 0 at its border and outside.
    """
    lines: list[np.ndarray] = []
    worms: list[np.ndarray] = []
    taken = np.zeros(inside.shape, bool)
    for _ in range(wanted):
        curl = alive if rng.random() < 0.85 else not alive
        thickness, long = rng.uniform(*width), rng.uniform(*length)
        for _ in range(TRIES):
            line = _centre_line(rng, long, curl)
            anchor = line[rng.integers(len(line))]
            if lines and rng.random() < crossing:
                other = lines[rng.integers(len(lines))]
                target = other[rng.integers(len(other))] + rng.normal(0, thickness / 2, 2)
            else:
                target = rng.uniform(0, inside.shape)
            line = line + target - anchor
            y, x = np.rint(line).astype(int).T
            if (
                line.min() < 0
                or (line.max(0) > np.subtract(inside.shape, 1)).any()
                or not inside[y, x].all()
            ):
                continue
            depth = _body(line, thickness, inside.shape)
            if taken[depth > 0].mean() <= shared:
                taken |= depth > 0
                lines.append(line)
                worms.append(depth)
                break
    return worms


def _centre_line(rng: np.random.Generator, length: float, curl: bool) -> np.ndarray:
    """Return the points (P, 2) of a curve of this length: nearly straight, or bent in one to two
    waves or into a ring.
    """
    part = np.linspace(0, 1, round(length / STEP))
    bend = rng.normal(0, 0.35) + rng.normal(0, 0.3) * np.cos(
        np.pi * part + rng.uniform(0, 2 * np.pi)
    )
    if curl:
        wave = rng.uniform(0.5, 1.6)
        bend = (
            bend
            + rng.normal(0, 1.3)
            + rng.normal(0, 4.0) * np.sin(2 * np.pi * wave * part + rng.uniform(0, 2 * np.pi))
        )
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(bend) / len(part)
    return STEP * np.cumsum(np.stack([np.sin(angle), np.cos(angle)], 1), 0)


def _body(line: np.ndarray, thickness: float, shape: Sequence[int]) -> np.ndarray:
    """Return the depth (Y, X) of a worm around its centre line: blunt at the head, pointed at the
    tail.
    """
    part = np.linspace(0, 1, len(line))
    radius = (
        thickness / 2 * np.minimum(1, np.minimum((part / 0.25) ** 0.6, ((1 - part) / 0.45) ** 0.8))
        + 0.3
    )
    low = np.maximum(line.min(0) - thickness, 0).astype(int)
    high = np.minimum(line.max(0) + thickness + 1, shape).astype(int)
    y, x = np.mgrid[low[0] : high[0], low[1] : high[1]]
    depth = np.zeros(y.shape)
    for (cy, cx), r in zip(line[::2], radius[::2], strict=True):
        np.maximum(depth, 1 - np.hypot(y - cy, x - cx) / r, out=depth)
    out = np.zeros(shape)
    out[low[0] : high[0], low[1] : high[1]] = depth
    return out


def _density(rng: np.random.Generator, depth: np.ndarray, texture: float) -> np.ndarray:
    """Return how much of the absorption a worm of this depth (Y, X) has in each pixel: dark
    borders, granular within.
    """
    fine, coarse = smooth_noise(rng, depth.shape, 0.8, 3.0)
    wall = np.exp(-(((depth - 0.25) / 0.2) ** 2))
    body = rng.uniform(0.55, 0.85) * np.clip(depth / 0.3, 0, 1) * (1 + texture * (fine + coarse))
    return np.clip(np.maximum(body, 0.75 * wall * (depth > 0)), 0, 1)
