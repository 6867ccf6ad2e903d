"""Weights and states: safetensors with a header of JSON and a checksum.

Nothing in them is executed.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gdlib.io.failures import DataError
from gdlib.io.failures import WriteError as WriteError
from gdlib.io.files import atomic
from gdlib.io.hdf5 import check_file
from gdlib.io.onnx import is_onnx, read_onnx_header

# Environment variable with the modules outside gdlib, separated by commas, whose networks a weights
# file may name.
PLUGINS = "GDLIB_PLUGINS"
INT8 = ".int8.safetensors"  # ending of the form of a network in 8 bits
INT8_OF = "int8_of"  # in the header of such a file: the checksum of the weights' file
PICKLED = (b"PK\x03\x04", *(b"\x80" + bytes([k]) for k in range(2, 6)))  # torch.save, new and old


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
    """Of tensors, or of arrays, for which it is the same."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = f"torch.{tensor.dtype}".replace("torch.torch.", "torch.")
        digest.update(f"{name} {kind} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Any) -> memoryview:
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    from torch import uint8

    return tensor.reshape(-1).view(uint8).numpy().data


def read_header(path: Path | str) -> dict[str, Any]:
    """Return the JSON header of a weights file, or of an ONNX file made of one, without reading the
    parameters (and without torch).
    """
    return read_onnx_header(path) if is_onnx(path) else _header_and_checksum(path)[0]


def _header_and_checksum(path: Path | str) -> tuple[dict[str, Any], str | None]:
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata.get("gdlib", "null"))
    except (OSError, SafetensorError, ValueError) as error:
        if _begin(path).startswith(PICKLED):
            raise DataError(
                f"{path}: PyTorch saved this, and there may be code in it; give a .safetensors "
                "file that gdlib wrote, or train a network with it"
            ) from error
        begin = _begin(path)
        # the length of the header, 8 bytes, comes first, then the header, which is JSON
        if begin and begin[8:] != b"{":
            raise DataError(
                f"{path}: this is no weights file; give the .safetensors file that gdlib wrote, or "
                "the name of a built-in network (`gdlib models` lists them)"
            ) from error
        raise DataError(
            f"{path}: not a readable safetensors file ({error}); get it again, or train again"
        ) from error
    if not isinstance(header, dict):
        raise DataError(
            f"{path}: these weights were not written by gdlib (no header); train or "
            "export them with it"
        )
    return header, header.pop("sha256", None)  # earlier weights have none


def _begin(path: Path | str) -> bytes:
    with open(path, "rb") as file:
        return file.read(9)


HEADER = {
    "model": str,
    "options": dict,
    "channels": int,
    "offsets": list,
    "normalisation": dict,
    "segmentation": dict,
}


def check_header(path: Path | str, header: dict[str, Any], keys: Iterable[str] = HEADER) -> None:
    """Raise `DataError` unless the header of a weights file has these keys of `HEADER`, with
    something usable.
    """
    if INT8_OF in header:
        raise DataError(
            f"{path}: this is only how a network computes in 8 bits; give the weights beside it, "
            f"{Path(path).name.removesuffix(INT8)}.safetensors"
        )
    for key in keys:
        if not isinstance(header.get(key), HEADER[key]) or (
            key in ("offsets", "segmentation") and not header[key]
        ):
            raise DataError(
                f'{path}: its header says nothing usable of "{key}" ({header.get(key)}); get it '
                "again, or train again"
            )
    offsets = header.get("offsets", [[0, 0]])
    axes = {len(o) for o in offsets if isinstance(o, list) and all(isinstance(k, int) for k in o)}
    if len(axes) != 1 or not axes <= {2, 3} or not all(isinstance(o, list) for o in offsets):
        raise DataError(
            f"{path}: the offsets of its header are {offsets}; get it again, or train again"
        )


def int8_beside(weights: Path | str) -> Path:
    """Return where the form in 8 bits of a weights file is, if there is one."""
    path = Path(weights)
    return path.parent / f"{path.stem}{INT8}"  # also of what is no file's name


def load_weights(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(state, header)`; nothing in the file is executed.

    Raises:
        DataError: for a file of another program, a damaged one, and one that names code which
            nobody said is trusted.
    """
    from safetensors.torch import load_file

    state, header = _read(path, load_file)
    check_trusted(path, header)
    return state, header


def load_arrays(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `(arrays, header)` of such a file, of types that NumPy has, without torch.

    Raises:
        DataError: for a file of another program, or a damaged one.
    """
    from safetensors.numpy import load_file

    return _read(path, load_file)


def _read(path: Path | str, load_file: Callable) -> tuple[dict[str, Any], dict[str, Any]]:
    header, checksum = _header_and_checksum(path)
    content = load_file(path)
    if checksum is not None and checksum != _checksum(content, header):
        raise DataError(
            f"{path}: it is damaged, its checksum is not the one it was written with; get it "
            "again, or train again"
        )
    return content, header


def check_trusted(path: Path | str, header: dict[str, Any]) -> None:
    """Raise `DataError` if a header names code which nobody said is trusted."""
    module, elsewhere, _ = str(header.get("model", "")).partition(":")
    trusted = ("gdlib", *filter(None, os.environ.get(PLUGINS, "").split(",")))
    if elsewhere and not any(f"{module}.".startswith(f"{name}.") for name in trusted):
        raise DataError(
            f'{path}: its network is "{header["model"]}", and a file must not say which code is '
            "run; if you trust it, set the "
            f"environment variable {PLUGINS}={module}"
        )


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
