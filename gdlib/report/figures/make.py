"""Draw one figure of the report from the files of the pipeline.

A job draws one figure, and imports only what this one needs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gdlib import io
from gdlib.report.figures.style import save

Files = Mapping[str, Any]
Params = Mapping[str, Any]


def draw(figure: str, inputs: Files, params: Params, outputs: Sequence[Path | str]) -> None:
    """Draw one figure and write it to all `outputs`; their endings say in which formats.

    Args:
        figure: a name of `FIGURES`.
        inputs: files by name, see the functions of this module.
        params: options by name; all figures take `titles` (of networks and methods, may be left
            out) and `dpi`.
        outputs: paths that end in .png, .pdf or .svg.
    """
    drawn = FIGURES[figure](inputs, params)
    for output in map(Path, outputs):
        save(drawn, output.with_suffix(""), [output.suffix[1:]], params.get("dpi", 200))


def _methods(inputs: Files, params: Params) -> Figure:
    """Inputs: metrics (list). Params: metrics (list of keys)."""
    from gdlib.report.figures import charts
    from gdlib.report.tables.summary import read_metrics

    return charts.methods(read_metrics(inputs["metrics"]), params["metrics"], params.get("titles"))


def _ablation(inputs: Files, params: Params) -> Figure:
    """Inputs: metrics (list). Params: ablation (its name), base (method), metrics (list of
    keys).
    """
    from gdlib.report.figures import charts
    from gdlib.report.tables.summary import read_metrics

    metrics = read_metrics(inputs["metrics"])
    return charts.ablation(
        metrics, params["ablation"], params["base"], params["metrics"], params.get("titles")
    )


def _tradeoff(inputs: Files, params: Params) -> Figure:
    """Inputs: metrics (list), profiles (list, one per network). Params: metric."""
    from gdlib.report.figures import charts
    from gdlib.report.tables.summary import read_metrics, read_profiles

    profiles = {
        network: profile for (_, network), profile in read_profiles(inputs["profiles"]).items()
    }
    return charts.tradeoff(
        read_metrics(inputs["metrics"]), profiles, params["metric"], params.get("titles")
    )


def _curves(inputs: Files, params: Params) -> Figure:
    """Inputs: histories (list). Params: runs (for each its network, method, seed), metric."""
    from gdlib.report.figures import charts
    from gdlib.report.tables.summary import read_histories

    return charts.curves(
        read_histories(inputs["histories"], params["runs"]), params["metric"], params.get("titles")
    )


def _panel(inputs: Files, params: Params) -> Figure:
    """Inputs: data, segmentations (list).

    Params: methods (one per segmentation), metric, sample (number), crop.
    """
    from gdlib.report.figures import pictures, sections

    sample, segmentations = _segmented(inputs, params)
    draw = sections.panel if sample.label.ndim == 3 else pictures.panel
    return draw(sample, segmentations, params["metric"], params.get("titles"), params.get("crop"))


def _neurons(inputs: Files, params: Params) -> Figure:
    """Inputs: data (volumes), segmentations (list).

    Params: methods (one per segmentation), sample (number).
    """
    from gdlib.report.figures import neurons

    sample, segmentations = _segmented(inputs, params)
    if sample.label.ndim != 3:
        raise io.DataError(
            f"{inputs['data']}: these are no volumes; neurons can be drawn in 3D only"
        )
    return neurons.neurons(sample, segmentations, params.get("titles"))


def _embeddings(inputs: Files, params: Params) -> Figure:
    """Inputs: data, predictions (list).

    Params: methods (one per prediction), sample (number of those kept), crop.
    """
    from gdlib.report.figures import pictures

    kept = io.read_attrs(inputs["predictions"][0])["kept"]
    number = params.get("sample", 0)
    if number >= len(kept):
        raise io.DataError(
            f"{inputs['predictions'][0]}: embeddings of {len(kept)} samples were kept, there is no "
            f"number {number}; change plot.panel_sample"
        )
    sample = next(io.read_samples(inputs["data"], [kept[number]]))
    vectors, parts = {}, set()
    for method, path in zip(params["methods"], inputs["predictions"], strict=True):
        vectors[method] = io.read_array(path, sample.id, "embedding")
        with io.open_h5(path) as file:
            # Of a volume a part may have been kept; its first voxel is noted.
            origin = file[sample.id]["embedding"].attrs.get("origin", np.zeros(sample.label.ndim))
        parts.add(
            tuple(
                (int(o), int(o) + n) for o, n in zip(origin, vectors[method].shape[1:], strict=True)
            )
        )
    if len(parts) > 1:
        raise io.DataError(
            f"{inputs['predictions'][0]}: other predictions kept another part of {sample.id}; "
            "predict again"
        )
    part = tuple(slice(*ends) for ends in parts.pop())
    sample = replace(
        sample, image=sample.image[(slice(None), *part)], label=sample.label[part], ignore=None
    )
    return pictures.embeddings(sample, vectors, params.get("titles"), params.get("crop"))


def _segmented(inputs: Files, params: Params) -> tuple[io.Sample, dict[str, np.ndarray]]:
    """Read the sample to show, and its segmentations by method."""
    ids, number = io.sample_ids(inputs["data"]), params.get("sample", 0)
    if number >= len(ids):
        raise io.DataError(
            f"{inputs['data']}: there are {len(ids)} samples, there is no number {number}; change "
            "plot.panel_sample"
        )
    sample = next(io.read_samples(inputs["data"], [ids[number]]))
    files = zip(params["methods"], inputs["segmentations"], strict=True)
    return sample, {method: io.read_array(path, sample.id, "label") for method, path in files}


FIGURES: dict[str, Callable[[Files, Params], Figure]] = {
    "methods": _methods,
    "ablation": _ablation,
    "tradeoff": _tradeoff,
    "curves": _curves,
    "panel": _panel,
    "embeddings": _embeddings,
    "neurons": _neurons,
}
