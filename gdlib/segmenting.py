"""`gdlib segment`: trained weights and images of any size to label files."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io
from gdlib.limits import Threads, argument, number, sides
from gdlib.parameters import chosen
from gdlib.steps import BLOCK_HELP


def add_segment(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib segment` to the command line."""
    segment = commands.add_parser(
        "segment",
        help="find the objects in images",
        description="Segment images and volumes of any size with trained weights. Every image gives one file of the same name "
        "in the output folder, with 32-bit labels: 0 = background, 1, 2, ... = objects. PNG and TIFF give TIFF, which opens in "
        "napari and Fiji; a dataset of an HDF5 file gives an HDF5 file with a dataset of the same name. A volume that was "
        "stopped half-way goes on from there when the same command is given again.",
    )
    segment.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="PNG or TIFF files (stacks too), volume.h5:name/of/dataset, or folders of files",
    )
    segment.add_argument(
        "--model", required=True, type=Path, metavar="FILE", help="weights.safetensors of a trained network"
    )
    segment.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the labels")
    segment.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    segment.add_argument("--precision", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    segment.add_argument(
        "--engine", default="auto", help="auto, torch, openvino (default: the fastest that is installed)"
    )
    segment.add_argument("--threads", type=argument(Threads), help="CPU threads (default: all)")
    segment.add_argument("--block", type=sides, metavar="SIDES", help=BLOCK_HELP)
    segment.add_argument(
        "--segmenter", help="mutex_watershed, waterz or multicut (default: the one the weights were chosen with)"
    )
    segment.add_argument("--foreground-threshold", type=number, help="probability (default: tuned with the weights)")
    segment.add_argument("--min-size", type=number, help="pixels (default: tuned with the weights)")
    segment.add_argument(
        "--set",
        type=_parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other parameter of the segmenter, e.g. threshold=0.4 of waterz, beta=0.6 of multicut, stride=4 of "
        "mutex_watershed; may be repeated",
    )
    segment.set_defaults(function=_segment)


def _parameter(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, number(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not NAME=NUMBER') from None


def _segment(arguments: argparse.Namespace) -> None:
    from gdlib.data.files import find_files, split_h5_path
    from gdlib.inference import Predictor, assembled
    from gdlib.segmentation import segment
    from gdlib.streaming import file_identity, predict_blocks

    paths: list[str] = []
    for path in arguments.images:
        paths += map(str, find_files(Path(path)).values()) if Path(path).is_dir() else [path]
    files = [split_h5_path(path)[0] for path in paths]
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise io.DataError(
            f'two images are called "{twice}" and would be written to the same file; segment them separately'
        )
    segmenter, parameters = _segmenter(arguments, io.read_header(arguments.model))
    options = {key: getattr(arguments, key) for key in ("device", "precision", "engine", "block")}
    predictor = Predictor.load(arguments.model, **options)
    weights = io.sha256(arguments.model)

    def finish(path: str, partial: Path, prediction: Any, target: Path, place: tuple[str, dict] | None) -> None:
        offsets = predictor.header["offsets"]
        label = segment(prediction.affinity, prediction.foreground, offsets, segmenter, **parameters)
        _write_label(target, label, place)
        partial.unlink(missing_ok=True)
        print(f"{path}: {int(label.max())} objects")

    with ThreadPoolExecutor(1) as other:  # finds the objects of an image while the network is at work on the next
        finishing: Future | None = None
        for path, file in zip(paths, files, strict=True):
            with _open_image(path, predictor.header["channels"]) as image:
                target = _target(arguments.out, file, image)
                partial = arguments.out / f".{file.stem}.partial"
                try:
                    source = predictor.source(image)
                    boxes = predictor.blocks(source.shape)
                    prediction = predictor.predict(source, boxes[0]) if len(boxes) == 1 else None
                except io.DataError as error:
                    raise io.DataError(f"{path}: {error}") from None
                if prediction is None:
                    blocks = predict_blocks(
                        predictor, {path: source}, partial, f"{weights} {file_identity(file)} {path}"
                    )
                    prediction = assembled(source.shape, ((box, part) for _, box, part in blocks))
                place = _place(image)
            if finishing is not None:
                finishing.result()
            finishing = other.submit(finish, path, partial, prediction, target, place)
        if finishing is not None:
            finishing.result()


def _segmenter(arguments: argparse.Namespace, header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Choose how to segment: as the weights were tuned, but for what is given."""
    given = dict(arguments.set)
    for name in ("foreground_threshold", "min_size"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    segmenter, parameters = chosen(arguments.model, header, arguments.segmenter, given)
    if segmenter not in (tuned := header["segmentation"]):
        print(
            f"{segmenter} was not tuned with these weights, only {', '.join(tuned)}: what is not given has its default value",
            file=sys.stderr,
        )
    return segmenter, parameters


@contextlib.contextmanager
def _open_image(path: Path | str, channels: int) -> Iterator[Any]:
    """Yield the array of an image file, or an open dataset of an HDF5 file, which is read piece by piece."""
    from gdlib.data.files import open_volume, read_image

    if is_hdf5(path):
        with open_volume(path) as volume:
            yield volume
    else:
        yield read_image(path, channels)


def is_hdf5(path: Path | str) -> bool:
    """Is this a file, or `file:dataset`, that HDF5 reads?"""
    from gdlib.data.files import HDF5_SUFFIXES, split_h5_path

    return split_h5_path(path)[0].suffix.lower() in HDF5_SUFFIXES


def _target(folder: Path, file: Path, image: Any) -> Path:
    """Return where the label of an image goes; never over the image itself."""
    import h5py

    target = folder / f"{file.stem}{'.h5' if isinstance(image, h5py.Dataset) else '.tif'}"
    if target.resolve() == file.resolve():
        raise io.DataError(f"{file}: its label would be written over it; choose another folder for --out")
    return target


def _place(image: Any) -> tuple[str, dict[str, Any]] | None:
    """Name and attributes of the label of an HDF5 dataset: where its voxels are."""
    if isinstance(image, np.ndarray):
        return None
    return image.name.strip("/"), {
        k: v for k, v in image.attrs.items() if k in ("resolution", "offset", "element_size_um")
    }


def _write_label(target: Path, label: np.ndarray, place: tuple[str, dict[str, Any]] | None) -> None:
    import tifffile

    if place is None:
        with io.atomic(target) as temporary:
            tifffile.imwrite(temporary, label, compression="zlib", photometric="minisblack")
        return
    name, attributes = place
    with io.create_h5(target) as file:
        io.put(file, name, label, io.BLOCK if label.ndim == 3 else None)
        file[name].attrs.update(attributes)
