"""From affinities to instances (numpy only, 2D and 3D).

The mutex watershed visits all edges from the strongest to the weakest: short-range edges attract with weight a, long-range edges
repel with weight 1 - a; it has no threshold of its own. What remains to choose is tuned on validation images.
"""

from collections.abc import Sequence
from typing import Any

import bioimage_cpp
import numpy as np
from skimage.segmentation import relabel_sequential, watershed

from gdlib import metrics

DEFAULTS: dict[str, Any] = {"foreground_threshold": 0.5, "stride": 1, "min_size": 20}
GRID: dict[str, tuple] = {
    "foreground_threshold": (0.3, 0.4, 0.5, 0.6, 0.7),
    "stride": (1, 2, 4),
    "min_size": (10, 20, 40, 80),
}


def segment(
    affinity: np.ndarray,
    foreground: np.ndarray,
    offsets: Sequence[Sequence[int]],
    *,
    foreground_threshold: float = 0.5,
    stride: int = 1,
    min_size: int = 20,
) -> np.ndarray:
    """Partition the foreground by mutex watershed.

    Args:
        affinity: (K, [Z,] Y, X), uint8 in [0, 255] or float in [0, 1]; the first n channels (n = number of axes) attract.
        foreground: ([Z,] Y, X), same type, probability of "belongs to an object".
        offsets: K displacements in array order.
        foreground_threshold: pixels with at least this probability are partitioned.
        stride: use repulsive edges only at every so many pixels of the last two axes; above 1 is faster and splits less.
        min_size: smaller segments go to the neighbours they touch; alone they are removed. In pixels.

    Returns:
        ([Z,] Y, X) uint32, consecutive from 1, 0 = background.

    Reference: Wolf et al., The Mutex Watershed, ECCV 2018.
    """
    ndim = foreground.ndim
    foreground, affinity = _as_float(foreground), _as_float(affinity)
    mask = foreground >= foreground_threshold
    if not mask.any():
        return np.zeros(mask.shape, np.uint32)
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(mask))
    weight = affinity[(slice(None), *box)].copy()
    weight[ndim:] = 1 - weight[ndim:]
    strides = (1,) * (ndim - 2) + (stride, stride)
    inner = bioimage_cpp.segmentation.mutex_watershed(weight, offsets, ndim, strides=strides, mask=mask[box])
    label = np.zeros(mask.shape, np.uint32)
    label[box] = relabel_sequential(inner.astype(np.int64))[0]
    return _absorb_small(label, mask, min_size)


def _as_float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


def _absorb_small(label: np.ndarray, mask: np.ndarray, min_size: int) -> np.ndarray:
    """Give segments below `min_size` to touching larger ones, and remove those that touch none."""
    size = np.bincount(label.ravel())
    small = size < min_size
    small[0] = False
    if not small.any():
        return label
    kept = np.where(small[label], 0, label)
    # Flooding without relief reaches exactly the small segments that are connected to a kept one.
    kept = watershed(np.zeros(label.shape, np.uint8), kept.astype(np.int32), mask=mask)
    return relabel_sequential(kept)[0].astype(np.uint32)


def tune(
    predictions: Sequence[tuple[np.ndarray, np.ndarray]],
    labels: Sequence[np.ndarray],
    offsets: Sequence[Sequence[int]],
    metric: str = "aji",
) -> tuple[dict[str, Any], dict[str, float]]:
    """Choose the parameters of `segment` on validation images, one parameter after the other.

    Args:
        predictions: (affinity, foreground) of each image.
        labels: ground truth of each image.
        offsets: of the affinities.
        metric: what to optimise, a key of `metrics.METRICS`, as the mean over images.

    Returns:
        The parameters, and the mean of every metric with them.
    """
    chosen = dict(DEFAULTS)
    best = score(predictions, labels, offsets, chosen)
    for name, values in GRID.items():
        for value in values:
            if value == chosen[name]:
                continue
            trial = chosen | {name: value}
            result = score(predictions, labels, offsets, trial)
            if metrics.is_better(metric, result[metric], best[metric]):
                chosen, best = trial, result
    return chosen, best


def score(
    predictions: Sequence[tuple[np.ndarray, np.ndarray]],
    labels: Sequence[np.ndarray],
    offsets: Sequence[Sequence[int]],
    parameters: dict[str, Any],
) -> dict[str, float]:
    """Mean of every metric over images, for one choice of parameters."""
    rows = [
        metrics.evaluate(label, segment(*prediction, offsets, **parameters))
        for prediction, label in zip(predictions, labels, strict=True)
    ]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
