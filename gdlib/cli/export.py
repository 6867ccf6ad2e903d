"""`gdlib export`: trained weights as files of other programs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from gdlib import io, trained
from gdlib.io import outputs
from gdlib.limits import Threads, argument, place

# ending, and what it is for
KINDS = {
    "onnx": ".onnx",
    "torchscript": ".pt",
    "bioimageio": ".zip",
}


def add_export(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib export` to the command line."""
    export = commands.add_parser(
        "export",
        help="write a trained network for other programs",
        description="Write a trained network as a file of other programs: with the normalisation "
        "of images in it, and affinities and foreground as its outputs. It is compared with torch "
        "before it is there. docs/export.md says what is in each file and how to run it.",
    )
    export.add_argument(
        "weights", type=place, metavar="NAME|FILE", help="a built-in network, or a weights file"
    )
    export.add_argument("--to", required=True, choices=KINDS, help="kind of file")
    export.add_argument("--out", required=True, type=place, metavar="FILE", help="where to write")
    export.add_argument(
        "--image",
        metavar="FILE",
        help="an image of the kind the network is for, with which it is tried, and which a package "
        "shows (default: a synthetic one)",
    )
    export.add_argument(
        "--license",
        default="MIT",
        metavar="SPDX",
        help="of the weights, for a package of bioimage.io, e.g. CC-BY-4.0 (default: that of the "
        "built-in networks, MIT)",
    )
    export.add_argument("--threads", type=argument(Threads), help="CPU threads (default: all)")
    export.add_argument("--overwrite", action="store_true", help=outputs.HELP)
    export.set_defaults(function=_export)


def _export(arguments: argparse.Namespace) -> None:
    weights = trained.find(arguments.weights)
    header = io.read_header(weights)
    io.check_header(weights, header)
    out: Path = arguments.out
    ending = KINDS[arguments.to]
    if out.suffix.lower() != ending:
        raise io.DataError(f"{out}: a file of this kind ends in {ending}; choose another --out")
    inputs = [weights, *([arguments.image] if arguments.image else [])]
    written = outputs.Output(out, outputs.is_export)
    outputs.check([written], inputs, overwrite=arguments.overwrite)
    from gdlib import export

    export.check_installed(arguments.to)
    image = _image(arguments.image, header)
    shown = arguments.image or "the synthetic image"
    difference = export.write(out, arguments.to, weights, image, arguments.license, shown)
    size = out.stat().st_size / 1e6
    print(
        f"{out}: {size:.1f} MB; of affinities and foreground, from 0 to 1, none differs from that "
        f"of torch by more than {difference:.1g}"
    )


def _image(path: str | None, header: dict[str, Any]) -> Any:
    """Read an image to try the network with, or make one."""
    from gdlib.data.files import read_image
    from gdlib.registry import SOURCES

    channels, ndim = header["channels"], len(header["offsets"][0])
    if path is not None:
        return read_image(path, channels)
    import numpy as np

    print("no --image is given: it is tried with a synthetic one", file=sys.stderr)
    name, count = {2: ("nuclei_phantom", "images"), 3: ("neurites_phantom", "volumes")}[ndim]
    counts = dict.fromkeys(("train", "val", "test"), 1)  # none is made before it is asked for
    sample = next(iter(SOURCES.make(name, None, **{count: counts})["train"]))
    return np.repeat(sample.image, channels, axis=0)
