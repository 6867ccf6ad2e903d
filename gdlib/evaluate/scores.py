"""Scores of several images together: which images a mean is over, and what was found in those that
have no object.

Of an image without objects the metrics only say whether anything was found: AJI, Dice, F1 and the
like are 1 or 0, ARAND and VOI 0 in any case. In a mean one such image outweighs every difference
between networks, or hides a network that fills it with objects. Hence means are over the images
with objects, and what was found in the others is counted and stands apart.

Where something is chosen by scores (weights, parameters of a segmenter), objects in images without
any must count, but not more than what is wrong in other images: `worth` takes away, for every such
image, at most what a lost image would cost.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gdlib.evaluate.metrics import METRICS, Overlaps, Volume, overlaps

# of COUNTS, those that say something about images without objects
FALSE = ("false_objects", "false_pixels")


def _false_objects(table: Overlaps) -> int:
    return table.objects[1] - np.unique(table.pairs.j).size


def _false_pixels(table: Overlaps) -> int:
    return table.count[(table.i == 0) & (table.j > 0)].sum()


COUNTS: dict[str, tuple[str, Callable[[Overlaps], int]]] = {
    "objects": ("objects of the ground truth", lambda table: table.objects[0]),
    "object_pixels": ("their pixels", lambda table: table.label_sizes[1:].sum()),
    "false_objects": (
        "objects of the segmentation that share no pixel with any of the ground truth",
        _false_objects,
    ),
    "false_pixels": (
        "pixels of the segmentation's objects outside of all of the ground truth",
        _false_pixels,
    ),
    "pixels": ("all pixels that count", lambda table: table.count.sum()),
}


def of_image(label: Volume, segmentation: Volume, ignore: Volume | None = None) -> dict[str, float]:
    """Return every metric and every count of one image.

    Args:
        label: ([Z,] Y, X) ground truth, any integer type, 0 = background.
        segmentation: same shape, likewise.
        ignore: same shape, boolean; pixels that do not count.

    Returns:
        Value by key of `metrics.METRICS`, then of `COUNTS`; all finite.

    Raises:
        ValueError: shapes differ, values are not integers or an id is negative.

    >>> scores = of_image(np.zeros((1, 4), int), np.array([[0, 1, 1, 2]]))
    >>> scores["aji"], scores["objects"], scores["false_objects"], scores["false_pixels"]
    (0.0, 0.0, 2.0, 3.0)
    """
    table = overlaps(label, segmentation, ignore)
    known = {key: metric.compute for key, metric in METRICS.items()} | {
        key: one[1] for key, one in COUNTS.items()
    }
    return {key: float(compute(table)) for key, compute in known.items()}


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over the images with objects, and what was found in the
    others.

    Args:
        rows: from `of_image`, one per image.

    Returns:
        Value by key of `METRICS`. If there are images without objects, also `empty_images`, how
        many; the means of `FALSE` over them; and `false_share`, the mean over all images (0 for
        those with objects) of f / (f + m): f objects were found and an image with objects has m of
        them on average, or the same in pixels, whichever is more.

    Raises:
        ValueError: no image has objects.

    >>> nothing, one = np.array([[0, 0]]), np.array([[0, 1]])
    >>> pairs = ((one, one), (one, one), (nothing, nothing), (nothing, one))
    >>> scores = mean([of_image(*pair) for pair in pairs])
    >>> scores["aji"], scores["empty_images"], scores["false_objects"], scores["false_share"]
    (1.0, 2, 0.5, 0.125)
    >>> worth(scores, "aji")
    0.875
    """
    filled = [row for row in rows if row["objects"]]
    empty = [row for row in rows if not row["objects"]]
    if not filled:
        raise ValueError(
            "none of the images has an object: nothing can be measured; add images "
            "with labelled objects"
        )
    out = {key: float(np.mean([row[key] for row in filled])) for key in METRICS}
    if empty:
        sizes = {
            one: np.mean([row[own] for row in filled])
            for one, own in zip(FALSE, COUNTS, strict=False)
        }
        shares = [max(row[one] / (row[one] + size) for one, size in sizes.items()) for row in empty]
        out |= {"empty_images": len(empty)} | {
            key: float(np.mean([row[key] for row in empty])) for key in FALSE
        }
        out["false_share"] = float(np.sum(shares)) / len(rows)
    return out


def worth(scores: Mapping[str, float], metric: str) -> float:
    """Return what a choice is made by: the mean of a metric, made worse by what was found in images
    without objects.

    Args:
        scores: from `mean`.
        metric: a key of `METRICS`; values compare by `metrics.is_better`.

    Returns:
        The mean less its `false_share`, or more, where lower is better: an image that is filled
        with objects costs nearly what one of AJI 0 would. The mean itself where every image has
        objects.
    """
    share = scores.get("false_share", 0.0)
    return scores[metric] * (1 - share if METRICS[metric].better == "higher" else 1 + share)


def in_empty(scores: Mapping[str, float]) -> str:
    """Say what was found in images without objects, to be put behind other scores.

    Nothing where there are none.

    >>> in_empty({"empty_images": 1, "false_objects": 2.5, "false_pixels": 40.0})
    '; in 1 image without objects: 2.5 objects, 40 pixels'
    """
    if not (count := scores.get("empty_images")):
        return ""
    images = f"{count:.0f} image{'s' * (count > 1)} without objects" + " (means)" * (count > 1)
    return (
        f"; in {images}: {scores['false_objects']:.4g} objects, {scores['false_pixels']:.6g} pixels"
    )
