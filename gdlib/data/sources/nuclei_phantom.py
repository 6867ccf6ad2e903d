"""Synthetic fluorescence nuclei with exact labels, made by gdlib from random numbers;
CC0 1.0, no image went into it.

Made to look like BBBC039 and to be hard where real images are hard: nuclei in touching clusters,
overlapping in projection, with faint borders between them. Light adds up where nuclei overlap; the
label there is the nucleus on top (the later one).

Splits: sample `i` of a split depends on (options, seed, split, i) alone, not on how many images are
    made.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.measure import label as connected_regions

from gdlib.data.files import Splits
from gdlib.data.sources._phantom import phantom_splits, uneven_light
from gdlib.io import Sample
from gdlib.limits import Count, CountFromTo, FromTo, NotNegative, PerSplit, Positive, Seed, Share

__all__ = ["nuclei_phantom"]

IMAGES = {"train": 64, "val": 16, "test": 32}
# pixels; what overlap or the image border leaves of a nucleus below that is not labelled
MIN_AREA = 40
OFFSET = 110  # camera counts without light
TRIES = 8  # positions tried for a nucleus before it is left out


def nuclei_phantom(
    root: Path | None,
    *,
    size: tuple[Count, Count] = (256, 256),
    images: PerSplit = IMAGES,
    seed: Seed = 0,
    radius: FromTo = (9.0, 17.0),
    count: CountFromTo = (20, 60),
    touching: Share = 0.65,
    overlap: Share = 0.2,
    irregularity: NotNegative = 0.12,
    texture: NotNegative = 0.12,
    brightness: Positive = 450.0,
    dim: Share = 0.15,
    illumination: Share = 0.4,
    haze: NotNegative = 0.25,
    blur: NotNegative = 1.3,
    gain: Positive = 0.7,
    read_noise: NotNegative = 3.0,
) -> Splits:
    """Make images of nuclei.

    Args:
        root: not used; there is nothing to read.
        size: (Y, X) in pixels.
        images: split -> number of images.
        seed: of all images.
        radius: smallest and largest mean radius of a nucleus, pixels.
        count: fewest and most nuclei per 256 x 256 pixels; those that find no place are left out.
        touching: probability that a nucleus is put against an earlier one.
        overlap: largest part of its area that a nucleus may share with those below it.
        irregularity: relative amplitude of the outline's Fourier terms 2 to 5; higher terms are
            weaker.
        texture: relative standard deviation of the brightness within a nucleus.
        brightness: typical nucleus over background, counts.
        dim: fraction of nuclei with 15 to 40 % of the brightness.
        illumination: relative fall of the light from the brightest place of the field to its far
            side.
        haze: strength of light from out of focus: wide halos and unlabelled nuclei above and below.
        blur: standard deviation of the optical point spread, pixels.
        gain: counts per photo-electron; more means more photon noise.
        read_noise: standard deviation, counts.

    Returns:
        For each split the samples: image (1, Y, X) uint16, label (Y, X), every instance one
        4-connected region.
    """

    def make(rng: np.random.Generator, name: str) -> Sample:
        light, far, label = _scene(
            rng, size, radius, count, touching, overlap, irregularity, texture, brightness, dim
        )
        light = gaussian_filter(light, blur) + gaussian_filter(
            haze * (light + far), 10 * blur, truncate=2.5
        )
        image = _camera(rng, light * uneven_light(rng, size, illumination), gain, read_noise)
        return Sample(name, image[None], label, attrs={"source": "nuclei_phantom"})

    return phantom_splits("nuclei_phantom", "images", images, seed, make)


def _scene(
    rng: np.random.Generator,
    size: Sequence[int],
    radius: Sequence[float],
    count: Sequence[int],
    touching: float,
    overlap: float,
    irregularity: float,
    texture: float,
    brightness: float,
    dim: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put nuclei into a field; return their light, that of unlabelled ones out of focus, and the
    labels, all (Y, X).
    """
    margin = int(2.5 * radius[1]) + 2  # so that no window reaches over the canvas
    shape = (size[0] + 2 * margin, size[1] + 2 * margin)
    light, far, label = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int32)
    noise = rng.standard_normal((2, *shape), np.float32)
    fine, coarse = gaussian_filter(noise[0], 1.2), gaussian_filter(noise[1], 4.0)
    grain = (fine / fine.std() + coarse / coarse.std()) / np.sqrt(2)
    placed: list[tuple[np.ndarray, np.ndarray]] = []
    wanted = round(rng.uniform(*count) * size[0] * size[1] / 256**2)
    for number in range(1, wanted + 1):
        level = (
            brightness
            * rng.lognormal(0, 0.25)
            * (rng.uniform(0.15, 0.4) if rng.random() < dim else 1)
        )
        mean_radius = rng.uniform(*radius)
        if rng.random() < 0.03:  # condensed: small and bright
            mean_radius, level = 0.6 * mean_radius, 2.5 * level
        outline = _outline(rng, mean_radius, irregularity)
        profile, inside = _render(outline)
        half = len(inside) // 2
        for _ in range(TRIES):
            centre = rng.uniform(0, size)
            if placed and rng.random() < touching:
                centre = _beside(rng, *placed[rng.integers(len(placed))], outline, overlap)
                if (centre < 0).any() or (centre >= size).any():
                    continue
            window = tuple(slice(c - half, c + half + 1) for c in centre.astype(int) + margin)
            if (label[window][inside] > 0).mean() <= overlap:
                y, x = rng.integers(0, np.subtract(shape, 2 * half))
                pattern = 1 + texture * grain[y : y + 2 * half + 1, x : x + 2 * half + 1]
                light[window] += level * profile * np.clip(pattern, 0.2, None)
                label[window][inside] = number
                placed.append((centre, outline))
                break
    for _ in range(rng.integers(0, wanted // 4, endpoint=True)):
        profile, inside = _render(_outline(rng, rng.uniform(*radius), irregularity))
        half = len(inside) // 2
        y, x = rng.integers(margin, np.subtract(shape, margin))
        far[y - half : y + half + 1, x - half : x + half + 1] += 2 * brightness * profile
    inner = (slice(margin, -margin), slice(margin, -margin))
    return light[inner], far[inner], _largest_regions(label[inner])


def _outline(rng: np.random.Generator, radius: float, irregularity: float) -> np.ndarray:
    """Return the distance from centre to border at 128 angles: an ellipse times a smooth closed
    curve.
    """
    angle = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    stretch, turn = np.sqrt(rng.uniform(1, 2)), rng.uniform(0, np.pi)
    ellipse = radius / np.hypot(np.cos(angle - turn) / stretch, np.sin(angle - turn) * stretch)
    order = np.arange(2, 6)[:, None]
    amplitude, phase = (
        rng.normal(0, 2 * irregularity / order**1.5),
        rng.uniform(0, 2 * np.pi, order.shape),
    )
    waves = amplitude * np.cos(order * angle + phase)
    return ellipse * np.clip(1 + waves.sum(0), 0.6, 1.5)


def _render(outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return brightness (1 in the middle, falling to 0 at the border) and mask of a nucleus in a
    square around it.
    """
    half = int(outline.max()) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    angle = np.arctan2(y, x) % (2 * np.pi) * (len(outline) / (2 * np.pi))
    border = np.interp(angle, np.arange(len(outline) + 1), np.append(outline, outline[0]))
    place = np.hypot(y, x) / border
    return np.sqrt(np.clip(1 - place**6, 0, None)), place < 1


def _beside(
    rng: np.random.Generator,
    centre: np.ndarray,
    outline: np.ndarray,
    new: np.ndarray,
    overlap: float,
) -> np.ndarray:
    """Return a centre (y, x) at which a new outline is 1 pixel apart from one that is there,
    touches or overlaps it.
    """
    step = rng.integers(len(outline))
    angle = step * 2 * np.pi / len(outline)
    depth = rng.uniform(-1, 2 * overlap * new.mean())
    distance = outline[step] + new[(step + len(new) // 2) % len(new)] - depth
    return centre + distance * np.array([np.sin(angle), np.cos(angle)])


def _largest_regions(label: np.ndarray) -> np.ndarray:
    """Keep the largest 4-connected region of each label, if it has `MIN_AREA` pixels.

    Number the labels 1, 2, ...
    """
    regions = connected_regions(label, background=0, connectivity=1)
    area = np.bincount(regions.ravel())
    owner = np.zeros_like(area)
    owner[regions] = label
    by_area = np.argsort(-area, kind="stable")
    largest = by_area[np.unique(owner[by_area], return_index=True)[1]]
    kept = largest[(owner[largest] > 0) & (area[largest] >= MIN_AREA)]
    number = np.zeros(len(area), np.uint32)
    number[kept] = np.arange(1, len(kept) + 1)
    return number[regions]


def _camera(
    rng: np.random.Generator, light: np.ndarray, gain: float, read_noise: float
) -> np.ndarray:
    """Return 12-bit counts in uint16 of an expected `light` (Y, X) in counts."""
    background = 40  # medium and unbound dye, counts
    counts = gain * rng.poisson((light + background) / gain) + rng.normal(
        OFFSET, read_noise, light.shape
    )
    return np.clip(np.rint(counts), 0, 4095).astype(np.uint16)
