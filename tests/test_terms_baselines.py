"""Terms of other methods against their formulas, written as loops over pixels, channels, images and
pairs in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_terms import (
    ALL,
    KINDS,
    OFFSETS,
    SHAPES,
    class_weights,
    cosine,
    edges_inside,
    hole,
    labels,
    pixels,
    random_images,
    vector,
    view,
)
from torch import nn

from gdlib import io
from gdlib.config.recipe import TermOptions
from gdlib.distill import Distiller, Targets, View, build_term
from gdlib.distill.terms.rekd import Fusion, context_loss
from gdlib.distill.terms.response import bernoulli_divergence
from gdlib.models import build
from gdlib.registry import TERMS
from gdlib.train import loop
from gdlib.train.trainer import Trainer
from gdlib.types import Batch, Embedding

COUNT = 4  # images of a batch: distances and angles between images need three

# --- Formulas. A batch is an array (B, D, [Z,] Y, X), labels and what is not known are (B, [Z,] Y, X) -----------------


def divergence(s, t, temperature):
    """Of two probabilities that are given as log-odds."""
    p, q = (1 / (1 + math.exp(-x / temperature)) for x in (t, s))
    return temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


def response(student, teacher, label, ignore, temperature=1.0, balanced=False, foreground=1.0):
    total = 0.0
    for s, t, y in zip(student, teacher, label, strict=True):
        offsets = OFFSETS[y.ndim]
        weights = class_weights(y, offsets) if balanced else (1.0, 1.0)
        for p, q in itertools.chain.from_iterable(edges_inside(o, y.shape) for o in offsets):
            both = [(1 + 0.99 * cosine(vector(x, p), vector(x, q))) / 2 for x in (s, t)]
            odds = [math.log(x / (1 - x)) for x in both]
            total += weights[int(y[p] != y[q])] * divergence(*odds, temperature)
        total += foreground * sum(
            divergence(s[(0, *p)], t[(0, *p)], temperature) for p in pixels(y.shape)
        )
    return total / label.size


def fitnet(student, teacher, label, ignore):
    return float(np.mean([(s - t) ** 2 for s, t in zip(student.flat, teacher.flat, strict=True)]))


def at(student, teacher, label, ignore):
    total = 0.0
    for s, t, y in zip(student, teacher, label, strict=True):
        maps = [[sum(v**2 for v in vector(x, p)) for p in pixels(y.shape)] for x in (s, t)]
        length = [math.sqrt(sum(v**2 for v in x)) for x in maps]
        total += sum((a / length[0] - b / length[1]) ** 2 for a, b in zip(*maps, strict=True))
    return total / len(student)


def spkd(student, teacher, label, ignore):
    grams = []
    for batch in (student, teacher):
        gram = np.array([[float((a * b).sum()) for b in batch] for a in batch])
        grams.append([row / math.sqrt((row**2).sum()) for row in gram])
    return sum(((a - b) ** 2).sum() for a, b in zip(*grams, strict=True)) / len(student) ** 2


def huber(a, b):
    d = abs(a - b)
    return d**2 / 2 if d < 1 else d - 0.5


def rkd(student, teacher, label, ignore, distance=1.0, angle=2.0):
    n = len(student)
    points = [[x.reshape(len(x), -1).mean(1) for x in batch] for batch in (student, teacher)]
    pairs, triplets = (
        list(itertools.permutations(range(n), 2)),
        list(itertools.permutations(range(n), 3)),
    )
    lengths = [[math.dist(x[i], x[j]) for i, j in pairs] for x in points]
    lengths = [[d / (sum(x) / len(x)) for d in x] for x in lengths]
    corners = [[cosine(x[i] - x[j], x[k] - x[j]) for i, j, k in triplets] for x in points]
    total = distance * sum(map(huber, *lengths)) / max(1, len(pairs))
    return total + angle * sum(map(huber, *corners)) / max(1, len(triplets))


def cwd(student, teacher, label, ignore, temperature=4.0):
    total = 0.0
    for s, t in itertools.chain.from_iterable(
        zip(a, b, strict=True) for a, b in zip(student, teacher, strict=True)
    ):
        p, q = ([math.exp(v / temperature) for v in channel.flat] for channel in (t, s))
        p, q = ([v / sum(x) for v in x] for x in (p, q))
        total += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / (student.shape[0] * student.shape[1])


def ifvd(student, teacher, label, ignore):
    """Background and every instance are classes, what is not known is none."""
    total = 0.0
    for s, t, y, hidden in zip(student, teacher, label, ignore, strict=True):
        known = [p for p in pixels(y.shape) if not hidden[p]]
        squares = 0.0
        for p in known:
            mine = [q for q in known if y[q] == y[p]]
            m = [cosine(vector(x, p), np.mean([vector(x, q) for q in mine], 0)) for x in (s, t)]
            squares += (m[0] - m[1]) ** 2
        total += squares / max(1, len(known))
    return total / len(label)


def skd(student, teacher, label, ignore, pool=2):
    total = 0.0
    for s, t, y in zip(student, teacher, label, strict=True):
        corners = list(itertools.product(*(range(0, n, pool) for n in y.shape)))
        boxes = [(slice(None), *(slice(c, c + pool) for c in corner)) for corner in corners]
        means = [[x[box].reshape(len(x), -1).mean(1) for box in boxes] for x in (s, t)]
        for i, j in itertools.product(range(len(boxes)), repeat=2):
            total += (
                cosine(means[0][i], means[0][j]) - cosine(means[1][i], means[1][j])
            ) ** 2 / len(boxes) ** 2
    return total / len(student)


FORMULAS = {f.__name__: f for f in (response, fitnet, at, spkd, rkd, cwd, ifvd, skd)}
CASES = {
    "response": {},
    "response of affinities": {"foreground": 0.0},
    "response balanced": {"balanced": True, "foreground": 0.0},
    "response softened": {"temperature": 4.0, "balanced": True},
    "fitnet": {},
    "at": {},
    "spkd": {},
    "rkd": {},
    "rkd distances": {"angle": 0.0},
    "rkd angles": {"distance": 0.0, "angle": 1.0},
    "cwd": {},
    "cwd sharp": {"temperature": 1.0},
    "ifvd": {},
    "skd": {},
    "skd pooled by 3": {"pool": 3},
}
# Logits of the foreground and class weights are float32.
DOUBLE = [
    name for name in CASES if name not in ("response", "response balanced", "response softened")
]
OF_BATCHES = ("spkd", "rkd", "rkd distances", "rkd angles")  # they compare images with one another


def loss(name, student, teacher, label, offsets=None, ignore=None):
    targets = Targets(label, offsets or OFFSETS[label.ndim - 1], ignore=ignore)
    term = build_term(name.split()[0], False, CASES[name])
    return term(view(student, targets), view(teacher, targets), targets, {})


def case(ndim, kind="usual", shape=None):
    shape = shape or SHAPES[ndim]
    label = torch.cat([labels(kind, shape), labels("usual", shape).flip(1)])[:COUNT]
    return random_images(COUNT, shape, 1), random_images(COUNT, shape, 2), label


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_value_is_that_of_the_formula(name, ndim, kind):
    student, teacher, label = case(ndim, kind)
    arrays = (
        x.numpy() for x in (student, teacher, label, torch.zeros_like(label, dtype=torch.bool))
    )
    expected = FORMULAS[name.split()[0]](*arrays, **CASES[name])
    result = loss(name, student, teacher, label)
    assert result.shape == ()
    assert float(result) == pytest.approx(expected, rel=1e-11 if name in DOUBLE else 3e-6)
    assert expected > 1e-3


def test_every_term_of_the_package_is_tested():
    ours = {kind for kind, _, _ in ALL.values()}
    assert ours | set(FORMULAS) | {"rekd"} == set(TERMS.names())


@pytest.mark.parametrize("ndim", [2, 3])
def test_pixels_without_a_label_have_no_class(ndim):
    student, teacher, label = case(ndim)
    ignore = hole(label)
    expected = ifvd(*(x.numpy() for x in (student, teacher, label, ignore)))
    student.requires_grad_()
    value = loss("ifvd", student, teacher, label, ignore=ignore)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-11)
    value.backward()
    size = student.grad.abs().sum(1)
    assert size[ignore].max() == 0
    assert size[~ignore].min() > 0


@pytest.mark.parametrize("name", CASES)
def test_who_reads_the_label(name):
    student, teacher, label = case(2)
    ignore = hole(label)
    plain = loss(name, student, teacher, label)
    hidden = loss(name, student, teacher, label, ignore=ignore)
    other = loss(name, student, teacher, label.roll(1, 1))
    reads = name in ("response balanced", "response softened", "ifvd")
    assert (float(plain) != float(hidden)) == (float(plain) != float(other)) == reads
    changed = torch.where(ignore, (label + 1) % 5, label)
    assert float(hidden) == float(loss(name, student, teacher, changed, ignore=ignore))


@pytest.mark.parametrize("name", CASES)
def test_nothing_known_at_all(name):
    student, teacher, label = case(2)
    student.requires_grad_()
    value = loss(name, student, teacher, label, ignore=torch.ones_like(label, dtype=torch.bool))
    value.backward()
    assert torch.isfinite(student.grad).all()
    assert (float(value.detach()) == 0) == (name in ("response balanced", "ifvd"))


# --- Properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_an_equal_student_has_no_loss_and_no_gradient(name):
    for ndim in (2, 3):
        _, teacher, label = case(ndim)
        student = teacher.clone().requires_grad_()
        value = loss(name, student, teacher, label)
        value.backward()
        assert abs(float(value.detach())) < 1e-12
        assert student.grad.abs().max() < 1e-7


def turned(x):
    rotation, _ = torch.linalg.qr(
        torch.randn(3, 3, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    )
    return torch.einsum("bc...,dc->bd...", x, rotation)


CHANGES = {
    "scale": lambda x: 2 * x,
    "turn": turned,
    "shift": lambda x: x + torch.tensor([0.5, -1.0, 2.0], dtype=x.dtype)[:, None, None],
    "permute": lambda x: x.flatten(2)[
        :, :, torch.randperm(72, generator=torch.Generator().manual_seed(6))
    ].view_as(x),
}
# What does not change the loss if it is done to the vectors, or to the places, of the student
# alone.
INVARIANT = {
    "response of affinities": {"scale", "turn"},
    "fitnet": set(),
    "at": {"scale", "turn"},
    "spkd": {"scale", "turn", "permute"},
    "rkd": {"scale", "turn", "shift", "permute"},
    "cwd": {"shift"},
    "ifvd": {"scale", "turn"},
    "skd": {"scale", "turn"},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", INVARIANT)
def test_invariances_are_those_of_the_method_and_no_others(name, change):
    student, teacher, label = case(2)
    before, after = (
        float(loss(name, x, teacher, label)) for x in (student, CHANGES[change](student))
    )
    assert (after == pytest.approx(before, rel=1e-9)) == (change in INVARIANT[name])


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_the_mean_of_its_images_unless_they_are_compared(name):
    student, teacher, label = case(2)
    single = [
        float(loss(name, student[b : b + 1], teacher[b : b + 1], label[b : b + 1]))
        for b in range(COUNT)
    ]
    if name in OF_BATCHES:
        assert single == pytest.approx([0.0] * COUNT, abs=1e-15)
    else:
        assert float(loss(name, student, teacher, label)) == pytest.approx(
            sum(single) / COUNT, rel=1e-6
        )


@pytest.mark.parametrize("name", OF_BATCHES)
@pytest.mark.parametrize("count", [1, 2])
def test_small_batches(name, count):
    """One image has no relation; two have one distance, which is its own mean."""
    student, teacher, label = (x[:count] for x in case(2))
    student.requires_grad_()
    value = loss(name, student, teacher, label)
    value.backward()
    assert torch.isfinite(student.grad).all()
    something = count == 2 and name == "spkd"
    assert (float(value.detach()) > 1e-6) == (student.grad.abs().max() > 1e-12) == something


@pytest.mark.parametrize("name", CASES)
def test_a_volume_of_one_slice_is_an_image(name):
    student, teacher, label = case(2)
    ignore = hole(label)
    flat = loss(name, student, teacher, label, ignore=ignore)
    offsets = [(0, *o) for o in OFFSETS[2]]
    volume = loss(
        name, student[:, :, None], teacher[:, :, None], label[:, None], offsets, ignore[:, None]
    )
    assert float(volume) == pytest.approx(float(flat), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_channels_may_differ_where_only_similarities_are_compared(name):
    student, teacher, label = case(2)
    longer = torch.cat([teacher, teacher[:, :1] ** 2], 1)
    if name.startswith(("fitnet", "cwd")):
        with pytest.raises(ValueError, match="length 3, those of the teacher 4"):
            loss(name, student, longer, label)
        assert build_term(name.split()[0], False, {}).projected
    else:
        assert float(loss(name, student, longer, label)) > 0
        kind = build_term(name.split()[0], False, {})
        assert kind.whole or not kind.projected


@pytest.mark.parametrize("name", CASES)
def test_a_student_that_is_silent_gets_a_finite_gradient(name):
    """After a ReLU all vectors may be zero, and then all images are equal."""
    student, teacher, label = case(2)
    raw = (-student.abs()).requires_grad_()
    loss(name, raw.relu(), teacher, label).backward()
    assert torch.isfinite(raw.grad).all()
    assert raw.grad.abs().max() < 1e3
    same = student[:1].repeat(COUNT, 1, 1, 1).requires_grad_()
    loss(name, same, teacher, label).backward()
    assert same.grad.abs().max() < 1e3


# --- Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", DOUBLE)
def test_gradient_is_that_of_the_value(name, ndim):
    student, teacher, label = case(ndim, shape={2: (5, 6), 3: (2, 5, 4)}[ndim])
    check = torch.autograd.gradcheck
    assert check(lambda s: loss(name, s, teacher, label), student.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_of_the_divergence(temperature):
    student, teacher = (
        torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        for k in (1, 2)
    )
    student.requires_grad_()
    bernoulli_divergence(student, teacher, temperature).sum().backward()
    with torch.no_grad():
        expected = temperature * (
            (student / temperature).sigmoid() - (teacher / temperature).sigmoid()
        )
    torch.testing.assert_close(student.grad, expected)


# --- Knowledge review -----------------------------------------------------------------------------------------------


def fused_by_loops(fusion, x, coarser):
    """One image (C, Y, X), its batch normalisations as they are before training."""
    constant = 1 / math.sqrt(1 + 1e-5)

    def pick(weight):
        return weight.detach().double().numpy()

    out = constant * np.einsum("dc,cyx->dyx", pick(fusion.reduce[0].weight)[:, :, 0, 0], x)
    height, width = out.shape[1:]
    for y, x in pixels((height, width)) if coarser is not None else ():
        above = coarser[:, y * coarser.shape[1] // height, x * coarser.shape[2] // width]
        both = pick(fusion.attention.weight)[:, :, 0, 0] @ np.concatenate([out[:, y, x], above])
        share = 1 / (1 + np.exp(-both - pick(fusion.attention.bias)))
        out[:, y, x] = share[0] * out[:, y, x] + share[1] * above
    kernel = pick(fusion.expand[0].weight)
    wide = np.pad(out, ((0, 0), (1, 1), (1, 1)))
    result = np.zeros((len(kernel), height, width))
    for y, x in pixels((height, width)):
        result[:, y, x] = constant * np.einsum("dcyx,cyx->d", kernel, wide[:, y : y + 3, x : x + 3])
    return result, out


def test_fusion_is_that_of_the_formula():
    torch.manual_seed(0)
    coarse, fine = (
        Fusion(2, 5, 4, 6, coarsest=True).double().eval(),
        Fusion(2, 3, 4, 2, coarsest=False).double().eval(),
    )
    x, y = (
        torch.randn(1, 5, 2, 3, dtype=torch.float64),
        torch.randn(1, 3, 4, 7, dtype=torch.float64),
    )
    first, review = coarse(x, None)
    second, _ = fine(y, review)
    expected, between = fused_by_loops(coarse, x[0].numpy(), None)
    np.testing.assert_allclose(first[0].detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(
        second[0].detach(), fused_by_loops(fine, y[0].numpy(), between)[0], rtol=1e-10
    )


@pytest.mark.parametrize("shape", [(8, 12), (6, 5), (4, 4), (3, 1), (1, 1), (8, 4, 8), (1, 8, 4)])
def test_context_loss_is_that_of_the_formula(shape):
    student, teacher = (random_images(2, shape, seed) for seed in (1, 2))
    terms = [(1.0, float(((student - teacher) ** 2).mean()))]
    for side in (4, 2, 1):
        if max(shape) > side:
            squares = []
            # cells may overlap by a voxel
            for cell in itertools.product(*(range(min(side, n)) for n in shape)):
                box = [
                    (c * n // min(side, n), -(-(c + 1) * n // min(side, n)))
                    for c, n in zip(cell, shape, strict=True)
                ]
                part = [
                    x[(..., *(slice(*b) for b in box))].flatten(2).mean(2)
                    for x in (student, teacher)
                ]
                squares.append(float(((part[0] - part[1]) ** 2).mean()))
            terms.append((terms[-1][0] / 2, float(np.mean(squares))))
    expected = sum(w * v for w, v in terms) / sum(w for w, _ in terms)
    assert float(context_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(context_loss(teacher, teacher)) == 0
    if len(shape) == 2:
        volume = context_loss(student[:, :, None], teacher[:, :, None])
        assert float(volume) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda s: context_loss(s, teacher), student.requires_grad_(), fast_mode=True
    )


def pair(model="resunet", widths=((2, 3, 4, 5, 6), (3, 4, 5, 6, 7))):
    torch.manual_seed(0)
    return [build(model, {"widths": list(w)}) for w in widths]


def test_review_is_the_sum_over_levels_from_coarse_to_fine():
    student, teacher = (network.eval() for network in pair())
    term = build_term("rekd", False, {})
    term.attach(student, teacher)
    term.eval()
    assert list(term.strides) == list(term.fusions) == ["stride8", "stride4", "stride2"]
    image = random_images(1, (32, 32), 3)[:, :1].float()
    targets = Targets(torch.zeros(1, 32, 32, dtype=torch.int64), OFFSETS[2])
    with torch.no_grad():
        student, teacher = student(image), teacher(image)
        expected, review = 0.0, None
        for name, fusion in term.fusions.items():
            fused, review = fused_by_loops(
                fusion, student.features[name][0].double().numpy(), review
            )
            expected += float(
                context_loss(torch.from_numpy(fused)[None], teacher.features[name].double())
            )
        value = term(View(student, targets), View(teacher, targets), targets, {})
    assert float(value) == pytest.approx(expected, rel=1e-4)


def test_review_of_a_volume_of_one_slice_is_that_of_an_image():
    flat, deep = Fusion(2, 3, 4, 2, coarsest=False), Fusion(3, 3, 4, 2, coarsest=False)
    with torch.no_grad():
        for mine, other in zip(deep.parameters(), flat.parameters(), strict=True):
            if mine.ndim == 5:
                mine.zero_()[:, :, mine.shape[2] // 2] = other
            else:
                mine.copy_(other)
    x, coarser = torch.randn(2, 3, 6, 4), torch.randn(2, 4, 3, 2)
    for a, b in zip(flat(x, coarser), deep(x[:, :, None], coarser[:, :, None]), strict=True):
        torch.testing.assert_close(b[:, :, 0], a)


def test_review_where_maps_cover_more_than_the_label():
    student, teacher = pair("mala", ((2, 3, 4, 5), (3, 4, 5, 6)))
    distiller = Distiller(
        student, teacher, [("rekd", 1.0, build_term("rekd", False, {}))], OFFSETS[3]
    )
    label = torch.zeros(1, 3, 29, 29, dtype=torch.int64)
    seen = []
    for fusion in distiller.terms[0].fusions.values():
        fusion.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    total, _ = distiller(Batch(torch.randn(1, 1, 31, 241, 241), label, torch.tensor([0])), 0)
    assert seen == [(3, 1, 1), (3, 3, 3), (3, 9, 9)]  # no voxel is outside the label
    total.backward()
    assert all(p.grad.isfinite().all() for p in distiller.terms.parameters())


def test_review_needs_a_level_in_common():
    with pytest.raises(ValueError, match="no level in common among stride27"):
        build_term("rekd", False, {}).attach(
            build("resunet3d", {}), build("mala", {"widths": [2, 3, 4, 5]})
        )


# --- In training ----------------------------------------------------------------------------------------------------

FEATURES = ("fitnet", "at", "spkd", "rkd", "cwd", "ifvd", "skd")


def all_terms():
    named = [(name, 1.0, build_term(name, False, {})) for name in (*FEATURES, "response", "rekd")]
    return named, [*("stride8" for _ in FEATURES), None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_together_teach_the_student_and_what_is_learned_along(dtype):
    student, teacher = pair()
    terms, levels = all_terms()
    distiller = Distiller(student, teacher, terms, OFFSETS[2], levels=levels).train()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    label = labels("usual", (32, 32)).repeat(2, 1, 1)
    batch = Batch(
        torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)),
        label,
        torch.arange(4),
    )
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total, losses = distiller(batch, 0)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    for name, value in losses.items():
        grads = torch.autograd.grad(value, list(student.stem.parameters()), retain_graph=True)
        assert sum(g.abs().sum() for g in grads) > 0, name
    total.backward()
    learned = [
        *student.parameters(),
        *distiller.projections.parameters(),
        *distiller.terms.parameters(),
    ]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
    assert all(p.grad.abs().max() > 0 for p in distiller.terms.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def baseline_spec(make_spec):
    """A run with a projection and with learned modules in a term."""
    terms = (
        TermOptions(term="fitnet", weight=1.0, level="stride8"),
        TermOptions(term="rekd", weight=1.0),
    )
    return make_spec().model_copy(update={"method": "baselines", "terms": terms})


def test_what_is_learned_along_is_resumed_bit_for_bit_and_not_deployed(
    make_spec, train, teacher, tmp_path
):
    spec = baseline_spec(make_spec)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(spec, whole, teacher=teacher)
    for _ in range(spec.recipe.steps - 1):
        with pytest.raises(loop.Interrupted):
            train(spec, parts, teacher=teacher, max_seconds=0)
        kept = torch.load(parts / "state" / "resume.pt", weights_only=True)
        assert any("fusions.stride4.attention" in key for key in kept["terms"])
        assert set(kept["projections"]) == {"stride8.weight"}
    train(spec, parts, teacher=teacher)
    plain = build(spec.model, spec.options).state_dict()
    for name in ("weights", "last"):
        one, other = (
            io.load_weights(folder / f"{name}.safetensors")[0] for folder in (whole, parts)
        )
        assert one.keys() == plain.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (whole / "history.csv").read_bytes() == (parts / "history.csv").read_bytes()


def test_what_is_learned_along_is_in_the_optimizer(make_spec, teacher):
    trainer = Trainer(baseline_spec(make_spec), teacher, torch.device("cpu"))
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    learned: list[nn.Module] = [
        trainer.distiller.student,
        trainer.distiller.projections,
        trainer.distiller.terms,
    ]
    assert optimized == {id(p) for module in learned for p in module.parameters()}
    assert len(list(trainer.distiller.terms.parameters())) > 10
    assert len(trainer.distiller.projections) == 1


def test_a_view_computes_in_float32():
    targets = Targets(torch.ones(2, 8, 8, dtype=torch.int64), OFFSETS[2])
    half = [
        Embedding(*(torch.randn(2, c, 8, 8, dtype=torch.bfloat16) for c in (3, 1)), {})
        for _ in range(2)
    ]
    views = [View(output, targets) for output in half]
    for name in FORMULAS:
        assert build_term(name, False, {})(*views, targets, {}).dtype == torch.float32
