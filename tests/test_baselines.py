"""Baselines: each is what it says, and its scores are those that follow from that."""

import math
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from skimage.measure import label as connected_regions

from gdlib import io
from gdlib.evaluate import metrics, scores
from gdlib.evaluate.trivial import (
    BASELINES,
    OF_VOLUMES,
    evaluate_baselines,
    image_watershed,
    one_segment,
    sections,
    true_sections,
)

RAW = Path(os.environ.get("GDLIB_RAW", Path(__file__).resolve().parents[2] / "shared" / "data"))


def columns(depth=4, side=12, per_row=3):
    """Equal square columns without gaps: (Z, Y, X)."""
    section = np.kron(
        np.arange(1, per_row**2 + 1).reshape(per_row, per_row), np.ones((side, side), int)
    )
    return np.repeat(section[None], depth, 0).astype(np.uint32)


def sample_of(label, image=None, **attrs):
    image = np.zeros((1, *label.shape), np.uint8) if image is None else image
    return io.Sample("a", image, label.astype(np.uint32), attrs=attrs)


def test_scores_that_follow_from_the_definition():
    label = columns()
    sample = sample_of(label)
    objects, depth = math.log2(9), math.log2(4)
    expected = {one_segment: (0, objects), sections: (depth, objects), true_sections: (depth, 0)}
    for baseline, (split, merge) in expected.items():
        scores = metrics.evaluate(label, baseline(sample))
        assert (scores["voi_split"], scores["voi_merge"]) == pytest.approx((split, merge))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_baseline_is_a_label(name, ndim):
    if name in OF_VOLUMES and ndim == 2:
        pytest.skip("there is one section")
    rng = np.random.default_rng(0)
    label = columns()[(slice(None) if ndim == 3 else 0)]
    sample = sample_of(label, rng.integers(0, 255, (2, *label.shape), np.uint8))
    title, function = BASELINES[name]
    result = function(sample)
    assert title
    assert result.dtype == np.uint32
    assert result.shape == label.shape


def test_true_sections_are_the_parts_of_every_section():
    rng = np.random.default_rng(0)
    label = np.kron(rng.integers(0, 4, (5, 6, 7)), np.ones((1, 3, 3), int))
    result = true_sections(sample_of(label))
    assert np.array_equal(result > 0, label > 0)
    seen = set()
    for section, cut in zip(label, result, strict=True):
        pairs = set(
            zip(
                connected_regions(section, background=0, connectivity=1).ravel(),
                cut.ravel(),
                strict=True,
            )
        )
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        ids = {int(b) for _, b in pairs} - {0}
        assert not ids & seen  # nothing is linked
        seen |= ids
    assert seen == set(range(1, len(seen) + 1))
    assert metrics.evaluate(label, result)["voi_merge"] == 0


def test_an_empty_volume_stays_empty():
    assert not true_sections(sample_of(np.zeros((3, 5, 5)))).any()


def test_watershed_finds_bright_discs_on_a_dark_ground():
    y, x = np.mgrid[:120, :150]
    label = np.zeros((120, 150), int)
    # two of them touch
    for number, (cy, cx) in enumerate([(30, 30), (30, 62), (80, 40), (90, 110)], start=1):
        label[(y - cy) ** 2 + (x - cx) ** 2 <= 16**2] = number
    image = np.random.default_rng(0).normal(np.where(label > 0, 150, 30), 10)
    scores = metrics.evaluate(label, image_watershed(sample_of(label, image[None])))
    assert scores["f1_80"] == 1
    assert scores["dice"] > 0.95


def cells(voxel_size_nm, side=480, per_row=3):
    """Cubes of tissue with dark membranes, sampled with these voxels: image and label."""
    shape = [round(side / size) for size in voxel_size_nm]
    at = np.meshgrid(*[(np.arange(n) + 0.5) / n * per_row for n in shape], indexing="ij")
    label = 1 + sum(np.floor(a).astype(int) * per_row**k for k, a in enumerate(at))
    to_wall = np.min([np.minimum(a % 1, 1 - a % 1) for a in at], axis=0) * side / per_row
    image = np.random.default_rng(0).normal(np.where(to_wall < 12, 60, 180), 8)
    return image[None].astype(np.float32), label


def test_watershed_knows_that_voxels_are_flat():
    image, label = cells((30, 6, 6))
    scores = metrics.evaluate(
        label, image_watershed(sample_of(label, image, voxel_size_nm=[30.0, 6.0, 6.0]))
    )
    assert scores["f1_70"] == 1
    assert (image_watershed(sample_of(label, image, voxel_size_nm=[30.0, 6.0, 6.0])) > 0).all()
    blind = metrics.evaluate(label, image_watershed(sample_of(label, image)))
    assert blind["voi"] > scores["voi"] + 0.5


def test_watershed_depends_on_the_shape_of_voxels_not_on_their_unit():
    image, label = cells((30, 6, 6))
    one, other = (
        image_watershed(sample_of(label, image, voxel_size_nm=size))
        for size in ([30, 6, 6], [5, 1, 1])
    )
    assert np.array_equal(one, other)


def test_an_image_of_one_value_is_no_error():
    result = image_watershed(sample_of(np.ones((20, 20), int)))
    assert result.shape == (20, 20)


def test_rows_are_every_metric_of_every_baseline(tmp_path):
    path = tmp_path / "test.h5"
    label = columns()
    ignore = label == 9
    volume = io.Sample("volume", np.zeros((1, *label.shape), np.uint8), label, ignore)
    image = io.Sample("image", np.zeros((1, *label.shape[1:]), np.uint8), label[0])
    io.write_samples(path, [volume, image])
    rows = evaluate_baselines(path)
    found = {}
    for baseline, sample, metric, value in rows:
        found.setdefault((baseline, sample), {})[metric] = value
    assert sum(map(len, found.values())) == len(rows)
    assert set(found) == {(name, "volume") for name in BASELINES} | {
        (name, "image") for name in BASELINES if name not in OF_VOLUMES
    }
    assert all(
        one.keys() == metrics.METRICS.keys() | scores.COUNTS.keys() for one in found.values()
    )
    assert found["one_segment", "image"]["voi_merge"] == pytest.approx(math.log2(9))
    # one column does not count
    assert found["one_segment", "volume"]["voi_merge"] == pytest.approx(math.log2(8))


def test_neurons_are_not_found_by_any_of_them():
    folder = RAW / "ac3ac4"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    crop = slice(0, 16), slice(100, 292), slice(100, 292)
    with (
        h5py.File(folder / "AC4_inputs.h5") as images,
        h5py.File(folder / "AC4_labels.h5") as labels,
    ):
        sample = sample_of(
            labels["main"][crop], images["main"][crop][None], voxel_size_nm=[30.0, 6.0, 6.0]
        )
    voi = {
        name: metrics.evaluate(sample.label, function(sample))["voi"]
        for name, (_, function) in BASELINES.items()
    }
    # The image says something about the objects, and none of this is anywhere near a good
    # segmentation.
    assert (
        1.5
        < voi["image_watershed"]
        < min(voi["one_segment"], voi["true_sections"])
        < voi["sections"]
    )
    assert (
        voi["image_watershed"]
        < metrics.evaluate(sample.label, image_watershed(sample, rounding=1))["voi"]
    )
