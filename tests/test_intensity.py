"""Normalisation: percentiles, the noise of an image, the least range, and that no object is found
where there is none."""

import itertools
import math
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from gdlib import io
from gdlib.cli.main import main
from gdlib.data import intensity
from gdlib.data.augment import empty_patches
from gdlib.data.files import read_image
from gdlib.data.intensity import (
    STEPS,
    Negative,
    ground_is_elsewhere,
    intensity_range,
    learn,
    normalise,
    pixel_noise,
    rescale,
)
from gdlib.data.patches import PatchSampler
from gdlib.predict.predictor import Predictor
from gdlib.segment.segmenters import segment

RAW = Path(os.environ.get("GDLIB_RAW", Path(__file__).parents[1].parent / "shared" / "data"))
PERCENTILES = {"lower": 1.0, "upper": 99.8}


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
    """Slab by slab, from memory or from a file.

    Of types without a histogram, every n-th section or row counts.
    """
    monkeypatch.setattr(intensity, "SLAB", slab)
    rng = np.random.default_rng(4)
    image = (rng.gamma(2.0, 30.0, shape).clip(0, 250) * (257 if dtype == np.uint16 else 1)).astype(
        dtype
    )
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


# --- Noise, and the least range -------------------------------------------------------------------------------------


def slow_noise(plane, step):
    """The definition, pixel by pixel."""
    height, width = plane.shape
    values = []
    for y, x in itertools.product(range(step, height - step), range(step, width - step)):
        value = 0.0
        for (dy, a), (dx, b) in itertools.product(
            zip((-step, 0, step), (1, -2, 1), strict=True), repeat=2
        ):
            value += a * b * float(plane[y + dy, x + dx])
        values.append(abs(value))
    values.sort()
    count = len(values)
    return 1.4826 / 6 * (values[(count - 1) // 2] + values[count // 2]) / 2 if values else 0.0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("shape", [(2, 12, 9), (1, 7, 3), (1, 2, 2)])
def test_noise_is_that_of_its_definition(shape, dtype, tmp_path):
    image = (np.random.default_rng(1).gamma(2.0, 20.0, shape).clip(0, 250)).astype(dtype)
    image[0, 1:4] += 3
    expected = [max(slow_noise(plane, 1), slow_noise(plane, 2)) for plane in image]
    if dtype != np.float32:
        expected = np.maximum(expected, 1 / math.sqrt(12))
    with h5py.File(tmp_path / "image.h5", "w") as file:
        for array in (image, file.create_dataset("image", data=image)):
            found = pixel_noise(array)
            assert (found.dtype, found.shape) == (np.float32, shape[:1])
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_noise_of_a_volume_is_within_its_sections():
    rng = np.random.default_rng(0)
    volume = rng.normal(0, 3, (1, 5, 30, 30)) + 1000.0 * rng.permutation(5)[:, None, None]
    assert pixel_noise(volume.astype(np.float32)) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("shape", [(1, 700, 90), (1, 60, 30, 35), (1, 6, 9000)])
def test_noise_of_a_large_image_is_that_of_a_part(shape, monkeypatch):
    image = np.random.default_rng(0).normal(0, 5, shape).astype(np.float32)
    whole = pixel_noise(image)
    monkeypatch.setattr(intensity, "SAMPLE", 2**13)
    rows = sum(s.stop - s.start for s in intensity._strips(shape))
    assert rows * math.prod(shape[2:]) <= max(2**13, 5 * shape[-1])
    assert pixel_noise(image) != whole
    np.testing.assert_allclose(pixel_noise(image), whole, rtol=0.05)
    np.testing.assert_array_equal(pixel_noise(image), pixel_noise(image))


def scene(rng, sigma=4.0, shape=(120, 130), bright=300.0, ground=100.0, side=17):
    """Squares on a ground with noise: image (1, Y, X) float, label."""
    label = np.zeros(shape, np.uint32)
    for number, (y, x) in enumerate(np.ndindex(shape[0] // 30, shape[1] // 30), start=1):
        label[30 * y + 5 : 30 * y + 5 + side, 30 * x + 5 : 30 * x + 5 + side] = number
    return (np.where(label > 0, bright, ground) + rng.normal(0, sigma, shape))[None], label


@pytest.mark.parametrize("sigma", [2.0, 9.0])
@pytest.mark.parametrize("gain", [1.0, 16.0, 1e-4])
def test_noise_does_not_look_at_objects_and_scales_with_the_image(sigma, gain):
    image, _ = scene(np.random.default_rng(0), sigma, (400, 400))
    assert pixel_noise(image * gain) == pytest.approx(sigma * gain, rel=0.15)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_the_range_is_that_of_the_whole_noise(kind):
    """Also where noise is not searched for to the end, as it cannot count: there are both cases."""
    rng, widened = np.random.default_rng(0), 0
    contrast, level = np.float32([6, 20]), np.float32([0.2, 0.3])
    there = np.zeros((2, 50, 60), bool)
    there[:, 10:25, 10:40] = True
    for sigma, height in rng.uniform((0, 0), (20, 200), (40, 2)):
        image = 20 + height * there + rng.normal(0, sigma, there.shape)
        image = image.clip(0, 255).astype(kind)
        low, high = intensity_range(image, **PERCENTILES)
        more = np.maximum(contrast * pixel_noise(image) - (high - low), 0)
        widened += (more > 0).sum()
        found = intensity_range(image, **PERCENTILES, contrast=contrast, level=level)
        np.testing.assert_array_equal(found[0], low - level * more)
        np.testing.assert_array_equal(found[1], high + (1 - level) * more)
    assert 10 < widened < 70


def sample(image, label, **more):
    return {"image": image, "label": label, **more}


def test_the_least_range_is_learned_from_images_with_objects():
    rng = np.random.default_rng(0)
    scenes = [sample(*scene(rng, sigma)) for sigma in (2.0, 4.0, 8.0)]
    (least,) = learn(scenes, **PERCENTILES, noise=0.1)["contrast"]
    contrasts = []
    for one in scenes:
        low, high = intensity_range(one["image"], **PERCENTILES)
        contrasts.append(((high - low) / pixel_noise(one["image"])).item())
    assert least == pytest.approx(min(contrasts), rel=1e-4)  # about 25
    alone = rng.normal(0, 1, (1, 500, 500))
    (limit,) = learn(scenes, **PERCENTILES, noise=0.4)["contrast"]
    assert 0.4 * limit == pytest.approx(np.ptp(intensity_range(alone, **PERCENTILES)), rel=0.02)
    empty = rng.normal(100, 4, (1, 120, 130))
    more = [
        sample(empty, np.zeros((120, 130), np.uint32)),
        sample(empty, np.eye(120, 130, dtype=np.uint32) * (rng.random(130) < 0.1)),
    ]
    assert learn(scenes + more, **PERCENTILES, noise=0.1)["contrast"] == [least]
    # One image in fifty that says it has objects, and has not.
    wrong = scenes * 17 + [sample(empty, scenes[0]["label"])]
    assert learn(wrong, **PERCENTILES, noise=0.1)["contrast"] == [least]
    assert (
        learn(scenes, **PERCENTILES, noise=1.0)
        == learn(more, **PERCENTILES, noise=0.1)
        == PERCENTILES
    )


@pytest.mark.parametrize("bright", [300.0, 20.0])
def test_the_level_is_where_the_background_is(bright):
    rng = np.random.default_rng(0)
    image, label = scene(rng, 3.0, bright=bright)
    ignore = label == 1
    image[0][ignore] = 5000.0  # what is ignored counts neither as background
    learned = learn([sample(image, np.where(ignore, 0, label), ignore=ignore)], 1.0, 95.0, 0.1)
    low, high = intensity_range(image, 1.0, 95.0)
    assert learned["level"] == pytest.approx(
        (np.median(image[0][label == 0]) - low) / (high - low), abs=1e-3
    )
    if bright < 100:
        assert learned["level"][0] > 0.5


def test_channels_have_their_own():
    rng = np.random.default_rng(0)
    image, label = scene(rng, 2.0)
    dim = scene(rng, 8.0, bright=40.0)[0]
    learned = learn([sample(np.concatenate([image, dim]), label)], **PERCENTILES, noise=0.1)
    for channel, one in enumerate((image, dim)):
        alone = learn([sample(one, label)], **PERCENTILES, noise=0.1)
        assert [learned[key][channel] for key in ("contrast", "level")] == [
            alone["contrast"][0],
            alone["level"][0],
        ]


def test_nothing_is_learned_of_images_without_noise():
    image, label = scene(np.random.default_rng(0), 0.0)
    learned = learn([sample(image, label)], **PERCENTILES, noise=0.1)
    assert learned["contrast"] == [0.0]
    np.testing.assert_array_equal(
        intensity_range(image, **learned), intensity_range(image, **PERCENTILES)
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, bool])
def test_a_negative_is_the_image_of_which_dark_is_bright(dtype, tmp_path):
    rng = np.random.default_rng(0)
    image = (rng.gamma(2, 20, (1, 40, 30)) % 127).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = image
        for seen in (Negative(image), Negative(file["image"])):
            assert (seen.shape, seen.dtype, seen.ndim) == (image.shape, image.dtype, 3)
            part = seen[:, 3:9, 4]
            assert part.dtype == image.dtype
            # the greatest is the least, in equal steps
            sums = part.astype(float) + image[:, 3:9, 4].astype(float)
            assert len(np.unique(sums)) == 1
            low, high = intensity_range(seen, 1, 99.8)
            other = intensity_range(image, 0.2, 99)
            np.testing.assert_allclose(high - low, other[1] - other[0], rtol=1e-5)
            assert rescale(seen[()], low, high).argmax() == image.argmin()


def test_a_ground_as_bright_as_objects_is_noticed():
    rng = np.random.default_rng(0)
    image = rng.normal(20, 2, (1, 90, 90))
    image[:, 30:50, 30:50] += 100
    for seen, level, expected in (
        (image, [0.05], False),
        (Negative(image), [0.05], True),
        (Negative(image), [0.95], False),
        (image, [0.95], True),
    ):
        low, high = intensity_range(seen, 1, 99.8)
        assert ground_is_elsewhere(seen, low, high, level) is expected


def test_a_ground_of_all_kinds_has_no_place(tmp_path):
    """As in and around a well: objects are dark on its bright ground, and around it is nothing."""
    rng = np.random.default_rng(0)
    image, label = rng.normal(10, 1, (1, 120, 160)), np.zeros((120, 160), np.uint32)
    image[:, :, 60:] += 90
    label[20:40, 80:100], label[60:80, 100:150] = 1, 2
    image[:, label > 0] = 50
    learned = learn([sample(image, label)], **PERCENTILES, noise=0.1)
    ground = image[0][label == 0]
    low, high = (value[0] for value in intensity_range(image, **PERCENTILES))
    places = [(percentile(ground, share) - low) / (high - low) for share in (5, 95)]
    assert learned["spread"][0] == pytest.approx(places[1] - places[0], abs=1e-4)
    even = learn([sample(*scene(np.random.default_rng(0)))], **PERCENTILES, noise=0.1)
    assert even["spread"][0] < 0.3
    inside = image[:, :, 60:]
    ends = intensity_range(inside, **learned)
    level = [0.05]  # as where more than half of the training images is outside
    assert ground_is_elsewhere(inside, *ends, level)
    assert ground_is_elsewhere(inside, *ends, level, even["spread"])
    assert not ground_is_elsewhere(inside, *ends, level, learned["spread"])


def test_samples_may_stay_in_their_file(tmp_path):
    image, label = scene(np.random.default_rng(0))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        stored = {
            key: file.create_dataset(key, data=array)
            for key, array in (("image", image), ("label", label))
        }
        assert learn([stored], **PERCENTILES, noise=0.1) == learn(
            [sample(image, label)], **PERCENTILES, noise=0.1
        )


@pytest.mark.parametrize("level", [0.0, 0.25, 1.0])
def test_a_range_is_widened_to_the_least(level):
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.normal(100, 4, (1, 200, 200)), scene(rng, shape=(200, 200))[0]])
    low, high = intensity_range(image, **PERCENTILES)
    wide_low, wide_high = intensity_range(
        image, **PERCENTILES, contrast=[30.0, 30.0], level=[level, level]
    )
    assert (wide_low[1], wide_high[1]) == (low[1], high[1])  # with objects, as before
    assert wide_high[0] - wide_low[0] == pytest.approx(30 * pixel_noise(image)[0], rel=1e-5)
    assert (low[0] - wide_low[0]) / (
        wide_high[0] - wide_low[0] - high[0] + low[0]
    ) == pytest.approx(level, abs=1e-4)


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_flat_image_becomes_the_level(dtype, value):
    image = np.full((1, 20, 20), value, dtype)
    out = rescale(image, *intensity_range(image, **PERCENTILES, contrast=[30.0], level=[0.75]))
    np.testing.assert_allclose(out, 0.75, atol=1e-3)


# --- Patches without objects ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2, 40, 48), (3, 1, 5, 24, 24)])
def test_empty_patches_have_a_part_of_the_range(shape):
    generator = torch.Generator().manual_seed(0)
    patches = torch.cat(
        [empty_patches(shape, generator, **PERCENTILES, level=[0.25] * shape[1]) for _ in range(30)]
    )
    flat = patches.flatten(2).double().numpy()
    low, high = np.percentile(flat, [1.0, 99.8], axis=-1)
    share = high - low
    np.testing.assert_allclose(low, 0.25 * (1 - share), atol=0.03)
    assert share.min() < 0.1 < 0.9 < share.max() < 1.05


def made(splits, step=3, **augment):
    options = {"geometry": {}, "intensity": {"noise": 0.1, "brightness": 0.2}, "sections": {}}
    normalisation = PERCENTILES | {"noise": 0.1}
    sampler = PatchSampler(
        splits["train"],
        patch=(32, 32),
        batch_size=12,
        normalisation=normalisation,
        augment=options | augment,
        seed=5,
    )
    return sampler.batch(step)


def test_empty_patches_leave_all_others_as_they_are(splits):
    without, never, always, some = (
        made(splits),
        made(splits, empty=0.0),
        made(splits, empty=1.0),
        made(splits, empty=0.4),
    )
    assert torch.equal(without.image, never.image)
    assert torch.equal(without.label, never.label)
    assert not always.label.any()
    replaced = ~some.label.flatten(1).any(1)
    assert 0 < replaced.sum() < 12
    for key in ("image", "label", "ids"):
        assert torch.equal(getattr(some, key)[~replaced], getattr(without, key)[~replaced])
    assert (some.image[replaced] != without.image[replaced]).float().mean() > 0.99
    again, later = made(splits, empty=0.4), made(splits, step=4, empty=0.4)
    assert torch.equal(some.image, again.image)
    assert not torch.equal(some.image[replaced][0], later.image[~later.label.flatten(1).any(1)][0])


def test_volumes_without_background_have_no_limit_and_no_empty_patches(make_spec):
    for connected in (True, False):
        drawing = make_spec(targets={"background_connected": connected}).drawing
        assert (drawing["normalisation"]["noise"] < 1, drawing["augment"]["empty"] > 0) == (
            connected,
            connected,
        )


# --- No object where there is none ----------------------------------------------------------------------------------

DEPTHS = {  # of an image whose values are 0 to 1
    "8 bits": lambda image: (image * 255).round().astype(np.uint8),
    "12 bits in 16": lambda image: (image * 4095).round().astype(np.uint16),
    "16 bits": lambda image: (image * 65535).round().astype(np.uint16),
    "float": lambda image: image.astype(np.float32),
}
EMPTY = {
    "noise": lambda rng: (0.1 + rng.normal(0, 0.01, (1, 80, 96))).clip(0, 1),
    "noise on a slope": lambda rng: (
        0.1 + np.linspace(0, 0.03, 96) + rng.normal(0, 0.01, (1, 80, 96))
    ).clip(0, 1),
    "shot noise": lambda rng: rng.poisson(30, (1, 80, 96)) / 255,
    "noise in the light": lambda rng: (0.8 + rng.normal(0, 0.02, (1, 80, 96))).clip(0, 1),
    "dark": lambda rng: np.zeros((1, 80, 96)),
    "saturated": lambda rng: np.ones((1, 80, 96)),
    "constant": lambda rng: np.full((1, 80, 96), 0.4),
}


@pytest.fixture(scope="module")
def weights(make_spec, train, tmp_path_factory):
    """Return the weights file of a network that was trained for seconds, with an empty patch in
    five: it sees few."""
    folder = tmp_path_factory.mktemp("weights")
    spec = make_spec(
        widths=(4, 4, 8, 8, 8),
        steps=120,
        batch_size=8,
        validate_every=120,
        optimizer={"lr": 0.02},
        augment={"empty": 0.2},
    )
    train(spec, folder)
    return folder / "weights.safetensors"


@pytest.fixture(scope="module")
def find(weights):
    """Return `find(image, **header)` -> label, by that network, with its header or a changed
    one."""

    def objects(image, **header):
        predictor = Predictor.load(weights, engine="torch", device="cpu", precision="float32")
        predictor.header = predictor.header | header
        prediction = predictor(image)
        (name,) = predictor.header["segmentation"]
        parameters = predictor.header["segmentation"][name]
        return segment(
            prediction.affinity,
            prediction.foreground,
            predictor.header["offsets"],
            name,
            **parameters,
        )

    return objects


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", EMPTY)
def test_nothing_is_found_in_an_empty_image(find, kind, depth):
    assert find(DEPTHS[depth](EMPTY[kind](np.random.default_rng(3)))).max() == 0


@pytest.mark.parametrize("depth", DEPTHS)
def test_objects_are_found_at_every_depth(find, squares, depth):
    image, label = squares(77, (80, 96))
    found = find(DEPTHS[depth](image / 255))
    assert 0.8 * label.max() <= found.max() <= 1.2 * label.max()
    assert ((found > 0) == (label > 0)).mean() > 0.9


def test_weights_without_a_limit_see_images_as_before(find, weights, tmp_path, capsys):
    """Files of older versions: they load, say so, and stretch noise to the full range."""
    state, header = io.load_weights(weights)
    image = DEPTHS["12 bits in 16"](EMPTY["noise"](np.random.default_rng(3)))
    assert find(image).max() == 0
    main(["info", str(weights)])
    assert (
        f"{header['normalisation']['contrast'][0]:g} times the noise or more"
        in capsys.readouterr().out
    )
    io.save_weights(tmp_path / "old.safetensors", state, header | {"normalisation": PERCENTILES})
    source = Predictor.load(tmp_path / "old.safetensors", engine="torch", device="cpu").source(
        image
    )
    np.testing.assert_array_equal(
        source.read((0, 0), source.shape), normalise(image, **PERCENTILES)
    )
    main(["info", str(tmp_path / "old.safetensors")])
    assert "noise is stretched" in capsys.readouterr().out


def bbbc039():
    """Yield (image (1, Y, X), label) of the training images, the one without objects last."""
    folder = RAW / "bbbc039"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set GDLIB_RAW to the folder above it")
    names = sorted(path.stem for path in (folder / "images").glob("*.tif"))
    for name in [*names[:8], next(name for name in names if name.startswith("IXMtest_L10_s6"))]:
        yield (
            read_image(folder / f"images/{name}.tif", 1),
            read_image(folder / f"masks/{name}.png", 4)[0],
        )


def test_an_empty_field_of_real_nuclei_is_told_from_all_others():
    *full, (empty, label) = bbbc039()
    assert label.max() == 0
    learned = learn([sample(image, label) for image, label in full], **PERCENTILES, noise=0.1)
    assert (
        learned["contrast"][0]
        > 5 * np.ptp(intensity_range(empty, **PERCENTILES)) / pixel_noise(empty)[0]
    )
    assert learned["level"][0] < 0.05
    for copy in (
        empty,
        (empty >> 4).astype(np.uint8),
        (empty * 16),
        (empty / 4095).astype(np.float32),
    ):
        out = rescale(copy, *intensity_range(copy, **learned))
        assert np.ptp(np.percentile(out, [1.0, 99.8])) < 0.2
    for image, _ in full:
        for copy in (image, (image >> 4).astype(np.uint8), image[:, :256, :256], 4095 - image):
            np.testing.assert_array_equal(
                intensity_range(copy, **learned), intensity_range(copy, **PERCENTILES)
            )


@pytest.mark.parametrize("shape", [(1, 5), (4, 4), (70, 9), (200, 130), (3, 80, 20), (2, 4, 3)])
@pytest.mark.parametrize("step", STEPS)
def test_noise_that_does_not_matter_is_told_from_a_part_of_the_lines(shape, step):
    """As by all of them."""
    parts = [np.random.default_rng(seed).normal(0, seed, shape).astype("f4") for seed in (1, 2)]
    ripples = np.concatenate([intensity._ripples(part, step) for part in parts])
    limits = [0.0, *np.quantile(ripples, [0.2, 0.49, 0.51, 0.9]), np.inf] if ripples.size else [1.0]
    for limit in limits:
        expected = 2 * np.count_nonzero(ripples <= limit) > ripples.size
        assert intensity._mostly_below(parts, step, limit) == expected
