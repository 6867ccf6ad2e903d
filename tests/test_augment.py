"""Augmented patches: where their pixels come from, how their intensities change, and what they
depend on."""

import itertools
import math

import h5py
import numpy as np
import pytest
import torch
from scipy import ndimage

from gdlib import io
from gdlib.data import patches
from gdlib.data.augment import (
    _enlarged,
    augment_intensity,
    augment_sections,
    mirrored,
    sample_patch,
    sampling_grid,
)
from gdlib.data.intensity import normalise
from gdlib.data.patches import PatchSampler

EXACT = {"flip": False, "rotate90": False}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def grid_of(shape, patch, seed=0, count=1, **options):
    return sampling_grid(torch.tensor([shape] * count), patch, rng(seed), **options)


def resampled(image, label, grid):
    """Image and label at a grid, which may leave the image."""
    grid = mirrored(grid, label.shape)
    return sample_patch(image, grid), label[tuple(grid.round().long().unbind(-1))]


def blocks(shape, seed=0, side=5):
    """Label of blocks, background among them."""
    label = np.random.default_rng(seed).integers(0, 9, [-(-n // side) for n in shape])
    for axis in range(label.ndim):
        label = label.repeat(side, axis)
    return torch.from_numpy(label[tuple(map(slice, shape))].copy())


def ramps(shape):
    """An image whose channels are its own coordinates: linear interpolation of it says where it was
    sampled."""
    return torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    )


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
    both_ways = options["flip"] and depth is not None
    expected = {
        (name, z): PLANE[name](np.flip(image.numpy(), 0) if z else image.numpy())
        for name in allowed
        for z in ((False, True) if both_ways else (False,))
    }
    count = dict.fromkeys(expected, 0)
    # Zoom and displacement are asked for, but never happen.
    options = {**options, "scale": (0.5, 2.0), "elastic": 3.0, "probability": 0.0}
    draws = 640
    for grid in grid_of(shape, shape, count=draws, **options):
        patch, label = resampled(image[None].float(), image, grid)
        found = [key for key, array in expected.items() if np.array_equal(array, label.numpy())]
        assert len(found) == 1
        count[found[0]] += 1
        np.testing.assert_allclose(patch[0].numpy(), label.numpy(), atol=math.prod(shape) * 1e-5)
    mean = draws / len(expected)
    assert all(abs(n - mean) < 5 * math.sqrt(mean) for n in count.values()), count


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((9, 12), (4, 5)), ((9, 12), (9, 12)), ((3, 6, 7), (2, 6, 4)), ((1, 6, 7), (1, 3, 3))],
)
def test_without_augmentation_patches_are_crops_from_everywhere(shape, patch):
    image, label = ramps(shape), torch.arange(math.prod(shape)).reshape(shape)
    room = [n - p + 1 for n, p in zip(shape, patch, strict=True)]
    count = dict.fromkeys(itertools.product(*map(range, room)), 0)
    draws = 20 * len(count)
    for grid in grid_of(shape, patch, count=draws, **EXACT):
        out, out_label = resampled(image, label, grid)
        corner = tuple(int(c) for c in np.unravel_index(int(out_label.flatten()[0]), shape))
        window = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        count[corner] += 1
        assert torch.equal(out_label, label[window])
        torch.testing.assert_close(out, image[(slice(None), *window)], rtol=0, atol=1e-5)
    assert min(count.values()) > 0
    assert sum((n - 20) ** 2 / 20 for n in count.values()) < len(count) + 5 * math.sqrt(
        2 * len(count)
    )


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
    "rotated": {"rotate": 45.0},
    "misaligned": {"misalign": 4.0},
    "all": {
        **{
            "scale": (0.6, 1.6),
            "elastic": 2.0,
            "elastic_spacing": 8,
            "rotate": 20.0,
            "misalign": 3.0,
        },
        "probability": 0.7,
    },
}


