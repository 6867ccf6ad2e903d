"""Loss terms against the paper's formulas, written as loops over pixels, instances, pairs and
memory images in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gdlib import kernels
from gdlib.config import Config
from gdlib.distill import Targets, View, build_term
from gdlib.distill.bank import mean_record
from gdlib.distill.terms.agd import agd_inter_loss
from gdlib.distill.terms.igd import IGD, edge_inter_loss
from gdlib.registry import UnknownName
from gdlib.types import Embedding

OFFSETS = {
    2: [(-1, 0), (0, -1), (-3, 0), (0, -3), (2, -1), (0, -27)],
    3: [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (-2, 0, 0), (0, -3, 0), (1, 0, 2), (0, 0, -27)],
}
SHAPES = {2: (9, 8), 3: (4, 8, 3)}
DIM = 3


# --- Formulas. An image is an array (D, [Z,] Y, X), its label ([Z,] Y, X) -------------------------------------------


def pixels(shape):
    return itertools.product(*map(range, shape))


def vector(image, p):
    return image[(slice(None), *p)]


def cosine(a, b):
    return float(a @ b) / (math.sqrt(a @ a) * math.sqrt(b @ b))


def edges_inside(offset, shape, wrap=False):
    for p in pixels(shape):
        q = tuple(a + d for a, d in zip(p, offset, strict=True))
        if wrap:
            yield p, tuple(a % n for a, n in zip(q, shape, strict=True))
        elif all(0 <= a < n for a, n in zip(q, shape, strict=True)):
            yield p, q


def class_weights(label, offsets):
    """Weight of a connected and of a separated pair of one image."""
    equal = [label[p] == label[q] for o in offsets for p, q in edges_inside(o, label.shape)]
    f = sum(equal) / len(equal)
    if f in (0, 1):
        return 1.0, 1.0
    f = min(max(f, 0.05), 0.99)
    return (1.0, f / (1 - f)) if f > 0.5 else ((1 - f) / f, 1.0)


def supervised(student, teacher, label, offsets, memory):
    total = 0.0
    for s, y in zip(student, label, strict=True):
        connected, separated = class_weights(y, offsets)
        for o in offsets:
            for p, q in edges_inside(o, y.shape):
                same = y[p] == y[q]
                weight = connected if same else separated
                total += weight * (cosine(vector(s, p), vector(s, q)) - same) ** 2
    return total / label.size


def foreground(student, teacher, label, offsets, memory):
    """Cross-entropy of the first channel, which `view` below uses as logit."""
    total = 0.0
    for s, y in zip(student, label, strict=True):
        for p in pixels(y.shape):
            probability = 1 / (1 + math.exp(-s[(0, *p)]))
            total -= math.log(probability if y[p] > 0 else 1 - probability)
    return total / label.size


def agd_intra(student, teacher, label, offsets, memory, balanced=False, wrap=False):
    total = 0.0
    for s, t, y in zip(student, teacher, label, strict=True):
        connected, separated = class_weights(y, offsets) if balanced else (1.0, 1.0)
        for o in offsets:
            for p, q in edges_inside(o, y.shape, wrap):
                weight = connected if y[p] == y[q] else separated
                total += (
                    weight
                    * (cosine(vector(s, p), vector(s, q)) - cosine(vector(t, p), vector(t, q))) ** 2
                )
    return total / label.size


def unit_vectors(image, pool=1):
    """All unit vectors of an image, or their means over windows that begin every `pool` pixels (3
    in z)."""
    image = image / np.sqrt((image**2).sum(0))
    shape = image.shape[1:]
    window = (pool,) * 2 if len(shape) == 2 or pool == 1 else (3, pool, pool)
    window = (1,) * (len(shape) - len(window)) + window
    out = []
    for corner in itertools.product(*(range(0, n, w) for n, w in zip(shape, window, strict=True))):
        part = image[(slice(None), *(slice(c, c + w) for c, w in zip(corner, window, strict=True)))]
        out.append(part.reshape(len(image), -1).mean(1))
    return np.array(out)


def agd_inter(student, teacher, label, offsets, memory, pool=1):
    """With explicit matrices of all pixel pairs of the image and each memory image."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for image, _ in memory:
            m = unit_vectors(image, pool)
            total += ((m @ unit_vectors(s, pool).T - m @ unit_vectors(t, pool).T) ** 2).mean()
    return total / (len(student) * max(1, len(memory)))


