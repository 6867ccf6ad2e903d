"""Segmentation: perfect affinities give the truth back, small segments go where they belong, tuning
finds the best."""

import itertools
import os
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bioimage_cpp
import h5py
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, gaussian_filter
from skimage.measure import label as connected_regions
from skimage.segmentation import relabel_sequential, watershed

from gdlib import jit, kernels
from gdlib.evaluate import metrics
from gdlib.segment import agglomerate, fragments, mutex, segmenters
from gdlib.segment.parameters import defaults, grid, is_masked
from gdlib.segment.segmenters import SEGMENTERS, segment
from gdlib.segment.tune import score, tune

ROOT = Path(__file__).resolve().parents[1]
RAW = Path(os.environ.get("GDLIB_RAW", ROOT.parent / "shared" / "data"))
DEFAULTS, GRID = defaults("mutex_watershed", 2), grid("mutex_watershed", 2)
# those that are content with the predicted foreground
PREDICTED = [name for name in SEGMENTERS if not is_masked(name)]
PLAIN = {
    "foreground_threshold": 0.5,
    "stride": 1,
    "min_fragment": 0,
    "min_size": 0,
}  # of the mutex watershed, whatever the defaults
OFFSETS = {
    2: [[-1, 0], [0, -1], [-3, 0], [0, -3], [-5, 0], [0, -5], [-9, 0], [0, -9], [-27, 0], [0, -27]],
    3: [
        [-1, 0, 0],
        [0, -1, 0],
        [0, 0, -1],
        [-2, 0, 0],
        [0, -3, 0],
        [0, 0, -3],
        [-3, 0, 0],
        [0, -9, 0],
        [0, 0, -9],
    ],
}
SHAPES = {2: (48, 61), 3: (10, 25, 31)}


def random_map(seed, ndim, objects=14, background=0.3):
    """Cells around random points, most of them touching others, some of them background.

    No part below 30 pixels.
    """
    rng = np.random.default_rng(seed)
    shape = SHAPES[ndim]
    points = rng.uniform(0, shape, (objects, ndim))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    cell = ((grid[..., None, :] - points) ** 2).sum(-1).argmin(-1) + 1
    cell[np.isin(cell, np.flatnonzero(rng.random(objects + 1) < background))] = 0
    part = connected_regions(cell, background=0, connectivity=1)
    part[(np.bincount(part.ravel()) < 30)[part]] = 0
    # any ids, in any order
    names = np.append(0, rng.permutation(np.arange(1, 10 * part.max() + 1))[: part.max()])
    return names[part]


def perfect(label, offsets=None):
    """Affinities and foreground that a network without error would give."""
    offsets = offsets or OFFSETS[label.ndim]
    affinity = kernels.affinity_targets(torch.from_numpy(label.astype(np.int64))[None], offsets)[0]
    return affinity.numpy().astype(np.float32), (label > 0).astype(np.float32)


def same_partition(label, result):
    pairs = np.unique(np.stack([label.ravel(), result.ravel()]), axis=1)
    return len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1] and np.array_equal(
        label > 0, result > 0
    )


def assert_contract(result, shape):
    assert result.dtype == np.uint32
    assert result.shape == shape
    assert np.array_equal(np.unique(result[result > 0]), np.arange(1, result.max() + 1))


def boxes(*corners, shape=(30, 40)):
    """Label map with one box (y0, y1, x0, x1) per object."""
    label = np.zeros(shape, np.int64)
    for number, (y0, y1, x0, x1) in enumerate(corners, start=1):
        label[y0:y1, x0:x1] = number
    return label


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_perfect_affinities_give_the_truth_back(seed, ndim):
    label = random_map(seed, ndim)
    assert len(np.unique(label)) > 4
    result = segment(*perfect(label), OFFSETS[ndim], **PLAIN)
    assert_contract(result, label.shape)
    assert same_partition(label, result)
    assert metrics.evaluate(label, result)["arand"] == 0


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_a_little_noise_does_no_harm(seed, ndim):
    label = random_map(seed, ndim)
    rng = np.random.default_rng(seed)
    affinity, foreground = perfect(label)
    affinity = np.clip(0.15 + 0.7 * affinity + rng.normal(0, 0.05, affinity.shape), 0, 1)
    foreground = np.clip(0.1 + 0.8 * foreground + rng.normal(0, 0.05, foreground.shape), 0, 1)
    result = segment(
        affinity, foreground, OFFSETS[ndim], **PLAIN | {"min_fragment": 20, "min_size": 20}
    )
    assert_contract(result, label.shape)
    assert same_partition(label, result)


def test_wrong_affinities_give_another_result():
    label = random_map(0, 2)
    affinity, foreground = perfect(label)
    assert not same_partition(
        label, segment(1 - affinity, foreground, OFFSETS[2], min_fragment=0, min_size=0)
    )
    assert not same_partition(
        label, segment(np.ones_like(affinity), foreground, OFFSETS[2], min_fragment=0, min_size=0)
    )


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_map_of_touching_objects_without_background(ndim):
    label = random_map(1, ndim, background=0.0)
    label[label == 0] = label.max() + 1
    label = connected_regions(label, background=0, connectivity=1)
    label[(np.bincount(label.ravel()) < 30)[label]] = 0
    assert np.count_nonzero(label) > 0.95 * label.size
    assert same_partition(label, segment(*perfect(label), OFFSETS[ndim], **PLAIN))


def test_a_mirrored_image_gives_mirrored_objects():
    label = random_map(3, 2)
    for axes in ((0,), (1,), (0, 1)):
        flipped = np.flip(label, axes)
        result = segment(*perfect(flipped), OFFSETS[2], min_fragment=0, min_size=0)
        assert same_partition(label, np.flip(result, axes))


