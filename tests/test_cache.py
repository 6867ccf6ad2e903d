"""The teacher cache: the same training as with the teacher online, for the first pass; the same mathematics ever after."""

import csv

import h5py
import numpy as np
import pytest
import torch

from gdlib import cache, io
from gdlib.data.patches import PatchSampler
from gdlib.distill import see
from gdlib.models import build, folded
from gdlib.registry import NETWORKS, margin

BATCHES = 6


def load(path):
    state, header = io.load_weights(path)
    network = build(header["model"], header["options"])
    network.load_state_dict(state)
    return folded(network), header


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_spec, splits, teacher):
    """Patches of seed 0, the teacher's output on them, and the run that both are for."""
    folder, spec = tmp_path_factory.mktemp("cache"), make_spec("levels")
    patches = folder / "patches.h5"
    cache.draw(spec.drawing, splits["train"], patches, BATCHES, margin=[0, 0])
    taught = {level: folder / f"{level}.h5" for level in (None, "stride2", "stride64")}
    for level, path in taught.items():  # it has no map at stride 64
        cache.teach(teacher, patches, path, level=level, precision="float32", device="cpu")
    return patches, list(taught.values()), spec


def test_patches_are_those_of_the_sampler_and_the_teacher_is_asked_about_them(files, splits, teacher):
    patches, taught, spec = files
    sampler = PatchSampler(splits["train"], **spec.drawing)
    cached = cache.CachedPatches(patches, taught, seed=0)
    network, _ = load(teacher)
    for step in range(BATCHES):
        mine, there = sampler.batch(step), cached.batch(step)
        assert torch.equal(mine.image, there.image)
        assert torch.equal(mine.label, there.label)
        assert there.label.dtype == torch.int64
        assert torch.equal(mine.ids, there.ids)
        with torch.no_grad():
            output = see(network, mine)
        assert list(there.teacher.features) == ["stride2"]
        for part, stored in zip(output[:2], there.teacher[:2], strict=True):
            torch.testing.assert_close(stored.float(), part, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            there.teacher.features["stride2"].float(), output.features["stride2"], rtol=1e-3, atol=1e-4
        )


def test_later_passes_show_every_patch_once_turned_with_what_belongs_to_it(files):
    patches, taught, _ = files
    cached = cache.CachedPatches(patches, taught, seed=0)
    first = [cached.batch(step) for step in range(BATCHES)]
    again = [cached.batch(step) for step in range(BATCHES, 2 * BATCHES)]
    old = {row.image.sum().item(): row for row in _rows(first)}
    assert len(old) == 2 * BATCHES
    moved = 0
    for row in _rows(again):
        before = old.pop(min(old, key=lambda total: abs(total - row.image.sum().item())))
        moves = [
            (axes, turns)
            for axes in ([], [-1], [-2], [-1, -2])
            for turns in range(4)
            if torch.equal(cache._moved(before.image, axes, turns), row.image)
        ]
        assert moves  # every one of them gives this image; all other parts must agree with at least one
        fits = [
            move
            for move in moves
            if torch.equal(cache._moved(before.label, *move), row.label)
            and torch.equal(cache._moved(before.teacher, *move), row.teacher)
        ]
        assert fits
        moved += ([], 0) not in fits
    assert not old
    assert moved > BATCHES  # a patch stays as it is once in eight times
    still = cache.CachedPatches(patches, taught, seed=0, flip=False, rotate90=False)
    totals = sorted(row.image.sum().item() for row in _rows([still.batch(s) for s in range(BATCHES, 2 * BATCHES)]))
    assert totals == sorted(row.image.sum().item() for row in _rows(first))


def _rows(batches):
    from types import SimpleNamespace

    return [
        SimpleNamespace(image=b.image[k], label=b.label[k], teacher=b.teacher.embedding[k])
        for b in batches
        for k in range(len(b.image))
    ]


@pytest.mark.parametrize("method", ["none", "grd", "levels"])
def test_training_from_the_cache_is_training_online(files, method, make_spec, train, teacher, tmp_path):
    patches, taught, _ = files
    spec = make_spec(method, steps=BATCHES)
    use = {"patches": patches} | ({"taught": taught, "teacher": teacher} if method != "none" else {})
    asked = {"teacher": teacher} if method != "none" else {}
    train(spec, tmp_path / "online", **asked)
    train(spec, tmp_path / "cached", **use)
    headers = [io.read_header(tmp_path / name / "weights.safetensors") for name in ("online", "cached")]
    assert headers[0]["normalisation"] == headers[1]["normalisation"]
    online, fresh = (_losses(tmp_path / name / "history.csv") for name in ("online", "cached"))
    assert online.keys() == fresh.keys()
    tolerance = 0 if method == "none" else 2e-3  # half precision
    for name, value in online.items():
        assert fresh[name] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), name


