"""Synthetic serial-section EM of neuropil with exact labels, made by gdlib from random numbers;
CC0 1.0, no image went into it.

Made to look like AC4 and to be hard where real stacks are hard: neurites of all widths without gaps
between them, that meander, run obliquely and branch; membranes that fade where they lie flat in a
section; organelles as dark as membranes; neighbouring sections that are shifted, brighter or
darker, blurred or missing.

Splits: sample `i` of a split depends on (options, seed, split, i) alone, not on how many volumes
    are made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.special import ndtr

from gdlib.data.files import Splits, split_components
from gdlib.data.sources._phantom import phantom_splits
from gdlib.io import Sample
from gdlib.io.failures import DataError
from gdlib.limits import Count, FromTo, NotNegative, PerSplit, Positive, Seed, Share

__all__ = ["neurites_phantom"]

VOLUMES = {"train": 8, "val": 2, "test": 4}
MIN_VOLUME = 64  # voxels; smaller pieces, cut off by the border or by neighbours, are not labelled
MARGIN = 96  # pixels around the field in which neurites begin
PIXEL_NM = 6.0
TILE = 80  # pixels; side of what is computed at once
CYTOPLASM, MEMBRANE, MITOCHONDRION = 165.0, 25.0, 70.0  # grey values


@dataclass(frozen=True)
class _Tubes:
    """Curved tubes that run through all sections, N of them.

    Several with the same number are branches of one neurite.

    Attributes:
        owner: (N,) number of the neurite.
        form: (3, Z, N, 6) coefficients of the squared distance from the centre line, less the
            squared radius, as a polynomial in 1, y, x, y², yx, x²; at the lower face, the middle
            and the upper face of each section.
        organelle: (Z, N, 6) the same, relative to the squared radius of a mitochondrion, for the
            middle of each section.
        vesicles: (Z, N) 0 to 1, how full of vesicles the tube is.
        tone: (N,) grey values by which its cytoplasm is brighter than others.
        cristae: (N, 2) wave vector of the stripes in its mitochondria.
    """

    owner: np.ndarray
    form: np.ndarray
    organelle: np.ndarray
    vesicles: np.ndarray
    tone: np.ndarray
    cristae: np.ndarray


def neurites_phantom(
    root: Path | None,
    *,
    size: tuple[Count, Count, Count] = (32, 160, 160),
    volumes: PerSplit = VOLUMES,
    seed: Seed = 0,
    anisotropy: Positive = 5.0,
    crowding: Positive = 6.0,
    radius: FromTo = (3.0, 55.0),
    drift: NotNegative = 0.5,
    branching: Share = 0.2,
    wobble: NotNegative = 5.0,
    membrane: NotNegative = 4.0,
    organelles: Share = 0.7,
    vesicles: Share = 0.4,
    misalignment: NotNegative = 1.0,
    contrast: NotNegative = 0.12,
    brightness: NotNegative = 14.0,
    missing: Share = 0.005,
    blurred: Share = 0.05,
    blur: NotNegative = 0.7,
    noise: NotNegative = 8.0,
) -> Splits:
    """Make volumes of neurites.

    Args:
        root: not used; there is nothing to read.
        size: (Z, Y, X) in voxels.
        volumes: split -> number of volumes.
        seed: of all volumes.
        anisotropy: distance of sections, pixels of 6 nm.
        crowding: neurites per 100 x 100 pixels of a section.
        radius: smallest and largest radius of a neurite that has much room, pixels; their
            logarithms are spread evenly.
        drift: typical sideways way of a neurite per way along z; 1 is 45 degrees.
        branching: probability that a neurite branches.
        wobble: standard deviation of the irregular shifts of the outlines, pixels.
        membrane: width of what lies between two neurites and belongs to none, pixels.
        organelles: probability that a neurite has mitochondria.
        vesicles: probability that a neurite has vesicles.
        misalignment: standard deviation of the shift of a section, pixels; image and label are
            shifted alike.
        contrast: standard deviation of the logarithm of a section's contrast.
        brightness: standard deviation of a section's mean grey value.
        missing: probability that a section is black; its labels are there.
        blurred: probability that a section is out of focus.
        blur: standard deviation of the point spread of a good section, pixels.
        noise: standard deviation, grey values.

    Returns:
        For each split the samples: image (1, Z, Y, X) uint8, label (Z, Y, X), every instance one
        6-connected region.
    """
    if len(size) != 3:
        raise DataError(f"neurites_phantom: size is {list(size)}; give three side lengths, z, y, x")

    def make(rng: np.random.Generator, name: str) -> Sample:
        tubes = _tubes(
            rng, size, anisotropy, crowding, radius, drift, branching, organelles, vesicles
        )
        shift = rng.normal(0, misalignment, (size[0], 2))
        image, label = np.empty(size, np.uint8), np.empty(size, np.uint32)
        for z, place in enumerate(_places(rng, size, anisotropy, drift, wobble, shift)):
            light, label[z] = _section(rng, tubes, z, place, membrane)
            image[z] = _microscope(rng, light, contrast, brightness, missing, blurred, blur, noise)
        attrs = {
            "source": "neurites_phantom",
            "voxel_size_nm": [anisotropy * PIXEL_NM, PIXEL_NM, PIXEL_NM],
        }
        return Sample(name, image[None], _large_components(label), attrs=attrs)

    return phantom_splits("neurites_phantom", "volumes", volumes, seed, make)


def _tubes(
    rng: np.random.Generator,
    size: Sequence[int],
    anisotropy: float,
    crowding: float,
    radius: Sequence[float],
    drift: float,
    branching: float,
    organelles: float,
    vesicles: float,
) -> _Tubes:
    """Lay centre lines through a volume; every property of a tube is a slow function of z."""
    field = np.array(size[1:]) + 2 * MARGIN
    count = max(2, round(crowding * field.prod() / 100**2))
    # faces and middles of sections, pixels
    z = (np.arange(-1, 2 * size[0] + 2) / 2 - 0.5)[:, None] * anisotropy

    def waves(shortest: float, longest: float, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sines of z with random wavelength (pixels) and phase (len(z), count, *shape), and
        their wave numbers.
        """
        number = 2 * np.pi / np.exp(rng.uniform(np.log(shortest), np.log(longest), (count, *shape)))
        return np.sin(
            z.reshape(-1, *(1,) * number.ndim) * number + rng.uniform(0, 2 * np.pi, number.shape)
        ), number

    wave, number = waves(200, 900, 2, 2)  # two per axis
    centre = (wave * rng.normal(0, drift, number.shape) / number).sum(-1) + rng.uniform(
        -MARGIN, field - MARGIN, (count, 2)
    )
    width = np.exp(rng.uniform(*np.log(radius), count)) * (1 + 0.3 * waves(80, 300)[0])
    inner = 0.6 * np.clip(width, 8, 28) * np.sqrt(np.clip(waves(200, 900)[0] + 0.3, 0, 1))
    inner *= rng.random(count) < organelles
    full = np.clip(2 * waves(150, 600)[0] + 1, 0, 1) * (rng.random(count) < vesicles)

    # A branch lies within its neurite on one side of a section and leaves it on the other.
    parent = np.flatnonzero(rng.random(count) < branching)
    start = rng.uniform(z[0], z[-1], len(parent))
    way = np.clip(
        (z - start) * rng.choice([-1, 1], len(parent)) / rng.uniform(60, 200, len(parent)), 0, 1
    )
    side = rng.normal(0, 50, (len(parent), 2))
    centre = np.concatenate(
        [centre, centre[:, parent] + (3 * way**2 - 2 * way**3)[..., None] * side], axis=1
    )
    owner = np.append(np.arange(count), parent)
    width, inner, full = (
        np.concatenate([a, a[:, parent] * 0.8], axis=1) for a in (width, inner, full)
    )

    slope = np.gradient(centre, anisotropy / 2, axis=0)
    form = _forms(centre, slope, width)
    organelle = _forms(centre, slope, 0 * inner) / np.maximum(inner, 1e-3)[..., None] ** 2
    faces = [slice(first, first + 2 * size[0], 2) for first in (1, 2, 3)]
    tone, angle = rng.normal(0, 7, count), rng.uniform(0, 2 * np.pi, count)
    # about 6 pixels from one to the next
    cristae = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return _Tubes(
        owner + 1,
        np.stack([form[face] for face in faces]),
        organelle[faces[1]],
        full[faces[1]],
        tone[owner],
        cristae[owner],
    )