@pytest.mark.parametrize("segmenter", PREDICTED)
@pytest.mark.parametrize("ndim", [2, 3])
def test_uint8_equals_float(ndim, segmenter):
    rng = np.random.default_rng(0)
    label = random_map(4, ndim)
    affinity, foreground = perfect(label)
    affinity = (
        (255 * np.clip(0.2 + 0.6 * affinity + rng.normal(0, 0.15, affinity.shape), 0, 1))
        .round()
        .astype(np.uint8)
    )
    foreground = (
        (255 * np.clip(0.2 + 0.6 * foreground + rng.normal(0, 0.1, label.shape), 0, 1))
        .round()
        .astype(np.uint8)
    )
    parameters = {"foreground_threshold": 0.5}
    as_float = segment(
        affinity.astype(np.float32) / 255,
        foreground.astype(np.float32) / 255,
        OFFSETS[ndim],
        segmenter,
        **parameters,
    )
    as_double = segment(affinity / 255, foreground / 255, OFFSETS[ndim], segmenter, **parameters)
    result = segment(affinity, foreground, OFFSETS[ndim], segmenter, **parameters)
    assert_contract(result, label.shape)
    assert result.max() > 3
    assert np.array_equal(result, as_float)
    assert np.array_equal(result, as_double)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(9, 11), (3, 9, 11), (1, 1)])
@pytest.mark.parametrize("segmenter", PREDICTED)
def test_no_foreground(shape, dtype, segmenter):
    affinity = np.ones((len(OFFSETS[len(shape)]), *shape), dtype)
    result = segment(
        affinity, np.zeros(shape, dtype), OFFSETS[len(shape)], segmenter, foreground_threshold=0.5
    )
    assert_contract(result, shape)
    assert not result.any()


def test_one_pixel_of_foreground():
    label = boxes((4, 5, 6, 7), shape=(9, 11))
    assert np.array_equal(segment(*perfect(label), OFFSETS[2], min_fragment=1, min_size=1), label)
    assert not segment(*perfect(label), OFFSETS[2], min_fragment=2, min_size=2).any()


def test_the_threshold_includes_its_value():
    label = boxes((2, 12, 2, 12), (2, 12, 20, 30))
    affinity, foreground = perfect(label)
    foreground = np.where(label == 1, 0.6, np.where(label == 2, 0.3, 0)).astype(np.float32)

    def found(**kwargs):  # reads `foreground` when it is called
        return set(np.unique(label[segment(affinity, foreground, OFFSETS[2], **kwargs) > 0]))

    assert found() == {1}
    assert found(foreground_threshold=0.2) == {1, 2}
    assert found(foreground_threshold=0.7) == set()
    foreground = np.where(
        label == 1, 0.5, np.where(label == 2, np.nextafter(np.float32(0.5), np.float32(0)), 0)
    )
    assert found() == {1}
    # 128 of 255 is the first value at or above one half, 200 the first above 0.783.
    for first, threshold in ((128, 0.5), (200, 0.783)):
        foreground = np.where(label == 1, first, np.where(label == 2, first - 1, 0)).astype(
            np.uint8
        )
        assert found(foreground_threshold=threshold) == {1}


def test_a_small_segment_is_absorbed_by_the_one_it_touches():
    label = boxes(
        (2, 20, 2, 14), (6, 10, 14, 18), (2, 20, 24, 36)
    )  # 216, 16 and 216 pixels; the second touches the first
    result = segment(*perfect(label), OFFSETS[2], min_fragment=17, min_size=17)
    assert_contract(result, label.shape)
    assert same_partition(np.where(label == 2, 1, label), result)
    assert same_partition(
        label, segment(*perfect(label), OFFSETS[2], min_fragment=16, min_size=16)
    )  # the size itself is large enough


def test_a_small_segment_alone_is_removed():
    label = boxes((2, 20, 2, 14), (24, 28, 20, 24))
    result = segment(*perfect(label), OFFSETS[2], min_fragment=17, min_size=17)
    assert np.array_equal(result, label == 1)
    assert same_partition(label, segment(*perfect(label), OFFSETS[2], min_fragment=16, min_size=16))


def test_touching_is_by_sides_not_by_corners():
    label = boxes((2, 12, 2, 12), (12, 16, 12, 16))
    assert np.array_equal(
        segment(*perfect(label), OFFSETS[2], min_fragment=20, min_size=20), label == 1
    )


@pytest.mark.parametrize("shape", [(60, 70), (9, 30, 20), (1, 200), (1, 1)])
def test_small_segments_are_given_away_as_it_is_written(shape):
    """Compiled or not; those that scikit-image's flooding reaches, to a segment that is nearest."""
    random = np.random.default_rng(0)
    for coarse in (1.0, 2.0, 3.0):
        field = gaussian_filter(random.standard_normal(shape), coarse)
        label = np.where(field > 0, np.digitize(field / (field.std() or 1), [0, 0.4, 0.8, 1.2]), 0)
        label = connected_regions(label, connectivity=1)
        small = random.random(label.max() + 1) < 0.7
        small[0] = False
        compiled, plain = label.astype(np.int64), label.astype(np.int64)
        assert fragments.given_away(compiled, small) is compiled
        fragments._give_plainly(plain[(None,) * (3 - plain.ndim)], small)
        assert np.array_equal(compiled, plain)
        kept = np.where(small[label], 0, label)
        flooded = watershed(np.zeros(shape), kept, mask=label > 0)
        assert np.array_equal(small[compiled], (flooded == 0) & (label > 0))
        assert np.array_equal(compiled[~small[label]], label[~small[label]])
        steps = [geodesic(label > 0, kept == number) for number in np.unique(kept[kept > 0])]
        if steps:
            nearest = np.min(steps, axis=0)
            numbers = np.unique(kept[kept > 0])
            for p in zip(*np.nonzero(small[label] & ~small[compiled]), strict=True):
                assert steps[np.searchsorted(numbers, compiled[p])][p] == nearest[p]


