"""Read image and label files, folders and split lists.

Whatever is wrong with one becomes one sentence.
"""

import contextlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from bioimage_cpp.segmentation import label as connected_regions
from PIL import Image

from gdlib.data import omezarr
from gdlib.data.tiff import read_tiff
from gdlib.io import (
    HDF5_SUFFIXES,
    Sample,
    check_file,
    check_inside,
    h5_file,
    split_h5_path,
)
from gdlib.io.failures import DataError
from gdlib.registry import nearest
from gdlib.text import read_text

SUFFIXES = (".png", ".tif", ".tiff", *HDF5_SUFFIXES, omezarr.SUFFIX)
# no images
BESIDE = (
    ".txt",
    ".csv",
    ".tsv",
    ".json",
    ".xml",
    ".yaml",
    ".yml",
    ".md",
    ".pdf",
    ".log",
    ".ini",
    ".db",
)
SPLITS = ("train", "val", "test")
UNLABELLED = "unlabelled"  # images beside the splits, from which a student may learn
OVERLAPS = ("ignore", "first", "last")
Splits = dict[str, Iterator[Sample]]


def existing_folder(path: Path | str | None) -> Path:
    """Return the path if it is a folder."""
    if path is None:
        raise DataError(
            "no folder of raw data was given; name it: `folder` of the dataset, or --root of the "
            "step `prepare`"
        )
    if not Path(path).is_dir():
        raise DataError(f"{path}: there is no such folder; check its name, or put the data there")
    return Path(path)


def is_folder(path: Path | str) -> bool:
    """Is this a folder of images, and no image itself, as a Zarr is?"""
    return Path(path).is_dir() and not omezarr.split_zarr_path(path)


def expanded(paths: Iterable[str]) -> list[str]:
    """Return paths of images, with what is in a folder in place of the folder."""
    found: list[str] = []
    for path in paths:
        found += map(str, find_files(Path(path)).values()) if is_folder(path) else [path]
    return found


