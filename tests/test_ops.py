"""Tensor mathematics against plain loops over pixels, instances and pairs, in float64, in 2D and
3D."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdlib import kernels
from gdlib.distill.terms.original import affinities_wrapped, pool_windows

# The offsets of the paper's code, in its order, and a few that it does not use: positive, diagonal,
# none at all.
PAPER_2D = [offset for s in (1, 3, 5, 9, 27) for offset in ((-s, 0), (0, -s))]
PAPER_3D = [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (-2, 0, 0), (0, -3, 0), (0, 0, -3)]
PAPER_3D += [(-3, 0, 0), (0, -9, 0), (0, 0, -9), (-4, 0, 0), (0, -27, 0), (0, 0, -27)]
OTHER_2D = [(1, 0), (0, 27), (3, -2), (-5, 7), (2, 2), (0, 0), (40, -40)]
OTHER_3D = [(1, 0, 0), (4, 0, 0), (0, 27, -27), (-1, 2, -3), (2, 2, 2), (0, 0, 0)]
CASES = [
    ((2, 11, 12), PAPER_2D + OTHER_2D),
    ((1, 30, 29), PAPER_2D),
    ((2, 5, 4, 6), PAPER_3D + OTHER_3D),
    ((1, 2, 28, 3), PAPER_3D),
]
IDS = ["2D", "2D long", "3D", "3D long"]


def pairs(offset, shape):
    """Yield every pixel p whose neighbour q = p + offset is inside the image, and q."""
    for p in itertools.product(*map(range, shape)):
        q = tuple(a + d for a, d in zip(p, offset, strict=True))
        if all(0 <= a < n for a, n in zip(q, shape, strict=True)):
            yield p, q


def random_unit(shape, dim=3, seed=0):
    vectors = torch.randn(
        *shape, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()


def random_label(shape, top=3, seed=0):
    """Blocks of two pixels, 0 to `top`, so that pairs are often equal at short distance."""
    rng = np.random.default_rng(seed)
    batch, *sides = shape
    label = rng.integers(0, top + 1, (batch, *[-(-n // 2) for n in sides]))
    for axis in range(1, label.ndim):
        label = label.repeat(2, axis)
    return torch.from_numpy(label[(slice(None), *map(slice, sides))].copy())


# --- Pixels and their neighbours ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "offsets"), CASES, ids=IDS)
def test_affinities_equal_the_loop(shape, offsets):
    unit = random_unit(shape)
    expected = torch.zeros(shape[0], len(offsets), *shape[1:], dtype=torch.float64)
    for b, (k, offset) in itertools.product(range(shape[0]), enumerate(offsets)):
        for p, q in pairs(offset, shape[1:]):
            expected[(b, k, *p)] = sum(
                x * y for x, y in zip(unit[(b, *p)], unit[(b, *q)], strict=True)
            )
    result = kernels.affinities(unit, offsets)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-14)
    if (0,) * (len(shape) - 1) in offsets:
        torch.testing.assert_close(
            result[:, -2 if len(shape) == 3 else -1], torch.ones(shape, dtype=torch.float64)
        )


@pytest.mark.parametrize(("shape", "offsets"), CASES, ids=IDS)
def test_wrapped_affinities_are_those_of_a_torus(shape, offsets):
    unit = random_unit(shape).numpy()
    expected = np.zeros((shape[0], len(offsets), *shape[1:]))
    for b, (k, offset) in itertools.product(range(shape[0]), enumerate(offsets)):
        for p in itertools.product(*map(range, shape[1:])):
            q = tuple((a + d) % n for a, d, n in zip(p, offset, shape[1:], strict=True))
            expected[(b, k, *p)] = unit[(b, *p)] @ unit[(b, *q)]
    result = affinities_wrapped(torch.from_numpy(unit), offsets)
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("shape", "offsets"), CASES, ids=IDS)
def test_targets_and_inside_equal_the_loop(shape, offsets):
    label = random_label(shape)
    inside = np.zeros((len(offsets), *shape[1:]), bool)
    target = np.zeros((shape[0], len(offsets), *shape[1:]), bool)
    for k, offset in enumerate(offsets):
        for p, q in pairs(offset, shape[1:]):
            inside[(k, *p)] = True
            for b in range(shape[0]):
                target[(b, k, *p)] = label[(b, *p)] == label[(b, *q)]  # background pairs included
    np.testing.assert_array_equal(kernels.inside(offsets, shape[1:]).numpy(), inside)
    result = kernels.affinity_targets(label, offsets)
    assert result.dtype == torch.bool
    np.testing.assert_array_equal(result.numpy(), target)


def test_two_background_pixels_are_connected():
    assert kernels.affinity_targets(
        torch.zeros(1, 1, 2, dtype=torch.int64), [(0, -1)]
    ).tolist() == [[[[False, True]]]]


@pytest.mark.parametrize(("shape", "offsets"), CASES, ids=IDS)
def test_or_apart_where_the_background_is_no_object(shape, offsets):
    label = random_label(shape)
    target = np.zeros((shape[0], len(offsets), *shape[1:]), bool)
    for b, (k, offset) in itertools.product(range(shape[0]), enumerate(offsets)):
        for p, q in pairs(offset, shape[1:]):
            here, there = int(label[(b, *p)]), int(label[(b, *q)])
            target[(b, k, *p)] = here == there and here > 0 and there > 0
    result = kernels.affinity_targets(label, offsets, background_connected=False)
    assert result.dtype == torch.bool
    np.testing.assert_array_equal(result.numpy(), target)
    assert not torch.equal(result, kernels.affinity_targets(label, offsets))


@pytest.mark.parametrize(("shape", "offsets"), CASES, ids=IDS)
def test_pairs_of_a_mask(shape, offsets):
    mask = random_label(shape, seed=5) == 1
    before = mask.clone()
    expected = np.zeros((shape[0], len(offsets), *shape[1:]), bool)
    for b, (k, offset) in itertools.product(range(shape[0]), enumerate(offsets)):
        for p in itertools.product(*map(range, shape[1:])):
            expected[(b, k, *p)] = bool(mask[(b, *p)])  # also where there is no neighbour
        for p, q in pairs(offset, shape[1:]):
            expected[(b, k, *p)] |= bool(mask[(b, *q)])
    result = kernels.pairs_of(mask, offsets)
    assert result.dtype == torch.bool
    np.testing.assert_array_equal(result.numpy(), expected)
    assert torch.equal(mask, before)
    assert 0 < result.float().mean() < 1


@pytest.mark.parametrize("width", [0, 1, 2, 5])
@pytest.mark.parametrize("shape", [(2, 11, 12), (2, 3, 9, 8), (1, 1, 10), (1, 2, 5, 1)])
def test_borders_are_widened_where_a_window_shows_two_objects(shape, width):
    label = random_label(shape, top=3, seed=3) * 1000
    before = label.clone()
    expected = label.clone()
    for place in itertools.product(*map(range, shape)):
        *front, y, x = place
        window = label[
            (
                *front,
                slice(max(0, y - width), y + width + 1),
                slice(max(0, x - width), x + width + 1),
            )
        ]
        if any(int(i) not in (0, int(label[place])) for i in window.flatten()):
            expected[place] = 0
    result = kernels.widen_borders(label, width)
    assert torch.equal(result, expected)
    assert torch.equal(label, before)
    # there, no two objects are
    assert torch.equal(result, label) == (width == 0 or 1 in shape[-2:])


def test_sections_of_a_volume_widen_alone_and_background_widens_nothing():
    label = torch.zeros(1, 2, 3, 5, dtype=torch.int64)
    label[:, 0], label[:, 1] = 1, 2  # another object in the next section
    label[:, :, :, 4] = 0
    assert torch.equal(kernels.widen_borders(label, 3), label)


def test_a_volume_of_one_section_is_an_image():
    label = random_label((2, 11, 12))
    volume, offsets = label[:, None], [(0, *o) for o in PAPER_2D]
    for connected in (True, False):
        flat = kernels.affinity_targets(label, PAPER_2D, connected)
        assert torch.equal(kernels.affinity_targets(volume, offsets, connected)[:, :, 0], flat)
    assert torch.equal(kernels.widen_borders(volume, 2)[:, 0], kernels.widen_borders(label, 2))
    assert torch.equal(
        kernels.pairs_of(volume == 1, offsets)[:, :, 0], kernels.pairs_of(label == 1, PAPER_2D)
    )
    assert torch.equal(
        kernels.inside(offsets, (1, 11, 12))[:, 0], kernels.inside(PAPER_2D, (11, 12))
    )
    # there is nothing above or below
    assert not kernels.inside([(-1, 0, 0), (2, 0, 0)], (1, 11, 12)).any()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_overlap_lists_the_pairs(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    offset = data.draw(st.lists(st.integers(-7, 7), min_size=len(shape), max_size=len(shape)))
    index = np.arange(np.prod(shape)).reshape(shape)
    here, there = kernels.overlap(offset, shape)
    expected = [(index[p], index[q]) for p, q in pairs(offset, shape)]
    assert list(zip(index[here].flat, index[there].flat, strict=True)) == expected


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 2, 3, 3)], ids=["2D", "3D"])
def test_gradient_of_affinities(shape):
    """The backward pass is written by hand; numerical differences do not know how."""
    n = len(shape) - 1
    offsets = [*itertools.islice(itertools.product((-1, 0, 2), repeat=n), 12), (-27,) * n, (0,) * n]
    unit = random_unit(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: kernels.affinities(u, offsets), unit)
    transposed = (
        random_unit(shape).transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    )
    assert not transposed.is_contiguous()
    assert torch.autograd.gradcheck(lambda u: kernels.affinities(u, offsets), transposed)


def test_rows_puts_vectors_last_and_copies_nothing_of_a_channels_last_map():
    embedding = torch.randn(2, 5, 3, 4)
    assert torch.equal(kernels.rows(embedding)[1, 2, 3], embedding[1, :, 2, 3])
    assert kernels.rows(torch.randn(2, 5, 2, 3, 4)).shape == (2, 2, 3, 4, 5)
    last = embedding.contiguous(memory_format=torch.channels_last)
    assert kernels.rows(last).data_ptr() == last.data_ptr()
    assert kernels.rows(embedding).is_contiguous()


# --- Class weights --------------------------------------------------------------------------------------------------


def loop_balance(target, valid, per_offset):
    """Weights from the rule in words; one group of pairs is a sample, or an offset of a sample."""
    weight = np.zeros(target.shape)
    groups = (
        [(b, k) for b in range(len(target)) for k in range(target.shape[1])]
        if per_offset
        else range(len(target))
    )
    for group in groups:
        share = target[group][valid[group]]
        if share.size == 0:
            continue
        connected = separated = 1.0
        if share.any() and not share.all():
            f = min(max(share.sum() / share.size, 0.05), 0.99)
            if f > 0.5:
                separated = f / (1 - f)
            else:
                connected = (1 - f) / f
        weight[group] = np.where(valid[group], np.where(target[group], connected, separated), 0)
    return weight


@pytest.mark.parametrize("per_offset", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.004, 0.3, 0.5, 0.7, 0.996, 1.0])
def test_balance_equals_the_rule(share, per_offset):
    rng = np.random.default_rng(int(share * 1000))
    target = rng.random((2, 3, 20, 25)) < share
    target[0, 1] = rng.random((20, 25)) < 0.6  # offsets and samples differ
    valid = np.ones((3, 20, 25), bool)
    valid[0, :4] = valid[2, :, 7:] = False
    result = kernels.balance(torch.from_numpy(target), torch.from_numpy(valid), per_offset)
    expected = loop_balance(target, np.broadcast_to(valid, target.shape), per_offset)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


def test_balance_by_hand():
    """One pair in four connected: it weighs 3. Three in four: the other weighs 3.

    One class or no pair at all: no change.
    """
    target = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 1, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 0]]]).bool()
    weight = kernels.balance(target, torch.ones(4, dtype=torch.bool))
    assert weight[:, 0].tolist() == [[3, 1, 1, 1], [1, 1, 1, 3], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert kernels.balance(target, torch.zeros(4, dtype=torch.bool)).abs().max() == 0
    rare = torch.zeros(1, 1, 1000, dtype=torch.bool)
    rare[..., 0] = True
    # (1 - 0.05) / 0.05
    assert float(kernels.balance(rare, torch.tensor(True)).max()) == pytest.approx(19)
    # 0.99 / (1 - 0.99)
    assert float(kernels.balance(~rare, torch.tensor(True)).max()) == pytest.approx(99, rel=1e-4)


@given(connected=st.integers(60, 980))
@settings(max_examples=20, deadline=None)
def test_balanced_classes_weigh_the_same(connected):
    target = torch.arange(1000).lt(connected).reshape(1, 2, 500)
    weight = kernels.balance(target, torch.tensor(True))
    assert float(weight[target].sum()) == pytest.approx(float(weight[~target].sum()), rel=1e-4)


def test_padded_pairs_that_count_as_connected_give_the_weights_of_the_original_code():
    """It counts pairs across the border as connected and lets them count for the share.

    Both choices are the caller's.
    """
    label, offsets = random_label((2, 8, 9)), PAPER_2D
    inside = kernels.inside(offsets, (8, 9))
    padded = kernels.affinity_targets(label, offsets) | ~inside
    f = padded.double().mean((1, 2, 3)).numpy()
    weight = kernels.balance(padded, torch.tensor(True)).numpy()
    assert (f > 0.5).all()
    assert (f < 0.99).all()
    for b in range(2):
        np.testing.assert_allclose(
            weight[b], np.where(padded[b].numpy(), 1, f[b] / (1 - f[b])), rtol=1e-5
        )


# --- Instances ------------------------------------------------------------------------------------------------------

HUGE = torch.tensor([0, 3, 2**40, 2**62, 17])
LABELS = {
    "2D": random_label((3, 6, 7), 4),
    "3D": random_label((2, 3, 4, 5), 4),
    "huge sparse ids": HUGE[random_label((3, 6, 7), 4)],
    "huge sparse ids without background": HUGE[random_label((2, 6, 7), 3) + 1],
    "huge sparse ids, one image without background": torch.cat(
        [HUGE[random_label((1, 6, 7), 4)], HUGE[random_label((1, 6, 7), 3) + 1]]
    ),
    "one image empty": torch.cat(
        [random_label((1, 6, 7), 4), torch.zeros(1, 6, 7, dtype=torch.int64)]
    ),
    "first image empty": torch.cat(
        [torch.zeros(1, 6, 7, dtype=torch.int64), random_label((1, 6, 7), 4)]
    ),
    "all empty": torch.zeros(2, 6, 7, dtype=torch.int64),
    "no background": random_label((2, 6, 7), 3) + 1,
    "id as large as the image": torch.tensor([[[0, 0], [3, 4]]]),
    "id larger than the image": torch.tensor([[[0, 0], [3, 5]]]),
    "int32": random_label((2, 6, 7), 4).int(),
}


@pytest.mark.parametrize(
    ("spare", "background"), [(None, False), (None, True), (0, False), (3, True)]
)
@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
def test_instances_and_their_means_equal_the_loop(label, background, spare):
    """`spare`: how much larger the largest id is said to be than it is.

    None where it must be looked for.
    """
    if spare is not None and int(label.max()) > 10**6:
        pytest.skip("there is no room for so many nodes")
    rows = torch.randn(
        *label.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    means, size = [], []
    place = torch.full(label.shape, -1)
    for b, one in enumerate(label):
        means.append([])
        size.append([])
        for i in sorted(set(one.flatten().tolist()) - (set() if background else {0})):
            pixels = [p for p in itertools.product(*map(range, one.shape)) if int(one[p]) == i]
            for p in pixels:
                place[(b, *p)] = len(means[b])
            means[b].append(sum(rows[(b, *p)] for p in pixels) / len(pixels))
            size[b].append(len(pixels))

    largest = None if spare is None else int(label.max()) + spare
    most = max(map(len, size)) if spare is None else largest + background
    instances = kernels.Instances(label, background=background, largest=largest)
    assert instances.count.tolist() == [len(one) for one in size]
    assert instances.size.tolist() == [one + [0] * (most - len(one)) for one in size]
    node = place + most * torch.arange(len(label)).reshape(-1, *(1,) * (label.ndim - 1))
    assert torch.equal(instances.index, node.where(place >= 0, len(label) * most).flatten())
    nodes = kernels.pool_instances(rows, instances)
    assert nodes.shape == (len(label), most, 3)
    assert nodes.dtype == torch.float64
    for b, one in enumerate(means):
        assert not nodes[b, len(one) :].any()
        for mean, expected in zip(nodes[b], one, strict=False):
            torch.testing.assert_close(mean, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["2D", "3D", "one image empty", "all empty"])
def test_gradient_of_pooling(name):
    label = LABELS[name][..., :4]
    rows = torch.randn(*label.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r: kernels.pool_instances(r, kernels.Instances(label)), rows, fast_mode=True
    )


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((6, 9), (3, 3)),
        ((7, 10), (3, 4)),
        ((2, 3), (5, 1)),
        ((5, 7, 8), (3, 2, 7)),
        ((1, 7, 8), (3, 7, 7)),
    ],
)
def test_windows_are_averaged_as_by_a_loop(shape, window):
    rows = torch.randn(2, *shape, 3, dtype=torch.float64, requires_grad=True)
    pooled = pool_windows(rows, window)
    assert pooled.shape == (2, *(-(-n // w) for n, w in zip(shape, window, strict=True)), 3)
    for place in itertools.product(*map(range, pooled.shape[1:-1])):
        cut = rows[
            (slice(None), *(slice(i * w, (i + 1) * w) for i, w in zip(place, window, strict=True)))
        ]
        torch.testing.assert_close(
            pooled[(slice(None), *place)], cut.flatten(1, -2).mean(1), rtol=0, atol=1e-14
        )
    assert torch.autograd.gradcheck(lambda r: pool_windows(r, window), rows, fast_mode=True)


# --- Gram matrices --------------------------------------------------------------------------------------------------


def test_gram_product_is_the_mean_over_all_pairs():
    """The identity that replaces the pixel-pair matrix of two images."""
    rng = np.random.default_rng(0)
    memory, student, teacher = rng.normal(size=(3, 2, 7, 4))
    memory = np.concatenate([memory, memory[:, :4] * 2], 1)  # 11 vectors against 7
    product = kernels.gram(torch.from_numpy(memory)) * kernels.gram(
        torch.from_numpy(student - teacher)
    )
    for b in range(2):
        total = 0.0
        for m in memory[b]:
            for s, t in zip(student[b], teacher[b], strict=True):
                total += (m @ s - m @ t) ** 2
        assert float(product[b].sum()) == pytest.approx(total / (11 * 7), rel=1e-12)


def test_node_grams_of_a_ragged_batch():
    nodes = torch.randn(5, 3, 4, dtype=torch.float64)
    count = torch.tensor([3, 0, 1, 2, 0])
    for b, n in enumerate(count):
        nodes[b, n:] = 0
    result = kernels.node_grams(nodes, count)
    assert result.shape == (5, 4, 4)
    for b, n in enumerate(count.tolist()):
        mine = nodes[b, :n]
        expected = sum(
            (torch.outer(v, v) for v in mine), torch.zeros(4, 4, dtype=torch.float64)
        ) / max(1, n)
        torch.testing.assert_close(result[b], expected, rtol=0, atol=1e-14)
    assert kernels.node_grams(nodes[:2, :0], count[:2] * 0).abs().max() == 0


def test_unit_is_the_normalised_vector_and_its_gradient():
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(kernels.unit(x), x / x.square().sum(-1, keepdim=True).sqrt())
    assert torch.autograd.gradcheck(kernels.unit, (x,))
    assert torch.equal(kernels.unit(torch.zeros(1, 3)), torch.zeros(1, 3))