def _forms(centre: np.ndarray, slope: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return the coefficients (..., 6) of the squared distance from oblique lines, less the squared
    radius.

    Args:
        centre: (..., 2) where the line crosses the section, pixels.
        slope: (..., 2) sideways way per way along z.
        radius: (...), pixels.
    """
    (cy, cx), (vy, vx) = np.moveaxis(centre, -1, 0), np.moveaxis(slope, -1, 0)
    along = 1 + vy**2 + vx**2
    yy, yx, xx = 1 - vy**2 / along, -vy * vx / along, 1 - vx**2 / along
    one = yy * cy**2 + 2 * yx * cy * cx + xx * cx**2 - radius**2
    return np.stack(
        [one, -2 * (yy * cy + yx * cx), -2 * (yx * cy + xx * cx), yy, 2 * yx, xx], axis=-1
    )


def _places(
    rng: np.random.Generator,
    size: Sequence[int],
    anisotropy: float,
    drift: float,
    wobble: float,
    shift: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each section, where in the tissue its pixels lie, (2, Y, X), and how that changes
    over its thickness.
    """
    scales = []
    for spacing, amplitude in ((150.0, 50 * drift), (30.0, wobble), (9.0, 0.25 * wobble)):
        shape = [
            int(n * step / spacing) + 4 for n, step in zip(size, (anisotropy, 1, 1), strict=True)
        ]
        # The B-spline takes that part of the standard deviation of its coefficients, per axis.
        coefficients = rng.normal(0, amplitude / np.sqrt(151 / 315) ** 3, (2, *shape))
        scales.append((spacing, coefficients))
    grid = np.stack(np.mgrid[: size[1], : size[2]]).astype(float)
    for z in range(size[0]):
        faces = np.repeat(grid[None], 3, axis=0)
        for spacing, coefficients in scales:
            at_z, at_y, at_x = (
                _splines(positions / spacing, n)
                for positions, n in zip(
                    (
                        (z + np.array([0, 0.5, 1])) * anisotropy,
                        np.arange(size[1]),
                        np.arange(size[2]),
                    ),
                    coefficients.shape[1:],
                    strict=True,
                )
            )
            faces += at_y @ np.tensordot(at_z, coefficients, (1, 1)) @ at_x.T
        yield faces[1] + shift[z][:, None, None], faces[2] - faces[0]


def _splines(position: np.ndarray, count: int) -> np.ndarray:
    """Return the cubic B-splines (positions, count) with knots one apart."""
    distance = np.abs(position[:, None] + 1 - np.arange(count))
    return np.where(
        distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
    )


def _section(
    rng: np.random.Generator,
    tubes: _Tubes,
    z: int,
    place: tuple[np.ndarray, np.ndarray],
    membrane: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ideal grey values and the labels of one section, both (Y, X)."""
    shape = place[0].shape[1:]
    label, first = np.empty((2, *shape), np.int64)
    border, smear, organelle = np.empty((3, *shape))
    for corner in np.ndindex(*(-(-n // TILE) for n in shape)):
        tile = tuple(slice(TILE * k, TILE * (k + 1)) for k in corner)
        found = _tile(tubes, z, *(p[:, *tile].reshape(2, -1) for p in place))
        for field, values in zip((first, border, smear, organelle), found, strict=True):
            field[tile] = values.reshape(field[tile].shape)
    owner = tubes.owner[first]
    # To first order, the distance from a border is wrong where a neighbour comes close without
    # touching; pixels know better.
    edge = np.zeros(shape, bool)
    edge[1:] |= owner[1:] != owner[:-1]
    edge[:-1] |= owner[1:] != owner[:-1]
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[:, :-1] |= owner[:, 1:] != owner[:, :-1]
    distance = distance_transform_edt(~edge) if edge.any() else np.full(shape, np.inf)
    border = np.clip(border, distance, distance + 1)
    label = np.where(border > membrane / 2, owner, 0)

    noise = rng.standard_normal((2, *shape), np.float32)
    fine, coarse, dots = (gaussian_filter(noise[0], s) for s in (1.0, 3.0, 1.6))
    dots -= gaussian_filter(noise[0], 3.2)
    lines = gaussian_filter(noise[1], 4.0)
    fine, coarse, dots, lines = (f / f.std() for f in (fine, coarse, dots, lines))
    light = CYTOPLASM + tubes.tone[first] + 8 * fine + 8 * coarse
    # reticulum and microtubules
    light -= 90 * np.exp(-((lines / 0.2) ** 2)) * np.clip(coarse, 0, 1)
    # rings around the peaks
    light -= 90 * tubes.vesicles[z][first] * np.exp(-(((dots - 1.2) / 0.4) ** 2))
    inside = (organelle < 1) & (border > 0.75 * membrane)
    y, x = np.indices(shape)
    cristae = np.sin((y * tubes.cristae[first, 0] + x * tubes.cristae[first, 1]) + 1.5 * coarse)
    light = np.where(
        inside, MITOCHONDRION + 5 * fine + 14 * cristae - 25 * (organelle > 0.72), light
    )
    # Mean over the thickness of the section of a Gaussian profile that moves `smear` pixels
    # sideways meanwhile.
    width, smear = 0.3 * membrane, np.clip(np.abs(smear), 0.3, 30)
    dark = ndtr((border + smear / 2) / width) - ndtr((border - smear / 2) / width)
    dark *= np.sqrt(2 * np.pi) * width / smear
    return light + dark * (MEMBRANE - light), label


def _tile(tubes: _Tubes, z: int, place: np.ndarray, change: np.ndarray) -> tuple[np.ndarray, ...]:
    """Assign points (2, P) of a section to tubes.

    Returns:
        Four (P,) arrays: index of the tube; distance in pixels to the nearest other neurite's
        territory; pixels that this border moves sideways over the thickness of the section;
        distance from the centre of a mitochondrion, 1 at its surface.
    """
    low, form, high = tubes.form[:, z]
    kept = _near(form, tubes.owner, place)
    powers, points = _powers(place), np.arange(place.shape[1])
    value = form[kept] @ powers
    first = value.argmin(0)
    nearest = value[first, points]
    value[tubes.owner[kept][:, None] == tubes.owner[kept][first]] = np.inf
    second = value.argmin(0)
    gap = value[second, points] - nearest
    first, second = kept[first], kept[second]
    gy, gx = _gradient(form[second] - form[first], place)
    norm = np.hypot(gy, gx) + 1e-6
    move = (
        (((high - low)[second] - (high - low)[first]) * powers.T).sum(1)
        + gy * change[0]
        + gx * change[1]
    )
    organelle = np.sqrt(np.clip((tubes.organelle[z][first] * powers.T).sum(1), 0, None))
    return first, gap / norm, move / norm, organelle


def _near(form: np.ndarray, owner: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return the indices of the tubes that may be first or second somewhere among points (2, P) of
    a section.

    Forms are convex with second derivatives of at most 2.
    """
    middle = place.mean(1, keepdims=True)
    reach = np.hypot(*(place - middle)).max()
    value, (gy, gx) = form @ _powers(middle), _gradient(form, middle)
    value, slope = value[:, 0], reach * np.hypot(gy, gx)
    most = value + slope + reach**2
    second = most[owner != owner[most.argmin()]].min()
    return np.flatnonzero(value - slope <= second)


def _powers(place: np.ndarray) -> np.ndarray:
    """Return 1, y, x, y², yx, x² (6, P) of points (2, P)."""
    y, x = place
    return np.stack([np.ones_like(y), y, x, y * y, y * x, x * x])


def _gradient(form: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the derivatives in y and x of forms (P, 6) at points (2, P), or of each at one point
    (2, 1).
    """
    (_, by, bx, yy, yx, xx), (y, x) = form.T, place
    return by + 2 * yy * y + yx * x, bx + yx * y + 2 * xx * x


def _microscope(
    rng: np.random.Generator,
    light: np.ndarray,
    contrast: float,
    brightness: float,
    missing: float,
    blurred: float,
    blur: float,
    noise: float,
) -> np.ndarray:
    """Return the image (Y, X) uint8 of a section with its defects."""
    out_of_focus, lost = rng.random(2) < (blurred, missing)
    light = gaussian_filter(light, blur + (rng.uniform(1, 2.5) if out_of_focus else 0))
    # uneven light
    y, x = (np.linspace(-s, s, n) for s, n in zip(rng.normal(0, 6, 2), light.shape, strict=True))
    light = (
        (light - 130) * np.exp(rng.normal(0, contrast))
        + 130
        + rng.normal(0, brightness)
        + y[:, None]
        + x
    )
    light += gaussian_filter(rng.normal(0, 1.7 * noise, light.shape), 0.5)
    return (
        np.zeros(light.shape, np.uint8)
        if lost
        else np.clip(np.rint(light), 0, 255).astype(np.uint8)
    )


def _large_components(label: np.ndarray) -> np.ndarray:
    """Give each 6-connected component of at least `MIN_VOLUME` voxels a number, in the order of
    first voxels.
    """
    label = split_components(label)
    large = np.bincount(label.ravel()) >= MIN_VOLUME
    large[0] = False
    return (np.cumsum(large) * large).astype(np.uint32)[label]
