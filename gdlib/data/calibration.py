"""How large the pixels of an image are, carried over to the TIFF of its label as napari and Fiji
read it.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from gdlib.data.tiff import open_tiff

X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
INCH = 2
# as OME spells them
MICROMETRES = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "nm": 1e-3, "pm": 1e-6, "Å": 1e-4}


def calibration(path: Path) -> dict[str, Any]:
    """Return what a PNG or TIFF file says of its pixels.

    Returns:
        `resolution`, pixels per unit along x and y, as a TIFF has them (fractions);
        `resolutionunit`, the number of the unit, 1 for none; and where they are known their name as
        `unit`, and `spacing` of the sections in that unit. Empty if the file says nothing.
    """
    if path.suffix.lower() == ".png":
        with Image.open(path) as image:
            return (
                {"resolution": dpi, "resolutionunit": INCH}
                if (dpi := image.info.get("dpi"))
                else {}
            )
    with open_tiff(path) as series:
        page = series.keyframe
        text = page.parent.ome_metadata if page.parent.is_ome else None
        imagej = page.parent.imagej_metadata or {}
        tags = [page.tags.valueof(tag) for tag in (X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT)]
    if text and (found := _of_ome(text)):
        return found
    x, y, unit = tags
    if not all(
        isinstance(number, tuple) and len(number) == 2 and min(number) > 0 for number in (x, y)
    ):
        return {}
    found = {"resolution": (x, y), "resolutionunit": int(unit) if unit in (1, 2, 3) else INCH}
    return found | {
        key: imagej[key] for key in ("unit", "spacing") if key in imagej and "unit" in imagej
    }


def _of_ome(text: str) -> dict[str, Any]:
    """Return the same of the first image of an OME text."""
    pixels = next(
        (one for one in ElementTree.fromstring(text).iter() if one.tag.endswith("Pixels")), None
    )
    sizes = {}
    for axis in "XYZ" if pixels is not None else "":
        with contextlib.suppress(KeyError, ValueError):  # not given, or no lengths
            unit = MICROMETRES[
                pixels.get(f"PhysicalSize{axis}Unit", "µm").replace(
                    "\N{GREEK SMALL LETTER MU}", "µ"
                )
            ]
            sizes[axis] = float(pixels.attrib[f"PhysicalSize{axis}"]) * unit
    if not all(0 < sizes.get(axis, 0) < float("inf") for axis in "XY"):
        return {}
    found = {"resolution": (1 / sizes["X"], 1 / sizes["Y"]), "resolutionunit": 1, "unit": "micron"}
    return found | ({"spacing": sizes["Z"]} if "Z" in sizes else {})


def written(
    found: Mapping[str, Any], shape: tuple[int, ...], axes: str | None = None
) -> dict[str, Any]:
    """Return keyword arguments of `tifffile.imwrite`.

    Args:
        found: of `calibration`.
        shape: of the label.
        axes: a letter per axis, the last of `ZYX` if left out; time may come first.
    """
    axes = axes or "ZYX"[-len(shape) :]
    options = {key: found[key] for key in ("resolution", "resolutionunit") if key in found}
    if "unit" not in found or shape[0] == 1:
        return options | {"metadata": {"axes": axes}}
    # The words of ImageJ by hand: it reads 32-bit integers too, but tifffile would not write them
    # under its name.
    lines = ["ImageJ=1.54f", f"unit={found['unit']}"]
    if len(shape) > 2:
        lines += [f"images={math.prod(shape[:-2])}"]
        for axis, word in (("Z", "slices"), ("T", "frames")):
            lines += [f"{word}={shape[axes.index(axis)]}"] if axis in axes else []
        lines += ["hyperstack=true"] if len(shape) > 3 else []
        lines += ["mode=grayscale"]
        lines += [f"spacing={found['spacing']}"] if "spacing" in found else []
    text = "\n".join([*lines, ""]).replace("µ", "\\u00B5").encode("ascii", "replace")
    return options | {"description": text, "metadata": None}
