"""Read image and label files, folders and split lists; whatever is wrong with one becomes one sentence."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from gdlib.io import DataError, Sample
from gdlib.registry import nearest

SUFFIXES = (".png", ".tif", ".tiff")
SPLITS = ("train", "val", "test")
Splits = dict[str, Iterator[Sample]]


def existing_folder(path: Path | str | None) -> Path:
    """Return the path if it is a folder."""
    if path is None:
        raise DataError("no folder of raw data was given; set `root` to the folder that holds the images")
    if not Path(path).is_dir():
        raise DataError(f"{path}: there is no such folder; check the path or download the data first")
    return Path(path)


def find_files(folder: Path) -> dict[str, Path]:
    """Return stem -> path of the PNG and TIFF files of a folder, sorted by stem; hidden files are left out."""
    found: dict[str, Path] = {}
    for path in sorted(existing_folder(folder).iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise DataError(f"{path}: the name without its ending is also that of {found[path.stem].name}; rename one")
        found[path.stem] = path
    if not found:
        raise DataError(f"{folder}: there is no PNG or TIFF file in this folder; put the images there")
    return dict(sorted(found.items()))


def read_image(path: Path, channels: int = 1) -> np.ndarray:
    """Read an image with its channels first, in the stored type; the alpha channel of a PNG is dropped.

    Args:
        path: PNG or TIFF file.
        channels: number expected; only used to find the channel axis of a TIFF that does not name its axes.

    Returns:
        (C, [Z,] Y, X) array; C is what the file has, not what was expected.
    """
    array, axis = _read(path, indices=False)
    if axis is None and channels > 1 and channels in (array.shape[0], array.shape[-1]):
        axis = 0 if array.shape[0] == channels else -1
    return array[None] if axis is None else np.ascontiguousarray(np.moveaxis(array, axis, 0))


def read_label(path: Path) -> np.ndarray:
    """Read an instance map ([Z,] Y, X) of any integer type; a palette PNG gives its indices, not its colours."""
    array, axis = _read(path, indices=True)
    if axis is not None:
        raise DataError(f"{path}: the label is a colour image; store one integer per pixel, 0 = background")
    return array


def read_list(path: Path) -> list[str]:
    """Return the names in a text file, one per line, without the ending of an image file."""
    if not path.is_file():
        raise DataError(f"{path}: the split list is missing; add it, one name per line, or choose another split")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    return [name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name for name in names]


def published_split(source: str, split: str) -> dict[str, list[str]]:
    """Return the id lists of a split that comes with the package: `splits/<source>/<split>/{train,val,test}.txt`."""
    folder = Path(__file__).parent / "splits" / source
    known = sorted(path.name for path in folder.iterdir())
    if split not in known:
        raise DataError(f'data source "{source}" has no published split "{split}": {nearest(split, known)}')
    return {name: read_list(folder / split / f"{name}.txt") for name in SPLITS}


def _read(path: Path, *, indices: bool) -> tuple[np.ndarray, int | None]:
    """Return the array as stored and the axis of its channels, None where it has none."""
    if not path.is_file():
        raise DataError(f"{path}: the file is missing; restore it or take its name off the split list")
    try:
        if path.suffix.lower() == ".png":
            return _read_png(path, indices)
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            # S = samples of a pixel (RGB), C = channel; other axes are space.
            axis = next((i for i, name in enumerate(series.axes) if name in "SC"), None)
            return series.asarray(), axis
    except DataError:
        raise
    except Exception as error:  # decoders raise anything, from struct.error to zlib.error
        raise DataError(f"{path}: cannot be read ({error}); save it again as PNG or uncompressed TIFF") from error


def _read_png(path: Path, indices: bool) -> tuple[np.ndarray, int | None]:
    with path.open("rb") as file:
        if file.read(26)[24:] in (b"\x10\x02", b"\x10\x06"):  # bit depth and colour type of the header
            raise DataError(f"{path}: a 16-bit colour PNG would be read with 8 bits; save it as TIFF")
    with Image.open(path) as image:
        if image.mode == "P" and not indices:
            image = image.convert("RGB")
        array = np.asarray(image)
        if image.mode == "I":  # 16 bit, as older versions of Pillow give it
            array = array.astype(np.uint16)
        alpha = image.mode in ("LA", "RGBA")
    return (array[..., :-1], -1) if alpha else (array, -1 if array.ndim == 3 else None)
