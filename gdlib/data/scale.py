"""Images brought to the size of pixels that a network was trained with, and labels back."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdlib.io.failures import DataError
from gdlib.io.hdf5 import open_h5
from gdlib.limits import Positive, checked

SAME = 1.1  # up to this factor an image is left as it is
MOST = 16.0
# what programs write of lengths, in microns; printers' inches say nothing of a microscope
MICRONS = {"micron": 1.0, "microns": 1.0, "um": 1.0, "µm": 1.0, "\\u00B5m": 1.0}
MICRONS |= {"micrometer": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
CENTIMETRE = 3  # number of the unit of a TIFF


def microns(found: Mapping[str, Any], ndim: int) -> tuple[float, ...] | None:
    """Return the sides of a pixel in microns, one per axis, or None if they are not known.

    Args:
        found: what a TIFF says, as of `gdlib.data.calibration.calibration`, or the attributes of a
            dataset of HDF5: `element_size_um`, or `resolution` in nm.
        ndim: number of axes.
    """
    for key, unit in (("element_size_um", 1.0), ("resolution", 1e-3)):
        size = np.ravel(found[key]).astype(float) if key in found else []
        if "resolutionunit" not in found and len(size) >= ndim:
            return tuple(float(side) * unit for side in size[-ndim:])
    unit = MICRONS.get(str(found.get("unit", "")).strip())
    if unit is None and "unit" not in found and found.get("resolutionunit") == CENTIMETRE:
        unit = MICRONS["cm"]
    if unit is None or "resolutionunit" not in found:
        return None
    # a resolution is a number, or numerator and denominator
    x, y = (n[1] / n[0] if np.ndim(n) else 1 / n for n in found["resolution"])
    sides = (y * unit, x * unit)
    if ndim == 2:
        return sides
    return (float(found["spacing"]) * unit, *sides) if "spacing" in found else None


def known_sizes(train: Path | str) -> dict[str, list[float]]:
    """Return how large things are in training images, by which others are brought to their size.

    Args:
        train: samples `.h5`.

    Returns:
        `diameter`: percentiles 5, 50 and 95 of the diameters of objects in pixels, of a disc of
        the same area; of images with objects, not of volumes. `pixel_size`: sides of a pixel in
        microns, ([z,] y, x), if all samples say one, and none differs from the first by more than
        a factor of `SAME`.
    """
    areas, sizes = [np.zeros(0)], []
    with open_h5(train) as file:
        for sample in file.values():
            sizes.append(sample.attrs.get("voxel_size_nm"))
            if sample["label"].ndim == 2:
                counts = np.bincount(sample["label"][()].ravel())[1:]
                areas.append(counts[counts > 0])
    found = {}
    if len(area := np.concatenate(areas)):
        percentiles = np.percentile(2 * np.sqrt(area / np.pi), (5, 50, 95))
        found["diameter"] = [round(float(d), 1) for d in percentiles]
    if all(size is not None for size in sizes):
        ratios = np.array(sizes, float) / np.array(sizes[0], float)
        if (ratios <= SAME).all() and (ratios >= 1 / SAME).all():
            found["pixel_size"] = [float(f"{side / 1000:.6g}") for side in sizes[0]]
    return found


def factors(
    header: Mapping[str, Any],
    ndim: int,
    pixel_size: float | Sequence[float] | None = None,
    diameter: float | None = None,
) -> tuple[float, ...] | None:
    """Return by how much an image is to be enlarged along each axis, None for not at all.

    Args:
        header: of the weights.
        ndim: axes of the network.
        pixel_size: of the image in microns, one number or one per axis.
        diameter: of a typical object of the image in pixels; where it is given, it alone decides,
            and of the pixel size only the number of sides is looked at.

    Raises:
        DataError: the weights do not say what it takes, the pixel size has another number of sides,
            or the factor is beyond reason.
    """
    sides = (pixel_size,) * ndim if np.ndim(pixel_size) == 0 else tuple(pixel_size)
    if len(sides) != ndim:
        raise DataError(
            f"a pixel of this network has {ndim} sides, not {len(sides)}; give the pixel size as "
            "one number, or as one for each axis"
        )
    if diameter is not None:
        diameter = checked("diameter", Positive, diameter)
        if "diameter" not in header:
            raise DataError(
                "these weights do not say how large the objects of their training images were; "
                "leave the diameter out"
            )
        found = (header["diameter"][1] / diameter,) * ndim
    elif pixel_size is not None:
        if "pixel_size" not in header:
            raise DataError(
                "these weights do not say how large the pixels of their training images were; "
                "give the diameter of typical objects in pixels instead (--diameter), or leave the "
                "pixel size out"
            )
        found = tuple(a / b for a, b in zip(sides, header["pixel_size"], strict=True))
    else:
        return None
    if not all(1 / MOST <= factor <= MOST for factor in found):
        raise DataError(
            "the image would be enlarged by "
            f"{' x '.join(f'{factor:.3g}' for factor in found)}: this is beyond what can be right; "
            "look at the unit"
        )
    return None if all(1 / SAME <= factor <= SAME for factor in found) else found


def resized_sides(sides: Sequence[int], by: Sequence[float]) -> list[int]:
    """Return the sides of an image that is enlarged by factors."""
    return [max(1, math.floor(n * f + 0.5)) for n, f in zip(sides, by, strict=True)]


def resized(image: np.ndarray, by: Sequence[float]) -> np.ndarray:
    """Return an image (C, [Z,] Y, X) with sides enlarged by factors, smoothed where it shrinks.

    Returns:
        float32, of at least one pixel.
    """
    from skimage.transform import resize

    sides = resized_sides(image.shape[1:], by)
    return np.stack(
        [
            resize(
                channel.astype(np.float32),
                sides,
                order=1,
                mode="reflect",
                anti_aliasing=min(by) < 1,
                preserve_range=True,
            )
            for channel in image
        ]
    ).astype(np.float32)


def back(label: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    """Return a label with other sides, each pixel that of the nearest centre.

    >>> back(np.array([[1, 2]]), (2, 4))
    array([[1, 1, 2, 2],
           [1, 1, 2, 2]])
    """
    for axis, n in enumerate(sides):
        centres = (np.arange(n) + 0.5) * label.shape[axis] / n
        label = label.take(centres.astype(np.intp), axis)
    return label
