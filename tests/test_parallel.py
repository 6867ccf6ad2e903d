"""Two processes that `torchrun` starts train what one process trains."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gdlib import io, processes
from gdlib.models import build
from gdlib.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
FILES = ("weights.safetensors", "last.safetensors", "history.csv")
# Adam divides by the size of gradients: with a tiny eps, where one is 0 but for rounding, rounding
# would decide.
RECIPE = {
    "steps": 12, "accumulate": 2, "batch_size": 2, "clip": 1.0, "ema": 0.9, "validate_every": 6,
    "optimizer": {"name": "adam", "eps": 0.01},
}  # fmt: skip


def torchrun(spec, folder, splits, teacher, *more):
    """Train on two processes; return exit status and output."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "gdlib",
    ]
    command += [
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
        f"--state={folder / 'state'}"
    ]
    command += [f"--{Path(file).stem}={folder / file}" for file in FILES] + [*more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def history(folder, split):
    with open(folder / "history.csv") as file:
        return {
            (row["step"], row["name"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["split"] == split
        }


@pytest.mark.long
def test_two_processes_train_what_one_trains_and_go_on_where_they_were_stopped(
    make_spec, train, splits, teacher, tmp_path
):
    """Terms within and between images: the bank of each process holds what all have seen."""
    spec = make_spec("grd", **RECIPE)
    one, two = tmp_path / "one", tmp_path / "two"
    train(spec, one, teacher=teacher)
    code, said = torchrun(spec, two, splits, teacher, "--max-seconds=0.000001")
    assert code != 0
    assert said.count("stopped after step 10 of 12") == 1
    assert [path.name for path in two.rglob("*") if path.is_file()] == ["resume.pt"]
    code, said = torchrun(spec, two, splits, teacher)
    assert code == 0, said[:3000]
    # one process wrote
    assert sorted(path.name for path in two.rglob("*") if path.is_file()) == sorted(FILES)

    losses = history(one, "train")
    assert losses == pytest.approx(history(two, "train"), rel=1e-4)
    assert {name for _, name in losses} >= {f"loss/{term.name}" for term in spec.all_terms}
    assert all(value > 0 for (step, name), value in losses.items() if step == "12")
    (mine, _), (theirs, _) = (io.load_weights(folder / FILES[1]) for folder in (one, two))
    start = build(spec.model, spec.options).state_dict()
    moved = 0.0
    for name, tensor in mine.items():
        # the batches of a step weigh the same in two processes, the last most in one
        if "running" in name:
            assert (tensor - theirs[name]).norm() < 0.05 * tensor.norm()
        elif tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
            moved += float((tensor - start[name]).norm())
    assert moved > 1
    assert history(two, "val").keys() == history(one, "val").keys()


def test_a_step_that_cannot_be_shared_is_one_sentence(make_spec, train, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    with pytest.raises(
        ValueError, match=r"2 processes .* make accumulate, which is 3, a multiple"
    ) as caught:
        train(make_spec(accumulate=3), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_batches_are_dealt_out_without_remainder(make_spec, monkeypatch):
    trainer = Trainer(make_spec(accumulate=6), None, torch.device("cpu"))
    trainer.step = 5
    seen = []
    for world in (1, 2, 3, 6):
        monkeypatch.setattr(processes, "world", lambda world=world: world)
        for rank in range(world):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            seen += trainer.batches()
    assert sorted(seen) == sorted([*range(30, 36)] * 4)


def test_one_process_alone_does_nothing():
    device = torch.device("cpu")
    with processes.joined(device) as mine:
        assert mine is device
        assert (processes.world(), processes.rank()) == (1, 0)
    tensor = torch.ones(2)
    processes.add([tensor])
    assert tensor.tolist() == [1, 1]
    assert processes.gather(tensor) is tensor
    assert [processes.any_of(flag, device) for flag in (True, False)] == [True, False]