def nodes_of(image, label, background=False):
    ids = sorted(set(label.flat) - (set() if background else {0}))
    return [
        np.mean([vector(image, p) for p in pixels(label.shape) if label[p] == i], 0) for i in ids
    ]


def igd_nodes(student, teacher, label, offsets, memory, power=2, background=False):
    total = 0.0
    for s, t, y in zip(student, teacher, label, strict=True):
        both = list(zip(nodes_of(s, y, background), nodes_of(t, y, background), strict=True))
        total += sum(math.sqrt(((v - w) ** 2).sum()) ** power for v, w in both) / max(1, len(both))
    return total / len(label)


def igd_edges(student, teacher, label, offsets, memory, background=False):
    total = 0.0
    for s, t, y in zip(student, teacher, label, strict=True):
        v, w = nodes_of(s, y, background), nodes_of(t, y, background)
        for i, j in itertools.product(range(len(v)), repeat=2):
            total += (cosine(v[i], v[j]) - cosine(w[i], w[j])) ** 2 / len(v) ** 2
    return total / len(label)


def igd_edges_inter(student, teacher, label, offsets, memory, background=False, accumulate=None):
    """Mean over the memory images with instances.

    `accumulate`: the number by which the original code divides.
    """
    total = 0.0
    memory = [nodes for nodes in (nodes_of(*entry, background) for entry in memory) if nodes]
    for s, t, y in zip(student, teacher, label, strict=True):
        v, w = nodes_of(s, y, background), nodes_of(t, y, background)
        before = 0
        for other in memory:
            weight = 1 / len(memory)
            if accumulate:
                weight = 2 * len(v) / max(1, len(v) + before) / accumulate
                before += len(other)
            squares = [
                (cosine(a, m) - cosine(b, m)) ** 2 for a, b in zip(v, w, strict=True) for m in other
            ]
            total += weight * sum(squares) / max(1, len(squares))
    return total / len(label)


def with_options(formula, **options):
    return lambda *arguments: formula(*arguments, **options)


# name: (term, options, formula). Memory in these tests: five entries, one of them not valid; see
# `recall`.
KD = {
    "agd": ("agd", {}, agd_intra),
    "agd balanced": ("agd", {"balanced": True}, with_options(agd_intra, balanced=True)),
    "agd wrapped": (
        "original",
        {"part": "affinities", "wrap_around": True},
        with_options(agd_intra, wrap=True),
    ),
    "agd inter": ("agd", {"memory": True}, agd_inter),
    "agd inter pooled": (
        "original",
        {"part": "affinities", "memory": True, "pool": 7},
        with_options(agd_inter, pool=7),
    ),
    "igd nodes": ("igd", {"part": "nodes"}, igd_nodes),
    "igd nodes unsquared": (
        "original",
        {"part": "nodes", "power": 1},
        with_options(igd_nodes, power=1),
    ),
    "igd nodes background": (
        "original",
        {"part": "nodes", "background": True},
        with_options(igd_nodes, background=True),
    ),
    "igd edges": ("igd", {"part": "edges"}, igd_edges),
    "igd edges background": (
        "original",
        {"part": "edges", "background": True},
        with_options(igd_edges, background=True),
    ),
    "igd edges detached": ("original", {"part": "edges", "detach_norm": True}, igd_edges),
    "igd inter": ("igd", {"memory": True}, igd_edges_inter),
    "igd inter background": (
        "original",
        {"part": "edges", "memory": True, "background": True},
        with_options(igd_edges_inter, background=True),
    ),
    "igd inter detached": (
        "original",
        {"part": "edges", "memory": True, "detach_norm": True},
        igd_edges_inter,
    ),
    "igd inter accumulated": (
        "original",
        {"part": "edges", "memory": True, "accumulate": True},
        with_options(igd_edges_inter, accumulate=5),
    ),
}
ALL = {
    "supervised": ("supervised", {}, supervised),
    "foreground": ("foreground", {}, foreground),
    **KD,
}


# --- Small batches --------------------------------------------------------------------------------------------------


