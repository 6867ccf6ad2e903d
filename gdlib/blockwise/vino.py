"""OpenVINO (`pip install "gdlib[fast]"`): what runs its models, on arrays."""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np

from gdlib import devices

# by torch's names of types: OpenVINO's, and bytes of a number
PRECISIONS = {"float32": ("f32", 4), "bfloat16": ("bf16", 2), "float16": ("f16", 2)}


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
    _first_use()
    return library().Core()


def _first_use() -> None:
    """Use once, in one thread, what OpenVINO gets ready at its first use.

    It does so under a lock of C++, and calls Python meanwhile: if a second thread comes at that
    moment, it waits for the lock and keeps Python's own, for ever.
    """
    one = np.zeros((1, 1), np.float32)
    for shared in (True, False):
        tensor = library().Tensor(one, shared_memory=shared)
        tensor.get_element_type().to_dtype()
        _ = tensor.data


def compiled(model: Any, precision: str, at_once: int = 1) -> "Run":
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
    return Run(core().compile_model(model, "CPU", hints), at_once)


class Run:
    """Runs a network on images (1, C, *sides); what it says are maps (1, ..., *sides), float32.

    Args:
        network: compiled.
        at_once: how many threads may use it at the same time; others wait.
    """

    def __init__(self, network: Any, at_once: int) -> None:
        self._count = len(network.outputs)
        self._requests: SimpleQueue = SimpleQueue()
        for _ in range(at_once):
            self._requests.put(network.create_infer_request())

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return maps."""
        with self.lent(image) as maps:
            return tuple(part.copy() for part in maps)

    @contextlib.contextmanager
    def lent(self, image: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Give maps that are there until this is left: to copy them costs a tenth of the time of a
        small network.
        """
        request = self._requests.get()
        try:
            found = request.infer(
                [np.ascontiguousarray(image)], share_inputs=True, share_outputs=True
            )
            yield tuple(found[k] for k in range(self._count))
        finally:
            self._requests.put(request)
