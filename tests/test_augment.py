"""Augmented patches: where their pixels come from, how their intensities change, and what they depend on."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from gdlib import io
from gdlib.data.augment import augment_intensity, sample_patch, sampling_grid
from gdlib.data.patches import PatchSampler, normalise

EXACT = {"flip": False, "rotate90": False}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def grid_of(shape, patch, seed=0, count=1, **options):
    return sampling_grid(torch.tensor([shape] * count), patch, rng(seed), **options)


def blocks(shape, seed=0, side=5):
    """Label of blocks, background among them."""
    label = np.random.default_rng(seed).integers(0, 9, [-(-n // side) for n in shape])
    for axis in range(label.ndim):
        label = label.repeat(side, axis)
    return torch.from_numpy(label[tuple(map(slice, shape))].copy())


def ramps(shape):
    """An image whose channels are its own coordinates: linear interpolation of it says where it was sampled."""
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij"))


# --- Geometry -------------------------------------------------------------------------------------------------------

PLANE = {  # what may be done to the last two axes, as functions of an array
    "identity": lambda a: a,
    "rotated by 90": lambda a: np.rot90(a, 1, (-2, -1)),
    "rotated by 180": lambda a: np.rot90(a, 2, (-2, -1)),
    "rotated by 270": lambda a: np.rot90(a, 3, (-2, -1)),
    "y mirrored": lambda a: np.flip(a, -2),
    "x mirrored": lambda a: np.flip(a, -1),
    "transposed": lambda a: np.swapaxes(a, -1, -2),
    "transposed across": lambda a: np.rot90(np.swapaxes(a, -1, -2), 2, (-2, -1)),
}
TURNS = ["identity", "rotated by 90", "rotated by 180", "rotated by 270"]
MIRRORS = ["identity", "rotated by 180", "y mirrored", "x mirrored"]


@pytest.mark.parametrize("depth", [None, 3])
@pytest.mark.parametrize(
    ("sides", "options", "allowed"),
    [
        ((6, 6), {"flip": True, "rotate90": True}, list(PLANE)),
        ((6, 6), {"flip": True, "rotate90": False}, MIRRORS),
        ((6, 6), {"flip": False, "rotate90": True}, TURNS),
        ((7, 7), {"flip": False, "rotate90": True}, TURNS),
        ((6, 6), EXACT, ["identity"]),
        ((5, 8), {"flip": True, "rotate90": True}, MIRRORS),
        ((5, 8), {"flip": False, "rotate90": True}, ["identity", "rotated by 180"]),
    ],
)
def test_flips_and_turns_permute_pixels(sides, options, allowed, depth):
    """Each symmetry that is allowed occurs, equally often, and no other."""
    shape = sides if depth is None else (depth, *sides)
    image = torch.randperm(math.prod(shape), generator=rng()).reshape(shape)
    mirrored = options["flip"] and depth is not None
    expected = {
        (name, z): PLANE[name](np.flip(image.numpy(), 0) if z else image.numpy())
        for name in allowed
        for z in ((False, True) if mirrored else (False,))
    }
    count = dict.fromkeys(expected, 0)
    # Zoom and displacement are asked for, but never happen.
    options = {**options, "scale": (0.5, 2.0), "elastic": 3.0, "probability": 0.0}
    draws = 640
    for grid in grid_of(shape, shape, count=draws, **options):
        patch, label = sample_patch(image[None].float(), image, grid)
        found = [key for key, array in expected.items() if np.array_equal(array, label.numpy())]
        assert len(found) == 1
        count[found[0]] += 1
        np.testing.assert_allclose(patch[0].numpy(), label.numpy(), atol=math.prod(shape) * 1e-5)
    mean = draws / len(expected)
    assert all(abs(n - mean) < 5 * math.sqrt(mean) for n in count.values()), count


@pytest.mark.parametrize(
    ("shape", "patch"), [((9, 12), (4, 5)), ((9, 12), (9, 12)), ((3, 6, 7), (2, 6, 4)), ((1, 6, 7), (1, 3, 3))]
)
def test_without_augmentation_patches_are_crops_from_everywhere(shape, patch):
    image, label = ramps(shape), torch.arange(math.prod(shape)).reshape(shape)
    room = [n - p + 1 for n, p in zip(shape, patch, strict=True)]
    count = dict.fromkeys(itertools.product(*map(range, room)), 0)
    draws = 20 * len(count)
    for grid in grid_of(shape, patch, count=draws, **EXACT):
        out, out_label = sample_patch(image, label, grid)
        corner = tuple(int(c) for c in np.unravel_index(int(out_label.flatten()[0]), shape))
        window = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        count[corner] += 1
        assert torch.equal(out_label, label[window])
        torch.testing.assert_close(out, image[(slice(None), *window)], rtol=0, atol=1e-5)
    assert min(count.values()) > 0
    assert sum((n - 20) ** 2 / 20 for n in count.values()) < len(count) + 5 * math.sqrt(2 * len(count))


def test_images_of_a_batch_may_have_different_sizes():
    shapes = torch.tensor([[6, 6], [6, 40], [40, 6]])
    low, high = [], []
    for seed in range(60):
        grid = sampling_grid(shapes, (6, 6), rng(seed))
        low.append(grid.amin((1, 2)))
        high.append(grid.amax((1, 2)))
    assert torch.stack(low).amin(0).tolist() == [[0, 0], [0, 0], [0, 0]]
    highest = torch.stack(high).amax(0)
    assert (highest <= shapes - 1).all()
    assert highest[0].tolist() == [5, 5]
    assert highest[1, 1] > 33
    assert highest[2, 0] > 33


GEOMETRY = {
    "scaled": {"scale": (0.5, 2.0)},
    "elastic": {"elastic": 2.0, "elastic_spacing": 8},
    "all": {"scale": (0.6, 1.6), "elastic": 2.0, "elastic_spacing": 8, "probability": 0.7},
}


@pytest.mark.parametrize("options", GEOMETRY.values(), ids=GEOMETRY)
@pytest.mark.parametrize(("shape", "patch"), [((40, 50), (32, 32)), ((33, 31), (33, 30)), ((5, 40, 36), (4, 24, 30))])
def test_image_and_label_come_from_the_same_place(shape, patch, options):
    """Read the place from an image of coordinates; the label there must be the nearest one."""
    label = blocks(shape)
    ids = set(label.unique().tolist())
    for grid in grid_of(shape, patch, count=6, **options):
        place, found = sample_patch(ramps(shape), label, grid)
        nearest = place.round()
        clear = ((place - nearest).abs() < 0.49).all(0)
        assert clear.float().mean() > 0.8
        expected = label[tuple(nearest.long())]
        assert torch.equal(found[clear], expected[clear])
        assert set(found.unique().tolist()) <= ids
        assert found.dtype == label.dtype


@pytest.mark.parametrize("options", GEOMETRY.values(), ids=GEOMETRY)
def test_an_image_of_the_label_stays_the_label(options):
    """Away from borders of objects, where interpolation mixes ids, nothing moves against the other."""
    label = blocks((60, 60), side=10)
    for grid in grid_of((60, 60), (48, 48), count=6, **options):
        image, found = sample_patch(label[None].float(), label, grid)
        array = found.numpy()
        inner = ndimage.minimum_filter(array, 5, mode="constant", cval=-1) == array
        inner &= ndimage.maximum_filter(array, 5) == array
        assert inner.mean() > 0.05
        np.testing.assert_allclose(image[0].numpy()[inner], array[inner], atol=1e-3)


@pytest.mark.parametrize("shape", [(7, 9), (4, 7, 9), (1, 7, 9), (7, 1)])
def test_sample_patch_interpolates_and_mirrors_like_scipy(shape):
    image = torch.rand(2, *shape, generator=rng(1))
    label = torch.randint(100, shape, generator=rng(2))
    # Up to one image away on each side; a single slice has no beside.
    reach = torch.tensor([n - 1.0 for n in shape])
    grid = (torch.rand(50, *(3,) * (len(shape) - 1), len(shape), generator=rng(3)) * 3 - 1) * reach
    grid[..., reach == 0] = 0
    patch, nearest = sample_patch(image, label, grid)
    at = grid.movedim(-1, 0).double().numpy()
    for c in range(2):
        expected = ndimage.map_coordinates(image[c].double().numpy(), at, order=1, mode="mirror")
        np.testing.assert_allclose(patch[c].numpy(), expected, atol=1e-5)
    expected = ndimage.map_coordinates(label.numpy(), at, order=0, mode="mirror")
    np.testing.assert_array_equal(nearest.numpy(), expected)


def test_outside_a_single_slice_is_that_slice():
    image, label = torch.rand(1, 1, 3, 3), torch.randint(9, (1, 3, 3))
    inside = ramps((1, 3, 3)).movedim(0, -1)
    outside = inside + torch.tensor([1.0, 0, 0]) * torch.rand(1, 3, 3, 1) * 5
    for a, b in zip(sample_patch(image, label, inside), sample_patch(image, label, outside), strict=True):
        torch.testing.assert_close(a, b)


def steps(grid):
    """Distance between neighbours along y and x."""
    return grid.diff(dim=1)[..., -2].abs(), grid.diff(dim=2)[..., -1].abs()


def test_zoom():
    """A factor of 2 shows objects twice as large: half a pixel of the image per pixel of the patch."""
    for step in steps(grid_of((64, 64), (20, 20), scale=(2.0, 2.0), **EXACT)):
        torch.testing.assert_close(step, torch.full_like(step, 0.5))
    grid = grid_of((64, 64), (20, 20), count=2000, scale=(0.5, 2.0), **EXACT)
    y, x = (step.flatten(1) for step in steps(grid))
    torch.testing.assert_close(y.mean(1), x.mean(1))  # no change of shape
    factor = 1 / y.mean(1)
    assert 0.499 < factor.min() < 0.52
    assert 1.95 < factor.max() < 2.001
    assert factor.log2().mean() == pytest.approx(0, abs=0.05)  # as often half as double
    assert factor.log2().std() == pytest.approx(2 / math.sqrt(12), abs=0.03)
    z = grid_of((9, 64, 64), (4, 20, 20), scale=(2.0, 2.0), **EXACT)[..., 0]
    assert (z.diff(dim=1) == 1).all()  # slices stay slices


def test_zoom_keeps_the_centre():
    plain = grid_of((64, 64), (20, 20), seed=4, scale=(1.0, 1.0), **EXACT)
    zoomed = grid_of((64, 64), (20, 20), seed=4, scale=(1.5, 1.5), **EXACT)
    torch.testing.assert_close(plain.mean((1, 2)), zoomed.mean((1, 2)))


@pytest.mark.parametrize("depth", [None, 5])
def test_displacement(depth):
    """Smooth, of about the stated size, free of drift, the same in every slice, and independent in y and x."""
    front = () if depth is None else (depth,)
    shape, patch = (*front, 200, 200), (*front, 96, 80)
    options = {"elastic_spacing": 16, **EXACT}
    moved = grid_of(shape, patch, seed=1, count=40, elastic=5.0, **options)
    base = torch.stack(torch.meshgrid(*(torch.arange(p) - (p - 1) / 2 for p in patch), indexing="ij"), -1)
    shift = moved - base  # displacement and the place of the patch
    if depth is not None:
        assert (shift[..., 0].flatten(1).std(1) < 1e-4).all()
        torch.testing.assert_close(shift[:, :1].expand_as(shift), shift)
        shift = shift[:, 0]
    shift = shift[..., -2:]
    shift = shift - shift.mean((1, 2), keepdim=True)
    assert 0.65 * 5 < float(shift.std()) < 1.05 * 5
    slope = math.sqrt(2) / 16  # of the line between two independent control points, 16 pixels apart
    assert 0.9 * slope < float(shift.diff(dim=1).std() / shift.std()) < 1.2 * slope
    assert 0.9 * slope < float(shift.diff(dim=2).std() / shift.std()) < 1.2 * slope
    assert shift.diff(dim=1).abs().max() < 10 * slope * shift.std()  # without jumps
    y, x = shift[..., 0].flatten(), shift[..., 1].flatten()
    assert abs(float((y * x).mean() / (y.std() * x.std()))) < 0.1
    near = (shift[:, :-2] * shift[:, 2:]).mean() / shift.square().mean()
    far = (shift[:, :-48] * shift[:, 48:]).mean() / shift.square().mean()
    assert near > 0.9
    assert abs(far) < 0.15


def test_probability_is_the_share_of_deformed_patches():
    grid = grid_of((64, 64), (16, 16), count=1000, scale=(0.5, 0.9), elastic=2.0, elastic_spacing=8, probability=0.3)
    whole = (grid == grid.round()).flatten(1).all(1)
    assert float(whole.float().mean()) == pytest.approx(0.7, abs=0.05)
    zoomed = grid_of((64, 64), (16, 16), count=1000, scale=(0.5, 0.9), probability=0.3, **EXACT)
    whole = (zoomed == zoomed.round()).flatten(1).all(1)
    assert float(whole.float().mean()) == pytest.approx(0.7, abs=0.05)


# --- Intensity ------------------------------------------------------------------------------------------------------

STRONG = {"contrast": 0.5, "brightness": 0.3, "gamma": 1.0, "blur": 2.0, "noise": 0.2}


@pytest.mark.parametrize("shape", [(2, 1, 12, 14), (2, 3, 12, 14), (2, 2, 3, 12, 14)])
def test_neutral_settings_change_nothing(shape):
    image = torch.rand(shape, generator=rng()) * 2 - 0.5
    assert torch.equal(augment_intensity(image, rng()), image)
    assert torch.equal(augment_intensity(image, rng(), probability=1.0), image)
    torch.testing.assert_close(augment_intensity(image, rng(), **STRONG, probability=0.0), image, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", STRONG)
@pytest.mark.parametrize("shape", [(400, 1, 8, 9), (400, 2, 2, 8, 9)])
def test_each_change_happens_with_its_probability_and_strength(shape, name):
    image = torch.rand(shape, generator=rng(1)) * 0.8 + 0.1
    before = image.clone()
    out = augment_intensity(image, rng(2), **{name: STRONG[name]}, probability=0.4)
    assert torch.equal(image, before)  # not in place
    assert out.shape == image.shape
    assert out.dtype == torch.float32
    changed = (out - image).flatten(1).abs().amax(1) > 3e-6
    if name == "blur":  # a very narrow one changes nothing either
        assert 0.25 < float(changed.float().mean()) < 0.48
    else:
        assert float(changed.float().mean()) == pytest.approx(0.4, abs=0.08)
    a, b = image[changed].flatten(1), out[changed].flatten(1)
    if name == "contrast":
        factor = b / a
        assert (factor.std(1) < 1e-5).all()
        assert 0.5 <= factor.min() + 1e-5 < 0.52
        assert 1.48 < factor.max() <= 1.5 + 1e-5
    elif name == "brightness":
        shift = b - a
        assert (shift.std(1) < 1e-5).all()
        assert -0.3 <= shift.min() + 1e-5 < -0.28
        assert 0.28 < shift.max() <= 0.3 + 1e-5
    elif name == "gamma":
        exponent = b.log() / a.log()
        assert (exponent.std(1) < 1e-3).all()
        assert 0.5 <= exponent.min() + 1e-3 < 0.53
        assert 1.9 < exponent.max() <= 2 + 1e-3
    elif name == "noise":
        sigma = (b - a).std(1)
        assert sigma.max() < 0.2 * 1.3
        assert sigma.mean() == pytest.approx(0.1, abs=0.02)
        assert abs(float((b - a).mean())) < 0.01
    else:
        assert (b.std(1) < a.std(1)).all()


def test_gamma_leaves_what_is_outside_as_it_is():
    image = torch.tensor([-1.5, -0.1, 0.0, 0.25, 1.0, 1.2, 7.0]).expand(50, 1, 1, 7)
    out = augment_intensity(image, rng(), gamma=2.0, probability=1.0)
    keep = [0, 1, 4, 5, 6]
    torch.testing.assert_close(out[..., keep], image[..., keep], rtol=0, atol=0.03)  # 10^-6 to the power of 1/4
    assert (out.diff(dim=-1) >= -0.03).all()
    assert out[..., 3].std() > 0.1


@pytest.mark.parametrize("shape", [(4, 2, 20, 24), (4, 2, 3, 20, 24)])
def test_blur_is_gaussian_in_every_plane(shape):
    """Recover the one unknown, the width, from one plane; then every other plane must agree with scipy."""
    image = torch.rand(shape, generator=rng(5))
    out = augment_intensity(image, rng(6), blur=1.5, probability=1.0)
    widths = []
    for b in range(len(image)):
        planes, blurred = image[b].flatten(0, -3).double().numpy(), out[b].flatten(0, -3).double().numpy()

        def apply(plane, sigma):
            return ndimage.gaussian_filter(plane, sigma, mode="mirror", radius=6)

        trials = np.arange(0.05, 1.51, 0.01)
        errors = [np.abs(apply(planes[0], sigma) - blurred[0]).max() for sigma in trials]
        widths.append(float(trials[int(np.argmin(errors))]))
        for plane, result in zip(planes, blurred, strict=True):
            np.testing.assert_allclose(result, apply(plane, widths[-1]), atol=0.01)
            assert np.abs(result - plane).max() > 0.05 or widths[-1] < 0.4
    assert max(widths) - min(widths) > 0.2


# --- Patches of a step ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Return {ndim: file} with four images each; grey value and label both tell the image and the place."""
    files = {}
    for ndim, shape in ((2, (30, 40)), (3, (6, 24, 20))):
        files[ndim] = tmp_path_factory.mktemp("samples") / "train.h5"
        out = []
        for i in range(4):
            label = blocks(shape, seed=i).numpy()
            label = np.where(label > 0, label + 100 * i, 0)
            out.append(io.Sample(f"s{i}", (label + 40 * i)[None].astype(np.uint16), label.astype(np.uint32)))
        io.write_samples(files[ndim], out)
    return files


