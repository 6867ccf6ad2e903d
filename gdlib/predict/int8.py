"""Networks that compute in 8 bits, on processors with instructions for it (VNNI, AMX).

NNCF (https://github.com/openvinotoolkit/nncf) watches a network at work on some images, and chooses
for each of its layers which numbers 255 levels stand for. What it makes is OpenVINO's own form of
the network. It is kept beside the weights that it was made of, `NAME.int8.safetensors` beside
`NAME.safetensors`, and knows them by their checksum: they stay what the network is, and this one is
a faster way to run it.

ResUNet-tiny on 528 x 704 pixels, processor time of one core of an AMD EPYC with AVX512-VNNI and
AVX512-BF16: 122 ms in float32, 63 in bfloat16, 54 in 8 bits if what is between the convolutions is
in float32, 44 if it is in bfloat16.
"""

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdlib import io
from gdlib.devices import bfloat16_pays
from gdlib.predict import engine

NAME = "int8"
PARTS = ("xml", "bin")  # of OpenVINO's own form, as bytes
MEASURED = "AVX512-VNNI"  # AMX comes with it; others are taken by who asks for 8 bits alone
NEEDED = 'pip install "gdlib[quantise]"'


def is_own(path: Path | str) -> bool:
    """Is a file one that `save` wrote?"""
    try:
        return io.INT8_OF in io.read_header(path)
    except io.DataError:
        return False


def units() -> list[str]:
    """Return the units of this processor that multiply in 8 bits, by the names of their makers."""
    known = {"amx_int8": "AMX", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI"}
    # versions of torch that cannot be asked know of none
    there = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for key, name in known.items() if there.get(key)]


def engine_for(
    weights: Path | str,
    precision: str,
    device: torch.device,
    wanted_engine: str,
    at_once: int = 1,
) -> engine.Engine | None:
    """Return what runs weights in 8 bits, without levels; None if that is not wanted, or, under
    `auto`, cannot be had. For `at_once` see `engine.make_engine`.

    Raises:
        ValueError: 8 bits are asked for, and cannot be had.
    """
    if precision not in ("auto", NAME) or (precision == "auto" and MEASURED not in units()):
        return None
    path = io.int8_beside(weights)
    try:
        if not (reason := _lacking(path, device, wanted_engine)):
            return _load(path, weights, at_once)
    except io.DataError as error:
        reason = str(error)
        if precision == "auto":
            warnings.warn(reason, stacklevel=4)
    if precision == NAME:
        raise ValueError(f"{weights}: precision {NAME}: {reason}")
    return None


def _lacking(path: Path, device: torch.device, wanted_engine: str) -> str:
    if device.type != "cpu" or wanted_engine == "torch":
        return "it is OpenVINO on the CPU that computes in 8 bits"
    if not engine.is_installed("openvino"):
        return 'it is OpenVINO that computes in 8 bits: pip install "gdlib[fast]"'
    if not units():
        return "this processor has no instructions for it (VNNI), and would be slower"
    if not path.is_file():
        return f"there is no {path.name} beside the weights: `gdlib quantise` makes it"
    return ""


def _load(path: Path, weights: Path | str, at_once: int) -> engine.Engine:
    tensors, header = io.load_weights(path)
    if header.get(io.INT8_OF) != io.sha256(weights):
        raise io.DataError(f"{path}: it was made of other weights; `gdlib quantise` makes it anew")
    try:
        model = engine.core().read_model(*(tensors[part].numpy().tobytes() for part in PARTS))
        return compiled(model, at_once)
    except Exception as error:  # of a parser there is no telling which
        raise io.DataError(
            f"{path}: OpenVINO cannot read it ({' '.join(str(error).split())[:200]}); "
            "`gdlib quantise` makes it anew"
        ) from error


def compiled(model: Any, at_once: int = 1) -> engine.Engine:
    """Return what runs a network in 8 bits; what there is between its layers, in the type that is
    the fastest here.
    """
    return engine.compiled(model, torch.bfloat16 if bfloat16_pays() else torch.float32, at_once)


def check_installed() -> None:
    """Raise `ValueError` unless what it takes to make a network of 8 bits is there."""
    missing = [name for name in ("openvino", "nncf") if not engine.is_installed(name)]
    if missing:
        raise ValueError(f"it needs {' and '.join(missing)}: {NEEDED}")


def quantised(network: torch.nn.Module, channels: int, inputs: Sequence[Tensor]) -> Any:
    """Return OpenVINO's form of a network in 8 bits.

    Args:
        network: without batch normalisation (see `models.folded`).
        channels: of its images.
        inputs: (1, C, *sides) each, normalised: what it is to be at work on.
    """
    nncf = _library()
    # what is printed is for scripts, and how far it is is not
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        model = engine.converted(network, channels)
        return nncf.quantize(
            model,
            nncf.Dataset([one.numpy() for one in inputs]),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(inputs),
            ignored_scope=nncf.IgnoredScope(names=_last(model)),
        )


def _last(model: Any) -> list[str]:
    """Return the names of the convolutions whose results are those of the network: affinities are
    of differences between vectors that are alike, and nothing after them mends what is rounded.
    """
    names = []
    for output in model.outputs:
        node = output.get_node()
        while "Convolution" not in node.get_type_name() and node.get_input_size():
            node = node.input_value(0).get_node()
        names.append(node.get_friendly_name())
    return names


def save(path: Path | str, model: Any, weights: Path | str, about: Mapping[str, Any]) -> None:
    """Write what `quantised` returned.

    Args:
        path: `io.int8_beside` the weights.
        model: of OpenVINO.
        weights: file of the network.
        about: plain data, of how it was made.
    """
    with TemporaryDirectory() as folder:
        files = [Path(folder, f"network.{part}") for part in PARTS]
        engine.library().serialize(model, *files)
        read = [torch.from_numpy(np.fromfile(file, np.uint8)) for file in files]
    header = {io.INT8_OF: io.sha256(weights), "openvino": engine.library().__version__, **about}
    io.save_weights(path, dict(zip(PARTS, read, strict=True)), header)


def spread(things: Sequence[Any], count: int) -> list[Any]:
    """Return so many of some things, evenly from the first to the last."""
    places = np.linspace(0, len(things) - 1, min(count, len(things))).round().astype(int)
    return [things[k] for k in places]


@functools.cache
def _library() -> Any:
    with engine.without_telemetry():
        import nncf
    nncf.set_log_level(logging.ERROR)
    return nncf
