"""Every file contract of the project: who writes what, where, in which type.

| file | content |
|---|---|
| samples `.h5` | per sample: `image` (C, [Z,] Y, X) uint8/uint16/float32, `label` ([Z,] Y, X) uint32, 0 = background; |
| | where some voxels do not count, `ignore` ([Z,] Y, X) bool; attributes `source` and, if known, `voxel_size_nm` |
| predictions `.h5` | per sample: `affinity` (K, [Z,] Y, X) uint8 = round(255 a), `foreground` ([Z,] Y, X) uint8 |
| segmentations `.h5` | per sample: `label` ([Z,] Y, X) uint32, consecutive |
| weights `.safetensors` | parameters; the header holds one JSON text with all that is needed to run the network alone |
| history, metrics `.csv` | long form |

All writers are atomic: a file either is complete or does not exist. Equal content gives equal bytes, so that a file that
is written again does not re-run what depends on it.
"""

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

HISTORY_COLUMNS = ("step", "split", "name", "value")
METRIC_COLUMNS = ("dataset", "network", "method", "seed", "segmenter", "sample", "metric", "value")

# Volumes are stored in blocks of so many voxels (Z, Y, X), so that a small crop is read without the rest; images in 2D,
# which are read whole, as h5py chooses.
BLOCK = (16, 64, 64)


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence that names file, cause and mend."""


@dataclass(frozen=True)
class Sample:
    """One image with its ground truth.

    Attributes:
        id: unique name within the dataset.
        image: (C, [Z,] Y, X), uint8, uint16 or float32, intensities as recorded.
        label: ([Z,] Y, X) uint32 instance map, 0 = background.
        ignore: ([Z,] Y, X) bool, True where the label is not known: such voxels count neither in a loss nor in a
            metric. None if every voxel counts.
        attrs: what a reader may want to know: `source` (file name), `voxel_size_nm` (one number per axis, Z, Y, X).
    """

    id: str
    image: np.ndarray
    label: np.ndarray
    ignore: np.ndarray | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it there only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def create_h5(path: Path | str, **attrs: Any) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing, atomically; `attrs` become file attributes (JSON where not scalar)."""
    with atomic(path) as temporary, h5py.File(temporary, "w", libver="latest") as file:
        for key, value in attrs.items():
            file.attrs[key] = value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)
        yield file


def put(group: h5py.Group, name: str, array: np.ndarray, block: Iterable[int] | None = None) -> None:
    """Store an array compressed and without time stamps.

    Args:
        group: where.
        name: of the dataset.
        array: any.
        block: side lengths, along the last axes, of the pieces it is stored in; chosen by h5py if left out.
    """
    chunks = None
    if block is not None:
        sides = ((1,) * array.ndim + tuple(block))[-array.ndim :]
        chunks = tuple(min(pair) for pair in zip(sides, array.shape, strict=True))
    group.create_dataset(
        name, data=array, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True, track_times=False
    )


@contextlib.contextmanager
def open_h5(path: Path | str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; a broken file is one clear sentence."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        cause = " ".join(str(error).split())  # HDF5 writes the date with a line break
        raise DataError(f"{path}: not a readable HDF5 file ({cause}); delete it and make it again") from error
    with file:
        yield file


def write_samples(path: Path | str, samples: Iterable[Sample], **attrs: Any) -> int:
    """Write one split and return how many samples it has."""
    count = 0
    with create_h5(path, **attrs) as file:
        for sample in samples:
            group = file.create_group(sample.id)
            block = BLOCK if sample.label.ndim == len(BLOCK) else None
            put(group, "image", sample.image, block)
            put(group, "label", sample.label.astype(np.uint32, copy=False), block)
            if sample.ignore is not None:
                put(group, "ignore", sample.ignore, block)
            for key, value in sample.attrs.items():
                group.attrs[key] = value
            count += 1
    return count


def read_samples(path: Path | str, ids: Iterable[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of a split in the order of their names, one in memory at a time."""
    with open_h5(path) as file:
        for name in sorted(file) if ids is None else ids:
            group = file[name]
            arrays = {key: group[key][()] for key in ("image", "label", "ignore") if key in group}
            attrs = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in group.attrs.items()}
            yield Sample(name, **arrays, attrs=attrs)


def sample_ids(path: Path | str) -> list[str]:
    """Return the names of the samples of a file, sorted."""
    with open_h5(path) as file:
        return sorted(file)


def read_array(path: Path | str, sample: str, name: str) -> np.ndarray:
    """Return one dataset of one sample, e.g. `read_array(path, "a01", "label")`."""
    with open_h5(path) as file:
        if f"{sample}/{name}" not in file:
            raise DataError(f'{path}: there is no "{name}" of sample "{sample}"; make the file again')
        return file[sample][name][()]


def read_attrs(path: Path | str) -> dict[str, Any]:
    """Return the file attributes, JSON decoded where it is JSON."""
    with open_h5(path) as file:
        return {key: _decode(value) for key, value in file.attrs.items()}


def _decode(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("[", "{")):
        return json.loads(value)
    return value


def save_weights(path: Path | str, state: dict[str, Any], header: dict[str, Any]) -> None:
    """Write parameters with a JSON header.

    Args:
        path: `.safetensors` file.
        state: name to tensor, as from `Module.state_dict()`.
        header: plain data that says what the network is and how its output is used.
    """
    from safetensors.torch import save_file

    # Networks train in channels-last memory order; the file format wants rows.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"gdlib": json.dumps(header, sort_keys=True)})


def read_header(path: Path | str) -> dict[str, Any]:
    """Return the JSON header of a weights file without reading the parameters (and without torch)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error})") from error
    if "gdlib" not in metadata:
        raise DataError(f"{path}: these weights were not written by gdlib (no header); train or export them with it")
    return json.loads(metadata["gdlib"])


def load_weights(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(state, header)`; nothing in the file is executed."""
    from safetensors.torch import load_file

    header = read_header(path)
    return load_file(path), header


def write_rows(path: Path | str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file atomically; floats keep ten significant digits."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"{value:.10g}" if isinstance(value, float) else value for value in row])


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
