"""`gdlib quantise`: make a trained network compute in 8 bits, on images of its kind."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from gdlib import io
from gdlib.cli.images import open_image
from gdlib.io import outputs
from gdlib.limits import Count, Threads, argument, place
from gdlib.spread import spread

BLOCK = {2: 512, 3: (16, 160, 160)}  # largest sides of a part of an image, in pixels


def add_quantise(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib quantise` to the command line."""
    quantise = commands.add_parser(
        "quantise",
        help="make a trained network compute in 8 bits",
        description="Look at a trained network at work on images of its kind, and write a form of "
        "it that computes in 8 bits, NAME.int8.safetensors beside its weights. `gdlib segment` "
        "takes that where OpenVINO is installed and the processor has instructions for it; without "
        "the file, or with --precision float32, all is as before. Labels are not needed: it is "
        "said how far the objects agree with those of float32. Needs the extra: pip install "
        '"gdlib[quantise]".',
    )
    quantise.add_argument("weights", type=place, metavar="FILE", help="a weights file")
    quantise.add_argument(
        "images", nargs="+", metavar="IMAGE", help="as for `gdlib segment`: files, or folders"
    )
    quantise.add_argument(
        "--parts",
        type=argument(Count),
        default=24,
        help="of the images that are looked at, chosen evenly from all (default: 24)",
    )
    quantise.add_argument("--threads", type=argument(Threads), help="CPU threads (default: all)")
    quantise.add_argument("--overwrite", action="store_true", help=outputs.HELP)
    quantise.set_defaults(function=_quantise)


def _quantise(arguments: argparse.Namespace) -> None:
    from gdlib.data.files import expanded

    weights: Path = arguments.weights
    header = io.read_header(weights)
    io.check_header(weights, header)
    from gdlib.evaluate import scores
    from gdlib.evaluate.metrics import METRICS
    from gdlib.models import trained
    from gdlib.predict import int8
    from gdlib.predict.predictor import Predictor

    int8.check_installed()
    paths = expanded(arguments.images)
    out = io.int8_beside(weights)
    outputs.check(
        [outputs.Output(out, int8.is_own)], [weights, *paths], overwrite=arguments.overwrite
    )
    network, _ = trained(weights, *io.HEADER)
    predictor = Predictor(
        network,
        header,
        device="cpu",
        engine="openvino",
        precision="float32",
        block=None if network.halo is None else BLOCK[network.ndim],
    )
    with ExitStack() as stack:
        parts = _parts(predictor, paths, arguments.parts, stack)
        float32, seen = predictor.run, []

        def watched(image: Any) -> Any:
            seen.append(image.clone())
            return float32(image)

        predictor.run = watched
        wanted = _labels(predictor, weights, parts)
        if not any(label.any() for label in wanted):
            raise io.DataError(
                f"{paths[0]}: the network finds no object here, or in any other of these images; "
                "give images of the kind that it is for"
            )
        model = int8.quantised(predictor.network, header["channels"], seen)
        predictor.run = int8.compiled(model)
        found = _labels(predictor, weights, parts)
    ratio = _seconds(predictor.run, seen) / _seconds(float32, seen)
    means = scores.mean([scores.of_image(*pair) for pair in zip(wanted, found, strict=True)])
    keys = ("aji", "f1_50") if predictor.network.ndim == 2 else ("voi", "arand")
    agreement = {key: round(float(means[key]), 4) for key in keys}
    about = {"parts": len(parts), "agreement": agreement}
    int8.save(out, model, weights, predictor.network, header["channels"], predictor.basis, about)
    told = ", ".join(f"{METRICS[key].title} {value:.3f}" for key, value in agreement.items())
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB; in {len(parts)} parts of the images its "
        f"objects agree with those of float32 by {told}; the network takes {ratio:.2f} of the "
        "time; `gdlib segment` takes it from now on where it can"
    )


def _parts(predictor: Any, paths: Sequence[str], count: int, stack: ExitStack) -> list[Any]:
    """Return paths, images that stay open, as the network sees them, and a part of each."""
    from gdlib.data.frames import Frames

    found = []
    some = spread(paths, count)
    folder = Path(stack.enter_context(TemporaryDirectory()))  # for what is large and compressed
    for path in some:
        opened = open_image(path, predictor.network.ndim, predictor.header["channels"], folder)
        image, _ = stack.enter_context(opened)
        if isinstance(image, Frames):
            image = np.asarray(image[tuple(n // 2 for n in image.shape)])
        with _about(path):
            source = predictor.source(image)
        boxes = spread(predictor.blocks(source.shape), -(-count // len(some)))
        found += [(path, source, box) for box in boxes]
    return spread(found, count)


def _labels(predictor: Any, weights: Path, parts: Sequence[Any]) -> list[np.ndarray]:
    from gdlib.segment.parameters import chosen
    from gdlib.segment.segmenters import segment

    segmenter, parameters = chosen(weights, predictor.header, None, {})
    labels = []
    for path, source, box in parts:
        with _about(path):
            one = predictor.predict(source, box)
        offsets = predictor.header["offsets"]
        labels.append(segment(one.affinity, one.foreground, offsets, segmenter, **parameters))
    return labels


@contextmanager
def _about(path: str) -> Iterator[None]:
    try:
        yield
    except io.DataError as error:
        raise io.DataError(f"{path}: {error}") from None


def _seconds(run: Any, images: Sequence[Any]) -> float:
    start = time.process_time()
    for image in images:
        run(image)
    return time.process_time() - start
