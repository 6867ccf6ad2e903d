"""Networks that compute in 8 bits, on processors with AVX2 and later.

NNCF (https://github.com/openvinotoolkit/nncf) watches a network at work on some images, and chooses
for each of its layers which numbers 255 levels stand for. What it makes is OpenVINO's own form of
the network. It is kept beside the weights that it was made of, `NAME.int8.safetensors` beside
`NAME.safetensors`, and knows them by their checksum: they stay what the network is, and this one is
a faster way to run it.

ResUNet-tiny on 528 x 704 pixels, processor time of one core of an AMD EPYC with AVX512-VNNI and
AVX512-BF16: 122 ms in float32, 63 in bfloat16, 54 in 8 bits if what is between the convolutions is
in float32, 44 if it is in bfloat16. On an AMD EPYC with AVX2 alone (Zen 3), 200 in float32 and 119
in 8 bits.
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
from gdlib.blockwise import lite, vino
from gdlib.blockwise.lite import NAME, PARTS
from gdlib.devices import int8_pays
from gdlib.predict import engine
from gdlib.predict.living import held_per_pixel

NEEDED = 'pip install "gdlib[quantise]"'


def is_own(path: Path | str) -> bool:
    """Is a file one that `save` wrote?"""
    try:
        return io.INT8_OF in io.read_header(path)
    except io.DataError:
        return False


def form_for(
    weights: Path | str,
    precision: str,
    device: torch.device,
    wanted_engine: str,
) -> lite.Form | None:
    """Return the form of weights in 8 bits, without levels; None if that is not wanted, or, under
    `auto`, cannot be had.

    Raises:
        ValueError: 8 bits are asked for, and cannot be had.
    """
    if precision not in ("auto", NAME) or (precision == "auto" and not int8_pays()):
        return None
    path = io.int8_beside(weights)
    try:
        if not (reason := _lacking(path, device, wanted_engine)):
            return lite.form(path, weights)
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
    if not vino.is_installed("openvino"):
        return 'it is OpenVINO that computes in 8 bits: pip install "gdlib[fast]"'
    if not int8_pays():
        return "this processor has no instructions for it (AVX2), and would be slower"
    if not path.is_file():
        return f"there is no {path.name} beside the weights: `gdlib quantise` makes it"
    return ""


def compiled(model: Any, at_once: int = 1) -> engine.Engine:
    """Return what runs a network in 8 bits; see `lite.run_by`."""
    return engine.on_tensors(lite.run_by(model, at_once))


def check_installed() -> None:
    """Raise `ValueError` unless what it takes to make a network of 8 bits is there."""
    missing = [name for name in ("openvino", "nncf") if not vino.is_installed(name)]
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
    options = {}
    if network.halo is None:
        # Of tokens (B, Y X, C) NNCF takes the second axis for the channels, and a network with a
        # scale for each of these takes images of one size only: here a tensor has one scale.
        advanced = nncf.quantization.advanced_parameters
        options["advanced_parameters"] = advanced.AdvancedQuantizationParameters(
            activations_quantization_params=advanced.QuantizationParameters(per_channel=False)
        )
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
            **options,
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


def save(
    path: Path | str,
    model: Any,
    weights: Path | str,
    network: torch.nn.Module,
    channels: int,
    basis: Tensor | None,
    about: Mapping[str, Any],
) -> None:
    """Write what `quantised` returned.

    Args:
        path: `io.int8_beside` the weights.
        model: of OpenVINO.
        weights: file of the network.
        network: what was quantised.
        channels: of its images.
        basis: of its vectors, if they are shortened (see `gdlib.models.shortened`).
        about: plain data, of how it was made.
    """
    with TemporaryDirectory() as folder:
        files = [Path(folder, f"network.{part}") for part in PARTS]
        vino.library().serialize(model, *files)
        read = [torch.from_numpy(np.fromfile(file, np.uint8)) for file in files]
    parts = dict(zip(PARTS, read, strict=True))
    if basis is not None:
        parts[lite.BASIS] = basis
    header = {io.INT8_OF: io.sha256(weights), "openvino": vino.library().__version__, **about}
    if network.halo is not None:
        header[lite.FACTS] = facts(network, channels)
    io.save_weights(path, parts, header)


def keep(
    weights: Path | str, network: torch.nn.Module, channels: int, basis: Tensor | None
) -> None:
    """Keep a network as OpenVINO has it, for `lite.load`; where that cannot be, nothing is done.

    Args:
        weights: file of the network.
        network: without batch normalisation (see `models.folded`), on the CPU.
        channels: of its images.
        basis: see `save`.
    """
    path = lite.kept(weights)
    if path is None or path.exists() or network.halo is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, engine.converted(network, channels), weights, network, channels, basis, {})
        others = sorted(path.parent.glob(f"*{lite.KEPT}"), key=lambda one: one.stat().st_mtime)
        for old in others[: -lite.MOST]:
            old.unlink()


def facts(network: torch.nn.Module, channels: int) -> dict[str, Any]:
    """Return the `lite.Facts` of a network that has blocks, as plain data."""
    names = ("divisor", "remainder", "margin", "halo")
    held, length = held_per_pixel(network, channels)
    sides = {name: list(getattr(network, name)) for name in names}
    return {"ndim": network.ndim, **sides, "held": round(held, 3), "length": length}


@functools.cache
def _library() -> Any:
    with vino.without_telemetry():
        import nncf
    nncf.set_log_level(logging.ERROR)
    return nncf
