"""The training loop: an interrupted run ends as if it had never been interrupted, and what is wrong
is said in one sentence."""

import copy
import itertools
import math
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gdlib import io, models
from gdlib.config import Recipe
from gdlib.data.intensity import learn
from gdlib.distill.bank import MemoryBank
from gdlib.evaluate.metrics import METRICS
from gdlib.models import build
from gdlib.predict.predictor import Predictor
from gdlib.segment.parameters import defaults
from gdlib.segment.tune import score
from gdlib.train import loop, validator
from gdlib.train.label import label_images
from gdlib.train.teacher import sides_of_maps
from gdlib.train.trainer import Trainer, decay, follow, learning_rate
from gdlib.types import Embedding

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ("weights.safetensors", "last.safetensors", "history.csv")
FULL = {"method": "grd", "ema": 0.9, "accumulate": 2, "clip": 1.0}
RUNS = {
    "none": {"method": "none"},
    "grd": {"method": "grd"},
    "grd, ema, accumulation, clipping": FULL,
    "levels": {"method": "levels", "ema": 0.9},
    "none, bfloat16, adam": {
        "precision": "bfloat16",
        "optimizer": {"name": "adam", "amsgrad": True},
        "schedule": "constant",
    },
}


class Touch:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


class PlainNet(nn.Module):
    """No normalisation, so that a batch of four is the mean of two batches of two."""

    ndim = 2
    divisor = (1, 1)
    remainder = margin = (0, 0)
    halo = (1, 1)

    def __init__(self, *, in_channels=1, embedding_dim=6):
        super().__init__()
        self.body = nn.Conv2d(in_channels, embedding_dim, 3, padding=1)
        self.foreground = nn.Conv2d(embedding_dim, 1, 1)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return Embedding(x, self.foreground(x), {})


class ValidNet(PlainNet):
    """It loses its margin, as MALA does, but little of it."""

    margin = halo = (2, 3)

    def __init__(self, *, in_channels=1, embedding_dim=6):
        super().__init__(in_channels=in_channels, embedding_dim=embedding_dim)
        self.body = nn.Conv2d(in_channels, embedding_dim, (5, 7))


def plain(spec, network="PlainNet", **options):
    return spec.model_copy(
        update={"model": f"{__name__}:{network}", "options": {"in_channels": 1, **options}}
    )


def outputs(folder):
    """Everything a run leaves behind, but for the time that it took."""
    out = {"history": (folder / "history.csv").read_bytes()}
    for name in OUTPUTS[:2]:
        state, header = io.load_weights(folder / name)
        out[name] = {
            key: (tensor.dtype, tensor.numpy().tobytes()) for key, tensor in state.items()
        } | {"": header}
    return out


def rows(folder, split=None, name=None):
    lines = [line.split(",") for line in (folder / "history.csv").read_text().splitlines()[1:]]
    return [(int(s), float(v)) for s, p, n, v in lines if split in (None, p) and name in (None, n)]


def stop_at(monkeypatch, batch):
    """Return a `stop` that is true as soon as the sampler has been asked for this batch."""
    original, asked = loop.PatchSampler.batch, threading.Event()

    def replacement(self, step):
        if step == batch:
            asked.set()
        return original(self, step)

    monkeypatch.setattr(loop.PatchSampler, "batch", replacement)
    return asked.is_set


