"""TorchScript, which PyTorch runs without gdlib, in C++ too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gdlib import io
from gdlib.export import quiet
from gdlib.export.check import Run, sides_of
from gdlib.export.graph import Graph


def write_torchscript(
    path: Path, network: nn.Module, header: Mapping[str, Any], *, normalised: bool = False
) -> None:
    """Write a network as a TorchScript file.

    Args:
        path: of the file.
        network: with its weights.
        header: of its weights file, which goes into the file too, as `io.EXPORTED`.
        normalised: does it take images that are normalised already?

    Raises:
        ValueError: it cannot be done.
    """
    graph = Graph(network, header["offsets"], None if normalised else header["normalisation"])
    example = torch.rand(2, header["channels"], *legal(network))
    try:
        with quiet(), torch.no_grad():
            # the network is traced, for it is any code, and what is around it is scripted
            graph.heads = torch.jit.trace(graph.heads.eval(), example, check_trace=False)
            scripted = torch.jit.script(graph.eval())
    except Exception as error:  # of a compiler there is no telling which
        cause = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the network {header['model']} cannot be written as TorchScript ({cause}); choose onnx"
        ) from error
    with quiet():
        torch.jit.save(scripted, path, _extra_files={io.EXPORTED: json.dumps(dict(header))})


def legal(network: nn.Module) -> list[int]:
    """Return sides of an image that the network can take."""
    if any(network.margin):
        return list(sides_of(network))
    return [n // d * d for n, d in zip(sides_of(network), network.divisor, strict=True)]


def run_torchscript(path: Path) -> Run:
    """Return a function that runs a TorchScript file, for `check.checked`."""
    with quiet():
        scripted = torch.jit.load(path, map_location="cpu")

    @torch.inference_mode()
    def run(image: np.ndarray, low: np.ndarray | None, high: np.ndarray | None) -> Any:
        given = (None if v is None else torch.tensor(v, dtype=torch.float32) for v in (low, high))
        return [part.numpy() for part in scripted(torch.from_numpy(image), *given)]

    return run
