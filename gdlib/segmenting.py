"""`gdlib segment`: trained weights and images of any size to label files."""

import argparse
import contextlib
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io, outputs
from gdlib.failures import Failures
from gdlib.limits import Threads, argument, number, place, sides
from gdlib.parameters import chosen
from gdlib.steps import BLOCK_HELP


def add_segment(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib segment` to the command line."""
    segment = commands.add_parser(
        "segment",
        help="find the objects in images",
        description="Segment images and volumes of any size with trained weights. Every image gives one file of the same name "
        "in the output folder, with 32-bit labels: 0 = background, 1, 2, ... = objects. PNG and TIFF give TIFF, which opens in "
        "napari and Fiji; a dataset of an HDF5 file gives a dataset of the same name in an HDF5 file, whose other datasets stay. "
        "Labels that are there already are replaced if they were made of the same image by this command, others never "
        "without --overwrite. A volume that was stopped half-way goes on from there when the same command is given again.",
    )
    segment.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="PNG or TIFF files (stacks too), volume.h5:name/of/dataset, or folders of files",
    )
    segment.add_argument(
        "--model", required=True, type=place, metavar="FILE", help="weights.safetensors of a trained network"
    )
    segment.add_argument("--out", required=True, type=place, metavar="DIR", help="folder for the labels")
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
    segment.add_argument("--overwrite", action="store_true", help=outputs.HELP)
    segment.set_defaults(function=_segment)


@dataclass(frozen=True)
class _Job:
    """One image and where its label goes.

    Attributes:
        path: as it was given.
        file: without the name of a dataset.
        dataset: of an HDF5 file, None of another one.
        target: file of the label.
    """

    path: str
    file: Path
    dataset: str | None
    target: Path

    @classmethod
    def of(cls, path: str, folder: Path) -> "_Job":
        """Find out where the label of an image goes."""
        from gdlib.data.files import open_volume, split_h5_path

        file, dataset = split_h5_path(path)[0], None
        if is_hdf5(path):
            with open_volume(path) as volume:
                dataset = volume.name.strip("/")
        return cls(path, file, dataset, folder / f"{file.stem}{'.tif' if dataset is None else '.h5'}")

    @property
    def mark(self) -> str:
        """What the label says of itself."""
        return outputs.mark(self.file, self.dataset)

    @property
    def output(self) -> outputs.Output:
        """The label, for a check."""
        shown = f"{self.target}:{self.dataset}" if self.dataset else ""
        return outputs.Output(self.target, outputs.has_mark(self.mark, self.dataset), shown)

    def hidden(self, ending: str) -> Path:
        """Return a hidden path beside the label, for what is not finished."""
        dataset = f".{urllib.parse.quote(self.dataset, safe='')}" if self.dataset else ""
        return io.beside(self.target.with_suffix(""), f"{dataset}.{ending}")


def _parameter(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, number(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not NAME=NUMBER') from None


def _segment(arguments: argparse.Namespace) -> None:
    from gdlib.data.files import find_files
    from gdlib.inference import Predictor, assembled
    from gdlib.segmentation import segment
    from gdlib.streaming import file_identity, predict_blocks

    paths: list[str] = []
    for path in arguments.images:
        paths += map(str, find_files(Path(path)).values()) if Path(path).is_dir() else [path]
    failed = Failures()
    jobs = _jobs(paths, arguments.out, failed)
    outputs.check(
        [job.output for job in jobs], [arguments.model, *(job.file for job in jobs)], overwrite=arguments.overwrite
    )
    header = io.read_header(arguments.model)
    io.check_header(arguments.model, header, ("offsets", "segmentation"))
    segmenter, parameters = _segmenter(arguments, header)
    options = {key: getattr(arguments, key) for key in ("device", "precision", "engine", "block")}
    predictor = Predictor.load(arguments.model, **options)
    weights = io.sha256(arguments.model)

    def predict(job: _Job) -> tuple[Any, dict[str, Any]]:
        with _open_image(job.path, predictor.header["channels"]) as image:
            try:
                source = predictor.source(image)
                boxes = predictor.blocks(source.shape)
                prediction = predictor.predict(source, boxes[0]) if len(boxes) == 1 else None
            except io.DataError as error:
                raise io.DataError(f"{job.path}: {error}") from None
            if prediction is None:
                identity = f"{weights} {file_identity(job.file)} {job.path}"
                blocks = predict_blocks(predictor, {job.path: source}, job.hidden("partial"), identity)
                prediction = assembled(source.shape, ((box, part) for _, box, part in blocks))
            return prediction, _where(image, job.file)

    def finish(job: _Job, prediction: Any, attributes: dict[str, Any]) -> None:
        offsets = predictor.header["offsets"]
        with failed.noted():
            label = segment(prediction.affinity, prediction.foreground, offsets, segmenter, **parameters)
            outputs.check([job.output], [], overwrite=arguments.overwrite)  # people go on working in their folders
            _write_label(job, label, attributes)
            job.hidden("partial").unlink(missing_ok=True)
            print(f"{job.path}: {int(label.max())} objects")

    with ThreadPoolExecutor(1) as other:  # finds the objects of an image while the network is at work on the next
        finishing: Future | None = None
        for job in jobs:
            with failed.noted():
                found = predict(job)
                if finishing is not None:
                    finishing.result()
                finishing = other.submit(finish, job, *found)
        if finishing is not None:
            finishing.result()
    failed.tell(len(paths), "images could not be segmented; all others are done")


def _jobs(paths: Sequence[str], out: Path, failed: Failures) -> list[_Job]:
    """Find out where all labels go; what is given twice is done once."""
    found = {}
    for path in paths:
        with failed.noted():
            job = _Job.of(path, out)
            found.setdefault(job.mark, job)
    jobs = list(found.values())
    if not jobs:
        failed.tell(len(paths), "images could not be read")
    places = [(job.target, job.dataset) for job in jobs]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise io.DataError(
            f'two images are called "{twice[0].stem}" and would be written to the same file; segment them separately, each '
            "with an --out of its own"
        )
    return jobs


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


def _where(image: Any, file: Path) -> dict[str, Any]:
    """Return what the file of an image says of how large its pixels are and where, of HDF5 as attributes."""
    if not is_hdf5(file):
        from gdlib.data.calibration import calibration

        return calibration(file)
    return {k: v for k, v in image.attrs.items() if k in ("resolution", "offset", "element_size_um")}


def _write_label(job: _Job, label: np.ndarray, attributes: dict[str, Any]) -> None:
    import tifffile

    from gdlib.data.calibration import written

    if job.dataset is None:
        options = {"compression": "zlib", "photometric": "minisblack", "software": job.mark}
        with io.atomic(job.target) as temporary:
            tifffile.imwrite(temporary, label, **options, **written(attributes, label.shape))
        return
    with outputs.added_h5(job.target) as file:
        io.put(file, job.dataset, label, io.BLOCK if label.ndim == 3 else None)
        file[job.dataset].attrs.update(attributes | {outputs.SOFTWARE: job.mark})