def assert_nothing_written(folder):
    left = [p.name for p in folder.rglob("*") if p.is_file() and p.name != "resume.pt"]
    assert left == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_spec, train, teacher):
    """Return `finished(name)` -> (spec, metrics, folder) of a run that nobody interrupted, made
    once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("finished")
            spec = make_spec(**RUNS[name])
            made[name] = (spec, train(spec, folder, teacher=teacher), folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_its_files(name, finished):
    spec, scores, folder = finished(name)
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == sorted(OUTPUTS)
    assert not (folder / "state" / "resume.pt").exists()
    header = io.read_header(folder / "weights.safetensors")
    assert header["run"] == spec.model_dump(mode="json")
    assert header["validation"] == {"mutex_watershed": scores}
    assert all(math.isfinite(value) for value in scores.values())
    assert header["segmentation"].keys() == {"mutex_watershed"}
    assert header["segmentation"]["mutex_watershed"].keys() == defaults("mutex_watershed", 2).keys()
    assert header["precision"] == spec.recipe.precision
    assert header["step"] in {step for step, _ in rows(folder, "val", "aji")} == {3, 6}
    assert io.read_header(folder / "last.safetensors")["step"] == 6
    assert [step for step, _ in rows(folder, "train", "loss")] == [6]


def test_teacher_student_and_validation_see_images_as_the_training_learned(
    make_spec, train, teacher, splits, tmp_path, monkeypatch
):
    seen = []

    class Recorder(Predictor):
        def __call__(self, image, **kwargs):
            seen.append(self.header["normalisation"])
            return super().__call__(image, **kwargs)

    monkeypatch.setattr(validator, "Predictor", Recorder)
    train(make_spec("grd"), tmp_path, teacher=teacher)
    expected = learn(map(vars, io.read_samples(splits["train"])), 1.0, 99.8, 0.1)
    assert len(expected["contrast"]) == len(expected["level"]) == 1
    assert len(seen) > 3
    assert all(one == expected for one in seen)
    headers = [
        io.read_header(path)["normalisation"]
        for path in (tmp_path / "weights.safetensors", teacher)
    ]
    assert headers == [expected, expected]


def test_a_teacher_of_an_older_version_can_teach(make_spec, train, teacher, tmp_path):
    """Without a learned contrast in its file: it sees the images that the student sees."""
    state, header = io.load_weights(teacher)
    io.save_weights(
        tmp_path / "old.safetensors",
        state,
        header | {"normalisation": {"lower": 1.0, "upper": 99.8}},
    )
    runs = {name: tmp_path / name for name in ("new", "old")}
    for name, weights in (("new", teacher), ("old", tmp_path / "old.safetensors")):
        train(make_spec("grd"), runs[name], teacher=weights)
    assert outputs(runs["old"])["history"] == outputs(runs["new"])["history"]


def scores_of(weights, path):
    """Use a weights file as a stranger would, with nothing but what is in it: mean metrics with
    every segmenter."""
    # By torch, as while training: another engine rounds differently, and a segmentation may notice.
    predictor = Predictor.load(weights, engine="torch", device="cpu", precision="float32")
    samples = list(io.read_samples(path))
    predictions = [predictor(sample.image) for sample in samples]
    pairs = [(p.affinity, p.foreground) for p in predictions]
    labels, ignores = [s.label for s in samples], [s.ignore for s in samples]
    offsets = predictor.header["offsets"]
    return {
        segmenter: score(pairs, labels, offsets, parameters, segmenter=segmenter, ignores=ignores)
        for segmenter, parameters in predictor.header["segmentation"].items()
    }


def assert_same_scores(one, other):
    assert one.keys() == other.keys()
    for segmenter, scores in one.items():
        assert scores == pytest.approx(other[segmenter])


def test_the_header_says_how_large_objects_were(teacher, splits):
    areas = []
    for sample in io.read_samples(splits["train"]):
        areas += [(sample.label == number).sum() for number in np.unique(sample.label)[1:]]
    wanted = np.percentile(2 * np.sqrt(np.array(areas) / np.pi), (5, 50, 95))
    header = io.read_header(teacher)
    assert header["diameter"] == pytest.approx(wanted, abs=0.051)
    assert "pixel_size" not in header  # the images do not say it


def test_the_header_is_enough_to_use_the_weights(teacher, splits):
    assert_same_scores(scores_of(teacher, splits["val"]), io.read_header(teacher)["validation"])


@pytest.mark.parametrize(("pq", "kept"), [((0.7, 0.6), 0), ((0.7, 0.7), 0), ((0.6, 0.7), 1)])
def test_the_kept_weights_are_those_of_the_best_validation(
    train, make_spec, splits, tmp_path, monkeypatch, pq, kept
):
    marks = iter([0.1, 0.9, 0.9, 0.5])
    seen, tuned, tune = [], [], loop.Validator.tune

    def copy_of(network):
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def validator(self, network):
        seen.append(copy_of(network))
        return {**dict.fromkeys(METRICS, 0.0), "pq": next(marks)}

    monkeypatch.setattr(loop.Validator, "__call__", validator)

    def recorded(self, network):
        tuned.append(copy_of(network))
        parameters, scores = tune(self, network)
        scores["mutex_watershed"]["pq"] = pq[len(tuned) - 1]
        return parameters, scores

    monkeypatch.setattr(loop.Validator, "tune", recorded)
    train(make_spec(validate_every=2, steps=8, selection="pq", optimizer={"lr": 0.05}), tmp_path)
    # Tuned are the first of those that were best while training, and the last, each on the whole
    # split, not on the images used while training; the better one is kept.
    for state, one in zip(tuned, (seen[1], seen[3]), strict=True):
        assert all(torch.equal(tensor, one[name]) for name, tensor in state.items())
    state, header = io.load_weights(tmp_path / "weights.safetensors")
    last, header_of_last = io.load_weights(tmp_path / "last.safetensors")
    assert header["step"] == (4 if kept == 0 else 8)
    assert all(torch.equal(tensor, tuned[kept][name]) for name, tensor in state.items())
    assert header_of_last["step"] == 8
    assert all(torch.equal(tensor, seen[3][name]) for name, tensor in last.items())
    assert [value for _, value in rows(tmp_path, "val", "pq")] == [0.1, 0.9, 0.9, 0.5]
    for name, of_file in (("weights", header), ("last", header_of_last)):
        found = scores_of(tmp_path / f"{name}.safetensors", splits["val"])
        found["mutex_watershed"]["pq"] = of_file["validation"]["mutex_watershed"]["pq"]
        assert_same_scores(of_file["validation"], found)


@pytest.mark.parametrize(
    ("name", "step"),
    [*zip(RUNS, (1, 3, 0, 4, 1), strict=True), *(("grd", step) for step in (0, 1, 4))],
)
def test_stopped_then_resumed_is_bit_for_bit_the_same(
    name, step, finished, train, teacher, tmp_path, monkeypatch, capsys
):
    spec, scores, whole = finished(name)
    with monkeypatch.context() as patch:
        stop = stop_at(patch, step * spec.recipe.accumulate)
        with pytest.raises(loop.Interrupted, match=f"stopped after step {step + 1} of 6"):
            train(spec, tmp_path, teacher=teacher, stop=stop)
    assert_nothing_written(tmp_path)
    assert f"stopped after step {step + 1} of 6" in "".join(capsys.readouterr())
    assert train(spec, tmp_path, teacher=teacher) == scores
    assert f"resumed after step {step + 1}" in capsys.readouterr().out
    assert outputs(tmp_path) == outputs(whole)
    assert not (tmp_path / "state" / "resume.pt").exists()


def test_a_training_goes_on_on_another_kind_of_device(make_spec, tmp_path, monkeypatch):
    """Which has random numbers of its own, and computes in float16: of neither anything was
    saved."""
    spec, here = make_spec("none"), torch.device("cpu")
    before = Trainer(spec, None, here)
    before.step = 3
    before.save(tmp_path / "resume.pt", "same")
    after = Trainer(spec, None, here)
    monkeypatch.setattr("gdlib.train.trainer.DRAWING", ("cpu",))
    after.scaler = torch.amp.GradScaler("cpu", enabled=True)
    after.resume(tmp_path / "resume.pt", "same")
    assert after.step == 3
    assert after.scaler.get_scale() > 1


def test_out_of_time_after_every_step_is_the_same_too(finished, train, teacher, tmp_path):
    spec, scores, whole = finished("grd, ema, accumulation, clipping")
    for _ in range(spec.recipe.steps):
        with pytest.raises(loop.Interrupted):
            train(spec, tmp_path, teacher=teacher, max_seconds=0)
        assert_nothing_written(tmp_path)
    assert train(spec, tmp_path, teacher=teacher, max_seconds=0) == scores
    assert outputs(tmp_path) == outputs(whole)


@pytest.mark.long
@pytest.mark.parametrize(("name", "status", "resumed"), [("SIGKILL", -9, 4), ("SIGTERM", 75, 6)])
def test_a_signal_then_resume_is_bit_for_bit_the_same(
    name, status, resumed, finished, splits, teacher, tmp_path
):
    """On the command line. At SIGTERM it makes its step and saves; of SIGKILL it knows nothing."""
    spec, _, whole = finished("grd, ema, accumulation, clipping")
    command = [
        "step",
        "train",
        "--spec",
        spec.model_dump_json(),
        "--device",
        "cpu",
        "--teacher",
        str(teacher),
    ]
    command += [f"--{split}={splits[split]}" for split in ("train", "val")] + [
        f"--state={tmp_path / 'state'}"
    ]
    command += [f"--{Path(file).stem}={tmp_path / file}" for file in OUTPUTS]
    killer = (
        "import os, signal, sys; from gdlib.cli import main; from gdlib.train import loop\n"
        "batch = loop.PatchSampler.batch\n"
        "def deadly(self, step):\n"
        f"    if step == {5 * spec.recipe.accumulate}: os.kill(os.getpid(), signal.{name})\n"
        "    return batch(self, step)\n"
        "loop.PatchSampler.batch = deadly; sys.exit(main.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", killer, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert_nothing_written(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "gdlib", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {resumed}" in done.stdout
    assert outputs(tmp_path) == outputs(whole)


def test_killed_while_the_state_is_written_keeps_the_state_before(
    finished, train, teacher, tmp_path, monkeypatch, capsys
):
    spec, scores, whole = finished("grd")
    save = torch.save

    def die(content, file):
        if content["step"] == 4:
            file.write(b"half a file")
            raise KeyboardInterrupt
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            train(spec, tmp_path, teacher=teacher)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["resume.pt"]
    assert train(spec, tmp_path, teacher=teacher) == scores
    assert "resumed after step 2" in capsys.readouterr().out
    assert outputs(tmp_path) == outputs(whole)


def interrupt(run, spec, folder, **kwargs):
    with pytest.raises(loop.Interrupted):
        run(spec, folder, max_seconds=0, **kwargs)
    return folder / "state" / "resume.pt"


def test_the_state_of_another_configuration_is_not_taken(
    make_spec, train, finished, tmp_path, capsys
):
    spec, scores, whole = finished("none")
    interrupt(train, make_spec("none", optimizer={"lr": 0.5}), tmp_path)
    capsys.readouterr()
    assert train(spec, tmp_path) == scores
    out = capsys.readouterr().out
    assert "another configuration" in out
    assert "resumed" not in out
    assert outputs(tmp_path) == outputs(whole)


@pytest.mark.parametrize("which", ["train", "val", "teacher"])
def test_the_state_of_other_data_is_not_taken(
    which, finished, splits, train, teacher, tmp_path, capsys
):
    spec, scores, whole = finished("grd")
    if which == "teacher":
        state, header = io.load_weights(teacher)
        other = tmp_path / "other.safetensors"
        io.save_weights(
            other,
            {name: t * 1.01 if t.is_floating_point() else t for name, t in state.items()},
            header,
        )
    else:
        other = tmp_path / "other.h5"
        io.write_samples(other, list(io.read_samples(splits[which]))[:1])
    folder = tmp_path / "run"
    interrupt(train, spec, folder, **{"teacher": teacher, which: other})
    capsys.readouterr()
    assert train(spec, folder, teacher=teacher) == scores
    assert "data" in capsys.readouterr().out
    assert outputs(folder) == outputs(whole)


def test_the_state_of_other_code_is_not_taken(finished, train, tmp_path, monkeypatch, capsys):
    spec, scores, _ = finished("none")
    sha256 = io.sha256
    with monkeypatch.context() as patch:
        patch.setattr(
            "gdlib.io.files.sha256", lambda p: sha256(p) + "edited" * (p.name == "igd.py")
        )
        interrupt(train, spec, tmp_path)
    capsys.readouterr()
    assert train(spec, tmp_path) == scores
    assert "code; training starts anew" in capsys.readouterr().out


BROKEN = {
    "empty": lambda path, marker: path.write_bytes(b""),
    "text": lambda path, marker: path.write_text("nothing"),
    "truncated": lambda path, marker: path.write_bytes(path.read_bytes()[:-2000]),
    "malicious pickle": lambda path, marker: path.write_bytes(
        pickle.dumps(Touch(marker), protocol=2)
    ),
    "malicious zip": lambda path, marker: torch.save({"fingerprint": Touch(marker)}, path),
    "of another program": lambda path, marker: torch.save({"epoch": 3}, path),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_broken_state_is_not_taken_and_not_executed(spoil, finished, train, tmp_path, capsys):
    spec, scores, whole = finished("none")
    path, marker = interrupt(train, spec, tmp_path), tmp_path / "executed"
    spoil(path, marker)
    capsys.readouterr()
    assert train(spec, tmp_path) == scores
    out = capsys.readouterr().out
    assert "training starts anew" in out
    assert str(path) in out
    assert not marker.exists()
    assert outputs(tmp_path) == outputs(whole)


def test_the_bait_of_the_malicious_state_works(tmp_path):
    BROKEN["malicious zip"](tmp_path / "resume.pt", tmp_path / "executed")
    torch.load(tmp_path / "resume.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_one_seed_is_one_result_and_another_seed_another(
    finished, make_spec, train, teacher, tmp_path
):
    _, scores, whole = finished("grd")
    torch.manual_seed(99)  # whatever happened before in this process
    torch.rand(7)
    assert train(make_spec("grd"), tmp_path / "same", teacher=teacher) == scores
    assert outputs(tmp_path / "same") == outputs(whole)
    train(make_spec("grd", seed=1), tmp_path / "other", teacher=teacher)
    assert outputs(tmp_path / "other")["history"] != outputs(whole)["history"]
    states = [
        io.load_weights(folder / "last.safetensors")[0] for folder in (tmp_path / "other", whole)
    ]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_in_another_thread_is_the_same(finished, train, teacher, tmp_path):
    spec, scores, whole = finished("grd")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, spec, tmp_path, teacher=teacher).result() == scores
    assert outputs(tmp_path) == outputs(whole)


def test_methods_of_one_seed_start_from_the_same_network_and_see_the_same_patches(
    make_spec, splits, teacher
):
    device = torch.device("cpu")
    trainers = [Trainer(make_spec(method), teacher, device) for method in ("none", "grd")]
    states = [trainer.deployed.state_dict() for trainer in trainers]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def sampler(spec, path):
    return loop.PatchSampler(
        path,
        patch=spec.patch,
        batch_size=spec.recipe.batch_size,
        normalisation=spec.normalisation.model_dump(),
        augment=spec.recipe.augment.model_dump(),
        seed=spec.seed,
    )


def test_accumulation_is_the_mean_over_its_batches(make_spec, splits):
    spec = plain(make_spec("none", batch_size=4, accumulate=2, warmup=0))
    batches = [sampler(spec, splits["train"]).batch(k) for k in range(2)]
    trainer = Trainer(spec, None, torch.device("cpu"))
    start = {name: tensor.clone() for name, tensor in trainer.deployed.state_dict().items()}
    trainer.advance(iter(batches))
    accumulated = [p.grad.clone() for p in trainer.learnable]
    mean_loss = trainer.flush_losses()

    gradients, losses = [], []
    trainer.deployed.load_state_dict(start)
    for k, batch in enumerate(batches):
        trainer.optimizer.zero_grad()
        total, _ = trainer.distiller(batch, k)
        total.backward()
        losses.append(total.item())
        gradients.append([p.grad.clone() for p in trainer.learnable])
    assert mean_loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    for whole, first, second in zip(accumulated, *gradients, strict=True):
        torch.testing.assert_close(whole, (first + second) / 2)
    assert trainer.step == 1


def test_clipping_bounds_the_gradient_of_the_whole_step(make_spec, splits):
    for clip, least, most in ((None, 2e-3, math.inf), (1e-3, 0.99e-3, 1.01e-3)):
        spec = plain(make_spec("none", accumulate=2, clip=clip))
        trainer = Trainer(spec, None, torch.device("cpu"))
        trainer.advance(sampler(spec, splits["train"]).batch(k) for k in range(2))
        assert least < torch.stack([p.grad.norm() for p in trainer.learnable]).norm() < most


def test_random_numbers_go_on_where_they_were(make_spec, tmp_path):
    """Networks that drop channels at random draw them."""
    spec = make_spec("none")
    first, second = (Trainer(spec, None, torch.device("cpu")) for _ in range(2))
    torch.rand(7)
    first.save(tmp_path / "state", "same")
    expected = torch.rand(3)
    second.resume(tmp_path / "state", "same")
    assert torch.equal(torch.rand(3), expected)


def test_every_batch_has_its_own_number(make_spec, train, teacher, tmp_path, monkeypatch):
    seen = {"patches": [], "memory": []}
    batch, sample = loop.PatchSampler.batch, MemoryBank.sample
    monkeypatch.setattr(
        loop.PatchSampler,
        "batch",
        lambda self, step: seen["patches"].append(step) or batch(self, step),
    )
    monkeypatch.setattr(
        MemoryBank,
        "sample",
        lambda self, ids, step: seen["memory"].append(step) or sample(self, ids, step),
    )
    train(make_spec("grd", accumulate=2), tmp_path, teacher=teacher)
    assert seen["patches"] == seen["memory"] == list(range(12))


def test_loss_and_learning_rate_in_the_history(make_spec, train, teacher, tmp_path):
    spec = make_spec("grd", steps=23, validate_every=23, save_every=100)
    train(spec, tmp_path, teacher=teacher)
    assert [step for step, _ in rows(tmp_path, "train", "loss")] == [10, 20, 23]
    for step, value in rows(tmp_path, "train", "lr"):
        assert value == pytest.approx(learning_rate(step - 1, spec.recipe))
    parts = [rows(tmp_path, "train", f"loss/{term.name}") for term in spec.all_terms]
    for k, (_, total) in enumerate(rows(tmp_path, "train", "loss")):
        assert total == pytest.approx(
            sum(t.weight * part[k][1] for t, part in zip(spec.all_terms, parts, strict=True))
        )
    assert all(value > 0 for part in parts for _, value in part)


def test_training_learns(teacher):
    losses = [value for _, value in rows(teacher.parent, "train", "loss")]
    assert losses[-1] < 0.6 * losses[0]
    # After six steps it is below 0.1. Of forty, rounding alone moves it by some hundredths from
    # machine to machine.
    assert io.read_header(teacher)["validation"]["mutex_watershed"]["aji"] > 0.5


def test_learning_rate():
    recipe = {"steps": 100, "validate_every": 1, "warmup": 10, "optimizer": {"lr": 0.5}}
    cosine = Recipe.model_validate(recipe)
    assert learning_rate(0, cosine) == pytest.approx(0.05)
    assert learning_rate(4, cosine) == pytest.approx(0.25)
    assert learning_rate(9, cosine) == pytest.approx(0.5)
    assert learning_rate(10, cosine) == pytest.approx(0.5)
    assert learning_rate(55, cosine) == pytest.approx(0.25)
    assert learning_rate(10 + 30, cosine) == pytest.approx(0.375)
    assert 0 < learning_rate(99, cosine) < 0.001
    constant = Recipe.model_validate(recipe | {"schedule": "constant"})
    assert [learning_rate(step, constant) for step in (4, 10, 55, 99)] == pytest.approx(
        [0.25, 0.5, 0.5, 0.5]
    )
    short = Recipe.model_validate(recipe | {"steps": 5, "warmup": 0})
    assert learning_rate(0, short) == pytest.approx(0.5)
    warm = Recipe.model_validate(recipe | {"steps": 5, "warmup": 20})
    assert learning_rate(4, warm) == pytest.approx(0.125)


def test_moving_average(make_spec, splits):
    spec = plain(make_spec("none", ema=0.75, warmup=0))
    trainer = Trainer(spec, None, torch.device("cpu"))
    batches = sampler(spec, splits["train"])
    expected = {name: tensor.clone() for name, tensor in trainer.deployed.state_dict().items()}
    for step, keep in enumerate((1 / 10, 2 / 11, 3 / 12)):
        trainer.advance(iter([batches.batch(step)]))
        now = trainer.distiller.student.state_dict()
        expected = {
            name: keep * expected[name] + (1 - keep) * now[name]
            if now[name].is_floating_point()
            else now[name].clone()
            for name in now
        }
    for name, tensor in trainer.deployed.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
        assert not torch.equal(tensor, now[name])


def test_a_loss_that_is_no_number_is_one_sentence(make_spec, train, tmp_path):
    with pytest.raises(FloatingPointError, match=r"lower recipes\.\*\.optimizer\.lr") as caught:
        train(make_spec(steps=10, optimizer={"lr": 1e30}), tmp_path)
    assert "\n" not in str(caught.value)
    assert_nothing_written(tmp_path)


def refusal(run, spec, folder, error=io.DataError, **kwargs):
    with pytest.raises(error) as caught:
        run(spec, folder, **kwargs)
    assert not folder.exists() or not list(folder.rglob("*"))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_patch_larger_than_an_image(make_spec, train, splits, tmp_path):
    text = refusal(train, make_spec(patch=(32, 64)), tmp_path / "run")
    assert all(part in text for part in (str(splits["train"]), '"train0"', "(40, 44)", "(32, 64)"))


def test_a_patch_that_the_network_cannot_halve(make_spec, train, tmp_path):
    text = refusal(train, make_spec(patch=(32, 40)), tmp_path / "run", ValueError)
    assert all(part in text for part in ("(32, 40)", '"resunet_2"', "multiples of (16, 16)"))
    assert "plus" not in text


def test_a_patch_for_a_network_that_loses_its_border(make_spec, train, tmp_path):
    spec = make_spec(model="mala", widths=(1, 2, 2, 3), patch=(2, 32, 29))
    text = refusal(train, spec, tmp_path / "run", ValueError)
    assert all(part in text for part in ("(2, 32, 29)", "multiples of (1, 27, 27) plus (0, 2, 2)"))


def test_a_patch_that_only_the_student_can_use(make_spec, train, teacher, tmp_path):
    text = refusal(
        train,
        plain(make_spec("grd", patch=(30, 30))),
        tmp_path / "run",
        ValueError,
        teacher=teacher,
    )
    assert all(part in text for part in ("(30, 30)", "or its teacher", "multiples of (16, 16)"))


def test_a_network_with_another_number_of_axes(make_spec, train, teacher, volume_splits, tmp_path):
    flat = make_spec(model="resunet", patch=(4, 32, 32))
    files = {split: volume_splits[split] for split in ("train", "val")}
    assert "(16, 16)" in refusal(train, flat, tmp_path / "run", ValueError, **files)
    student = make_spec("grd", model="resunet3d", patch=(4, 32, 32))
    assert "(16, 16)" in refusal(
        train, student, tmp_path / "run", ValueError, teacher=teacher, **files
    )


def test_a_split_without_images(make_spec, train, tmp_path):
    empty = tmp_path / "empty.h5"
    io.write_samples(empty, [])
    for split in ("train", "val"):
        assert str(empty) in refusal(train, make_spec(), tmp_path / "run", **{split: empty})


def test_a_method_that_needs_a_teacher_without_one(make_spec, train, tmp_path):
    assert '"grd"' in refusal(train, make_spec("grd"), tmp_path / "run", ValueError)
    missing = tmp_path / "missing.safetensors"
    assert str(missing) in refusal(train, make_spec("grd"), tmp_path / "run", teacher=missing)


def test_a_level_that_is_not_there(make_spec, train, teacher, tmp_path):
    spec = make_spec("levels")
    terms = tuple(term.model_copy(update={"level": "stride9"}) for term in spec.terms)
    text = refusal(
        train,
        spec.model_copy(update={"terms": terms}),
        tmp_path / "run",
        ValueError,
        teacher=teacher,
    )
    assert all(part in text for part in ('"stride9"', "stride8, stride4, stride2, stride1"))


def test_a_teacher_with_another_normalisation_or_other_channels(
    make_spec, train, teacher, tmp_path
):
    spec = make_spec("grd", normalisation={"lower": 0.0, "upper": 100.0})
    text = refusal(train, spec, tmp_path / "run", teacher=teacher)
    assert all(part in text for part in (str(teacher), "normalisation", "99.8", "100.0"))
    _, header = io.load_weights(teacher)
    other, options = tmp_path / "rgb.safetensors", header["options"] | {"in_channels": 3}
    state = models.build(header["model"], options).state_dict()
    io.save_weights(other, state, header | {"channels": 3, "options": options})
    assert "channels 3" in refusal(train, make_spec("grd"), tmp_path / "run", teacher=other)


def test_a_teacher_file_that_is_a_pickle(make_spec, train, tmp_path):
    path, marker = tmp_path / "teacher.safetensors", tmp_path / "executed"
    torch.save(Touch(marker), path)
    assert str(path) in refusal(train, make_spec("grd"), tmp_path / "run", teacher=path)
    assert not marker.exists()


def test_a_teacher_that_nobody_asks_is_not_opened(finished, train, tmp_path):
    spec, scores, whole = finished("none")
    assert train(spec, tmp_path) == scores
    assert outputs(tmp_path) == outputs(whole)


def test_the_teacher_does_not_change(make_spec, splits, teacher):
    trainer = Trainer(make_spec("grd"), teacher, torch.device("cpu"))
    before = {
        name: tensor.clone() for name, tensor in trainer.distiller.teacher.state_dict().items()
    }
    batches = sampler(trainer.spec, splits["train"])
    for step in range(2):
        trainer.advance(iter([batches.batch(step)]))
    after = trainer.distiller.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    learnable = {id(p) for p in trainer.learnable}
    assert learnable == {id(p) for p in trainer.distiller.student.parameters()}


# --- Volumes --------------------------------------------------------------------------------------------------------

VOLUME = {
    "model": "resunet3d",
    "patch": (4, 32, 32),
    "steps": 4,
    "validate_every": 4,
    "targets": {"background_connected": False, "per_offset": True, "border": 1},
    "segmenters": ("waterz", "mutex_watershed"),
    "selection": "voi",
    "augment": {
        "geometry": {"rotate": 10.0, "misalign": 2.0},
        "sections": {"contrast": 0.2, "motion": 3, "missing": 0.1},
    },
}


@pytest.fixture(scope="module")
def volume_splits(tmp_path_factory, squares):
    """Return {split: samples file} of columns of squares: two volumes, one with a part that is
    ignored, and one."""
    folder = tmp_path_factory.mktemp("volumes")
    out = {}
    for number, (split, count) in enumerate({"train": 2, "val": 1}.items()):
        samples = []
        for i in range(count):
            sections = [squares(10 * number + i) for _ in range(6)]  # the same objects
            noise = np.random.default_rng(number).integers(0, 20, (6, 40, 44))
            image = np.stack([image for image, _ in sections], 1).clip(0, 235) + noise.astype(
                np.uint8
            )
            label = np.stack([label for _, label in sections])
            ignore = np.zeros(label.shape, bool)
            ignore[:, :, 30:] = True
            samples.append(io.Sample(f"{split}{i}", image, label, ignore=None if i else ignore))
        out[split] = folder / f"{split}.h5"
        io.write_samples(out[split], samples, split=split)
    return out


@pytest.fixture(scope="module")
def train_volume(train, volume_splits):
    """Return `train` on the volumes."""
    return lambda spec, folder, **kwargs: train(spec, folder, **volume_splits, **kwargs)


@pytest.fixture(scope="module")
def volume_runs(tmp_path_factory, make_spec, train_volume):
    """Return {name: (spec, metrics, folder)} of a teacher in 3D and of the student that learnt from
    it."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("teacher", "student")}
    first = make_spec("teacher", widths=(3, 3, 4, 4, 5), **VOLUME)
    second = make_spec("grd", **VOLUME)
    weights = folders["teacher"] / "weights.safetensors"
    return {
        "teacher": (first, train_volume(first, folders["teacher"]), folders["teacher"]),
        "student": (
            second,
            train_volume(second, folders["student"], teacher=weights),
            folders["student"],
        ),
    }


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_run_on_volumes_ends_with_its_files(name, volume_runs, volume_splits):
    spec, scores, folder = volume_runs[name]
    header = io.read_header(folder / "weights.safetensors")
    assert header["run"] == spec.model_dump(mode="json")
    assert (
        header["segmentation"].keys()
        == header["validation"].keys()
        == {"waterz", "mutex_watershed"}
    )
    for segmenter, parameters in header["segmentation"].items():
        assert parameters.keys() == defaults(segmenter, 3).keys()
    # the first of `run: segmenters` is the main one
    assert header["validation"]["waterz"] == scores
    assert all(math.isfinite(v) for one in header["validation"].values() for v in one.values())
    assert set(io.read_header(folder / "last.safetensors")["validation"]) == {
        "waterz",
        "mutex_watershed",
    }
    assert_same_scores(
        scores_of(folder / "weights.safetensors", volume_splits["val"]), header["validation"]
    )
    names = {term.name for term in spec.all_terms}
    assert all(value > 0 for term in names for _, value in rows(folder, "train", f"loss/{term}"))
    assert [step for step, _ in rows(folder, "val", "voi")] == [4]


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_on_volumes_is_resumed_bit_for_bit(
    step, volume_runs, train_volume, tmp_path, monkeypatch
):
    spec, scores, whole = volume_runs["student"]
    weights = volume_runs["teacher"][2] / "weights.safetensors"
    with monkeypatch.context() as patch:
        stop = stop_at(patch, step)
        with pytest.raises(loop.Interrupted):
            train_volume(spec, tmp_path, teacher=weights, stop=stop)
    assert_nothing_written(tmp_path)
    assert train_volume(spec, tmp_path, teacher=weights) == scores
    assert outputs(tmp_path) == outputs(whole)


