"""BBBC010v1, C. elegans in bright field: Broad Bioimage Benchmark Collection, CC BY 3.0, Waehlby et
al., Nat. Methods, 2012.

100 wells of an infection assay, 520 x 696 pixels, 16 bit, in the official layout:
`BBBC010_v1_images/*_<well>_w2_*.tif` (bright field; `w1` is fluorescence) and
`BBBC010_v1_foreground_eachworm/<well>_<k>_ground_truth.png`, one mask per worm;
https://bbbc.broadinstitute.org/BBBC010. Each well has about 14 worms of 1000 pixels, 9 pixels wide;
in columns 01 to 12 they were treated, live and curl, in 13 to 24 they are dead and straight.
`BBBC010_v1_foreground`, the union of the masks shifted down by one pixel, is not read. To cite: "We
used the C. elegans infection live/dead image set version 1 provided by Fred Ausubel and available
from the Broad Bioimage Benchmark Collection [Ljosa et al., Nature Methods, 2012]", and Waehlby et
al., An image analysis toolbox for high-throughput C. elegans assays, Nature Methods 9:714-716,
2012.

Overlaps: worms cross, and 0.9 % of their pixels belong to two. A label has one number per pixel,
and the images do not say which worm lies on top, so any choice would teach and judge an accident
(labels by the first and by the last worm, judged by each other, have an AJI of 0.983): these pixels
are ignored, in losses and in metrics. A worm that another one crosses stays one instance of two
parts, and so does one whose mask has two parts. PAPER: the original reads label images that are not
published, so its rule is not known.

What is not annotated counts as background: specks, worms out of focus, and a few at the border of
the well. Every method loses the same by it. The area outside of the well is black and stays in the
image.

Splits (lists in `gdlib/data/splits/celegans`; PAPER: the original's lists are not published):
    all97: all wells but C13, C14 and D24, which copies in circulation lack. Well i (from 0) in the
        order of names is test if i mod 4 = 3, val if i mod 8 = 2, else train: 24, 12 and 61 wells.
    subset43: the wells with i mod 16 in 0, 1, 4, 5, 8, 9, 12, none of them in the test of all97.
        Among the treated and among the untreated alike, the j-th (from 0) is test if j mod 7 is 2
        or 5, val if it is 3, else train: 12 (6 treated), 6 (3) and 25 (14) wells.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gdlib.data.files import (
    Splits,
    existing_folder,
    merge_masks,
    published_split,
    read_image,
    read_masks,
)
from gdlib.io import Sample
from gdlib.io.failures import DataError
from gdlib.registry import nearest

__all__ = ["celegans"]

CHANNELS = {"brightfield": "w2", "fluorescence": "w1"}


def celegans(
    root: Path | None,
    *,
    split: Literal["all97", "subset43"] = "all97",
    channel: Literal["brightfield", "fluorescence"] = "brightfield",
    overlap: Literal["ignore", "first", "last"] = "ignore",
) -> Splits:
    """Read BBBC010v1.

    Args:
        root: folder with `BBBC010_v1_images` and `BBBC010_v1_foreground_eachworm`.
        split: `"all97"` or `"subset43"`.
        channel: `"brightfield"`, which the masks match, or `"fluorescence"`.
        overlap: what becomes of pixels of several worms: `"ignore"`, or they go to the `"first"` or
            `"last"` of them in the order of files.

    Returns:
        For each split the samples: image (1, 520, 696) uint16, label (520, 696), `ignore` where
        worms overlap.
    """
    root = existing_folder(root)
    if channel not in CHANNELS:
        raise DataError(f'BBBC010 has no channel "{channel}": {nearest(channel, list(CHANNELS))}')
    return {
        name: _read(root, wells, channel, overlap)
        for name, wells in published_split("celegans", split).items()
    }


def _read(root: Path, wells: list[str], channel: str, overlap: str) -> Iterator[Sample]:
    for well in wells:
        path = _files(root, "BBBC010_v1_images", f"*_{well}_{CHANNELS[channel]}_*.tif")[0]
        masks = _files(root, "BBBC010_v1_foreground_eachworm", f"{well}_*_ground_truth.png")
        image = read_image(path)
        label, ignore = merge_masks(read_masks(masks, image.shape[1:]), image.shape[1:], overlap)
        yield Sample(
            well, image, label, ignore=ignore, attrs={"source": path.relative_to(root).as_posix()}
        )


def _files(root: Path, folder: str, pattern: str) -> list[Path]:
    """Return the files of a well, sorted by name."""
    found = sorted(existing_folder(root / folder).glob(pattern))
    if not found:
        raise DataError(
            f"{root / folder / pattern}: there is no such file; get all wells of BBBC010, or "
            "choose a split of those there are"
        )
    return found