def random_images(count, shape, seed):
    return torch.randn(
        count, DIM, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def blocks(shape, top, seed):
    """One label of blocks of three pixels: background and up to `top` instances."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, top + 1, [-(-n // 3) for n in shape])
    # each id at least once, where there is room
    label.flat[: top + 1] = rng.permutation(top + 1)[: label.size]
    for axis in range(label.ndim):
        label = label.repeat(3, axis)
    return torch.from_numpy(label[tuple(map(slice, shape))].copy())


def labels(kind, shape):
    usual, other = blocks(shape, 3, 0), blocks(shape, 4, 1)
    nothing, single, full = torch.zeros_like(usual), (other == 1).long() * 7, other + 1
    return {
        "usual": torch.stack([usual, other]),
        "one of each": torch.stack([usual, nothing, single, torch.full_like(usual, 4), full]),
        "one empty": torch.stack([nothing, other]),
        "empty": torch.stack([nothing, nothing]),
    }[kind]


KINDS = ["one of each", "empty"]


def view(embedding, targets):
    """A view in the precision of the test; by itself a view computes in float32."""
    out = View(Embedding(embedding, embedding[:, :1], {}), targets)
    out.rows = kernels.rows(embedding)
    return out


def remembered(ndim, shape=None):
    """Four memory images and their labels; the third has no instance."""
    shape = shape or SHAPES[ndim]
    images = random_images(4, shape, 100)
    label = torch.stack([blocks(shape, top, 50 + top) for top in (4, 2, 0, 3)])
    return images, label


def recall(term, ndim, shape=None):
    """What the bank would return of those images, with an entry that is not valid among them."""
    if not term.memory:
        return {}
    images, label = remembered(ndim, shape)
    record = term.record(view(images, Targets(label, OFFSETS[ndim])))
    order = [0, 1, 3, 2, 3]
    memory = {name: value[order].float() for name, value in record.items()}
    memory["valid"] = torch.tensor([True, True, False, True, True])
    return memory


def loss(name, student, teacher, label, offsets=None, memory=None, **targets):
    """One term on (B, D, ...) maps."""
    kind, options, _ = ALL[name]
    ndim = label.ndim - 1
    targets = Targets(label, offsets or OFFSETS[ndim], **targets)
    term = build_term(kind, False, options)
    memory = recall(term, ndim, tuple(label.shape[1:])) if memory is None else memory
    return term(view(student, targets), view(teacher, targets), targets, memory)


def case(ndim, kind="usual", shape=None):
    shape = shape or SHAPES[ndim]
    label = labels(kind, shape)
    return random_images(len(label), shape, 1), random_images(len(label), shape, 2), label


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", ALL)
def test_value_is_that_of_the_formula(name, ndim, kind):
    student, teacher, label = case(ndim, kind)
    images, memory_label = (x.numpy() for x in remembered(ndim))
    memory = [(images[i], memory_label[i]) for i in (0, 1, 2, 3)]
    expected = ALL[name][2](student.numpy(), teacher.numpy(), label.numpy(), OFFSETS[ndim], memory)
    # Records, logits and class weights are float32, the detached norm is 1e-8 too long; everything
    # else is float64 here.
    exact = not any(
        word in name for word in ("inter", "foreground", "supervised", "balanced", "detached")
    )
    result = loss(name, student, teacher, label)
    assert result.shape == ()
    assert float(result) == pytest.approx(expected, rel=1e-12 if exact else 3e-6, abs=1e-12)


# --- Targets: the background, the balance, and what is not known ---------------------------------------------------


def hole(label, seed=7):
    """Where a label is not known: some blocks of every image."""
    return torch.stack([blocks(label.shape[1:], 2, seed + b) == 1 for b in range(len(label))])


def weighted_pairs(y, offsets, ignore, connected, per_offset):
    """Yield (p, q, same, weight) of every pair of one image that counts."""
    groups = [[o] for o in offsets] if per_offset else [offsets]
    for group in groups:
        pairs = [
            (p, q, bool(y[p] == y[q] and (connected or y[p] > 0)))
            for o in group
            for p, q in edges_inside(o, y.shape)
            if not ignore[p] and not ignore[q]
        ]
        f = sum(same for _, _, same in pairs) / max(1, len(pairs))
        weights = {True: 1.0, False: 1.0}  # if there is one class only
        if 0 < f < 1:
            f = min(max(f, 0.05), 0.99)
            weights = (
                {True: 1.0, False: f / (1 - f)} if f > 0.5 else {True: (1 - f) / f, False: 1.0}
            )
        yield from ((p, q, same, weights[same]) for p, q, same in pairs)


def known(name, student, teacher, label, ignore, offsets, connected, per_offset):
    """Value of a loss with weights, pair by pair."""
    total = 0.0
    for s, t, y, hidden in zip(student, teacher, label, ignore, strict=True):
        if name == "foreground":
            for p in pixels(y.shape):
                probability = 1 / (1 + math.exp(-s[(0, *p)]))
                total -= 0 if hidden[p] else math.log(probability if y[p] > 0 else 1 - probability)
            continue
        for p, q, same, weight in weighted_pairs(y, offsets, hidden, connected, per_offset):
            teacher = same if name == "supervised" else cosine(vector(t, p), vector(t, q))
            total += weight * (cosine(vector(s, p), vector(s, q)) - teacher) ** 2
    return total / label.size


TARGETS = [
    {"background_connected": connected, "per_offset": per_offset}
    for connected, per_offset in itertools.product((True, False), repeat=2)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [False, True], ids=["known", "partly ignored"])
@pytest.mark.parametrize(
    "targets", TARGETS, ids=lambda t: ", ".join(k for k, v in t.items() if v) or "neither"
)
@pytest.mark.parametrize("name", ["supervised", "agd balanced", "foreground"])
def test_targets_and_ignore_are_those_of_the_formula(name, targets, hidden, kind):
    for ndim in (2, 3):
        student, teacher, label = case(ndim, kind)
        ignore = hole(label) if hidden else None
        result = loss(name, student, teacher, label, ignore=ignore, **targets)
        nothing = torch.zeros_like(label, dtype=torch.bool)
        arrays = (
            x.numpy() for x in (student, teacher, label, nothing if ignore is None else ignore)
        )
        expected = known(
            name, *arrays, OFFSETS[ndim], targets["background_connected"], targets["per_offset"]
        )
        assert float(result) == pytest.approx(expected, rel=3e-6, abs=1e-12)
        if kind == "one of each" and name != "foreground":  # the options and the hole do something
            plain = float(loss(name, student, teacher, label))
            default = not hidden and targets == {"background_connected": True, "per_offset": False}
            assert (float(result) == pytest.approx(plain, rel=1e-3)) == default


@pytest.mark.parametrize("name", ALL)
def test_what_the_label_says_where_it_is_ignored_does_not_matter(name):
    """Not for weights, and not for instances."""
    for ndim in (2, 3):
        student, teacher, label = case(ndim)
        ignore = hole(label)
        other = torch.where(ignore, (label + 1) % 5, label)
        values = [float(loss(name, student, teacher, y, ignore=ignore)) for y in (label, other)]
        assert values[0] == values[1]
        assert values[0] > 0


@pytest.mark.parametrize("name", ["supervised", "agd balanced", "foreground"])
def test_ignored_pixels_get_no_gradient_from_losses_with_weights(name):
    student, teacher, label = case(2)
    ignore = hole(label)
    student.requires_grad_()
    loss(name, student, teacher, label, ignore=ignore).backward()
    size = student.grad.abs().sum(1)
    assert size[ignore].max() == 0
    assert size[~ignore].max() > 0


@pytest.mark.parametrize("name", ALL)
def test_nothing_known_at_all(name):
    student, teacher, label = case(2)
    student.requires_grad_()
    value = loss(name, student, teacher, label, ignore=torch.ones_like(label, dtype=torch.bool))
    value.backward()
    assert torch.isfinite(student.grad).all()
    if name in ("supervised", "agd balanced", "foreground", "igd nodes", "igd edges"):
        assert float(value.detach()) == 0
        assert student.grad.abs().max() == 0


def test_the_formulas_see_something():
    """A comparison of zeros would say nothing: on ordinary images every term is clearly positive
    and no two agree."""
    for ndim in (2, 3):
        student, teacher, label = case(ndim)
        values = {name: float(loss(name, student, teacher, label)) for name in ALL}
        assert min(values.values()) > 1e-3
        same = {"igd edges detached": "igd edges", "igd inter detached": "igd inter"}
        for a, b in itertools.combinations(values, 2):
            assert (values[a] == pytest.approx(values[b], rel=1e-6)) == (same.get(b) == a), (a, b)


def test_inter_losses_in_double_precision():
    """The records above are float32; here nothing is."""
    rng = np.random.default_rng(0)
    student, teacher, *memory = rng.normal(size=(5, 4, DIM))
    unit = [x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (student, teacher, *memory)]
    s, t, *m = map(torch.from_numpy, unit)
    squares = [
        (a @ c - b @ c) ** 2
        for a, b in zip(unit[0], unit[1], strict=True)
        for x in unit[2:]
        for c in x
    ]
    gram = kernels.gram(torch.stack(m)).mean(0)
    assert float(agd_inter_loss(kernels.gram((s - t)[None]), gram)) == pytest.approx(
        np.mean(squares), rel=1e-13
    )
    assert float(edge_inter_loss(s[None], t[None], torch.tensor([4]), gram)) == pytest.approx(
        np.mean(squares), rel=1e-13
    )


def test_accumulated_weights_by_hand():
    """Two instances; memory images with 4, 2, 1 and 4: the l-th counts 2 N / (N + sum of those
    before), over 5 entries."""
    shape, offsets = (4, 8), OFFSETS[2]
    label = torch.tensor([0, 1, 2, 2]).repeat_interleave(2).expand(1, *shape)
    student, teacher = random_images(1, shape, 1), random_images(1, shape, 2)
    memory_label = torch.tensor(
        [[1, 2, 3, 4], [0, 0, 1, 2], [0, 1, 0, 1], [4, 3, 2, 1]]
    ).repeat_interleave(2, 1)
    memory_label = memory_label[:, None].expand(4, *shape)
    images = random_images(4, shape, 3)
    plain, accumulated = (
        build_term("original", True, {"part": "edges", "accumulate": a}) for a in (False, True)
    )
    records = {
        n: r.float() for n, r in plain.record(view(images, Targets(memory_label, offsets))).items()
    }

    def alone(entry):
        memory = {name: value[entry : entry + 1] for name, value in records.items()} | {
            "valid": torch.tensor([True])
        }
        targets = Targets(label, offsets)
        return float(plain(view(student, targets), view(teacher, targets), targets, memory))

    expected = sum(w * alone(i) for i, w in enumerate((2, 4 / 6, 4 / 8, 4 / 9))) / 5
    memory = {name: torch.cat([value, value[:1]]) for name, value in records.items()}
    memory["valid"] = torch.tensor([True, True, True, True, False])
    targets = Targets(label, offsets)
    result = accumulated(view(student, targets), view(teacher, targets), targets, memory)
    assert float(result) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in KD if "inter" in name])
def test_without_memory_the_loss_is_a_differentiable_zero(name):
    student, teacher, label = case(2)
    full = recall(build_term(*KD[name][:1], False, KD[name][1]), 2)
    for memory in ({}, full | {"valid": torch.zeros(5, dtype=torch.bool)}):
        student = student.detach().requires_grad_()
        value = loss(name, student, teacher, label, memory=memory)
        assert float(value.detach()) == 0
        value.backward()
        assert student.grad.abs().max() == 0


def test_without_its_differences_the_original_is_agd_and_igd(catalogue):
    """So that ablations of single differences are ablations of `grd`."""
    student, teacher, label = case(2)
    targets = Targets(label, OFFSETS[2])
    methods = Config.parse(catalogue).methods
    of_both = list(zip(methods["grd"].terms, methods["grd_details"].terms, strict=True))
    assert {other.term for _, other in of_both} == {"original"}
    for one, other in of_both:
        values = []
        for term in (one, other):
            built = build_term(term.term, term.memory, term.options)
            memory = recall(built, 2)
            values.append(built(view(student, targets), view(teacher, targets), targets, memory))
        assert (one.weight, values[0]) == (other.weight, values[1])


def test_mean_record_ignores_what_is_not_valid():
    memory = {
        "x": torch.tensor([[1.0], [100.0], [3.0]]),
        "valid": torch.tensor([True, False, True]),
    }
    assert mean_record(memory, "x").tolist() == [2.0]
    assert mean_record(memory, "y") is None
    assert mean_record({}, "x") is None


# --- Properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KD)
def test_an_equal_student_has_no_loss_and_no_gradient(name, kind):
    for ndim in (2, 3):
        _, teacher, label = case(ndim, kind)
        student = teacher.clone().requires_grad_()
        value = loss(name, student, teacher, label)
        assert float(value.detach()) == 0
        value.backward()
        assert torch.isfinite(student.grad).all()
        assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", KD)
def test_a_longer_embedding_changes_nodes_only(name):
    """Affinities and edges are cosines; nodes are means of the raw vectors."""
    student, teacher, label = case(2)
    twice, once = (
        float(loss(name, 2 * student, teacher, label)),
        float(loss(name, student, teacher, label)),
    )
    assert (twice == pytest.approx(once, rel=1e-6)) == ("nodes" not in name)
    parallel = float(loss(name, 2 * teacher, teacher, label))
    assert (parallel < 1e-14) == ("nodes" not in name)


@given(seed=st.integers(0, 2**32 - 1), top=st.sampled_from([6, 1000, 2**62]))
@settings(max_examples=5, deadline=None)
@pytest.mark.parametrize("ndim", [2, 3])
def test_names_of_instances_do_not_matter(ndim, seed, top):
    rng = np.random.default_rng(seed)
    student, teacher, label = case(ndim)
    ids = {0}
    while len(ids) < 5:
        ids.add(int(rng.integers(1, top)))
    new = torch.stack(
        [torch.tensor([0, *rng.permutation(sorted(ids - {0}))])[one] for one in label]
    )
    for name in ALL:
        expected = float(loss(name, student, teacher, label))
        assert float(loss(name, student, teacher, new)) == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_the_mean_of_its_images(name, kind):
    for ndim in (2, 3):
        student, teacher, label = case(ndim, kind)
        single = [
            float(loss(name, student[b : b + 1], teacher[b : b + 1], label[b : b + 1]))
            for b in range(len(label))
        ]
        # The class weights are float32.
        assert float(loss(name, student, teacher, label)) == pytest.approx(
            sum(single) / len(label), rel=1e-6, abs=1e-14
        )


@pytest.mark.parametrize(
    "targets", [{}, {"background_connected": False, "per_offset": True, "ignore": True}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_a_volume_of_one_slice_is_an_image(name, kind, targets):
    student, teacher, label = case(2, kind)
    images, memory_label = remembered(2)
    flat_targets = targets | ({"ignore": hole(label)} if targets else {})
    targets = targets | ({"ignore": hole(label)[:, None]} if targets else {})
    offsets = [(0, *o) for o in OFFSETS[2]]
    term = build_term(*ALL[name][:1], False, ALL[name][1])
    memory = {}
    if term.memory:
        record = term.record(view(images[:, :, None], Targets(memory_label[:, None], offsets)))
        flat = term.record(view(images, Targets(memory_label, OFFSETS[2])))
        for key, value in record.items():
            torch.testing.assert_close(value, flat[key])
        memory = {key: value.float() for key, value in record.items()} | {
            "valid": torch.ones(4, dtype=torch.bool)
        }
    flat = loss(name, student, teacher, label, memory=memory, **flat_targets)
    volume = loss(
        name, student[:, :, None], teacher[:, :, None], label[:, None], offsets, memory, **targets
    )
    assert float(volume) == pytest.approx(float(flat), rel=1e-9, abs=1e-14)


# --- Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", [name for name in ALL if "detached" not in name and name != "foreground"]
)
def test_gradient_is_that_of_the_value(name, kind):
    for ndim, shape in ((2, (7, 6)), (3, (2, 5, 4))):
        student, teacher, label = case(ndim, kind, shape)
        student.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda s: loss(name, s, teacher, label), student, fast_mode=True
        )


@pytest.mark.parametrize(
    "name", ["supervised", "agd", "igd edges", "igd inter", "igd nodes unsquared"]
)
def test_every_entry_of_the_gradient(name):
    """The check above projects on random directions.

    Here each entry of a tiny map, also with one image empty.
    """
    for kind in ("usual", "one empty"):
        student, teacher, label = case(2, kind, (4, 5))
        assert torch.autograd.gradcheck(
            lambda s: loss(name, s, teacher, label), student.requires_grad_()
        )


def test_gradient_of_the_foreground():
    student, teacher, label = case(2)
    student.requires_grad_()
    loss("foreground", student, teacher, label).backward()
    expected = (torch.sigmoid(student[:, 0]) - (label > 0).double()) / label.numel()
    torch.testing.assert_close(student.grad[:, 0], expected, rtol=0, atol=1e-8)
    assert student.grad[:, 1:].abs().max() == 0


@pytest.mark.parametrize("memory", [False, True])
def test_detached_norm_has_the_gradient_of_a_dot_product_with_constant_lengths(memory):
    student, teacher, label = case(2)
    images, memory_label = (x.numpy() for x in remembered(2))
    name = "igd inter detached" if memory else "igd edges detached"
    student.requires_grad_()
    loss(name, student, teacher, label).backward()

    copy = student.detach().clone().requires_grad_()
    total = 0
    for s, t, y in zip(copy, teacher.numpy(), label.numpy(), strict=True):
        ids = sorted(set(y.flat) - {0})
        v = [s[:, torch.from_numpy(y == i)].mean(1) for i in ids]
        length = [math.sqrt(float((x.detach() ** 2).sum())) for x in v]  # a number: no gradient
        w = nodes_of(t, y)
        if memory:
            others = [nodes_of(images[k], memory_label[k]) for k in (0, 1, 3)]
            for other in others:
                for i, m in itertools.product(range(len(v)), other):
                    unit = torch.from_numpy(m / math.sqrt(m @ m))
                    squared = (v[i] @ unit / length[i] - cosine(w[i], m)) ** 2
                    total = total + squared / (len(v) * len(other) * len(others) * len(label))
        else:
            for i, j in itertools.product(range(len(v)), repeat=2):
                squared = (v[i] @ v[j] / (length[i] * length[j]) - cosine(w[i], w[j])) ** 2
                total = total + squared / (len(v) ** 2 * len(label))
    total.backward()
    torch.testing.assert_close(student.grad, copy.grad, rtol=1e-5, atol=1e-9)

    ordinary = student.detach().clone().requires_grad_()
    loss(name.removesuffix(" detached"), ordinary, teacher, label).backward()
    # or the option would do nothing
    assert (ordinary.grad - student.grad).norm() > 0.1 * student.grad.norm()


# --- Names and options ----------------------------------------------------------------------------------------------


def test_a_view_computes_in_float32():
    targets = Targets(torch.ones(1, 4, 4, dtype=torch.int64), OFFSETS[2])
    half = View(Embedding(torch.randn(1, 2, 4, 4, dtype=torch.bfloat16), None, {}), targets)
    assert {half.rows.dtype, half.unit.dtype, half.affinity.dtype, half.nodes.dtype} == {
        torch.float32
    }


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_a_view_computes_together_is_what_it_computes_alone(ndim):
    targets = Targets(torch.randint(0, 3, (2, 5, 9, 8)[: 1 + ndim]), OFFSETS[ndim])
    output = Embedding(torch.randn(2, 4, *targets.label.shape[1:]), None, {})
    together = View(output, targets, {"affinity", "nodes", "gram"})
    alone = View(output, targets)
    torch.testing.assert_close(together.affinity, alone.affinity)
    torch.testing.assert_close(together.nodes, alone.nodes)
    torch.testing.assert_close(together.gram(), kernels.gram(alone.unit.flatten(1, -2)))


def test_wrong_names_and_options():
    with pytest.raises(UnknownName, match=r'"adg".*did you mean "agd"'):
        build_term("adg", False, {})
    for options in ({"part": "edge"}, {"part": "nodes", "memory": True}):
        for name in ("igd", "original"):
            with pytest.raises(ValueError, match=rf'loss term "{name}".*part'):
                build_term(name, False, options)
        with pytest.raises(ValueError, match="igd: part"):
            IGD(**options)
    for name in ("supervised", "foreground"):
        with pytest.raises(UnknownName, match=f'"{name}" has no option "memory"'):
            build_term(name, True, {})


@pytest.mark.parametrize(
    ("name", "memory", "options", "works"),
    [
        ("agd", False, {}, True),
        ("igd", False, {"part": "edges"}, True),
        ("igd", False, {"part": "nodes"}, False),
        ("agd", True, {}, False),
        ("igd", True, {}, False),
    ],
)
def test_vectors_of_different_length_need_a_term_that_compares_similarities(
    name, memory, options, works
):
    label = torch.randint(0, 3, (2, 8, 8))
    targets = Targets(label, [(-1, 0), (0, -1)])
    views = [
        View(Embedding(torch.randn(2, d, 8, 8), torch.zeros(2, 1, 8, 8), {}), targets)
        for d in (4, 6)
    ]
    term = build_term(name, memory, options)
    if works:
        assert term(*views, targets, {}).isfinite()
    else:
        with pytest.raises(ValueError, match="length 4, those of the teacher 6"):
            term(*views, targets, {})
