"""CREMI, adult fly brain in serial-section EM: https://cremi.org, MICCAI challenge 2016; licence
unknown here, for the terms of use see there.

Three volumes of 125 x 1250 x 1250 voxels of 40 x 4 x 4 nm with dense neuron ids,
`sample_{A,B,C}_20160501.hdf`: HDF5 with `volumes/raw` and `volumes/labels/neuron_ids` (z, y, x),
both with the attribute `resolution` in nm. In the padded files the ids cover a part of the image
only, which the attribute `offset` (nm) of each places; the image is cropped to the ids. Any file of
this layout is read, e.g. FIB-25 (Takemura et al., PNAS 112(44):13711-13716, 2015; CC BY).

Splits (the paper's): of each volume train is sections 0 to 49, test 50 to 99, val 100 to 124.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np

from gdlib.data.files import (
    SPLITS,
    Splits,
    check_label,
    check_sections,
    check_shapes,
    existing_folder,
    open_volume,
    split_components,
    voxel_size,
)
from gdlib.io import Sample
from gdlib.io.failures import DataError
from gdlib.limits import Count, Sections

__all__ = ["cremi"]

SECTIONS = {"train": (0, 50), "val": (100, 125), "test": (50, 100)}
UNASSIGNED = 0xFFFFFFFFFFFFFFFF


def cremi(
    root: Path | None,
    *,
    samples: Sequence[str] = ("A", "B", "C"),
    file: str = "sample_{}_20160501.hdf",
    sections: Sections = SECTIONS,
    every_section: Count = 1,
    components: bool = True,
    ignore_zero: bool = False,
) -> Splits:
    """Read volumes in the layout of CREMI.

    Args:
        root: folder with the files.
        samples: which volumes.
        file: name of a file; `{}` stands for an element of `samples`.
        sections: split -> first section and the one after the last, counted from the first labelled
            one.
        every_section: take every n-th section only, e.g. 4 of an isotropic volume, to mimic the
            anisotropy of CREMI.
        components: number the 6-connected components of each neuron within its sections one by one
            (before sections are left out). A crop cuts neurons into pieces that are connected only
            outside of it, and nothing inside tells that they belong together. PAPER: the original
            evaluates with the ids of the full volume.
        ignore_zero: whether id 0 is "not assigned" as well, as in FIB-25; else it is background.

    Returns:
        For each split one sample of each volume: image (1, Z, Y, X), label (Z, Y, X), and `ignore`
        where voxels have the id 0xffffffffffffffff, which says "not assigned".
    """
    root = existing_folder(root)
    if set(sections) != set(SPLITS) or any(len(pair) != 2 for pair in sections.values()):
        raise DataError(
            f"sections: there must be [first, after the last] of {', '.join(SPLITS)}, "
            f"not {dict(sections)}"
        )
    ordered = sorted(tuple(pair) for pair in sections.values())
    if any(one[1] > other[0] for one, other in itertools.pairwise(ordered)):
        raise DataError(
            f"sections: the splits {dict(sections)} overlap; give each section to one of them"
        )
    if every_section < 1:
        raise DataError(
            f"every_section is {every_section}; choose 1 for all sections, 2 for every other one"
        )

    def read(start: int, stop: int) -> Iterator[Sample]:
        for name in samples:
            yield _read(
                root / file.format(name), start, stop, every_section, components, ignore_zero
            )

    return {split: read(*pair) for split, pair in sections.items()}


def _read(
    path: Path, start: int, stop: int, step: int, components: bool, ignore_zero: bool
) -> Sample:
    with (
        open_volume(path, "volumes/raw") as raw,
        open_volume(path, "volumes/labels/neuron_ids") as ids,
    ):
        size = voxel_size(raw, ids)
        if size is None or not len(size) == raw.ndim == ids.ndim == 3:
            raise DataError(
                f"{path}: the image has {raw.ndim} axes, the ids have {ids.ndim}, and the "
                f"attribute `resolution` is {size}; store volumes (z, y, x) with their voxel size "
                "in nm"
            )
        corner = _corner(path, raw, ids, size)
        check_sections(path, start, stop, len(ids))
        label = ids[start:stop]
        box = [slice(first, first + side) for first, side in zip(corner, ids.shape, strict=True)]
        image = raw[(slice(corner[0] + start, corner[0] + stop, step), *box[1:])]
    check_label(path, label)
    ignore = label == UNASSIGNED
    if ignore_zero:
        ignore |= label == 0
    label[ignore] = 0
    if components:
        label = split_components(label)
    attrs = {"source": path.name, "voxel_size_nm": [size[0] * step, *size[1:]]}
    name = f"{path.stem}_z{start:03d}-{stop - 1:03d}"
    return Sample(name, image[None], label[::step], ignore=ignore[::step], attrs=attrs)


def _corner(path: Path, raw: h5py.Dataset, ids: h5py.Dataset, size: Sequence[float]) -> list[int]:
    """Return the voxel (z, y, x) of the image at which the ids begin."""
    place = (
        np.subtract(*(np.ravel(volume.attrs.get("offset", [0.0] * 3)) for volume in (ids, raw)))
        / size
    )
    corner = np.rint(place).astype(int)
    if np.abs(place - corner).max() > 0.01:
        raise DataError(
            f"{path}: the ids begin between voxels, at {place.tolist()}; correct the "
            "attribute `offset`"
        )
    if (corner < 0).any() or (corner + ids.shape > raw.shape).any():
        if not corner.any():
            check_shapes(path, raw.shape, ids.shape)
        raise DataError(
            f"{path}: ids of {ids.shape} voxels that begin at {tuple(corner.tolist())} reach out "
            f"of the image of {raw.shape}; correct the attribute `offset`"
        )
    return corner.tolist()
