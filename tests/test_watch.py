"""What a study says while it runs."""

import io
import logging
import random

import pytest

from gdlib import watch
from gdlib.watch import Job, Watch, aligned, in_words


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


def record(event, **about):
    made = logging.LogRecord("snakemake", logging.INFO, "", 0, "", (), None)
    made.__dict__.update(event=event, **about)
    return made


def test_the_time_left_is_that_of_a_study_whose_jobs_take_longer_than_thought(clock):
    """Two cores, 40 jobs of a kind that take three times the guess: after half it is known."""
    done = set()
    watched = Watch({k: Job(f"Do {k}", "predict") for k in range(40)}, done.__contains__, 2)
    guess, true = 4.0, 12.0
    assert watched.left() == pytest.approx(40 * guess / 2)
    for k in range(0, 40, 2):
        watched.emit(record("job_started", jobs=[k, k + 1]))
        clock.now += true
        done |= {k, k + 1}
        watched.note()
        left = (40 - len(done)) * true / 2
        if len(done) >= 20:
            assert watched.left() == pytest.approx(left, rel=0.2)
    assert watched.left() == 0


def test_what_runs_longer_than_thought_takes_longer_still(clock):
    watched = Watch({0: Job("Do", "train_teacher", voxels=1_000_000)}, lambda number: False, 2)
    watched.emit(record("job_started", jobs=[0]))
    assert watched.left() == pytest.approx(16)
    clock.now += 10
    assert watched.left() == pytest.approx(6)
    clock.now += 90
    assert watched.left() == pytest.approx(20)


def test_other_kinds_of_jobs_say_little_of_a_training(clock):
    done = set()
    jobs = {0: Job("Ask", "ask_teacher"), 1: Job("Train", "train_student", voxels=100_000_000)}
    watched = Watch(jobs, done.__contains__, 1)
    training = jobs[1].guess
    watched.emit(record("job_started", jobs=[0]))
    clock.now += 300  # of a guess of two seconds
    done.add(0)
    watched.note()
    assert watched.left() == pytest.approx(2 * training)


def test_one_long_job_is_not_shared_among_cores(clock):
    jobs = {0: Job("Train", "train_student", voxels=10_000_000)} | {
        k: Job("Do", "x") for k in (1, 2)
    }
    assert Watch(jobs, lambda number: False, 8).left() == pytest.approx(45)


def test_the_line(clock):
    out, done = io.StringIO(), set()
    jobs = {k: Job(f"Do {k}", "predict") for k in range(6)}
    watched = Watch(jobs, done.__contains__, 4, out=out)
    watched.emit(record("job_started", jobs=[0, 1, 2, 3]))
    assert (
        watched.line()
        == "0:00  0 of 6 steps done, less than a minute left; now: Do 0, Do 1, Do 2 and 1 more"
    )
    done |= {0, 1, 2, 3}
    clock.now += 75
    watched.note()
    watched.emit(record("job_started", jobs=[99]))  # one that a checkpoint made
    assert watched.line() == "1:15  4 of 6 steps done, less than a minute left; now: job 99"
    watched = Watch(jobs, done.__contains__, None, out=out)
    assert watched.line() == "0:00  0 of 6 steps done; now: nothing"


def test_where_snakemake_is_quiet_it_does_not_say_what_a_watch_says():
    begun = record("job_started", jobs=[1])
    select = logging.LogRecord(
        "snakemake", logging.INFO, "", 0, "Select jobs to execute...", (), None
    )
    failed = record("error", exception="RuleException")
    error = logging.LogRecord("snakemake", logging.ERROR, "", 0, "Error", (), None)
    news = [watch.is_news(one) for one in (begun, select, failed, error)]
    assert news == [False, False, False, True]


def test_a_failure_is_told_where_snakemake_is_quiet(tmp_path):
    (tmp_path / "a.log").write_text("1 of 2\ngdlib: error: the disk is full\n\n")
    failed = record(
        "job_error", jobid=0, log=[str(tmp_path / "a.log"), str(tmp_path / "missing.log")]
    )
    for quiet in (False, True):
        out = io.StringIO()
        watched = Watch({0: Job("Predict a", "predict")}, lambda number: False, 1, quiet, out)
        watched.emit(record("job_started", jobs=[0]))
        watched.emit(failed)
        assert not watched.running
        said = (
            f"failed: Predict a: {tmp_path}/a.log ends with: gdlib: error: the disk is full; "
            f"there is no {tmp_path}/missing.log\n"
        )
        assert out.getvalue() == said * quiet


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "less than a minute"),
        (44, "less than a minute"),
        (46, "about a minute"),
        (89, "about a minute"),
        (91, "about 2 minutes"),
        (5 * 60, "about 5 minutes"),
        (95 * 60, "about 1.6 hours"),
    ],
)
def test_in_words(seconds, words):
    assert in_words(seconds) == words


def test_aligned_changes_nothing_but_spaces():
    rng = random.Random(0)
    for _ in range(20):
        columns, rows = rng.randint(1, 5), rng.randint(0, 4)
        cells = [["x" * rng.randint(0, 9) for _ in range(columns)] for _ in range(rows + 1)]
        cells.insert(1, [rng.choice(["---", "---:"]) for _ in range(columns)])
        text = "\n".join(
            ["Before.", "", *(f"| {' | '.join(row)} |" for row in cells), "", "After."]
        )
        lines = aligned(text).split("\n")
        assert (lines[:2], lines[-2:]) == (["Before.", ""], ["", "After."])
        assert len({len(line) for line in lines[2:-2]}) == 1
        found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:-2]]
        assert [row for k, row in enumerate(found) if k != 1] == [
            r for k, r in enumerate(cells) if k != 1
        ]
        assert [cell.endswith(":") for cell in found[1]] == [
            cell.endswith(":") for cell in cells[1]
        ]
