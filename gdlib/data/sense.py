"""Whether images and labels make sense as a dataset: what shows only when all of them have been
seen.

What cannot be meant is an error. What may be meant, but is mostly a slip, is a warning: a sentence
that names some images, the cause and a mend.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bioimage_cpp.segmentation import label as connected_regions

from gdlib.io import Sample
from gdlib.io.failures import DataError

PART = (4, 2048, 2048)  # at most so much of the middle of an image is compared with its label
SPECK = 10  # pixels; regions with one grey value of an image are smaller on average
NOISE = 3  # pixels; the same where there are about as many grey values as regions
SHIFTS = 17  # places that a label is moved to, to see whether it fits its own image better


@dataclass(frozen=True)
class Seen:
    """What is remembered of a sample.

    Attributes:
        name: for messages.
        split: it is in.
        image: digest of its pixels.
        label: digest of its label.
        values: number of grey values of its first channel, 3 for all above 2.
        areas: pixels of each object.
        pieces: connected regions (also over corners) of all objects.
        enclosed: pixels without a label that objects surround within their section.
        surrounds: whether one object covers more than half of the image and reaches all its sides,
            and none is background.
        drawn: whether the image is the label drawn, of one grey value within each object and in the
            background.
        fits: whether the borders of objects are where the image differs; None without borders.
    """

    name: str
    split: str
    image: bytes
    label: bytes
    values: int
    areas: np.ndarray
    pieces: int
    enclosed: int
    surrounds: bool
    drawn: bool
    fits: bool | None

    @property
    def ids(self) -> int:
        """Number of objects, as the label numbers them."""
        return len(self.areas)


def look(sample: Sample, split: str) -> Seen:
    """Look at one sample that `prepare.check_sample` has passed: its label is numbered 1, 2, ..."""
    image, label = sample.image, sample.label
    count = int(label.max())
    background = label == 0 if sample.ignore is None else (label == 0) & ~sample.ignore
    areas = np.bincount(label.ravel(), minlength=count + 1)
    channel = image[0]
    low, high = channel.min(), channel.max()
    value = np.zeros(count + 1, channel.dtype)
    value[label] = channel  # of one pixel of each object
    return Seen(
        name=str(sample.attrs.get("source", sample.id)),
        split=split,
        image=digest(image),
        label=digest(label),
        values=1 if low == high else 2 if ((channel == low) | (channel == high)).all() else 3,
        areas=areas[1:],
        pieces=int(connected_regions(label, connectivity=label.ndim).max()),
        enclosed=sum(map(_enclosed, background.reshape(-1, *label.shape[-2:]))),
        surrounds=not background.any()
        and count > 1
        and bool(_at_all_sides(label)[areas > label.size / 2].any()),
        drawn=bool(low < high and (value[label] == channel).all()),
        fits=_fits(image, label),
    )


def digest(array: np.ndarray) -> bytes:
    """Return what only equal arrays have in common."""
    found = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=16)
    found.update(np.ascontiguousarray(array).data)
    return found.digest()


def _enclosed(background: np.ndarray) -> int:
    """Count the pixels of a section's background (Y, X) that are not connected with its sides."""
    regions = connected_regions(background.astype(np.uint8), connectivity=1)
    outside = np.unique(np.concatenate([regions[[0, -1]].ravel(), regions[:, [0, -1]].ravel()]))
    area = np.bincount(regions.ravel())
    area[outside] = area[0] = 0
    return int(area.sum())


def _at_all_sides(label: np.ndarray) -> np.ndarray:
    """Return for each number whether it is at all four (in 3D six) sides of the image."""
    there = np.ones(int(label.max()) + 1, bool)
    for axis in range(label.ndim):
        for side in (0, -1):
            there &= np.isin(np.arange(len(there)), label.take(side, axis))
    return there