def geodesic(mask, start):
    """Return after how many steps within the mask each pixel is reached, inf for never."""
    steps, reached = np.full(mask.shape, np.inf), start
    for step in itertools.count():
        steps[reached & np.isinf(steps)] = step
        more = binary_dilation(reached) & mask
        if np.array_equal(more, reached):
            return steps
        reached = more


def test_a_chain_of_small_segments_is_absorbed_as_a_whole():
    label = boxes((2, 20, 2, 14), (6, 10, 14, 18), (6, 10, 18, 22), (6, 10, 22, 26))
    result = segment(*perfect(label), OFFSETS[2], min_fragment=17, min_size=17)
    assert np.array_equal(result, label > 0)


def test_small_segments_that_only_touch_each_other_are_removed():
    label = boxes((6, 10, 14, 18), (6, 10, 18, 22))
    result = segment(*perfect(label), OFFSETS[2], min_fragment=17, min_size=17)
    assert_contract(result, label.shape)
    assert not result.any()


def test_a_small_segment_between_two_is_shared_out_and_their_border_stays():
    label = boxes((2, 20, 2, 14), (2, 20, 14, 15), (2, 20, 15, 27))
    result = segment(*perfect(label), OFFSETS[2], min_fragment=20, min_size=20)
    assert_contract(result, label.shape)
    assert result.max() == 2
    for number in (1, 3):
        assert len(np.unique(result[label == number])) == 1
    assert (result[label == 2] > 0).all()


def test_min_size_zero_and_one_keep_everything():
    label = random_map(5, 2)
    for least in (0, 1):
        assert same_partition(
            label, segment(*perfect(label), OFFSETS[2], min_fragment=least, min_size=least)
        )


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stride(stride, ndim):
    label = random_map(6, ndim)
    # as a config has it
    result = segment(*perfect(label), OFFSETS[ndim], **PLAIN | {"stride": float(stride)})
    assert_contract(result, label.shape)
    assert np.array_equal(result > 0, label > 0)
    # Perfect affinities never join two objects by a strong edge; leaving repulsive edges out never
    # splits one.
    assert metrics.evaluate(label, result)["voi_split"] == 0
    if stride <= 2:
        assert same_partition(label, result)


def test_a_stride_leaves_repulsive_edges_out():
    label = boxes((2, 20, 2, 14), (2, 20, 14, 26))
    affinity, foreground = perfect(label)
    # The border attracts a little: now nothing but the repulsive edges keeps the two apart.
    affinity[:2] = np.where(label > 0, np.maximum(affinity[:2], 0.4), 0)
    assert (
        segment(affinity, foreground, OFFSETS[2], min_fragment=0, min_size=0, stride=1).max() == 2
    )
    assert (
        segment(affinity, foreground, OFFSETS[2], min_fragment=0, min_size=0, stride=100).max() == 1
    )


def test_a_stride_is_for_the_last_two_axes_only():
    # one on top of the other
    label = np.repeat([1, 2], 5)[:, None, None] * np.ones((1, 6, 6), np.int64)
    affinity, foreground = perfect(label)
    affinity[:3] = np.maximum(affinity[:3], 0.4)
    assert segment(affinity, foreground, OFFSETS[3], **PLAIN | {"stride": 100}).max() == 2


def test_unknown_names_are_one_clear_sentence():
    affinity, foreground = perfect(random_map(0, 2))
    with pytest.raises(
        ValueError,
        match=r'no segmenter "mutex"; choose one of mutex_watershed, ' r"waterz, multicut",
    ):
        segment(affinity, foreground, OFFSETS[2], "mutex")
    with pytest.raises(
        ValueError, match=r'waterz has no parameter "beta": valid names: ' r"foreground_threshold"
    ):
        segment(affinity, foreground, OFFSETS[2], "waterz", beta=0.5)
    with pytest.raises(ValueError, match=r'no parameter "strid"'):
        score([(affinity, foreground)], [random_map(0, 2)], OFFSETS[2], {"strid": 2})
    for segmenter in ("waterz", "multicut"):
        with pytest.raises(ValueError, match=r"first offsets are \[\[-1, 0\], \[0, -1\]\]"):
            segment(affinity, foreground, [(0, -1), (-1, 0), *OFFSETS[2][2:]], segmenter)


def problem(threshold, count=2):
    """Validation images for which exactly one foreground threshold of the grid is right: a brighter
    rim, a darker halo."""
    predictions, labels = [], []
    for seed in range(count):
        label = random_map(seed, 2, background=0.5)
        affinity, _ = perfect(label)
        rng = np.random.default_rng(seed)
        foreground = np.where(label > 0, threshold + 0.04, threshold - 0.06) + rng.uniform(
            -0.03, 0.03, label.shape
        )
        predictions.append((affinity, foreground.astype(np.float32)))
        labels.append(label)
    return predictions, labels


@pytest.mark.parametrize("threshold", GRID["foreground_threshold"])
def test_tuning_finds_the_right_threshold(threshold):
    predictions, labels = problem(threshold)
    chosen, scores = tune(predictions, labels, OFFSETS[2], "dice")
    assert chosen["foreground_threshold"] == threshold
    assert scores["dice"] > 0.999


def test_tuning_finds_the_right_size():
    label = boxes((2, 20, 2, 14), (2, 20, 20, 32))
    affinity, foreground = perfect(label)
    dirt = boxes((25, 29, 2, 12), (25, 29, 20, 30))  # 40 pixels each
    both = np.where(dirt > 0, dirt + 2, label)
    affinity, foreground = perfect(both)
    chosen, scores = tune([(affinity, foreground)], [label], OFFSETS[2], "f1_50")
    assert chosen["min_size"] == 60
    assert scores["f1_50"] == 1
    kept, _ = tune([(affinity, foreground)], [both], OFFSETS[2], "f1_50")
    assert kept["min_size"] < 80


