"""Let a teacher find objects in images that nobody has labelled, for students to learn from.

Images are predicted and segmented by the code, and with the tuned parameters, of test images. What
comes out is an ordinary samples file: the teacher's instances are the label, and `ignore` marks
where it is unsure of them, see `unsure`.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io
from gdlib.kernels import overlap
from gdlib.predict.files import made_with, predict_split
from gdlib.predict.predictor import Predictor
from gdlib.segment.parameters import chosen
from gdlib.segment.segmenters import segment
from gdlib.types import Offsets


def unsure(
    label: np.ndarray,
    affinity: np.ndarray,
    foreground: np.ndarray,
    offsets: Offsets,
    sure: float,
) -> np.ndarray:
    """Mark where a teacher gives what was found less probability than `sure`.

    A pixel is marked if its own side is not likely enough: foreground inside of an instance, 1 -
    foreground outside. Nearest neighbours in two instances are marked, both, if 1 - affinity is
    not. Affinities within an instance are not looked at: losses balance pairs, so that they are low
    in a ring of several pixels at the border of every object, where most of it is right.

    Args:
        label: ([Z,] Y, X) instances.
        affinity: (K, [Z,] Y, X) uint8, see `gdlib.types.Prediction`.
        foreground: ([Z,] Y, X) uint8.
        offsets: K displacements, those to nearest neighbours first.
        sure: in [0, 1].

    Returns:
        ([Z,] Y, X) boolean.
    """
    bound = 255 * sure
    out = np.where(label > 0, foreground, 255 - foreground) < bound
    for a, offset in zip(affinity, offsets[: label.ndim], strict=False):
        here, there = overlap(offset, label.shape)
        one, other = label[here], label[there]
        doubtful = (one != other) & (one > 0) & (other > 0) & (255 - a[here] < bound)
        out[here] |= doubtful
        out[there] |= doubtful
    return out


def label_images(
    teacher: Path | str,
    samples: Path | str,
    out: Path | str,
    *,
    sure: float,
    segmenter: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    block: int | None = None,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Write images with the instances that a teacher finds in them.

    What was stopped goes on where it was: predictions wait in `.<name of out>.predictions` beside
    it until all instances are found.

    Args:
        teacher: its weights.
        samples: `.h5` of the images; labels, if there are any, are not looked at.
        out: `.h5` of samples.
        sure: see `unsure`.
        segmenter: None for the one that the weights were chosen with.
        parameters: of the segmenter, in place of the tuned ones.
        block: see `Predictor`; so are the others.
        engine: what runs the network.
        device: name, or `auto`.
        threads: images that are segmented at once.

    Raises:
        gdlib.io.DataError: one of the files cannot be used.
        ValueError: a segmenter or parameter that cannot be used.
    """
    out = Path(out)
    predictor = Predictor.load(teacher, block=block, engine=engine, device=device)
    segmenter, parameters = chosen(teacher, predictor.header, segmenter, parameters or {})
    offsets, digest = predictor.header["offsets"], io.sha256(teacher)
    predictions = out.with_name(f".{out.name}.predictions")

    def found(name: str) -> io.Sample:
        affinity, foreground = (
            io.read_array(predictions, name, part) for part in ("affinity", "foreground")
        )
        label = segment(affinity, foreground, offsets, segmenter, **parameters)
        ignore = unsure(label, affinity, foreground, offsets, sure)
        image = io.read_array(samples, name, "image")
        with io.open_h5(samples) as file:
            attrs = dict(file[name].attrs)
        print(
            f"{name}: {label.max()} instances, unsure in {100 * ignore.mean():.1f} % of the pixels"
        )
        return io.Sample(name, image, label, ignore, attrs)

    wanted = {
        "weights_sha256": digest,
        "samples_sha256": io.sha256(samples),
        "made_with": made_with(predictor),
    }
    if not _has(predictions, wanted):
        predict_split(predictor, samples, predictions, **wanted)
    about = {"teacher": digest, "segmenter": segmenter, "parameters": parameters, "sure": sure}
    with ThreadPoolExecutor(threads or 1) as pool:
        io.write_samples(out, pool.map(found, io.sample_ids(samples)), **about)
    predictions.unlink()


def _has(predictions: Path, wanted: Mapping[str, str]) -> bool:
    """Are there predictions with these attributes, of an earlier call that was stopped?"""
    try:
        return wanted.items() <= io.read_attrs(predictions).items()
    except io.DataError:  # there are none, or they are damaged
        return False