def test_a_file_that_stays_on_disk_trains_the_same(
    volume_runs, train_volume, tmp_path, monkeypatch
):
    spec, scores, whole = volume_runs["teacher"]
    monkeypatch.setattr("gdlib.data.patches.IN_MEMORY", 0)
    assert train_volume(spec, tmp_path) == scores
    assert outputs(tmp_path) == outputs(whole)


def test_what_is_ignored_does_not_matter_for_the_validation(
    make_spec, volume_runs, volume_splits, tmp_path
):
    """Whatever the label says there; neither while training nor in the choice of parameters."""
    spec, _, folder = volume_runs["teacher"]
    network = build(spec.model, spec.options)
    network.load_state_dict(io.load_weights(folder / "weights.safetensors")[0])
    judged = []
    for change in (False, True):
        (sample,) = io.read_samples(volume_splits["val"])
        label = np.where(sample.ignore & change, 99, sample.label).astype(np.uint32)
        io.write_samples(
            tmp_path / "val.h5", [io.Sample(sample.id, sample.image, label, ignore=sample.ignore)]
        )
        validator = loop.Validator(spec, tmp_path / "val.h5", torch.device("cpu"))
        judged.append((validator(network), validator.tune(network)))
    assert judged[0] == judged[1]
    io.write_samples(tmp_path / "val.h5", [io.Sample(sample.id, sample.image, label)])
    validator = loop.Validator(spec, tmp_path / "val.h5", torch.device("cpu"))
    assert validator(network) != judged[0][0]