@pytest.mark.parametrize("metric", ["aji", "pq", "voi", "arand"])
def test_no_choice_of_the_grid_for_one_parameter_is_better_than_the_tuned(metric):
    rng = np.random.default_rng(7)
    predictions, labels = problem(0.5)
    predictions = [
        (np.clip(0.25 + 0.5 * a + rng.normal(0, 0.2, a.shape), 0, 1).astype(np.float32), f)
        for a, f in predictions
    ]
    chosen, scores = tune(predictions, labels, OFFSETS[2], metric)
    assert scores == score(predictions, labels, OFFSETS[2], chosen)
    assert not metrics.is_better(
        metric, score(predictions, labels, OFFSETS[2], DEFAULTS)[metric], scores[metric]
    )
    last = list(GRID)[-1]
    for value in GRID[last]:
        other = score(predictions, labels, OFFSETS[2], chosen | {last: value})
        assert not metrics.is_better(metric, other[metric], scores[metric])


def test_ties_keep_the_default():
    label = random_map(8, 2)
    chosen, scores = tune([perfect(label)], [label], OFFSETS[2])
    assert chosen == DEFAULTS
    assert chosen is not DEFAULTS
    assert scores["aji"] == 1


def test_tuning_uses_nothing_but_its_own_images():
    predictions, labels = problem(0.3)
    others, other_labels = problem(0.7)
    before = tune(predictions, labels, OFFSETS[2])
    tune(others, other_labels, OFFSETS[2])
    assert tune(predictions, labels, OFFSETS[2]) == before
    assert DEFAULTS["foreground_threshold"] == 0.5


def test_score_is_the_mean_over_images():
    predictions, labels = problem(0.5, count=3)
    parameters = DEFAULTS | {"foreground_threshold": 0.4}
    whole = score(predictions, labels, OFFSETS[2], parameters)
    single = [
        score([p], [label], OFFSETS[2], parameters)
        for p, label in zip(predictions, labels, strict=True)
    ]
    assert whole.keys() == metrics.METRICS.keys()
    for key, value in whole.items():
        assert value == pytest.approx(np.mean([one[key] for one in single]))
    with pytest.raises(ValueError, match="zip"):
        score(predictions, labels[:2], OFFSETS[2], parameters)


def with_an_empty_image(strong):
    """Three images of four objects, one of them faint or not, and an empty one in which something
    as faint is seen."""
    label = boxes((2, 12, 2, 12), (2, 12, 20, 30), (20, 30, 2, 12), (20, 30, 20, 30))
    nothing = np.zeros_like(label)
    affinity, foreground = perfect(label)
    foreground = np.where(label == 4, 0.95 if strong else 0.55, foreground)
    faint = boxes((8, 16, 8, 16))
    empty = perfect(faint)[0], np.where(faint > 0, 0.55, 0.0)
    return [(affinity, foreground)] * 3 + [empty], [label] * 3 + [nothing]


@pytest.mark.parametrize(("strong", "threshold", "found"), [(True, 0.6, 0), (False, 0.5, 1)])
@pytest.mark.parametrize("metric", ["aji", "pq", "f1_80"])
def test_an_empty_image_counts_in_tuning_and_does_not_decide(strong, threshold, found, metric):
    """What is found in it is avoided where that costs nothing.

    A quarter of the objects in the others is worth more.
    """
    predictions, labels = with_an_empty_image(strong)
    chosen, scores = tune(predictions, labels, OFFSETS[2], metric)
    assert chosen["foreground_threshold"] == threshold
    assert (scores[metric], scores["empty_images"], scores["false_objects"]) == (1, 1, found)
    plain, without = tune(predictions[:3], labels[:3], OFFSETS[2], metric)
    assert plain["foreground_threshold"] == 0.5
    assert {key: scores[key] for key in without} == without, "the mean is over the others"


def test_nothing_is_tuned_on_empty_images_alone():
    predictions, labels = with_an_empty_image(True)
    with pytest.raises(ValueError, match="none of the images has an object"):
        tune(predictions[3:], labels[3:], OFFSETS[2])


# --- Fragments, waterz and multicut ----------------------------------------------------------------------------------


def noisy(seed, ndim):
    """Affinities without ties, foreground and label of a map in which all objects touch."""
    label = random_map(seed, ndim, background=0.2)
    affinity, foreground = perfect(label)
    rng = np.random.default_rng(seed)
    affinity = 0.5 * affinity + rng.uniform(0, 0.5, affinity.shape)
    return affinity.astype(np.float32), foreground, label


def fragments_of(affinity, foreground):
    near = affinity[: foreground.ndim].astype(np.float32)
    return near, agglomerate._fragments(near, foreground >= 0.5).astype(np.int64)


def region_graph(near, fragments):
    """{(u, v): affinities of all edges between two fragments}, pixel by pixel."""
    found = defaultdict(list)
    for p in np.ndindex(fragments.shape):
        for axis in range(fragments.ndim):
            q = tuple(c - (i == axis) for i, c in enumerate(p))
            u, v = sorted((fragments[p], fragments[q])) if q[axis] >= 0 else (0, 0)
            if 0 < u < v:
                found[u, v].append(float(near[(axis, *p)]))
    return found


