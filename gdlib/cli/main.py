"""The command line: `gdlib segment`, `distill`, `evaluate`, `info`, `models` for people, `gdlib step
...` for the workflow.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gdlib import __version__, devices, io, trained
from gdlib.cli.distill import add_distill
from gdlib.cli.images import is_hdf5
from gdlib.cli.models import add_models, catalogue
from gdlib.cli.segment import add_segment
from gdlib.cli.steps import add_steps
from gdlib.config.page import add_schema
from gdlib.io import failures, outputs
from gdlib.limits import place
from gdlib.segment.parameters import main_segmenter

EXAMPLES = """examples:
  gdlib segment images/ --model nuclei --out found/
  gdlib distill images/ labels/ --out mycells --time 30m
  gdlib segment volume.h5:volumes/raw --model weights.safetensors --out found/
  gdlib evaluate ground_truth/ found/ --out scores.csv
  gdlib info weights.safetensors
  gdlib models
  gdlib download bbbc039
"""


def main(argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> int:
    """Run one command; a mistake of the user is one line on stderr and exit status 1.

    Args:
        argv: what is given to it, by default that of this process.
        parser: of another program than `gdlib`, whose `function` gets the arguments.
    """
    try:
        arguments = (parser or _parser()).parse_args(argv)
        if getattr(arguments, "threads", None):
            # Before torch and BLAS are imported, which read them once; of two, the special one
            # would win.
            os.environ |= dict.fromkeys(
                ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads)
            )
        if getattr(arguments, "device", None) == "auto":
            devices.claim()
        arguments.function(arguments)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print(
            "gdlib: stopped by Ctrl-C; the same command starts again, or goes on from what is "
            "saved",
            file=sys.stderr,
        )
        return 130
    except (
        ValueError,
        FloatingPointError,
        OSError,
        MemoryError,
        RuntimeError,
        ExceptionGroup,
    ) as error:
        ours = not isinstance(error, RuntimeError) or failures.is_lack_of_memory(error)
        if os.environ.get("GDLIB_TRACEBACK") or not ours:
            raise
        for line in failures.sentences(error):
            print("gdlib: error:", line, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="gdlib",
        description="Small, fast networks for biomedical instance segmentation, distilled from "
        "large ones.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"gdlib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_segment(commands)
    add_distill(commands)

    evaluate = commands.add_parser(
        "evaluate",
        help="compare segmentations with the ground truth",
        description="Compare label images with ground truth of the same file name; every metric "
        "for every image, as CSV. The means are over the images with objects; those "
        "without have a row of means of their own, for all that their metrics tell is "
        "whether anything was found. If an image cannot be compared, its row is "
        "empty, there are no means, and the exit status is 1. " + _metric_help(),
        formatter_class=raw,
    )
    evaluate.add_argument(
        "labels",
        help="ground truth: a PNG or TIFF file, volume.h5:name/of/dataset, or a folder of files",
    )
    evaluate.add_argument("segmentations", help="the same for what is to be judged")
    evaluate.add_argument(
        "--out", type=place, metavar="CSV", help="where to write (default: the screen)"
    )
    evaluate.add_argument("--overwrite", action="store_true", help=outputs.HELP)
    evaluate.set_defaults(function=_evaluate)

    info = commands.add_parser(
        "info",
        help="say what a weights file is",
        description="Say what a weights file is, how it was trained, and how well it did on its "
        "validation images.",
    )
    info.add_argument("weights", type=place, help="weights file, or a built-in network")
    info.add_argument("--json", action="store_true", help="print the whole header as JSON")
    info.set_defaults(function=_info)

    add_models(commands)

    check = commands.add_parser(
        "check",
        help="look for mistakes in a configuration",
        description="Read a catalogue, and files that change it as `snakemake --configfile` takes "
        "them, and tell the first mistake: what is no YAML, a key that is written "
        "twice, wrong names, values out of their range.",
    )
    check.add_argument(
        "files", nargs="*", type=place, metavar="FILE", help="your own, e.g. mycells.yaml"
    )
    check.add_argument(
        "--config",
        type=place,
        help="catalogue (default: config.yaml, with the folder config, here or else of gdlib)",
    )
    check.set_defaults(function=_check)

    download = commands.add_parser(
        "download",
        help="fetch public data sets",
        description="Fetch data sets of a catalogue from their official addresses, each into a "
        "folder of its own that is complete or does not exist. A transfer that was "
        "stopped goes on when the same command is given again; what is there is not "
        "fetched again. For data that cannot be downloaded freely, say how to get "
        "them.",
    )
    download.add_argument("names", nargs="+", metavar="NAME", help="dataset of the catalogue")
    download.add_argument(
        "--to",
        type=place,
        metavar="DIR",
        help="where the folders of the datasets go (default: the first of raw_folders)",
    )
    download.add_argument(
        "--config",
        type=place,
        help="catalogue (default: config.yaml, with the folder config, here or else of gdlib)",
    )
    download.set_defaults(function=_download)

    add_schema(commands)
    add_steps(commands)
    return parser


def _metric_help() -> str:
    from gdlib.evaluate.metrics import METRICS
    from gdlib.evaluate.scores import COUNTS

    lines = [f"  {key:13} {m.definition} ({m.better} is better)" for key, m in METRICS.items()]
    counts = [f"  {key:13} {definition}" for key, (definition, _) in COUNTS.items()]
    return "\n\nmetrics:\n" + "\n".join(lines) + "\n\ncounts:\n" + "\n".join(counts)


@contextlib.contextmanager
def _open_label(path: Path | str) -> Iterator[Any]:
    from gdlib.data.files import open_volume, read_label

    if is_hdf5(path):
        with open_volume(path) as volume:
            # that may be whole numbers
            yield volume if volume.dtype.kind != "f" else read_label(path)
    else:
        yield read_label(path)


def _evaluate(arguments: argparse.Namespace) -> None:
    from gdlib.data.files import find_files, spelt, split_h5_path
    from gdlib.evaluate.metrics import METRICS

    def files(path: str) -> dict[str, Path | str]:
        if Path(path).is_dir():
            return find_files(Path(path))
        io.check_file(file := split_h5_path(path)[0])
        return {file.stem: path}

    labels, segmentations = files(arguments.labels), files(arguments.segmentations)
    if not any(Path(path).is_dir() for path in (arguments.labels, arguments.segmentations)):
        segmentations = dict(zip(labels, segmentations.values(), strict=True))
    if not labels.keys() & segmentations.keys():
        raise io.DataError(
            f"no name of {arguments.labels} ({next(iter(labels))}, ...) is one of "
            f"{arguments.segmentations} ({next(iter(segmentations))}, ...); give the images of "
            "both the same names"
        )
    if arguments.out:
        inputs = [split_h5_path(path)[0] for path in (*labels.values(), *segmentations.values())]
        out = outputs.Output(arguments.out, outputs.has_columns("sample", *METRICS))
        outputs.check([out], inputs, overwrite=arguments.overwrite)
    rows, failed = [], failures.Failures()
    for name, path in labels.items():
        rows.append({"sample": name})
        with failed.noted():
            if name not in segmentations:
                place = f"{arguments.segmentations}{spelt(name, segmentations)}"
                raise io.DataError(
                    f'{path}: there is no segmentation called "{name}" in {place}; add it'
                )
            rows[-1] |= _scores(path, segmentations[name])
    keys = list(max(rows, key=len))
    table = [[row.get(key, "") for key in keys] for row in rows]
    if not failed.errors:  # the mean of some is not that of all
        for name, has_objects in (("mean of images without objects", False), ("mean", True)):
            if part := [row for row in rows if (row["objects"] > 0) == has_objects]:
                table.append(
                    [name, *(sum(row[key] for row in part) / len(part) for key in keys[1:])]
                )
    what = "images could not be compared"
    if len(failed.errors) < len(rows):
        _write_table(arguments.out, keys, table)
        what += ": their scores are left empty, and there are no means"
    failed.tell(len(rows), what)


def _scores(path: Path | str, other: Path | str) -> dict[str, float]:
    from gdlib.data.axes import without_single_axes
    from gdlib.evaluate.scores import of_image

    with _open_label(path) as label, _open_label(other) as segmentation:
        if label.shape != segmentation.shape:
            label, segmentation = without_single_axes(label), without_single_axes(segmentation)
        try:
            return of_image(label, segmentation)
        except io.DataError:  # which names the one that cannot be read
            raise
        except ValueError as error:
            raise io.DataError(f"{path} and {other}: {error}") from None


def _write_table(out: Path | None, keys: list[str], table: list[list[Any]]) -> None:
    import csv

    if out:
        io.write_rows(out, keys, table)
    else:
        writer = csv.writer(sys.stdout)
        writer.writerow(keys)
        writer.writerows(
            [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in table]
        )


def _info(arguments: argparse.Namespace) -> None:
    arguments.weights = trained.find(arguments.weights)
    header = io.read_header(arguments.weights)
    if arguments.json:
        print(json.dumps(header, indent=2, sort_keys=True))
        return
    try:
        io.check_header(arguments.weights, header)
        lines = _about(header)
    except (KeyError, TypeError) as error:
        raise io.DataError(
            f"{arguments.weights}: its header lacks what training writes into it ({error}); "
            "`--json` shows what there is"
        ) from error
    for key, value in lines:
        print(f"{key:13} {value}")


def _about(header: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a header says, for people: what it is about, and what of it."""
    from gdlib.evaluate.scores import in_empty

    run = header["run"]
    terms = [
        f"{t['weight']:g} x {t['term']}{' (memory)' if t['memory'] else ''}" for t in run["terms"]
    ]
    ndim = len(header["offsets"][0])
    shown = (
        ("aji", "pq", "f1_50", "dice") if ndim == 2 else ("voi_split", "voi_merge", "voi", "arand")
    )
    lines = [
        ("network", f"{run['network']} ({header['model']} {header['options']})"),
        (
            "input",
            f"{header['channels']} channel(s), {ndim}D, percentiles "
            f"{header['normalisation']['lower']} to {header['normalisation']['upper']} become 0 to "
            f"1{_floor(header['normalisation'])}",
        ),
        (
            "trained on",
            f"{run['dataset']}, {run['recipe']['steps']} steps of {run['recipe']['batch_size']} "
            f"patches of {'x'.join(map(str, run['recipe']['patch']))} pixels, seed {run['seed']}",
        ),
        ("weights of", f"step {header['step']}, the best on the validation images"),
        ("method", f"{run['method']}" + (f": supervised + {' + '.join(terms)}" if terms else "")),
    ]
    main = main_segmenter(header)
    # the main one first
    for segmenter in sorted(header["segmentation"], key=lambda name: name != main):
        parameters = ", ".join(f"{k} {v}" for k, v in header["segmentation"][segmenter].items())
        scores = header["validation"].get(segmenter, {})
        lines.append(("segmentation", f"{segmenter}: {parameters}"))
        texts = [f"{key} {scores[key]:.4f}" for key in shown if key in scores]
        lines.append(("validation", f"{segmenter}: {', '.join(texts)}{in_empty(scores)}"))
    made = (
        f"gdlib {header['gdlib']}, torch {header['torch']}, {header['device']}, "
        f"{header['precision']}"
    )
    return [*lines, ("made by", made)]