def test_a_student_learns_from_volumes_without_labels(
    volume_runs, train_volume, volume_splits, make_spec, tmp_path
):
    weights = volume_runs["teacher"][2] / "weights.safetensors"
    label_images(weights, volume_splits["train"], tmp_path / "found.h5", sure=0.75, device="cpu")
    found = {sample.id: sample for sample in io.read_samples(tmp_path / "found.h5")}
    for sample in io.read_samples(volume_splits["train"]):
        assert np.array_equal(found[sample.id].image, sample.image)
        assert found[sample.id].label.shape == found[sample.id].ignore.shape == sample.label.shape
    spec = make_spec("grd", **VOLUME, unlabelled={"labels": "teacher"})
    train_volume(spec, tmp_path / "run", teacher=weights, unlabelled=tmp_path / "found.h5")
    names = {term.name for term in spec.all_terms}
    losses = {name: rows(tmp_path / "run", "train", f"loss/{name}") for name in names}
    without = volume_runs["student"][2]
    assert all(math.isfinite(value) for found in losses.values() for _, value in found)
    assert all(losses[name] != rows(without, "train", f"loss/{name}") for name in names)


@pytest.mark.long
def test_mala_learns_from_mala(make_spec, train_volume, volume_splits, tmp_path):
    """Valid convolutions: of 30 x 241 x 241 voxels, the volume continued by reflection, it says
    something about 2 x 29 x 29."""
    options = VOLUME | {
        "model": "mala",
        "patch": (2, 29, 29),
        "steps": 2,
        "validate_every": 2,
        "batch_size": 1,
    }
    options |= {"segmenters": ("mutex_watershed",), "save_every": 10}
    for method, widths in (("teacher", (2, 2, 2, 3)), ("grd", (1, 2, 2, 3))):
        spec = make_spec(method, widths=widths, **options)
        kwargs = (
            {} if method == "teacher" else {"teacher": tmp_path / "teacher" / "weights.safetensors"}
        )
        scores = train_volume(spec, tmp_path / method, **kwargs)
        weights = tmp_path / method / "weights.safetensors"
        assert_same_scores(scores_of(weights, volume_splits["val"]), {"mutex_watershed": scores})
        start = build(spec.model, spec.options)  # of another seed, but the biases start at 0
        state = io.load_weights(tmp_path / method / "last.safetensors")[0]
        assert all(
            state[name].abs().max() > 0
            for name, p in start.named_parameters()
            if p.abs().max() == 0
        )
        losses = [
            v
            for term in spec.all_terms
            for _, v in rows(tmp_path / method, "train", f"loss/{term.name}")
        ]
        assert len(losses) == len(spec.all_terms)
        assert all(0 <= v < math.inf for v in losses)


