"""Packages of bioimage.io: weights as ONNX and TorchScript, and what its programs want to know.

Normalisation is left to those programs (`scale_range`), which look at the whole image before they
cut it into tiles. Their custom postprocessing gets one tensor, and may not change its shape
(bioimageio.core 0.11), so that objects cannot be found there; the documentation says how to.
"""

import json
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdlib import __version__, io
from gdlib.data.axes import fitted
from gdlib.export.check import checked, cut
from gdlib.export.graph import OUTPUTS, Graph
from gdlib.export.onnx import OPSET, run_onnx, write_onnx
from gdlib.export.torchscript import run_torchscript, write_torchscript
from gdlib.predict.predictor import Predictor
from gdlib.segment.parameters import chosen
from gdlib.segment.segmenters import segment

AUTHOR = "the gdlib contributors"
PAPER = (
    "Liu et al., Graph Relation Distillation for Efficient Biomedical Instance Segmentation, 2024",
    "https://arxiv.org/abs/2401.06370",
)
EPSILON = 1e-6  # of `scale_range`
SIDES = {2: (256, 256), 3: (12, 64, 64)}  # least pixels of the test image
COVER = 400  # pixels of its height
MEANING = {
    "affinity": "is the pixel at each offset (see config.gdlib.offsets) of the same object, 0 to 1",
    "foreground": "does the pixel belong to an object, 0 to 1",
    "embedding": "vectors whose cosines the affinities are",
}


def write_bioimageio(
    path: Path,
    predictor: Predictor,
    weights: Path,
    image: np.ndarray,
    licence: str,
    about: Mapping[str, str],
) -> float:
    """Write a package, after its weights were compared with torch, and it was tested by core.

    Args:
        path: of the package, a zip file.
        predictor: by torch in float32.
        weights: file of the weights.
        image: (C, [Z,] Y, X) as recorded, which the test tensors and the cover are made of.
        licence: of the weights, an SPDX identifier.
        about: more for the metadata of the weights.

    Returns:
        The largest difference of affinities and foreground from those of torch.

    Raises:
        ValueError: it cannot be exported, or did not pass the test.
    """
    network, header = predictor.network, predictor.header
    if any(network.margin):
        raise ValueError(
            f"{weights}: the network {header['model']} gives less than the image it sees, which "
            "these packages do not know; choose onnx"
        )
    _check_licence(licence)
    with tempfile.TemporaryDirectory() as name, _silent():
        folder = Path(name)
        write_onnx(folder / "weights.onnx", network, header, normalised=True, **about)
        write_torchscript(folder / "weights.pt", network, header, normalised=True)
        difference = max(
            checked(run(folder / file), predictor, image, own_range=False)
            for run, file in ((run_onnx, "weights.onnx"), (run_torchscript, "weights.pt"))
        )
        image = fitted(np.asarray(image), network.ndim, leading=1)
        _test_tensors(folder, predictor, image)
        _cover(folder / "cover.png", predictor, weights, image)
        (folder / "README.md").write_text(_documentation(weights.stem, header), "utf-8")
        (folder / io.EXPORTED).write_text(json.dumps(header, sort_keys=True))
        _package(folder / "package.zip", folder, weights.stem, predictor, licence)
        shutil.copyfile(folder / "package.zip", path)
    return difference


def _check_licence(licence: str) -> None:
    from bioimageio.spec.model.v0_5 import LicenseId

    try:
        LicenseId(licence)
    except ValueError:
        raise ValueError(
            f'there is no licence "{licence}"; give an identifier of spdx.org/licenses, as MIT or '
            "CC-BY-4.0"
        ) from None


@contextmanager
def _silent() -> Iterator[None]:
    from loguru import logger

    logger.disable("bioimageio")
    try:
        yield
    finally:
        logger.enable("bioimageio")


def _test_tensors(folder: Path, predictor: Predictor, image: np.ndarray) -> None:
    """Write what goes in, the middle of an image (C, [Z,] Y, X), and what has to come out."""
    network, header = predictor.network, predictor.header
    image = cut(network, image, _least(predictor)).astype(np.float32)
    how, space = header["normalisation"], tuple(range(1, image.ndim))
    limits = np.percentile(image, [how["lower"], how["upper"]], axis=space, keepdims=True)
    seen = ((image - limits[0]) / (limits[1] - limits[0] + EPSILON)).astype(np.float32)
    with torch.inference_mode():
        found = Graph(network, header["offsets"], None).eval()(torch.from_numpy(seen[None]))
    np.save(folder / "image.npy", image[None])
    for name, array in zip(OUTPUTS, found, strict=True):
        np.save(folder / f"{name}.npy", array.numpy())