def oracle_agglomeration(near, fragments, threshold):
    """Join the pair of highest mean affinity, again and again, and look at all pairs anew each
    time."""
    graph = {
        pair: (sum(values), len(values)) for pair, values in region_graph(near, fragments).items()
    }
    root = np.arange(fragments.max() + 1)
    while graph:
        (u, v), (total, count) = max(graph.items(), key=lambda item: item[1][0] / item[1][1])
        if 1 - total / count >= threshold:
            break
        root[root == v] = u
        joined = defaultdict(lambda: (0.0, 0))
        for (a, b), (t, n) in graph.items():
            a, b = sorted((root[a], root[b]))
            if a != b:
                joined[a, b] = (joined[a, b][0] + t, joined[a, b][1] + n)
        graph = joined
    return root[fragments]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_waterz_joins_as_a_plain_loop_does(seed, ndim):
    affinity, foreground, _ = noisy(seed, ndim)
    near, fragments = fragments_of(affinity, foreground)
    counts = set()
    for threshold in (0.2, 0.35, 0.5):
        expected = oracle_agglomeration(near, fragments, threshold)
        result = segment(
            affinity,
            foreground,
            OFFSETS[ndim],
            "waterz",
            threshold=threshold,
            foreground_threshold=0.5,
            min_fragment=0,
            min_size=0,
        )
        assert_contract(result, foreground.shape)
        assert same_partition(expected, result)
        counts.add(result.max())
    assert len(counts) == 3  # the threshold matters


@pytest.mark.parametrize("ndim", [2, 3])
def test_every_threshold_is_what_waterz_gives_for_it(ndim):
    waterz = pytest.importorskip("waterz")
    affinity, foreground, _ = noisy(5, ndim)
    affinity = (255 * affinity).round() / np.float32(255)  # now many pairs are equally good
    near, fragments = fragments_of(affinity, foreground)
    volume = (1,) * (3 - ndim) + fragments.shape
    near = np.concatenate([np.zeros((3 - ndim, *fragments.shape), np.float32), near]).reshape(
        3, *volume
    )
    values = grid("waterz", ndim)["threshold"]
    direct = waterz.agglomerate(
        near, list(values), fragments=fragments.astype(np.uint64).reshape(volume)
    )
    for threshold, expected in zip(values, direct, strict=True):
        parameters = {
            "threshold": threshold,
            "foreground_threshold": 0.5,
            "min_fragment": 0,
            "min_size": 0,
        }
        result = segment(affinity, foreground, OFFSETS[ndim], "waterz", **parameters)
        assert same_partition(expected.reshape(result.shape), result)