def find_files(folder: Path) -> dict[str, Path]:
    """Return name -> path of the PNG, TIFF, HDF5 and OME-Zarr images of a folder, sorted by name.

    Hidden files are left out.

    The name is that of the file without its ending, in composed characters, as most systems write
    it. What is no such file, and no text beside the images, is told on stderr.
    """
    found: dict[str, Path] = {}
    others = []
    for path in sorted(existing_folder(folder).iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in SUFFIXES:
            others += [path.name] if path.suffix.lower() not in BESIDE else []
            continue
        if any("\ud800" <= character <= "\udfff" for character in path.name):
            raise DataError(
                f"{str(path)!a}: its name is no UTF-8 text, and could be written nowhere; rename it"
            )
        if (name := composed(path.stem)) in found:
            raise DataError(
                f"{path}: the name without its ending is also that of "
                f"{found[name].name}; rename one"
            )
        found[name] = path
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if not found:
        inside = (
            f", but {listed}; save images as one of these"
            if others
            else ("; put images there, or name another")
        )
        raise DataError(f"{folder}: there is no PNG, TIFF or HDF5 file in this folder{inside}")
    if others:
        print(
            f"warning: {folder}: not read: {listed}; save images as PNG, TIFF or HDF5",
            file=sys.stderr,
        )
    return dict(sorted(found.items()))


def composed(name: str) -> str:
    """Return a name in composed characters: "é" may be one character, or two, and looks the
    same.
    """
    return unicodedata.normalize("NFC", name)


def spelt(name: str, names: Iterable[str]) -> str:
    """Return a hint, or nothing, on a name among others that differs in capitals only.

    >>> spelt("A01", ["a01", "a02"])
    ' (there is "a01"; capitals count)'
    """
    other = next((other for other in names if other.casefold() == name.casefold()), None)
    return f' (there is "{other}"; capitals count)' if other else ""


def read_image(
    path: Path | str, channels: int = 1, dataset: str | None = None, scratch: Path | None = None
) -> np.ndarray:
    """Read an image with its channels first, in the stored type, bright values high.

    Opacity is dropped, and so are the second and third of three equal colours where one channel is
    expected.

    Args:
        path: PNG, TIFF or HDF5 file, or OME-Zarr; `file.h5:inner/path` names a dataset of an HDF5
            file, and `image.zarr:1` a level of an OME-Zarr.
        channels: number expected; also used to find the channel axis of a file that does not name
            its axes.
        dataset: of an HDF5 file; see `read_volume`.
        scratch: folder; large TIFF files are then mapped instead of read, see `read_tiff`.

    Returns:
        (C, [Z,] Y, X) array; C is what the file has, not what was expected. Axes of one pixel are
        left where they are.
    """
    array, axes, alpha = _read(path, dataset, indices=False, scratch=scratch)
    return arranged(path, array, axes, alpha, channels)


def read_raw(path: Path | str, scratch: Path | None = None) -> tuple[np.ndarray, str, bool]:
    """Return the array of an image file as stored, the names of its axes as of `read_tiff`, and
    whether the last of its colours is opacity. `scratch` as in `read_image`.
    """
    return _read(path, None, indices=False, scratch=scratch)


def arranged(
    path: Path | str, array: np.ndarray, axes: str, alpha: bool, channels: int
) -> np.ndarray:
    """Return what `read_raw` read with the channels first, as `read_image` does."""
    named = [
        (axis, name) for axis, (name, n) in enumerate(zip(axes, array.shape, strict=False)) if n > 1
    ]
    for _, name in named:
        if name not in "SCZYXIQ":
            what = "time" if name == "T" else f'"{name}"'
            raise DataError(
                f"{path}: of its axes {axes} {array.shape} one is {what}, which is no depth; save "
                "its parts as single images, or, if it is depth, name it so (Z; in Fiji under "
                "Image > Properties)"
            )
    found = [axis for axis, name in named if name in "SC"]
    if len(found) > 1:
        raise DataError(
            f"{path}: of its axes {axes} {array.shape} two are channels; save it as "
            "one image per channel"
        )
    if not found and channels > 1:
        first = next((axis for axis, n in enumerate(array.shape) if n > 1), 0)
        found = [axis for axis in (first, array.ndim - 1) if array.shape[axis] == channels]
    if not found:
        return array[None]
    array = np.moveaxis(array, found[0], 0)
    if alpha and len(array) != channels:
        array = array[:-1]
    if (
        channels == 1
        and len(array) == 3
        and "S" in axes
        and all((other == array[0]).all() for other in array[1:])
    ):
        array = array[:1]
    return array if isinstance(array, np.memmap) else np.ascontiguousarray(array)


def read_label(path: Path | str, dataset: str | None = None) -> np.ndarray:
    """Read an instance map ([Z,] Y, X).

    A palette gives its indices, not its colours, and whole numbers become integers.
    """
    array, axes, alpha = _read(path, dataset, indices=True)
    channel = next(
        (
            axis
            for axis, n in enumerate(array.shape)
            if n > 1 and axes[axis : axis + 1] in ("S", "C")
        ),
        None,
    )
    if channel is not None:
        array = np.moveaxis(array, channel, 0)[: -1 if alpha else None]
        if axes[channel] == "C" or (array != array[:1]).any():
            what = (
                "colour image"
                if axes[channel] == "S"
                else (f"image of {len(array)} channels (axes {axes})")
            )
            raise DataError(
                f"{path}: the label is a {what}; store one integer per pixel, 0 = background"
            )
        array = array[0]
    if array.dtype.kind == "f" and (np.isfinite(array) & (np.rint(array) == array)).all():
        if (most := np.abs(array).max(initial=0)) > 2 ** (np.finfo(array.dtype).nmant + 1):
            raise DataError(
                f"{path}: the label has numbers up to {most:.0f}, which {array.dtype} does not "
                "tell apart; store it as integers"
            )
        array = array.astype(np.int64)
    return array


def read_volume(path: Path | str, dataset: str | None = None) -> np.ndarray:
    """Return one array of an HDF5 file as stored.

    Args:
        path: the file, or `file.h5:inner/path`.
        dataset: inner path; where neither names one, the file must hold a single array.
    """
    with open_volume(path, dataset) as volume:
        return volume[()]


@contextlib.contextmanager
def open_volume(path: Path | str, dataset: str | None = None) -> Iterator[h5py.Dataset]:
    """Open one array of an HDF5 file without reading it; for the arguments see `read_volume`.

    Yields:
        A dataset of which parts are read by slices; what goes wrong then is one sentence too.
    """
    path, inner = split_h5_path(path)
    with h5_file(path, "get it again, or save it again") as file:
        with _readable(path):
            volume = _Volume(_find_dataset(file, path, dataset or inner).id)
            check_inside(volume, file)
        _check_filters(volume)
        yield volume


class _Volume(h5py.Dataset):
    """A dataset that names its file when it cannot be read."""

    def __getitem__(self, key: Any, **options: Any) -> Any:
        with _readable(self.file.filename):
            return super().__getitem__(key, **options)


def _check_filters(volume: h5py.Dataset) -> None:
    """Raise `DataError` unless what a dataset was compressed with is installed.

    `hdf5plugin` has nearly all there is.
    """
    stored = volume.id.get_create_plist()
    for number, _, _, name in map(stored.get_filter, range(stored.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            with contextlib.suppress(ImportError):
                import hdf5plugin  # noqa: F401  # makes its filters known
        if not h5py.h5z.filter_avail(number):
            name = name.decode(errors="replace").split(";")[0] or "without a name"
            raise DataError(
                f"{volume.file.filename}: the dataset {volume.name.strip('/')} was compressed with "
                f"the filter {name} (number {number}), which is not installed; install the package "
                "hdf5plugin, or store it with gzip"
            )


def voxel_size(*volumes: h5py.Dataset) -> list[float] | None:
    """Return the side lengths of a voxel in nm, one per axis, as the attributes of open arrays say;
    None if none does.

    Args:
        volumes: image and label of one sample; `resolution` is in nm, `element_size_um` (PlantSeg)
            in um.
    """
    found: dict[str, list[float]] = {}
    for volume in volumes:
        name = f"{volume.file.filename}:{volume.name.strip('/')}"
        for key, nm in (("resolution", 1), ("element_size_um", 1000)):
            if key in volume.attrs:
                size = np.ravel(volume.attrs[key])
                if (
                    len(size) not in (2, 3)
                    or size.dtype.kind not in "iuf"
                    or not ((size > 0) & (size < np.inf)).all()
                ):
                    raise DataError(
                        f"{name}: the attribute `{key}` is {size}; store one positive "
                        "number per axis"
                    )
                found[name] = [float(f"{nm * side:.6g}") for side in size]
    for name, size in found.items():
        if size != (first := next(iter(found.values()))):
            raise DataError(
                f"{name}: its voxels are {size} nm, those of {next(iter(found))} {first}; correct "
                "one of them"
            )
        # A stack of sections has square pixels and another distance of sections, never the reverse.
        if len(size) == 3 and size[0] == size[1] != size[2]:
            raise DataError(
                f"{name}: voxels of {size} nm look like the order x, y, z; store arrays and "
                "attributes as z, y, x"
            )
    return next(iter(found.values()), None)


def check_shapes(name: Path | str, image: Sequence[int], label: Sequence[int]) -> None:
    """Raise `DataError` unless an image (without channels) and its label have the same shape."""
    image, label = tuple(image), tuple(label)
    if image == label:
        return
    if sorted(image) == sorted(label):
        order = ", ".join("zyx"[-len(image) :])
        raise DataError(
            f"{name}: the image is {image} pixels, its label {label}, the same axes in another "
            f"order; store both in the order {order}"
        )
    raise DataError(
        f"{name}: the image has {image} pixels, its label {label}; give both the same shape"
    )


def check_label(name: Path | str, label: np.ndarray) -> None:
    """Raise `DataError` unless a label holds integers, none of them negative."""
    if label.dtype == bool:
        raise DataError(
            f"{name}: the label has type bool, a mask; store it as integers, one number per "
            "instance, or set the option `label_regions: true` of the source `folder`"
        )
    if not np.issubdtype(label.dtype, np.integer):
        kind = ", with fractions, as maps of probabilities have" * bool(
            label.dtype.kind == "f" and (label % 1).any()
        )
        raise DataError(
            f"{name}: the label has type {label.dtype}{kind}; store it as integers, one number per "
            "instance"
        )
    if label.min() < 0:
        raise DataError(
            f"{name}: the label has negative numbers; use 0 for background and number "
            "instances from 1"
        )


def check_sections(name: Path | str, start: int, stop: int, count: int) -> None:
    """Raise `DataError` unless the sections `start` to `stop` - 1 are some of a volume that has
    `count`.
    """
    if not 0 <= start < stop <= count:
        raise DataError(
            f"{name}: there are {count} sections, so [{start}, {stop}] is no range of them; get "
            "the whole volume, or choose another range"
        )


def split_components(label: np.ndarray) -> np.ndarray:
    """Give each 6-connected (in 2D 4-connected) component of each instance a number of its own.

    A crop cuts neurons into pieces that are connected only outside of it, where no network can see.

    Args:
        label: ([Z,] Y, X) of any integer type, not negative.

    Returns:
        uint32 array of the same shape; components are numbered 1, 2, ..., 0 stays 0.
    """
    # what the library takes of such numbers
    if label.dtype not in (np.uint8, np.uint16, np.uint32, np.uint64):
        label = label.astype(np.uint64)
    return connected_regions(label, connectivity=1).astype(np.uint32)


def read_masks(paths: Iterable[Path], shape: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the masks of single instances, each True in one of them, after a look whether they have
    the image's shape.

    Args:
        paths: one file per instance; not 0 is inside.
        shape: ([Z,] Y, X) of the image.
    """
    for path in paths:
        inside = read_label(path) > 0
        if inside.shape != tuple(shape):
            raise DataError(
                f"{path}: the mask is {inside.shape} pixels, its image {tuple(shape)}; get it again"
            )
        yield inside


def merge_masks(
    masks: Iterable[np.ndarray], shape: Sequence[int], overlap: str
) -> tuple[np.ndarray, np.ndarray]:
    """Make an instance map of masks that may overlap.

    Args:
        masks: ([Z,] Y, X) boolean, one per instance.
        shape: of each.
        overlap: what becomes of pixels of several masks: `"first"` and `"last"` give them to the
            first and last of these masks, `"ignore"` to none, and marks them.

    Returns:
        ([Z,] Y, X) uint32 label, k for the k-th mask, and boolean `ignore`, True only where marked.
    """
    if overlap not in OVERLAPS:
        raise DataError(
            f'there is no rule "{overlap}" for overlaps: {nearest(overlap, list(OVERLAPS))}'
        )
    label, ignore = np.zeros(shape, np.uint32), np.zeros(shape, bool)
    for number, inside in enumerate(masks, start=1):
        if overlap == "ignore":
            ignore |= inside & (label > 0)
        label[inside & (label == 0) if overlap == "first" else inside] = number
    label[ignore] = 0
    return label, ignore


def read_list(path: Path) -> list[str]:
    """Return the names in a text file, one per line, without the ending of an image file."""
    if not path.is_file():
        raise DataError(
            f"{path}: the split list is missing; get it again with the data, or choose "
            "another `split`"
        )
    try:
        text = read_text(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    names = [composed(line.strip()) for line in text.splitlines() if line.strip()]
    return [name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name for name in names]


def published_split(source: str, split: str) -> dict[str, list[str]]:
    """Return the id lists of a split that comes with the package:
    `splits/<source>/<split>/{train,val,test}.txt`.

    A split may leave `train` to what else is there; then it has no such list.
    """
    folder = Path(__file__).parent / "splits" / source
    known = sorted(path.name for path in folder.iterdir())
    if split not in known:
        raise DataError(
            f'data source "{source}" has no published split "{split}": {nearest(split, known)}'
        )
    lists = {name: folder / split / f"{name}.txt" for name in SPLITS}
    return {name: read_list(path) for name, path in lists.items() if path.exists()}


def _read(
    path: Path | str, dataset: str | None, *, indices: bool, scratch: Path | None = None
) -> tuple[np.ndarray, str, bool]:
    """Return the array as stored, the names of its axes as of `read_tiff`, "" if it has none, and
    whether it has opacity.
    """
    file, inner = split_h5_path(path)
    if file.suffix.lower() in HDF5_SUFFIXES:
        return read_volume(file, inner or dataset), "", False
    if omezarr.split_zarr_path(path):
        stored = omezarr.open_zarr(path)
        return stored[...], stored.letters, False
    path = Path(path)
    check_file(path)
    if path.suffix.lower() != ".png":
        return read_tiff(path, indices=indices, scratch=scratch)
    try:
        return _read_png(path, indices)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything, from struct.error to zlib.error
        raise DataError(
            f"{path}: cannot be read ({error}); get it again, or save it again as PNG or "
            "uncompressed TIFF"
        ) from error


def _read_png(path: Path, indices: bool) -> tuple[np.ndarray, str, bool]:
    with path.open("rb") as file:
        # Bit depth and colour type of the header: RGB, grey or RGB with opacity.
        if file.read(26)[24:] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):
            raise DataError(
                f"{path}: a 16-bit PNG of several channels would be read with 8 bits; "
                "save it as TIFF"
            )
    with Image.open(path) as image:
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise DataError(
                f"{path}: there are {frames} images in this file; save each that is wanted as a "
                "file of its own"
            )
        if image.mode == "P" and not indices:
            image = image.convert("RGB")
        array = np.asarray(image)
        if image.mode == "I":  # 16 bit, as older versions of Pillow give it
            array = array.astype(np.uint16)
        return array, "YXS" if array.ndim == 3 else "YX", image.mode in ("LA", "RGBA")


@contextlib.contextmanager
def _readable(path: Path | str) -> Iterator[None]:
    """Turn what h5py says about a broken file into one sentence."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        cause = " ".join(str(error).split())  # HDF5 writes the date with a line break
        raise DataError(
            f"{path}: cannot be read as HDF5 ({cause}); get it again, or save it again"
        ) from error


def _find_dataset(file: h5py.File, path: Path, name: str | None) -> h5py.Dataset:
    found: dict[str, h5py.Dataset] = {}

    def add(key: str, item: h5py.Group | h5py.Dataset | None) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim >= 2 and item.dtype.kind in "buifc":
            found[key] = item

    file.visititems(add)
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    inside = (
        ", ".join(f"{key} {item.shape}" for key, item in list(found.items())[:10]) or "no array"
    )
    if name is None:
        raise DataError(
            f"{path}: it is not clear which dataset to read, inside is {inside}; name one"
        )
    add(name, file.get(name))  # a link is not visited, but can be named
    if name not in found:
        raise DataError(
            f'{path}: there is no dataset "{name}", inside is {inside}; correct the name'
        )
    return found[name]
