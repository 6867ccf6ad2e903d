"""Parameters of a segmenter chosen on validation images."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gdlib.evaluate import scores
from gdlib.evaluate.metrics import is_better
from gdlib.segment.parameters import checked, defaults, grid, is_masked
from gdlib.segment.segmenters import Prediction, Prepared
from gdlib.types import Offsets


def tune(
    predictions: Sequence[Prediction],
    labels: Sequence[np.ndarray],
    offsets: Offsets,
    metric: str = "aji",
    segmenter: str = "mutex_watershed",
    ignores: Sequence[np.ndarray | None] | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Choose the parameters of a segmenter on validation images, one parameter after the other.

    Args:
        predictions: (affinity, foreground) of each image.
        labels: ground truth of each image.
        offsets: of the affinities.
        metric: what to optimise, a key of `metrics.METRICS`, by its `scores.worth`: the mean over
            the images with objects, and what was found in those without.
        segmenter: a key of `SEGMENTERS`.
        ignores: pixels of each image that do not count, or None where all count.

    Returns:
        The parameters, and the scores with them, as `scores.mean` returns them.

    Raises:
        ValueError: no image has objects.
    """
    ndim = labels[0].ndim
    images = list(_images(predictions, labels, offsets, segmenter))
    chosen = defaults(segmenter, ndim)
    best = _mean_scores(images, labels, ignores, chosen)
    for name, values in grid(segmenter, ndim).items():
        for value in values:
            if value == chosen[name]:
                continue
            trial = chosen | {name: value}
            result = _mean_scores(images, labels, ignores, trial)
            if is_better(metric, scores.worth(result, metric), scores.worth(best, metric)):
                chosen, best = trial, result
    return chosen, best


def score(
    predictions: Sequence[Prediction],
    labels: Sequence[np.ndarray],
    offsets: Offsets,
    parameters: dict[str, Any],
    segmenter: str = "mutex_watershed",
    ignores: Sequence[np.ndarray | None] | None = None,
) -> dict[str, float]:
    """Scores of images together (`scores.mean`) for one choice of parameters.

    Those left out have their default.
    """
    parameters = defaults(segmenter, labels[0].ndim) | checked(segmenter, parameters)
    return _mean_scores(
        _images(predictions, labels, offsets, segmenter), labels, ignores, parameters
    )


def _images(
    predictions: Sequence[Prediction],
    labels: Sequence[np.ndarray],
    offsets: Offsets,
    segmenter: str,
) -> Iterator[Prepared]:
    for (affinity, foreground), label in zip(predictions, labels, strict=True):
        yield Prepared(
            affinity, label > 0 if is_masked(segmenter) else foreground, offsets, segmenter
        )


def _mean_scores(
    images: Iterable[Prepared],
    labels: Sequence[np.ndarray],
    ignores: Sequence[np.ndarray | None] | None,
    parameters: dict[str, Any],
) -> dict[str, float]:
    ignores = [None] * len(labels) if ignores is None else ignores
    rows = [
        scores.of_image(label, image(**parameters), ignore)
        for image, label, ignore in zip(images, labels, ignores, strict=True)
    ]
    return scores.mean(rows)