def with_empty(folder, squares, filled, empty):
    """Write a validation split with so many images with objects, and then so many without."""
    shape = squares(0)[1].shape
    samples = [io.Sample(f"s{k}", *squares(k)) for k in range(filled)]
    samples += [
        io.Sample(f"e{k}", np.zeros((1, *shape), np.uint8), np.zeros(shape, np.uint32))
        for k in range(empty)
    ]
    io.write_samples(folder / "val.h5", samples)
    return folder / "val.h5"


@pytest.mark.parametrize(
    ("filled", "empty", "asked", "chosen"),
    [
        (5, 0, 3, "s0 s2 s4"),
        (5, 1, 3, "s0 s4 e0"),  # a part of one is one
        (4, 4, 4, "s0 s3 e0 e3"),
        (1, 4, 3, "s0 e0 e3"),
        (2, 9, 1, "s0"),  # one that says something about objects
        (2, 1, 99, "s0 s1 e0"),
    ],
)
def test_validation_while_training_sees_empty_images_too(
    filled, empty, asked, chosen, make_spec, squares, tmp_path
):
    path = with_empty(tmp_path, squares, filled, empty)
    validator = loop.Validator(make_spec(validate_images=asked), path, torch.device("cpu"))
    assert " ".join(sample.id for sample in validator.some) == chosen


