"""Turn a data source into the three sample files, and one of unlabelled images where they are
wanted.
All images are checked, and one bad image means no file at all.
"""

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from skimage.segmentation import relabel_sequential

from gdlib import io
from gdlib.data import sense
from gdlib.data.axes import SECTIONS, fitted
from gdlib.data.files import SPLITS, UNLABELLED, Splits, check_label, check_shapes
from gdlib.data.intensity import as_float32
from gdlib.io import Sample
from gdlib.io.failures import DataError
from gdlib.registry import SOURCES


def provenance(source: str) -> str:
    """Return data, licence and citation of a data source: the first paragraph of its module."""
    text = sys.modules[SOURCES.get(source).__module__].__doc__ or ""
    return " ".join(text.strip().split("\n\n")[0].split())


def prepare(
    source: str,
    options: Mapping[str, Any],
    root: Path | str | None,
    outputs: Mapping[str, Path | str],
    min_size: Sequence[int],
    channels: int,
    unlabelled: bool | Sequence[str] = False,
) -> dict[str, dict[str, Any]]:
    """Write the train, val and test samples of a data source, and those of unlabelled images if
    there shall be some, all or none, and print a line about each.

    What is probably not meant (see `gdlib.data.sense`) is printed on stderr, `warning: ` before
    each sentence.

    Images of 8 and 16 bits may be mixed in one dataset: networks see each image normalised by its
    own percentiles, so that its scale does not matter. The types are counted, printed and stored,
    for a mixture may be a slip of an export.

    Args:
        source: name of a data source.
        options: its keyword arguments.
        root: folder of the raw data; None for synthetic data.
        outputs: `train`, `val` and `test` -> `.h5` file, and `unlabelled` if there shall be such;
            files that are there are replaced, or removed on failure.
        min_size: n smallest side lengths in pixels, usually the patch; its length says whether the
            data are 2D or 3D.
        channels: of every image.
        unlabelled: true for the unlabelled images that the source has, which may come with labels
            of another program; or the names of training images whose labels are not looked at, in
            which `*` stands for any characters; else there are none.

    Returns:
        For each file the file attributes: `samples`, `instances`, `empty_labels`, `ignored`
        (voxels), `types`, `sha256` (of names and content), `source`, `options`, `provenance`,
        `channels`, `axes`, `split`; `warnings`, if there are any, are of all three.

    Raises:
        DataError: for input that cannot be used.
    """
    SOURCES.check(source, dict(options))
    wanted = (*SPLITS, UNLABELLED) if unlabelled else SPLITS
    if set(outputs) != set(wanted):
        raise DataError(
            f"outputs: there must be one file each for {', '.join(wanted)}, not for "
            f"{', '.join(outputs)}"
        )
    for path in outputs.values():
        Path(path).unlink(missing_ok=True)
    read = SOURCES.get(source)
    splits = _with_unlabelled(
        source, unlabelled, lambda: read(None if root is None else Path(root), **options)
    )
    fixed = {
        "source": source,
        "options": dict(options),
        "provenance": provenance(source),
        "channels": channels,
        "axes": "C" + "ZYX"[-len(min_size) :],
    }
    summary: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    seen: list[sense.Seen] = []
    temporary: dict[str, Path] = {}
    with contextlib.ExitStack() as stack:
        for split in wanted:
            temporary[split] = stack.enter_context(io.atomic(outputs[split]))
            tally = _Tally()
            checked = _checked(splits[split], split, names, seen, channels, min_size)
            if split == UNLABELLED:
                checked = _told_apart(checked, seen)
            io.write_samples(temporary[split], tally.count(checked), split=split, **fixed)
            if split == UNLABELLED and isinstance(unlabelled, Sequence):
                _check_found(unlabelled, [name for name, at in names.items() if at == split])
            if not tally.samples:
                raise DataError(
                    f'data source "{source}": split "{split}" has no image; check the split lists'
                )
            if split in SPLITS:
                sense.check_splits(seen)
            summary[split] = tally.attrs()
            print(f"{source} {split}: {tally}")
        # those of another program may be masks, too
        others = [one for one in seen if one.split == UNLABELLED]
        if found := [
            sentence
            for group in ([one for one in seen if one.split in SPLITS], others)
            if any(one.ids for one in group)
            for sentence in _senseless(source, options, group)
        ]:
            summary = {split: {**attrs, "warnings": found} for split, attrs in summary.items()}
            print(*(f"warning: {sentence}" for sentence in found), sep="\n", file=sys.stderr)
        for split, attrs in summary.items():
            with h5py.File(temporary[split], "r+", libver=io.hdf5.FORMAT) as file:
                for key, value in attrs.items():
                    file.attrs[key] = json.dumps(value) if isinstance(value, list) else value
    return {split: {**fixed, "split": split, **attrs} for split, attrs in summary.items()}


