"""Own data: a folder with `images/` and `labels/`, PNG or TIFF, one label file for each image file and of equal name.

A label file holds one integer per pixel: 0 = background, any other number = one instance. The endings may differ:
`a.png` goes with `a.tif`. Grey and colour images, 2D or 3D.

Splits: if `train.txt`, `val.txt` and `test.txt` lie beside the two folders, they say which images (one name per line)
go where, and an image on no list is left out. Otherwise the SHA-256 of its name puts each image at a place between 0
and 1: below `test_fraction` is test, the next `val_fraction` is val, the rest train. An image never moves because
others are added or removed. The one exception is for very few images: a split that would stay empty borrows, from the
largest split, the image whose place is nearest to its own range, until an image of its own arrives.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from gdlib.data.files import SPLITS, Splits, existing_folder, find_files, read_image, read_label, read_list
from gdlib.io import DataError, Sample

__all__ = ["folder"]


def folder(root: Path | None, *, channels: int = 1, val_fraction: float = 0.2, test_fraction: float = 0.2) -> Splits:
    """Read a folder of images and labels.

    Args:
        root: folder with `images` and `labels`, and split lists if wanted.
        channels: of every image; only needed where a TIFF does not say which axis its channels are on.
        val_fraction: expected part of the images for validation; unused with split lists.
        test_fraction: expected part of the images for testing; unused with split lists.

    Returns:
        For each split the samples: image (C, [Z,] Y, X) and label ([Z,] Y, X) as stored.
    """
    root = existing_folder(root)
    images, labels = find_files(root / "images"), find_files(root / "labels")
    for name in sorted(images.keys() - labels.keys()):
        raise DataError(f"{images[name]}: this image has no label; add labels/{name}.tif or remove the image")
    for name in sorted(labels.keys() - images.keys()):
        raise DataError(f"{labels[name]}: this label has no image; add images/{name}.tif or remove the label")
    lists = [root / f"{split}.txt" for split in SPLITS]
    if any(path.exists() for path in lists):
        split_names = {path.stem: read_list(path) for path in lists}
        for path in lists:
            for name in split_names[path.stem]:
                if name not in images:
                    raise DataError(f'{path}: there is no image "{name}"; correct the name or add the image')
    else:
        split_names = _split(list(images), val_fraction, test_fraction)
    return {
        split: _read(root, [(images[name], labels[name]) for name in names], channels)
        for split, names in split_names.items()
    }


def _read(root: Path, pairs: list[tuple[Path, Path]], channels: int) -> Iterator[Sample]:
    for image, label in pairs:
        attrs = {"source": image.relative_to(root).as_posix()}
        yield Sample(image.stem, read_image(image, channels), read_label(label), attrs)


def _split(names: list[str], val_fraction: float, test_fraction: float) -> dict[str, list[str]]:
    """Split names by their hash; the module docstring has the rule."""
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise DataError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave a split without images; "
            "both must be above 0 and their sum below 1"
        )
    if len(names) < len(SPLITS):
        raise DataError(f"there are {len(names)} images, but train, val and test need at least one each; add images")
    place = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48 for name in names}
    borders = {"test": (0.0, test_fraction), "val": (test_fraction, test_fraction + val_fraction)}
    borders["train"] = (test_fraction + val_fraction, 1.0)
    split_names = {split: [n for n in names if borders[split][0] <= place[n] < borders[split][1]] for split in SPLITS}
    for split, own in split_names.items():
        if not own:
            largest = max(split_names.values(), key=len)
            own.append(min(largest, key=lambda name: min(abs(place[name] - border) for border in borders[split])))
            largest.remove(own[0])
    return split_names