def _fits(image: np.ndarray, label: np.ndarray) -> bool | None:
    """Compare the image at the borders of objects with the image where these borders are if the
    label is moved.

    Right labels have their borders on slopes or on lines that are darker or brighter than the rest,
    at least more so than labels that were moved. Sections are compared one by one in y and x, since
    distant ones may differ in brightness.

    Returns:
        Whether mean brightness or mean slope at the borders is beyond that of all moved borders, in
        either direction.
    """
    middle = tuple(
        slice((side - part) // 2, (side + part) // 2) if side > part else slice(None)
        for side, part in zip(label.shape, PART[-label.ndim :], strict=True)
    )
    label = label[middle]
    if min(label.shape[-2:]) < SHIFTS:  # too small to be moved
        return None
    border = np.zeros(label.shape, bool)
    for axis in (-2, -1):
        change = np.diff(label, axis=axis) != 0
        ahead = [(0, 0)] * label.ndim
        ahead[axis] = (1, 0)
        border |= np.pad(change, ahead) | np.pad(change, [pair[::-1] for pair in ahead])
    if not border.any():
        return None
    brightness, slope = np.zeros(label.shape, np.float32), np.zeros(label.shape, np.float32)
    for channel in image:
        channel = channel[middle].astype(np.float32)
        channel -= channel.mean()
        channel /= channel.std() or 1
        brightness += channel
        slope += sum(np.abs(change) for change in np.gradient(channel, axis=(-2, -1)))
    *sections, y, x = np.nonzero(border)
    height, width = label.shape[-2:]
    back, left = height - 1 - y, width - 1 - x
    moved = [
        ((y + k * height // SHIFTS) % height, (x + 5 * k % SHIFTS * width // SHIFTS) % width)
        for k in range(SHIFTS)
    ]
    moved += [(back, x), (y, left), (back, left)]
    if height == width:
        moved += [(x, y), (left, y), (x, back), (left, back)]
    means = [
        [field[*sections, *place].mean(dtype=np.float64) for field in (brightness, slope)]
        for place in moved
    ]
    own, others = np.array(means[0]), np.array(means[1:])
    return bool(((own > others.max(0)) | (own < others.min(0))).any())


def check_splits(seen: Sequence[Seen]) -> None:
    """Raise `DataError` if a split has no object, or if two splits share an image."""
    for split in dict.fromkeys(one.split for one in seen):
        own = [one for one in seen if one.split == split]
        if not any(one.ids for one in own):
            raise DataError(
                f'split "{split}" has no object: the labels of {_some(own)} are 0 everywhere; '
                "correct the labels, or move images "
                "with objects into this split"
            )
    for first, *others in _equal([one for one in seen if one.values > 1], "image"):
        for other in others:
            if other.split != first.split:
                raise DataError(
                    f"{first.name} in split {first.split} and {other.name} in split {other.split} "
                    "are the same image; take one of them out, or what is trained on would also "
                    "be judged"
                )


def check_numbers(seen: Sequence[Seen], mend: str) -> None:
    """Raise `DataError` if a number of the labels stands for many regions throughout: masks,
    classes, or no labels at all.

    Args:
        seen: all samples.
        mend: what to do about it, after "; ".
    """
    full = [one for one in seen if one.ids]
    ids, pieces, pixels = np.sum([(one.ids, one.pieces, one.areas.sum()) for one in full], 0)
    masks = all(one.ids == 1 for one in full)
    if pieces < (1.5 if masks else 2) * ids:
        return
    what = "one number per image makes" if masks else f"{ids} numbers in {len(full)} images make"
    kind = "masks" if masks else "classes"
    if pixels < SPECK * pieces:
        kind = "images"
        mend = (
            "see whether images and labels were exchanged, or labels were saved as JPEG or "
            "resampled"
        )
    raise DataError(
        f"the labels of {_some(full)} look like {kind} and not like objects: {what} up {pieces} "
        f"separate regions; {mend}"
    )


def is_like_an_image(label: Any) -> bool:
    """Do the numbers of a label lie about in specks, as the grey values of an image do?

    Args:
        label: whole numbers, none negative, in memory or on disk; the middle is looked at.
    """
    sides = PART[:1] * (len(label.shape) - 2) + PART[1:]
    middle = tuple(
        slice(max(0, (side - part) // 2), max(0, (side - part) // 2) + part)
        for side, part in zip(label.shape, sides, strict=True)
    )
    part = np.squeeze(np.asarray(label[middle]))
    if part.ndim not in (2, 3):
        return False
    ids = np.count_nonzero(np.unique(part))
    if part.dtype not in (np.uint8, np.uint16, np.uint32, np.uint64):  # what the library takes
        part = part.astype(np.uint64)
    pieces = int(connected_regions(part, connectivity=part.ndim).max())
    pixels = np.count_nonzero(part)
    return bool(pixels < (SPECK if pieces >= 2 * ids else NOISE) * pieces)


def warnings(seen: Sequence[Seen], mend: str) -> list[str]:
    """Return what is probably not meant, a sentence each.

    Args:
        seen: all samples.
        mend: what to do about a number of several regions; empty if that is said to be right.
    """
    full = [one for one in seen if one.ids]
    areas = np.concatenate([one.areas for one in full])
    said = []

    def tell(found: Iterable[Seen], text: str) -> None:
        if found := list(found):
            said.append(f"{_some(found)}: {text}")

    if mend:
        many = [one for one in full if one.pieces >= max(2 * one.ids, one.ids + 5)]
        tell(many, f"numbers of the label make up several separate regions each; {mend}")
        if len(full) > 2 and all(one.ids == 1 for one in full):
            tell(
                full,
                f"each of these labels has one object only; if they are masks of several, {mend}",
            )
    full_scale = [one for one in full if one.ids in (255, 65535) and one.pieces > one.ids]
    tell(
        full_scale,
        "there are as many numbers as the type of the label can hold; save it with more bits",
    )
    if np.median(areas) <= 3:
        tell(
            full,
            "most objects have 3 pixels or fewer; look at the labels, they may have been "
            "resampled or be noise",
        )
    if sum(one.enclosed for one in full) > areas.sum():
        tell(
            full,
            "objects surround more pixels than they have; if the labels are outlines, fill them",
        )
    around = [one for one in full if one.surrounds]
    if 2 * len(around) > len(full):
        tell(
            around,
            "one object lies around all others and no pixel is 0; if it is the "
            "background, set it to 0",
        )
    for split in dict.fromkeys(one.split for one in seen):
        empty = [one for one in seen if one.split == split and not one.ids]
        if 2 * len(empty) > sum(one.split == split for one in seen):
            tell(
                empty,
                f"more than half of the labels of split {split} have no object; see "
                "whether they are complete",
            )
    for group in _equal([one for one in seen if one.values > 1], "image"):
        tell(group, "this is one and the same image; keep it once")
    for group in _equal(full, "label"):
        tell(group, "the labels are equal, pixel by pixel; see whose it is")
    tell(
        (one for one in seen if one.drawn),
        "the image is its label, drawn; put the recorded image there",
    )
    two = (one for one in seen if one.values == 2 and not one.drawn)
    tell(two, "the image has only two grey values; export it without a threshold")
    tell(
        (one for one in seen if one.values == 1),
        "all pixels of the image are equal; see whether it is wanted",
    )
    compared = [one for one in full if one.fits is not None and not one.drawn]
    tell(
        (one for one in compared if not one.fits),
        "the image does not differ where the objects of its label begin (it does in "
        f"{sum(one.fits for one in compared)} of {len(compared)}); see whether this is the label "
        "of another image, shifted, turned or mirrored",
    )
    return said


def _equal(seen: Iterable[Seen], what: str) -> list[list[Seen]]:
    """Return those whose images, or labels, are equal, group by group."""
    groups: dict[bytes, list[Seen]] = defaultdict(list)
    for one in seen:
        groups[getattr(one, what)].append(one)
    return [group for group in groups.values() if len(group) > 1]


def _some(seen: Sequence[Seen]) -> str:
    """Name three images at most, and count the others.

    >>> from types import SimpleNamespace as Seen
    >>> _some([Seen(name=f"{letter}.tif") for letter in "abcde"])
    'a.tif, b.tif, c.tif and 2 more'
    """
    names = [one.name for one in seen[:3]]
    return ", ".join(names) + (f" and {len(seen) - 3} more" if len(seen) > 3 else "")
