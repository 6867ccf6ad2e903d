"""CVPPP A1, rosettes of Arabidopsis: Leaf Segmentation Challenge 2017; academic use after
registration, Minervini et al., 2016.

RGB images of about 530 x 500 pixels with one number per leaf, in the official layout:
`A1/plantNNN_rgb.png` and `A1/plantNNN_label.png`. Of the 161 plants 128 are published with labels,
the training set of the challenge; the labels of its 33 test plants are not public, so nothing of
them is read. `plantNNN_fg.png`, the foreground, is where the label is not 0, and
`plantNNN_centers.png` the middles of the leaves; neither is needed. To get the data:
https://www.plant-phenotyping.org, or https://competitions.codalab.org/competitions/18405. To cite:
Minervini et al., Finely-grained annotated datasets for image-based plant phenotyping, Pattern
Recognition Letters 81:80-89, 2016; Scharr et al., Leaf segmentation in plant phenotyping: a
collation study, Machine Vision and Applications 27(4):585-606, 2016.

Splits (`local20`, lists in `gdlib/data/splits/cvppp`):
    test: the 20 plants on which Huang et al., AAAI 2022, and the paper after them validate.
    val: 12 others, one of about every thirteen in the order of ids. PAPER: the original chooses
        weights on the 20 plants that it reports; here no choice is made on test images.
    train: all other plants of the folder, 96 of the official 128.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gdlib.data.files import (
    SPLITS,
    Splits,
    existing_folder,
    published_split,
    read_image,
    read_label,
)
from gdlib.io import Sample
from gdlib.io.failures import DataError

__all__ = ["cvppp"]

PLACES = (
    "A1",
    "A1/train",
    "training/A1",
    ".",
)  # of the images below the folder: official, original code, unpacked archive


def cvppp(root: Path | None, *, split: Literal["local20"] = "local20") -> Splits:
    """Read the labelled plants of A1.

    Args:
        root: folder with `A1`, or that folder itself.
        split: `"local20"`.

    Returns:
        For each split the samples: image (3, Y, X) uint8, label (Y, X).
    """
    folder = _plants(existing_folder(root))
    ids = published_split("cvppp", split)
    held_out = {name for own in ids.values() for name in own}
    labelled = (path.stem.removesuffix("_label") for path in folder.glob("plant*_label.png"))
    ids["train"] = sorted(set(labelled) - held_out)
    return {name: _read(folder, ids[name]) for name in SPLITS}


def _plants(root: Path) -> Path:
    """Return the folder with the images."""
    for place in PLACES:
        if any((root / place).glob("plant*_label.png")):
            return root / place
    raise DataError(
        f"{root}: there is no A1/plantNNN_label.png below this folder; register at "
        "https://www.plant-phenotyping.org, and put the training images of the Leaf Segmentation "
        "Challenge there"
    )


def _read(folder: Path, ids: list[str]) -> Iterator[Sample]:
    for name in ids:
        image = read_image(folder / f"{name}_rgb.png")
        yield Sample(
            name,
            image,
            read_label(folder / f"{name}_label.png"),
            attrs={"source": f"{name}_rgb.png"},
        )
