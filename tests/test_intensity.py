"""Normalisation: percentiles, the noise of an image, the least range, and that no object is found where there is none."""

import math

import h5py
import numpy as np
import pytest

from gdlib.data import intensity
from gdlib.data.intensity import intensity_range, learn, noise, normalise, rescale


def percentile(values, share):
    """Linear between the two nearest ranks."""
    values = sorted(values)
    rank = share / 100 * (len(values) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(values) - 1)
    return values[below] + (rank - below) * (values[above] - values[below])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 13, 17), (2, 3, 9, 7)])
def test_percentiles_become_0_and_1(shape, dtype):
    image = np.random.default_rng(0).integers(0, 250, shape)
    image[1] = image[1] // 2 + 3  # channels differ
    image = (image * (200 if dtype == np.uint16 else 1)).astype(dtype)
    out = normalise(image, 3.0, 90.0)
    assert out.dtype == np.float32
    assert out.shape == shape
    for channel, result in zip(image, out, strict=True):
        values = [float(v) for v in channel.flat]
        low, high = percentile(values, 3.0), percentile(values, 90.0)
        np.testing.assert_allclose(result, (channel.astype(float) - low) / (high - low), atol=1e-5)
        assert result.min() < 0
        assert result.max() > 1.05  # not clipped
    np.testing.assert_allclose(normalise(3.0 * image + 100, 3.0, 90.0), out, atol=1e-4)


@pytest.mark.parametrize("slab", [2**24, 40, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("shape", [(2, 21, 10), (2, 9, 6, 5)])
def test_range_is_that_of_numpy_however_it_is_read(shape, dtype, slab, tmp_path, monkeypatch):
    """Slab by slab, from memory or from a file; of types without a histogram, every n-th section or row counts."""
    monkeypatch.setattr(intensity, "SLAB", slab)
    rng = np.random.default_rng(4)
    image = (rng.gamma(2.0, 30.0, shape).clip(0, 250) * (257 if dtype == np.uint16 else 1)).astype(dtype)
    image[1] = image[1] // 3 + 5
    with h5py.File(tmp_path / "image.h5", "w") as file:
        stored = file.create_dataset("image", data=image)
        found = [intensity_range(array, 2.5, 97.0) for array in (image, stored)]
    step = 1
    if dtype not in (np.uint8, np.uint16):
        thickness = max(1, slab // math.prod(shape[2:]))
        step = -(-shape[1] // thickness)
    for low, high in found:
        assert (low.dtype, high.dtype, low.shape) == (np.float32, np.float32, (2,))
        for c in range(2):
            expected = np.percentile(image[c, ::step].astype(np.float64), [2.5, 97.0])
            np.testing.assert_allclose([low[c], high[c]], expected, rtol=1e-6)


@pytest.mark.parametrize("slab", [2**24, 1])
def test_range_of_an_image_with_one_bright_pixel(slab, monkeypatch):
    """Both percentiles are the same value: minimum and maximum take their place."""
    monkeypatch.setattr(intensity, "SLAB", slab)
    image = np.full((1, 20, 20), 3, np.uint8)
    image[0, 4, 5] = 200
    assert [float(v[0]) for v in intensity_range(image, 1.0, 99.0)] == [3, 200]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_flat_channel_becomes_0(dtype):
    image = np.stack([np.full((5, 6), 7), np.arange(30).reshape(5, 6)]).astype(dtype)
    out = normalise(image, 0.0, 100.0)
    assert (out[0] == 0).all()
    np.testing.assert_allclose(out[1].ravel(), np.arange(30) / 29, atol=1e-6)
