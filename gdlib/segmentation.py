"""From affinities to instances (numpy only, 2D and 3D): the segmenters, and how their parameters are chosen.

| segmenter | what it does | what is left to choose |
|---|---|---|
| `mutex_watershed` | visits all edges, the strongest first: short ones attract with a, long ones repel with 1 - a | |
| `waterz` | joins touching fragments, the pair of highest mean affinity first | where to stop: `threshold` |
| `multicut` | cuts the graph of touching fragments where this costs least | what an edge of affinity 1/2 costs: `beta` |
| `mutex_watershed_masked` | the mutex watershed, told by the ground truth what is foreground | |

`waterz` and `multicut` use the affinities of nearest neighbours only, and start from the same fragments: a watershed in
every section, in 2D the one there is. All partition the foreground alone; a `foreground_threshold` of 0 makes everything
foreground, as it should be where objects fill the whole image. A segmenter whose name ends in `_masked` gets the foreground of
the ground truth in place of the predicted one, as the Leaf Segmentation Challenge hands it out; it judges how objects are told
apart, and cannot be used on images without ground truth. A new segmenter is one function, one entry of `SEGMENTERS` at the end
of this file, and one of `PARAMETERS` in `gdlib/parameters.py`.
"""

import contextlib
import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import bioimage_cpp as bic
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.morphology import local_maxima
from skimage.segmentation import watershed

from gdlib import mutex, scores
from gdlib.metrics import is_better
from gdlib.mutex import as_float, mutex_watershed
from gdlib.parameters import check_offsets, checked, defaults, grid, is_masked

Offsets = Sequence[Sequence[int]]
Prediction = tuple[np.ndarray, np.ndarray]  # affinity, foreground


def segment(
    affinity: np.ndarray,
    foreground: np.ndarray,
    offsets: Offsets,
    segmenter: str = "mutex_watershed",
    **parameters: Any,
) -> np.ndarray:
    """Partition the foreground into instances.

    Args:
        affinity: (K, [Z,] Y, X), uint8 in [0, 255] or float in [0, 1]; the first n channels (n = number of axes) attract.
        foreground: ([Z,] Y, X), same type, probability of "belongs to an object"; for a masked segmenter of any type, the truth,
            0 outside of all objects.
        offsets: K displacements in array order.
        segmenter: a key of `SEGMENTERS`.
        parameters: of the segmenter; those left out have the values of `defaults`. They are
            `foreground_threshold`: pixels with at least this probability are partitioned;
            `min_fragment`: smaller segments go to the neighbours that they touch, in pixels;
            `min_size`: segments that are still smaller are removed, in pixels;
            `stride` (mutex_watershed): use repulsive edges only at every so many pixels of the last two axes, above 1 is
            faster and splits less; `exponent` (mutex_watershed): power of the affinities that attract, above 1 joins less;
            `threshold` (waterz): fragments are joined while 1 - mean affinity is below it;
            `beta` (multicut): in (0, 1), above 0.5 splits more.

    Returns:
        ([Z,] Y, X) uint32, consecutive from 1, 0 = background.

    Raises:
        ValueError: an unknown segmenter or parameter, a value outside of its range (see `gdlib.parameters`), offsets it cannot
            use, or its package is not installed.
    """
    parameters = defaults(segmenter, foreground.ndim) | checked(segmenter, parameters)
    return _Image(affinity, foreground, offsets, segmenter)(**parameters)


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
        metric: what to optimise, a key of `metrics.METRICS`, by its `scores.worth`: the mean over the images with objects,
            and what was found in those without.
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
    """Scores of images together (`scores.mean`) for one choice of parameters; those left out have their default."""
    parameters = defaults(segmenter, labels[0].ndim) | checked(segmenter, parameters)
    return _mean_scores(_images(predictions, labels, offsets, segmenter), labels, ignores, parameters)


def used(segmenter: str, offsets: Offsets) -> Offsets:
    """Return those offsets whose affinities a segmenter looks at: waterz and multicut, those of nearest neighbours alone."""
    return offsets if segmenter.startswith("mutex_watershed") else offsets[: len(offsets[0])]


class _Image:
    """One prediction, to be segmented again and again: what the changed parameters do not touch is kept."""

    def __init__(self, affinity: np.ndarray, foreground: np.ndarray, offsets: Offsets, segmenter: str) -> None:
        check_offsets(segmenter, offsets)
        self.prediction = affinity, foreground, offsets
        self.prepare = SEGMENTERS[segmenter].prepare
        keywords = inspect.signature(self.prepare).parameters.values()
        self.slow_names = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY]
        self.slow: dict[str, Any] | None = None

    def __call__(self, *, min_fragment: int, min_size: int, **parameters: Any) -> np.ndarray:
        slow = {name: parameters.pop(name) for name in self.slow_names}
        if slow != self.slow:
            self.finish = self.prepare(*self.prediction, **slow)
            self.slow = slow
        return _without_small(self.finish(**parameters), min_fragment, min_size)


