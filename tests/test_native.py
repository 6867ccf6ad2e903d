"""Compiled code against the plain functions of `gdlib.kernels`, and how it is compiled and kept."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdlib import jit, kernels
from gdlib.kernels import fused, loops

ROOT = Path(__file__).resolve().parents[1]
OFFSETS = {
    2: [(-1, 0), (0, -1), (-3, 0), (0, 3), (2, -1), (0, 0), (-5, 7), (0, -27), (40, 1)],
    3: [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (2, 0, 0), (-1, 2, -3), (0, 0, 27), (-9, 0, 0)],
}
SHAPES = {2: (2, 21, 37), 3: (2, 3, 7, 33)}  # lines of whole and of broken blocks of 16 pixels
compiled = pytest.mark.skipif(not jit.ENABLED, reason="NUMBA_DISABLE_JIT is set")


@pytest.fixture
def plain(monkeypatch):
    """Return a function that calls another one without compiled code."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(jit, "ENABLED", False)
            return function()

    return call


def scene(ndim, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *SHAPES[ndim], dim, dtype=dtype, generator=generator)
    student[0].view(-1, dim)[5] = 0  # a vector without direction
    label = torch.randint(0, 4, SHAPES[ndim], generator=generator)
    for axis in range(1, ndim + 1):
        label = label.repeat_interleave(3, axis).narrow(axis, 0, SHAPES[ndim][axis])
    return student.requires_grad_(), teacher, label.contiguous()


def relations(student, teacher, label, what):
    options = {
        "offsets": OFFSETS[label.ndim - 1],
        "instances": kernels.Instances(label),
        "moments": True,
        "other": teacher,
    }
    found = kernels.relate(student, **{name: options[name] for name in what})
    parts = [part for part in found if part is not None]
    generator = torch.Generator().manual_seed(1)
    # Where a vector has no direction, its gradient is 10^12 times the others'.
    total = sum(
        (part * torch.randn(part.shape, dtype=part.dtype, generator=generator)).sum()
        for part in parts
    )
    (gradient,) = torch.autograd.grad(total, student)
    return parts, gradient


WHAT = [
    ("offsets",),
    ("moments",),
    ("moments", "other"),
    ("offsets", "instances"),
    ("offsets", "instances", "moments", "other"),
]


@compiled
@pytest.mark.parametrize("what", WHAT, ids="+".join)
@pytest.mark.parametrize("dim", [3, 16])
@pytest.mark.parametrize("ndim", [2, 3])
def test_relations_are_those_of_the_plain_functions(ndim, dim, what, plain):
    inputs = scene(ndim, dim)
    mine, theirs = relations(*inputs, what), plain(lambda: relations(*inputs, what))
    for a, b in zip(mine[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-11, atol=1e-11)
    single = relations(*(x.float() if x.is_floating_point() else x for x in inputs), what)
    # sums of some hundred numbers around 1, and means of them
    for a, b in zip(single[0], theirs[0], strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-5, atol=100 * torch.finfo(torch.float32).eps
        )


@compiled
@pytest.mark.parametrize("dim", [2, 16])
@pytest.mark.parametrize("ndim", [2, 3])
def test_gradient_of_relations(ndim, dim):
    """Against numerical differences, which know neither implementation."""
    shape = {2: (2, 4, 5), 3: (1, 2, 3, 5)}[ndim]
    student, teacher = torch.randn(2, *shape, dim, dtype=torch.float64)
    label = torch.randint(0, 3, shape)
    offsets = [o for o in itertools.product((-2, 0, 1), repeat=ndim)][::2]

    def all_of_them(rows):
        return kernels.relate(rows, offsets, kernels.Instances(label), True, teacher)[:3]

    assert torch.autograd.gradcheck(all_of_them, student.requires_grad_(), fast_mode=dim == 16)


def losses(affinity, teacher, pairs, kinds):
    """Values, and the gradient of a sum in which each weighs something else."""
    found = kernels.pair_losses(affinity, teacher, pairs, kinds)
    total = sum(factor * found[kind] for factor, kind in zip((3, 0.5, -2), kinds, strict=False))
    gradient = torch.autograd.grad(total, affinity)[0]
    return {kind: value.detach() for kind, value in found.items()}, gradient


KINDS = [kinds for n in (1, 2, 3) for kinds in itertools.combinations(kernels.PAIR_LOSSES, n)]


@compiled
@pytest.mark.parametrize("ids", [1, 2**61 + 1])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(
    ("connected", "per_offset"), list(itertools.product([False, True], repeat=2))
)
@pytest.mark.parametrize("ndim", [2, 3])
def test_pair_losses_are_those_of_the_plain_functions(
    ndim, connected, per_offset, ignored, ids, plain
):
    student, teacher, label = scene(ndim, 4)
    label = label * ids
    affinity, teacher = (
        kernels.affinities(kernels.unit(x.detach()), OFFSETS[ndim]) for x in (student, teacher)
    )
    affinity.requires_grad_()
    options = {"background_connected": connected, "per_offset": per_offset}
    options["ignore"] = scene(ndim, 1, seed=9)[2] == 2 if ignored else None
    for kinds in KINDS:

        def both(kinds=kinds):
            pairs = (
                None if kinds == ("teacher",) else kernels.Pairs(label, OFFSETS[ndim], **options)
            )
            return losses(affinity, None if kinds == ("labels",) else teacher, pairs, kinds)

        (mine, gradient), (theirs, expected) = both(), plain(both)
        assert tuple(mine) == tuple(theirs) == kinds
        for kind in kinds:
            assert float(mine[kind]) == pytest.approx(float(theirs[kind]), rel=1e-12)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-16)
    assert len({round(float(value), 9) for value in mine.values()}) == 3


