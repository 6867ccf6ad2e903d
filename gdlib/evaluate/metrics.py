"""How good a segmentation is: every metric from one table of overlaps, in 2D and 3D, with numpy
alone.

`evaluate(label, segmentation)` returns all of `METRICS`, the dict at the end of this file; a new
metric is one function of the table and one entry there. The rules that hold for all of them:

* **Background** is the id 0, whether or not it occurs. Object ids are any positive integers up to
  64 bit, in any order; renaming them changes nothing.
* **A match** is a pair with IoU strictly above the threshold, which is at least 0.5. An object then
  has at most one match (Kirillov et al. 2019), so there is nothing to assign and nothing depends on
  the order. An IoU of exactly 0.5 is no match, because a label cut in two equal halves would match
  both. Hence `f1`, `f1_50` and `dq` are the same number.
* **Empty images** count: both maps without objects is a perfect result (1, or no error); only one
  of them without is the worst one for everything that counts objects or foreground (0; |DiC| is the
  number of objects). ARAND and VOI look only at pixels of label objects: without such pixels there
  is nothing to get wrong and they are 0, and a segmentation without objects is to them one segment
  that merges all. Every value is finite. For means see `gdlib.evaluate.scores`.
* **Ignored** pixels (`ignore`) are removed first, as if the image had never had them; their ids may
  even be negative.
* **Borders** have no rule of their own: every pixel counts, but to ARAND and VOI those of label 0,
  which is what lies between cells in many volumes. A margin around borders that shall not count is
  given as `ignore`.

PAPER: the original code's AJI depends on the order of the ids, its means leave out images whose
segmentation is empty, its best Dice takes the smallest id for the background, and one of its
evaluation scripts calls object F1 "Dice" and pixel Dice "F1". Here AJI and SBD follow their
definitions, all images with objects count, and names mean what they say.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np

THRESHOLDS = (50, 60, 70, 80, 90)  # IoU in percent
SLAB = 2**22  # pixels that are looked at together

Volume = Any  # an array, or what gives one when it is sliced, as an HDF5 dataset does


class PairCounts(NamedTuple):
    """The P pairs of a label object and a segmentation object that share pixels.

    Every field is a (P,) array.
    """

    i: np.ndarray
    j: np.ndarray
    intersection: np.ndarray
    union: np.ndarray
    iou: np.ndarray


@dataclass(frozen=True, eq=False)
class Overlaps:
    """The contingency table of a label and a segmentation, only where it is not zero.

    Attributes:
        label_ids: (N + 1,) uint64, sorted; the first is the background 0.
        segmentation_ids: (M + 1,) uint64, likewise.
        i: (K,) int64, position in `label_ids`; sorted by i, then j.
        j: (K,) int64, position in `segmentation_ids`.
        count: (K,) int64 > 0, pixels that `label_ids[i]` and `segmentation_ids[j]` share.
    """

    label_ids: np.ndarray
    segmentation_ids: np.ndarray
    i: np.ndarray
    j: np.ndarray
    count: np.ndarray

    @cached_property
    def label_sizes(self) -> np.ndarray:
        """(N + 1,) int64, pixels of every label id: the row sums."""
        return _sums(self.i, self.count, self.label_ids.size)

    @cached_property
    def segmentation_sizes(self) -> np.ndarray:
        """(M + 1,) int64, pixels of every segmentation id: the column sums."""
        return _sums(self.j, self.count, self.segmentation_ids.size)

    @cached_property
    def pairs(self) -> PairCounts:
        """The table without background."""
        both = (self.i > 0) & (self.j > 0)
        i, j, intersection = self.i[both], self.j[both], self.count[both]
        union = self.label_sizes[i] + self.segmentation_sizes[j] - intersection
        return PairCounts(i, j, intersection, union, intersection / union)

    @property
    def objects(self) -> tuple[int, int]:
        """Numbers of label objects N and of segmentation objects M."""
        return self.label_ids.size - 1, self.segmentation_ids.size - 1


def overlaps(label: Volume, segmentation: Volume, ignore: Volume | None = None) -> Overlaps:
    """Count the pixels that every label id shares with every segmentation id.

    The maps are read in slabs along the first axis, so that little memory is needed whatever their
    size.

    Args:
        label: ([Z,] Y, X) ground truth, any integer type, 0 = background, ids need not be
            consecutive.
        segmentation: same shape, likewise.
        ignore: same shape, boolean; pixels that do not count.

    Returns:
        The sparse table; every metric is a function of it.

    Raises:
        ValueError: shapes differ, values are not integers or an id is negative.

    >>> table = overlaps(np.array([[0, 7, 7, 7]]), np.array([[0, 0, 2, 2]]))
    >>> table.count.tolist(), table.pairs.iou.round(2).tolist()
    ([1, 1, 2], [0.67])
    """
    label, segmentation = (
        a if hasattr(a, "shape") else np.asarray(a) for a in (label, segmentation)
    )
    for name, other in (("segmentation", segmentation), ("ignore", ignore)):
        if other is not None and np.shape(other) != label.shape:
            raise ValueError(f"label has shape {label.shape} but {name} has {np.shape(other)}")
    # what an HDF5 dataset unpacks together is read together
    stored = (getattr(label, "chunks", None) or (1,))[0]
    rows = max(1, SLAB // max(1, stored * math.prod(label.shape[1:]))) * stored
    parts = []
    for start in range(0, max(1, label.shape[0]), rows):
        slab = slice(start, start + rows)
        table = _table(
            *_runs(label[slab], segmentation[slab], None if ignore is None else ignore[slab])
        )
        parts.append((table.label_ids[table.i], table.segmentation_ids[table.j], table.count))
    return _table(*map(np.concatenate, zip(*parts, strict=True)))


def _runs(
    label: np.ndarray, segmentation: np.ndarray, ignore: np.ndarray | None
) -> tuple[np.ndarray, ...]:
    """Return the label id, the segmentation id and the length of every stretch along which both are
    constant.
    """
    maps = {
        "label": _integers(label, "label").ravel(),
        "segmentation": _integers(segmentation, "segmentation").ravel(),
    }
    ignore = (
        np.broadcast_to(False, maps["label"].size)
        if ignore is None
        else np.asarray(ignore, bool).ravel()
    )
    # Objects are wider than a pixel: all that follows works on runs, of which there are far fewer.
    change = ignore[1:] != ignore[:-1]
    for values in maps.values():
        change |= values[1:] != values[:-1]
    starts = np.concatenate([np.arange(min(1, ignore.size)), np.flatnonzero(change) + 1])
    lengths = np.diff(starts, append=ignore.size)
    kept = ~ignore[starts]
    ids = {name: values[starts[kept]] for name, values in maps.items()}
    for name, values in ids.items():
        if values.dtype.kind == "i" and values.size and values.min() < 0:
            raise ValueError(
                f"{name} has negative ids; set them to 0 (in Python, `ignore` leaves pixels out)"
            )
    return *ids.values(), lengths[kept]


def _table(label: np.ndarray, segmentation: np.ndarray, length: np.ndarray) -> Overlaps:
    """Sum the lengths of equal pairs of ids."""
    label_ids, i = _distinct(label)
    segmentation_ids, j = _distinct(segmentation)
    keys, key = _distinct(i * segmentation_ids.size + j)
    count = _sums(key, length, keys.size)
    i, j = np.divmod(keys[count > 0], segmentation_ids.size)
    # uint64 holds every id, so that ids of both maps can stand in one array.
    return Overlaps(
        label_ids.astype(np.uint64), segmentation_ids.astype(np.uint64), i, j, count[count > 0]
    )


def evaluate(label: Volume, segmentation: Volume, ignore: Volume | None = None) -> dict[str, float]:
    """Return every metric of one image.

    Args:
        label: ([Z,] Y, X) ground truth, any integer type, 0 = background.
        segmentation: same shape, likewise.
        ignore: same shape, boolean; pixels that do not count.

    Returns:
        Value by metric key, in the order of `METRICS`; all finite.

    >>> scores = evaluate(np.array([[1, 1, 2, 2]]), np.array([[0, 0, 9, 9]]))
    >>> scores["aji"], scores["dice"].__round__(2), scores["dic"]
    (0.5, 0.67, 1.0)
    """
    table = overlaps(label, segmentation, ignore)
    return {key: float(metric.compute(table)) for key, metric in METRICS.items()}


class Matches(NamedTuple):
    """Which objects were found.

    Attributes:
        pairs: (K, 2) uint64, ids of label and segmentation of every match.
        missed: label ids (uint64) without a match.
        spurious: segmentation ids (uint64) without a match.
    """

    pairs: np.ndarray
    missed: np.ndarray
    spurious: np.ndarray


def match(
    label: Volume, segmentation: Volume, iou: float = 0.5, ignore: Volume | None = None
) -> Matches:
    """Match objects whose IoU is above a threshold.

    Args:
        label: ([Z,] Y, X) ground truth, any integer type, 0 = background.
        segmentation: same shape, likewise.
        iou: threshold, at least 0.5, so that an object has at most one match.
        ignore: same shape, boolean; pixels that do not count.

    Returns:
        Ids of the matched, the missed and the spurious objects, sorted.

    >>> found = match(np.array([[1, 1, 2, 2]]), np.array([[5, 5, 5, 0]]))
    >>> found.pairs.tolist(), found.missed.tolist(), found.spurious.tolist()
    ([[1, 5]], [2], [])
    """
    if not 0.5 <= iou < 1:
        raise ValueError(f"a match is unique only for 0.5 <= iou < 1, but iou is {iou}")
    return _match(overlaps(label, segmentation, ignore), iou)


def errors(
    label: Volume,
    segmentation: Volume,
    iou: float = 0.5,
    fraction: float = 0.5,
    ignore: Volume | None = None,
) -> dict[str, list[int]]:
    """Say what went wrong with which object; each error is explained once.

    An object is *part of* an object of the other map if more than `fraction` of its pixels lie in
    it.

    Args:
        label: ([Z,] Y, X) ground truth, any integer type, 0 = background.
        segmentation: same shape, likewise.
        iou: threshold of a match, as in `match`.
        fraction: at least 0.5, so that an object is part of at most one other.
        ignore: same shape, boolean; pixels that do not count.

    Returns:
        `merged`: segmentation ids of which two or more label objects are parts; `split`: label ids
            of which two or more
        segmentation objects are parts (both may also be matched); `missed`: label ids without a
        match that are neither split nor part of a merged one; `spurious`: segmentation ids,
        likewise. Exchanging the two maps exchanges `merged` with `split` and `missed` with
        `spurious`.

    >>> errors(np.array([[1, 1, 2, 2, 0, 0]]), np.array([[5, 5, 5, 5, 0, 8]]))
    {'merged': [5], 'split': [], 'missed': [], 'spurious': [8]}
    """
    if not (0.5 <= iou < 1 and 0.5 <= fraction < 1):
        raise ValueError(f"iou ({iou}) and fraction ({fraction}) must be at least 0.5 and below 1")
    table = overlaps(label, segmentation, ignore)
    i, j, intersection = table.pairs[:3]
    label_is_part = intersection > fraction * table.label_sizes[i]
    segmentation_is_part = intersection > fraction * table.segmentation_sizes[j]
    merged = np.bincount(j[label_is_part], minlength=table.segmentation_ids.size) > 1
    split = np.bincount(i[segmentation_is_part], minlength=table.label_ids.size) > 1
    label_explained, segmentation_explained = split.copy(), merged.copy()
    label_explained[i[label_is_part & merged[j]]] = True
    segmentation_explained[j[segmentation_is_part & split[i]]] = True
    found = _match(table, iou)
    return {
        "merged": table.segmentation_ids[merged].tolist(),
        "split": table.label_ids[split].tolist(),
        "missed": np.setdiff1d(found.missed, table.label_ids[label_explained]).tolist(),
        "spurious": np.setdiff1d(
            found.spurious, table.segmentation_ids[segmentation_explained]
        ).tolist(),
    }


def _integers(array: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integer ids, not {array.dtype}")
    return array


def _distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted distinct values, 0 always among them, and the position of every element in
    them.
    """
    highest = int(ids.max(initial=0))
    if highest > 4 * ids.size + 2**16:
        values, positions = np.unique(
            np.concatenate([np.zeros(1, ids.dtype), ids]), return_inverse=True
        )
        return values, positions[1:]
    # A look-up table not much larger than the data is several times faster than sorting it.
    present = np.zeros(highest + 1, dtype=bool)
    present[ids] = present[0] = True
    return np.flatnonzero(present), (np.cumsum(present) - 1)[ids]