def _is(name: str, wanted: str) -> bool:
    return name == wanted or fnmatchcase(name, wanted)


def _check_found(wanted: Sequence[str], found: Sequence[str]) -> None:
    for name in wanted:
        if not any(_is(one, name) for one in found):
            raise DataError(
                f'unlabelled: there is no training image "{name}"; correct the name, or leave it '
                "out"
            )


def _with_unlabelled(
    source: str, unlabelled: bool | Sequence[str], read: Callable[[], Splits]
) -> Splits:
    """Return the splits of a source with the unlabelled images that are wanted, or none."""
    splits = read()
    if unlabelled is True:
        if UNLABELLED not in splits:
            raise DataError(
                f'data source "{source}" has no unlabelled images of its own; the source `folder` '
                "reads them in `unlabelled/` beside `images/`, of others name training images in "
                "`unlabelled`"
            )
        return splits
    if splits.pop(UNLABELLED, None) is not None:
        print(
            "warning: the unlabelled images that are there are not used; set `unlabelled: true` of "
            "the dataset",
            file=sys.stderr,
        )
    if unlabelled:

        def chosen(sample: Sample) -> bool:
            return any(_is(sample.id, name) for name in unlabelled)

        again = read()["train"]  # each is written to a file of its own, one image after the other
        splits["train"] = (one for one in splits["train"] if not chosen(one))
        splits[UNLABELLED] = (replace(one, label=None, ignore=None) for one in again if chosen(one))
    return splits


def _told_apart(samples: Iterable[Sample], seen: Sequence[sense.Seen]) -> Iterator[Sample]:
    """Raise `DataError` where an unlabelled image is one that networks are judged on."""
    judged = {one.image: one for one in seen if one.split in ("val", "test") and one.values > 1}
    for sample in samples:
        if other := judged.get(sense.digest(sample.image)):
            raise DataError(
                f"{sample.attrs.get('source', sample.id)}, which is unlabelled, and {other.name} "
                "in "
                f"split {other.split} are the same image; take one of them out, or what is trained "
                "on would also be judged"
            )
        yield sample


def _senseless(source: str, options: Mapping[str, Any], seen: Sequence[sense.Seen]) -> list[str]:
    """Return what is probably not meant.

    `DataError` where numbers are no objects, and it was not said that they are.
    """
    option = "label_regions"
    mend = "give each object a number of its own"
    if ":" not in source and option in SOURCES.parameters(source):
        if options.get(option) is None:
            sense.check_numbers(
                seen,
                f"set its option `{option}: true`, so that each region becomes an object (those "
                "that touch become one), or to false if the labels are right",
            )
        mend = f"the option `{option}: true` does so for regions that do not touch" * (
            options.get(option) is None
        )
    return sense.warnings(seen, mend)


