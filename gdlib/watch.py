"""What a study says while it runs: how far it is, what it is doing, how long it will still take;
and at its end, what came out.

Starts without numpy.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TextIO

# seconds that a job takes on one core of an AMD EPYC in float32, its start included; what is not
# here takes OTHER. They count until jobs of a kind have ended in this run.
SECONDS = {"train_teacher": 6.0, "train_student": 5.0, "profile": 5.0, "predict": 4.0}
OTHER = 2.0
PER_VOXEL = {"train_teacher": 1e-5, "train_student": 4e-6}  # seconds, of small networks
PATIENCE = 30.0  # seconds; how much these numbers count against what was measured
LENT = 2.0  # how much longer or shorter other kinds of jobs let one seem, at most


class Job(NamedTuple):
    """A job of a study.

    Attributes:
        title: what it does.
        kind: jobs of a kind take times that can be compared.
        voxels: seen in training, all steps together.
        cores: that it uses.
    """

    title: str
    kind: str
    voxels: int = 0
    cores: int = 1

    @property
    def guess(self) -> float:
        """How many seconds it will take, if nothing is known."""
        work = SECONDS.get(self.kind, OTHER) + PER_VOXEL.get(self.kind, 0.0) * self.voxels
        return work / self.cores


class Watch(logging.Handler):
    """Listens to the log of Snakemake and says from time to time how far it is.

    Args:
        jobs: all that are to be done, by Snakemake's number.
        done: is the job of this number done?
        cores: for all of them; None on a cluster, where nobody knows how many there will be.
        quiet: of failures Snakemake says nothing; then this does.
        out: where lines go.
    """

    def __init__(
        self,
        jobs: Mapping[int, Job],
        done: Callable[[int], bool],
        cores: int | None,
        quiet: bool = False,
        out: TextIO | None = None,
    ) -> None:
        super().__init__()
        self.jobs, self.done, self.cores = dict(jobs), done, cores
        self.quiet, self.out = quiet, out or sys.stderr
        self.begun = time.monotonic()
        self.running: dict[int, float] = {}  # since when
        self.took: dict[int, float] = {}  # of those that are done, seconds
        self.over = threading.Event()

    def start(self, title: str) -> None:
        """Say what is to be done, and then how far it is: every half, later every minute."""
        on = f" on {self.cores} core{'s' * (self.cores > 1)}" if self.cores else ""
        time_left = f": {in_words(self.left())}" if self.cores else ""
        self.say(f"{title}: {len(self.jobs)} steps{on}{time_left}")

        def tell() -> None:
            said = self.begun
            while not self.over.wait(1):  # Snakemake does not always say what has ended
                self.note()
                now = time.monotonic()
                if now - said >= (30 if now - self.begun < 600 else 60):
                    said = now
                    self.say(self.line())

        threading.Thread(target=tell, daemon=True).start()

    def stop(self) -> None:
        """Say no more."""
        self.over.set()

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of what has begun or failed."""
        event, now = str(getattr(record, "event", "")), time.monotonic()
        if event == "job_started":
            self.running |= dict.fromkeys(record.jobs, now)
        elif event == "job_error":
            self.running.pop(record.jobid, None)
            if self.quiet:
                said = "; ".join(_last_lines(getattr(record, "log", None) or []))
                self.say(f"failed: {self._title(record.jobid)}{': ' * bool(said)}{said}")

    def note(self) -> None:
        """Take note of what has ended."""
        for number in [number for number in list(self.running) if self.done(number)]:
            self.took[number] = time.monotonic() - self.running.pop(number)

    def line(self) -> str:
        """How far it is."""
        passed = int(time.monotonic() - self.begun)
        now = ", ".join(self._title(number) for number in list(self.running)[:3])
        more = f" and {len(self.running) - 3} more" if len(self.running) > 3 else ""
        done = f"{len(self.took)} of {len(self.jobs)} steps done"
        left = f", {in_words(self.left())} left" if self.cores else ""
        clock = f"{passed // 60}:{passed % 60:02d}"
        return f"{clock}  {done}{left}; now: {now or 'nothing'}{more}"

    def left(self) -> float:
        """How many seconds it will still take."""
        now = time.monotonic()
        rest = {}
        for number, job in self.jobs.items():
            if number not in self.took:
                whole = job.guess * self._factor(job.kind)
                gone = now - self.running.get(number, now)
                # what takes longer than it should will take some more
                rest[number] = max(whole - gone, gone / 5)
        work = sum(seconds * self.jobs[number].cores for number, seconds in rest.items())
        return max([work / (self.cores or 1), *rest.values()], default=0.0)

    def _factor(self, kind: str) -> float:
        """How much longer jobs of this kind take than guessed; where none has ended, all jobs."""
        own = [number for number in self.took if self.jobs[number].kind == kind]
        done = own or list(self.took)
        took, guessed = (sum(f(number) for number in done) for f in (self.took.get, self._guess))
        factor = (took + PATIENCE) / (guessed + PATIENCE)
        return factor if own else min(max(factor, 1 / LENT), LENT)

    def _guess(self, number: int) -> float:
        return self.jobs[number].guess

    def _title(self, number: int) -> str:
        return self.jobs[number].title if number in self.jobs else f"job {number}"

    def say(self, text: str) -> None:
        """Write a line."""
        print(text, file=self.out, flush=True)


