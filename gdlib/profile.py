"""What a network costs: parameters, multiply-accumulates, latency, memory."""

import resource
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from gdlib.inference import Predictor, choose_device
from gdlib.models import build


def count_parameters(model: str, options: dict[str, Any]) -> dict[str, int]:
    """Return the number of parameters: of the embedding network, of the foreground head, and together."""
    with torch.device("meta"):
        network = build(model, options)
    total = sum(p.numel() for p in network.parameters())
    head = sum(p.numel() for p in network.foreground.parameters())
    return {"embedding": total - head, "foreground": head, "total": total}


def count_macs(model: str, options: dict[str, Any], shape: tuple[int, ...]) -> int:
    """Return the multiply-accumulates of one image; half of the floating-point operations that torch counts.

    Args:
        model: registry name.
        options: of the network.
        shape: ([Z,] Y, X); sides are rounded up to what the network takes.
    """
    with torch.device("meta"):
        network = build(model, options).eval()
        if len(shape) != network.ndim:
            raise ValueError(f'network "{model}" takes images with {network.ndim} axes, not {tuple(shape)}')
        padded = [-(-n // network.divisor) * network.divisor for n in shape]
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, options.get("in_channels", 1), *padded))
    return counter.get_total_flops() // 2


def profile(
    model: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    *,
    device: str = "auto",
    precision: str = "auto",
    repeats: int = 10,
) -> dict[str, Any]:
    """Measure one network on one image size, batch 1. Weights are random: they do not change the cost.

    Args:
        model: registry name.
        options: of the network.
        shape: ([Z,] Y, X) in pixels.
        device: name, or `auto`.
        precision: name of a torch type, or `auto`.
        repeats: timed passes, after two that are not.

    Returns:
        `parameters`, `macs`, `latency_ms` (median) and `latency_ms_p90` of the network alone, from the normalised image to the
        embedding; `peak_memory_mib` (of the device, or the growth of the process on a CPU); device, threads, precision.
    """
    target = choose_device(device)
    header = {"channels": options.get("in_channels", 1)}
    predictor = Predictor(build(model, options), header, device=target, precision=precision)
    image = torch.from_numpy(np.random.default_rng(0).random((header["channels"], *shape), np.float32))
    cuda = target.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(target)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    with torch.inference_mode():
        for k in range(repeats + 2):
            start = time.perf_counter()
            predictor.embed(image)
            if cuda:
                torch.cuda.synchronize(target)
            if k >= 2:
                times.append(1e3 * (time.perf_counter() - start))
    peak = (
        torch.cuda.max_memory_allocated(target) / 2**20
        if cuda
        else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    )
    return {
        "parameters": count_parameters(model, options)["total"],
        "macs": count_macs(model, options, shape),
        "image_shape": list(shape),
        "latency_ms": statistics.median(times),
        "latency_ms_p90": float(np.percentile(times, 90)),
        "peak_memory_mib": peak,
        "device": torch.cuda.get_device_name(target) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": str(predictor.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"
