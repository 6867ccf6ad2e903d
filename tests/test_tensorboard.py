"""Training histories as event files: the bytes that TensorBoard's own writer makes, runs that still
train, and going on."""

import csv

import pytest
import torch

from gdlib import io, tensorboard
from gdlib.cli.main import main
from gdlib.train.loop import Interrupted

# One event, `train/loss` 0.5 at step 300, as written by tensorboard 2.21 (RecordWriter, Event and
# Summary).
KNOWN = bytes.fromhex(
    "0f000000000000006d532b091a0d627261696e2e4576656e743a32fc985129"
    "2100000000000000017becf6090000000000c0724010ac022a130a110a0a747261696e2f6c6f7373150000003fbac241e3"
)


def test_bytes_are_those_of_tensorboard():
    assert tensorboard.events([(300, "train/loss", 0.5)]) == KNOWN


def test_tensorboard_reads_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = [(10 * k, "train/loss", 1 / k) for k in range(1, 2000)] + [(20000, "val/aji", 0.75)]
    (tmp_path / tensorboard.EVENTS).write_bytes(tensorboard.events(rows))
    read = accumulator.EventAccumulator(str(tmp_path), {"scalars": 0})
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [
        (s, pytest.approx(v)) for s, _, v in rows[:-1]
    ]
    assert [e.step for e in read.Scalars("val/aji")] == [20000]


@pytest.fixture(scope="module")
def study(tmp_path_factory, make_spec, train):
    """Return the folder of a study with one finished run and one that was stopped half-way, as
    trainings leave them."""
    folder = tmp_path_factory.mktemp("study")
    done = folder / "runs" / "squares" / "tiny" / "none" / "seed0"
    train(make_spec(steps=6), done)
    state = folder / "state" / "squares" / "tiny" / "none" / "seed1"
    with pytest.raises(Interrupted):
        train(make_spec(seed=1, steps=6), folder / "x", state=state, max_seconds=0)
    return folder


def test_finished_and_running_trainings(study, capsys):
    assert main(["tensorboard", str(study)]) == 0
    assert "2 runs" in capsys.readouterr().out
    runs = {
        path.parent.relative_to(study / "tensorboard").as_posix(): path
        for path in study.rglob(tensorboard.EVENTS)
    }
    assert set(runs) == {"squares/tiny/none/seed0", "squares/tiny/none/seed1"}
    with open(study / "runs" / "squares/tiny/none/seed0" / "history.csv") as file:
        rows = [
            (int(step), f"{split}/{name}", float(value))
            for step, split, name, value in list(csv.reader(file))[1:]
        ]
    assert any(tag == "val/aji" for _, tag, _ in rows)
    assert runs["squares/tiny/none/seed0"].read_bytes() == tensorboard.events(rows)


def test_what_is_new_is_added_and_a_new_training_replaces_the_old(tmp_path):
    def history(*rows):
        io.write_rows(tmp_path / "runs" / "a" / "history.csv", io.HISTORY_COLUMNS, rows)
        tensorboard.write(tmp_path, tmp_path / "out")
        return tmp_path / "out" / "a" / tensorboard.EVENTS

    path = history((10, "train", "loss", 2.0))
    node, first = path.stat().st_ino, path.read_bytes()
    path = history((10, "train", "loss", 2.0), (20, "train", "loss", 1.0))
    assert path.stat().st_ino == node, "an open file goes on"
    assert path.read_bytes() == tensorboard.events(
        [(10, "train/loss", 2.0), (20, "train/loss", 1.0)]
    )
    assert path.read_bytes().startswith(first)
    history((10, "train", "loss", 3.0))
    assert path.read_bytes() == tensorboard.events([(10, "train/loss", 3.0)])


def test_mistakes_are_one_sentence(tmp_path, capsys):
    assert main(["tensorboard", str(tmp_path)]) == 1
    assert "there is no training history; give the folder of a study" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "history.csv").write_text("a,b\n")
    assert main(["tensorboard", str(tmp_path)]) == 1
    assert "it must have the columns step, split, name, value" in capsys.readouterr().err
    (tmp_path / "runs" / "history.csv").unlink()
    (tmp_path / "state" / "a").mkdir(parents=True)
    (tmp_path / "state" / "a" / "resume.pt").write_bytes(b"half")
    assert main(["tensorboard", str(tmp_path)]) == 1
    assert "resume.pt: cannot be read" in capsys.readouterr().err


def test_a_state_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("owned").touch, ())

    (tmp_path / "state" / "a").mkdir(parents=True)
    torch.save({"history": Evil()}, tmp_path / "state" / "a" / "resume.pt")
    assert main(["tensorboard", str(tmp_path)]) == 1
    assert not (tmp_path / "owned").exists()
