"""What goes wrong on real machines, done to a real study: afterwards it ends as if nothing had
happened.

`make test-faults`; minutes. GDLIB_FAULTS_SEED chooses other moments (default 0),
GDLIB_FAULTS_ROUNDS more of them (default 1).
"""

import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from study import (
    DATA,
    RUNS,
    STUDENT,
    STUDY,
    TEACHER,
    TEACHING,
    Running,
    Study,
    assert_same_end,
    assert_whole,
    flip,
    middle_of,
)

from gdlib import io

SUMMARY = "results/faults/summary.csv"
TEACHER_WEIGHTS = f"{RUNS}/{TEACHER}/teacher/seed0/weights.safetensors"
STATE = f"results/faults/state/{TEACHING}/resume.pt"


def unfinished(study: Study) -> bool:
    """Tell whether some file is being written."""
    return any(name.endswith((".tmp", ".partial")) for name in study.hidden())


def test_kill_9_at_random_moments_of_every_rule(fresh, reference):
    """All processes at once, again and again, in every rule of the study: at any moment, or while a
    file is written."""
    rng = random.Random(int(os.environ.get("GDLIB_FAULTS_SEED", "0")))
    jobs = reference.jobs(reference.output)
    rules = list(dict.fromkeys(rule for rule, _ in jobs.values()))
    assert {
        "prepare",
        "train_teacher",
        "ask_teacher",
        "train_student",
        "predict",
        "segment",
    } <= set(rules)
    assert {"evaluate", "profile", "summarize", "figure_panel"} <= set(rules)
    reached = dict.fromkeys(rules, 0)
    for rule in rules * int(os.environ.get("GDLIB_FAULTS_ROUNDS", "1")):
        lines = [f": {message}\n" for message, (name, _) in jobs.items() if name == rule]
        longest = max(seconds for name, seconds in jobs.values() if name == rule)
        if fresh.locked():
            assert fresh.run(options=("--unlock",))[0] == 0
        # it may be done by now: jobs run side by side
        with Running(fresh, options=("--forcerun", rule)) as running:
            if running.wait_until(
                lambda lines=lines: any(line in running.output for line in lines)
            ):
                moment, while_writing = rng.uniform(0, 1.1 * longest), rng.random() < 0.5
                running.wait_until(lambda w=while_writing: w and unfinished(fresh), moment)
                reached[rule] += running.process.poll() is None
            running.kill()
        assert_whole(fresh, reference)
    # in others the moment came too late
    assert sum(map(bool, reached.values())) > len(rules) / 2, reached
    fresh.finish()
    assert_same_end(fresh, reference)