def test_a_validation_split_of_empty_images_is_refused_before_any_training(
    make_spec, train, squares, tmp_path
):
    path = with_empty(tmp_path, squares, 0, 2)
    with pytest.raises(io.DataError, match=r"val\.h5: no validation image has an object; move"):
        train(make_spec(), tmp_path / "run", val=path)
    assert_nothing_written(tmp_path / "run")


def test_weights_that_find_objects_in_empty_images_are_not_the_best(
    make_spec, train, tmp_path, monkeypatch
):
    marks = iter([(0.9, 0.2, 7), (0.8, 0.0, 0), (0.85, 0.1, 2)])

    def validator(self, network):
        value, share, found = next(marks)
        empty = {
            "empty_images": 1,
            "false_objects": found,
            "false_pixels": 10 * found,
            "false_share": share,
        }
        return {**dict.fromkeys(METRICS, 0.0), "aji": value, **empty}

    monkeypatch.setattr(loop.Validator, "__call__", validator)
    monkeypatch.setattr(loop, "best_of", lambda tuned, *_: next(iter(tuned)))
    train(make_spec(validate_every=2), tmp_path)
    assert io.read_header(tmp_path / "weights.safetensors")["step"] == 4
    assert [value for _, value in rows(tmp_path, "val", "aji")] == [0.9, 0.8, 0.85]
    assert [value for _, value in rows(tmp_path, "val", "false_objects")] == [7, 0, 2]


