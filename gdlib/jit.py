"""Functions that Numba compiles for this processor at their first call, and keeps in a cache.

A `kernel` is called from Python, a `part` from kernels alone, and an `inlined` one becomes part of
its caller. What was compiled is a file in `NUMBA_CACHE_DIR`, else in the folder `gdlib` of the
user's cache; where that cannot be written, every process compiles anew. With `NUMBA_DISABLE_JIT=1`
nothing is compiled, and what would be is done by torch or bioimage-cpp, more slowly.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import itertools
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core import event
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from gdlib import devices, io

PARTS = 4  # of the lines, for each thread: one that is late has fewer of them
ENABLED = not numba.config.DISABLE_JIT
part = numba.njit
inlined = numba.njit(inline="always")


def kernel(function: Callable, **options: Any) -> Callable:
    """Compile what Python calls with arrays and numbers; its other threads go on meanwhile."""
    dispatcher = numba.njit(nogil=True, **options)(function)
    if ENABLED:  # else it is the function itself
        dispatcher._cache = _Cache(function)
    return dispatcher


# Sums may be made in another order than it is written: of many numbers at once.
summing_kernel = functools.partial(kernel, fastmath={"reassoc", "nsz"})


def without_blas() -> None:
    """Keep Numba from looking for BLAS in SciPy when it gets ready: that takes a tenth of a second,
    and no kernel here needs it. `np.convolve` in kernels of others in this process would be
    compiled in another way, so this is for programs of our own.
    """
    from numba.np import linalg

    def nothing() -> None:
        raise ImportError

    look, linalg.ensure_blas = linalg.ensure_blas, nothing
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        linalg.ensure_blas = look


def as_triples(offsets: Sequence[Sequence[int]], ndim: int) -> np.ndarray:
    """Return offsets as (K, 3)."""
    if any(len(offset) != ndim for offset in offsets):
        raise ValueError(f"offsets {list(map(list, offsets))} do not fit images with {ndim} axes")
    padded = [(0,) * (3 - ndim) + tuple(offset) for offset in offsets]
    return np.array(padded, np.int64).reshape(-1, 3)


@inlined
def place(line, depth, height):
    """Return image, y and z of a line.

    Lines at one y follow each other: as neighbours of each other they may be in the cache still.
    """
    return line // depth // height, line // depth % height, line % depth


def on_lines(kernel: Callable, lines: int, *arguments: Any) -> None:
    """Call kernel(first, last, *arguments) for parts of the lines that together are all of them."""
    threads = devices.threads()
    if threads == 1 or lines == 1:
        return kernel(0, lines, *arguments)
    parts = min(lines, PARTS * threads)
    edges = [lines * part // parts for part in range(parts + 1)] if parts else []
    pool = _pool(threads)
    for done in [pool.submit(kernel, *pair, *arguments) for pair in itertools.pairwise(edges)]:
        done.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "gdlib")


if hasattr(os, "register_at_fork"):  # threads are not there any more
    os.register_at_fork(after_in_child=_pool.cache_clear)


class _Cache(NullCache):
    """One file for each kernel and types of arguments, named by all that it depends on.

    Numba's own cache keeps an index of such files, in which two processes that compile for other
    types at once can each put the number of the other's file.
    """

    def __init__(self, function: Callable) -> None:
        folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.folder = Path(os.environ.get("NUMBA_CACHE_DIR") or os.path.join(folder, "gdlib"))
        self.function = function

    def load_overload(self, sig, target_context):
        target_context.refresh()
        try:
            data = pickle.loads(self._path(sig, target_context.codegen()).read_bytes())
            return CompileResult._rebuild(target_context, *data)
        except Exception:  # it is not there, or damaged: it is compiled again
            return None

    def save_overload(self, sig, cres):
        # Where it cannot be written, the next process compiles again.
        with contextlib.suppress(OSError), io.atomic(self._path(sig, cres.codegen)) as temporary:
            temporary.write_bytes(dumps(cres._reduce()))

    def _path(self, sig, codegen) -> Path:
        processor, versions = codegen.magic_tuple(), (numba.__version__, sys.version)
        sources = [Path(inspect.getfile(one)).read_bytes() for one in (self.function, kernel)]
        about = repr((self.function.__qualname__, str(sig), processor, versions, sources))
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        return self.folder / f"{self.function.__name__}-{digest}.numba"


class _Announcer(event.Listener):
    """Says why nothing happens for some seconds, once in a process."""

    TEXT = "gdlib: compiling for this processor, once (about 10 s)"
    said = False

    def on_start(self, event):
        if not self.said and event.data["dispatcher"].py_func.__module__.startswith("gdlib."):
            self.said = True
            print(self.TEXT, file=sys.stderr, flush=True)

    def on_end(self, event):
        pass


event.register("numba:compile", _Announcer())
