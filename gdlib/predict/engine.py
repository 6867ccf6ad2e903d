"""What runs a trained network: torch on any device, or OpenVINO on a CPU (`pip install
"gdlib[fast]"`).

Both compute the same function, with the same weights and in the same precision. Processor time of
one image of 272 x 352 pixels, or 16 x 96 x 96 voxels, relative to torch in float32, on one core of
an Intel Xeon with matrix units (AMX) and, after the slash, of an AMD EPYC with AVX512-BF16 and
none:

| network | torch float32 | torch bfloat16 | OpenVINO float32 | OpenVINO bfloat16 |
|---|---:|---:|---:|---:|
| ResUNet-tiny | 1 | 0.51 / 0.62 | 0.68 / 0.95 | 0.29 / 0.52 |
| MobileNetV2 | 1 | 0.59 / 0.41 | 0.58 / 0.65 | 0.19 / 0.33 |
| ResUNet (16-256) | 1 | 0.31 / 0.50 | 0.75 / 0.90 | 0.15 / 0.45 |
| 3D ResUNet-tiny | 1 | 0.15 / 0.19 | 0.26 / 0.33 | 0.08 / 0.17 |
| 3D ResUNet (8-128) | 1 | 0.22 / 0.35 | 0.54 / 0.63 | 0.11 / 0.32 |

A step of training in bfloat16 takes 0.69 (ResUNet-tiny), 0.70 (MobileNetV2), 0.53 (ResUNet 16-256),
0.63 (3D ResUNet-tiny) and 0.49 (3D ResUNet 8-128) of the time in float32 on that EPYC:
`choose_precision` takes bfloat16 on both. On an Intel Xeon with AVX512-BF16 and no matrix units the
four columns are 1, 1.41, 0.66 and 1.07 for ResUNet-tiny, 1, 0.37, 0.24 and 0.36 for the 3D
ResUNet-tiny, and a step of training takes 1.2 to 1.5 times as long in bfloat16: it takes float32.

A small network uses several threads badly. Of two threads, each image on both (`LATENCY`) took the
processor 148 ms on that Xeon, and an image on each 98 ms (ResUNet-tiny, 8 bits): hence `at_once`.

On the 20 validation images of BBBC039, bfloat16 in OpenVINO instead of float32 in torch moved AJI
by -0.0004 and PQ by +0.0004. Hence the rule of `auto`: on a CPU OpenVINO where it is installed,
else torch. To make a network ready takes it about a second. Measured too and left out: ONNX
Runtime, slower than OpenVINO in float32, which only runs what was exported (`gdlib export`), and
`torch.compile`, which is slower in bfloat16, needs a compiler and compiles for half a minute.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gdlib import io
from gdlib.blockwise import vino

ENGINES = ("auto", "torch", "openvino")
ONNX = "onnxruntime"  # of files of `gdlib export`, which nothing else runs here
# relative error of the trial image; of bfloat16 it is below 0.01, of another function about 1
TOLERANCE = 0.1

# (1, C, *sides) -> embedding (1, D, *sides), logit (1, 1, *sides), and the feature maps that were
# asked for
Engine = Callable[[Tensor], tuple[Tensor, ...]]


def choose_engine(name: str, device: torch.device) -> str:
    """Return "torch" or "openvino".

    `auto` takes what was measured to be the fastest of what is installed.
    """
    if name not in ENGINES:
        raise ValueError(
            f'there is no engine "{name}": choose {", ".join(ENGINES[:-1])} or {ENGINES[-1]}'
        )
    installed = vino.is_installed()
    if name == "openvino" and device.type != "cpu":
        raise ValueError(
            f"the engine openvino runs on the CPU, not on {device}: choose --engine torch, or "
            "--device cpu"
        )
    if name == "openvino" and not installed:
        raise ValueError(
            'the engine openvino is not installed: pip install "gdlib[fast]", or '
            "choose --engine torch"
        )
    return "openvino" if name != "torch" and device.type == "cpu" and installed else "torch"


def make_engine(
    name: str,
    network: nn.Module,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    levels: Sequence[str] = (),
    at_once: int = 1,
) -> tuple[str, Engine]:
    """Make a network ready to run.

    Args:
        name: one of `ENGINES`. A network that OpenVINO cannot run stays with torch under `auto`.
        network: without batch normalisation (see `models.folded`), on the device.
        channels: of its images.
        device: where it is.
        dtype: type that it computes in; what comes out is float32.
        levels: names of the feature maps that are wanted too.
        at_once: how many threads may call it at the same time, each with an image; on a CPU every
            image has so many threads as torch has.

    Returns:
        The engine that was chosen, and the function that runs it.

    Raises:
        ValueError: no such engine, or it cannot run this network on this device.
    """
    if choose_engine(name, device) == "openvino":
        try:
            return "openvino", _openvino(_Maps(network, levels), channels, dtype, at_once)
        except Exception as error:  # of a converter there is no telling which
            reason = f"OpenVINO cannot run this network ({' '.join(str(error).split())[:200]})"
            if name != "auto":
                raise ValueError(f"{reason}: choose --engine torch") from error
            warnings.warn(f"{reason}; torch does", stacklevel=3)
    return "torch", _torch(_Maps(network, levels), device, dtype)


def _torch(maps: "_Maps", device: torch.device, dtype: torch.dtype) -> Engine:
    # As in training: per-pixel vectors are then contiguous, and most convolutions faster.
    layout = torch.channels_last if maps.network.ndim == 2 else torch.channels_last_3d
    if device.type == "mps":
        layout = torch.contiguous_format
    maps.to(memory_format=layout)

    def run(image: Tensor) -> tuple[Tensor, ...]:
        image = image.to(device).contiguous(memory_format=layout)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return tuple(part.float() for part in maps(image))

    return run


class _Maps(nn.Module):
    """A network with those of its feature maps alone that are wanted."""

    def __init__(self, network: nn.Module, levels: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.levels = levels

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        out = self.network(image)
        return out.embedding, out.foreground, *(out.features[level] for level in self.levels)


def _openvino(maps: _Maps, channels: int, dtype: torch.dtype, at_once: int) -> Engine:
    run = compiled(converted(maps.network, channels, maps.levels), dtype, at_once)
    trial = _noise(maps.network, channels, 3)  # tracing may have taken a size for a constant
    with torch.inference_mode():
        expected = maps(trial)
    for found, wanted in zip(run(trial), expected, strict=True):
        if found.shape != wanted.shape or not (found - wanted).norm() <= TOLERANCE * wanted.norm():
            raise ValueError("an image of another size gives another result than torch")
    return run


def converted(network: nn.Module, channels: int, levels: Sequence[str] = ()) -> Any:
    """Return a network as a model of OpenVINO, for images (1, C, *sides) of any size.

    Args:
        network: without batch normalisation (see `models.folded`), on the CPU.
        channels: C.
        levels: names of the feature maps that are wanted too.
    """
    image = _noise(network, channels, 2)
    with torch.inference_mode(), warnings.catch_warnings():
        # of tracing: what depends on the size of the image is looked at by who compiles it
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(_Maps(network, levels).eval(), image, check_trace=False)
        model = vino.library().convert_model(traced, example_input=image)
    model.reshape([1, channels] + [-1] * network.ndim)
    return model


def _noise(network: nn.Module, channels: int, multiple: int) -> Tensor:
    """Return an image (1, C, *sides) that a network can take; a larger one of a larger multiple."""
    sides = zip(network.divisor, network.remainder, network.margin, strict=True)
    shape = (multiple * d + r + 2 * m for d, r, m in sides)
    return torch.rand(1, channels, *shape, generator=torch.Generator().manual_seed(0))


def compiled(model: Any, dtype: torch.dtype, at_once: int = 1) -> Engine:
    """Return what runs a model of OpenVINO in this type; see `vino.compiled`."""
    hint, _ = vino.PRECISIONS[str(dtype).removeprefix("torch.")]
    return on_tensors(vino.compiled(model, hint, at_once))


def on_tensors(run: vino.Run) -> Engine:
    """Return what takes and returns tensors in place of arrays."""
    return lambda image: tuple(map(torch.from_numpy, run(image.numpy())))


def check_onnx(
    path: Path | str, engine: str, device: str = "auto", precision: str = "auto", **others: Any
) -> dict[str, Any]:
    """Return keyword arguments for the `Predictor` of an ONNX file.

    Raises:
        ValueError: something that is wanted is not how it is run.
    """
    for name, wanted, only in (
        ("engine", engine, ONNX),
        ("device", str(device), "cpu"),
        ("precision", precision, "float32"),
    ):
        if wanted not in ("auto", only):
            raise ValueError(
                f"{path}: ONNX files are run by {ONNX} on the CPU in float32, not with {name} "
                f"{wanted}; leave --{name} out, or take the weights it was exported from"
            )
    return {"device": "cpu", "precision": "float32", **others}


def onnx_engine(path: Path | str, channels: int) -> Engine:
    """Make the graph of `gdlib export` ready to run, on images that are normalised.

    Args:
        path: of an ONNX file.
        channels: of its images.
    """
    from onnxruntime import RunOptions

    session = io.onnx_session(path, torch.get_num_threads())
    options = RunOptions()
    options.only_execute_path_to_fetches = True  # affinities are computed from the embedding here
    same = {"low": np.zeros(channels, np.float32), "high": np.ones(channels, np.float32)}

    def run(image: Tensor) -> tuple[Tensor, ...]:
        given = {"image": image.contiguous().numpy(), **same}
        out = session.run(["embedding", "foreground"], given, options)
        embedding, foreground = map(torch.from_numpy, out)
        return embedding, foreground.logit()

    return run
