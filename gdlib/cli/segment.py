"""`gdlib segment`: trained weights and images of any size to label files."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdlib import io, trained
from gdlib.cli import BLOCK_HELP
from gdlib.cli.found import COLUMNS, preview_output
from gdlib.cli.job import Job
from gdlib.cli.work import Work
from gdlib.io import outputs
from gdlib.io.failures import Failures
from gdlib.limits import Positive, Threads, argument, number, place, sides
from gdlib.progress import Progress
from gdlib.segment.parameters import chosen


def add_segment(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib segment` to the command line."""
    segment = commands.add_parser(
        "segment",
        help="find the objects in images",
        description="Segment images and volumes of any size with trained weights. Every image "
        "gives one file of the same name in the output folder, with 32-bit labels: 0 "
        "= background, 1, 2, ... = objects. PNG and TIFF give TIFF, which opens in "
        "napari and Fiji; a dataset of an HDF5 file gives a dataset of the same name "
        "in an HDF5 file, whose other datasets stay; OME-Zarr gives OME-Zarr. Labels "
        "that are there already are replaced if they were made of the same image by "
        "this command, others never without --overwrite. A volume that was stopped "
        "half-way goes on from there when the same command is given again.",
    )
    segment.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="PNG or TIFF files (stacks too), volume.h5:name/of/dataset, image.zarr or a resolution"
        " level of it, image.zarr:1, or folders of these",
    )
    segment.add_argument(
        "--model",
        type=place,
        metavar="NAME|FILE",
        help="a built-in network (`gdlib models` lists them), or the weights.safetensors of your "
        f"own, or the ONNX file that `gdlib export` made of one (default: {trained.DEFAULT})",
    )
    segment.add_argument(
        "--out",
        required=True,
        type=place,
        metavar="DIR",
        help="folder for the labels; or image.zarr:labels/NAME, which puts them into the image",
    )
    segment.add_argument(
        "--channel",
        metavar="NUMBER|NAME",
        help="the one channel that shows the objects: 1, 2, ..., or its name in the file",
    )
    segment.add_argument(
        "--axes",
        metavar="LETTERS",
        help="which axis of the array is which, of TCZYX, e.g. YXC (default: what the file "
        "says); a "
        "2D network segments every frame and section on its own, and all go to one file",
    )
    segment.add_argument(
        "--pixel-size",
        type=_pixel,
        metavar="MICRONS",
        help="of the images, one number or ZxYxX: they are brought to that of the training images, "
        "and the labels back (default: what the file says, if the model knows its own); beside "
        "--diameter, it is for the microns of the table alone",
    )
    segment.add_argument(
        "--diameter",
        type=argument(Positive),
        metavar="PIXELS",
        help="of typical objects in the images: they are brought to those of the training images, "
        "and the labels back; beside --pixel-size, this decides how they are scaled",
    )
    segment.add_argument(
        "--invert",
        action="store_true",
        help="see the images as their negatives: objects are dark on a bright ground, and were "
        "bright in the training",
    )
    segment.add_argument(
        "--augment",
        action="store_true",
        help="see every image turned and mirrored in eight ways, and take the means: takes eight "
        "times as long; docs/use.md says where it helps",
    )
    segment.add_argument(
        "--preview",
        action="store_true",
        help="a picture with outlines beside every label, NAME.preview.png",
    )
    segment.add_argument(
        "--table",
        type=place,
        metavar="CSV",
        help="a file with a row for each object of all images: area, centroid, mean intensity",
    )
    segment.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)"
    )
    segment.add_argument(
        "--precision",
        default="auto",
        help="auto, float32, bfloat16, float16, or int8 where `gdlib quantise` made it (default: "
        "the fastest that there is)",
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
        "--foreground-threshold", type=_number, help="probability (default: tuned with the weights)"
    )
    segment.add_argument(
        "--min-size", type=_number, help="pixels (default: tuned with the weights)"
    )
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


def _pixel(text: str) -> float | tuple[float, ...]:
    try:
        sides = tuple(float(side) for side in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            "it must be one length in microns, or one for each axis as in 0.05x0.01x0.01 "
            f"(got {text!r})"
        ) from None
    if not all(0 < side < float("inf") for side in sides):
        raise argparse.ArgumentTypeError(f'"{text}" is no length above 0')
    return sides[0] if len(sides) == 1 else sides


def _number(text: str) -> int | float:
    try:
        return number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it must be a number (got {text!r})") from None


def _parameter(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, number(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" is not NAME=NUMBER') from None


def _segment(arguments: argparse.Namespace) -> None:
    from gdlib.data.files import expanded
    from gdlib.data.scale import factors

    if arguments.model is None:
        print(f"no --model is given: {trained.DEFAULT} is taken", file=sys.stderr)
    arguments.model = trained.find(arguments.model or trained.DEFAULT)
    paths = expanded(arguments.images)
    failed = Failures()
    jobs = _jobs(paths, arguments, failed)
    _check_outputs(arguments, jobs)
    header = io.read_header(arguments.model)
    io.check_header(arguments.model, header, ("offsets", "segmentation"))
    ndim = len(header["offsets"][0])
    # what the weights do not know is told before anything is computed
    factors(header, ndim, arguments.pixel_size, arguments.diameter)
    work = Work(arguments, header, _segmenter(arguments, header), len(jobs))
    start = time.perf_counter()
    with Progress(total=len(jobs), unit="image", disable=len(jobs) == 1) as work.bar:
        work.run(jobs, failed)
    work.found.tell()
    if (done := work.found.images) > 1:
        seconds = time.perf_counter() - start
        print(
            f"{done} images, {work.found.all.objects} objects in {seconds:.1f} s "
            f"({done / seconds:.1f} images/s)",
            file=sys.stderr,
        )
    failed.tell(len(paths), "images could not be segmented; all others are done")


def _check_outputs(arguments: argparse.Namespace, jobs: Sequence[Job]) -> None:
    inputs = [arguments.model, *(job.file for job in jobs)]
    wanted = [job.output for job in jobs]
    if arguments.preview:
        wanted += [preview_output(job.preview, job.mark) for job in jobs]
    outputs.check(wanted, inputs, overwrite=arguments.overwrite)
    if arguments.table:
        # whether or not they are there yet: the table is written last
        if os.path.realpath(arguments.table) in {os.path.realpath(one.path) for one in wanted}:
            raise io.DataError(
                f"{arguments.table}: a label or picture of this command goes there, and the table "
                "would be written over it; choose another --table"
            )
        table = outputs.Output(arguments.table, outputs.has_columns(*set(COLUMNS) - {"z"}))
        outputs.check([table], inputs, overwrite=arguments.overwrite, option="--table")


def _jobs(paths: Sequence[str], arguments: argparse.Namespace, failed: Failures) -> list[Job]:
    """Find out where all labels go; what is given twice is done once."""
    found = {}
    for path in paths:
        with failed.noted():
            job = Job.of(path, arguments.out, arguments.model.stem)
            found.setdefault(job.mark, job)
    jobs = list(found.values())
    if not jobs:
        failed.tell(len(paths), "images could not be read")
    places: dict[tuple[Path, str | None], Job] = {}
    for job in jobs:
        other = places.setdefault((job.target, job.dataset), job)
        if other is not job:
            raise io.DataError(
                f'{other.path} and {job.path}: two images are called "{job.target.stem}" and would '
                "be written to the same file; segment them separately, each with an --out of its "
                "own"
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
            f"{segmenter} was not tuned with these weights, only {', '.join(tuned)}: what is not "
            "given has its default value",
            file=sys.stderr,
        )
    return segmenter, parameters
