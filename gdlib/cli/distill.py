"""`gdlib distill`: two folders of images and labels to a network of one's own, by the workflow."""

import argparse
import math
import os
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import devices, io, trained
from gdlib.cli import workflow
from gdlib.config import own, parts
from gdlib.evaluate.metrics import METRICS
from gdlib.evaluate.scores import worth
from gdlib.io.failures import DataError
from gdlib.limits import Count, Whole, argument, place

UNITS = {"s": 1, "m": 60, "h": 3600}
TEACHER = 0.55  # its part of the time of all trainings: students cannot learn what it does not know
FEW = 100  # steps after which a network has learned next to nothing


def add_distill(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib distill` to the command line."""
    distill = commands.add_parser(
        "distill",
        help="train a network of your own from images and labels",
        description="Look at images and labels, choose what suits their objects, write a "
        "configuration that can be read and edited, and run the workflow with it: a teacher, two "
        "students of it, and how good they are. Stopped with Ctrl-C, it goes on when the same "
        "command is given again; after an edit of the configuration, or with more images, what "
        "depends on that is made again, and nothing else.",
    )
    distill.add_argument(
        "images", type=place, metavar="IMAGES", help="folder of PNG, TIFF, HDF5 or OME-Zarr"
    )
    distill.add_argument(
        "labels",
        type=place,
        metavar="LABELS",
        help="folder of files of the same names: a number for each object, 0 = background",
    )
    distill.add_argument(
        "--unlabelled",
        type=place,
        metavar="DIR",
        help="folder of more images, without labels: the teacher says what it sees in them, and "
        "one of "
        "the students learns from that too",
    )
    distill.add_argument(
        "--out", required=True, type=place, metavar="DIR", help="folder for all that is made"
    )
    distill.add_argument(
        "--teacher",
        type=place,
        metavar="WEIGHTS",
        help="of a teacher, which is then not trained: a file, or a network that comes with the "
        "package",
    )
    distill.add_argument(
        "--time",
        type=_seconds,
        metavar="TIME",
        help="about how long the trainings may take, e.g. 30m or 2h: steps are chosen by the "
        f"measured time of some (default: {own.STEPS[2].teacher} steps of the teacher, "
        f"{own.STEPS[3].teacher} with --3d, and {own.STEPS[2].student} of each student)",
    )
    distill.add_argument(
        "--3d", dest="volumes", action="store_true", help="the files are volumes (z, y, x)"
    )
    distill.add_argument(
        "--regions",
        action="store_true",
        help="each connected region of a label is an object, as in masks of 0 and 255",
    )
    distill.add_argument(
        "--level",
        type=argument(Whole),
        default=0,
        metavar="N",
        help="resolution of OME-Zarr images and labels that is learned from (default: 0, the full "
        "one)",
    )
    distill.add_argument(
        "--cores", type=argument(Count), help="CPU cores that may be used (default: all)"
    )
    distill.add_argument(
        "--dry-run", action="store_true", help="write the configuration, and say what would be done"
    )
    distill.set_defaults(function=_distill)


def _seconds(text: str) -> float:
    """Read a time: a number with s, m or h.

    >>> _seconds("30m"), _seconds("1.5h")
    (1800.0, 5400.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(
            f"it must be a number with s, m or h, such as 30m or 2h (got {text!r})"
        )
    return float(match[1]) * UNITS[match[2]]


def _distill(arguments: argparse.Namespace) -> None:
    start, out = time.monotonic(), arguments.out
    if arguments.time and arguments.dry_run:
        raise ValueError("--time measures steps, and --dry-run makes none; leave one of them out")
    if find_spec("snakemake") is None:
        raise ValueError('the workflow needs Snakemake; install it: pip install "gdlib[workflow]"')
    config = out / "config.yaml"
    _link(arguments.images, arguments.labels, arguments.unlabelled, out)
    if config.exists():
        workflow.say(
            f"{config}: is there and is used as it is; to have it chosen anew, move it away"
        )
    else:
        text, found = _chosen(arguments)
        steps = _timed(text(), arguments, found) if arguments.time else None
        io.write_text(config, text(steps))
        workflow.say(
            f"wrote {config}; edit it and give the same command again to change what is done"
        )
    command = workflow.command(out, config, arguments.cores)
    if arguments.dry_run:
        workflow.plan(command, out)
        return
    workflow.say(f"running {shlex.join(map(str, command[2:]))}")
    if any("Nothing to be done" in line for line in workflow.run(command, out, start)):
        workflow.say(workflow.NOTHING)
    _end(out, config, command)


def _link(images: Path, labels: Path, unlabelled: Path | None, out: Path) -> None:
    """Make links to the folders where the source `folder` looks for them."""
    for folder in filter(None, (images, labels, unlabelled)):
        if not folder.is_dir():
            cause = "a file" if folder.exists() else "not there"
            raise DataError(
                f"{folder}: this is {cause}; give a folder with one file for each image"
            )
        if out.resolve().is_relative_to(folder.resolve()):
            raise DataError(
                f"{out}: the output is inside the folder {folder}, and would be read as one of its "
                "images; choose another --out"
            )
    if images.resolve() == labels.resolve():
        raise DataError(f"{images}: images and labels are the same folder; give one for each")
    if unlabelled and unlabelled.resolve() in (images.resolve(), labels.resolve()):
        raise DataError(
            f"{unlabelled}: these are the images that have labels; give a folder of others with "
            "--unlabelled"
        )
    raw = out / "raw" / own.NAME
    links = {raw / "images": images, raw / "labels": labels}
    links |= {raw / "unlabelled": unlabelled} if unlabelled else {}
    if images.resolve().parent == labels.resolve().parent:
        lists = (images.resolve().parent / f"{split}.txt" for split in ("train", "val", "test"))
        links |= {raw / path.name: path for path in lists if path.is_file()}
    for link, target in links.items():
        if os.path.lexists(link):
            if link.resolve() != target.resolve():
                raise DataError(
                    f"{out}: this was made of {link.resolve()}, not of {target}; choose another "
                    "--out"
                )
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target.resolve(), target_is_directory=target.is_dir())


def _chosen(arguments: argparse.Namespace) -> tuple[Any, own.Measured]:
    """Look at all images, say what was found and chosen, and return what writes the configuration
    for a number of steps.
    """
    found = _measure(arguments)
    workflow.say(f"found: {found.sentence()}")
    try:
        choice = own.choose(found)
    except ValueError as error:
        raise DataError(f"{arguments.images}: {error}") from None
    for sentence in choice.why:
        workflow.say(f"chosen: {sentence}")
    given: dict[str, Any] = {}
    if arguments.teacher:
        given = _given(arguments.teacher, found)
        workflow.say(f"chosen: {arguments.teacher} as the teacher, which is not trained")

    def text(steps: own.Steps | None = None) -> str:
        title = arguments.out.resolve().name
        how = {"regions": arguments.regions, "level": arguments.level}
        return own.written(found, choice, steps, title=title, **how, **given)

    return text, found


def _given(weights: Path, found: own.Measured) -> dict[str, Any]:
    """Look whether weights suit the images."""
    path = trained.find(weights)
    header = io.read_header(path)
    io.check_header(path, header)
    axes = len(header["offsets"][0])
    if (axes, header["channels"]) != (found.ndim, found.channels):
        raise DataError(
            f"{path}: this teacher takes {axes}D images of {header['channels']} channel(s), and "
            f"yours are {found.ndim}D of {found.channels}; give another one, or none"
        )
    options = {key: value for key, value in header["options"].items() if key != "in_channels"}
    place = path.resolve() if path == weights else weights  # else a name, known everywhere
    return {"weights": str(place), "model": (header["model"], options)}


def _measure(arguments: argparse.Namespace) -> own.Measured:
    """Read all images and labels as the workflow will, and return what they are."""
    from gdlib.data import sense
    from gdlib.data.files import UNLABELLED, find_files
    from gdlib.data.prepare import check_sample
    from gdlib.data.sources.folder import folder

    ndim = 3 if arguments.volumes else 2
    name, first = next(iter(find_files(arguments.images).items()))
    channels = _channels(first, find_files(arguments.labels).get(name), ndim)
    regions = arguments.regions or None
    options = {"channels": channels, "label_regions": regions, "level": arguments.level}
    splits = folder(arguments.out / "raw" / own.NAME, **options)
    if not arguments.unlabelled:  # those of an earlier command may be there
        splits.pop(UNLABELLED, None)
    seen, shapes, sizes = [], [], []
    for split, samples in splits.items():
        for sample in samples:
            checked = check_sample(sample, channels, (1,) * ndim)
            if split == UNLABELLED:  # patches are cut from these too
                shapes.append(checked.image.shape[1:])
                continue
            seen.append(sense.look(checked, split))
            shapes.append(checked.label.shape)
            sizes += _sizes(checked.label)
    sense.check_splits(seen)
    if not regions:
        sense.check_numbers(seen, "give --regions if each separate region is one object")
    width, length, depth = np.array(sizes).T
    return own.Measured(
        images=len(seen),
        unlabelled=len(shapes) - len(seen),
        objects=len(sizes),
        channels=channels,
        smallest=tuple(np.min(shapes, 0).tolist()),
        largest=tuple(np.max(shapes, 0).tolist()),
        width=float(np.median(width)),
        length=float(np.percentile(length, 95)),
        depth=float(np.median(depth)),
    )


def _channels(image: Path, label: Path | None, ndim: int) -> int:
    """Find out how many channels an image has, and whether it has as many axes as is said."""
    from gdlib.data.axes import without_single_axes
    from gdlib.data.files import read_image, read_label

    if label is None:  # which is told when all are read
        return 1
    sides = without_single_axes(read_label(label)).shape
    if len(sides) != ndim:
        mend = {
            3: "give --3d if these are the sections of a volume, else save each as a file",
            2: "leave --3d out",
        }.get(len(sides), "save each object map as one file")
        raise DataError(f"{label}: the label has {len(sides)} axes {sides}, not {ndim}; {mend}")
    channels, *rest = read_image(image).shape
    rest = [n for n in rest if n > 1]
    if channels == 1 and len(rest) == len(sides) + 1:  # an axis that the file does not name
        fits = [
            rest[at]
            for at in (0, -1)
            if [*rest[: at % len(rest)], *rest[at % len(rest) + 1 :]] == [*sides]
        ]
        channels = (fits or [1])[0]
    return channels


def _sizes(label: np.ndarray) -> list[tuple[float, float, float]]:
    """Return width, length and depth (see `own.Measured`) of each object of ([z,] y, x)."""
    from scipy.ndimage import find_objects

    sizes = []
    for number, box in enumerate(find_objects(label.astype(np.int64)), start=1):
        areas = (label[box] == number).sum((-2, -1))
        sides = [part.stop - part.start for part in box]
        depth = sides[0] if label.ndim == 3 else 1
        sizes.append((2 * np.sqrt(np.max(areas) / np.pi), max(sides[-2:]), depth))
    return sizes


def _timed(text: str, arguments: argparse.Namespace, found: own.Measured) -> own.Steps:
    """Return as many steps as a time allows, with the configuration as it is.

    What is done before is not counted: the first time, kernels are compiled, which takes a minute,
    and would leave little of a short time.
    """
    from gdlib.config import TEACHER as METHOD
    from gdlib.config import load
    from gdlib.train.pace import seconds_per_step

    with tempfile.TemporaryDirectory(prefix=".time-", dir=arguments.out) as folder:
        config = Path(folder, "config.yaml")
        config.write_text(text)
        data = Path("data", own.NAME, "train.h5")
        workflow.say("preparing the images, and making some steps to see how long they take")
        command = workflow.command(arguments.out, config, arguments.cores)
        workflow.run([*command, "--", data], arguments.out, quiet=True)
        chosen = load(parts.home(), config)
        cores = arguments.cores or devices.cores()
        gpu = devices.has_nvidia()
        student, teacher = own.STUDENT[found.ndim], chosen.teachers_of(own.NAME)[0]
        files = {key: arguments.out / "data" / own.NAME / f"{key}.h5" for key in ("train", "val")}
        files["folder"] = Path(folder)
        taught_by: Any = chosen.run(own.NAME, teacher, METHOD, 0)
        one = 0.0
        if arguments.teacher:
            taught_by = trained.find(arguments.teacher)
        else:
            one = seconds_per_step(taught_by, **files, threads=1 if gpu else min(cores, 8))
        each = [
            seconds_per_step(chosen.run(own.NAME, student, method, 0), **files, teacher=taught_by)
            for method in own.methods(found)
        ]
    # On a CPU both students are trained at once, if there are two cores; on a GPU one by one.
    both = max(each) if cores > 1 and not gpu else sum(each)
    steps = _steps(arguments.time, one, both)
    if min(steps) < FEW:
        workflow.say(f"warning: {min(steps)} steps teach next to nothing; give more --time")
    times = f"{one * 1000:.0f} ms of the teacher, " if one else ""
    times += f"{both * 1000:.0f} ms of the students together"
    why = (
        f"as many as --time {arguments.time / 60:.3g}m allows here: a step took {times}; "
        "validation, and what comes before and after the trainings, are not counted"
    )
    workflow.say(
        f"chosen: {steps[0] if one else 'no'} steps for the teacher, {steps[1]} for the students"
    )
    workflow.say(f"        {why}")
    return own.Steps(*steps, why)


def _steps(seconds: float, teacher: float, students: float) -> list[int]:
    """Return how many steps the teacher and each student can make.

    Args:
        seconds: for all trainings.
        teacher: seconds of its step, 0 if it is not trained.
        students: seconds in which each of them makes one.

    >>> _steps(1000, 1.0, 0.4), _steps(1000, 0, 0.4)[1]
    ([550, 1100], 2500)
    """
    steps = [_rounded(seconds * TEACHER / teacher) if teacher else FEW]  # any: none are made
    return [*steps, _rounded(seconds * (1 - TEACHER if teacher else 1) / students)]


def _rounded(steps: float) -> int:
    """Round down to two digits: more were not measured.

    >>> _rounded(1234.5), _rounded(86.7), _rounded(3)
    (1200, 86, 10)
    """
    steps = max(10, int(steps))
    unit = 10 ** (len(str(steps)) - 2)
    return steps // unit * unit


def _end(out: Path, config: Path, command: Sequence[Any]) -> None:
    """Say what there is now: the table, the report, the weights, and what to do next."""
    from gdlib.config import load, plan

    chosen = load(parts.home(), config)
    results = out / "results" / chosen.study
    table, report = results / "table.md", out / "report.html"
    if not report.exists() or report.stat().st_mtime < table.stat().st_mtime:
        report.unlink(missing_ok=True)
        workflow.run([*command, "--report", report.resolve()], out, quiet=True)
    workflow.say("")
    workflow.say(table.read_text().strip())
    runs = [run for run in plan.Plan(chosen).runs if not chosen.is_teacher(run[1])]
    names = ["/".join([*map(str, run[:3]), f"seed{run[3]}"]) for run in runs]
    weights = _best([results / "runs" / name / "weights.safetensors" for name in names])
    workflow.say("")
    workflow.say(f"report:  {report}")
    workflow.say(f"weights: {weights}")
    workflow.say(
        f"next:    gdlib segment IMAGES --model {shlex.quote(str(weights))} "
        f"--out {shlex.quote(str(out / 'found'))}"
    )


def _best(weights: Sequence[Path]) -> Path:
    """Return the weights that did best on the validation images, as trainings choose, of equal ones
    the last.
    """

    def score(path: Path) -> float:
        header = io.read_header(path)
        metric = header["run"]["recipe"]["selection"]
        found = worth(header["validation"][header["run"]["segmenters"][0]], metric)
        if math.isnan(found):
            return -math.inf
        return found if METRICS[metric].better == "higher" else -found

    return max(reversed(weights), key=score)
