"""What the command line does to its own process.

A program that uses gdlib as a library is left as it is.
"""

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator


def keep_memory() -> None:
    """Let this process keep memory that is freed, for the next step, where the C library is glibc.

    By default it returns large maps to the system and gets them back page by page, filled with
    zeros; a step of a small network on a CPU takes up to a fifth longer (Intel Xeon with AMX,
    bfloat16). There is no way back.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
            libc.mallopt(option, value)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Take note of SIGTERM instead of ending at once, so that it never interrupts a step or a
    write.

    Yields:
        A function that says whether it came.
    """
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
