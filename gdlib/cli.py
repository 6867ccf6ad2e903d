"""The command line: `gdlib segment`, `evaluate`, `info`, `models` for people, `gdlib step ...` for the workflow."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import __version__, io
from gdlib.steps import BLOCK_HELP, add_steps, sides

EXAMPLES = """examples:
  gdlib segment images/ --model weights.safetensors --out labels/
  gdlib segment volume.h5:volumes/raw --model weights.safetensors --out labels/
  gdlib evaluate ground_truth/ labels/ --out scores.csv
  gdlib info weights.safetensors
  gdlib models
  gdlib download bbbc039
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; a mistake of the user is one line on stderr and exit status 1."""
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "threads", None):
        # Before torch and BLAS are imported, which read it once.
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    try:
        arguments.function(arguments)
    except BrokenPipeError:
        return 0
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("GDLIB_TRACEBACK"):
            raise
        print("gdlib: error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="gdlib",
        description="Small, fast networks for biomedical instance segmentation, distilled from large ones.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"gdlib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
    segment.add_argument("--threads", type=int, help="CPU threads (default: all)")
    segment.add_argument("--block", type=sides, metavar="SIDES", help=BLOCK_HELP)
    segment.add_argument(
        "--segmenter", help="mutex_watershed, waterz or multicut (default: the one the weights were chosen with)"
    )
    segment.add_argument("--foreground-threshold", type=float, help="probability (default: tuned with the weights)")
    segment.add_argument("--min-size", type=int, help="pixels (default: tuned with the weights)")
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

    evaluate = commands.add_parser(
        "evaluate",
        help="compare segmentations with the ground truth",
        description="Compare label images with ground truth of the same file name; every metric for every image, as CSV. "
        + _metric_help(),
        formatter_class=raw,
    )
    evaluate.add_argument(
        "labels", help="ground truth: a PNG or TIFF file, volume.h5:name/of/dataset, or a folder of files"
    )
    evaluate.add_argument("segmentations", help="the same for what is to be judged")
    evaluate.add_argument("--out", type=Path, metavar="CSV", help="where to write (default: the screen)")
    evaluate.set_defaults(function=_evaluate)

    info = commands.add_parser(
        "info",
        help="say what a weights file is",
        description="Say what a weights file is, how it was trained, and how well it did on its validation images.",
    )
    info.add_argument("weights", type=Path)
    info.add_argument("--json", action="store_true", help="print the whole header as JSON")
    info.set_defaults(function=_info)

    models = commands.add_parser(
        "models",
        help="list the networks",
        description="List every network of a catalogue with its parameters and multiply-accumulates.",
    )
    models.add_argument("--config", type=Path, default=Path("config.yaml"), help="catalogue (default: config.yaml)")
    models.add_argument(
        "--shape", type=int, nargs="+", help="image size (default: 544 544, or 32 256 256 for networks of volumes)"
    )
    models.add_argument(
        "--markdown", action="store_true", help="print a page with context and levels too, docs/networks.md"
    )
    models.set_defaults(function=_models)

    download = commands.add_parser(
        "download",
        help="fetch public data sets",
        description="Fetch data sets of a catalogue from their official addresses, each into a folder of its own that is "
        "complete or does not exist. A transfer that was stopped goes on when the same command is given again; what is there "
        "is not fetched again. For data that cannot be downloaded freely, say how to get them.",
    )
    download.add_argument("names", nargs="+", metavar="NAME", help="dataset of the catalogue")
    download.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="where the folders of the datasets go (default: the first of raw_folders)",
    )
    download.add_argument("--config", type=Path, default=Path("config.yaml"), help="catalogue (default: config.yaml)")
    download.set_defaults(function=_download)

    add_steps(commands)
    return parser


def _metric_help() -> str:
    from gdlib.metrics import METRICS

    lines = [f"  {key:10} {m.definition} ({m.better} is better)" for key, m in METRICS.items()]
    return "\n\nmetrics:\n" + "\n".join(lines)


def _parameter(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, int(value) if value.lstrip("-").isdecimal() else float(value)
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
    predictor = Predictor.load(
        arguments.model, device=arguments.device, precision=arguments.precision, block=arguments.block
    )
    segmenter, parameters = _segmenter(arguments, predictor.header)
    weights = io.sha256(arguments.model)
    for path, file in zip(paths, files, strict=True):
        with _open_image(path, predictor.header["channels"]) as image:
            target = _target(arguments.out, file, image)
            partial = arguments.out / f".{file.stem}.partial"
            try:
                source = predictor.source(image)
            except io.DataError as error:
                raise io.DataError(f"{path}: {error}") from None
            blocks = predict_blocks(predictor, {path: source}, partial, f"{weights} {file_identity(file)} {path}")
            prediction = assembled(source.shape, ((box, part) for _, box, part in blocks))
            offsets = predictor.header["offsets"]
            label = segment(prediction.affinity, prediction.foreground, offsets, segmenter, **parameters)
            _write_label(target, label, image)
        partial.unlink()
        print(f"{path}: {int(label.max())} objects")


def _segmenter(arguments: argparse.Namespace, header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Choose how to segment: as the weights were tuned, but for what is given."""
    from gdlib.registry import nearest
    from gdlib.segmentation import defaults, is_masked

    tuned = header["segmentation"]
    segmenter = arguments.segmenter or _main_segmenter(header)
    if is_masked(segmenter):
        usable = ", ".join(name for name in tuned if not is_masked(name)) or "mutex_watershed"
        raise ValueError(
            f"{segmenter} needs the foreground of a ground truth, which an image that is to be segmented does not have; "
            f"choose --segmenter {usable}"
        )
    valid = defaults(segmenter, len(header["offsets"][0]))
    if segmenter not in tuned:
        print(
            f"{segmenter} was not tuned with these weights, only {', '.join(tuned)}: what is not given has its default value",
            file=sys.stderr,
        )
    given = dict(arguments.set)
    for name in ("foreground_threshold", "min_size"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    for name in given:
        if name not in valid:
            raise ValueError(f'{segmenter} has no parameter "{name}": {nearest(name, list(valid))}')
    return segmenter, tuned.get(segmenter, {}) | given


def _main_segmenter(header: dict[str, Any]) -> str:
    """The one the weights were chosen with; the order of `segmentation` is lost in the file."""
    return header.get("run", {}).get("segmenters", list(header["segmentation"]))[0]


@contextlib.contextmanager
def _open_image(path: Path | str, channels: int) -> Iterator[Any]:
    """Yield the array of an image file, or an open dataset of an HDF5 file, which is read piece by piece."""
    from gdlib.data.files import open_volume, read_image

    if _is_hdf5(path):
        with open_volume(path) as volume:
            yield volume
    else:
        yield read_image(path, channels)


@contextlib.contextmanager
def _open_label(path: Path | str) -> Iterator[Any]:
    from gdlib.data.files import open_volume, read_label

    if _is_hdf5(path):
        with open_volume(path) as volume:
            yield volume
    else:
        yield read_label(path)


def _is_hdf5(path: Path | str) -> bool:
    from gdlib.data.files import HDF5_SUFFIXES, split_h5_path

    return split_h5_path(path)[0].suffix.lower() in HDF5_SUFFIXES


def _target(folder: Path, file: Path, image: Any) -> Path:
    """Return where the label of an image goes; never over the image itself."""
    import h5py

    target = folder / f"{file.stem}{'.h5' if isinstance(image, h5py.Dataset) else '.tif'}"
    if target.resolve() == file.resolve():
        raise io.DataError(f"{file}: its label would be written over it; choose another folder for --out")
    return target


def _write_label(target: Path, label: np.ndarray, image: Any) -> None:
    import tifffile

    if target.suffix == ".tif":
        with io.atomic(target) as temporary:
            tifffile.imwrite(temporary, label, compression="zlib", photometric="minisblack")
        return
    name = image.name.strip("/")
    with io.create_h5(target) as file:
        io.put(file, name, label, io.BLOCK if label.ndim == 3 else None)
        for key in ("resolution", "offset", "element_size_um"):  # where the voxels are
            if key in image.attrs:
                file[name].attrs[key] = image.attrs[key]


def _evaluate(arguments: argparse.Namespace) -> None:
    import csv

    from gdlib.data.files import find_files, split_h5_path
    from gdlib.metrics import evaluate

    def files(path: str) -> dict[str, Path | str]:
        return find_files(Path(path)) if Path(path).is_dir() else {split_h5_path(path)[0].stem: path}

    labels, segmentations = files(arguments.labels), files(arguments.segmentations)
    if not any(Path(path).is_dir() for path in (arguments.labels, arguments.segmentations)):
        segmentations = dict(zip(labels, segmentations.values(), strict=True))
    for name, path in labels.items():
        if name not in segmentations:
            raise io.DataError(f'{path}: there is no segmentation called "{name}" in {arguments.segmentations}; add it')
    rows = []
    for name, path in labels.items():
        with _open_label(path) as label, _open_label(segmentations[name]) as segmentation:
            try:
                scores = evaluate(label, segmentation)
            except ValueError as error:
                raise io.DataError(f"{path} and {segmentations[name]}: {error}") from None
        rows.append({"sample": name} | scores)
    keys = list(rows[0])
    mean = {"sample": "mean"} | {key: sum(row[key] for row in rows) / len(rows) for key in keys[1:]}
    table = [[row[key] for key in keys] for row in (*rows, mean)]
    if arguments.out:
        io.write_rows(arguments.out, keys, table)
    else:
        writer = csv.writer(sys.stdout)
        writer.writerow(keys)
        writer.writerows([[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in table])


def _info(arguments: argparse.Namespace) -> None:
    header = io.read_header(arguments.weights)
    if arguments.json:
        print(json.dumps(header, indent=2, sort_keys=True))
        return
    run = header["run"]
    terms = [f"{t['weight']:g} x {t['term']}{' (memory)' if t['memory'] else ''}" for t in run["terms"]]
    ndim = len(header["offsets"][0])
    shown = ("aji", "pq", "f1_50", "dice") if ndim == 2 else ("voi_split", "voi_merge", "voi", "arand")
    lines = [
        ("network", f"{run['network']} ({header['model']} {header['options']})"),
        (
            "input",
            f"{header['channels']} channel(s), {ndim}D, percentiles {header['normalisation']['lower']} to "
            f"{header['normalisation']['upper']} become 0 to 1",
        ),
        (
            "trained on",
            f"{run['dataset']}, {run['recipe']['steps']} steps of {run['recipe']['batch_size']} patches of "
            f"{'x'.join(map(str, run['recipe']['patch']))} pixels, seed {run['seed']}",
        ),
        ("weights of", f"step {header['step']}, the best on the validation images"),
        ("method", f"{run['method']}" + (f": supervised + {' + '.join(terms)}" if terms else "")),
    ]
    main = _main_segmenter(header)
    for segmenter in sorted(header["segmentation"], key=lambda name: name != main):  # the main one first
        parameters = ", ".join(f"{k} {v}" for k, v in header["segmentation"][segmenter].items())
        scores = header["validation"].get(segmenter, {})
        lines.append(("segmentation", f"{segmenter}: {parameters}"))
        lines.append(("validation", f"{segmenter}: " + ", ".join(f"{k} {scores[k]:.4f}" for k in shown if k in scores)))
    made = f"gdlib {header['gdlib']}, torch {header['torch']}, {header['device']}, {header['precision']}"
    for key, value in [*lines, ("made by", made)]:
        print(f"{key:13} {value}")


def _catalogue(path: Path) -> Any:
    import yaml

    from gdlib.config import Config

    try:
        return Config.parse(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not a YAML file: {error}") from None


def _download(arguments: argparse.Namespace) -> None:
    from gdlib.config import ConfigError
    from gdlib.data.download import download
    from gdlib.registry import nearest

    config = _catalogue(arguments.config)
    if arguments.to:
        config = config.model_copy(update={"raw_folders": (str(arguments.to),)})
    for name in arguments.names:
        if name not in config.datasets:
            raise ValueError(
                f'{arguments.config}: there is no dataset "{name}": {nearest(name, list(config.datasets))}'
            )
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
            print(f"{folder}: is already there" if folder else f"{name}: is made here, there is nothing to download")


def _models(arguments: argparse.Namespace) -> None:
    from gdlib import registry
    from gdlib.models import build
    from gdlib.profile import count_macs, count_parameters, network_table

    config = _catalogue(arguments.config)
    networks = [
        (role, name, network, registry.axes(network.model) or build(network.model, network.options).ndim)
        for role, group in (("teacher", config.teachers), ("student", config.students))
        for name, network in group.items()
    ]
    if arguments.markdown:
        print(network_table((name, n.title, role, n.model, n.options) for role, name, n, _ in networks))
        return
    shapes = {2: (544, 544), 3: (32, 256, 256)}
    if arguments.shape:
        shapes = {len(arguments.shape): tuple(arguments.shape)}
    known = sorted({ndim for *_, ndim in networks})
    if not set(shapes) & set(known):
        raise ValueError(
            f"{arguments.config}: networks take images with {' or '.join(map(str, known))} axes, not {arguments.shape}"
        )
    print(f"{'name':16} {'role':8} {'parameters':>12} {'of them head':>12} {'GMACs':>10} at")
    for role, name, network, ndim in networks:
        if shape := shapes.get(ndim):
            count = count_parameters(network.model, network.options)
            macs = count_macs(network.model, network.options, shape)
            size = "x".join(map(str, shape))
            print(f"{name:16} {role:8} {count['total']:12,d} {count['foreground']:12,d} {macs / 1e9:10.2f} {size}")
