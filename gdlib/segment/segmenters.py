"""From affinities to instances, in 2D and 3D: the segmenters, and how their parameters
are chosen.

| segmenter | what it does | what is left to choose |
|---|---|---|
| `mutex_watershed` | visits all edges, the strongest first: short ones attract with a, | |
| | long ones repel with 1 - a | |
| `waterz` | joins touching fragments, the pair of highest | where to stop: `threshold` |
| | mean affinity first | |
| `multicut` | cuts the graph of touching fragments where this | what an edge of affinity 1/2 |
| | costs least | costs: `beta` |
| `mutex_watershed_masked` | the mutex watershed, told by the ground truth what is foreground | |

`waterz` and `multicut` use the affinities of nearest neighbours only, and start from the same
fragments: a watershed in every section, in 2D the one there is. All partition the foreground alone;
a `foreground_threshold` of 0 makes everything foreground, as it should be where objects fill the
whole image. A segmenter whose name ends in `_masked` gets the foreground of the ground truth in
place of the predicted one, as the Leaf Segmentation Challenge hands it out; it judges how objects
are told apart, and cannot be used on images without ground truth. A new segmenter is one function,
one entry of `SEGMENTERS` at the end of this file, and one of `PARAMETERS` in
`gdlib/segment/parameters.py`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdlib.segment import mutex
from gdlib.segment.agglomerate import by_multicut, by_waterz
from gdlib.segment.mutex import as_float, mutex_watershed
from gdlib.segment.parameters import check_offsets, checked, defaults
from gdlib.types import Offsets

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
        affinity: (K, [Z,] Y, X), uint8 in [0, 255] or float in [0, 1]; the first n channels (n =
            number of axes) attract.
        foreground: ([Z,] Y, X), same type, probability of "belongs to an object"; for a masked
            segmenter of any type, the truth, 0 outside of all objects.
        offsets: K displacements in array order.
        segmenter: a key of `SEGMENTERS`.
        parameters: of the segmenter; those left out have the values of `defaults`. They are
            `foreground_threshold`: pixels with at least this probability are partitioned;
            `min_fragment`: smaller segments go to the neighbours that they touch, in pixels;
            `min_size`: segments that are still smaller are removed, in pixels; `stride`
            (mutex_watershed): use repulsive edges only at every so many pixels of the last two
            axes, above 1 is faster and splits less; `exponent` (mutex_watershed): power of the
            affinities that attract, above 1 joins less; `threshold` (waterz): fragments are joined
            while 1 - mean affinity is below it; `beta` (multicut): in (0, 1), above 0.5 splits
            more.

    Returns:
        ([Z,] Y, X) uint32, consecutive from 1, 0 = background.

    Raises:
        ValueError: an unknown segmenter or parameter, a value outside of its range (see
            `gdlib.segment.parameters`), offsets it cannot use, or its package is not installed.
    """
    parameters = defaults(segmenter, foreground.ndim) | checked(segmenter, parameters)
    return Prepared(affinity, foreground, offsets, segmenter)(**parameters)


def used(segmenter: str, offsets: Offsets) -> Offsets:
    """Return those offsets whose affinities a segmenter looks at: waterz and multicut, those of
    nearest neighbours alone.
    """
    return offsets if segmenter.startswith("mutex_watershed") else offsets[: len(offsets[0])]


def stride(segmenter: str, parameters: Mapping[str, Any]) -> int:
    """Return every how many rows a segmenter looks at affinities other than those of nearest
    neighbours: `Blockwise.stride` of the predictor.
    """
    return int(parameters["stride"]) if segmenter.startswith("mutex_watershed") else 1


class Prepared:
    """One prediction, to be segmented again and again: what the changed parameters do not touch is
    kept.
    """

    def __init__(
        self, affinity: np.ndarray, foreground: np.ndarray, offsets: Offsets, segmenter: str
    ) -> None:
        check_offsets(segmenter, offsets)
        self.prediction = affinity, foreground, offsets
        self.prepare = SEGMENTERS[segmenter].prepare
        keywords = inspect.signature(self.prepare).parameters.values()
        self.slow_names = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY]
        self.slow: dict[str, Any] | None = None

    def __call__(self, *, min_fragment: int, min_size: int, **parameters: Any) -> np.ndarray:
        """Segment it with these parameters; for those of `segment` see there."""
        slow = {name: parameters.pop(name) for name in self.slow_names}
        if slow != self.slow:
            self.finish = self.prepare(*self.prediction, **slow)
            self.slow = slow
        return _without_small(self.finish(**parameters), min_fragment, min_size)


def _without_small(label: np.ndarray, min_fragment: int, min_size: int) -> np.ndarray:
    """Give segments below `min_fragment` to touching larger ones, then remove what is below
    `min_size`.
    """
    from gdlib.segment.fragments import given_away, sizes

    label = label.astype(np.int64, order="C")
    size = sizes(label)
    small = size < min_fragment
    small[:1] = False
    if small.any():
        label = given_away(label, small)
        size = sizes(label)
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
    label = mutex_watershed(
        affinity, as_float(foreground) >= foreground_threshold, offsets, stride, exponent
    )
    return lambda: label


def _mutex_watershed_masked(
    affinity: np.ndarray, foreground: np.ndarray, offsets: Offsets, *, stride: int, exponent: float
) -> Callable[[], np.ndarray]:
    """Partition where the truth has objects."""
    return _mutex_watershed(
        affinity,
        foreground > 0,
        offsets,
        foreground_threshold=1.0,
        stride=stride,
        exponent=exponent,
    )


@dataclass(frozen=True)
class Segmenter:
    """One way from affinities to instances, in two stages: tuning repeats the slow one only where
    it must.

    Attributes:
        title: as printed.
        prepare: takes affinity, foreground and offsets as `segment` does, and by keyword the
            parameters that make it work again; returns a function of the other parameters, without
            `min_fragment` and `min_size`, that returns the label ([Z,] Y, X) int64.
        memory: takes the number of axes and of channels, and by keyword the parameters; returns how
            many bytes per pixel it takes besides the prediction, where all pixels are foreground.
    """

    title: str
    prepare: Callable[..., Callable[..., np.ndarray]]
    memory: Callable[..., float] = lambda *_, **__: 100.0  # measured


SEGMENTERS: dict[str, Segmenter] = {
    "mutex_watershed": Segmenter("mutex watershed", _mutex_watershed, mutex.memory),
    "waterz": Segmenter("waterz", by_waterz),
    "multicut": Segmenter("multicut", by_multicut),
    "mutex_watershed_masked": Segmenter(
        "mutex watershed in the true foreground", _mutex_watershed_masked, mutex.memory
    ),
}