def test_the_sampler_gets_the_margin_and_the_border(
    make_spec, train, splits, teacher, tmp_path, monkeypatch
):
    """The larger margin of student and teacher, per axis.

    The label is that of a student without a margin.
    """
    monkeypatch.setenv(io.PLUGINS, __name__)
    asked = []
    original = loop.PatchSampler

    def recorded(*args, **kwargs):
        asked.append(original(*args, **kwargs))
        return asked[-1]

    monkeypatch.setattr(loop, "PatchSampler", recorded)
    targets = {"border": 2}
    valid_teacher = tmp_path / "valid" / "weights.safetensors"
    for method, network, folder, source in (
        ("teacher", "ValidNet", "valid", None),
        ("grd", "ValidNet", "both", valid_teacher),
        ("grd", "ValidNet", "student", teacher),
        ("grd", "PlainNet", "learner", valid_teacher),
        ("grd", "PlainNet", "neither", teacher),
    ):
        spec = plain(make_spec(method, targets=targets, steps=2), network, embedding_dim=4)
        train(spec, tmp_path / folder, teacher=source)
    batches = [one.batch(3) for one in asked]
    assert [batch.image.shape for batch in batches] == [(2, 1, 36, 38)] * 4 + [(2, 1, 32, 32)]
    for label in (batch.label for batch in batches):  # no two objects within two pixels
        assert label.shape == (2, 32, 32)
        for dy, dx in itertools.product(range(3), range(-2, 3)):
            a, b = (
                label[:, : 32 - dy, max(0, -dx) : 32 - max(0, dx)],
                label[:, dy:, max(0, dx) : 32 + min(0, dx)],
            )
            assert not ((a != b) & (a > 0) & (b > 0)).any()
    assert {one.border for one in asked} == {2}


