"""A step of training leaves its device alone until losses are written down.

Shown on torch's `meta` device, whose tensors have a shape and no values: whatever would wait for a
GPU, because it reads a value or makes a shape of one, raises there.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdlib import io
from gdlib.config import RunSpec, load
from gdlib.config.sections import Method
from gdlib.data.maps import TeacherMaps
from gdlib.data.patches import PatchSampler, largest_id
from gdlib.models import build
from gdlib.train.ask import ask
from gdlib.train.trainer import Trainer

META = torch.device("meta")
METHODS = load(Path(__file__).resolve().parents[1]).methods
# One method with a term of every kind; those of the original code have names of others and a bank of
# their own.
EVERY = {term.name: term for method in METHODS.values() for term in method.terms}
METHODS["every term"] = Method(terms=tuple(EVERY.values()))
# Every augmentation is on, each in every patch.
MORE = {
    "augment": {
        "geometry": {
            "scale": (0.8, 1.2),
            "elastic": 2.0,
            "elastic_spacing": 8,
            "rotate": 10.0,
            "misalign": 2.0,
        },
        "intensity": {
            "contrast": 0.2,
            "brightness": 0.2,
            "gamma": 0.2,
            "blur": 1.0,
            "noise": 0.1,
            "probability": 1.0,
        },
        "sections": {
            "contrast": 0.1,
            "brightness": 0.1,
            "blur": 1.0,
            "motion": 5,
            "missing": 0.5,
            "probability": 1.0,
        },
        "empty": 0.5,
    }
}
NETWORKS = {
    "2D": ("resunet", (2, 2, 4, 4, 4), (32, 32)),
    "3D": ("resunet3d", (2, 2, 4, 4, 4), (4, 32, 32)),
}


class Waited(AssertionError):
    """Something would have waited for the device."""


class Watch(TorchDispatchMode):
    """Refuse operators on tensors of two devices, copies that are waited for, and float64, which
    Apple's GPUs do not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._to_copy.default:
            there = kwargs.get("device") or args[0].device
            if there.type != args[0].device.type and not kwargs.get("non_blocking"):
                raise Waited(f"a copy to {there} waits")
        # a number may be on the CPU
        elif len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1:
            raise Waited(f"{func} is given tensors on different devices")
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta and leaf.dtype == torch.float64:
                raise Waited(f"{func} computes in float64")
        return out


def put_on_meta(monkeypatch):
    """There is no automatic precision on this device."""
    real = torch.autocast
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *a, **k: contextlib.nullcontext() if kind == "meta" else real(kind, *a, **k),
    )


def volumes(folder):
    path = folder / "volumes.h5"
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 6, 40, 44), generator=generator, dtype=torch.uint8).numpy()
    label = torch.randint(5, (6, 40, 44), generator=generator).numpy().astype("uint32")
    ignore = torch.rand(6, 40, 44, generator=generator).numpy() < 0.1
    io.write_samples(
        path,
        [io.Sample("a", image, label, ignore=ignore), io.Sample("b", image, label)],
        split="train",
    )
    return path


@pytest.fixture
def parts(tmp_path, splits, make_spec):
    """Return `make(axes, method, **recipe)` -> (spec, samples, teacher's weights), without the time
    a teacher takes."""

    def make(axes, method, **recipe):
        model, widths, patch = NETWORKS[axes]
        chosen = METHODS[method].model_dump(mode="json")
        plain = make_spec(
            "none", model=model, widths=widths, patch=patch, **recipe, **chosen.get("recipe", {})
        )
        spec = RunSpec.model_validate(
            plain.model_dump() | {"method": method, "terms": chosen["terms"]}
        )
        weights = tmp_path / "teacher.safetensors"
        network = build(model, spec.options)
        header = spec.model_dump(
            mode="json", include={"model", "options", "channels", "offsets", "normalisation"}
        )
        header["normalisation"].pop("noise")  # of which nothing was learned
        io.save_weights(weights, network.state_dict(), header)
        return spec, splits["train"] if axes == "2D" else volumes(tmp_path), weights

    return make


@pytest.mark.parametrize(
    ("axes", "method"),
    [("2D", "every term"), ("3D", "every term"), ("2D", "none"), ("2D", "grd_original")],
)
def test_a_step_does_not_wait(axes, method, parts, monkeypatch):
    spec, samples, weights = parts(axes, method, **MORE, ema=0.9, clip=1.0, accumulate=2)
    put_on_meta(monkeypatch)
    trainer = Trainer(spec, weights if spec.terms else None, META)
    sampler = PatchSampler(samples, **spec.drawing, margin=trainer.margin, device=META)
    with Watch():
        for _ in range(3):  # the bank is empty, filled, full
            trainer.advance(sampler.batch(number) for number in trainer.batches())
    assert trainer.step == 3
    # that is, this test can fail
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        trainer.flush_losses()


@pytest.mark.parametrize("axes", NETWORKS)
def test_a_step_with_maps_does_not_wait(axes, tmp_path, parts, monkeypatch):
    spec, samples, weights = parts(axes, "grd_levels", teacher="maps", augment={"empty": 0.5})
    files = {level: tmp_path / f"{level}.h5" for level in (None, "stride2")}
    for level, path in files.items():
        ask(weights, samples, path, level=level, device="cpu")
    put_on_meta(monkeypatch)
    maps = TeacherMaps(files.values(), samples)
    trainer = Trainer(spec, maps, META)
    sampler = PatchSampler(
        samples,
        **spec.drawing,
        margin=trainer.margin,
        device=META,
        maps=maps,
        levels=trainer.levels,
    )
    with Watch():
        for _ in range(3):
            trainer.advance(sampler.batch(number) for number in trainer.batches())


def test_what_waits_is_noticed():
    there = torch.zeros(3, device=META)
    for wait in (
        lambda: there.to(META) + torch.zeros(3).to(META),
        lambda: there[torch.zeros(3, dtype=torch.int64)],
        lambda: there.sum().item(),
        lambda: there[there > 0],
        lambda: there.double(),
    ):
        with Watch(), pytest.raises((Waited, RuntimeError)):
            wait()


def test_what_is_known_of_the_labels_changes_no_loss(parts):
    """On a device, room is made for the largest id of all images.

    On the CPU for the instances that are there.
    """
    spec, samples, weights = parts("2D", "grd")
    losses = []
    for largest in (None, 12, 40):
        trainer = Trainer(spec, weights, torch.device("cpu"))
        sampler = PatchSampler(samples, **spec.drawing, margin=trainer.margin)
        assert sampler.largest is None
        sampler.largest = largest
        for _ in range(3):
            trainer.advance(sampler.batch(number) for number in trainer.batches())
        trainer.flush_losses()
        losses.append([value for *_, value in trainer.history])
    # similarities have size one, and an edge loss is a sum of their squares in float32
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], rel=1e-5, abs=1e-6)


def test_ids_that_say_nothing_of_how_many_there_are():
    label = torch.tensor([[0, 7], [1, 0]])
    assert largest_id([label, label // 2], 4 * 4, META) == 7
    assert largest_id([label], 6, META) is None
    assert largest_id([], 16, META) is None
    assert largest_id([label], 16, torch.device("cpu")) is None