def _losses(path):
    with open(path) as file:
        return {
            (row["step"], row["name"]): float(row["value"]) for row in csv.DictReader(file) if row["split"] == "train"
        }


def test_a_run_that_needs_more_steps_than_were_drawn_goes_on(files, make_spec, train, teacher, tmp_path):
    patches, taught, _ = files
    spec = make_spec("grd", steps=2 * BATCHES + 1)
    scores = train(spec, tmp_path, patches=patches, taught=taught, teacher=teacher)
    assert np.isfinite(scores["aji"])


def test_resumed_from_the_cache_as_if_never_stopped(files, make_spec, train, teacher, tmp_path):
    from gdlib.training import Interrupted

    patches, taught, _ = files
    spec = make_spec("grd", steps=2 * BATCHES)
    use = {"patches": patches, "taught": taught, "teacher": teacher}
    train(spec, tmp_path / "whole", **use)
    with pytest.raises(Interrupted):
        train(spec, tmp_path / "parts", max_seconds=0, **use)
    train(spec, tmp_path / "parts", **use)
    for name in ("weights.safetensors", "history.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_files_of_another_run_or_teacher_are_refused(files, make_spec, train, teacher, splits, tmp_path):
    patches, taught, _spec = files
    for changed, key in (
        (make_spec("none", seed=1), "seed"),
        (make_spec("none", batch_size=4), "batch_size"),
        (make_spec("none", patch=(16, 16)), "patch"),
        (make_spec("none", augment={"geometry": {"elastic": 0.0}}), "augment"),
        (make_spec("none", targets={"border": 1}), "border"),
    ):
        with pytest.raises(io.DataError, match=f"patches.h5: it was drawn with {key} .*make it again"):
            train(changed, tmp_path, patches=patches)
    with pytest.raises(io.DataError, match="drawn with train"):
        train(make_spec("none"), tmp_path, patches=patches, train=splits["val"])
    other = tmp_path / "other.h5"
    with h5py.File(taught[0]) as old, h5py.File(other, "w") as new:
        for name in old:
            old.copy(name, new)
        new.attrs["teacher"] = "0" * 64
    with pytest.raises(io.DataError, match=r"other.h5: another teacher than .* was asked"):
        train(make_spec("grd"), tmp_path, patches=patches, taught=[other], teacher=teacher)


def test_values_too_large_for_half_precision_are_refused(files, teacher, tmp_path):
    patches, *_ = files
    state, header = io.load_weights(teacher)
    state["embedding.weight"] *= 1e7
    io.save_weights(tmp_path / "loud.safetensors", state, header)
    with pytest.raises(io.DataError, match="too large for half precision"):
        cache.teach(tmp_path / "loud.safetensors", patches, tmp_path / "out.h5", device="cpu", precision="float32")
    assert not (tmp_path / "out.h5").exists()


def test_volumes_and_ignored_voxels(make_spec, tmp_path):
    spec = make_spec("grd", model="resunet3d", patch=(4, 16, 16), targets={"background_connected": False})
    rng = np.random.default_rng(0)
    label = np.kron(np.arange(1, 9).reshape(2, 2, 2), np.ones((4, 12, 12))).astype(np.uint32)
    image = (label * 20 + rng.integers(0, 10, label.shape)).astype(np.uint8)[None]
    ignore = rng.random(label.shape) < 0.1
    io.write_samples(tmp_path / "train.h5", [io.Sample("a", image, label, ignore)])
    network = {"model": "resunet3d", "options": spec.options}
    cache.draw(spec.drawing, tmp_path / "train.h5", tmp_path / "patches.h5", 2, margin=[0, 2, 0], networks=[network])
    torch.manual_seed(0)
    io.save_weights(
        tmp_path / "teacher.safetensors", build(**{"name": "resunet3d", "options": spec.options}).state_dict(), network
    )
    cache.teach(tmp_path / "teacher.safetensors", tmp_path / "patches.h5", tmp_path / "taught.h5", device="cpu")
    cached = cache.CachedPatches(tmp_path / "patches.h5", [tmp_path / "taught.h5"], seed=0)
    assert cached.margin == (0, 2, 0)
    sampler = PatchSampler(tmp_path / "train.h5", **spec.drawing, margin=[0, 2, 0])
    for step in range(4):
        batch = cached.batch(step)
        assert batch.ignore.dtype == torch.bool
        assert batch.ignore.shape == batch.label.shape == (2, 4, 16, 16)
        assert batch.teacher.embedding.shape == (2, 4, 4, 16, 16)
        if step < 2:
            assert torch.equal(batch.ignore, sampler.batch(step).ignore)


@pytest.mark.parametrize("name", NETWORKS.names())
def test_margins_are_known_without_an_import(name):
    with torch.device("meta"):
        assert margin(name) == build(name, {}).margin