def test_targets_reach_the_loss(make_spec, splits):
    losses = []
    for targets in ({}, {"background_connected": False}, {"per_offset": True}):
        spec = make_spec("none", targets=targets, warmup=0)
        trainer = Trainer(spec, None, torch.device("cpu"))
        trainer.advance(iter([sampler(spec, splits["train"]).batch(0)]))
        losses.append(trainer.flush_losses())
    assert len({round(loss, 4) for loss in losses}) == 3


def test_moving_average_is_that_of_torch():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    reference = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    average = copy.deepcopy(network)
    for step in range(4):
        network(torch.randn(2, 1, 8, 8)).sum().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        reference.update_parameters(network)
        follow(average, network, 0.9 if step else 0.0)
    for name, expected in reference.module.state_dict().items():
        if expected.is_floating_point():
            torch.testing.assert_close(average.state_dict()[name], expected, rtol=1e-6, atol=1e-7)
        else:  # torch rounds a mean of them
            assert average.state_dict()[name] == network.state_dict()[name]


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
@pytest.mark.long
def test_compiled_networks_learn_the_same(tmp_path, make_spec, train, teacher):
    found = []
    for compile in (False, True):
        spec = plain(make_spec("grd", compile=compile, ema=0.9), embedding_dim=4)
        folder = tmp_path / str(compile)
        train(spec, folder, teacher=teacher)
        found.append(rows(folder))
    assert found[1] == [
        (step, pytest.approx(value, rel=1e-4, abs=1e-5)) for step, value in found[0]
    ]


def test_a_new_average_forgets_the_random_start():
    """With `ema` alone 22 % of it would be left after 300 steps of 0.995."""
    left = math.prod(decay(step, 0.995) for step in range(300))
    assert left < 1e-12
    assert decay(0, 0.995) == 0.1
    assert decay(10_000, 0.995) == 0.995
    assert decay(10_000, 0.9999) == pytest.approx(10_001 / 10_010)


def entries(folder, name):
    return [value for _, value in rows(folder, "train", f"entries/{name}" if name else "entries")]


def test_patches_of_one_image_are_compared_with_each_other(
    make_spec, splits, train, teacher, tmp_path
):
    """A single volume is the usual case of electron microscopy."""
    first = next(iter(io.read_samples(splits["train"])))
    io.write_samples(tmp_path / "one.h5", [first])
    spec = make_spec("grd", steps=20, augment={"empty": 0})
    train(spec, tmp_path, teacher=teacher, train=tmp_path / "one.h5")
    memory = [term.name for term in spec.all_terms if term.memory]
    assert len(memory) == 2
    for name in memory:
        assert all(value > 0 for _, value in rows(tmp_path, "train", f"loss/{name}"))
        assert (
            entries(tmp_path, name) == entries(tmp_path, "") == pytest.approx([1.8, 2.0])
        )  # the first step meets none


def test_a_memory_without_instances_is_an_error_for_terms_that_compare_them(
    make_spec, splits, train, teacher, tmp_path
):
    samples = [
        replace(sample, label=0 * sample.label) for sample in io.read_samples(splits["train"])
    ]
    io.write_samples(tmp_path / "empty.h5", samples)
    with pytest.raises(
        ValueError,
        match=r'"igd.* nothing to compare with, as none of the 3 patches .* show an ' r"instance",
    ):
        train(make_spec("grd", steps=40), tmp_path, teacher=teacher, train=tmp_path / "empty.h5")


@pytest.mark.parametrize(("sections", "dtype"), [(4, torch.float32), (6, torch.bfloat16)])
def test_maps_of_two_sections_are_not_computed_in_bfloat16(make_spec, sections, dtype):
    """Gradients of weights there may be anything on some processors."""
    spec = make_spec(
        model="resunet3d", widths=(2, 2, 2, 2, 2), patch=(sections, 16, 16), precision="bfloat16"
    )
    assert sides_of_maps(spec)["stride8"][0] == sections // 2
    assert Trainer(spec, None, torch.device("cpu")).dtype == dtype
