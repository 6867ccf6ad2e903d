"""The C++ of this package, compiled at first use for the processor it runs on, and kept in the user's cache.

Nothing needs it: without a compiler, what calls it computes the same more slowly.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gdlib import io

FLAGS = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"]


@functools.cache
def library(name: str, about: str) -> ctypes.CDLL | None:
    """Load the functions of a C++ file beside this one.

    Args:
        name: of the file, without its ending.
        about: what they do, for the line that says that it is done without them.

    Returns:
        None where they cannot be had; `GDLIB_NATIVE=0` does without.
    """
    if os.environ.get("GDLIB_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled(Path(__file__).with_name(f"{name}.cpp"))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0]
        print(f"gdlib: {about} without compiled code, more slowly ({reason})", file=sys.stderr, flush=True)
        return None


def _compiled(source: Path) -> Path:
    """Return the library of a file, made if it is not in the cache.

    Its name is a digest of the source and of what the compiler says of itself and of this processor, so that machines of
    several kinds can share a cache. Two processes that make it at once both move a whole file to the same place.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    ]
    if compiler == [None]:
        raise RuntimeError("there is no C++ compiler")
    about = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    digest = hashlib.sha256(source.read_bytes() + about + repr(FLAGS).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = folder / "gdlib" / f"{source.stem}-{digest}.so"
    if not path.exists():
        with io.atomic(path) as temporary:
            command = [*compiler, *FLAGS, str(source), "-o", str(temporary)]
            try:
                _run([*command, "-fopenmp"])
            except subprocess.CalledProcessError:  # as on macOS: vectors, but one thread
                _run([*command, "-fopenmp-simd"])
    return path


def _run(command: Sequence[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=300).stdout
