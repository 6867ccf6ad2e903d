"""Trained networks as files of other programs: ONNX, TorchScript, packages of bioimage.io.

What they need beyond gdlib is the extra `export`, and is imported where it is used.
"""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALLEST = 5  # pixels in x and y; noise is found in differences over so many
NEEDED = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torchscript": (),
    "bioimageio": ("onnx", "onnxscript", "onnxruntime", "bioimageio.core"),
}
LICENCE = "MIT"  # of gdlib, and of the networks that come with it


def check_installed(kind: str) -> None:
    """Raise `ValueError` unless what it takes to write a kind of file, a key of `NEEDED`, is
    there.
    """
    missing = [name for name in NEEDED[kind] if not _is_installed(name)]
    if missing:
        raise ValueError(f'--to {kind} needs {", ".join(missing)}: pip install "gdlib[export]"')


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in is not there
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what an exporter says of itself from the user."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def write(
    path: Path,
    kind: str,
    weights: Path,
    image: Any,
    licence: str = LICENCE,
    shown: Path | str = "the image",
) -> float:
    """Write a trained network as a file of another program, after a comparison with torch.

    Args:
        path: of the file.
        kind: key of `NEEDED`.
        weights: file of the weights.
        image: (C, [Z,] Y, X) as recorded, of the kind that the network is for.
        licence: of the weights, an identifier of SPDX, for a package of bioimage.io.
        shown: how messages name the image.

    Returns:
        The largest difference of an affinity or foreground from that of torch.

    Raises:
        DataError: the weights or the image cannot be used.
        ValueError: the network cannot be exported to this kind, or would not be the same function.
    """
    from gdlib import io
    from gdlib.export.check import checked
    from gdlib.predict.predictor import Predictor

    check_installed(kind)
    predictor = Predictor.load(
        weights, device="cpu", precision="float32", engine="torch", shorten=False
    )
    about = {"weights_sha256": io.sha256(weights)}
    try:
        shape = predictor.source(image).shape  # does it fit?
    except io.DataError as error:
        raise io.DataError(f"{shown}: {error}") from None
    if min(shape[-2:]) < SMALLEST:
        raise io.DataError(
            f"{shown}: an image of {' x '.join(map(str, shape))} pixels is too small to compare a "
            f"file on; give one with {SMALLEST} pixels and more in x and y"
        )
    with io.atomic(path) as temporary:
        if kind == "onnx":
            from gdlib.export.onnx import run_onnx, write_onnx

            write_onnx(temporary, predictor.network, predictor.header, **about)
            return checked(run_onnx(temporary), predictor, image)
        if kind == "bioimageio":
            from gdlib.export.bioimageio import write_bioimageio

            return write_bioimageio(temporary, predictor, weights, image, licence, about)
        from gdlib.export.torchscript import run_torchscript, write_torchscript

        write_torchscript(temporary, predictor.network, predictor.header | about)
        return checked(run_torchscript(temporary), predictor, image)
