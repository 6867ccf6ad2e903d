"""The memory bank against a plain list, and the distiller that feeds it."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from gdlib import kernels
from gdlib.distill import Distiller, Targets, Term, View, build_term, forward_cropped
from gdlib.distill.bank import MemoryBank
from gdlib.types import Batch, Embedding

OFFSETS = [(-1, 0), (0, -1), (-3, 0), (0, -3)]


def record(ids, moment=0):
    """What a teacher could have said: the id itself, so that id and record can be compared, and
    when it was said."""
    ids = torch.as_tensor(ids)
    return {"id": ids[:, None].float(), "when": torch.full((len(ids), 2, 2), float(moment))}


def drawn(memory):
    """Ids and moments of the valid entries of a sample."""
    valid = memory["valid"]
    return list(
        zip(
            memory["id"][valid, 0].int().tolist(),
            memory["when"][valid, 0, 0].int().tolist(),
            strict=True,
        )
    )


# --- The ring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "capacity"),
    [(1, 1), (2, 1), (11, 2), (3, 2), (1, 7), (5, 7), (2, 8), (3, 9), (11, 9)],
)
def test_ring_keeps_the_newest_and_never_returns_a_current_image(capacity, batch):
    rng = np.random.default_rng(0)
    for sample_size in (1, 4, 12):
        bank = MemoryBank(capacity=capacity, sample_size=sample_size)
        newest = []  # (id, step), the oldest first
        for step in range(25):
            # Ten images, so that some of the current ones are in the bank: from steps before,
            # seldom twice.
            current = rng.choice(12, batch, replace=False)
            memory = bank.sample(torch.from_numpy(current), step)
            qualifying = [entry for entry in newest if entry[0] not in current]
            if step == 0:
                assert memory == {}
            else:
                assert (
                    len(memory["valid"])
                    == len(memory["id"])
                    == len(memory["when"])
                    == min(sample_size, capacity)
                )
                found = drawn(memory)
                assert len(found) == len(set(found)) == min(sample_size, len(qualifying))
                assert set(found) <= set(qualifying)
            bank.enqueue(torch.from_numpy(current), record(current, step))
            newest = [*newest, *((int(i), step) for i in current)][-capacity:]
            filled = bank.ids >= 0
            kept = zip(
                bank.ids[filled].tolist(),
                bank.records["when"][filled, 0, 0].int().tolist(),
                strict=True,
            )
            assert sorted(kept) == sorted(newest)
            assert torch.equal(bank.records["id"][filled, 0].long(), bank.ids[filled])


def test_oldest_entry_is_replaced_first_and_no_other_moves():
    bank = MemoryBank(capacity=3, sample_size=3)
    seen = []
    for i in range(5):
        bank.enqueue(torch.tensor([i]), record([i]))
        seen.append(bank.ids.tolist())
    assert seen == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [3, 1, 2], [3, 4, 2]]
    # more than fit: the last three, in their places
    bank.enqueue(torch.arange(10, 15), record(range(10, 15)))
    assert bank.ids.tolist() == [14, 12, 13]


def test_an_image_that_is_sampled_again_excludes_all_its_entries():
    bank = MemoryBank(capacity=4, sample_size=4)
    for i in (1, 2, 1, 3):
        bank.enqueue(torch.tensor([i]), record([i]))
    assert sorted(drawn(bank.sample(torch.tensor([1]), 0))) == [(2, 0), (3, 0)]
    assert drawn(bank.sample(torch.tensor([3, 1, 2]), 0)) == []


def test_sampling_is_uniform_without_replacement():
    """Every entry, every pair and every place in the order equally often, as chi-squared tells
    (limits: one in 10^4)."""
    capacity, sample_size, steps = 9, 4, 4000
    bank = MemoryBank(capacity=capacity, sample_size=sample_size, seed=3)
    bank.enqueue(torch.arange(capacity), record(range(capacity)))
    place = np.zeros((sample_size, capacity))
    pair = np.zeros((capacity, capacity))
    for step in range(steps):
        # 8 is current: eight qualify
        found = [i for i, _ in drawn(bank.sample(torch.tensor([8]), step))]
        place[range(sample_size), found] += 1
        for a, b in itertools.permutations(found, 2):
            pair[a, b] += 1
    assert place[:, 8].sum() == pair[8].sum() == 0
    expected = steps / 8
    for row in place[:, :8]:
        assert ((row - expected) ** 2 / expected).sum() < 29.9  # 7 degrees of freedom
    upper = pair[:8, :8][np.triu_indices(8, 1)]
    expected = steps * math.comb(4, 2) / math.comb(8, 2)
    assert ((upper - expected) ** 2 / expected).sum() < 63.2  # at most 27 degrees of freedom


def test_sample_depends_on_seed_and_step_only():
    def sequence(seed, steps=range(20)):
        bank = MemoryBank(capacity=9, sample_size=4, seed=seed)
        bank.enqueue(torch.arange(9), record(range(9)))
        return {step: drawn(bank.sample(torch.tensor([9]), step)) for step in steps}

    torch.manual_seed(1)
    first = sequence(0)
    torch.manual_seed(2)
    assert sequence(0, reversed(range(20))) == first
    assert len({str(s) for s in first.values()}) > 10
    other = sequence(1)
    assert sum(first[s] == other[s] for s in first) < 3


@pytest.mark.parametrize(
    ("written", "original_ring"), [(0, False), (3, True), (7, False), (10, False), (10, True)]
)
def test_state_goes_on_in_a_new_bank(written, original_ring):
    options = {"capacity": 7, "sample_size": 4, "seed": 5, "original_ring": original_ring}
    bank = MemoryBank(**options)
    for i in range(written):
        bank.enqueue(torch.tensor([i]), record([i], i))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file, weights_only=True), bank.state_dict()):
        new = MemoryBank(**options)
        new.load_state_dict(state)
        old = MemoryBank(**options)
        old.load_state_dict(bank.state_dict())
        for step in range(written, written + 12):
            current = torch.tensor([step, step % 5])
            a, b = old.sample(current, step), new.sample(current, step)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
            old.enqueue(current, record(current, step))
            new.enqueue(current, record(current, step))


def test_two_banks_share_nothing():
    """What is loaded is a copy, as it is for every parameter: the old bank may go on."""
    old, new = (MemoryBank(capacity=2, sample_size=2) for _ in range(2))
    old.enqueue(torch.tensor([1, 2]), record([1, 2]))
    new.load_state_dict(old.state_dict())
    old.enqueue(torch.tensor([3]), record([3]))
    assert sorted(drawn(new.sample(torch.tensor([9]), 0))) == [(1, 0), (2, 0)]


def test_entries_are_copies_of_the_records():
    bank = MemoryBank(capacity=2, sample_size=2)
    given = record([1, 2])
    bank.enqueue(torch.tensor([1, 2]), given)
    given["id"].zero_()
    assert sorted(drawn(bank.sample(torch.tensor([9]), 0))) == [(1, 0), (2, 0)]


# --- The ring of the original code ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "capacity", "sample_size"), [(1, 3, 2), (2, 32, 12), (3, 3, 2), (5, 32, 12)]
)
def test_original_ring_writes_like_the_original(capacity, sample_size, batch):
    """A pointer runs to the capacity.

    There the sample goes to the last slot again, and the pointer back to 0.
    """
    bank = MemoryBank(capacity=capacity, sample_size=sample_size, original_ring=True)
    slots, pointer, others = [-1] * capacity, 0, 0
    for step in range(150):
        current = range(step * batch, (step + 1) * batch)
        for i in current:
            if pointer < capacity:
                slots[pointer] = i
                pointer += 1
            else:
                slots[-1] = i
                pointer = 0
        bank.enqueue(torch.tensor(current), record(current))
        assert bank.ids.tolist() == slots
        assert bank.records["id"][bank.ids >= 0, 0].int().tolist() == [i for i in slots if i >= 0]
        found = [i for i, _ in drawn(bank.sample(torch.tensor(current), step))]
        # also when all slots are filled
        assert len(found) == len(set(found)) == min(sample_size, pointer)
        assert set(found) <= set(slots)
        if pointer < sample_size:
            others += len(set(found) - set(slots[:pointer]))
    assert others > 0 or capacity == 3  # few entries after a wrap, but of all slots


def test_original_ring_samples_like_the_original():
    """Measured on the original, 3000 steps of two: 9.63 entries on average.

    One step in 33 without any; half of the steps meet an image of their own batch, 0.61 of them on
    average.
    """
    bank = MemoryBank(capacity=32, sample_size=12, original_ring=True)
    count, own = [], []
    for step in range(3000):
        current = torch.tensor([2 * step, 2 * step + 1])
        bank.enqueue(current, record(current - 2 * step, step))
        found = drawn(bank.sample(current, step))
        count.append(len(found))
        own.append(sum(when == step for _, when in found))
    assert np.mean(count) == pytest.approx(9.63, abs=0.02)
    assert np.mean(np.array(count) == 0) == pytest.approx(1 / 33, abs=0.002)
    assert np.mean(np.array(own) > 0) == pytest.approx(0.50, abs=0.04)
    assert np.mean(own) == pytest.approx(0.61, abs=0.05)


# --- The distiller --------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Smallest network with everything that matters here: weights, batch statistics, both heads.

    With a margin or without.
    """

    def __init__(self, seed, dim=4, margin=(0, 0)):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.margin = margin
        self.levels = {"only": (dim, (1,) * len(margin))}
        kernel = [2 * m + 1 if m else 3 for m in margin]
        padding = [0 if m else 1 for m in margin]
        convolution, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[
            len(margin)
        ]
        self.conv = convolution(1, dim + 1, kernel, padding=padding)
        self.norm = norm(dim + 1)
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        x = self.norm(self.conv(x))
        return Embedding(x[:, :-1], x[:, -1:], {"only": x[:, :-1]})


