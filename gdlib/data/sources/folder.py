"""Own data: a folder with `images/` and `labels/`, PNG, TIFF, HDF5 or OME-Zarr, one label file per
image file and of equal name.

A label file holds one integer per pixel: 0 = background, any other number = one instance; masks and
classes can be split into their regions. The endings may differ, `a.png` goes with `a.tif`; capitals
count, but not how an accent is stored. Grey and colour images, 2D or 3D; axes in the order z, y, x.
The voxel size is what the metadata of OME-TIFF, ImageJ and OME-Zarr say, the attribute `resolution`
(nm) or `element_size_um` of the arrays of an HDF5 file, or an option. Files of other kinds are
listed as not read.

`unlabelled/` beside them has images without labels, for students to learn from; what another
program found in them may be in `unlabelled_labels/`, in files of the same names.

Splits: if `train.txt`, `val.txt` and `test.txt` lie beside the two folders, they say which images
(one name per line, in UTF-8, or UTF-16 with a mark) go where, and an image on no list is left out.
Otherwise the SHA-256 of its name puts each image at a place between 0 and 1: below `test_fraction`
is test, the next `val_fraction` is val, the rest train. An image never moves because others are
added or removed. The one exception is for very few images: a split that would stay empty borrows,
from the largest split, the image whose place is nearest to its own range, until an image of its own
arrives.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gdlib.data import omezarr
from gdlib.data.calibration import calibration
from gdlib.data.files import (
    SPLITS,
    UNLABELLED,
    Splits,
    check_label,
    existing_folder,
    find_files,
    open_volume,
    read_image,
    read_label,
    read_list,
    spelt,
    split_components,
    voxel_size,
)
from gdlib.data.scale import microns
from gdlib.io import HDF5_SUFFIXES, Sample
from gdlib.io.failures import DataError
from gdlib.limits import Count, Inside, Positive, Whole

__all__ = ["folder"]


def folder(
    root: Path | None,
    *,
    channels: Count = 1,
    val_fraction: Inside = 0.2,
    test_fraction: Inside = 0.2,
    image_dataset: str | None = None,
    label_dataset: str | None = None,
    label_regions: bool | None = None,
    voxel_size_nm: Sequence[Positive] | None = None,
    level: Whole = 0,
) -> Splits:
    """Read a folder of images and labels.

    Args:
        root: folder with `images` and `labels`, and split lists if wanted.
        channels: of every image; only needed where a file does not say which axis its channels are
            on.
        val_fraction: expected part of the images for validation; unused with split lists.
        test_fraction: expected part of the images for testing; unused with split lists.
        image_dataset: path of the image inside HDF5 files, e.g. `volumes/raw`; not needed where
            they hold one array.
        label_dataset: the same for labels.
        label_regions: true makes each connected region of equal numbers an object, for masks of 0
            and 255 and for classes; objects that touch become one, regions that touch at corners
            only are two. false says that a number is an object however many regions it has. If
            nothing is said, labels that look like masks or classes are refused.
        voxel_size_nm: one number per axis ([Z,] Y, X), instead of what the files say.
        level: which resolution of OME-Zarr images and labels is read; 0 is the full one.

    Returns:
        For each split the samples: image (C, [Z,] Y, X) and label ([Z,] Y, X) as stored; and
        `unlabelled` ones, if that folder is there, whose label is None without the other.
    """
    root = existing_folder(root)
    images, labels = find_files(root / "images"), find_files(root / "labels")
    _check_pairs(images, labels)
    lists = [root / f"{split}.txt" for split in SPLITS]
    for path in root.iterdir():
        if path not in lists and path.name.lower() in [other.name for other in lists]:
            raise DataError(
                f"{path}: split lists are called "
                f"{', '.join(other.name for other in lists)}; rename it"
            )
    if any(path.exists() for path in lists):
        for path in lists:
            if not path.exists():
                raise DataError(
                    f"{path}: the split list is missing; add it, one name per line, or remove the "
                    "others too"
                )
        split_names = {path.stem: read_list(path) for path in lists}
        for path in lists:
            for name in split_names[path.stem]:
                if name not in images:
                    hint = spelt(name, images)
                    raise DataError(
                        f'{path}: there is no image "{name}"{hint}; correct the name '
                        "or add the image"
                    )
    else:
        split_names = _split(list(images), val_fraction, test_fraction)
    files = {
        split: [(name, images[name], labels[name]) for name in names]
        for split, names in split_names.items()
    }
    if (root / UNLABELLED).is_dir():
        images, labels = find_files(root / UNLABELLED), {}
        if (root / f"{UNLABELLED}_labels").is_dir():
            labels = find_files(root / f"{UNLABELLED}_labels")
            _check_pairs(images, labels)
        files[UNLABELLED] = [(name, path, labels.get(name)) for name, path in images.items()]
    return {
        split: _read(
            root,
            own,
            channels,
            image_dataset,
            label_dataset,
            bool(label_regions),
            voxel_size_nm,
            level,
        )
        for split, own in files.items()
    }


def _check_pairs(images: Mapping[str, Path], labels: Mapping[str, Path]) -> None:
    """Raise `DataError` unless each image has a label, and each label an image."""
    folders = [next(iter(files.values())).parent.name for files in (images, labels)]
    for name in sorted(images.keys() - labels.keys()):
        hint = spelt(name, labels)
        raise DataError(
            f"{images[name]}: this image has no label{hint}; add {folders[1]}/{name}.tif or "
            "remove the image"
        )
    for name in sorted(labels.keys() - images.keys()):
        hint = spelt(name, images)
        raise DataError(
            f"{labels[name]}: this label has no image{hint}; add {folders[0]}/{name}.tif or "
            "remove the label"
        )


def _read(
    root: Path,
    files: list[tuple[str, Path, Path | None]],
    channels: int,
    image_dataset: str | None,
    label_dataset: str | None,
    regions: bool,
    size: Sequence[float] | None,
    level: int,
) -> Iterator[Sample]:
    for name, image, path in files:
        attrs = {"source": image.relative_to(root).as_posix()}
        if level and image.suffix.lower() != omezarr.SUFFIX:
            raise DataError(f"{image}: only OME-Zarr has a level {level}; leave the level out")
        image, path = _at(image, level), path and _at(path, level)
        array = read_image(image, channels, image_dataset)
        ndim = sum(n > 1 for n in array.shape[1:])
        if found := size or _stored_size(image, image_dataset, path, label_dataset, ndim):
            attrs["voxel_size_nm"] = [float(side) for side in found]
        if path is None:
            yield Sample(name, array, None, attrs=attrs)
            continue
        label = read_label(path, label_dataset)
        if regions and label.dtype == bool:
            label = label.astype(np.uint8)
        check_label(path, label)
        if regions:
            label = split_components(label)
        yield Sample(name, array, label, attrs=attrs)


def _at(path: Path, level: int) -> Path:
    """Return how a resolution of an OME-Zarr is named; other files have one."""
    return Path(f"{path}:{level}") if level and path.suffix.lower() == omezarr.SUFFIX else path


def _stored_size(
    image: Path, image_dataset: str | None, label: Path | None, label_dataset: str | None, ndim: int
) -> list[float] | None:
    """Return the voxel size in nm that the files say: of HDF5 the image or the label, of TIFF and
    OME-Zarr the image, for labels often have what a program writes where it knows none.
    """
    if image.suffix.lower() in (".tif", ".tiff"):
        sides = microns(calibration(image), ndim)
    elif omezarr.split_zarr_path(image):
        sides = (omezarr.open_zarr(image).microns or ())[-ndim:]
    else:
        sides = None
    if sides:
        return [float(f"{1000 * side:.6g}") for side in sides]
    both = [(image, image_dataset), *([(label, label_dataset)] if label else [])]
    with contextlib.ExitStack() as stack:
        opened = (
            open_volume(path, name) for path, name in both if path.suffix.lower() in HDF5_SUFFIXES
        )
        return voxel_size(*(stack.enter_context(volume) for volume in opened))


def _split(names: list[str], val_fraction: float, test_fraction: float) -> dict[str, list[str]]:
    """Split names by their hash; the module docstring has the rule."""
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise DataError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave a split without "
            "images; both must be above 0 and their sum below 1"
        )
    if len(names) < len(SPLITS):
        raise DataError(
            f"there are {len(names)} images, but train, val and test need at least one "
            "each; add images"
        )
    place = {
        name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
        for name in names
    }
    borders = {"test": (0.0, test_fraction), "val": (test_fraction, test_fraction + val_fraction)}
    borders["train"] = (test_fraction + val_fraction, 1.0)
    split_names = {
        split: [n for n in names if borders[split][0] <= place[n] < borders[split][1]]
        for split in SPLITS
    }
    for split, own in split_names.items():
        if not own:
            largest = max(split_names.values(), key=len)
            own.append(
                min(
                    largest,
                    key=lambda name: min(abs(place[name] - border) for border in borders[split]),
                )
            )
            largest.remove(own[0])
    return split_names
