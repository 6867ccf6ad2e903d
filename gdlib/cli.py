"""The command line: `gdlib segment`, `evaluate`, `info`, `models` for people, `gdlib step ...` for the workflow."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from gdlib import __version__, io

EXAMPLES = """examples:
  gdlib segment images/ --model weights.safetensors --out labels/
  gdlib evaluate ground_truth/ labels/ --out scores.csv
  gdlib info weights.safetensors
  gdlib models
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
        description="Segment images with trained weights. Every image gives one TIFF of the same name in the output folder: "
        "32-bit labels, 0 = background, 1, 2, ... = objects. It opens in napari and Fiji.",
    )
    segment.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG or TIFF files, or folders of them")
    segment.add_argument(
        "--model", required=True, type=Path, metavar="FILE", help="weights.safetensors of a trained network"
    )
    segment.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the labels")
    segment.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    segment.add_argument("--precision", default="auto", help="auto, float32, bfloat16, float16 (default: auto)")
    segment.add_argument("--threads", type=int, help="CPU threads (default: all)")
    segment.add_argument(
        "--block", type=int, default=1024, help="largest side computed at once, in pixels (default: 1024)"
    )
    segment.add_argument("--foreground-threshold", type=float, help="probability (default: tuned with the weights)")
    segment.add_argument("--min-size", type=int, help="pixels (default: tuned with the weights)")
    segment.set_defaults(function=_segment)

    evaluate = commands.add_parser(
        "evaluate",
        help="compare segmentations with the ground truth",
        description="Compare label images with ground truth of the same file name; every metric for every image, as CSV. "
        + _metric_help(),
        formatter_class=raw,
    )
    evaluate.add_argument("labels", type=Path, help="ground truth: a PNG or TIFF file, or a folder of them")
    evaluate.add_argument("segmentations", type=Path, help="the same for what is to be judged")
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
    models.add_argument("--shape", type=int, nargs="+", default=[544, 544], help="image size (default: 544 544)")
    models.set_defaults(function=_models)

    from gdlib.steps import add_steps

    add_steps(commands)
    return parser


def _metric_help() -> str:
    from gdlib.metrics import METRICS

    lines = [f"  {key:10} {m.definition} ({m.better} is better)" for key, m in METRICS.items()]
    return "\n\nmetrics:\n" + "\n".join(lines)


def _segment(arguments: argparse.Namespace) -> None:
    import tifffile
    from tqdm import tqdm

    from gdlib.data.files import find_files, read_image
    from gdlib.inference import Predictor
    from gdlib.segmentation import segment

    paths: list[Path] = []
    for path in arguments.images:
        paths += find_files(path).values() if path.is_dir() else [path]
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise io.DataError(
            f'two images are called "{twice}" and would be written to the same file; segment them separately'
        )
    predictor = Predictor.load(
        arguments.model, device=arguments.device, precision=arguments.precision, block=arguments.block
    )
    parameters = dict(predictor.header["segmentation"])
    for name in ("foreground_threshold", "min_size"):
        if getattr(arguments, name) is not None:
            parameters[name] = getattr(arguments, name)
    for path in tqdm(paths, unit="image", disable=None):
        image = read_image(path, predictor.header["channels"])
        try:
            prediction = predictor(image)
        except io.DataError as error:
            raise io.DataError(f"{path}: {error}") from None
        label = segment(prediction.affinity, prediction.foreground, predictor.header["offsets"], **parameters)
        with io.atomic(arguments.out / f"{path.stem}.tif") as temporary:
            tifffile.imwrite(temporary, label, compression="zlib", photometric="minisblack")
        print(f"{path}: {int(label.max())} objects")


def _evaluate(arguments: argparse.Namespace) -> None:
    import csv

    from gdlib.data.files import find_files, read_label
    from gdlib.metrics import evaluate

    def files(path: Path) -> dict[str, Path]:
        return find_files(path) if path.is_dir() else {path.stem: path}

    labels, segmentations = files(arguments.labels), files(arguments.segmentations)
    if arguments.labels.is_file() and arguments.segmentations.is_file():
        segmentations = dict(zip(labels, segmentations.values(), strict=True))
    for name, path in labels.items():
        if name not in segmentations:
            raise io.DataError(f'{path}: there is no segmentation called "{name}" in {arguments.segmentations}; add it')
    rows = []
    for name, path in labels.items():
        label, segmentation = read_label(path), read_label(segmentations[name])
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
    lines: dict[str, Any] = {
        "network": f"{run['network']} ({header['model']} {header['options']})",
        "input": f"{header['channels']} channel(s), {len(header['offsets'][0])}D, percentiles "
        f"{header['normalisation']['lower']} to {header['normalisation']['upper']} become 0 to 1",
        "trained on": f"{run['dataset']}, {run['recipe']['steps']} steps of {run['recipe']['batch_size']} patches of "
        f"{'x'.join(map(str, run['recipe']['patch']))} pixels, seed {run['seed']}",
        "weights of": f"step {header['step']}, the best on the validation images",
        "method": f"{run['method']}" + (f": supervised + {' + '.join(terms)}" if terms else ""),
        "segmentation": ", ".join(f"{k} {v}" for k, v in header["segmentation"].items() if v is not None),
        "validation": ", ".join(f"{k} {header['validation'][k]:.4f}" for k in ("aji", "pq", "f1_50", "dice")),
        "made by": f"gdlib {header['gdlib']}, torch {header['torch']}, {header['device']}, {header['precision']}",
    }
    for key, value in lines.items():
        print(f"{key:13} {value}")


def _models(arguments: argparse.Namespace) -> None:
    import yaml

    from gdlib.config import Config
    from gdlib.profile import count_macs, count_parameters

    try:
        config = Config.parse(yaml.safe_load(arguments.config.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{arguments.config}: not a YAML file: {error}") from None
    shape = tuple(arguments.shape)
    print(
        f"{'name':16} {'role':8} {'parameters':>12} {'of them head':>12} {'GMACs at ' + 'x'.join(map(str, shape)):>18}"
    )
    for role, networks in (("teacher", config.teachers), ("student", config.students)):
        for name, network in networks.items():
            count = count_parameters(network.model, network.options)
            macs = count_macs(network.model, network.options, shape)
            print(f"{name:16} {role:8} {count['total']:12,d} {count['foreground']:12,d} {macs / 1e9:18.2f}")


if __name__ == "__main__":
    sys.exit(main())