@pytest.fixture
def small_disk(tmp_path):
    """Return the folder of a file system of 100 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("to mount a small file system takes rights that this user does not have")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk, repository, reference):
    """Again and again some space is left.

    Each time it runs out, more is made and the same command given again.
    """
    rng = random.Random(int(os.environ.get("GDLIB_FAULTS_SEED", "0")))
    study, filler = Study(repository, small_disk / "study"), small_disk / "filler"
    failed, told = 0, []
    for _ in range(10 * int(os.environ.get("GDLIB_FAULTS_ROUNDS", "1"))):
        room = int(10 ** rng.uniform(4.5, 7.7))
        with open(filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - room)
        status, output = study.run()
        failed += status != 0
        told += re.findall(
            r"^gdlib: error: (\S+): cannot be written \(no space left on device\); free some",
            output,
            re.M,
        )
        assert_whole(study, reference)
        filler.unlink()
        if study.locked():
            assert study.run(options=("--unlock",))[0] == 0
    assert failed > 3
    assert told  # where it is not Snakemake itself that lacks the space
    assert all(not Path(name).name.startswith(".") for name in told)
    study.finish()
    assert_same_end(study, reference)


DAMAGE = {
    "samples cut off": (
        f"data/{DATA}/train.h5", lambda path: path.write_bytes(path.read_bytes()[:-5000]), "not a readable " "HDF5 file",
        TEACHER_WEIGHTS,
    ),
    "a bit of the samples": (
        f"data/{DATA}/test.h5", lambda path: flip(path, middle_of(path, "image")), "is damaged",
        f"{RUNS}/{STUDENT}/grd/seed0/predictions.h5",
    ),
    "a bit of the teacher": (
        TEACHER_WEIGHTS, lambda path: flip(path, path.stat().st_size - 1000), "it is damaged",
        f"results/faults/maps/{DATA}/{TEACHER}/embedding.h5",
    ),
    "a bit of the maps": (
        f"results/faults/maps/{DATA}/{TEACHER}/embedding.h5", lambda path: flip(path, middle_of(path, "embedding")), "is damaged",
        f"{RUNS}/{STUDENT}/grd/seed0/weights.safetensors",
    ),
    "a bit of the predictions": (
        f"{RUNS}/{STUDENT}/none/seed0/predictions.h5", lambda path: flip(path, middle_of(path, "affinity")), "is damaged",
        f"{RUNS}/{STUDENT}/none/seed0/mutex_watershed/segmentation.h5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file(what, finished, reference):
    """Nothing is made of it; the message says what to delete, and with that the study ends as it
    would have."""
    name, spoil, cause, made_of_it = DAMAGE[what]
    spoil(finished.folder / name)
    (finished.folder / made_of_it).unlink()
    status, output = finished.run(SUMMARY)
    assert status != 0
    told = [line for line in output.splitlines() if line.startswith(f"gdlib: error: {name}: ")]
    assert told, output
    assert cause in told[0]
    assert "delete" in told[0]
    assert "make it again" in told[0]
    assert not (finished.folder / made_of_it).exists()
    (finished.folder / name).unlink()
    # By name: Snakemake misses nothing of which all that is made is there.
    finished.finish(*sorted(reference.exact().keys() - finished.exact().keys()))
    finished.finish()
    assert_same_end(finished, reference)


def test_a_damaged_image_of_ones_own(fresh):
    """The same for what no rule can make again: all about the image is told, and nothing is
    prepared of the others."""
    for kind in ("images", "labels"):
        (fresh.folder / "raw" / "mine" / kind).mkdir(parents=True)
        for i in range(10):
            array = np.zeros((40, 40), np.uint8)
            array[4:14, 5:15], array[20:36, 18 + i : 30 + i] = 1, 2
            if kind == "images":
                array = array * 90 + np.random.default_rng(i).integers(0, 30, (40, 40), np.uint8)
            Image.fromarray(array).save(fresh.folder / "raw" / "mine" / kind / f"{i}.png")
    mine = {"source": "folder", "folder": "mine", "offsets": [[-1, 0], [0, -1]], "patch": [32, 32]}
    study = STUDY["studies"]["faults"] | {"datasets": ["mine"]}
    overlay = STUDY | {
        "datasets": {"mine": mine},
        "studies": {"faults": study},
        "raw_folders": ["raw"],
    }
    (fresh.folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    image = fresh.folder / "raw" / "mine" / "images" / "3.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-200])
    status, output = fresh.run("data/mine/train.h5")
    assert status != 0
    assert any(
        line.startswith("gdlib: error:") and "3.png" in line and ";" in line
        for line in output.splitlines()
    ), output
    assert not list((fresh.folder / "data").rglob("*.h5"))
    image.write_bytes(whole)
    fresh.finish("data/mine/train.h5")
    assert len(io.sample_ids(fresh.folder / "data" / "mine" / "train.h5")) > 0


def interrupted(study: Study) -> str:
    """Stop the study by SIGTERM to all its processes while the teacher is trained, as a cluster
    does; return what it said."""
    with Running(study, TEACHER_WEIGHTS) as running:
        assert running.wait_until((study.folder / STATE).exists), running.output
        status = running.kill(signal.SIGTERM)
        output = running.output
    assert status != 0
    # of the log, which is shown when the training has saved itself
    assert "stopped after step" in output
    assert "the same command goes on from there" in output
    assert (study.folder / STATE).exists()
    assert not (study.folder / TEACHER_WEIGHTS).exists()
    assert not study.locked()
    return output


def test_sigterm_with_grace(fresh, reference):
    """A training saves itself and goes on."""
    interrupted(fresh)
    fresh.finish()
    assert "resumed after step" in fresh.log(f"train/{TEACHING}")
    assert not (fresh.folder / STATE).exists()
    assert_same_end(fresh, reference)


SPOIL = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3000]),
    "a bit": lambda path: flip(path, path.stat().st_size // 2),  # which torch would not notice
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("what", SPOIL)
def test_a_damaged_state(what, fresh, reference):
    """The training starts anew, and says why."""
    interrupted(fresh)
    SPOIL[what](fresh.folder / STATE)
    fresh.finish(TEACHER_WEIGHTS)
    log = fresh.log(f"train/{TEACHING}")
    assert f"{STATE}: cannot be read (" in log
    assert "training starts anew" in log
    assert fresh.exact()[TEACHER_WEIGHTS] == reference.exact()[TEACHER_WEIGHTS]


def test_a_stale_lock(finished, reference):
    """What a killed Snakemake leaves: the next says what to do, and changes nothing until it is
    done."""
    (finished.folder / SUMMARY).unlink()
    with Running(finished) as running:
        assert running.wait_until(lambda: ": Summarize the study" in running.output), running.output
        running.kill()
    assert finished.locked()
    status, output = finished.run()
    assert status != 0
    assert "--unlock" in output
    assert str(finished.folder) in output
    finished.finish()
    assert_same_end(finished, reference)


# which root alone needs
UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")


def closes(folder: Path, before: tuple[str, ...]) -> bool:
    """Tell whether a folder without the right to write is closed to a command."""
    folder.mkdir()
    folder.chmod(0o555)
    try:
        return (
            subprocess.run([*before, "touch", folder / "file"], capture_output=True).returncode != 0
        )
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("which", ["results/faults", "."])
def test_a_folder_that_cannot_be_written(which, finished, reference, tmp_path):
    """It is told before anything runs."""
    before = UNPRIVILEGED if os.geteuid() == 0 else ()
    if not closes(tmp_path / "closed", before):
        pytest.skip("this user may write everywhere, and there is no setpriv to give that up")
    (finished.folder / SUMMARY).unlink()
    if which == ".":
        shutil.rmtree(finished.folder / ".snakemake")
    folder = finished.folder / which
    folder.chmod(0o555)
    try:
        status, output = finished.run(SUMMARY, before=before)
    finally:
        folder.chmod(0o755)
    assert status != 0
    assert output.splitlines()[-1].startswith(
        f"{which}: this folder cannot be written; make it writable, or "
    )
    assert "Traceback" not in output
    finished.finish()
    assert_same_end(finished, reference)
