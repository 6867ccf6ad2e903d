"""Metrics against slow pixel-set oracles, scikit-image, closed forms and the rules that the module
states."""

import itertools
import math
import tracemalloc
from fractions import Fraction

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import adapted_rand_error, variation_of_information

from gdlib.evaluate import metrics
from gdlib.evaluate.metrics import METRICS, THRESHOLDS, errors, evaluate, is_better, match, overlaps

HIGHER = [key for key, metric in METRICS.items() if metric.better == "higher"]
LOWER = [key for key, metric in METRICS.items() if metric.better == "lower"]
FOREGROUND_ONLY = ["arand", "voi_split", "voi_merge", "voi"]
SEEDS = range(4)


def random_pair(seed, shape=(12, 14), objects=5):
    """Blocky labels and a disturbed copy of them, so that matches, splits, merges and ties all
    occur."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, objects + 1, [math.ceil(n / 3) for n in shape])
    label = np.kron(coarse, np.ones([3] * len(shape), int))[tuple(slice(n) for n in shape)].astype(
        np.uint16
    )
    segmentation = np.where(
        rng.random(shape) < rng.choice([0.05, 0.2, 0.4]), rng.integers(0, objects + 1, shape), label
    )
    if seed % 3 == 0:
        segmentation[segmentation == 2] = 1
    if seed % 3 == 1:
        segmentation[: shape[0] // 2][segmentation[: shape[0] // 2] == 1] = objects + 4
    return label, segmentation.astype(np.int32)


def renamed(array, seed, top=2**40):
    """The same objects under other ids, in another order."""
    ids = np.unique(array)
    new = np.random.default_rng(seed).choice(top, ids.size, replace=False).astype(
        np.uint64
    ) + np.uint64(1)
    new[ids == 0] = 0
    return new[np.searchsorted(ids, array)]


def square(*corner, size=10, shape=(40, 40)):
    image = np.zeros(shape, np.int64)
    image[tuple(slice(c, c + size) for c in corner)] = 1
    return image


# --- Oracles: sets of pixels, plain loops, no table ------------------------------------------------------------------


def pixel_sets(array):
    return [set(np.flatnonzero(array.ravel() == i).tolist()) for i in np.unique(array) if i != 0]


def jaccard(a, b):
    return Fraction(len(a & b), len(a | b))


def oracle_aji(label, segmentation):
    """Kumar's loop for every way to break ties.

    The mean of the numerators over the mean of the denominators.
    """
    truth, found = pixel_sets(label), pixel_sets(segmentation)
    choices = []
    for g in truth:
        best = max((jaccard(g, s) for s in found), default=0)
        choices.append(
            [k for k, s in enumerate(found) if jaccard(g, s) == best] if best > 0 else [None]
        )
    intersections = unions = 0
    for choice in itertools.product(*choices):
        for g, k in zip(truth, choice, strict=True):
            intersections += len(g & found[k]) if k is not None else 0
            unions += len(g | found[k]) if k is not None else len(g)
        unions += sum(len(s) for k, s in enumerate(found) if k not in choice)
    return intersections / unions


def oracle_objects(label, segmentation, threshold):
    """F1, AP, PQ and SQ by looking for a partner of every label object."""
    truth, found = pixel_sets(label), pixel_sets(segmentation)
    ious = [jaccard(g, s) for g in truth for s in found if jaccard(g, s) > Fraction(threshold, 100)]
    missed, spurious = len(truth) - len(ious), len(found) - len(ious)
    weight = len(ious) + missed / 2 + spurious / 2
    quality = float(sum(ious) / len(ious)) if ious else 0.0
    return {
        "f1": len(ious) / weight,
        "ap": len(ious) / (len(ious) + missed + spurious),
        "pq": quality * len(ious) / weight,
        "sq": quality,
    }


def oracle_sbd(label, segmentation):
    def best(a_sets, b_sets):
        dice = [max(2 * len(a & b) / (len(a) + len(b)) for b in b_sets) for a in a_sets]
        return sum(dice) / len(dice)

    truth, found = pixel_sets(label), pixel_sets(segmentation)
    return min(best(truth, found), best(found, truth))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(12, 14), (6, 5, 7)], ids=["2d", "3d"])
def test_agrees_with_loops_over_pixel_sets(seed, shape):
    label, segmentation = random_pair(seed, shape)
    scores = evaluate(label, segmentation)
    expected = {"aji": oracle_aji(label, segmentation), "sbd": oracle_sbd(label, segmentation)}
    both, either = (label > 0) & (segmentation > 0), (label > 0).sum() + (segmentation > 0).sum()
    expected["dice"] = 2 * both.sum() / either
    expected["dic"] = abs(len(pixel_sets(label)) - len(pixel_sets(segmentation)))
    for threshold in THRESHOLDS:
        objects = oracle_objects(label, segmentation, threshold)
        expected |= {f"f1_{threshold}": objects["f1"], f"ap_{threshold}": objects["ap"]}
        if threshold == 50:
            expected |= {
                "f1": objects["f1"],
                "dq": objects["f1"],
                "pq": objects["pq"],
                "sq": objects["sq"],
            }
    expected["ap"] = np.mean([expected[f"ap_{threshold}"] for threshold in THRESHOLDS])
    assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert set(scores) - set(expected) == set(FOREGROUND_ONLY)
    assert scores["pq"] == pytest.approx(scores["sq"] * scores["dq"], abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_arand_and_voi_agree_with_scikit_image(seed):
    label, segmentation = random_pair(seed, (30, 31), objects=9)
    scores = evaluate(label, segmentation)
    split, merge = variation_of_information(label, segmentation, ignore_labels=(0,))
    expected = [
        adapted_rand_error(label, segmentation, ignore_labels=(0,))[0],
        split,
        merge,
        split + merge,
    ]
    assert [scores[key] for key in FOREGROUND_ONLY] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_arand_and_voi_in_3d_with_ignored_pixels_agree_with_scikit_image(seed):
    """Pixels that do not count are those of label 0, which scikit-image leaves out, as we do."""
    label, segmentation = random_pair(seed, (5, 13, 17), objects=9)
    ignore = np.random.default_rng(seed).random(label.shape) < 0.2
    scores = evaluate(label, segmentation, ignore)
    without = np.where(ignore, 0, label)
    split, merge = variation_of_information(without, segmentation, ignore_labels=(0,))
    expected = [
        adapted_rand_error(without, segmentation, ignore_labels=(0,))[0],
        split,
        merge,
        split + merge,
    ]
    assert [scores[key] for key in FOREGROUND_ONLY] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_matching_agrees_with_stardist(seed):
    stardist = pytest.importorskip("stardist.matching")
    label, segmentation = random_pair(seed)
    scores = evaluate(label, segmentation)
    for threshold in THRESHOLDS:
        # stardist matches at IoU >= threshold, gdlib above it
        theirs = stardist.matching(
            label, segmentation.astype(np.uint16), thresh=threshold / 100 + 1e-9
        )
        assert scores[f"f1_{threshold}"] == pytest.approx(theirs.f1)
        assert scores[f"ap_{threshold}"] == pytest.approx(theirs.accuracy)


# --- Closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1, 2, 5, 8, 9, 10])
def test_shifted_square_has_the_overlap_of_geometry(shift):
    label, segmentation = square(5, 5), square(5, 5 + shift)
    scores = evaluate(label, segmentation)
    iou = (10 - shift) / (10 + shift)
    assert scores["aji"] == pytest.approx(iou)
    assert scores["dice"] == scores["sbd"] == pytest.approx((10 - shift) / 10)
    assert scores["pq"] == scores["sq"] == pytest.approx(iou if iou > 0.5 else 0)
    assert [scores[f"ap_{t}"] for t in THRESHOLDS] == [float(iou > t / 100) for t in THRESHOLDS]
    # one label object, of which `shift` tenths are background in the segmentation
    entropy = -sum(p * math.log2(p) for p in (shift / 10, 1 - shift / 10) if p)
    assert (scores["voi_split"], scores["voi_merge"]) == (pytest.approx(entropy), 0)


def test_shifted_disc_comes_near_to_the_lens_area():
    y, x = np.mgrid[:240, :300]
    radius, shift = 100, 40
    label, segmentation = ((y - 120) ** 2 + (x - a) ** 2 <= radius**2 for a in (120, 120 + shift))
    lens = 2 * radius**2 * math.acos(shift / 2 / radius) - shift / 2 * math.sqrt(
        4 * radius**2 - shift**2
    )
    iou = lens / (2 * math.pi * radius**2 - lens)
    assert evaluate(label, segmentation)["aji"] == pytest.approx(iou, rel=2e-3)


def test_aji_of_a_missed_object_does_not_depend_on_which_one_it_is():
    """The original code gives 0.5 or 0.0 for these, because a missed object took the first
    prediction."""
    label = np.array([[1, 1, 0, 2, 2]])
    for missed in (1, 2):
        assert evaluate(label, np.where(label == missed, 0, label))["aji"] == 0.5


def test_aji_of_ties_split_and_merge():
    assert evaluate([[1, 1, 1, 1]], [[1, 1, 2, 2]])["aji"] == pytest.approx(2 / (4 + 2))
    assert evaluate([[1, 1, 2, 2]], [[1, 1, 1, 1]])["aji"] == pytest.approx((2 + 2) / (4 + 4))


def test_iou_of_exactly_a_half_is_no_match():
    scores = evaluate([[1, 1, 1, 1]], [[1, 1, 2, 2]])
    assert (scores["f1"], scores["ap_50"], scores["pq"]) == (0, 0, 0)
    assert evaluate([[1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0]])["f1_60"] == 0


def test_voi_is_in_bits_and_knows_split_from_merge():
    whole, halves = square(0, 0, size=8), square(0, 0, size=8)
    halves[:4, :8] *= 2
    split, merge = evaluate(whole, halves), evaluate(halves, whole)
    assert (split["voi_split"], split["voi_merge"], split["voi"]) == (1, 0, 1)
    assert (merge["voi_split"], merge["voi_merge"], merge["voi"]) == (0, 1, 1)


# --- Invariance ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_names_and_order_of_ids_do_not_matter(seed, other):
    label, segmentation = random_pair(seed, (6, 9), objects=3)
    scores = evaluate(label, segmentation)
    assert evaluate(renamed(label, other), renamed(segmentation, other + 1)) == pytest.approx(
        scores, abs=1e-12
    )
    for axis in range(2):
        assert evaluate(np.flip(label, axis), np.flip(segmentation, axis)) == pytest.approx(
            scores, abs=1e-12
        )


def perfect(scores):
    return all(scores[key] == 1 for key in HIGHER) and all(scores[key] == 0 for key in LOWER)


@pytest.mark.parametrize("seed", SEEDS)
def test_identity_is_perfect(seed):
    label, _ = random_pair(seed)
    assert perfect(evaluate(label, renamed(label, seed)))


def test_one_slice_is_a_plane():
    label, segmentation = random_pair(3)
    assert evaluate(label[None], segmentation[None]) == evaluate(label, segmentation)
    assert evaluate(label.ravel(), segmentation.ravel()) == evaluate(label, segmentation)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
)
def test_any_integer_type(dtype):
    label, segmentation = random_pair(4)
    assert evaluate(label.astype(dtype), np.asfortranarray(segmentation)) == evaluate(
        label, segmentation
    )


def test_ids_up_to_64_bit_stay_apart():
    label = np.array([[0, 2**64 - 1, 2**64 - 2, 2**63, 70_000]], np.uint64)
    found = match(label, np.array([[0, 4, 3, 2, 2**62]]))
    assert found.pairs.tolist() == [[70_000, 2**62], [2**63, 2], [2**64 - 2, 3], [2**64 - 1, 4]]
    assert perfect(evaluate(label, label))


def test_many_ids_in_3d_need_no_square_table():
    label = np.arange(1, 30 * 40 * 50 + 1, dtype=np.uint64).reshape(30, 40, 50)
    assert overlaps(label, label[::-1]).count.size == label.size
    assert perfect(evaluate(label, label * np.uint64(2**40)))


def test_table_counts_every_pixel():
    label, segmentation = random_pair(5)
    table = overlaps(label, segmentation)
    for i, j, count in zip(table.i, table.j, table.count, strict=True):
        assert (
            count
            == ((label == table.label_ids[i]) & (segmentation == table.segmentation_ids[j])).sum()
        )
    assert (
        table.label_sizes.sum() == table.segmentation_sizes.sum() == table.count.sum() == label.size
    )


# --- Slabs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sections", "seed"), [(1, 0), (2, 1), (3, 2), (7, 0), (50, 1)])
def test_slabs_of_any_thickness_give_the_same_table(monkeypatch, seed, sections):
    label, segmentation = random_pair(seed, (7, 11, 13), objects=9)
    label, segmentation = renamed(label, seed), renamed(segmentation, seed + 1)
    ignore = np.random.default_rng(seed).random(label.shape) < 0.3
    ignore[2:4] = True  # a slab may hold nothing that counts
    monkeypatch.setattr(metrics, "SLAB", 10**9)
    whole = overlaps(label, segmentation, ignore)
    monkeypatch.setattr(metrics, "SLAB", sections * 11 * 13 + 5)
    table = overlaps(label, segmentation, ignore)
    for name in ("label_ids", "segmentation_ids", "i", "j", "count"):
        assert np.array_equal(getattr(table, name), getattr(whole, name)), name
    assert table.count.sum() == np.count_nonzero(~ignore)


@pytest.mark.parametrize("chunks", [True, None, (3, 4, 4)])
def test_datasets_are_read_in_slabs(tmp_path, monkeypatch, chunks):
    label, segmentation = random_pair(1, (7, 11, 13))
    ignore = np.random.default_rng(1).random(label.shape) < 0.3
    monkeypatch.setattr(metrics, "SLAB", 2 * 11 * 13)
    with h5py.File(tmp_path / "maps.h5", "w") as file:
        stored = [
            file.create_dataset(name, data=array, chunks=chunks)
            for name, array in {
                "label": label,
                "segmentation": segmentation,
                "ignore": ignore,
            }.items()
        ]
        assert evaluate(*stored) == evaluate(label, segmentation, ignore)
        assert evaluate(*stored[:2]) == evaluate(label, segmentation)
        with pytest.raises(ValueError, match="shape"):
            evaluate(stored[0], segmentation[1:])


@pytest.mark.long
def test_memory_does_not_grow_with_the_volume():
    def peak(sections):
        label = np.kron(
            np.arange(1, 65, dtype=np.uint16).reshape(1, 8, 8),
            np.ones((sections, 64, 64), np.uint16),
        )
        tracemalloc.start()
        evaluate(label, label, ignore=np.broadcast_to(False, label.shape))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(sections=96) < 1.2 * peak(sections=32)  # 25 and 8 million pixels


# --- Stated rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (0, 5), (2, 3, 4)])
def test_both_empty_is_perfect(shape):
    assert perfect(evaluate(np.zeros(shape, int), np.zeros(shape, int)))


def test_one_empty_is_the_worst():
    label, empty = square(2, 2) + 2 * square(20, 20), np.zeros((40, 40), int)
    for scores in (evaluate(label, empty), evaluate(empty, label)):
        assert all(scores[key] == 0 for key in HIGHER)
        assert scores["dic"] == 2
    missed, invented = evaluate(label, empty), evaluate(empty, label)
    assert (missed["voi_split"], missed["voi_merge"]) == (0, 1)  # all in one segment
    assert missed["arand"] == pytest.approx(adapted_rand_error(label, empty, ignore_labels=(0,))[0])
    assert [invented[key] for key in FOREGROUND_ONLY] == [0] * 4  # no pixel to score


def test_single_pixels_have_no_pairs_and_no_rand_error():
    assert evaluate([[0, 1, 0]], [[0, 0, 0]])["arand"] == 0


def test_no_background_drops_no_object():
    label = np.array([[1, 1, 2, 2]])
    assert perfect(evaluate(label, label))
    assert evaluate(label, [[0, 0, 2, 2]])["sbd"] == 0.5


def test_ignored_pixels_are_as_if_they_were_not_there():
    label, segmentation = random_pair(6)
    ignore = np.zeros(label.shape, bool)
    ignore[:, 9:] = True
    expected = evaluate(label[:, :9], segmentation[:, :9])
    assert evaluate(label, segmentation, ignore) == pytest.approx(expected, abs=1e-12)
    assert perfect(evaluate(label, segmentation, np.ones(label.shape, bool)))
    assert perfect(evaluate(label, np.where(label > 2, 0, label), ignore=label > 2))


def test_ignored_pixels_may_have_any_id():
    label, segmentation = np.array([[1, 1, -1, 2]]), np.array([[7, 7, 3, -5]])
    assert perfect(evaluate(label, segmentation, np.array([[0, 0, 1, 1]])))
    with pytest.raises(ValueError, match="segmentation has negative ids"):
        evaluate(label, segmentation, np.array([[0, 0, 1, 0]]))


@pytest.mark.parametrize(
    ("label", "segmentation", "ignore", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), None, "shape"),
        (np.zeros((2, 3), int), np.zeros((2, 3), int), np.zeros(3, bool), "shape"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), None, "integer"),
        (np.zeros((2, 3), int), np.full((2, 3), -1), None, "negative"),
    ],
)
def test_unusable_input_is_one_clear_sentence(label, segmentation, ignore, message):
    with pytest.raises(ValueError, match=message):
        evaluate(label, segmentation, ignore)


# --- Matches and errors ----------------------------------------------------------------------------------------------


def test_match_lists_every_object_once():
    label, segmentation = random_pair(7)
    found = match(label, segmentation)
    assert sorted([*found.pairs[:, 0], *found.missed]) == np.unique(label[label > 0]).tolist()
    assert (
        sorted([*found.pairs[:, 1], *found.spurious])
        == np.unique(segmentation[segmentation > 0]).tolist()
    )
    for i, j in found.pairs.tolist():
        g, s = label == i, segmentation == j
        assert (g & s).sum() > 0.5 * (g | s).sum()
    with pytest.raises(ValueError, match="unique"):
        match(label, segmentation, iou=0.4)


def test_errors_names_each_kind():
    #                  merged      split       missed  spurious good
    label = np.array([[1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 0, 0, 5, 5]])
    found = np.array([[9, 9, 9, 9, 8, 8, 7, 7, 0, 0, 6, 6, 5, 5]])
    assert errors(label, found) == {"merged": [9], "split": [3], "missed": [4], "spurious": [6]}
    assert errors(label, label) == {"merged": [], "split": [], "missed": [], "spurious": []}
    with pytest.raises(ValueError, match="fraction"):
        errors(label, found, fraction=0.3)


def test_a_small_object_swallowed_by_a_large_one_is_merged_not_missed():
    label = np.ones((10, 10), int)
    label[:2, :2] = 2
    assert errors(label, np.ones((10, 10), int)) == {
        "merged": [1],
        "split": [],
        "missed": [],
        "spurious": [],
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_errors_of_exchanged_maps_are_exchanged(seed):
    label, segmentation = random_pair(seed)
    one, other = errors(label, segmentation), errors(segmentation, label)
    assert (one["merged"], one["missed"]) == (other["split"], other["spurious"])
    assert (one["split"], one["spurious"]) == (other["merged"], other["missed"])


# --- The catalogue ---------------------------------------------------------------------------------------------------


def test_every_metric_has_a_direction_a_title_and_a_definition():
    assert set(evaluate([[1]], [[1]])) == set(METRICS)
    for key, metric in METRICS.items():
        assert metric.better in ("higher", "lower")
        assert metric.title
        assert metric.definition
        assert "\n" not in metric.definition
        assert is_better(key, 1.0, 0.0) == (metric.better == "higher")
        assert not is_better(key, 1.0, 1.0)
    assert set(LOWER) == {"dic", *FOREGROUND_ONLY}


@pytest.mark.parametrize("key", METRICS)
def test_direction_is_true_of_a_worse_segmentation(key):
    label = np.kron(np.arange(1, 17).reshape(4, 4), np.ones((6, 6), int))
    worse = np.where(label % 2 == 0, np.roll(label, 4, 1), label)
    worse[:6] = 1
    worse[7, 7] = 0
    assert is_better(key, evaluate(label, label)[key], evaluate(label, worse)[key])
