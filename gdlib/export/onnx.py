"""ONNX, by torch's own exporter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gdlib import __version__, io
from gdlib.export import quiet
from gdlib.export.check import Run, sides_of
from gdlib.export.graph import OUTPUTS, Graph
from gdlib.io.onnx import KEY

OPSET = 18
AXES = {2: "bcyx", 3: "bczyx"}


def write_onnx(
    path: Path,
    network: nn.Module,
    header: Mapping[str, Any],
    *,
    normalised: bool = False,
    **about: str,
) -> None:
    """Write a network as an ONNX file.

    Args:
        path: of the file.
        network: with its weights.
        header: of its weights file.
        normalised: does it take images that are normalised already?
        about: more for the metadata.

    Raises:
        ValueError: the exporter cannot do it.
    """
    import onnx
    from onnx import numpy_helper

    channels, ndim = header["channels"], network.ndim
    graph = Graph(network, header["offsets"], None if normalised else header["normalisation"])
    example: list[torch.Tensor] = [torch.rand(2, channels, *sides_of(network))]
    names = {0: "batch", **dict(enumerate(AXES[ndim][2:], start=2))}
    ranges = [] if normalised else ["low", "high"]
    example += [torch.zeros(channels), torch.ones(channels)][: len(ranges)]
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.eval(),
                tuple(example),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["image", *ranges],
                output_names=list(OUTPUTS),
                dynamic_shapes=(names, *[None for _ in ranges]),
            )
    except Exception as error:  # of an exporter there is no telling which
        cause = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the network {header['model']} cannot be exported to ONNX ({cause}); choose "
            "torchscript"
        ) from error
    model = program.model_proto
    for name in ranges:  # may be left out: not a number is "the image's own"
        unknown = np.full(channels, np.nan, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(unknown, name))
    _forget(model.graph)
    onnx.helper.set_model_props(
        model,
        {
            KEY: json.dumps(dict(header), sort_keys=True),
            "contract": json.dumps(contract(network, header, normalised=normalised)),
            "offsets": json.dumps(header["offsets"]),
            "segmentation": json.dumps(header["segmentation"], sort_keys=True),
            "opset": str(OPSET),
            "gdlib_version": __version__,
            **about,
        },
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _forget(graph: Any) -> None:
    """Remove what the exporter notes of every operation: from which lines of which files it is."""
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        for field in ("metadata_props", "doc_string"):
            part.ClearField(field)
    graph.ClearField("metadata_props")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget(attribute.g)


def contract(network: nn.Module, header: Mapping[str, Any], *, normalised: bool) -> dict[str, Any]:
    """Return what a graph takes and gives, as it is written into the file."""
    axes = AXES[network.ndim]
    found = header["normalisation"]
    if any(network.margin):
        sides = {"is": "k * divisor + remainder + 2 * margin", "margin": list(network.margin)}
        sides |= {"divisor": list(network.divisor), "remainder": list(network.remainder)}
    else:
        sides = {"is": "any", "fastest multiples of": list(network.divisor)}
    intensity = "0 and 1 are what `range` says, values beyond are kept, bright is high, finite"
    if not normalised:
        intensity = "as recorded, linear, bright is high, finite"
    size = "(C,) float32, of the whole image; may be left out together: the graph then finds them"
    return {
        "image": {
            "axes": axes,
            "type": "float32",
            "channels": header["channels"],
            "intensity": intensity,
            "sides": sides,
        },
        **({} if normalised else {"low": f"{size}, becomes 0", "high": f"{size}, becomes 1"}),
        "affinity": {
            "axes": axes.replace("c", "k"),
            "is": "from 0 to 1: is the pixel at this offset of the same object; 0 beyond the image",
            "offsets": header["offsets"],
        },
        "foreground": {"axes": axes, "is": "from 0 to 1: does the pixel belong to an object"},
        "embedding": {"axes": axes.replace("c", "d"), "is": "vectors whose cosines are affinities"},
        "halo": None if network.halo is None else list(network.halo),
        "blocks": "may begin at multiples of `divisor`, and see the image as far as `halo` around; "
        "affinities need as much more as their offsets reach",
        "divisor": list(network.divisor),
        "range": {
            "is": "percentiles `lower` and `upper` of each channel, its extremes where they are "
            "equal; not less than `contrast` standard deviations of the noise from pixel to pixel, "
            "widened such that the part `level` is below",
            **found,
        },
    }


def run_onnx(path: Path) -> Run:
    """Return a function that runs an ONNX file, for `check.checked`."""
    session = io.onnx_session(path, torch.get_num_threads())

    def run(image: np.ndarray, low: np.ndarray | None, high: np.ndarray | None) -> Any:
        given = {"image": image, "low": low, "high": high}
        return session.run(
            None, {k: np.asarray(v, np.float32) for k, v in given.items() if v is not None}
        )

    return run
