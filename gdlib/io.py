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
is written again does not re-run what depends on it. What was damaged later is noticed when it is read (compressed and
checked pieces in HDF5, checksums in weights and states), and nothing in a file is executed or leads to another file.
"""

import contextlib
import csv
import hashlib
import json
import os
import platform
import traceback
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gdlib.failures import ACCESS, SPACE, DataError, sentences, writing
from gdlib.failures import WriteError as WriteError

HISTORY_COLUMNS = ("step", "split", "name", "value")
METRIC_COLUMNS = ("dataset", "network", "method", "seed", "segmenter", "sample", "metric", "value")

# Volumes are stored in blocks of so many voxels (Z, Y, X), so that a small crop is read without the rest; images in 2D,
# which are read whole, as h5py chooses.
BLOCK = (16, 64, 64)

# Environment variable with the modules outside gdlib, separated by commas, whose networks a weights file may name.
PLUGINS = "GDLIB_PLUGINS"


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


def beside(path: Path, ending: str) -> Path:
    """Return a hidden name beside a path, with this ending and short enough for file systems."""
    name = os.fsencode(path.name)
    if len(name) > 254 - len(os.fsencode(ending)):
        return path.with_name(f".{hashlib.sha256(name).hexdigest()}{ending}")
    return path.with_name(f".{path.name}{ending}")


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it there only when the block ends without an error.

    Raises:
        WriteError: there is no space, or the folder cannot be written.
    """
    path = Path(path)
    temporary = beside(path, f".{platform.node()}.{os.getpid()}.tmp")
    with writing(path, SPACE | ACCESS):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(temporary)
        temporary.touch()
        temporary.unlink()
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # else the name might be there after a power failure, and its content not
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(temporary: Path) -> None:
    """Remove files that are called like a temporary one, whose writers were killed on this machine."""
    for file in temporary.parent.glob(".*.tmp"):
        name, process, _ = file.name.rsplit(".", 2)
        if name == temporary.name.rsplit(".", 2)[0] and process.isdecimal() and not _is_running(int(process)):
            file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # there the question would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


@contextlib.contextmanager
def create_h5(path: Path | str, **attrs: Any) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing, atomically; `attrs` become file attributes (JSON where not scalar)."""
    # No cache of chunks: HDF5 crashes the process if it cannot write one of them when the file is closed.
    with atomic(path) as temporary, h5py.File(temporary, "w", libver="latest", rdcc_nbytes=0) as file:
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


def check_file(path: Path | str) -> None:
    """Raise `DataError` unless there is a file that may be read."""
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing; check its name and folder") from None
    except OSError as error:
        raise DataError(*sentences(error)) from error


def h5_file(path: Path | str, mend: str = "move it away, and make it again") -> h5py.File:
    """Open an HDF5 file for reading; what HDF5 says against it is one clear sentence, that ends with a mend."""
    check_file(path)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        cause = " ".join(str(error).split())  # HDF5 writes the date with a line break
    if "unable to lock file" in cause:
        raise DataError(f"{path}: another program has it open to write; close it there, or wait")
    if "already open for write" in cause:
        raise DataError(
            f"{path}: a program has it open to write, or ended while it had; close it there, or, if there is none, free the "
            f"file with `h5clear -s {path}`"
        )
    raise DataError(f"{path}: not a readable HDF5 file ({cause}); {mend}")


@contextlib.contextmanager
def open_h5(path: Path | str) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; a file that is broken, or shows what is in other files, is one clear sentence."""
    with h5_file(path) as file, readable(file):
        _check_links(file)
        yield file


