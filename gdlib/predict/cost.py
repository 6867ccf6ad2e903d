"""What a network costs: parameters, multiply-accumulates, latency, memory."""

import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gdlib.blockwise.blocks import legal_shape
from gdlib.devices import choose_device, cpu_name
from gdlib.models import build
from gdlib.predict.predictor import Predictor

try:
    import resource
except ImportError:  # Windows
    resource = None

PATIENCE = 60_000  # ms
# pixels of the image that operations are counted on, by number of axes
SIZES = {2: (544, 544), 3: (32, 256, 256)}
INTRODUCTION = """\
# Networks of the catalogue

Made by `gdlib models --markdown > docs/networks.md`. GMACs: 10^9 multiply-accumulates, those of
attention among them, per million output pixels or voxels of an image of one channel, counted on
544 x 544, or 32 x 256 x 256; a network that loses margins reads more than that, and one of
attention needs more per pixel the larger the image. Halo: pixels of context on each side that a
block needs to be exact. Levels: feature maps that terms can compare, with their channels.
"""


def count_parameters(model: str, options: dict[str, Any]) -> dict[str, int]:
    """Return the number of parameters: of the embedding network, of the foreground head, and
    together.
    """
    with torch.device("meta"):
        network = build(model, options)
    total = sum(p.numel() for p in network.parameters())
    head = sum(p.numel() for p in network.foreground.parameters())
    return {"embedding": total - head, "foreground": head, "total": total}


def count_macs(model: str, options: dict[str, Any], shape: tuple[int, ...]) -> int:
    """Return the multiply-accumulates of one image.

    Half of the floating-point operations that torch counts.

    Args:
        model: registry name.
        options: of the network.
        shape: ([Z,] Y, X) of the output; sides are rounded up to what the network can make.
    """
    with torch.device("meta"):
        network = build(model, options).eval()
        _check_axes(model, network, shape)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, options.get("in_channels", 1), *_input_shape(network, shape)))
    return counter.get_total_flops() // 2


def network_table(networks: Iterable[tuple[str, str, str, str, dict[str, Any]]]) -> str:
    """Return a Markdown page about some networks.

    Args:
        networks: name, title, role, model and options of each.
    """
    titles = ("name", "title", "role", "model", "parameters", "GMACs", "halo", "levels")
    rows = [titles, ["---"] * 4 + ["---:"] * 2 + ["---"] * 2]
    for name, title, role, model, options in networks:
        with torch.device("meta"):
            network = build(model, options)
        shape = legal_shape(network, SIZES[network.ndim])
        giga = count_macs(model, options, shape) / math.prod(shape) / 1e3  # 10^9 per 10^6 pixels
        halo = " x ".join(map(str, network.halo)) if network.halo else "the whole image"
        levels = ", ".join(
            f"{level} ({channels})" for level, (channels, _) in network.levels.items()
        )
        parameters = count_parameters(model, options)["total"]
        rows.append((name, title, role, model, f"{parameters:,}", f"{giga:.2f}", halo, levels))
    return INTRODUCTION + "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _input_shape(network: nn.Module, shape: Sequence[int]) -> list[int]:
    """What the network reads to make an output of at least this shape.

    The context of a block is not counted.
    """
    return [n + 2 * m for n, m in zip(legal_shape(network, shape), network.margin, strict=True)]


def _check_axes(model: str, network: nn.Module, shape: Sequence[int]) -> None:
    if len(shape) != network.ndim:
        raise ValueError(
            f'network "{model}" takes images with {network.ndim} axes, not {tuple(shape)}'
        )


def _peak_memory() -> int:
    """Return the most bytes that this process ever had; 0 where the system does not tell."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def profile(
    model: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    *,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    repeats: int = 10,
) -> dict[str, Any]:
    """Measure one network on one image size, batch 1.

    Weights are random: they do not change the cost.

    An image that is larger than a block is predicted block by block, so that what counts is one
    block; `image_shape` says which it was.

    Args:
        model: registry name.
        options: of the network.
        shape: ([Z,] Y, X) in pixels.
        device: name, or `auto`.
        precision: name of a torch type, or `auto`.
        engine: what runs it (see `gdlib.predict.engine`).
        repeats: timed passes, after two that are not; fewer, but at least three, where they take
            longer than `PATIENCE`.

    Returns:
        `parameters`; `image_shape` and, for this shape, `macs`, `latency_ms` (median) and
        `latency_ms_p90` of the network alone, from the normalised image to the embedding, and
        `peak_memory_mib` (of the device, whose peak is counted anew, or the growth of the process
        on a CPU, 0 where the system does not tell it); device, engine, threads, precision.
    """
    target = choose_device(device)
    # the program's random numbers go on as if nothing had been drawn
    with torch.random.fork_rng([]):
        network = build(model, options)
    _check_axes(model, network, shape)
    channels = options.get("in_channels", 1)
    predictor = Predictor(
        network, {"channels": channels}, device=target, precision=precision, engine=engine
    )
    shape = tuple(min(pair) for pair in zip(shape, predictor.block, strict=True))
    sides = (channels, *_input_shape(network, shape))
    image = torch.from_numpy(np.random.default_rng(0).random(sides, np.float32))
    cuda = target.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(target)
    before = _peak_memory()
    times = []
    while len(times) < repeats + 2 and (len(times) < 5 or sum(times) < PATIENCE):
        start = time.perf_counter()
        predictor.forward(image)
        if cuda:
            torch.cuda.synchronize(target)
        times.append(1e3 * (time.perf_counter() - start))
    times = times[2:]
    peak = (
        torch.cuda.max_memory_allocated(target) / 2**20
        if cuda
        else (_peak_memory() - before) / 2**20
    )
    return {
        "parameters": count_parameters(model, options)["total"],
        "macs": count_macs(model, options, shape),
        "image_shape": list(shape),
        "latency_ms": statistics.median(times),
        "latency_ms_p90": float(np.percentile(times, 90)),
        "peak_memory_mib": peak,
        "device": torch.cuda.get_device_name(target) if cuda else cpu_name(),
        "engine": predictor.engine,
        "threads": torch.get_num_threads(),
        "precision": str(predictor.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
