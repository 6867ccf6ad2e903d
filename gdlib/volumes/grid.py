"""How a volume is cut into blocks, and what its user may choose; see `gdlib.volumes.jobs`.

Starts without torch.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gdlib import io
from gdlib.boxes import Box
from gdlib.data.axes import kept_axes
from gdlib.data.files import open_volume
from gdlib.data.omezarr import open_zarr, split_zarr_path
from gdlib.io import outputs
from gdlib.limits import Count, Whole, checked
from gdlib.registry import nearest
from gdlib.segment.parameters import chosen
from gdlib.text import expanded

# By number of axes, pixels. Larger blocks cost fewer pixels twice, and more memory.
BLOCK = {2: (4096, 4096), 3: (64, 512, 512)}
OVERLAP = {2: (128, 128), 3: (8, 64, 64)}
CHUNK = {2: (256, 256), 3: io.BLOCK}  # of the stored labels; blocks begin at multiples of it
KEYS = ("input", "model", "out", "block", "overlap", "segmenter", "parameters")


@dataclass(frozen=True)
class Grid:
    """How a volume is cut into blocks, named by their place: `0-3-12` is the 13th along x.

    Attributes:
        shape: of the volume.
        block: largest sides of a block; blocks are nearly equal, and multiples of a chunk but for
            the last ones.
        overlap: how far beyond its own pixels a block is segmented.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]
    overlap: tuple[int, ...]

    def __post_init__(self) -> None:
        sides = tuple[Count, ...]
        for name, kind in (("shape", sides), ("block", sides), ("overlap", tuple[Whole, ...])):
            checked(name, kind, getattr(self, name))
        if len(self.shape) not in CHUNK or not len(self.shape) == len(self.block) == len(
            self.overlap
        ):
            raise ValueError(
                f"shape {self.shape}, block {self.block} and overlap {self.overlap} must have 2 or "
                "3 axes, the same"
            )

    @property
    def chunk(self) -> tuple[int, ...]:
        """Sides of the pieces in which labels are stored."""
        return tuple(
            min(sides) for sides in zip(CHUNK[len(self.shape)], self.block, self.shape, strict=True)
        )

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of a block."""
        out = []
        for n, side, chunk in zip(self.shape, self.block, self.chunk, strict=True):
            count = -(-n // (side // chunk * chunk))
            out.append(-(-n // (count * chunk)) * chunk)
        return tuple(out)

    @property
    def names(self) -> list[str]:
        """All blocks, in array order."""
        counts = (range(-(-n // side)) for n, side in zip(self.shape, self.sides, strict=True))
        return ["-".join(map(str, place)) for place in itertools.product(*counts)]

    def core(self, name: str) -> Box:
        """Return the pixels that are the block's own; together the blocks have each pixel once."""
        place = self._place(name)
        return tuple(
            slice(k * s, min((k + 1) * s, n))
            for k, s, n in zip(place, self.sides, self.shape, strict=True)
        )

    def around(self, name: str) -> Box:
        """Return the block with its overlap."""
        return tuple(
            slice(max(0, s.start - o), min(n, s.stop + o))
            for s, o, n in zip(self.core(name), self.overlap, self.shape, strict=True)
        )

    def touching(self, name: str) -> list[str]:
        """Return the blocks whose own pixels are in the block with its overlap.

        It is one of them.
        """
        ranges = (
            range(s.start // side, -(-s.stop // side))
            for s, side in zip(self.around(name), self.sides, strict=True)
        )
        return ["-".join(map(str, place)) for place in itertools.product(*ranges)]

    def following(self, name: str) -> dict[int, str]:
        """Return axis -> the next block along it, where there is one."""
        out = {}
        for axis, (s, n) in enumerate(zip(self.core(name), self.shape, strict=True)):
            if s.stop < n:
                place = self._place(name)
                place[axis] += 1
                out[axis] = "-".join(map(str, place))
        return out

    def _place(self, name: str) -> list[int]:
        try:
            place = [int(part) for part in name.split("-")]
            inside = all(
                0 <= k * s < n for k, s, n in zip(place, self.sides, self.shape, strict=True)
            )
        except ValueError:
            inside = False
        if not inside:
            raise ValueError(f'there is no block "{name}", the last one is {self.names[-1]}')
        return place


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete and check what the user wants of the workflow, before anything runs.

    Args:
        config: `input` (`volume.h5:dataset` or `volume.zarr`), `model` (weights file) and `out`
            (folder); if wanted `block` and `overlap` (sides, e.g. 64x512x512), `segmenter`, and
            `parameters` of it (name -> value).

    Returns:
        The same keys with `grid`, the input's `file`, and the name of the `labels`; segmenter and
        parameters as tuned with the weights but for what was given.

    Raises:
        ValueError: one sentence on what is wrong.
    """
    for key in config:
        if key not in KEYS:
            raise ValueError(f'config: there is no option "{key}": {nearest(key, list(KEYS))}')
    for key in KEYS[:3]:
        if not config.get(key):
            raise ValueError(
                f"config: {key} is missing; say --config input=volume.h5:dataset "
                "model=weights.safetensors out=folder"
            )
    config = {**config, **{key: expanded(str(config[key])) for key in KEYS[:3]}}
    if not io.is_hdf5(config["input"]) and not split_zarr_path(config["input"]):
        raise io.DataError(
            f"{config['input']}: blocks can be read from HDF5 and OME-Zarr alone; copy the image "
            "into one (see docs/volumes.md)"
        )
    header = io.read_header(config["model"])
    io.check_header(config["model"], header, ("channels", "offsets", "segmentation"))
    ndim = len(header["offsets"][0])
    with open_array(config["input"]) as image:
        file, shape = str(file_of(image)), image.shape
        letters = getattr(image, "letters", "")
    order = iter("C" * (header["channels"] > 1) + "ZYX"[-ndim:])
    if not all(axis in order for axis, n in zip(letters, shape, strict=False) if n > 1):
        raise io.DataError(
            f"{config['input']}: its axes are {letters} {shape}, and blocks are read from an image "
            f"of the axes {'CZYX' if ndim == 3 else 'CYX'}; use `gdlib segment`, which takes any "
            "order, and one of several channels"
        )
    wanted = ndim + (header["channels"] > 1)
    sides = tuple(shape[axis] for axis in kept_axes(shape, wanted))
    if len(sides) != wanted or 0 in sides:
        raise io.DataError(
            f"{config['input']}: its shape is {shape}, but the network is for "
            f"images with {ndim} axes"
        )
    labels = "labels.h5" if io.is_hdf5(config["input"]) else "labels.zarr"
    result, out = Path(config["out"], labels), Path(config["out"], "plan.json")
    written = [outputs.Output(out, outputs.has_keys("weights_sha256"))]
    if labels == "labels.h5":
        written.append(outputs.Output(result, outputs.has_attributes("weights_sha256")))
    else:
        from gdlib.volumes.zarr_labels import of_volume

        written.append(of_volume(result))
    outputs.check(written, [file, config["model"]], overwrite=None, option="out")
    grid = Grid(
        sides[-ndim:],
        _sides("block", config.get("block", BLOCK[ndim]), ndim),
        _sides("overlap", config.get("overlap", OVERLAP[ndim]), ndim),
    )
    segmenter, parameters = chosen(
        config["model"], header, config.get("segmenter"), config.get("parameters") or {}
    )
    found = {"file": file, "labels": labels, "grid": grid}
    return {**config, **found, "segmenter": segmenter, "parameters": parameters}


@contextlib.contextmanager
def open_array(path: str) -> Iterator[Any]:
    """Open an image of which parts are read: a dataset of HDF5, or a level of an OME-Zarr."""
    if io.is_hdf5(path):
        with open_volume(path) as volume:
            yield volume
    else:
        yield open_zarr(path)


def file_of(image: Any) -> Path:
    """Return the file of a dataset of HDF5, or the one that says what a level of OME-Zarr is."""
    return image.file if isinstance(image.file, Path) else Path(image.file.filename)


def identity(image: Any) -> list[Any]:
    """Say which data an open image is, without reading it."""
    if isinstance(image.file, Path):
        return [image.identity]
    status = file_of(image).stat()
    return [status.st_size, status.st_mtime_ns]


def _sides(name: str, value: Any, ndim: int) -> tuple[int, ...]:
    parts = value if isinstance(value, list | tuple) else str(value).split("x")
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    sides = sides * ndim if len(sides) == 1 else sides
    if len(sides) != ndim or min(sides) < 1:
        raise ValueError(
            f"config: {name}: {value} is not one side, or {ndim} as in "
            f"{'x'.join(map(str, BLOCK[ndim]))}"
        )
    return tuple(sides)