def _floor(normalisation: dict[str, Any]) -> str:
    if "contrast" not in normalisation:
        return "; so too in an image without objects: noise is stretched to the full range"
    return f", {' and '.join(f'{c:g}' for c in normalisation['contrast'])} times the noise or more"


def _check(arguments: argparse.Namespace) -> None:
    config = catalogue(arguments.config, *arguments.files)
    runs = len(config.runs())
    print(
        f"nothing is wrong; study {config.study}: {runs} trainings on "
        f"{', '.join(config.selected.datasets)}"
    )


def _download(arguments: argparse.Namespace) -> None:
    from gdlib.registry import nearest

    config = catalogue(arguments.config)
    if arguments.to:
        config = config.model_copy(update={"raw_folders": (str(arguments.to),)})
    for name in arguments.names:
        if name not in config.datasets:
            raise ValueError(
                f'{arguments.config or "config.yaml"}: there is no dataset "{name}": '
                f"{nearest(name, list(config.datasets))}"
            )
    failed = failures.Failures()
    for name in arguments.names:
        with failed.noted(ValueError):
            _download_one(config, name)
    failed.tell(len(arguments.names), "data sets could not be fetched")


def _download_one(config: Any, name: str) -> None:
    from gdlib.config import ConfigError
    from gdlib.data.download import download

    files = config.datasets[name].download
    try:
        folder = config.raw_folder(name)
    except ConfigError:
        if not files:  # then it says how to get them
            raise
        folder = config.new_folder(name)
    if files:
        download(files, folder)
    else:
        print(
            f"{folder}: is already there"
            if folder
            else f"{name}: is made here, there is nothing to download"
        )