def make_batch(seed, ids, shape=(10, 11)):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(4, (len(ids), *(-(-n // 3) for n in shape)), generator=generator)
    label = coarse.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, : shape[0], : shape[1]]
    image = label[:, None] / 3 + 0.3 * torch.rand(len(ids), 1, *shape, generator=generator)
    return Batch(image, label, torch.tensor(ids))


TERMS = [
    ("supervised", 1.0, ("supervised", False, {})),
    ("foreground", 0.5, ("foreground", False, {})),
    ("agd", 10.0, ("agd", False, {})),
    ("nodes", 0.1, ("igd", False, {"part": "nodes"})),
    ("edges", 0.3, ("igd", False, {"part": "edges"})),
    ("agd_inter", 2.0, ("agd", True, {})),
    ("edges_inter", 0.7, ("igd", True, {"part": "edges"})),
]


def make_distiller(names=None, teacher=True, bank=None, seed=0, **options):
    terms = [
        (name, weight, build_term(*what))
        for name, weight, what in TERMS
        if names is None or name in names
    ]
    bank = bank or MemoryBank(capacity=3, sample_size=2)
    torch.manual_seed(seed)
    return Distiller(
        Tiny(seed + 1), Tiny(seed + 2) if teacher else None, terms, OFFSETS, bank, **options
    )


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_teacher_never_changes_and_the_student_learns():
    distiller = make_distiller()
    assert not distiller.teacher.norm.training  # nor before anybody says so
    distiller.train()
    assert distiller.student.training
    assert distiller.student.norm.training
    assert not distiller.teacher.training
    assert not distiller.teacher.norm.training
    teacher, student = snapshot(distiller.teacher), snapshot(distiller.student)
    assert all(
        id(p) in map(id, distiller.student.parameters())
        for p in distiller.parameters()
        if p.requires_grad
    )
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        total, _ = distiller(make_batch(step, [2 * step, 2 * step + 1]), step)
        total.backward()
        assert all(p.grad is None for p in distiller.teacher.parameters())
        assert all(p.grad.abs().max() > 0 for p in distiller.student.norm.parameters())
        assert not any(r.requires_grad for r in distiller.bank.records.values())
        optimizer.step()
    assert same(snapshot(distiller.teacher), teacher)
    assert not torch.equal(distiller.student.norm.running_mean, student["norm.running_mean"])
    assert not torch.equal(distiller.student.conv.weight, student["conv.weight"])
    distiller.eval()
    assert not distiller.student.training


@pytest.mark.parametrize("name", ["agd", "nodes", "edges", "agd_inter", "edges_inter"])
def test_each_term_alone_reaches_the_student_and_nothing_else(name):
    distiller = make_distiller([name])
    for step in range(2):
        total, losses = distiller(make_batch(step, [step]), step)
    total.backward()
    assert list(losses) == [name]
    assert float(total.detach()) > 0
    assert distiller.student.conv.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert (distiller.bank is None) == ("inter" not in name)


def test_total_is_the_sum_of_the_weighted_losses():
    distiller = make_distiller()
    for step in range(3):
        total, losses = distiller(make_batch(step, [2 * step, 2 * step + 1]), step)
        assert list(losses) == [name for name, _, _ in TERMS]
        expected = sum(weight * float(losses[name].detach()) for name, weight, _ in TERMS)
        assert float(total.detach()) == pytest.approx(expected, rel=1e-6)
        assert all(
            float(loss.detach()) > 0 for name, loss in losses.items() if step or "inter" not in name
        )


def test_without_distillation_no_teacher_is_needed_or_kept():
    names = ("supervised", "foreground")
    alone, beside = make_distiller(names, teacher=False), make_distiller(names, teacher=True)
    assert beside.teacher is None
    assert beside.bank is None
    losses = [distiller.train()(make_batch(0, [0, 1]), 0)[0] for distiller in (alone, beside)]
    assert float(losses[0].detach()) == float(losses[1].detach()) > 0


def test_the_bank_is_asked_before_it_takes_the_current_images():
    distiller = make_distiller()
    first, second = make_batch(0, [5, 6]), make_batch(1, [7, 8])
    _, losses = distiller(first, 0)
    assert float(losses["agd_inter"].detach()) == float(losses["edges_inter"].detach()) == 0
    assert distiller.bank.ids.tolist() == [5, 6, -1]
    _, losses = distiller(second, 1)

    # The same with the first batch as memory, in full. The student's statistics are those of the
    # batch: it is in training.
    all_targets = [Targets(batch.label, OFFSETS) for batch in (first, second)]
    teacher = [
        View(distiller.teacher(b.image), t)
        for b, t in zip((first, second), all_targets, strict=True)
    ]
    student = View(distiller.student(second.image), all_targets[1])
    for name in ("agd_inter", "edges_inter"):
        term = distiller.terms[distiller.names.index(name)]
        memory = term.record(teacher[0]) | {"valid": torch.tensor([True, True])}
        expected = term(student, teacher[1], all_targets[1], memory)
        assert float(losses[name].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert float(expected.detach()) > 0


def test_batches_of_one_step_do_not_meet_each_other():
    distiller = make_distiller(["agd_inter"], together=2)
    for number, known in ((0, []), (1, []), (2, [0, 1]), (3, [0, 1])):  # two batches a step
        _, losses = distiller(make_batch(number, [number]), number)
        assert (float(losses["agd_inter"].detach()) > 0) == bool(known)
        assert distiller.entries["entries"] == len(known)
    assert distiller.bank.ids.tolist() == [3, 1, 2]


def test_only_images_of_the_batch_in_the_bank_is_like_an_empty_bank():
    distiller = make_distiller(["agd_inter", "edges_inter"])
    distiller(make_batch(0, [5, 6]), 0)
    total, _ = distiller(make_batch(1, [6, 5]), 1)
    assert float(total.detach()) == 0
    total.backward()
    assert distiller.student.conv.weight.grad.abs().max() == 0


def test_original_ring_meets_the_current_images():
    bank = MemoryBank(capacity=3, sample_size=2, original_ring=True)
    _, losses = make_distiller(bank=bank)(make_batch(0, [5, 6]), 0)
    assert float(losses["agd_inter"].detach()) > 0
    assert float(losses["edges_inter"].detach()) > 0


def test_resumed_training_goes_on_with_the_same_losses():
    def advance(distiller, optimizer, steps):
        out = []
        for step in steps:
            optimizer.zero_grad()
            total, losses = distiller(make_batch(step, [2 * step % 7, (2 * step + 1) % 7]), step)
            total.backward()
            optimizer.step()
            out.append([float(value.detach()) for value in losses.values()])
        return out

    distiller = make_distiller().train()
    optimizer = torch.optim.SGD(distiller.student.parameters(), lr=0.01)
    advance(distiller, optimizer, range(4))
    file = io.BytesIO()
    torch.save(distiller.state_dict(), file)
    expected = advance(distiller, optimizer, range(4, 8))

    file.seek(0)
    fresh = make_distiller(seed=50).train()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert (
        advance(fresh, torch.optim.SGD(fresh.student.parameters(), lr=0.01), range(4, 8))
        == expected
    )


def test_losses_are_float32_when_the_networks_are_not():
    distiller = make_distiller()
    for step in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            total, losses = distiller(make_batch(step, [step]), step)
    assert {total.dtype, *(loss.dtype for loss in losses.values())} == {torch.float32}
    assert {r.dtype for r in distiller.bank.records.values()} == {torch.float32}
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.student.parameters())


@pytest.mark.parametrize("empty", [[0], [0, 1]])
def test_images_without_instance_do_not_stop_the_training(empty):
    distiller = make_distiller()
    for step in range(3):
        batch = make_batch(step, [2 * step, 2 * step + 1])
        batch.label[empty] = 0
        total, losses = distiller(batch, step)
        total.backward()
        assert all(math.isfinite(float(loss.detach())) for loss in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in distiller.student.parameters())


# --- Margins, targets, and what is not known ------------------------------------------------------------------------


def make_wide_batch(seed, ids, margin, shape=(10, 11)):
    """Labels of `shape`, in the centre of images with noise around."""
    batch = make_batch(seed, ids, shape)
    sides = [n + 2 * m for n, m in zip(shape, margin, strict=True)]
    image = torch.rand(len(ids), 1, *sides, generator=torch.Generator().manual_seed(seed))
    image[:, :, margin[0] : sides[0] - margin[0], margin[1] : sides[1] - margin[1]] = batch.image
    return Batch(image, batch.label, batch.ids)


WIDE = itertools.product([(0, 0), (2, 1), (0, 1)], [(0, 0), (3, 5), (2, 1), (0, 4)])


@pytest.mark.parametrize(
    ("network", "margin"), [(n, m) for n, m in WIDE if n[0] <= m[0] and n[1] <= m[1]]
)
def test_a_network_sees_what_it_needs_and_no_more(network, margin):
    batch = make_wide_batch(0, [0, 1], margin)
    seen = []

    class Recorder(Tiny):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    output = forward_cropped(Recorder(0, margin=network).eval(), batch)
    assert output.embedding.shape[2:] == output.foreground.shape[2:] == batch.label.shape[1:]
    (image,) = seen
    y, x = (m - n for n, m in zip(network, margin, strict=True))
    assert torch.equal(
        image, batch.image[:, :, y : batch.image.shape[2] - y, x : batch.image.shape[3] - x]
    )


def test_a_network_sees_volumes_too():
    label = torch.zeros(1, 3, 6, 5, dtype=torch.int64)
    image = torch.rand(1, 1, 3 + 4, 6 + 8, 5 + 6)
    for margin in ((0, 0, 0), (2, 4, 3), (1, 2, 0)):
        assert forward_cropped(
            Tiny(0, margin=margin).eval(), Batch(image, label, torch.tensor([0]))
        ).embedding.shape[2:] == (
            3,
            6,
            5,
        )


@pytest.mark.parametrize(
    ("student", "teacher"), [((0, 0), (3, 2)), ((3, 2), (0, 0)), ((1, 2), (3, 2)), ((2, 2), (2, 2))]
)
def test_student_and_teacher_with_different_margins_say_something_about_the_same_pixels(
    student, teacher
):
    """All losses are those of two maps that were made apart, each from its own part of the
    image."""
    margin = [max(pair) for pair in zip(student, teacher, strict=True)]
    terms = [(name, weight, build_term(*what)) for name, weight, what in TERMS]
    networks = Tiny(1, margin=student), Tiny(2, margin=teacher)
    distiller = Distiller(*networks, terms, OFFSETS, MemoryBank(capacity=3, sample_size=2)).eval()
    batches = [make_wide_batch(k, [2 * k, 2 * k + 1], margin) for k in range(2)]
    distiller(batches[0], 0)
    total, losses = distiller(batches[1], 1)

    def crop(image, spare):
        return image[
            :, :, spare[0] : image.shape[2] - spare[0], spare[1] : image.shape[3] - spare[1]
        ]

    views = {}
    for k, batch in enumerate(batches):
        targets = Targets(batch.label, OFFSETS)
        for role, network in zip(("student", "teacher"), networks, strict=True):
            spare = [m - n for m, n in zip(margin, network.margin, strict=True)]
            views[role, k] = View(network(crop(batch.image, spare)), targets)
    for name, term in zip(distiller.names, distiller.terms, strict=True):
        memory = (
            term.record(views["teacher", 0]) | {"valid": torch.tensor([True, True])}
            if term.memory
            else {}
        )
        expected = term(views["student", 1], views["teacher", 1], targets, memory)
        torch.testing.assert_close(losses[name], expected)
        assert float(expected.detach()) > 0
    total.backward()
    assert networks[0].conv.weight.grad.abs().max() > 0


class Witness(Term):
    """A term that keeps the targets it is given."""

    def forward(self, student, teacher, targets, memory):
        self.targets = targets
        return student.rows.sum() * 0


def targets_of(batch, level=None, **targets):
    witness = Witness()
    witness.needs_teacher = level is not None
    Distiller(Tiny(1), Tiny(2), [("witness", 1.0, witness)], OFFSETS, None, targets, [level])(
        batch, 0
    )
    return witness.targets


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("per_offset", [True, False])
@pytest.mark.parametrize("level", [None, "only"])
def test_targets_and_ignore_arrive_in_the_truth(connected, per_offset, level):
    batch = make_batch(0, [0, 1])
    ignore = batch.label == 2
    batch = Batch(batch.image, batch.label, batch.ids, ignore)
    targets = targets_of(batch, level, background_connected=connected, per_offset=per_offset)
    offsets = OFFSETS[: 2 if level else None]
    assert targets.offsets == offsets
    assert torch.equal(targets.label, batch.label * ~ignore)
    assert torch.equal(targets.ignore, ignore)
    assert torch.equal(
        targets.affinity, kernels.affinity_targets(targets.label, offsets, connected)
    )
    valid = kernels.inside(offsets, (10, 11)) & ~kernels.pairs_of(ignore, offsets)
    assert torch.equal(targets.balance, kernels.balance(targets.affinity, valid, per_offset))
    assert targets.balance[kernels.pairs_of(ignore, offsets)].abs().max() == 0


def test_without_options_the_truth_is_that_of_the_paper_in_2d():
    targets = targets_of(make_batch(0, [0, 1]))
    assert targets.ignore is None
    assert targets.background_connected
    assert not targets.per_offset