def check_sample(sample: Sample, channels: int, min_size: Sequence[int]) -> Sample:
    """Return a sample, labelled or not, that keeps the file contract, or raise `DataError`.

    Args:
        sample: image (C, [Z,] Y, X) of any real type, label ([Z,] Y, X) of any integer type, not
            negative. A label without an instance is fine. `ignore`, if there is one, boolean, of
            the label's shape. All may have more axes of one pixel.
        channels: C expected.
        min_size: n smallest side lengths in pixels, n = 2 or 3.

    Returns:
        The sample with its label numbered 1, 2, ... in uint32 and its image in uint8, uint16 or,
        from any other type, float32 (less an offset beside which that would have no contrast);
        without `ignore` where that is False everywhere.
    """
    if sample.label is None:  # all that can be wrong is the image
        blank = replace(sample, label=np.zeros(sample.image.shape[1:], np.uint8))
        return replace(check_sample(blank, channels, min_size), label=None)
    ndim = len(min_size)
    image, label = fitted(sample.image, ndim, leading=1), fitted(sample.label, ndim)
    name = sample.attrs.get("source", sample.id)
    if not sample.id or "/" in sample.id:
        raise DataError(
            f'{name}: the sample name "{sample.id}" is empty or has a "/"; rename the file'
        )
    if image.shape[0] != channels:
        raise DataError(
            f"{name}: the image has {image.shape[0]} channels, but the dataset says {channels}; "
            f"convert the image or correct `channels`{SECTIONS * (ndim == 3 and channels == 1)}"
        )
    check_shapes(name, image.shape[1:], label.shape)
    if label.ndim != ndim:
        raise DataError(
            f"{name}: the image has {label.ndim} axes, but the dataset {ndim}; convert the image"
        )
    if any(side < least for side, least in zip(label.shape, min_size, strict=True)):
        raise DataError(
            f"{name}: the image of {label.shape} pixels is smaller than the patch "
            f"{tuple(min_size)}; choose a smaller patch or leave the image out"
        )
    check_label(name, label)
    ignore = sample.ignore
    if ignore is not None:
        ignore = fitted(ignore, ndim)
        if ignore.shape != label.shape or ignore.dtype != bool:
            raise DataError(
                f"{name}: what to ignore is {ignore.shape} of type {ignore.dtype}; it must be "
                f"boolean and of the label's shape {label.shape}"
            )
        if ignore.all():
            raise DataError(f"{name}: every pixel is to be ignored; leave the image out")
    size = sample.attrs.get("voxel_size_nm", label.shape)
    if len(size) != label.ndim:
        raise DataError(
            f"{name}: the voxel size {list(size)} has {len(size)} numbers; give one for each of "
            f"{label.ndim} axes"
        )
    # Readers give what the file has: big-endian numbers, memory that must not be written to
    # (skimage needs to).
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    label = np.require(label, label.dtype.newbyteorder("="), "W")
    if image.dtype.kind not in "uif":
        raise DataError(
            f"{name}: the image has type {image.dtype}; store it as 8-bit, 16-bit or "
            "float intensities"
        )
    if image.dtype not in (np.uint8, np.uint16):
        image = as_float32(image)  # what is too large becomes infinite, which is told next
        if not np.isfinite(image).all():
            raise DataError(
                f"{name}: the image has NaN or infinite pixels; replace them by numbers"
            )
    if image.min() == image.max() and label.any():
        what = "voxels" if label.ndim == 3 else "pixels"
        count = len(np.unique(label[label > 0]))
        raise DataError(
            f"{name}: all {what} of the image are {image.flat[0]}, but its label has {count} "
            "objects; export the image again"
        )
    ignore = ignore if ignore is not None and ignore.any() else None
    return replace(
        sample, image=image, label=relabel_sequential(label)[0].astype(np.uint32), ignore=ignore
    )


def _checked(
    samples: Iterable[Sample],
    split: str,
    names: dict[str, str],
    seen: list[sense.Seen],
    channels: int,
    min_size: Sequence[int],
) -> Iterator[Sample]:
    for sample in samples:
        # A name in two splits would be an image that is both trained and tested on.
        if sample.id in names:
            raise DataError(
                f'"{sample.id}" is in split {names[sample.id]} and again in {split}; '
                "name each image once"
            )
        names[sample.id] = split
        checked = check_sample(sample, channels, min_size)
        if checked.label is not None:
            seen.append(sense.look(checked, split))
        yield checked


class _Tally:
    """Counts samples on their way to the file."""

    def __init__(self) -> None:
        self.samples = self.instances = self.empty = self.ignored = 0
        self.types: Counter[str] = Counter()
        self.hash = hashlib.sha256()

    def count(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            instances = None if sample.label is None else int(sample.label.max())
            self.samples += 1
            self.instances += instances or 0
            self.empty += instances == 0
            self.ignored += 0 if sample.ignore is None else int(sample.ignore.sum())
            self.types[str(sample.image.dtype)] += 1
            self.hash.update(f"{sample.id} {sample.image.dtype} {sample.image.shape}\n".encode())
            for array in (sample.image, sample.label, sample.ignore):
                if array is not None:
                    self.hash.update(np.ascontiguousarray(array).data)
            yield sample

    def attrs(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "instances": self.instances,
            "empty_labels": self.empty,
            "ignored": self.ignored,
            "types": ", ".join(f"{name}: {count}" for name, count in sorted(self.types.items())),
            "sha256": self.hash.hexdigest(),
        }

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.types.items()))
        ignored = f", {self.ignored:,d} ignored voxels" if self.ignored else ""
        return (
            f"{self.samples} images ({types}), {self.instances} instances, {self.empty} empty "
            f"labels{ignored}"
        )
