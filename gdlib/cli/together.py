"""Several images at the same time: each has a thread, and all share the memory."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from gdlib.devices import use_threads


class Room:
    """The memory that images share.

    Args:
        size: bytes, None without a limit.
    """

    def __init__(self, size: int | None) -> None:
        self._free = 2**62 if size is None else size
        self._users = 0
        self._closed = False
        self._change = threading.Condition()

    @contextlib.contextmanager
    def taken(self, need: int) -> Iterator[None]:
        """Wait for so many bytes, and have them; who is alone has as many as it needs."""
        with self._change:
            self._change.wait_for(
                lambda: not self._closed and (need <= self._free or not self._users)
            )
            self._free -= need
            self._users += 1
        try:
            yield
        finally:
            with self._change:
                self._free += need
                self._users -= 1
                self._change.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let nobody have any more, wait until nobody has any, and have all; for one thread."""
        try:
            with self._change:
                self._closed = True
                self._change.wait_for(lambda: not self._users)
            yield
        finally:
            with self._change:
                self._closed = False
                self._change.notify_all()


@contextlib.contextmanager
def workers(count: int, threads: int) -> Iterator[ThreadPoolExecutor]:
    """Start some threads, each of which computes with so many; on an error, what is not
    begun is dropped.
    """
    pool = ThreadPoolExecutor(count, initializer=use_threads, initargs=(threads,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