def _images(
    predictions: Sequence[Prediction], labels: Sequence[np.ndarray], offsets: Offsets, segmenter: str
) -> Iterator[_Image]:
    for (affinity, foreground), label in zip(predictions, labels, strict=True):
        yield _Image(affinity, label > 0 if is_masked(segmenter) else foreground, offsets, segmenter)


def _mean_scores(
    images: Iterable[_Image],
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


def _without_small(label: np.ndarray, min_fragment: int, min_size: int) -> np.ndarray:
    """Give segments below `min_fragment` to touching larger ones, then remove what is below `min_size`."""
    size = np.bincount(label.ravel())
    small = size < min_fragment
    small[:1] = False
    if small.any():
        kept = np.where(small[label], 0, label).astype(np.int32)
        # Flooding without relief reaches exactly the small segments that are connected to a kept one.
        flooded = watershed(np.zeros(label.shape, np.uint8), kept, mask=label > 0)
        label = np.where(flooded > 0, flooded, label)
        size = np.bincount(label.ravel())
    wanted = (size >= min_size) & (size > 0)
    wanted[:1] = False
    return np.where(wanted, np.cumsum(wanted), 0).astype(np.uint32)[label]


def _mutex_watershed(
    affinity: np.ndarray,
    foreground: np.ndarray,
    offsets: Offsets,
    *,
    foreground_threshold: float,
    stride: int,
    exponent: float,
) -> Callable[[], np.ndarray]:
    """Wolf et al., The Mutex Watershed, ECCV 2018."""
    label = mutex_watershed(affinity, as_float(foreground) >= foreground_threshold, offsets, stride, exponent)
    return lambda: label


def _mutex_watershed_masked(
    affinity: np.ndarray, foreground: np.ndarray, offsets: Offsets, *, stride: int, exponent: float
) -> Callable[[], np.ndarray]:
    """Partition where the truth has objects."""
    return _mutex_watershed(
        affinity, foreground > 0, offsets, foreground_threshold=1.0, stride=stride, exponent=exponent
    )


def _waterz(
    affinity: np.ndarray, foreground: np.ndarray, offsets: Offsets, *, foreground_threshold: float
) -> Callable[..., np.ndarray]:
    """Funke et al., Large Scale Image Segmentation with Structured Loss Based Deep Learning, IEEE TPAMI 41(7), 2019.

    PAPER: the original sorts the pairs into 256 bins of affinity and joins those of one bin in any order. Here the
    order is exact, which costs no measurable time.
    """
    try:
        import waterz
    except ModuleNotFoundError:
        raise ValueError(
            'the segmenter "waterz" needs the package waterz: pip install "gdlib[em]", or choose another segmenter'
        ) from None
    ndim = foreground.ndim
    near = as_float(affinity[:ndim])
    fragments = _fragments(near, as_float(foreground) >= foreground_threshold)
    volume = (1,) * (3 - ndim) + fragments.shape
    near = np.concatenate([np.zeros((3 - ndim, *fragments.shape), np.float32), near]).reshape(3, *volume)
    with _silence():
        # Joins all that touch, and tells the order: every threshold is then a look-up. It writes into the fragments.
        ((_, history),) = waterz.agglomerate(
            near, [2.0], fragments=fragments.astype(np.uint64).reshape(volume), return_merge_history=True
        )
    pairs = np.array([(merge["a"], merge["b"]) for merge in history], np.int64).reshape(-1, 2)
    # waterz stops at the first score that is too high, even if rounding has put a lower one behind it.
    scores = np.maximum.accumulate(np.array([merge["score"] for merge in history], np.float32))
    count = int(fragments.max(initial=0)) + 1

    def finish(threshold: float) -> np.ndarray:
        u, v = pairs[: np.searchsorted(scores, np.float32(threshold))].T
        joined = coo_array((np.ones(u.size, bool), (u, v)), shape=(count, count))
        return _project(connected_components(joined, directed=False)[1], fragments)

    return finish


def _multicut(
    affinity: np.ndarray, foreground: np.ndarray, offsets: Offsets, *, foreground_threshold: float
) -> Callable[..., np.ndarray]:
    """Beier et al., Multicut brings automated neurite segmentation closer to human performance, Nature Methods 14, 2017.

    An edge of mean affinity a and n pixels costs n / max n (log(a / (1 - a)) + log((1 - beta) / beta)) to cut. Solved by
    joining the most attractive pairs first (Keuper et al., ICCV 2015).
    PAPER: the original goes on from there with Kernighan-Lin. On 20 x 448 x 448 voxels with noise, 88,000 fragments, that
    lowered the cost by 0.1 %, moved VOI by less than 0.002, upwards, and took 7 to 17 times longer (Intel Xeon).
    """
    near = as_float(affinity[: foreground.ndim])
    fragments = _fragments(near, as_float(foreground) >= foreground_threshold)
    touching = bic.graph.region_adjacency_graph(fragments, number_of_threads=1)
    mean, size = bic.graph.features.affinity_features(
        touching, fragments, near, offsets[: len(near)], number_of_threads=1
    ).T
    ends = touching.uv_ids()
    kept = (ends > 0).all(1)  # the background is no fragment
    graph = bic.graph.UndirectedGraph.from_unique_edges(touching.number_of_nodes, ends[kept])
    mean, size = np.clip(mean[kept], 0.001, 0.999), size[kept]

    def finish(beta: float) -> np.ndarray:
        cost = np.log(mean / (1 - mean)) + np.log1p(-beta) - np.log(beta)
        objective = bic.graph.multicut.MulticutObjective(graph, cost * size / size.max(initial=1))
        return _project(bic.graph.multicut.GreedyAdditiveMulticut().optimize(objective), fragments)

    return finish


def _fragments(near: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Cut every section into pieces that are each a part of one object, by a watershed on a map of the boundaries.

    The seeds are where the distance to a boundary is highest. What no seed reaches stays background.

    PAPER: the original sees of each pixel's edges along an axis only the one before it, and of two touching objects thus
    but one side of their boundary, so that fragments spill over it: with affinities without error it joins such objects.

    Args:
        near: (n, [Z,] Y, X) affinities of nearest neighbours.
        mask: ([Z,] Y, X), what to cut.

    Returns:
        ([Z,] Y, X) uint32, consecutive from 1, 0 = background.
    """
    boundary = 1 - (_weaker_edge(near, -2) + _weaker_edge(near, -1)) / 2
    fragments = np.zeros(mask.shape, np.uint32)
    count = 0
    sections = (-1, *mask.shape[-2:])
    for height, inside, out in zip(
        boundary.reshape(sections), mask.reshape(sections), fragments.reshape(sections), strict=True
    ):
        interior = (height < 0.5) & inside
        peaks = interior
        if not interior.all():  # else there is nothing to be far from
            peaks = interior & local_maxima(bic.distance.distance_transform(interior), connectivity=1)
        seeds = bic.segmentation.label(peaks, connectivity=1).astype(np.uint32)
        out[:] = bic.segmentation.watershed(height, seeds, mask=inside)
        out[out > 0] += count
        count += int(seeds.max(initial=0))
    return fragments


def _weaker_edge(near: np.ndarray, axis: int) -> np.ndarray:
    """Return for every pixel the lower affinity of the two along an axis; edges that leave the image do not count."""
    before = np.moveaxis(near[axis], axis, 0).copy()
    before[0] = 1
    weaker = before.copy()
    np.minimum(before[:-1], before[1:], out=weaker[:-1])
    return np.moveaxis(weaker, 0, axis)


def _project(group: np.ndarray, fragments: np.ndarray) -> np.ndarray:
    """Name every pixel by the group of its fragment; fragment 0 stays 0."""
    group = group.astype(np.int64) + 1
    group[0] = 0
    return group[fragments]


_PRINTING = threading.Lock()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what is printed: by Python, and by compiled code, which knows the file descriptor alone."""
    with _PRINTING, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        printed = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(printed, 1)
            os.close(printed)


@dataclass(frozen=True)
class Segmenter:
    """One way from affinities to instances, in two stages: tuning repeats the slow one only where it must.

    Attributes:
        title: as printed.
        prepare: takes affinity, foreground and offsets as `segment` does, and by keyword the parameters that make it work
            again; returns a function of the other parameters, without `min_fragment` and `min_size`, that returns the label
            ([Z,] Y, X) int64.
        memory: takes the number of axes and of channels, and by keyword the parameters; returns how many bytes per pixel it takes
            besides the prediction, where all pixels are foreground.
    """

    title: str
    prepare: Callable[..., Callable[..., np.ndarray]]
    memory: Callable[..., float] = lambda *_, **__: 100.0  # measured


SEGMENTERS: dict[str, Segmenter] = {
    "mutex_watershed": Segmenter("mutex watershed", _mutex_watershed, mutex.memory),
    "waterz": Segmenter("waterz", _waterz),
    "multicut": Segmenter("multicut", _multicut),
    "mutex_watershed_masked": Segmenter(
        "mutex watershed in the true foreground", _mutex_watershed_masked, mutex.memory
    ),
}
