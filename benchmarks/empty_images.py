"""Images without objects: how far their contrast is from that of others, and what a network finds
in them.

    python benchmarks/empty_images.py contrast train.h5 val.h5
    python benchmarks/empty_images.py objects weights.safetensors test.h5

Both take sample files (`gdlib step prepare`), 2D, one channel. `contrast` prints the range of
images in standard deviations of their noise, of whole images, copies in 8 bits and crops. `objects`
counts what is found in images without objects, in their copies, in crops without objects and in
noise, as the weights say and without their least contrast, and scores all others.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from gdlib import io
from gdlib.data.intensity import intensity_range, pixel_noise
from gdlib.evaluate.metrics import evaluate
from gdlib.predict.predictor import Predictor
from gdlib.segment.parameters import main_segmenter
from gdlib.segment.segmenters import segment

SIDE = 128  # of a crop


def crops(sample: io.Sample) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield image and label of crops that touch each other."""
    height, width = sample.label.shape
    for y, x in itertools.product(
        range(0, height - SIDE + 1, SIDE), range(0, width - SIDE + 1, SIDE)
    ):
        box = slice(y, y + SIDE), slice(x, x + SIDE)
        yield sample.image[(slice(None), *box)], sample.label[box]


def eight_bits(image: np.ndarray) -> np.ndarray:
    """Return an image of 12 bits in 8; one of 8 bits as it is."""
    return image if image.dtype == np.uint8 else (image >> 4).astype(np.uint8)


def contrast(files: list[Path]) -> None:
    """Print the smallest contrast, its 5th percentile and its median."""

    def of(image: np.ndarray) -> float:
        low, high = intensity_range(image, 1.0, 99.8)
        return float((high - low)[0] / pixel_noise(image)[0])

    found: dict[str, list[float]] = {}
    for sample in itertools.chain.from_iterable(map(io.read_samples, files)):
        kind = "with objects" if sample.label.any() else "without objects"
        found.setdefault(f"images {kind}", []).append(of(sample.image))
        found.setdefault(f"8 bits, {kind}", []).append(of(eight_bits(sample.image)))
        for image, label in crops(sample):
            if not label.any() or (label > 0).mean() > 0.02:
                found.setdefault(
                    f"crops {'with' if label.any() else 'without'} objects", []
                ).append(of(image))
    print(f"{'':24} {'number':>6} {'smallest':>8} {'5 %':>8} {'median':>8}")
    for kind, values in sorted(found.items()):
        print(
            f"{kind:24} {len(values):6d} "
            + " ".join(f"{v:8.1f}" for v in np.percentile(values, (0, 5, 50)))
        )


def synthetic() -> dict[str, np.ndarray]:
    """Return images (1, Y, X) without objects."""
    rng, shape = np.random.default_rng(0), (1, 520, 696)
    noise = rng.normal(120, 6, shape)
    return {
        "noise, 16 bits": noise.round().astype(np.uint16),
        "noise, 8 bits": (noise / 16).round().astype(np.uint8),
        "noise, float": noise.astype(np.float32),
        "shot noise, 8 bits": rng.poisson(3, shape).astype(np.uint8),
        "noise, smoothed by 1 pixel": gaussian_filter(noise, (0, 1, 1)).astype(np.float32),
        "noise, smoothed by 2 pixels": gaussian_filter(noise, (0, 2, 2)).astype(np.float32),
        "dark": np.zeros(shape, np.uint16),
        "saturated, 8 bits": np.full(shape, 255, np.uint8),
        "saturated, 16 bits": np.full(shape, 65535, np.uint16),
        "constant, float": np.full(shape, 0.3, np.float32),
    }


def objects(weights: Path, path: Path) -> None:
    """Print how many objects there are, and the mean AJI of images that have some."""
    predictor = Predictor.load(weights, precision="float32")
    header = predictor.header
    segmenter = main_segmenter(header)

    def find(image: np.ndarray) -> np.ndarray:
        prediction = predictor(image)
        parameters = header["segmentation"][segmenter]
        return segment(
            prediction.affinity, prediction.foreground, header["offsets"], segmenter, **parameters
        )

    samples = list(io.read_samples(path))
    images = {kind: [image] for kind, image in synthetic().items()}
    for image in (sample.image for sample in samples if not sample.label.any()):
        copies = {
            "": image,
            ", 8 bits": eight_bits(image),
            ", float": (image / 4095).astype(np.float32),
        }
        for kind, copy in copies.items():
            images.setdefault(f"images without objects{kind}", []).append(copy)
    images["crops without objects"] = [
        i for sample in samples for i, label in crops(sample) if not label.any()
    ]
    learned = header["normalisation"]
    limits = {
        "as learned": learned,
        "no least contrast": {key: learned[key] for key in ("lower", "upper")},
    }
    for name, header["normalisation"] in limits.items():
        print(f"{name}: {header['normalisation']}")
        for kind, some in images.items():
            labels = [find(image) for image in some]
            share = np.mean([label > 0 for label in labels]) if labels else 0.0
            count = sum(int(label.max()) for label in labels)
            print(
                f"{kind:34} {len(some):4d} images, {count:5d} objects, {share:6.2%} of the pixels"
            )
        scores = [evaluate(s.label, find(s.image))["aji"] for s in samples if s.label.any()]
        print(
            f"{'images with objects':34} {len(scores):4d} images, AJI {np.mean(scores):.4f}",
            flush=True,
        )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(required=True, dest="what")
    what.add_parser("contrast").add_argument("files", nargs="+", type=Path)
    of_network = what.add_parser("objects")
    of_network.add_argument("weights", type=Path)
    of_network.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "contrast":
        contrast(arguments.files)
    else:
        objects(arguments.weights, arguments.file)


if __name__ == "__main__":
    main()