def _sums(positions: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Sum integer values by position; float64 inside, hence exact below 2**53."""
    return np.bincount(positions, weights=values, minlength=size).astype(np.int64)


def _ratio(numerator: float, denominator: float) -> float:
    """Divide; nothing out of nothing is perfect."""
    return numerator / denominator if denominator else 1.0


def _match(table: Overlaps, iou: float) -> Matches:
    hit = table.pairs.iou > iou
    pairs = np.stack(
        [table.label_ids[table.pairs.i[hit]], table.segmentation_ids[table.pairs.j[hit]]], axis=1
    )
    missed = np.setdiff1d(table.label_ids[1:], pairs[:, 0])
    return Matches(pairs, missed, np.setdiff1d(table.segmentation_ids[1:], pairs[:, 1]))


def _aji(table: Overlaps) -> float:
    """Aggregated Jaccard index (higher is better), Kumar et al. 2017, IEEE TMI 36(7), algorithm 1.

    Each label object G takes the segmentation object S of highest IoU; several may take the same S.
    AJI = C / U: C sums |G & S|; U sums |G | S|, |G| of every G that overlaps with no S, and |S| of
    every S that nobody took. The algorithm leaves ties open: here the S that are equally good for a
    G share it equally, i.e. C and U are the expected values for ties broken at random, so that the
    order of ids does not matter.
    """
    i, j, intersection, union, iou = table.pairs
    best = np.zeros(table.label_ids.size)
    np.maximum.at(best, i, iou)
    taken = (iou == best[i]).astype(float)
    taken /= np.bincount(i, weights=taken)[i]
    left = np.ones(table.segmentation_ids.size)  # probability that nobody took S
    np.multiply.at(left, j, 1 - taken)
    alone = table.label_sizes[1:][best[1:] == 0].sum()
    return _ratio(
        taken @ intersection, taken @ union + alone + left[1:] @ table.segmentation_sizes[1:]
    )


def _dice(table: Overlaps) -> float:
    """Dice coefficient of the foreground pixels, 2 |L & S| / (|L| + |S|) (higher is better)."""
    return _ratio(
        2 * table.pairs.intersection.sum(),
        table.label_sizes[1:].sum() + table.segmentation_sizes[1:].sum(),
    )


def _f1(table: Overlaps, iou: float) -> float:
    """Object F1 = 2 TP / (2 TP + FP + FN) of the matches above an IoU (higher is better)."""
    return _ratio(2 * np.count_nonzero(table.pairs.iou > iou), sum(table.objects))


def _ap(table: Overlaps, iou: float) -> float:
    """TP / (TP + FP + FN) of the matches above an IoU (higher is better), Caicedo et al.

    2019, Nature Methods 16.
    """
    hits = np.count_nonzero(table.pairs.iou > iou)
    return _ratio(hits, sum(table.objects) - hits)


def _mean_ap(table: Overlaps) -> float:
    return float(np.mean([_ap(table, percent / 100) for percent in THRESHOLDS]))


def _pq(table: Overlaps) -> float:
    """Panoptic quality = sum of IoU of matches / (TP + FP / 2 + FN / 2) (higher), Kirillov et al.

    2019, CVPR, eq. 1.
    """
    return _ratio(2 * table.pairs.iou[table.pairs.iou > 0.5].sum(), sum(table.objects))


def _sq(table: Overlaps) -> float:
    """Segmentation quality: mean IoU of the matches (higher is better), the first factor of PQ = SQ
    * DQ.
    """
    hits = table.pairs.iou[table.pairs.iou > 0.5]
    return hits.mean() if hits.size else float(sum(table.objects) == 0)


def _sbd(table: Overlaps) -> float:
    """Symmetric best Dice (higher is better), Scharr et al.

    2016, Machine Vision and Applications 27.

    min(BD(L, S), BD(S, L)); BD(A, B) = mean over the objects a of A of the highest 2 |a & b| / (|a|
    + |b|) in B.
    """
    i, j, intersection, union, _ = table.pairs
    dice = 2 * intersection / (union + intersection)
    best = []
    for position, size in ((i, table.label_ids.size), (j, table.segmentation_ids.size)):
        highest = np.zeros(size)
        np.maximum.at(highest, position, dice)
        best.append(_ratio(highest.sum(), size - 1))
    return min(best)


def _dic(table: Overlaps) -> float:
    """Absolute difference of the numbers of objects (lower is better)."""
    return abs(table.objects[0] - table.objects[1])


def _in_label(table: Overlaps) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (K,) floats of the table without label background: p, its row sum, its column sum.

    The background of the segmentation stays: missed pixels of a label object form one segment.
    """
    inside = table.i > 0
    i, j, count = table.i[inside], table.j[inside], table.count[inside].astype(float)
    return count, table.label_sizes[i].astype(float), np.bincount(j, weights=count)[j]


def _arand(table: Overlaps) -> float:
    """Adapted Rand error (lower is better), Arganda-Carreras et al.

    2015, Frontiers in Neuroanatomy 9:142.

    1 - F1 of pairs of distinct pixels that are in one object; pixels of label 0 are left out. As
    `skimage.metrics.adapted_rand_error(..., ignore_labels=0)`.
    """
    p, row, column = _in_label(table)
    # A row sum stands once for every entry of its row: sum of p * row is the sum of squared row
    # sums.
    return 1 - _ratio(2 * (p @ p - p.sum()), p @ row + p @ column - 2 * p.sum())


def _voi_split(table: Overlaps) -> float:
    """Entropy H(segmentation | label) in bits (lower is better), Meila 2007, J.

    Multivariate Analysis 98(5).

    Pixels of label 0 are left out, as `skimage.metrics.variation_of_information(...,
    ignore_labels=0)[0]`.
    """
    p, row, _ = _in_label(table)
    return p @ np.log2(row / p) / max(p.sum(), 1)


def _voi_merge(table: Overlaps) -> float:
    """Entropy H(label | segmentation) in bits (lower is better), the other half of the variation of
    information.
    """
    p, _, column = _in_label(table)
    return p @ np.log2(column / p) / max(p.sum(), 1)


def _voi(table: Overlaps) -> float:
    return _voi_split(table) + _voi_merge(table)


@dataclass(frozen=True)
class Metric:
    """What a table or a figure must know about a metric.

    Attributes:
        title: as printed.
        better: whether `"higher"` or `"lower"` values are better.
        compute: table to value.
        definition: one line.
    """

    title: str
    better: Literal["higher", "lower"]
    compute: Callable[[Overlaps], float]
    definition: str


def is_better(key: str, value: float, other: float) -> bool:
    """Say whether a value of a metric is truly better than another one.

    >>> is_better("aji", 0.9, 0.8), is_better("voi", 0.9, 0.8)
    (True, False)
    """
    return value > other if METRICS[key].better == "higher" else value < other


METRICS: dict[str, Metric] = {
    "aji": Metric(
        "AJI",
        "higher",
        _aji,
        "aggregated Jaccard index: intersections over unions, summed over objects",
    ),
    "dice": Metric("Dice", "higher", _dice, "Dice coefficient of the foreground pixels"),
    "f1": Metric(
        "F1@0.5",
        "higher",
        partial(_f1, iou=0.5),
        "F1 of objects matched at IoU > 0.5; the same as f1_50",
    ),
    "pq": Metric("PQ", "higher", _pq, "panoptic quality, SQ x DQ"),
    "sq": Metric(
        "SQ", "higher", _sq, "segmentation quality: mean IoU of objects matched at IoU > 0.5"
    ),
    "dq": Metric(
        "DQ",
        "higher",
        partial(_f1, iou=0.5),
        "detection quality: F1 of objects matched at IoU > 0.5",
    ),
    "sbd": Metric(
        "SBD",
        "higher",
        _sbd,
        "symmetric best Dice: mean best Dice per object, worse of both directions",
    ),
    "dic": Metric("|DiC|", "lower", _dic, "absolute difference of the numbers of objects"),
    "arand": Metric(
        "ARAND", "lower", _arand, "adapted Rand error: 1 - F1 of pixel pairs, label foreground only"
    ),
    "voi_split": Metric(
        "VOI split", "lower", _voi_split, "H(segmentation | label) in bits, label foreground only"
    ),
    "voi_merge": Metric(
        "VOI merge", "lower", _voi_merge, "H(label | segmentation) in bits, label foreground only"
    ),
    "voi": Metric("VOI", "lower", _voi, "variation of information in bits: VOI split + VOI merge"),
    "ap": Metric("AP", "higher", _mean_ap, "mean of AP at IoU > 0.5, 0.6, 0.7, 0.8 and 0.9"),
}
METRICS |= {
    f"f1_{t}": Metric(
        f"F1@{t / 100}",
        "higher",
        partial(_f1, iou=t / 100),
        f"F1 of objects matched at IoU > {t / 100}",
    )
    for t in THRESHOLDS
}
METRICS |= {
    f"ap_{t}": Metric(
        f"AP@{t / 100}",
        "higher",
        partial(_ap, iou=t / 100),
        f"TP / (TP + FP + FN) at IoU > {t / 100}",
    )
    for t in THRESHOLDS
}
