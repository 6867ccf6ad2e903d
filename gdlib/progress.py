"""How far a long job is: a bar on a terminal; in a log, a line from time to time."""

import io
import sys
import threading
from typing import Any

from tqdm import tqdm

EVERY = 30  # seconds between two lines of a log; a job that is shorter has none
LINE = (
    "{desc}: {n_fmt} of {total_fmt} {unit}s after {elapsed}, {remaining} left, {rate_fmt}{postfix}"
)


class Bar(tqdm):
    """A `tqdm` that does not settle how the program starts processes, as the lock of `tqdm`, which
    is for them too, does.
    """

    _lock = threading.RLock()


class Progress(Bar):
    """A bar that suits log files too, where a bar would be one endless line.

    Args:
        iterable: as for `tqdm`.
        options: of `tqdm`.
    """

    def __init__(self, iterable: Any = None, **options: Any) -> None:
        self.logs = not sys.stderr.isatty()
        self.said = (-1, 0.0)  # where it was, and after how many seconds, in the last line
        if self.logs:  # the sink takes what `tqdm` writes to move a cursor
            options |= {
                "file": io.StringIO(),
                "mininterval": EVERY,
                "maxinterval": EVERY,
                "miniters": 1,
                "bar_format": LINE,
            }
        super().__init__(iterable, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show how far it is."""
        if not self.logs:
            return super().display(msg, pos)
        elapsed = self.format_dict["elapsed"]
        due = elapsed - self.said[1] >= EVERY or (self.n == self.total and elapsed >= EVERY)
        if msg is None and due and self.n != self.said[0]:
            self.said = (self.n, elapsed)
            self.say(str(self).lstrip(": "))
        return True

    def say(self, text: str) -> None:
        """Write a line of its own."""
        if self.disable:
            return
        if self.logs:
            print(text, file=sys.stderr, flush=True)
        else:
            self.write(text, file=sys.stderr)