def partitions(items):
    """All ways to put items in groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        for k in range(len(rest)):
            yield [*rest[:k], [items[0], *rest[k]], *rest[k + 1 :]]
        yield [[items[0]], *rest]


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_multicut_is_the_best_of_all_partitions(seed, beta):
    rng = np.random.default_rng(seed)
    label = np.kron(np.arange(6).reshape(2, 3) + 1, np.ones((7, 7), int))
    affinity, foreground = perfect(label)
    # Some borders are open to a different extent, so that fragments want to be joined in several
    # ways at once.
    open_to = np.kron(rng.uniform(0.05, 0.7, (2, 3)), np.ones((7, 7)))
    affinity = np.maximum(affinity, open_to).astype(np.float32)
    near, fragments = fragments_of(affinity, foreground)
    assert 4 <= fragments.max() <= 9
    graph = region_graph(near, fragments)
    longest = max(map(len, graph.values()))
    cost = {}
    for pair, values in graph.items():
        mean = min(max(np.mean(values), 0.001), 0.999)
        cost[pair] = len(values) / longest * (np.log(mean / (1 - mean)) + np.log((1 - beta) / beta))

    def energy(group):
        return sum(c for (u, v), c in cost.items() if group[u] != group[v])

    result = segment(
        affinity, foreground, OFFSETS[2], "multicut", beta=beta, min_fragment=0, min_size=0
    )
    found = {f: result[fragments == f].max() for f in range(1, fragments.max() + 1)}
    assert all((result[fragments == f] == group).all() for f, group in found.items())
    best = min(
        energy({f: k for k, group in enumerate(groups) for f in group})
        for groups in partitions(sorted(found))
    )
    assert energy(found) == pytest.approx(best)


def touching(label):
    """Pixels that have a neighbour of another object, or of the background, in their section."""
    out = np.zeros(label.shape, bool)
    for axis, step in itertools.product((-2, -1), (-1, 1)):
        other = np.roll(label, step, axis) != label
        np.moveaxis(other, axis, 0)[0 if step == 1 else -1] = False  # no neighbour there
        out |= other
    return out


# Not waterz where objects touch in 3D: some meet in a corner alone, and the mean of those few edges
# can be anything.
@pytest.mark.parametrize(
    ("segmenter", "ndim", "membrane"),
    [
        case
        for case in itertools.product(["waterz", "multicut"], [2, 3], [False, True])
        if case != ("waterz", 3, False)
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_fragments_give_the_truth_back_but_for_borders(seed, membrane, ndim, segmenter):
    """Fragments may end one pixel beside a border, and where an object is that thin it may be lost:
    0.1 bits at most."""
    label = random_map(seed, 2, objects=6, background=0.0)
    if membrane:
        label[touching(label)] = 0
    if ndim == 3:  # columns that lean, so that sections are not the same
        label = np.stack([label[z : z + 42, 2 * z : 2 * z + 50] for z in range(5)])
        label = connected_regions(label, background=0, connectivity=1)
    affinity, foreground = perfect(label)
    result = segment(
        affinity * (label > 0), foreground, OFFSETS[ndim], segmenter, foreground_threshold=0.0
    )
    assert_contract(result, label.shape)
    assert (result > 0).all()
    kept = label if membrane else np.where(touching(label), 0, label)
    assert np.count_nonzero(kept) > 0.6 * kept.size
    scores = metrics.evaluate(kept, result)
    assert scores["voi"] < 0.1
    assert scores["arand"] < 0.02


@pytest.mark.parametrize("segmenter", PREDICTED)
@pytest.mark.parametrize("seed", range(2))
def test_a_volume_of_one_section_is_an_image(seed, segmenter):
    affinity, foreground, _ = noisy(seed, 2)
    parameters = {"foreground_threshold": 0.5, "min_fragment": 5, "min_size": 5}
    if segmenter == "mutex_watershed":
        parameters["stride"] = 2
    image = segment(affinity, foreground, OFFSETS[2], segmenter, **parameters)
    # The affinities to the section before are of no consequence: there is none.
    across = np.random.default_rng(seed).random((1, *foreground.shape), np.float32)
    affinity = np.concatenate([across, affinity[:2], across, affinity[2:]])
    offsets = [(0, *offset) for offset in OFFSETS[2]]
    offsets = [(-1, 0, 0), *offsets[:2], (-2, 0, 0), *offsets[2:]]
    volume = segment(affinity[:, None], foreground[None], offsets, segmenter, **parameters)
    assert image.max() > 3
    assert np.array_equal(volume[0], image)


@pytest.mark.parametrize("segmenter", ["waterz", "multicut"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 1, 6), (3, 5, 5)])
def test_one_object_that_fills_the_image_is_found(shape, segmenter):
    label = np.ones(shape, int)
    assert np.array_equal(
        segment(*perfect(label), OFFSETS[len(shape)], segmenter, min_fragment=0, min_size=0), label
    )


@pytest.mark.parametrize("segmenter", ["waterz", "multicut"])
def test_what_has_no_interior_stays_background(segmenter):
    shape = (3, 9, 11)
    nothing = np.zeros((len(OFFSETS[3]), *shape), np.float32)
    result = segment(nothing, np.ones(shape, np.float32), OFFSETS[3], segmenter)
    assert_contract(result, shape)
    assert not result.any()


@pytest.mark.parametrize("segmenter", ["waterz", "multicut"])
def test_a_threshold_of_zero_partitions_everything(segmenter):
    label = random_map(1, 2, objects=6, background=0.0)
    affinity, _ = perfect(label)
    low = np.zeros(label.shape, np.uint8)
    assert (segment(affinity, low, OFFSETS[2], segmenter, foreground_threshold=0.0) > 0).all()
    assert not segment(affinity, low, OFFSETS[2], segmenter, foreground_threshold=0.01).any()


def test_nothing_joins_across_the_background():
    label = boxes((2, 12, 2, 12), (2, 12, 13, 23))
    affinity, foreground = perfect(label)
    affinity[:] = 1  # all would be one, were it not for the gap
    for segmenter in SEGMENTERS:
        assert same_partition(label, segment(affinity, foreground, OFFSETS[2], segmenter))
    for segmenter in PREDICTED:
        assert (
            segment(affinity, foreground, OFFSETS[2], segmenter, foreground_threshold=0.0).max()
            == 1
        )


def test_parameters_split_more_or_less():
    affinity, foreground, _ = noisy(3, 3)
    for segmenter, name, up in (("waterz", "threshold", False), ("multicut", "beta", True)):
        counts = [
            int(segment(affinity, foreground, OFFSETS[3], segmenter, **{name: value}).max())
            for value in grid(segmenter, 3)[name]
        ]
        assert counts[0] != counts[-1]
        assert counts == sorted(counts, reverse=not up)


def test_nothing_is_printed():
    code = (
        "import numpy as np; from gdlib.segment.segmenters import segment; print('before');"
        "a = np.ones((2, 20, 20), np.float32); segment(a, a[0], [(-1, 0), (0, -1)], 'waterz'); "
        "print('after')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("before\nafter\n", "")


def test_threads_do_not_disturb_each_other():
    predictions = [noisy(seed, 3)[:2] for seed in range(4)]
    alone = [segment(*prediction, OFFSETS[3], "waterz") for prediction in predictions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda p: segment(*p, OFFSETS[3], "waterz"), predictions))
    assert all(map(np.array_equal, alone, together))


def test_a_missing_package_is_one_clear_sentence():
    code = (
        "import sys; sys.modules['waterz'] = None; import numpy as np; from "
        "gdlib.segment.segmenters import segment;a = np.ones((2, 20, 20), np.float32); segment(a, "
        "a[0], [(-1, 0), (0, -1)], 'multicut');segment(a, a[0], [(-1, 0), (0, -1)], 'waterz')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        'ValueError: the segmenter "waterz" needs the package waterz: pip install "gdlib[em]"'
        in done.stderr
    )


# --- The mutex watershed by counting, and by sorting ------------------------------------------------------------------


def in_one_piece(affinity, mask, offsets, stride, exponent):
    """The library on everything at once, whose strides begin at the corner of the image; its
    numbers have gaps.
    """
    ndim = mask.ndim
    label = np.zeros(mask.shape, np.int64)
    if mask.any():
        weight = affinity.astype(np.float32) / np.float32(255)
        weight[:ndim] **= np.float32(exponent)
        weight[ndim:] = 1 - weight[ndim:]
        strides = (1,) * (ndim - 2) + (stride,) * 2
        label = bioimage_cpp.segmentation.mutex_watershed(
            weight, offsets, ndim, strides=strides, mask=mask
        )
    return relabel_sequential(label)[0]


@pytest.fixture(params=["counting", "sorting"])
def way(request, monkeypatch):
    if request.param == "sorting":
        monkeypatch.setattr(mutex, "MOST_PIXELS", 0)
    elif not jit.ENABLED:
        pytest.skip("NUMBA_DISABLE_JIT is set")
    return request.param


@pytest.mark.parametrize(
    ("share", "ndim", "stride"),
    [(0.0, 2, 1), (0.3, 2, 3), (0.7, 2, 2), (1.0, 2, 1), (0.3, 3, 1), (0.7, 3, 3), (1.0, 3, 2)],
)
def test_the_mutex_watershed_is_that_of_the_library_at_once(share, ndim, stride, way):
    """Same numbers too, with few levels of affinity, so that many edges are equally strong."""
    shape = {2: (43, 57), 3: (5, 21, 26)}[ndim]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        affinity = rng.choice(np.array([0, 60, 200, 255], np.uint8), (len(OFFSETS[ndim]), *shape))
        smooth = gaussian_filter(rng.normal(size=shape), 1.5)
        mask = smooth <= np.quantile(smooth, share) if share else np.zeros(shape, bool)
        if seed:  # it begins elsewhere than the image
            mask[..., : 2 * seed - 1, :] = mask[..., : 2 * seed + 1] = False
        expected = in_one_piece(affinity, mask, OFFSETS[ndim], stride, 2.0)
        found = mutex.mutex_watershed(affinity, mask, OFFSETS[ndim], stride, 2.0)
        assert np.array_equal(relabel_sequential(found)[0], expected)
        assert way == "sorting" or found.max() == expected.max()  # without gaps
        if stride > 1 and seed and share:  # from where the mask begins it is something else
            box = tuple(slice(axis.min(), axis.max() + 1) for axis in np.nonzero(mask))
            part = in_one_piece(
                affinity[(slice(None), *box)], mask[box], OFFSETS[ndim], stride, 2.0
            )
            assert not np.array_equal(part, expected[box])
        assert share != 0.3 or connected_regions(mask, connectivity=1).max() >= 4


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("exponent", [1.0, 0.7])
def test_counting_all_levels_is_the_same(ndim, exponent, way):
    """Blurred noise makes segments of all sizes, which forbid each other in long lists."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shape = {2: (90, 110), 3: (8, 40, 50)}[ndim]
        noise = gaussian_filter(
            rng.normal(size=(len(OFFSETS[ndim]), *shape)), (0, *(0, 1, 1)[-ndim:])
        )
        affinity = np.clip(255 * (0.5 + noise + 0.2 * rng.random(shape)), 0, 255).astype(np.uint8)
        expected = in_one_piece(affinity, np.ones(shape, bool), OFFSETS[ndim], 1, exponent)
        found = mutex.mutex_watershed(affinity, np.ones(shape, bool), OFFSETS[ndim], 1, exponent)
        assert np.array_equal(relabel_sequential(found)[0], expected)
        assert np.bincount(expected.ravel())[1:].max() > 50