@compiled
def test_an_equal_map_differs_by_nothing():
    for dim in (3, 16):
        rows = torch.randn(2, 9, 37, dim) * 10 ** torch.randn(2, 9, 37, 1)
        assert kernels.relate(rows, moments=True, other=rows.clone()).gram.abs().max() == 0


@compiled
def test_the_number_of_threads_changes_no_bit():
    student, teacher, label = scene(2, 16, torch.float32)
    pairs = kernels.Pairs(label, OFFSETS[2])
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            parts, gradient = relations(student, teacher, label, WHAT[-1])
            affinity = parts[0].detach().requires_grad_()
            found, other = losses(affinity, affinity.detach().square(), pairs, kernels.PAIR_LOSSES)
            results.append([*parts, gradient, *found.values(), other])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_maps_that_are_not_contiguous():
    student, teacher, label = scene(2, 16)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (student, teacher)]
    assert not turned[0].is_contiguous()
    expected = relations(student, teacher, label, WHAT[-1])
    found = relations(turned[0].requires_grad_(), turned[1], label, WHAT[-1])
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


MISFITS = {
    "other rows": lambda rows, label: fused.relate(rows, (), True, rows[:, 1:]),
    "other rows of another type": lambda rows, label: fused.relate(rows, (), True, rows.double()),
    "offsets of another dimension": lambda rows, label: fused.relate(
        rows, [(0, 0, -1)], False, None
    ),
    "a smaller teacher": lambda rows, label: fused.pair_losses(rows, rows[:1]),
    "too few offsets": lambda rows, label: fused.pair_losses(rows, None, [(0, -1)]),
    "a label of 64 bits": lambda rows, label: fused.pair_losses(
        rows, None, weights=torch.zeros(2, 4, 2), label=torch.zeros(2, 5, 16, dtype=torch.int64)
    ),
    "a label without weights": lambda rows, label: fused.pair_losses(
        rows, None, label=torch.zeros(2, 5, 16).int()
    ),
    "too few weights": lambda rows, label: fused.pair_losses(
        rows, None, weights=torch.zeros(2, 3, 2)
    ),
    "ignored in too few": lambda rows, label: fused.count_pairs(label, [(0, -1)], label[:1] > 0),
    "a label of 64 bits to count": lambda rows, label: fused.count_pairs(label.long(), [(0, -1)]),
}