@contextlib.contextmanager
def readable(file: h5py.File) -> Iterator[None]:
    """Turn the error of a library into a `DataError` if `file` is damaged; other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, SystemError) as error:
        told = "h5py" in traceback.extract_tb(error.__traceback__)[-1].filename and "doesn't exist" not in str(error)
        if not told or (name := _damaged(file)) is None:  # to look takes time
            raise
        raise DataError(f'{file.filename}: "{name}" in it is damaged; move the file away, and make it again') from error


def _damaged(file: h5py.File) -> str | None:
    """Return the first array or group of a file that cannot be read, with its attributes."""
    name = "/"
    try:
        dict(file.attrs)
        for name, link in _links(file):
            item = file[name] if isinstance(link, h5py.HardLink) else None
            dict(item.attrs if item else {})
            if isinstance(item, h5py.Dataset):
                for piece in item.iter_chunks() if item.chunks else [()]:
                    item[piece]
    except (OSError, RuntimeError, KeyError, SystemError):
        return name
    return None


def _links(file: h5py.File) -> list[tuple[str, h5py.HardLink | h5py.SoftLink | h5py.ExternalLink]]:
    """Return all links of a file by name, following none that may lead out of it."""
    found = []
    file.visititems_links(lambda name, link: found.append((name, link)))  # h5py does not survive errors in here
    return found


_INSIDE: set[tuple[str, int, int]] = set()  # files whose links were looked at


def _check_links(file: h5py.File) -> None:
    """Raise `DataError` if any array of a file is stored in another file."""
    status = os.stat(file.filename)
    identity = (os.path.abspath(file.filename), status.st_size, status.st_mtime_ns)
    if identity in _INSIDE:
        return

    for name, link in _links(file):
        if isinstance(link, h5py.ExternalLink):
            _refuse(file, name, link.filename)
        if isinstance(link, h5py.HardLink) and isinstance(item := file[name], h5py.Dataset):
            check_inside(item, file)
    _INSIDE.add(identity)


def check_inside(array: h5py.Dataset, file: h5py.File) -> None:
    """Raise `DataError` if an array is not stored in its file: HDF5 would follow it to any file that we may read."""
    sources = [array.file.filename, *(name for name, _, _ in array.external or [])]
    if array.is_virtual:
        sources += [source.file_name for source in array.virtual_sources()]
    for source in sources:
        if source not in (".", file.filename):
            _refuse(file, array.name, source)


def _refuse(file: h5py.File, name: str, source: str) -> None:
    raise DataError(
        f'{file.filename}: "{name}" is stored in another file, {source}; if you trust it, copy it into this one'
    )


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
            if not isinstance(group, h5py.Group) or not {"image", "label"} <= set(group):
                raise DataError(f'{path}: "{name}" has no image and label, so this is no samples file; give one')
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
    # One entry: the library would write several in any order.
    text = json.dumps(header | {"sha256": _checksum(tensors, header)}, sort_keys=True)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"gdlib": text})


def _checksum(tensors: dict[str, Any], header: dict[str, Any]) -> str:
    from torch import uint8

    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()


def read_header(path: Path | str) -> dict[str, Any]:
    """Return the JSON header of a weights file without reading the parameters (and without torch)."""
    return _header_and_checksum(path)[0]


def _header_and_checksum(path: Path | str) -> tuple[dict[str, Any], str | None]:
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata.get("gdlib", "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); get it again, or train again") from error
    if not isinstance(header, dict):
        raise DataError(f"{path}: these weights were not written by gdlib (no header); train or export them with it")
    return header, header.pop("sha256", None)  # earlier weights have none


HEADER = {"model": str, "options": dict, "channels": int, "offsets": list, "normalisation": dict, "segmentation": dict}


def check_header(path: Path | str, header: dict[str, Any], keys: Iterable[str] = HEADER) -> None:
    """Raise `DataError` unless the header of a weights file has these keys of `HEADER`, with something usable."""
    for key in keys:
        if not isinstance(header.get(key), HEADER[key]) or (key in ("offsets", "segmentation") and not header[key]):
            raise DataError(
                f'{path}: its header says nothing usable of "{key}" ({header.get(key)}); get it again, or train again'
            )
    offsets = header.get("offsets", [[0, 0]])
    axes = {len(o) for o in offsets if isinstance(o, list) and all(isinstance(k, int) for k in o)}
    if len(axes) != 1 or not axes <= {2, 3} or not all(isinstance(o, list) for o in offsets):
        raise DataError(f"{path}: the offsets of its header are {offsets}; get it again, or train again")


def load_weights(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(state, header)`; nothing in the file is executed.

    Raises:
        DataError: for a file of another program, a damaged one, and one that names code which nobody said is trusted.
    """
    from safetensors.torch import load_file

    header, checksum = _header_and_checksum(path)
    state = load_file(path)
    if checksum is not None and checksum != _checksum(state, header):
        raise DataError(
            f"{path}: it is damaged, its checksum is not the one it was written with; get it again, or train again"
        )
    module, elsewhere, _ = str(header.get("model", "")).partition(":")
    trusted = ("gdlib", *filter(None, os.environ.get(PLUGINS, "").split(",")))
    if elsewhere and not any(f"{module}.".startswith(f"{name}.") for name in trusted):
        raise DataError(
            f'{path}: its network is "{header["model"]}", and a file must not say which code is run; if you trust it, set the '
            f"environment variable {PLUGINS}={module}"
        )
    return state, header


def save_state(path: Path | str, content: dict[str, Any]) -> None:
    """Write tensors and plain data, as to resume a training, atomically."""
    import torch

    with (
        atomic(path) as temporary,
        open(temporary, "wb") as file,
    ):  # given a path, torch keeps the cause of an error to itself
        torch.save(content, file)


def load_state(path: Path | str, device: Any = "cpu") -> dict[str, Any]:
    """Return what `save_state` wrote; nothing in the file is executed.

    Raises:
        DataError: the file is not readable, or damaged, or of another program.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("a checksum is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a different type for every way a file can be broken
        raise DataError(f"{path}: cannot be read ({type(error).__name__})") from error


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