def test_floats_are_not_counted():
    affinity = np.random.default_rng(0).random((len(OFFSETS[2]), 30, 40), np.float32)
    weight = np.concatenate([affinity[:2], 1 - affinity[2:]])
    found = mutex.mutex_watershed(affinity, np.ones((30, 40), bool), OFFSETS[2])
    expected = bioimage_cpp.segmentation.mutex_watershed(weight, OFFSETS[2], 2)
    assert np.array_equal(
        relabel_sequential(found)[0], relabel_sequential(expected.astype(np.int64))[0]
    )


@pytest.mark.parametrize("way", ["_by_counting", "_by_sorting"])
def test_too_little_memory_is_one_sentence(way, monkeypatch):
    def none(*_):
        raise MemoryError

    monkeypatch.setattr(mutex, way, none)
    affinity = np.zeros((2, 4, 5), np.uint8 if way == "_by_counting" else np.float32)
    with pytest.raises(MemoryError, match=r"^the mutex watershed of 4 x 5 pixels$"):
        mutex.mutex_watershed(affinity, np.ones((4, 5), bool), OFFSETS[2][:2])


def test_pieces_are_one_where_far_pixels_attract(way):
    affinity = np.full((3, 9, 20), 255, np.uint8)
    mask = boxes((2, 8, 2, 8), (2, 8, 10, 18), shape=(9, 20)) > 0
    offsets = [[0, -4], [-1, 0], [0, -9]]  # the first joins the two pieces
    found = relabel_sequential(mutex.mutex_watershed(affinity, mask, offsets))[0]
    assert np.array_equal(found, in_one_piece(affinity, mask, offsets, 1, 1.0))
    assert found[4, 7] == found[4, 11]


# --- Tuning of any segmenter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("segmenter", PREDICTED)
def test_tuning_is_a_search_along_one_parameter_after_the_other(segmenter):
    """The same search, with every image segmented anew for every choice."""
    images = [noisy(seed, 3) for seed in range(2)]
    predictions, labels = [image[:2] for image in images], [image[2] for image in images]
    ignores = [None, labels[1] == labels[1].max()]

    def quality(parameters):
        results = [segment(*p, OFFSETS[3], segmenter, **parameters) for p in predictions]
        rows = [metrics.evaluate(*row) for row in zip(labels, results, ignores, strict=True)]
        return {key: np.mean([row[key] for row in rows]) for key in rows[0]}

    expected = defaults(segmenter, 3)
    best = quality(expected)
    for name, values in grid(segmenter, 3).items():
        for value in values:
            if (
                value != expected[name]
                and (other := quality(expected | {name: value}))["aji"] > best["aji"]
            ):
                expected, best = expected | {name: value}, other
    assert expected != defaults(segmenter, 3)
    assert tune(predictions, labels, OFFSETS[3], "aji", segmenter, ignores) == (
        expected,
        pytest.approx(best),
    )
    assert score(predictions, labels, OFFSETS[3], expected, segmenter, ignores) == pytest.approx(
        best
    )


