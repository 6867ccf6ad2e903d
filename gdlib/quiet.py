"""Libraries that print are silenced, and nothing of what others print meanwhile is lost."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

_PRINTING = threading.Lock()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Drop what is printed: by Python, and by compiled code, which knows the file descriptor
    alone.
    """
    with _PRINTING, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        printed = os.dup(1)
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(printed, 1)
            os.close(printed)


@contextlib.contextmanager
def aloud() -> Iterator[None]:
    """Wait until no other thread has silence, and let none have it before all is printed.

    If nobody reads on, as after `| head`, what is printed from now on is dropped: the work is worth
    more than its lines.
    """
    with _PRINTING:
        try:
            yield
            sys.stdout.flush()
        except BrokenPipeError:
            # what is still in its buffer must go somewhere, or it fails again when Python ends
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