PATCH = {2: (16, 16), 3: (4, 12, 12)}
FULL = {
    "geometry": {"scale": (0.7, 1.4), "elastic": 2.0, "elastic_spacing": 8, "probability": 0.5},
    "intensity": {**STRONG, "probability": 0.5},
}
NONE = {"geometry": EXACT, "intensity": {}}
PERCENTILES = {"lower": 0.0, "upper": 100.0}


def sampler(samples, ndim=2, seed=0, augment=None, batch_size=3):
    options = {"patch": PATCH[ndim], "batch_size": batch_size, "normalisation": PERCENTILES}
    return PatchSampler(samples[ndim], **options, augment=FULL if augment is None else augment, seed=seed)


def equal(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("image", "label", "ids"))


@pytest.mark.parametrize("ndim", [2, 3])
def test_batch_is_a_function_of_seed_and_step(samples, ndim):
    first, second = sampler(samples, ndim), sampler(samples, ndim)
    torch.manual_seed(1)
    forward = [first.batch(step) for step in range(6)]
    torch.manual_seed(2)
    backward = [second.batch(step) for step in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forward, backward, strict=True))
    for a, b in itertools.combinations(forward, 2):
        assert not torch.equal(a.label, b.label)
        assert not torch.equal(a.image, b.image)