@pytest.mark.parametrize("options", GEOMETRY.values(), ids=GEOMETRY)
@pytest.mark.parametrize(
    ("shape", "patch"), [((40, 50), (32, 32)), ((33, 31), (33, 30)), ((5, 40, 36), (4, 24, 30))]
)
def test_image_and_label_come_from_the_same_place(shape, patch, options):
    """Read the place from an image of coordinates; the label there must be the nearest one."""
    label = blocks(shape)
    ids = set(label.unique().tolist())
    for grid in grid_of(shape, patch, count=6, **options):
        place, found = resampled(ramps(shape), label, grid)
        nearest = place.round()
        clear = ((place - nearest).abs() < 0.49).all(0)
        assert clear.float().mean() > 0.8
        expected = label[tuple(nearest.long())]
        assert torch.equal(found[clear], expected[clear])
        assert set(found.unique().tolist()) <= ids
        assert found.dtype == label.dtype


@pytest.mark.parametrize("options", GEOMETRY.values(), ids=GEOMETRY)
def test_an_image_of_the_label_stays_the_label(options):
    """Away from borders of objects, where interpolation mixes ids, nothing moves against the
    other."""
    label = blocks((60, 60), side=10)
    for grid in grid_of((60, 60), (48, 48), count=6, **options):
        image, found = resampled(label[None].float(), label, grid)
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
    patch, nearest = resampled(image, label, grid)
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
    for a, b in zip(resampled(image, label, inside), resampled(image, label, outside), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_mirrored_is_a_reflection_at_the_outer_pixels_as_often_as_needed(n):
    for far in (1, n, 5 * n + 3):
        index = torch.arange(-far, n + far, dtype=torch.float32)[:, None]
        assert (
            mirrored(index, [n])[:, 0].tolist()
            == np.pad(np.arange(n), far, mode="reflect").tolist()
        )
        if n > 1:  # and between pixels, on the straight line of the two nearest
            between = mirrored(index[:-1] + 0.25, [n])
            torch.testing.assert_close(
                between, 0.75 * mirrored(index[:-1], [n]) + 0.25 * mirrored(index[1:], [n])
            )
    two = torch.tensor([[-1.0, 7.0], [3.0, -2.5]])
    assert mirrored(two, [3, 7]).tolist() == [[1, 5], [1, 2.5]]  # each axis by its own side


@pytest.mark.parametrize("patch", [(20, 33), (8, 1)])
def test_a_smooth_field_is_the_bicubic_one(patch):
    """The same as an image of all control points, of which the patch is a part."""
    spacing = 7
    field = torch.randn(3, 2, *(math.ceil(p / spacing) + 3 for p in patch), generator=rng())
    size = [k * spacing for k in field.shape[2:]]
    whole = torch.nn.functional.interpolate(field, size=size, mode="bicubic", align_corners=True)
    expected = whole[..., spacing : spacing + patch[0], spacing : spacing + patch[1]]
    # The places of pixels are rounded, relative to the sides, and so are sums of 4 x 4 products.
    slope = max(float(whole.diff(dim=axis).abs().max()) for axis in (-2, -1))
    limit = torch.finfo(torch.float32).eps * (2 * max(size) * slope + 16 * float(whole.abs().max()))
    torch.testing.assert_close(_enlarged(field, spacing, patch), expected, rtol=0, atol=limit)


def steps(grid):
    """Distance between neighbours along y and x."""
    return grid.diff(dim=1)[..., -2].abs(), grid.diff(dim=2)[..., -1].abs()


def test_zoom():
    """A factor of 2 shows objects twice as large: half a pixel of the image per pixel of the
    patch."""
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


@pytest.mark.parametrize("depth", [None, 3])
def test_turn(depth):
    """By an angle within the range, around the centre, in the plane, without a change of size or
    shape."""
    front = () if depth is None else (depth,)
    options = {"rotate": 30.0, "probability": 0.8, **EXACT}
    grid = grid_of((*front, 64, 64), (*front, 21, 33), count=1000, **options)
    if depth is not None:
        assert (grid[..., 0] == torch.arange(depth).reshape(1, -1, 1, 1)).all()
        torch.testing.assert_close(grid[:, :1].expand_as(grid)[..., 1:], grid[..., 1:])
        grid = grid[:, 0, ..., 1:]
    down, right = grid[:, 1, 0] - grid[:, 0, 0], grid[:, 0, 1] - grid[:, 0, 0]
    torch.testing.assert_close(
        grid.diff(dim=1), down[:, None, None].expand(-1, 20, 33, 2), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        grid.diff(dim=2), right[:, None, None].expand(-1, 21, 32, 2), rtol=0, atol=1e-4
    )
    one = torch.ones(len(grid))
    torch.testing.assert_close(down.norm(dim=1), one, rtol=0, atol=1e-4)
    # not mirrored
    torch.testing.assert_close(right, torch.stack([-down[:, 1], down[:, 0]], 1), rtol=0, atol=1e-4)
    centre = grid.mean((1, 2))
    torch.testing.assert_close(centre, centre.round(), rtol=0, atol=1e-3)
    angle = torch.atan2(right[:, 0], right[:, 1]) * 180 / math.pi
    turned = angle.abs() > 1e-3
    assert float(turned.float().mean()) == pytest.approx(0.8, abs=0.05)
    assert 29 < float(angle.max()) <= 30.01
    assert -30.01 <= float(angle.min()) < -29
    assert float(angle[turned].std()) == pytest.approx(60 / math.sqrt(12), rel=0.06)


def shifts_of(grid):
    """Where each section is, in y and x, against the first: (B, Z, 2), of grids that are otherwise
    crops."""
    corner = grid[:, :, 0, 0, 1:]
    expected = grid[:, :1, ..., 1:] + (corner - corner[:, :1])[:, :, None, None]
    torch.testing.assert_close(grid[..., 1:], expected, rtol=0, atol=0)  # sections stay whole
    return corner - corner[:, :1]


def test_misalignment():
    """Whole pixels, up to the largest.

    One section or all from one on, both equally often, every section equally often.
    """
    draws, sections, most = 3000, 6, 3
    options = {"misalign": float(most), "probability": 0.6, **EXACT}
    grid = grid_of((sections, 30, 30), (sections, 8, 8), count=draws, **options)
    assert (grid[..., 0] == torch.arange(6.0).reshape(1, -1, 1, 1)).all()
    shift = shifts_of(grid)
    assert torch.equal(shift, shift.round())
    kind = {"none": 0, "alone": 0, "following": 0}
    first = {"alone": np.zeros(sections), "following": np.zeros(sections)}
    seen = np.zeros((2 * most + 1,) * 2)
    for one in shift.int().tolist():
        jumps = [z for z in range(1, sections) if one[z] != one[z - 1]]
        if not jumps:
            kind["none"] += 1
        elif len(jumps) == 2:
            a, b = jumps
            assert b == a + 1, "a section alone"
            assert one[b] == [0, 0]
            kind["alone"] += 1
            first["alone"][a] += 1
            seen[one[a][0] + most, one[a][1] + most] += 1
        else:
            kind["following"] += 1
            first["following"][jumps[0]] += 1
    assert seen.sum() - seen[most, most] > 400
    assert (seen > 0).sum() == 48  # every displacement but none occurs
    # Ends of the range are rounded from half as much.
    assert seen[0].sum() == pytest.approx(seen.sum() / 12, rel=0.4)
    # A shift of (0, 0) does not show, nor one of all sections; an outer section alone looks like
    # one jump.
    seen_share = 0.6 * (1 - 1 / 36)
    assert kind["alone"] / draws == pytest.approx(seen_share / 2 * 4 / 6, abs=0.03)
    assert kind["following"] / draws == pytest.approx(seen_share / 2 * (5 / 6 + 2 / 6), abs=0.03)
    inner = first["alone"][1:-1]
    assert ((inner - inner.mean()) ** 2 / inner.mean()).sum() < 21.1  # 3 degrees of freedom
    assert first["following"][2:5].min() > 0.2 * kind["following"] / 2


def test_misalignment_is_for_volumes_and_happens_on_its_own():
    flat = grid_of((30, 30), (8, 8), count=50, misalign=5.0, **EXACT)
    assert torch.equal(flat, grid_of((30, 30), (8, 8), count=50, **EXACT))
    # Half of the patches are deformed, half misaligned, a quarter both.
    grid = grid_of(
        (5, 64, 64), (5, 9, 9), count=2000, misalign=9.0, scale=(2.0, 2.0), probability=0.5, **EXACT
    )
    zoomed = (grid[:, 0, 1, 0, 1] - grid[:, 0, 0, 0, 1]) < 0.75
    moved = shifts_of(grid).flatten(1).any(1)
    share = {
        key: float(mask.float().mean())
        for key, mask in {"z": zoomed, "m": moved, "both": zoomed & moved}.items()
    }
    assert share["z"] == pytest.approx(0.5, abs=0.05)
    assert share["both"] == pytest.approx(share["z"] * share["m"], abs=0.03)


MARGINS = {
    "flips and turns": {},
    "zoom": {"scale": (0.6, 1.7)},
    "turn": {"rotate": 40.0},
    "both": {"scale": (0.5, 2.0), "rotate": 9.0},
}


@pytest.mark.parametrize("options", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize(
    ("shape", "patch", "margin"),
    [
        ((30, 40), (12, 12), (7, 7)),
        ((30, 40), (9, 12), (3, 5)),
        ((6, 30, 30), (3, 8, 8), (2, 6, 6)),
        ((9, 9), (9, 9), (20, 20)),
    ],
)
def test_a_margin_leaves_the_patch_where_it_is(shape, patch, margin, options):
    plain = grid_of(shape, patch, count=20, **options)
    wide = grid_of(shape, patch, count=20, margin=margin, **options)
    assert wide.shape == (20, *(p + 2 * m for p, m in zip(patch, margin, strict=True)), len(shape))
    inner = tuple(slice(m, m + p) for m, p in zip(margin, patch, strict=True))
    exact = not options
    torch.testing.assert_close(
        wide[(slice(None), *inner)], plain, rtol=0, atol=0 if exact else 1e-4
    )
    for axis in range(1, len(shape) + 1):  # and goes on straight
        step = wide.diff(dim=axis)
        torch.testing.assert_close(
            step, step.narrow(axis, 0, 1).expand_as(step), rtol=0, atol=0 if exact else 1e-4
        )
    assert torch.equal(
        grid_of(shape, patch, count=3, margin=(0,) * len(shape)), grid_of(shape, patch, count=3)
    )


def test_a_margin_is_displaced_smoothly_too():
    grid = grid_of(
        (200, 200), (32, 32), count=10, margin=(40, 40), elastic=3.0, elastic_spacing=16, **EXACT
    )
    assert grid.shape == (10, 112, 112, 2)
    for dim in (1, 2):
        step = grid.diff(dim=dim)[..., dim - 1]
        assert (step - 1).abs().max() < 10 * math.sqrt(2) / 16 * 3
        for part in (step[:, :30, :30], step[:, -30:, -30:]):
            assert float(part.std()) > 0.1


@pytest.mark.parametrize("depth", [None, 5])
def test_displacement(depth):
    """Smooth, of about the stated size, free of drift, the same in every slice, and independent in
    y and x."""
    front = () if depth is None else (depth,)
    shape, patch = (*front, 200, 200), (*front, 96, 80)
    options = {"elastic_spacing": 16, **EXACT}
    moved = grid_of(shape, patch, seed=1, count=40, elastic=5.0, **options)
    base = torch.stack(
        torch.meshgrid(*(torch.arange(p) - (p - 1) / 2 for p in patch), indexing="ij"), -1
    )
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
    grid = grid_of(
        (64, 64),
        (16, 16),
        count=1000,
        scale=(0.5, 0.9),
        elastic=2.0,
        elastic_spacing=8,
        probability=0.3,
    )
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
    # What is below 10^-6 is lifted to that before it gets an exponent; some roundings of numbers
    # below 4 come on top.
    limit = 1e-6 + 4 * torch.finfo(torch.float32).eps * 2
    torch.testing.assert_close(
        augment_intensity(image, rng(), **STRONG, probability=0.0), image, rtol=0, atol=limit
    )


@pytest.mark.parametrize("shape", [(500, 1, 8, 9), (500, 2, 2, 8, 9)])
def test_some_patches_are_negatives(shape):
    image = torch.rand(shape, generator=rng(1))
    out = augment_intensity(image, rng(2), invert=0.3)
    kinds = [torch.equal(a, 1 - b) - torch.equal(a, b) for a, b in zip(out, image, strict=True)]
    assert set(kinds) == {1, -1}
    assert kinds.count(1) / len(kinds) == pytest.approx(0.3, abs=0.08)  # four standard deviations


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
    most = 1e-6**0.25 + 1e-6  # to the power of 2^-gamma
    torch.testing.assert_close(out[..., keep], image[..., keep], rtol=0, atol=most)
    assert (out.diff(dim=-1) >= -most).all()
    assert out[..., 3].std() > 0.1


@pytest.mark.parametrize("shape", [(4, 2, 20, 24), (4, 2, 3, 20, 24)])
def test_blur_is_gaussian_in_every_plane(shape):
    """Recover the one unknown, the width, from one plane.

    Then every other plane must agree with scipy.
    """
    image = torch.rand(shape, generator=rng(5))
    out = augment_intensity(image, rng(6), blur=1.5, probability=1.0)
    widths = []
    for b in range(len(image)):
        planes, blurred = (
            image[b].flatten(0, -3).double().numpy(),
            out[b].flatten(0, -3).double().numpy(),
        )

        def apply(plane, sigma):
            return ndimage.gaussian_filter(plane, sigma, mode="mirror", radius=6)

        trials = np.arange(0.05, 1.51, 0.01)
        errors = [np.abs(apply(planes[0], sigma) - blurred[0]).max() for sigma in trials]
        widths.append(float(trials[int(np.argmin(errors))]))
        for plane, result in zip(planes, blurred, strict=True):
            np.testing.assert_allclose(result, apply(plane, widths[-1]), atol=0.01)
            assert np.abs(result - plane).max() > 0.05 or widths[-1] < 0.4
    assert max(widths) - min(widths) > 0.2


# --- Sections of a volume -------------------------------------------------------------------------------------------

SECTIONS = {"contrast": 0.4, "brightness": 0.2, "blur": 1.5, "motion": 5, "missing": 0.3}


def volume(batch=40, channels=2, sections=10, sides=(9, 11), seed=1):
    return torch.rand(batch, channels, sections, *sides, generator=rng(seed)) * 0.8 + 0.1


def apart(image):
    """(sections of all volumes, channels, Y, X)."""
    return image.transpose(1, 2).flatten(0, 1)


def test_neutral_sections_stay():
    image = volume()
    assert torch.equal(augment_sections(image, rng()), image)
    assert torch.equal(augment_sections(image, rng(), motion=1, probability=1.0), image)
    none = {"blur": 2.0, "motion": 9, "missing": 0.0, "probability": 0.0}
    torch.testing.assert_close(augment_sections(image, rng(), **none), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_depend_on_the_seed_and_are_made_anew(name):
    image = volume()
    before = image.clone()
    first, again, other = (
        augment_sections(image, rng(s), **{name: SECTIONS[name]}, probability=0.5)
        for s in (3, 3, 4)
    )
    assert torch.equal(image, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == image.shape
    assert first.dtype == torch.float32


@pytest.mark.parametrize("name", ["contrast", "brightness"])
def test_every_section_has_its_own_intensity(name):
    image = volume()
    # it is for every section
    out = augment_sections(image, rng(2), **{name: SECTIONS[name]}, probability=0.0)
    a, b = apart(image).flatten(1), apart(out).flatten(1)
    change = b / a if name == "contrast" else b - a
    assert (change.std(1) < 1e-5).all()  # channels and pixels alike
    change = change.mean(1) - float(name == "contrast")
    limit = SECTIONS[name]
    assert -limit <= change.min() + 1e-5 < -0.95 * limit
    assert 0.95 * limit < change.max() <= limit + 1e-5
    assert float(change.std()) == pytest.approx(2 * limit / math.sqrt(12), rel=0.1)
    neighbours = np.corrcoef(change[:-1], change[1:])[0, 1]
    assert abs(neighbours) < 0.2  # 400 sections: independent ones stay below


def test_a_lost_section_is_one_grey():
    image = volume()
    out = augment_sections(image, rng(2), missing=0.3, probability=0.0)
    lost = apart(out).flatten(1).std(1) < 1e-6
    assert float(lost.float().mean()) == pytest.approx(0.3, abs=0.07)
    assert torch.equal(apart(out)[~lost], apart(image)[~lost])
    grey = apart(out)[lost][:, 0, 0, 0]
    assert 0 <= grey.min() < 0.05
    assert 0.95 < grey.max() <= 1
    assert grey.mean() == pytest.approx(0.5, abs=0.1)


def test_some_sections_are_blurred():
    image = volume(sides=(13, 15))
    out = augment_sections(image, rng(2), blur=1.5, probability=0.3)
    changed = (apart(out) - apart(image)).flatten(1).abs().amax(1) > 1e-5
    assert 0.2 < float(changed.float().mean()) < 0.37  # a very narrow one changes nothing
    same = (apart(out) == apart(image)).flatten(1).all(1)
    assert float(same.float().mean()) == pytest.approx(0.7, abs=0.07)
    widths = []
    for before, after in zip(
        apart(image)[changed].numpy(), apart(out)[changed].numpy(), strict=True
    ):

        def errors(sigma, before=before, after=after):
            return [
                np.abs(ndimage.gaussian_filter(b, sigma, mode="mirror", radius=5) - a).max()
                for a, b in zip(after, before, strict=True)
            ]

        trials = np.arange(0.05, 1.53, 0.03)
        first = [errors(sigma)[0] for sigma in trials]
        widths.append(trials[int(np.argmin(first))])
        assert max(errors(widths[-1])) < 0.03  # of both channels, with the width of the first
    assert max(widths) > 1.3
    assert min(widths) < 0.5


def test_some_sections_are_blurred_by_motion():
    """Each is the mean of copies of itself along one of four directions.

    The border goes on with its outer pixels.
    """
    most = SECTIONS["motion"]
    image = volume(sides=(8, 9))
    out = augment_sections(image, rng(2), motion=most, probability=0.3)
    changed = (apart(out) - apart(image)).flatten(1).abs().amax(1) > 1e-6
    assert float(changed.float().mean()) == pytest.approx(0.3, abs=0.07)
    assert torch.equal(apart(out)[~changed], apart(image)[~changed])
    y, x = np.mgrid[:8, :9]
    lines = {}  # for an even length there are two centres
    for (dy, dx), length in itertools.product(
        [(1, 0), (0, 1), (1, 1), (1, -1)], range(2, most + 1)
    ):
        for cy, cx in itertools.product((0, (length - 1) % 2), repeat=2):
            middle = (length - 1) // 2
            steps = [
                (k - middle - cy, (k if dx > 0 else length - 1 - k) - middle - cx)
                for k in range(length)
            ]
            lines[dy, dx, length, cy, cx] = [(a * abs(dy), b * abs(dx)) for a, b in steps]
    seen = set()
    for before, after in zip(
        apart(image)[changed].numpy(), apart(out)[changed].numpy(), strict=True
    ):
        found = set()
        for line, steps in lines.items():
            copies = [before[:, (y + a).clip(0, 7), (x + b).clip(0, 8)] for a, b in steps]
            if np.abs(np.mean(copies, 0) - after).max() < 1e-5:
                found.add(line[:3])
        assert len(found) == 1
        seen |= found
    assert len(seen) == 4 * (most - 1)


# --- Patches of a step ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Return {ndim: file} with four images each.

    Grey value and label both tell the image and the place.
    """
    files = {}
    for ndim, shape in ((2, (30, 40)), (3, (6, 24, 20))):
        files[ndim] = tmp_path_factory.mktemp("samples") / "train.h5"
        out = []
        for i in range(4):
            label = blocks(shape, seed=i).numpy()
            label = np.where(label > 0, label + 100 * i, 0)
            out.append(
                io.Sample(
                    f"s{i}", (label + 40 * i)[None].astype(np.uint16), label.astype(np.uint32)
                )
            )
        io.write_samples(files[ndim], out)
    return files


PATCH = {2: (16, 16), 3: (4, 12, 12)}
FULL = {
    "geometry": GEOMETRY["all"],
    "intensity": {**STRONG, "blur": 0.5, "probability": 0.5},
    "sections": {**SECTIONS, "probability": 0.5},
}
NONE = {"geometry": EXACT, "intensity": {}, "sections": {}}
PERCENTILES = {"lower": 0.0, "upper": 100.0}


def sampler(samples, ndim=2, seed=0, augment=None, batch_size=3, **options):
    options = {
        "patch": PATCH[ndim],
        "batch_size": batch_size,
        "normalisation": PERCENTILES,
        **options,
    }
    return PatchSampler(
        samples[ndim], **options, augment=FULL if augment is None else augment, seed=seed
    )


def equal(a, b):
    same = all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("image", "label", "ids"))
    return same and (a.ignore is b.ignore or torch.equal(a.ignore, b.ignore))


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
    assert (batch.image.dtype, batch.label.dtype, batch.ids.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
    )
    assert torch.isfinite(batch.image).all()
    assert batch.ignore is None


@pytest.mark.parametrize("ndim", [2, 3])
def test_patches_are_of_the_images_that_were_chosen(samples, ndim):
    """Every image as often as every other.

    The plain patch is the normalised image where its label is.
    """
    count = np.zeros(4)
    made = sampler(samples, ndim, augment=NONE)
    stored = list(io.read_samples(samples[ndim]))
    for step in range(100):
        batch = made.batch(step)
        for image, label, i in zip(batch.image, batch.label, made.choose(step)[1], strict=True):
            count[i] += 1
            assert set(label.unique().tolist()) <= set(np.unique(stored[i].label).tolist())
            low, high = stored[i].image.min(), stored[i].image.max()
            expected = (label + 40 * i - float(low)) / float(high - low)
            torch.testing.assert_close(image[0], expected, rtol=0, atol=1e-4)
    assert ((count - 75) ** 2 / 75).sum() < 21.1  # 3 degrees of freedom


def test_no_two_patches_of_a_training_have_one_id(samples):
    """However few images there are: the memory bank leaves out what has an id of the step."""
    made = sampler(samples, batch_size=3)
    ids = torch.cat([made.batch(step).ids for step in range(20)])
    assert len(ids.unique()) == 60


def test_every_patch_of_a_batch_is_drawn_anew(samples):
    batch = sampler(samples, augment=NONE, batch_size=8).batch(0)
    for a, b in itertools.combinations(range(8), 2):
        assert not torch.equal(batch.label[a], batch.label[b])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Return {ndim: file}: two images whose channels are their own coordinates.

    The second ignores one of its objects.
    """
    files = {}
    for ndim, shape in ((2, (30, 40)), (3, (6, 24, 20))):
        files[ndim] = tmp_path_factory.mktemp("places") / "train.h5"
        out = []
        for i in range(2):
            label = blocks(shape, seed=i).numpy().astype(np.uint32) + 20 * i
            out.append(
                io.Sample(f"s{i}", ramps(shape).numpy(), label, ignore=label == 24 if i else None)
            )
        io.write_samples(files[ndim], out)
    return files


MARGIN = {2: (9, 11), 3: (2, 9, 7)}


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("margin", [False, True])
def test_label_and_ignore_are_those_at_the_centre_of_the_image(places, ndim, margin):
    """The image says from where in the original it is."""
    stored = list(io.read_samples(places[ndim]))
    augment = NONE | {"geometry": GEOMETRY["all"]}
    sides = MARGIN[ndim] if margin else (0,) * ndim
    made = sampler(
        places, ndim, augment=augment, margin=sides, normalisation={"lower": 0.0, "upper": 100.0}
    )
    ignored = 0
    for step in range(20):
        batch = made.batch(step)
        shape = tuple(p + 2 * m for p, m in zip(PATCH[ndim], sides, strict=True))
        assert batch.image.shape == (3, ndim, *shape)
        assert batch.label.shape == (3, *PATCH[ndim])
        inner = tuple(slice(m, m + p) for m, p in zip(sides, PATCH[ndim], strict=True))
        for k, i in enumerate(made.choose(step)[1]):
            last = torch.tensor(stored[i].label.shape).reshape(-1, *[1] * ndim) - 1
            place = batch.image[k] * last
            assert place.min() > -1e-3
            place = place[(slice(None), *inner)]
            clear = ((place - place.round()).abs() < 0.49).all(0).numpy()
            assert clear.mean() > 0.7
            at = tuple(place.round().long().numpy())
            np.testing.assert_array_equal(batch.label[k].numpy()[clear], stored[i].label[at][clear])
            if batch.ignore is not None:
                np.testing.assert_array_equal(
                    batch.ignore[k].numpy(), (batch.label[k] == 24).numpy()
                )
                ignored += int(batch.ignore[k].sum())
            else:
                assert not (batch.label[k] == 24).any()
    assert ignored > 0


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_margin_around_the_whole_image_is_its_reflection(places, ndim):
    stored = list(io.read_samples(places[ndim]))
    shape = stored[0].label.shape
    margin = (13,) * ndim  # more than the volume is thick
    made = sampler(places, ndim, augment=NONE, patch=shape, margin=margin)
    batch = made.batch(0)
    for image, label, i in zip(batch.image, batch.label, made.choose(0)[1], strict=True):
        expected = normalise(stored[i].image, 0.0, 100.0)
        expected = np.pad(expected, [(0, 0), *[(13, 13)] * ndim], mode="reflect")
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)
        np.testing.assert_array_equal(label.numpy(), stored[i].label)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("which", ["samples", "places"])
def test_a_file_that_stays_on_disk_gives_the_same_patches(ndim, which, monkeypatch, request):
    files = request.getfixturevalue(which)
    options = {"margin": MARGIN[ndim], "border": 1}
    inside = sampler(files, ndim, **options)
    monkeypatch.setattr(patches, "IN_MEMORY", 0)
    outside = sampler(files, ndim, **options)
    for made, kind in ((inside, torch.Tensor), (outside, h5py.Dataset)):
        for sample in made.samples:
            assert {
                type(sample[key]) for key in sample.keys() - {"name", "maps", "low", "span"}
            } == {kind}
    for step in range(6):
        assert equal(inside.batch(step), outside.batch(step))


@pytest.mark.parametrize("ndim", [2, 3])
def test_borders_are_widened_in_the_label_alone(samples, ndim):
    """An object keeps a pixel if the window around it shows no other object."""
    plain, wide = sampler(samples, ndim).batch(0), sampler(samples, ndim, border=2).batch(0)
    assert torch.equal(plain.image, wide.image)
    expected = plain.label.clone()
    for place in itertools.product(*map(range, plain.label.shape)):
        *front, y, x = place
        window = plain.label[(*front, slice(max(0, y - 2), y + 3), slice(max(0, x - 2), x + 3))]
        if len(set(window.unique().tolist()) - {0}) > 1:
            expected[place] = 0
    assert torch.equal(wide.label, expected)
    assert not torch.equal(wide.label, plain.label)


@pytest.mark.parametrize("stored_on_disk", [False, True])
def test_ids_of_32_bits_stay_what_they_are(tmp_path, monkeypatch, stored_on_disk):
    label = np.array([[0, 7], [2**31 + 5, 2**32 - 1]], np.uint32).repeat(4, 0).repeat(4, 1)
    io.write_samples(tmp_path / "ids.h5", [io.Sample("a", np.ones((1, 8, 8), np.uint16), label)])
    monkeypatch.setattr(patches, "IN_MEMORY", 0 if stored_on_disk else 2**31)
    options = {"batch_size": 1, "normalisation": PERCENTILES, "augment": NONE, "seed": 0}
    made = PatchSampler(tmp_path / "ids.h5", patch=(8, 8), **options).batch(0)
    assert made.label.dtype == torch.int64
    assert set(made.label.unique().tolist()) == {0, 7, 2**31 + 5, 2**32 - 1}


def test_patches_that_do_not_fit_and_files_without_images(samples, tmp_path):
    options = {"batch_size": 1, "normalisation": PERCENTILES, "augment": NONE, "seed": 0}
    with pytest.raises(io.DataError, match=r'"s0".*smaller than the patch'):
        PatchSampler(samples[2], patch=(31, 16), **options)
    PatchSampler(samples[2], patch=(30, 40), **options).batch(0)
    io.write_samples(tmp_path / "none.h5", [])
    with pytest.raises(io.DataError, match="no image"):
        PatchSampler(tmp_path / "none.h5", patch=(4, 4), **options)
