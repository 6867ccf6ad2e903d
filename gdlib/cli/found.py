"""What `gdlib segment` tells of the objects it found: a table, pictures with outlines, a word on
their size.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io
from gdlib.io import outputs

COLUMNS = ("image", "frame", "label", "area", "z", "y", "x", "mean_intensity", "area_microns")
LARGEST = 4096  # pixels of the longer side of a picture; of larger images every second, third, ...
OUTLINE = (255, 210, 0)
ENOUGH = 5  # objects, before anything is said of their size


@dataclass
class Counted:
    """What was found in one image.

    Attributes:
        objects: how many.
        frames: in what, " in 3 frames" if there are several.
        rows: of the table.
        diameters: of the objects as the network saw them, in pixels.
    """

    objects: int = 0
    frames: str = ""
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    diameters: list[np.ndarray] = field(default_factory=list)

    def add(self, other: "Counted") -> None:
        """Take in another frame of this image."""
        self.objects += other.objects
        self.rows += other.rows
        self.diameters += other.diameters


class Found:
    """Collects what was found in many images.

    Args:
        table: CSV file for all objects, None for none.
        preview: draw a picture for every image.
        header: of the weights.
        ndim: axes that the network sees at once.
    """

    def __init__(
        self, table: Path | None, preview: bool, header: Mapping[str, Any], ndim: int
    ) -> None:
        self.table, self.preview, self.ndim = table, preview, ndim
        self.known = header.get("diameter") if ndim == 2 else None
        self.images = 0
        self.all = Counted()

    @property
    def wants_image(self) -> bool:
        """Are the intensities needed?"""
        return self.preview or self.table is not None

    def count(
        self,
        path: str,
        frame: str,
        image: np.ndarray | None,
        label: np.ndarray,
        sides: Sequence[float] | None,
        by: Sequence[float] | None,
    ) -> Counted:
        """Measure the objects of one image, or of one frame of it.

        Args:
            path: of the image, as it was given.
            frame: which it is, as text; "" of an image that has one.
            image: (C, [Z,] Y, X), None where only the number of objects counts.
            label: ([Z,] Y, X).
            sides: of a pixel in microns, one per axis, None if unknown.
            by: factors by which the network saw the image enlarged.
        """
        area = np.bincount(label.ravel())[1:]
        area = area[area > 0]
        counted = Counted(len(area))
        if self.known:
            scale = 1.0 if by is None else math.prod(by) ** (1 / len(by))
            counted.diameters.append(2 * np.sqrt(area / np.pi) * scale)
        if self.table is not None and image is not None and len(area):
            counted.rows += _measured(path, frame, image, label, sides)
        return counted

    def add(self, counted: Counted) -> None:
        """Take in an image that is done."""
        self.images += 1
        self.all.add(counted)

    def tell(self) -> None:
        """Write the table, and say if the objects are of another size than the network knows.

        Where no image could be segmented, a table that is there stays as it is.
        """
        if self.table is not None and self.images:
            columns = [name for name in COLUMNS if name != "z" or self.ndim == 3]
            io.write_rows(self.table, columns, self.all.rows)
        sizes = np.concatenate(self.all.diameters) if self.all.diameters else np.zeros(0)
        if not self.known or not self.images:
            return
        if self.all.objects < ENOUGH:
            print(
                f"few objects were found; the network knows those of about {self.known[1]:.0f} "
                "pixels across, as bright or dark against the ground as in its training images: "
                "--diameter and --invert are for others",
                file=sys.stderr,
            )
        if len(sizes) < ENOUGH:
            return
        median, known = float(np.median(sizes)), float(self.known[1])
        if not known / 2 <= median <= 2 * known:
            print(
                f"warning: the network saw objects of about {median:.0f} pixels across, those of "
                f"its training images were {known:.0f}: look at the outlines, and if they are "
                "wrong give the diameter of your objects in pixels with --diameter",
                file=sys.stderr,
            )


def _measured(
    path: str,
    frame: str,
    image: np.ndarray,
    label: np.ndarray,
    sides: Sequence[float] | None,
) -> Iterator[tuple[Any, ...]]:
    """Yield a row of `COLUMNS` per object; areas of volumes are volumes, intensities those of the
    first channel.
    """
    from skimage.measure import regionprops_table

    found = regionprops_table(
        label, image[0], properties=("label", "area", "centroid", "intensity_mean")
    )
    pixel = math.prod(sides) if sides else None
    centroids = [found[f"centroid-{axis}"] for axis in range(label.ndim)]
    for k, number in enumerate(found["label"]):
        area = float(found["area"][k])
        centre = [float(column[k]) for column in centroids]
        size = "" if pixel is None else area * pixel
        mean = float(found["intensity_mean"][k])
        yield (path, frame, int(number), area, *centre, mean, size)


def preview_output(path: Path, mark: str) -> outputs.Output:
    """Return a picture for a check whether it may be replaced."""

    def is_own(path: Path) -> bool:
        from PIL import Image

        try:
            with Image.open(path) as image:
                text = str(image.info.get("Software", ""))
        except OSError:
            return False
        return text.endswith(mark.partition(", ")[2])

    return outputs.Output(path, is_own)


def draw(path: Path, image: np.ndarray, label: np.ndarray, mark: str) -> None:
    """Draw outlines on an image, of a volume on its middle section.

    Args:
        path: PNG file.
        image: (C, [Z,] Y, X); the first channel is shown.
        label: ([Z,] Y, X).
        mark: what the picture says of itself.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if label.ndim == 3:
        image, label = image[:, len(label) // 2], label[len(label) // 2]
    step = -(-max(label.shape) // LARGEST)
    grey, label = image[0, ::step, ::step].astype(np.float32), label[::step, ::step]
    low, high = np.percentile(grey, (0.5, 99.8))
    grey = np.clip((grey - low) / max(float(high - low), 1e-6), 0, 1)
    picture = np.repeat((255 * grey)[..., None], 3, axis=2).astype(np.uint8)
    padded = np.pad(label, 1, mode="edge")
    inside = padded[1:-1, 1:-1]
    edge = np.zeros(label.shape, bool)
    for other in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        edge |= inside != other
    picture[edge & (label > 0)] = OUTLINE
    about = PngInfo()
    about.add_text("Software", mark)
    with io.atomic(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=about)