@pytest.mark.parametrize("augment", [FULL, NONE], ids=["augmented", "plain"])
def test_seeds_give_different_patches(samples, augment):
    """Also seeds that differ by a power of two: torch's CPU generator looks at 32 bits only."""
    seeds = [0, 1, 2, 3, 1 << 16, 555]
    batches = {seed: sampler(samples, seed=seed, augment=augment).batch(7) for seed in seeds}
    for a, b in itertools.combinations(seeds, 2):
        assert not torch.equal(batches[a].image, batches[b].image), (a, b)


def test_steps_of_one_seed_are_not_those_of_the_next(samples):
    """Or training with seed 1 would be that with seed 0, one step later."""
    batches = [sampler(samples, seed=seed) for seed in (0, 1)]
    later = [batches[0].batch(step).image for step in range(40)]
    assert not any(torch.equal(batches[1].batch(3).image, image) for image in later)


@pytest.mark.parametrize("ndim", [2, 3])
def test_batch_shapes_and_types(samples, ndim):
    batch = sampler(samples, ndim).batch(0)
    assert batch.image.shape == (3, 1, *PATCH[ndim])
    assert batch.label.shape == (3, *PATCH[ndim])
    assert batch.ids.shape == (3,)
    assert (batch.image.dtype, batch.label.dtype, batch.ids.dtype) == (torch.float32, torch.int64, torch.int64)
    assert torch.isfinite(batch.image).all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_ids_say_which_image_a_patch_is_of(samples, ndim):
    """Every image as often as every other; the plain patch is the normalised image where its label is."""
    count = np.zeros(4)
    made = sampler(samples, ndim, augment=NONE)
    stored = list(io.read_samples(samples[ndim]))
    for step in range(100):
        batch = made.batch(step)
        for image, label, i in zip(batch.image, batch.label, batch.ids.tolist(), strict=True):
            count[i] += 1
            assert set(label.unique().tolist()) <= set(np.unique(stored[i].label).tolist())
            low, high = stored[i].image.min(), stored[i].image.max()
            expected = (label + 40 * i - float(low)) / float(high - low)
            torch.testing.assert_close(image[0], expected, rtol=0, atol=1e-4)
    assert ((count - 75) ** 2 / 75).sum() < 21.1  # 3 degrees of freedom


def test_every_patch_of_a_batch_is_drawn_anew(samples):
    batch = sampler(samples, augment=NONE, batch_size=8).batch(0)
    for a, b in itertools.combinations(range(8), 2):
        assert not torch.equal(batch.label[a], batch.label[b])


def test_patches_that_do_not_fit_and_files_without_images(samples, tmp_path):
    options = {"batch_size": 1, "normalisation": PERCENTILES, "augment": NONE, "seed": 0}
    with pytest.raises(io.DataError, match=r'"s0".*smaller than the patch'):
        PatchSampler(samples[2], patch=(31, 16), **options)
    PatchSampler(samples[2], patch=(30, 40), **options).batch(0)
    io.write_samples(tmp_path / "none.h5", [])
    with pytest.raises(io.DataError, match="no image"):
        PatchSampler(tmp_path / "none.h5", patch=(4, 4), **options)


# --- Normalisation --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_flat_channel_becomes_0(dtype):
    image = np.stack([np.full((5, 6), 7), np.arange(30).reshape(5, 6)]).astype(dtype)
    out = normalise(image, 0.0, 100.0)
    assert (out[0] == 0).all()
    np.testing.assert_allclose(out[1].ravel(), np.arange(30) / 29, atol=1e-6)
