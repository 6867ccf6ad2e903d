"""The workflow, run by `gdlib distill`: in a process of its own, of whose words some are told."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gdlib.config import own, parts
from gdlib.io.failures import DataError

EVERY = 30  # seconds between two looks at what a training says of itself
NOTHING = "there is nothing to do: all is made already"


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def command(out: Path, config: Path, cores: int | None) -> list[Any]:
    """Return the words that run the workflow in a folder."""
    home = parts.home()
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", home / "Snakefile"),
        *("--directory", out, "--configfile", config.resolve(), "--cores", cores or "all"),
    ]


def run(words: Sequence[Any], out: Path, start: float = 0, *, quiet: bool = False) -> list[str]:
    """Run Snakemake, keep what it says in a log, tell of it what people want to know unless it is
    `quiet`, and return it, line by line.

    What ends this command, Ctrl-C or `kill`, is passed on to Snakemake and its jobs, which save
    themselves: they are a group of their own, so that it comes to them once, and always.
    """
    log = out / "logs" / "distill.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        list(map(str, words)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(out, start, over), daemon=True)
    if not quiet:
        watch.start()
    lines: list[str] = []
    done = ""
    try:
        with _as_ctrl_c(), open(log, "w") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                lines.append(line.rstrip())
                if counted := re.match(r"(\d+ of \d+) steps \(", line):
                    done = f", {counted[1]} done"
                elif not quiet and (job := re.match(r"Job \d+: (.*)", line)):
                    say(f"[{_minutes(start)}{done}] {job[1]}")
                elif not quiet and "warning: " in line:
                    say(lines[-1])
            status = process.wait()
    except KeyboardInterrupt:
        say("stopping; what was trained so far is saved")
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise
    finally:
        over.set()
        process.stdout.close()
    if status:
        causes = list(dict.fromkeys(re.findall(r"gdlib: error: (.*)", "\n".join(lines))))
        cause = causes or [line for line in lines if line][-1:] or ["it said nothing"]
        raise DataError(f"{'; '.join(cause)} (all that was said is in {log})")
    return lines


@contextlib.contextmanager
def _as_ctrl_c() -> Iterator[None]:
    """Let `kill` and a terminal that is closed interrupt as Ctrl-C does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:  # `nohup` has it ignored
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plan(words: Sequence[Any], out: Path) -> None:
    """Say which jobs there are to do."""
    lines = run([*words, "--dry-run", "--quiet", "rules"], out, quiet=True)
    jobs = dict(line.split() for line in lines if re.fullmatch(r"\w+ +\d+", line))
    total = jobs.pop("total", 0)
    listed = ", ".join(f"{count} {name}" for name, count in jobs.items() if name != "all")
    say(f"{total} jobs would be run: {listed}" if jobs else NOTHING)


def _minutes(start: float) -> str:
    return f"{(time.monotonic() - start) / 60:.0f} min"


def _watch(out: Path, start: float, over: threading.Event) -> None:
    """From time to time, repeat how far trainings say they are."""
    said: set[str] = set()
    while not over.wait(EVERY):
        for log in sorted((out / "logs" / own.NAME / "train").rglob("*.log")):
            if time.time() - log.stat().st_mtime > 2 * EVERY:
                continue
            lines = [line for line in log.read_text().splitlines() if " steps after " in line]
            if lines and lines[-1] not in said:
                said.add(lines[-1])
                say(f"[{_minutes(start)}] {lines[-1]}")
