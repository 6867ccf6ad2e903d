"""`gdlib info`: what a weights file says of itself."""

import argparse
import json
from pathlib import Path
from typing import Any

from gdlib import io, trained
from gdlib.limits import place
from gdlib.segment.parameters import main_segmenter


def add_info(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib info` to the command line."""
    info = commands.add_parser(
        "info",
        help="say what a weights file is",
        description="Say what a weights file is, how it was trained, and how well it did on its "
        "validation images; of a built-in network, also what it is for, of which data with which "
        "licence it is, and how well it did on its test images.",
    )
    info.add_argument("weights", type=place, help="weights file, or a built-in network")
    info.add_argument("--json", action="store_true", help="print the whole header as JSON")
    info.set_defaults(function=_info)


def _info(arguments: argparse.Namespace) -> None:
    arguments.weights = trained.find(arguments.weights)
    header = io.read_header(arguments.weights)
    if arguments.json:
        print(json.dumps(header, indent=2, sort_keys=True))
        return
    try:
        io.check_header(arguments.weights, header)
        lines = _about(header) + _int8(arguments.weights)
    except (KeyError, TypeError) as error:
        raise io.DataError(
            f"{arguments.weights}: its header lacks what training writes into it ({error}); "
            "`--json` shows what there is"
        ) from error
    for key, value in lines:
        print(f"{key:13} {value}")


def _int8(weights: Path) -> list[tuple[str, str]]:
    """Say if there is a form of 8 bits beside the weights."""
    if io.is_onnx(weights) or not (path := io.int8_beside(weights)).is_file():
        return []
    about = io.read_header(path)
    scores = ", ".join(f"{key} {value}" for key, value in about.get("agreement", {}).items())
    text = f"{path.name}, made of {about.get('parts')} parts of images"
    return [("8 bits", f"{text}; objects agree with those of float32 by {scores}")]


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
        *((key, header[key]) for key in ("purpose", "data") if header.get(key)),
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
        *_sizes(header),
        ("weights of", f"step {header['step']}, the best on the validation images"),
        ("method", f"{run['method']}" + (f": supervised + {' + '.join(terms)}" if terms else "")),
    ]
    if "teacher" in header:
        lines.append(
            ("taught by", f"{header['teacher']['who']}, {header['teacher']['sha256'][:12]}")
        )
    main = main_segmenter(header)
    # the main one first
    for segmenter in sorted(header["segmentation"], key=lambda name: name != main):
        parameters = ", ".join(f"{k} {v}" for k, v in header["segmentation"][segmenter].items())
        scores = header["validation"].get(segmenter, {})
        lines.append(("segmentation", f"{segmenter}: {parameters}"))
        texts = [f"{key} {scores[key]:.4f}" for key in shown if key in scores]
        lines.append(("validation", f"{segmenter}: {', '.join(texts)}{in_empty(scores)}"))
    if test := header.get("test"):  # with the main segmenter, of the built-in networks
        texts = [f"{key} {test[key]:.4f}" for key in shown if key in test]
        lines.append(("test", f"{test['images']} image(s): {', '.join(texts)}"))
    made = (
        f"gdlib {header['gdlib']}, torch {header['torch']}, {header['device']}, "
        f"{header['precision']}"
    )
    return [*lines, ("made by", made)]


def _sizes(header: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how large things were in the training images, as far as that is known."""
    lines = []
    if "diameter" in header:
        least, median, most = header["diameter"]
        text = f"half are more than {median:g} pixels across, nine of ten {least:g} to {most:g}"
        lines.append(("objects", text))
    if "pixel_size" in header:
        sides = " x ".join(f"{side:g}" for side in header["pixel_size"])
        lines.append(("pixels", f"{sides} microns"))
    return lines


def _floor(normalisation: dict[str, Any]) -> str:
    if "contrast" not in normalisation:
        return "; so too in an image without objects: noise is stretched to the full range"
    return f", {' and '.join(f'{c:g}' for c in normalisation['contrast'])} times the noise or more"
