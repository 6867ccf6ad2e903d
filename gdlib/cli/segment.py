"""`gdlib segment`: trained weights and images of any size to label files."""

import argparse
import contextlib
import math
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io, trained
from gdlib.cli.steps import BLOCK_HELP
from gdlib.io import outputs
from gdlib.io.failures import Failures, is_lack_of_memory
from gdlib.limits import Positive, Threads, argument, number, place, sides
from gdlib.segment.parameters import chosen
from gdlib.volumes import memory
from gdlib.volumes.grid import CHUNK

BLOCK_HELP = (
    "largest part predicted in one pass, in pixels, e.g. 1024 or 32x512x512; larger is faster "
    "where there is memory for it, the result is the same (default: 1024 in 2D, 32x256x256 in 3D)"
)


def add_segment(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib segment` to the command line."""
    segment = commands.add_parser(
        "segment",
        help="find the objects in images",
        description="Segment images and volumes of any size with trained weights. Every image "
        "gives one file of the same name in the output folder, with 32-bit labels: 0 "
        "= background, 1, 2, ... = objects. PNG and TIFF give TIFF, which opens in "
        "napari and Fiji; a dataset of an HDF5 file gives a dataset of the same name "
        "in an HDF5 file, whose other datasets stay. Labels that are there already "
        "are replaced if they were made of the same image by this command, others "
        "never without --overwrite. A volume that was stopped half-way goes on from "
        "there when the same command is given again.",
    )
    segment.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="PNG or TIFF files (stacks too), volume.h5:name/of/dataset, or folders of files",
    )
    segment.add_argument(
        "--model",
        type=place,
        metavar="NAME|FILE",
        help="a built-in network (`gdlib models` lists them), or the weights.safetensors of your "
        f"own (default: {trained.DEFAULT})",
    )
    segment.add_argument(
        "--out", required=True, type=place, metavar="DIR", help="folder for the labels"
    )
    segment.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)"
    )
    segment.add_argument(
        "--precision", default="auto", help="auto, float32, bfloat16, float16 (default: auto)"
    )
    segment.add_argument(
        "--engine",
        default="auto",
        help="auto, torch, openvino (default: the fastest that is installed)",
    )
    segment.add_argument("--threads", type=argument(Threads), help="CPU threads (default: all)")
    segment.add_argument("--block", type=sides, metavar="SIDES", help=BLOCK_HELP)
    segment.add_argument(
        "--memory",
        type=argument(Positive),
        metavar="GIB",
        help="how much of it may be used; an image that may need more is segmented in blocks, see "
        "docs/volumes.md (default: what is there, and four fifths of what is free)",
    )
    segment.add_argument(
        "--segmenter",
        help="mutex_watershed, waterz or multicut (default: the one the weights were chosen with)",
    )
    segment.add_argument(
        "--foreground-threshold", type=number, help="probability (default: tuned with the weights)"
    )
    segment.add_argument("--min-size", type=number, help="pixels (default: tuned with the weights)")
    segment.add_argument(
        "--set",
        type=_parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other parameter of the segmenter, e.g. threshold=0.4 of waterz, beta=0.6 of "
        "multicut, stride=4 of mutex_watershed; may be repeated",
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
        return cls(
            path, file, dataset, folder / f"{file.stem}{'.tif' if dataset is None else '.h5'}"
        )

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
    from gdlib.predict.files import file_identity, predict_blocks
    from gdlib.predict.predictor import Predictor, assembled
    from gdlib.segment.segmenters import segment, used
    from gdlib.volumes.footprint import choose, is_large
    from gdlib.volumes.large import block_before, segment_in_blocks

    if arguments.model is None:
        print(f"no --model is given: {trained.DEFAULT} is taken", file=sys.stderr)
    arguments.model = trained.find(arguments.model or trained.DEFAULT)
    paths: list[str] = []
    for path in arguments.images:
        paths += map(str, find_files(Path(path)).values()) if Path(path).is_dir() else [path]
    failed = Failures()
    jobs = _jobs(paths, arguments.out, failed)
    outputs.check(
        [job.output for job in jobs],
        [arguments.model, *(job.file for job in jobs)],
        overwrite=arguments.overwrite,
    )
    header = io.read_header(arguments.model)
    io.check_header(arguments.model, header, ("offsets", "segmentation"))
    segmenter, parameters = _segmenter(arguments, header)
    options = {key: getattr(arguments, key) for key in ("device", "precision", "engine", "block")}
    predictor = Predictor.load(arguments.model, **options)
    predictor.header = {**header, "offsets": used(segmenter, header["offsets"])}
    weights = io.sha256(arguments.model)
    held = memory.resident()
    budget = max(1, int(arguments.memory * memory.GIB)) if arguments.memory else memory.budget()

    def predict(job: _Job, finishing: Future | None) -> tuple[Any, dict[str, Any], int] | None:
        """Predict an image, or do all of it if that is to be done in blocks."""
        need = 0
        with (
            _lack_of_memory(job.path),
            _open_image(job.path, predictor.header["channels"], arguments.out) as image,
        ):
            identity, attributes = f"{file_identity(job.file)} {job.path}", _where(image, job.file)
            with _about(job.path):
                source = predictor.source(image)
                large = budget and (arguments.memory or is_large(predictor, source.shape))
                if large:
                    choice = choose(
                        predictor, source.shape, segmenter, parameters,
                        held=held + _in_memory(image), budget=budget, before=block_before(job.hidden("blocks")),
                    )  # fmt: skip
            if large:
                print(f"{job.path}: {choice.sentence(budget)}", file=sys.stderr, flush=True)
                need = choice.need
                if finishing is not None:  # what is needed is that of one image
                    finishing.result()
                if choice.grid is not None:
                    count = segment_in_blocks(
                        choice, source, job.path, job.hidden("blocks"), partial(write_blocks, job, attributes),
                        identity=identity, weights_sha256=weights, segmenter=segmenter, parameters=parameters,
                    )  # fmt: skip
                    done(job, count)
                    return None
            boxes = predictor.blocks(source.shape)
            if len(boxes) == 1:
                with _about(job.path):
                    return predictor.predict(source, boxes[0]), attributes, need
            blocks = predict_blocks(
                predictor, {job.path: source}, job.hidden("partial"), f"{weights} {identity}"
            )
            return (
                assembled(source.shape, ((box, part) for _, box, part in blocks)),
                attributes,
                need,
            )

    def finish(job: _Job, prediction: Any, attributes: dict[str, Any], need: int) -> None:
        offsets = predictor.header["offsets"]
        with failed.noted():
            with _lack_of_memory(job.path, need):
                label = segment(
                    prediction.affinity, prediction.foreground, offsets, segmenter, **parameters
                )
            check(job)
            _write_label(job, label, attributes)
            done(job, int(label.max()))

    def write_blocks(
        job: _Job, attributes: dict[str, Any], plan: dict[str, Any], labels: Path
    ) -> None:
        check(job)
        _write_blocks(job, plan, labels, attributes)

    def check(job: _Job) -> None:  # again: people go on working in their folders
        outputs.check([job.output], [], overwrite=arguments.overwrite)

    def done(job: _Job, count: int) -> None:
        job.hidden("partial").unlink(missing_ok=True)
        print(f"{job.path}: {count} objects")

    # finds the objects of an image while the network is at work on the next
    with ThreadPoolExecutor(1) as other:
        finishing: Future | None = None
        for job in jobs:
            with failed.noted():
                found = predict(job, finishing)
                if finishing is not None:
                    finishing.result()
                finishing = None if found is None else other.submit(finish, job, *found)
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
            f'two images are called "{twice[0].stem}" and would be written to the same file; '
            "segment them separately, each "
            "with an --out of its own"
        )
    return jobs


@contextlib.contextmanager
def _about(path: str) -> Iterator[None]:
    """Begin the sentence about an image that cannot be used with its path."""
    try:
        yield
    except ValueError as error:
        raise io.DataError(f"{path}: {error}") from None


@contextlib.contextmanager
def _lack_of_memory(path: str, need: int = 0) -> Iterator[None]:
    """Turn what any library says of too little memory into one sentence; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        cause = (str(error).splitlines() or ["no more is known"])[0]
        mend = (
            "close other programs, or say with --memory how many GiB may be used: it is then "
            "segmented in smaller blocks"
        )
        if "CUDA" in cause:
            mend = "choose a smaller --block, e.g. --block 512"
        elif need:
            mend += f" if it may need more (it was thought to need up to {need / memory.GIB:.1f})"
        raise io.DataError(f"{path}: there was too little memory ({cause}); {mend}") from error


def _in_memory(image: Any) -> int:
    """Return the bytes of an image that is not read piece by piece."""
    return image.nbytes if isinstance(image, np.ndarray) and not isinstance(image, np.memmap) else 0


def _segmenter(arguments: argparse.Namespace, header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Choose how to segment: as the weights were tuned, but for what is given."""
    given = dict(arguments.set)
    for name in ("foreground_threshold", "min_size"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    segmenter, parameters = chosen(arguments.model, header, arguments.segmenter, given)
    if segmenter not in (tuned := header["segmentation"]):
        print(
            f"{segmenter} was not tuned with these weights, only {', '.join(tuned)}: what is not "
            "given has its default value",
            file=sys.stderr,
        )
    return segmenter, parameters


@contextlib.contextmanager
def _open_image(path: Path | str, channels: int, scratch: Path) -> Iterator[Any]:
    """Yield the array of an image file, a map of a large one, or an open dataset of HDF5: these are
    read piece by piece.
    """
    from gdlib.data.files import open_volume, read_image

    if is_hdf5(path):
        with open_volume(path) as volume:
            yield volume
    else:
        yield read_image(path, channels, scratch=scratch)


def is_hdf5(path: Path | str) -> bool:
    """Is this a file, or `file:dataset`, that HDF5 reads?"""
    from gdlib.data.files import HDF5_SUFFIXES, split_h5_path

    return split_h5_path(path)[0].suffix.lower() in HDF5_SUFFIXES


def _where(image: Any, file: Path) -> dict[str, Any]:
    """Return what the file of an image says of how large its pixels are and where, of HDF5 as
    attributes.
    """
    if not is_hdf5(file):
        from gdlib.data.calibration import calibration

        return calibration(file)
    return {
        k: v for k, v in image.attrs.items() if k in ("resolution", "offset", "element_size_um")
    }


def _write_label(job: _Job, label: np.ndarray, attributes: dict[str, Any]) -> None:
    import tifffile

    if job.dataset is None:
        with io.atomic(job.target) as temporary:
            tifffile.imwrite(temporary, label, **_tiff_options(job, label.shape, attributes))
        return
    with outputs.added_h5(job.target) as file:
        io.put(file, job.dataset, label, io.BLOCK if label.ndim == 3 else None)
        file[job.dataset].attrs.update(attributes | {outputs.SOFTWARE: job.mark})


def _write_blocks(
    job: _Job, plan: dict[str, Any], labels: Path, attributes: dict[str, Any]
) -> None:
    """Write the label of an image that was segmented in blocks: a TIFF of tiles, or a dataset whose
    chunks are copied.
    """
    import tifffile

    from gdlib.volumes import blockwise

    if job.dataset is None:
        shape, tile = tuple(plan["shape"]), CHUNK[2]
        options = _tiff_options(job, shape, attributes) | {
            "shape": shape,
            "dtype": np.uint32,
            "tile": tile,
        }
        with io.atomic(job.target) as temporary:
            tifffile.imwrite(temporary, blockwise.tiles(plan, labels, tile), **options)
        return
    with outputs.added_h5(job.target) as file:
        label = blockwise.gathered(plan, labels, file, job.dataset)
        label.attrs.update(attributes | {outputs.SOFTWARE: job.mark})


def _tiff_options(job: _Job, shape: tuple[int, ...], attributes: dict[str, Any]) -> dict[str, Any]:
    from gdlib.data.calibration import written

    # Of a file that will be compressed, tifffile does not see for itself that it may be too large
    # for a TIFF.
    large = {"bigtiff": 4 * math.prod(shape) >= 2**32}
    return (
        {"compression": "zlib", "photometric": "minisblack", "software": job.mark}
        | large
        | written(attributes, shape)
    )