@pytest.mark.parametrize("call", MISFITS.values(), ids=MISFITS)
def test_compiled_code_gets_nothing_that_does_not_fit(call):
    """It would read what is beside it in memory."""
    rows, label = torch.rand(2, 4, 5, 16), torch.ones(2, 4, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must|but|do not fit") as error:
        call(rows, label)
    assert "\n" not in str(error.value)


def test_images_without_lines_or_pixels():
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        assert kernels.relate(torch.rand(*shape, 3), [(0, -1)]).affinity.shape == (
            shape[0],
            1,
            *shape[1:],
        )


# --- How it is compiled and kept --------------------------------------------------------------------------------------

CODE = """
import sys
import numpy as np
import torch
from gdlib import kernels as ops
from gdlib.segment import mutex
rows = torch.arange(96.0).reshape(1, 2, 3, 16).sin()
print(float(ops.relate(rows, [(0, -1)]).affinity.sum()))
rng = np.random.default_rng(0)
offsets = [(-1, 0), (0, -1), (-3, 0), (0, -4)]
affinity = rng.integers(0, 255, (4, 20, 20), np.uint8)
label = mutex.mutex_watershed(affinity, rng.random((20, 20)) < 0.9, offsets)
print(*np.unique(label.ravel(), return_inverse=True)[1][label.ravel() > 0])
"""


def run(**environment):
    environment = (
        os.environ
        | {"PYTHONPATH": str(ROOT)}
        | {name: str(value) for name, value in environment.items()}
    )
    command = [sys.executable, "-c", CODE]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def told(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    value, label = out.splitlines()
    return float(value), label, err


@pytest.fixture(scope="module")
def expected():
    """What is said without compiled code; nothing is said of that."""
    value, label, err = told(run(NUMBA_DISABLE_JIT=1))
    rows = torch.arange(96.0).reshape(1, 2, 3, 16).sin()
    assert value == pytest.approx(
        float(kernels.affinities(kernels.unit(rows), [(0, -1)]).sum()), rel=1e-6
    )
    assert err == ""
    return value, label


def same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1] == expected[1]


@compiled
@pytest.mark.long
def test_it_is_compiled_once_and_two_processes_at_once_do_not_disturb_each_other(
    tmp_path, expected
):
    for process in [run(NUMBA_CACHE_DIR=tmp_path) for _ in range(2)]:
        *found, err = told(process)
        same(found, expected)
        assert err == "gdlib: compiling for this processor, once (about 10 s)\n"
    files = sorted(tmp_path.iterdir())
    assert {file.name.rpartition("-")[0] for file in files} == {"dot", "turn_to_unit", "_watershed"}
    assert len(files) == 3  # and no half one
    *found, err = told(run(NUMBA_CACHE_DIR=tmp_path))
    same(found, expected)
    assert err == ""
    files[0].write_bytes(files[0].read_bytes()[:1000])
    files[1].write_bytes(b"")
    for said in (1, 0):  # damaged ones are made again
        *found, err = told(run(NUMBA_CACHE_DIR=tmp_path))
        same(found, expected)
        assert err.count("\n") == said


@compiled
@pytest.mark.long
def test_where_it_cannot_be_kept_every_process_compiles(tmp_path, expected):
    (tmp_path / "file").touch()
    *found, err = told(run(NUMBA_CACHE_DIR=tmp_path / "file"))
    same(found, expected)
    assert err.count("\n") == 1


@compiled
def test_another_kind_of_processor_has_its_own(tmp_path, monkeypatch):
    """What was compiled for one may end the process on another."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))

    class Codegen:
        def __init__(self, *about):
            self.magic_tuple = lambda: about

    cache = jit._Cache(loops.dot.py_func)
    kinds = [
        ("x86_64", "znver4", "+avx512f"),
        ("x86_64", "znver3", "+avx512f"),
        ("x86_64", "znver4", ""),
    ]
    assert len({cache._path("(float32)", Codegen(*kind)) for kind in kinds}) == 3
    assert cache._path("(float32)", Codegen(*kinds[0])) != cache._path(
        "(float64)", Codegen(*kinds[0])
    )
    assert cache._path("(float32)", Codegen(*kinds[0])) == cache._path(
        "(float32)", Codegen(*kinds[0])
    )