def is_news(record: logging.LogRecord) -> bool:
    """Is this more than that a job begins, or has failed, which a `Watch` says shorter?"""
    begins = str(getattr(record, "event", "")) == "job_started"
    failed = getattr(record, "exception", None) == "RuleException"
    return not (begins or failed or record.getMessage().startswith("Select jobs to execute"))


def in_words(seconds: float) -> str:
    """Say about how long it is.

    >>> in_words(20), in_words(80), in_words(200), in_words(9000)
    ('less than a minute', 'about a minute', 'about 3 minutes', 'about 2.5 hours')
    """
    minutes = seconds / 60
    if minutes < 0.75:
        return "less than a minute"
    if minutes < 90:
        return f"about {round(minutes)} minutes" if minutes >= 1.5 else "about a minute"
    return f"about {minutes / 60:.1f} hours"


def aligned(markdown: str) -> str:
    r"""Return Markdown with the columns of its tables below each other, as on paper.

    >>> print(aligned("| a | long |\n| --- | ---: |\n| longer | 1 |"))
    | a      | long |
    | ------ | ---: |
    | longer |    1 |
    """
    out: list[str] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            out.append(line)
            continue
        table = [row.strip("|").split("|") for row in _pop_table(out)]
        if table:
            out += _columns([[cell.strip().replace("\\*", "*") for cell in row] for row in table])
        out.append(line)
    return "\n".join(out[:-1])


def _pop_table(lines: list[str]) -> list[str]:
    """Take the lines of a table off the end."""
    count = next(
        (k for k, line in enumerate(reversed(lines)) if not line.startswith("|")), len(lines)
    )
    table = lines[len(lines) - count :]
    del lines[len(lines) - count :]
    return table


def _columns(rows: list[list[str]]) -> Iterable[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    right = [cell.endswith(":") for cell in rows[1]]
    for number, row in enumerate(rows):
        cells = zip(row, widths, right, strict=True)
        if number == 1:
            padded = ["-" * (width - flush) + ":" * flush for _, width, flush in cells]
        else:
            padded = [
                cell.rjust(width) if flush else cell.ljust(width) for cell, width, flush in cells
            ]
        yield f"| {' | '.join(padded)} |"


def _last_lines(logs: Iterable[str]) -> Iterable[str]:
    for path in logs:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read().split("\n")
        except OSError:
            yield f"there is no {path}"
            continue
        text = next((line for line in reversed(lines) if line.strip()), "")
        yield f"{path} ends with: {text}" if text else f"{path} is empty"
