"""BBBC039v1, nuclei of U2OS cells: Broad Bioimage Benchmark Collection, CC0 1.0, Caicedo et al.,
Cytometry A, 2019.

200 fields of 520 x 696 pixels, 16 bit, Hoechst channel, in the official layout: `images/<id>.tif`,
`masks/<id>.png`, `metadata/{training,validation,test}.txt`;
https://bbbc.broadinstitute.org/BBBC039. To cite: "We used image set BBBC039v1 [Caicedo et al.
2018], available from the Broad Bioimage Benchmark Collection [Ljosa et al., Nature Methods, 2012]",
and Caicedo et al., Evaluation of deep learning strategies for nucleus segmentation in fluorescence
images, Cytometry Part A 95(9):952-965, 2019.

Splits:
    official: the lists of the data set, read from its `metadata`: 100 train, 50 val, 50 test.
    heldout: for work that leaves the official test images alone; lists in
        `gdlib/data/splits/bbbc039/heldout`. test: the 50 official validation images; val: every
        fifth (the 5th, 10th, ...) of the sorted official training ids, 20 images; train: the other
        80, among them the one training image without nuclei.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from skimage.measure import label as connected_regions

from gdlib.data.files import Splits, existing_folder, published_split, read_image, read_list
from gdlib.io import Sample
from gdlib.limits import Whole

__all__ = ["bbbc039"]


def bbbc039(
    root: Path | None, *, split: Literal["heldout", "official"] = "heldout", min_area: Whole = 20
) -> Splits:
    """Read BBBC039v1.

    Args:
        root: folder with `images`, `masks` and, for the official split, `metadata`.
        split: `"heldout"` or `"official"`.
        min_area: decoded objects of fewer pixels are specks of the annotation (3 % of all) and
            become background.

    Returns:
        For each split the samples: image (1, 520, 696) uint16, label (520, 696).
    """
    root = existing_folder(root)
    if split == "official":
        files = {"train": "training", "val": "validation", "test": "test"}
        ids = {name: read_list(root / "metadata" / f"{file}.txt") for name, file in files.items()}
    else:
        ids = published_split("bbbc039", split)
    return {name: _read(root, names, min_area) for name, names in ids.items()}


def _read(root: Path, ids: list[str], min_area: int) -> Iterator[Sample]:
    for name in ids:
        mask = read_image(root / "masks" / f"{name}.png")
        source = f"images/{name}.tif"
        yield Sample(
            name, read_image(root / source), decode(mask[0], min_area), attrs={"source": source}
        )


def decode(code: np.ndarray, min_area: int) -> np.ndarray:
    """Turn the red channel of a mask (Y, X) into an instance map.

    Red is 0 in the background and a colouring elsewhere, in which touching nuclei differ: an
    instance is a connected region of one value. To binarise first would merge about 17 % of the
    nuclei.
    """
    instances = connected_regions(code, background=0)
    area = np.bincount(instances.ravel())
    return np.where(area[instances] >= min_area, instances, 0)
