"""Segmentation: perfect affinities give the truth back, small segments go where they belong, tuning finds the best."""

import inspect

import numpy as np
import pytest
import torch
from skimage.measure import label as connected_regions

from gdlib import metrics, ops
from gdlib.config import Segmentation
from gdlib.segmentation import DEFAULTS, GRID, score, segment, tune

OFFSETS = {
    2: [[-1, 0], [0, -1], [-3, 0], [0, -3], [-5, 0], [0, -5], [-9, 0], [0, -9], [-27, 0], [0, -27]],
    3: [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-2, 0, 0], [0, -3, 0], [0, 0, -3], [-3, 0, 0], [0, -9, 0], [0, 0, -9]],
}
SHAPES = {2: (48, 61), 3: (10, 25, 31)}


def random_map(seed, ndim, objects=14, background=0.3):
    """Cells around random points, most of them touching others, some of them background; no part below 30 pixels."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[ndim]
    points = rng.uniform(0, shape, (objects, ndim))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    cell = ((grid[..., None, :] - points) ** 2).sum(-1).argmin(-1) + 1
    cell[np.isin(cell, np.flatnonzero(rng.random(objects + 1) < background))] = 0
    part = connected_regions(cell, background=0, connectivity=1)
    part[(np.bincount(part.ravel()) < 30)[part]] = 0
    names = np.append(0, rng.permutation(np.arange(1, 10 * part.max() + 1))[: part.max()])  # any ids, in any order
    return names[part]


def perfect(label, offsets=None):
    """Affinities and foreground that a network without error would give."""
    offsets = offsets or OFFSETS[label.ndim]
    affinity = ops.affinity_targets(torch.from_numpy(label.astype(np.int64))[None], offsets)[0]
    return affinity.numpy().astype(np.float32), (label > 0).astype(np.float32)


def same_partition(label, result):
    pairs = np.unique(np.stack([label.ravel(), result.ravel()]), axis=1)
    return len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1] and np.array_equal(label > 0, result > 0)


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
@pytest.mark.parametrize("seed", range(12))
def test_perfect_affinities_give_the_truth_back(seed, ndim):
    label = random_map(seed, ndim)
    assert len(np.unique(label)) > 4
    result = segment(*perfect(label), OFFSETS[ndim], min_size=0)
    assert_contract(result, label.shape)
    assert same_partition(label, result)
    assert metrics.evaluate(label, result)["arand"] == 0


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_a_little_noise_does_no_harm(seed, ndim):
    label = random_map(seed, ndim)
    rng = np.random.default_rng(seed)
    affinity, foreground = perfect(label)
    affinity = np.clip(0.15 + 0.7 * affinity + rng.normal(0, 0.05, affinity.shape), 0, 1)
    foreground = np.clip(0.1 + 0.8 * foreground + rng.normal(0, 0.05, foreground.shape), 0, 1)
    result = segment(affinity, foreground, OFFSETS[ndim], min_size=20)
    assert_contract(result, label.shape)
    assert same_partition(label, result)


def test_wrong_affinities_give_another_result():
    label = random_map(0, 2)
    affinity, foreground = perfect(label)
    assert not same_partition(label, segment(1 - affinity, foreground, OFFSETS[2], min_size=0))
    assert not same_partition(label, segment(np.ones_like(affinity), foreground, OFFSETS[2], min_size=0))


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_map_of_touching_objects_without_background(ndim):
    label = random_map(1, ndim, background=0.0)
    label[label == 0] = label.max() + 1
    label = connected_regions(label, background=0, connectivity=1)
    label[(np.bincount(label.ravel()) < 30)[label]] = 0
    assert np.count_nonzero(label) > 0.95 * label.size
    assert same_partition(label, segment(*perfect(label), OFFSETS[ndim], min_size=0))


def test_input_is_left_as_it_is():
    affinity, foreground = perfect(random_map(2, 2))
    copies = affinity.copy(), foreground.copy()
    segment(affinity, foreground, OFFSETS[2])
    assert np.array_equal(affinity, copies[0])
    assert np.array_equal(foreground, copies[1])


def test_a_mirrored_image_gives_mirrored_objects():
    label = random_map(3, 2)
    for axes in ((0,), (1,), (0, 1)):
        flipped = np.flip(label, axes)
        result = segment(*perfect(flipped), OFFSETS[2], min_size=0)
        assert same_partition(label, np.flip(result, axes))


@pytest.mark.parametrize("ndim", [2, 3])
def test_uint8_equals_float(ndim):
    rng = np.random.default_rng(0)
    label = random_map(4, ndim)
    affinity, foreground = perfect(label)
    affinity = (
        (255 * np.clip(0.2 + 0.6 * affinity + rng.normal(0, 0.15, affinity.shape), 0, 1)).round().astype(np.uint8)
    )
    foreground = (
        (255 * np.clip(0.2 + 0.6 * foreground + rng.normal(0, 0.1, label.shape), 0, 1)).round().astype(np.uint8)
    )
    as_float = segment(affinity.astype(np.float32) / 255, foreground.astype(np.float32) / 255, OFFSETS[ndim])
    as_double = segment(affinity / 255, foreground / 255, OFFSETS[ndim])
    result = segment(affinity, foreground, OFFSETS[ndim])
    assert result.max() > 3
    assert np.array_equal(result, as_float)
    assert np.array_equal(result, as_double)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(9, 11), (3, 9, 11), (1, 1)])
def test_no_foreground(shape, dtype):
    affinity = np.ones((len(OFFSETS[len(shape)]), *shape), dtype)
    result = segment(affinity, np.zeros(shape, dtype), OFFSETS[len(shape)])
    assert_contract(result, shape)
    assert not result.any()


def test_one_pixel_of_foreground():
    label = boxes((4, 5, 6, 7), shape=(9, 11))
    assert np.array_equal(segment(*perfect(label), OFFSETS[2], min_size=1), label)
    assert not segment(*perfect(label), OFFSETS[2], min_size=2).any()


def test_the_threshold_includes_its_value():
    label = boxes((2, 12, 2, 12), (2, 12, 20, 30))
    affinity, foreground = perfect(label)
    foreground = np.where(label == 1, 0.6, np.where(label == 2, 0.3, 0)).astype(np.float32)

    def found(**kwargs):  # reads `foreground` when it is called
        return set(np.unique(label[segment(affinity, foreground, OFFSETS[2], **kwargs) > 0]))

    assert found() == {1}
    assert found(foreground_threshold=0.2) == {1, 2}
    assert found(foreground_threshold=0.7) == set()
    foreground = np.where(label == 1, 0.5, np.where(label == 2, np.nextafter(np.float32(0.5), np.float32(0)), 0))
    assert found() == {1}
    # 128 of 255 is the first value at or above one half, 200 the first above 0.783.
    for first, threshold in ((128, 0.5), (200, 0.783)):
        foreground = np.where(label == 1, first, np.where(label == 2, first - 1, 0)).astype(np.uint8)
        assert found(foreground_threshold=threshold) == {1}


def test_a_small_segment_is_absorbed_by_the_one_it_touches():
    label = boxes(
        (2, 20, 2, 14), (6, 10, 14, 18), (2, 20, 24, 36)
    )  # 216, 16 and 216 pixels; the second touches the first
    result = segment(*perfect(label), OFFSETS[2], min_size=17)
    assert_contract(result, label.shape)
    assert same_partition(np.where(label == 2, 1, label), result)
    assert same_partition(label, segment(*perfect(label), OFFSETS[2], min_size=16))  # the size itself is large enough


def test_a_small_segment_alone_is_removed():
    label = boxes((2, 20, 2, 14), (24, 28, 20, 24))
    result = segment(*perfect(label), OFFSETS[2], min_size=17)
    assert np.array_equal(result, label == 1)
    assert same_partition(label, segment(*perfect(label), OFFSETS[2], min_size=16))


def test_touching_is_by_sides_not_by_corners():
    label = boxes((2, 12, 2, 12), (12, 16, 12, 16))
    assert np.array_equal(segment(*perfect(label), OFFSETS[2], min_size=20), label == 1)


def test_a_chain_of_small_segments_is_absorbed_as_a_whole():
    label = boxes((2, 20, 2, 14), (6, 10, 14, 18), (6, 10, 18, 22), (6, 10, 22, 26))
    result = segment(*perfect(label), OFFSETS[2], min_size=17)
    assert np.array_equal(result, label > 0)


def test_small_segments_that_only_touch_each_other_are_removed():
    label = boxes((6, 10, 14, 18), (6, 10, 18, 22))
    result = segment(*perfect(label), OFFSETS[2], min_size=17)
    assert_contract(result, label.shape)
    assert not result.any()


def test_a_small_segment_between_two_is_shared_out_and_their_border_stays():
    label = boxes((2, 20, 2, 14), (2, 20, 14, 15), (2, 20, 15, 27))
    result = segment(*perfect(label), OFFSETS[2], min_size=20)
    assert_contract(result, label.shape)
    assert result.max() == 2
    for number in (1, 3):
        assert len(np.unique(result[label == number])) == 1
    assert (result[label == 2] > 0).all()


def test_min_size_zero_and_one_keep_everything():
    label = random_map(5, 2)
    for least in (0, 1):
        assert same_partition(label, segment(*perfect(label), OFFSETS[2], min_size=least))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stride(stride, ndim):
    label = random_map(6, ndim)
    result = segment(*perfect(label), OFFSETS[ndim], stride=stride, min_size=0)
    assert_contract(result, label.shape)
    assert np.array_equal(result > 0, label > 0)
    # Perfect affinities never join two objects by a strong edge; leaving repulsive edges out never splits one.
    assert metrics.evaluate(label, result)["voi_split"] == 0
    if stride <= 2:
        assert same_partition(label, result)


def test_a_stride_leaves_repulsive_edges_out():
    label = boxes((2, 20, 2, 14), (2, 20, 14, 26))
    affinity, foreground = perfect(label)
    # The border attracts a little: now nothing but the repulsive edges keeps the two apart.
    affinity[:2] = np.where(label > 0, np.maximum(affinity[:2], 0.4), 0)
    assert segment(affinity, foreground, OFFSETS[2], min_size=0, stride=1).max() == 2
    assert segment(affinity, foreground, OFFSETS[2], min_size=0, stride=100).max() == 1


def test_a_stride_is_for_the_last_two_axes_only():
    label = np.repeat([1, 2], 5)[:, None, None] * np.ones((1, 6, 6), np.int64)  # one on top of the other
    affinity, foreground = perfect(label)
    affinity[:3] = np.maximum(affinity[:3], 0.4)
    assert segment(affinity, foreground, OFFSETS[3], min_size=0, stride=100).max() == 2


def test_defaults_grid_config_and_function_name_the_same_parameters():
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(segment).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert parameters == DEFAULTS
    assert set(Segmentation.model_fields) == set(DEFAULTS)
    assert set(GRID) <= set(DEFAULTS)
    for name, values in GRID.items():
        Segmentation.model_validate({name: values[0]})
        assert DEFAULTS[name] in values  # otherwise the default would be tried outside the grid


def problem(threshold, count=2):
    """Validation images for which exactly one foreground threshold of the grid is right: a brighter rim, a darker halo."""
    predictions, labels = [], []
    for seed in range(count):
        label = random_map(seed, 2, background=0.5)
        affinity, _ = perfect(label)
        rng = np.random.default_rng(seed)
        foreground = np.where(label > 0, threshold + 0.04, threshold - 0.06) + rng.uniform(-0.03, 0.03, label.shape)
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
    assert chosen["min_size"] == 80
    assert scores["f1_50"] == 1
    kept, _ = tune([(affinity, foreground)], [both], OFFSETS[2], "f1_50")
    assert kept["min_size"] < 80


@pytest.mark.parametrize("metric", ["aji", "pq", "voi", "arand"])
def test_no_choice_of_the_grid_for_one_parameter_is_better_than_the_tuned(metric):
    rng = np.random.default_rng(7)
    predictions, labels = problem(0.5)
    predictions = [
        (np.clip(0.25 + 0.5 * a + rng.normal(0, 0.2, a.shape), 0, 1).astype(np.float32), f) for a, f in predictions
    ]
    chosen, scores = tune(predictions, labels, OFFSETS[2], metric)
    assert scores == score(predictions, labels, OFFSETS[2], chosen)
    assert not metrics.is_better(metric, score(predictions, labels, OFFSETS[2], DEFAULTS)[metric], scores[metric])
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
    single = [score([p], [label], OFFSETS[2], parameters) for p, label in zip(predictions, labels, strict=True)]
    assert whole.keys() == metrics.METRICS.keys()
    for key, value in whole.items():
        assert value == pytest.approx(np.mean([one[key] for one in single]))
    with pytest.raises(ValueError, match="zip"):
        score(predictions, labels[:2], OFFSETS[2], parameters)
