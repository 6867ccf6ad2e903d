"""OpenVINO (`pip install "gdlib[fast]"`): what runs its models, on arrays."""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np

from gdlib import devices

# an image (1, C, *sides) -> maps (1, ..., *sides), float32
Run = Callable[[np.ndarray], tuple[np.ndarray, ...]]


def is_installed(name: str = "openvino") -> bool:
    """Is a package there? It is not imported."""
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Import what would report to its makers that it was used, such that it does not, and lacks
    nothing else.
    """
    name = "openvino_telemetry"
    hidden = sys.modules.setdefault(name, None) is None
    try:
        yield
    finally:
        if hidden:  # whoever else wants it shall find it
            sys.modules.pop(name, None)


@functools.cache
def library() -> ModuleType:
    """Return OpenVINO, imported."""
    with without_telemetry():
        return importlib.import_module("openvino")


@functools.cache
def core() -> Any:
    """Return what reads and compiles networks: one for the process.

    On processors with AMX a core brings its thread a stack for signal handlers and, when it goes,
    gives back the one of before, which may be that of a core that is gone: the next signal, the
    SIGTERM of a cluster for instance, would then end the process instead of being handled.
    """
    return library().Core()


def compiled(model: Any, precision: str, at_once: int = 1) -> Run:
    """Return what runs a model.

    Args:
        model: with an image as its input, and maps as its outputs.
        precision: `f32`, `bf16` or `f16`, that it computes in, but for what the model says itself.
        at_once: how many threads may call it at the same time, each with an image; every image has
            the threads of who calls this.
    """
    hints = {
        "PERFORMANCE_HINT": "LATENCY" if at_once == 1 else "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": devices.threads() * at_once,
        "NUM_STREAMS": at_once,
    }
    network = core().compile_model(model, "CPU", hints)
    count = len(model.outputs)
    requests: SimpleQueue = SimpleQueue()
    for _ in range(at_once):
        requests.put(network.create_infer_request())

    def run(image: np.ndarray) -> tuple[np.ndarray, ...]:
        request = requests.get()  # waits while all are at work
        try:
            out = request.infer([np.ascontiguousarray(image)], share_inputs=True)
        finally:
            requests.put(request)
        return tuple(out[k] for k in range(count))

    return run
