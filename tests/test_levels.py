"""Distillation on feature maps inside the networks: where their voxels are, whose labels they get,
what is learned along."""

import itertools

import pytest
import torch
from torch import nn

from gdlib.config import Config, ConfigError, load
from gdlib.distill import Distiller, Targets, Term, View, build_term
from gdlib.distill.bank import MemoryBank
from gdlib.kernels.levels import label_at
from gdlib.models import build
from gdlib.registry import NETWORKS
from gdlib.types import Batch, Embedding

OFFSETS = {2: [(-1, 0), (0, -1), (-3, 0)], 3: [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, 0, -3)]}


@pytest.mark.parametrize(
    ("shape", "maps", "stride"),
    [
        ((6, 8), (6, 8), (1, 1)),
        ((6, 8), (3, 2), (2, 4)),
        ((25, 56, 56), (29, 20, 20), (1, 3, 3)),  # MALA's conv14 on the paper's patch
        ((25, 56, 56), (37, 4, 4), (1, 27, 27)),  # and its conv8
    ],
)
def test_label_of_a_voxel_is_that_at_its_centre(shape, maps, stride):
    label = torch.arange(torch.Size(shape).numel()).reshape(1, *shape)
    got, inner = label_at(label, maps, stride)
    expected, seen = [], [set() for _ in shape]
    for voxel in itertools.product(*map(range, maps)):
        # A voxel covers `stride` pixels; the map, centred on the label, begins before it by half of
        # what it is larger.
        place = []
        for v, n, m, s in zip(voxel, shape, maps, stride, strict=True):
            covered = [(n - s * m) // 2 + s * v + k for k in range(s)]
            place.append(covered[(s - 1) // 2])
        if all(0 <= p < n for p, n in zip(place, shape, strict=True)):
            expected.append(int(label[(0, *place)]))
            for axis, v in zip(seen, voxel, strict=True):
                axis.add(v)
    assert got.flatten().tolist() == expected
    assert [sorted(axis) for axis in seen] == [list(range(s.start, s.stop)) for s in inner]


@pytest.mark.parametrize("name", NETWORKS.names())
def test_networks_tell_channels_and_strides_of_their_maps(name):
    network = build(name, {}).eval()
    patch = [2 * d + r for d, r in zip(network.divisor, network.remainder, strict=True)]
    image = torch.randn(1, 1, *[p + 2 * m for p, m in zip(patch, network.margin, strict=True)])
    with torch.no_grad():
        output = network(image)
    assert list(network.levels) == list(output.features)
    for level, (channels, stride) in network.levels.items():
        assert level == f"stride{stride[-1]}"
        feature = output.features[level]
        assert feature.shape[1] == channels
        covered = [n * s for n, s in zip(feature.shape[2:], stride, strict=True)]
        # A map covers the patch, and no more than the network looks at.
        assert all(
            p <= c <= p + 2 * max(m, 0)
            for p, c, m in zip(patch, covered, network.margin, strict=True)
        )
        # Moving the image by one stride moves the map by one voxel.
    if not network.levels:  # of several networks
        return
    level, (_, stride) = next(iter(network.levels.items()))
    rolled = image.roll(stride, tuple(range(2, image.ndim)))
    with torch.no_grad():
        moved = network(rolled).features[level]
    inside = (slice(None), slice(None), *(slice(n // 2, n // 2 + 1) for n in moved.shape[2:]))
    before = (slice(None), slice(None), *(slice(n // 2 - 1, n // 2) for n in moved.shape[2:]))
    if name == "mala":  # no padding: exact wherever nothing came around
        torch.testing.assert_close(
            moved[inside], output.features[level][before], rtol=1e-4, atol=1e-5
        )


def _distiller(levels, memory=True):
    torch.manual_seed(0)
    student, teacher = (
        build("resunet", {"widths": [2, 3, 4, 5, 6]}),
        build("resunet", {"widths": [3, 4, 5, 6, 7]}),
    )
    terms = [
        ("agd", 1.0, build_term("agd", False, {})),
        ("nodes", 1.0, build_term("igd", False, {"part": "nodes"})),
        ("agd_inter", 1.0, build_term("agd", memory, {})),
    ]
    return Distiller(
        student, teacher, terms, OFFSETS[2], MemoryBank(capacity=4, sample_size=2), {}, levels
    )


def _batch(step):
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(2, 1, 32, 32, generator=generator)
    label = (
        torch.randint(0, 4, (2, 4, 4), generator=generator)
        .repeat_interleave(8, 1)
        .repeat_interleave(8, 2)
    )
    return Batch(image, label, torch.tensor([2 * step, 2 * step + 1]))


def test_a_level_is_the_same_terms_on_projected_maps():
    distiller = _distiller(["stride2", "stride2", "stride2"], memory=False).eval()
    batch = _batch(0)
    _, losses = distiller(batch, 0)
    with torch.no_grad():
        maps = [
            network(batch.image).features["stride2"]
            for network in (distiller.student, distiller.teacher)
        ]
        weight = distiller.projections["stride2"].weight
        maps[0] = torch.einsum("bchw,dc->bdhw", maps[0], weight)
        # stride 2: of the two middle pixels the first
        targets = Targets(batch.label[:, ::2, ::2], OFFSETS[2][:2])
        student, teacher = (View(Embedding(one, None, {}), targets) for one in maps)
        for name, term in zip(distiller.names, distiller.terms, strict=True):
            torch.testing.assert_close(losses[name], term(student, teacher, targets, {}))


def test_projections_are_learned_and_only_where_channels_differ():
    distiller = _distiller(["stride2", None, "stride1"])
    assert set(distiller.projections) == {"stride2", "stride1"}
    for step in range(2):  # at the first the bank is empty
        total, _ = distiller(_batch(step), step)
    total.backward()
    assert all(p.weight.grad.abs().sum() > 0 for p in distiller.projections.values())
    assert all(p.grad is None for p in distiller.teacher.parameters())
    equal = build("resunet", {})
    same = Distiller(
        equal,
        build("resunet", {}),
        [("agd", 1.0, build_term("agd", False, {}))],
        OFFSETS[2],
        levels=["stride8"],
    )
    assert not same.projections


def test_a_term_gets_the_map_projected_or_as_it_is():
    student, teacher = (
        build("resunet", {"widths": [2, 3, 4, 5, 6]}),
        build("resunet", {"widths": [3, 4, 5, 6, 7]}),
    )
    names, levels = ["at", "fitnet", "at"], ["stride2", "stride2", "stride4"]
    terms = [
        (f"{name}_{level}", 1.0, build_term(name, False, {}))
        for name, level in zip(names, levels, strict=True)
    ]
    distiller = Distiller(student, teacher, terms, OFFSETS[2], levels=levels).eval()
    assert set(distiller.projections) == {"stride2"}
    batch = _batch(0)
    with torch.no_grad():
        _, losses = distiller(batch, 0)
        student, teacher = (network(batch.image).features for network in (student, teacher))
        targets = Targets(batch.label[:, ::2, ::2], OFFSETS[2][:2])
        projected = torch.einsum(
            "bchw,dc->bdhw", student["stride2"], distiller.projections["stride2"].weight
        )
        for (name, _, term), level in zip(terms, levels, strict=True):
            seen = projected if name.startswith("fitnet") else student[level]
            views = [View(Embedding(one, None, {}), targets) for one in (seen, teacher[level])]
            torch.testing.assert_close(losses[name], term(*views, targets, {}))


class Attached(Term):
    """A term that learns how long the student's vectors are to be, of a map it chooses itself."""

    def attach(self, student, teacher):
        self.seen = (student, teacher)
        self.scale = nn.Linear(student.levels["stride4"][0], 1)

    def forward(self, student, teacher, targets, memory):
        rows = student.feature("stride4", (4, 4)).movedim(1, -1)
        assert rows.shape[1:3] == (8, 8)
        return self.scale(rows).square().mean()


def test_a_term_makes_what_it_learns_once_it_knows_the_networks():
    student, teacher = build("resunet", {}), build("resunet", {})
    distiller = Distiller(student, teacher, [("attached", 1.0, Attached())], OFFSETS[2])
    assert distiller.terms[0].seen == (student, teacher)
    distiller(_batch(0), 0)[0].backward()
    assert all(p.grad is not None for p in distiller.terms.parameters())
    alone = Attached()
    alone.needs_teacher = False
    Distiller(student, None, [("attached", 1.0, alone)], OFFSETS[2])
    assert alone.seen == (student, None)


def test_memory_keeps_the_levels_apart():
    both = _distiller([None, None, None])
    both.terms.append(build_term("agd", True, {}))
    both.names.append("level")
    both.weights.append(1.0)
    both.levels.append("stride1")
    both.projections["stride1"] = nn.Linear(3, 4, bias=False)
    alone = _distiller([None, None, None])
    for step in range(3):
        expected, got = alone(_batch(step), step)[1], both(_batch(step), step)[1]
        torch.testing.assert_close(got["agd_inter"], expected["agd_inter"])
    assert set(both.bank.records) == {"agd_inter/gram", "level/gram"}


@pytest.mark.parametrize(
    "width", [16, 5], ids=["as long as the embedding", "shorter than the embedding"]
)
def test_losses_do_not_depend_on_the_order_of_the_terms(width):
    """Of every two terms each comes first, and each is once the first and once the last of all."""
    config = load(".")
    terms = [
        (term.level, term.name, term.term, term.memory, term.options)
        for term in config.methods["grd_levels"].terms
    ]
    banked = [(name, *rest) for _, name, *rest in terms if rest[1]]
    terms += [
        (level, f"{name}_{level}", *rest)
        for name, *rest in banked
        for level in ("stride2", "stride1")
    ]
    terms += [(None, "detached", "original", True, {"part": "edges", "detach_norm": True})]

    def losses(order):
        torch.manual_seed(0)
        student, teacher = (
            build("resunet", {"widths": w}) for w in ([2, 3, 4, 5, 6], [3, width, 5, width, 7])
        )
        built = [
            (name, 1.0, build_term(term, memory, options))
            for _, name, term, memory, options in order
        ]
        levels = [level for level, *_ in order]
        distiller = Distiller(
            student, teacher, built, OFFSETS[2], MemoryBank(capacity=4, sample_size=2), {}, levels
        )
        with torch.no_grad():
            for projection in distiller.projections.values():  # drawn in the order of the terms
                projection.weight.copy_(
                    torch.linspace(-1, 1, projection.weight.numel()).view_as(projection.weight)
                )
            for step in range(2):  # at the first the bank is empty
                _, out = distiller(_batch(step), step)
        return {name: float(loss) for name, loss in out.items()}

    expected = losses(terms)
    assert len(expected) == len(terms)
    for order in (terms, terms[::-1]):
        for first in range(len(order)):
            assert losses(order[first:] + order[:first]) == pytest.approx(
                expected, rel=1e-5, abs=1e-6
            )


def test_wrong_levels_are_told():
    with pytest.raises(
        ValueError,
        match='no level "stride9" in a ResUNet: it has stride8, stride4, stride2, stride1',
    ):
        _distiller(["stride9", None, None])
    supervised = [("supervised", 1.0, build_term("supervised", False, {}))]
    with pytest.raises(ValueError, match='"supervised" learns from the label, not from a teacher'):
        Distiller(build("resunet", {}), None, supervised, OFFSETS[2], levels=["stride8"])
    whole = [("response", 1.0, build_term("response", False, {}))]
    with pytest.raises(ValueError, match='"response" compares the outputs as a whole'):
        Distiller(build("resunet", {}), build("resunet", {}), whole, OFFSETS[2], levels=["stride8"])
    student, flat = build("resunet3d", {}), build("resunet3d", {})
    flat.pools, flat.divisor = ((1, 2, 2),) * 4, (1, 16, 16)  # nothing is pooled in z
    with pytest.raises(
        ValueError, match='level "stride8" of student and teacher differ in resolution'
    ):
        Distiller(
            student,
            flat,
            [("at", 1.0, build_term("at", False, {}))],
            OFFSETS[3],
            levels=["stride8"],
        )


def test_a_level_in_the_configuration(raw):
    raw["methods"]["levels"] = [
        {"term": "agd", "weight": 1.0, "level": "stride2"},
        {"term": "agd", "weight": 1.0, "level": "stride1"},
    ]
    names = [term.name for term in Config.parse(raw).methods["levels"].terms]
    assert names == ["agd_stride2", "agd_stride1"]
    raw["methods"]["levels"][1]["levl"] = "stride1"
    with pytest.raises(ConfigError, match='did you mean "level"'):
        Config.parse(raw)


def test_of_several_names_the_first_that_both_networks_have():
    student, teacher = (
        build("resunet", {"widths": widths}) for widths in ([2, 2, 4, 4, 4], [2, 4, 4, 6, 8])
    )
    term = ("fitnet", 1.0, build_term("fitnet", False, {}))
    for names, chosen in (
        (["stride9", "stride8"], "stride8"),
        (["stride2", "stride8"], "stride2"),
        ("stride4", "stride4"),
    ):
        assert Distiller(student, teacher, [term], [(-1, 0), (0, -1)], levels=[names]).levels == [
            chosen
        ]
    with pytest.raises(ValueError, match='no level "stride9"'):
        Distiller(student, teacher, [term], [(-1, 0), (0, -1)], levels=[["stride9", "stride27"]])
