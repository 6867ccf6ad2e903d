"""Long jobs: a bar on a terminal, lines in a log."""

import io
import sys

import pytest

from gdlib import progress
from gdlib.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that stands still until it is told the time."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_log_gets_whole_lines_from_time_to_time(clock, capsys):
    with Progress(total=100, unit="step", desc="tiny/grd/seed0") as bar:
        for _ in range(10):
            clock[0] += progress.EVERY / 5
            bar.update(10)
            bar.set_postfix(loss="0.5")  # which shows it, too
        bar.say("step 100: validation aji 0.7")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "tiny/grd/seed0: 50 of 100 steps after 00:30, 00:30 left,  1.67step/s, loss=0.5"
    )
    assert [line.split(" after")[0] for line in lines[:2]] == [
        f"tiny/grd/seed0: {n} of 100 steps" for n in (50, 100)
    ]
    assert lines[2:] == ["step 100: validation aji 0.7"]


def test_what_goes_on_says_where_it_is(clock, capsys):
    with Progress(total=10, initial=4, unit="block") as bar:
        clock[0] += 60
        bar.update(3)
    assert capsys.readouterr().err == "7 of 10 blocks after 01:00, 01:00 left, 20.00s/block\n"


def test_a_short_job_says_nothing(clock, capsys):
    assert list(Progress(range(5), leave=False)) == list(range(5))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(total=2, mininterval=0) as bar:
        bar.say("a word")
        bar.update(2)
    assert "\r" in screen.getvalue()
    assert "a word\n" in screen.getvalue()
    assert "100%|" in screen.getvalue()