def test_tuning_repeats_only_what_a_parameter_changes(monkeypatch):
    calls = Counter()

    def counted(module, name):
        original = getattr(module, name)

        def wrapper(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    counted(bioimage_cpp.segmentation, "watershed")
    counted(segmenters, "mutex_watershed")
    affinity, foreground, label = noisy(0, 2)
    for segmenter in ("waterz", "multicut"):
        calls.clear()
        tune([(affinity, foreground)], [label], OFFSETS[2], "voi", segmenter)
        # Once for every foreground threshold, and once more to come back to the best.
        assert calls["watershed"] in (5, 6)
    tune([(affinity, foreground)], [label], OFFSETS[2], "voi")
    # five thresholds, three more strides, three more exponents
    assert calls["mutex_watershed"] in range(11, 14)


def test_ignored_pixels_do_not_count_in_tuning():
    label = boxes((2, 20, 2, 14), (2, 20, 20, 32))
    affinity, foreground = perfect(label)
    spurious = perfect(np.where(boxes((25, 29, 2, 12)) > 0, 3, label))
    clean = score([(affinity, foreground)], [label], OFFSETS[2], DEFAULTS)
    assert score([spurious], [label], OFFSETS[2], DEFAULTS)["pq"] < clean["pq"] == 1
    ignore = boxes((24, 30, 0, 40)) > 0
    assert score([spurious], [label], OFFSETS[2], DEFAULTS, ignores=[ignore]) == clean
    assert tune([spurious], [label], OFFSETS[2], "pq", ignores=[ignore])[0] == DEFAULTS


# --- Inside the true foreground --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_true_foreground_is_all_that_is_partitioned(ndim):
    affinity, _, label = noisy(0, ndim)
    parameters = {"min_fragment": 0, "min_size": 0}
    result = segment(affinity, label, OFFSETS[ndim], "mutex_watershed_masked", **parameters)
    assert_contract(result, label.shape)
    np.testing.assert_array_equal(result > 0, label > 0)
    parameters["foreground_threshold"] = 0.5
    same = segment(
        affinity, (label > 0).astype(np.float32), OFFSETS[ndim], "mutex_watershed", **parameters
    )
    np.testing.assert_array_equal(result, same)


def test_scores_inside_the_true_foreground_ignore_the_predicted_one():
    images = [noisy(seed, 2) for seed in range(2)]
    good = [(affinity, foreground) for affinity, foreground, _ in images]
    bad = [(affinity, np.roll(foreground, 3, axis=1)) for affinity, foreground in good]
    labels = [label for *_, label in images]
    parameters, scores = tune(bad, labels, OFFSETS[2], "sbd", "mutex_watershed_masked")
    assert (parameters, scores) == tune(good, labels, OFFSETS[2], "sbd", "mutex_watershed_masked")
    assert score(bad, labels, OFFSETS[2], parameters, "mutex_watershed_masked") == scores
    assert parameters.keys() == DEFAULTS.keys() - {"foreground_threshold"}
    _, plain = tune(bad, labels, OFFSETS[2], "sbd")
    assert plain["dice"] < scores["dice"]
    assert plain["sbd"] < scores["sbd"]


# --- Real shapes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neurons():
    """Labels of a piece of mouse cortex, (20, 192, 192)."""
    path = RAW / "ac3ac4" / "AC4_labels.h5"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with h5py.File(path) as file:
        return file["main"][:20, 100:292, 100:292].astype(np.int64)


EM = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-2, 0, 0], [0, -3, 0], [0, 0, -3]]
EM += [[-3, 0, 0], [0, -9, 0], [0, 0, -9], [-4, 0, 0], [0, -27, 0], [0, 0, -27]]


def uncertain(label, blur, noise, seed=0):
    """Affinities and foreground, uint8, as of a network: blurred within sections, and wrong in
    patches."""
    rng = np.random.default_rng(seed)
    affinity, foreground = perfect(label, EM)
    affinity *= label > 0  # the membranes are no object
    out = []
    for channel in (*affinity, foreground):
        patches = gaussian_filter(rng.normal(0, 1, label.shape), (0, 2, 2))
        channel = (
            0.05 + 0.9 * gaussian_filter(channel, (0, blur, blur)) + noise * patches / patches.std()
        )
        out.append((255 * np.clip(channel, 0, 1)).round().astype(np.uint8))
    return np.stack(out[:-1]), out[-1]


@pytest.fixture(scope="module")
def disturbed(neurons):
    """What a good and a bad network would say of them."""
    return [uncertain(neurons, 0.7, noise) for noise in (0.1, 0.4)]


@pytest.mark.parametrize("segmenter", PREDICTED)
def test_neurons_from_disturbed_affinities(neurons, disturbed, segmenter):
    parameters = {"foreground_threshold": 0.3}
    # The ids of a neuron may be of several pieces in the crop: even the truth is split a little.
    pieces = metrics.evaluate(neurons, connected_regions(neurons, connectivity=1))["voi"]
    better, worse = (
        score([prediction], [neurons], EM, parameters, segmenter) for prediction in disturbed
    )
    assert better["voi"] < pieces + 0.2
    assert better["arand"] < 0.1
    assert worse["voi"] > 5 * better["voi"]


def test_tuning_on_neurons_is_worth_it(neurons):
    crop = neurons[:8]
    prediction = uncertain(crop, 0.7, 0.1)
    _, tuned = tune([prediction], [crop], EM, "voi", "waterz")
    assert tuned["voi"] < 0.9 * score([prediction], [crop], EM, {}, "waterz")["voi"]


@pytest.mark.parametrize("segmenter", PREDICTED)
def test_names_of_neurons_do_not_matter(neurons, segmenter):
    crop = neurons[:6]
    names = np.random.default_rng(1).permutation(np.arange(1, crop.max() + 1))
    renamed = np.append(0, names)[crop]
    one, other = (segment(*uncertain(label, 0.7, 0.05), EM, segmenter) for label in (crop, renamed))
    assert np.array_equal(one, other)