def _halo(predictor: Predictor) -> list[int]:
    """Return how far an affinity sees along each axis; 0 where tiles would have to be too large."""
    network = predictor.network
    if network.halo is None or network.ndim == 3:
        return [0] * network.ndim
    reach = np.abs(predictor.header["offsets"]).max(0).tolist()
    return [h + n for h, n in zip(network.halo, reach, strict=True)]


def _least(predictor: Predictor) -> list[int]:
    """Return the smallest sides of an image."""
    return [
        -(-max(n, 2 * h + 1) // d) * d
        for n, h, d in zip(
            SIDES[predictor.network.ndim],
            _halo(predictor),
            predictor.network.divisor,
            strict=True,
        )
    ]


def _cover(path: Path, predictor: Predictor, weights: Path, image: np.ndarray) -> None:
    """Draw an image and its objects side by side, of a volume the middle section."""
    from PIL import Image
    from skimage.color import label2rgb

    header, side = predictor.header, min(*image.shape[-2:], COVER)
    image = cut(predictor.network, image, [*SIDES[3][: image.ndim - 3], side, side])
    how, parameters = chosen(weights, header, None, {})
    found = predictor(image)
    label = segment(found.affinity, found.foreground, header["offsets"], how, **parameters)
    grey = image[0]
    if label.ndim == 3:
        grey, label = grey[len(grey) // 2], label[len(label) // 2]
    low, high = np.percentile(grey, (1, 99.8))
    grey = np.clip((grey - low) / max(high - low, 1e-6), 0, 1)
    pair = np.hstack([np.repeat(grey[..., None], 3, 2), label2rgb(label, grey, bg_label=0)])
    picture = Image.fromarray((255 * pair).astype(np.uint8))
    picture.resize((2 * COVER, COVER)).save(path)


def _documentation(name: str, header: Mapping[str, Any]) -> str:
    """Return the model card."""
    test = header.get("test") or header.get("validation", {})
    how, parameters = chosen(name, header, None, {})
    run = header.get("run", {})
    training = ""
    if run:
        training = (
            f"{run['dataset']}, {run['recipe']['steps']} steps of {run['recipe']['batch_size']} "
            f"patches of {'x'.join(map(str, run['recipe']['patch']))} pixels, method "
            f"`{run['method']}`."
        )
    return textwrap.dedent("""\
        # {name}

        {purpose}

        A network ({model}) of gdlib {version}. For every pixel it says whether it belongs to an
        object (`foreground`), and whether the pixels at some offsets belong to the same
        (`affinity`); a segmenter makes objects of both.

        ## Objects

        gdlib does it with `gdlib segment`, by {segmenter} with
        `{parameters}`. With NumPy and `pip install bioimage-cpp` alone, by a mutex watershed, from
        affinity (K, [z,] y, x) and foreground ([z,] y, x) of one image:

        ```python
        from bioimage_cpp.segmentation import mutex_watershed

        offsets = {offsets}
        ndim = foreground.ndim
        weight = affinity.copy()
        weight[:ndim] **= {exponent:g}
        weight[ndim:] = 1 - weight[ndim:]
        mask = foreground >= {threshold}
        labels = mutex_watershed(
            weight, offsets, ndim, strides=(1,) * (ndim - 2) + ({stride},) * 2, mask=mask
        )
        ```

        ## Intensities

        Percentiles {lower:g} and {upper:g} of each channel become 0 and 1. {contrast}

        ## Training

        {training}

        Data: {data}

        ## Validation

        {scores}
        """).format(
        name=name,
        purpose=header.get("purpose", ""),
        model=header["model"],
        version=__version__,
        segmenter=how,
        parameters=json.dumps(parameters),
        offsets=json.dumps(header["offsets"]),
        threshold=parameters.get("foreground_threshold", 0.5),
        stride=parameters.get("stride", 1),
        exponent=parameters.get("exponent", 1.0),
        lower=header["normalisation"]["lower"],
        upper=header["normalisation"]["upper"],
        contrast="gdlib widens this range in images that show nothing but noise, which programs "
        "of bioimage.io do not." * ("contrast" in header["normalisation"]),
        training=training or "Not known.",
        data=header.get("data", "see the header of the weights"),
        scores=json.dumps(test, indent=1, sort_keys=True),
    )


def _package(path: Path, folder: Path, name: str, predictor: Predictor, licence: str) -> None:
    """Describe what is in a folder, pack it, and have core test it."""
    from bioimageio.core import test_model
    from bioimageio.spec import save_bioimageio_package
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5 as spec

    network, header = predictor.network, predictor.header
    axes = "zyx"[-network.ndim :]
    units = {} if "pixel_size" not in header else {"unit": "micrometer"}
    scales = header.get("pixel_size", [1.0] * network.ndim)

    def channels(prefix: str, count: int) -> Any:
        names = [spec.Identifier(f"{prefix}{k}") for k in range(count)]
        return spec.ChannelAxis(channel_names=names)

    def file(name: str) -> Any:
        return FileDescr(source=folder / name)

    entering = [
        spec.SpaceInputAxis(
            id=spec.AxisId(axis),
            size=spec.ParameterizedSize(min=least, step=step),
            scale=scale,
            **units,
        )
        for axis, least, step, scale in zip(
            axes, _least(predictor), network.divisor, scales, strict=True
        )
    ]

    def leaving(halo: int, axis: str, scale: float) -> Any:
        same = spec.SizeReference(tensor_id=spec.TensorId("image"), axis_id=spec.AxisId(axis))
        options = {"id": spec.AxisId(axis), "size": same, "scale": scale, **units}
        if halo:
            return spec.SpaceOutputAxisWithHalo(halo=halo, **options)
        return spec.SpaceOutputAxis(**options)

    space = [leaving(*each) for each in zip(_halo(predictor), axes, scales, strict=True)]
    how = header["normalisation"]
    normalise = spec.ScaleRangeDescr(
        kwargs=spec.ScaleRangeKwargs(
            axes=[spec.AxisId(axis) for axis in axes],
            min_percentile=how["lower"],
            max_percentile=how["upper"],
            eps=EPSILON,
        )
    )
    image = spec.InputTensorDescr(
        id=spec.TensorId("image"),
        description="intensities as recorded, bright is high",
        axes=[spec.BatchAxis(), channels("channel", header["channels"]), *entering],
        test_tensor=file("image.npy"),
        data=spec.IntervalOrRatioDataDescr(type="float32"),
        preprocessing=[normalise],
    )
    outputs = [
        spec.OutputTensorDescr(
            id=spec.TensorId(output),
            description=MEANING[output],
            axes=[
                spec.BatchAxis(),
                channels(output, np.load(folder / f"{output}.npy", mmap_mode="r").shape[1]),
                *space,
            ],
            test_tensor=file(f"{output}.npy"),
            data=spec.IntervalOrRatioDataDescr(type="float32"),
        )
        for output in OUTPUTS
    ]
    version = spec.Version(torch.__version__.partition("+")[0])
    model = spec.ModelDescr(
        name=f"gdlib {name}"[:128],
        description=str(header.get("purpose") or "instance segmentation by affinities")[:1024],
        authors=[spec.Author(name=AUTHOR)],
        cite=[spec.CiteEntry(text=PAPER[0], url=spec.HttpUrl(PAPER[1]))],
        license=spec.LicenseId(licence),
        documentation=file("README.md"),
        covers=[file("cover.png")],
        attachments=[file(io.EXPORTED)],
        tags=["instance-segmentation", "affinities", f"{network.ndim}d"],
        inputs=[image],
        outputs=outputs,
        weights=spec.WeightsDescr(
            torchscript=spec.TorchscriptWeightsDescr(
                source=folder / "weights.pt", pytorch_version=version
            ),
            onnx=spec.OnnxWeightsDescr(
                source=folder / "weights.onnx", opset_version=OPSET, parent="torchscript"
            ),
        ),
        config=spec.Config(
            gdlib={
                "version": __version__,
                "offsets": header["offsets"],
                "segmentation": header["segmentation"],
            }
        ),
    )
    save_bioimageio_package(model, output_path=path)
    summary = test_model(path, devices=["cpu"])
    if summary.status != "passed":
        raise ValueError(f"the package did not pass its test: {_reasons(summary)[:500]}")


def _reasons(summary: Any) -> str:
    return "; ".join(error.msg for detail in summary.details for error in detail.errors)
