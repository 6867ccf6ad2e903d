"""Files that are complete or do not exist, whoever writes them; see `gdlib.io`."""

import contextlib
import functools
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from gdlib.io.failures import ACCESS, SPACE, writing
from gdlib.io.failures import WriteError as WriteError

PACKAGE = Path(__file__).parents[1]


def beside(path: Path, ending: str) -> Path:
    """Return a hidden name beside a path, with this ending and short enough for file systems."""
    name = os.fsencode(path.name)
    if len(name) > 254 - len(os.fsencode(ending)):
        return path.with_name(f".{hashlib.sha256(name).hexdigest()}{ending}")
    return path.with_name(f".{path.name}{ending}")


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it there only when the block ends without an
    error.

    Raises:
        WriteError: there is no space, or the folder cannot be written.
    """
    path = Path(path)
    temporary = beside(path, f".{platform.node()}.{os.getpid()}.tmp")
    with writing(path, SPACE | ACCESS):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(temporary)
        temporary.touch()
        mode = temporary.stat().st_mode
        temporary.unlink()
    try:
        with writing(path):
            yield temporary
            temporary.chmod(mode)  # safetensors writes for nobody but its owner
            with open(temporary, "rb+") as file:
                # else the name might be there after a power failure, and its content not
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a new folder beside `path`, to be filled, that takes its place, and that of what is
    there, only when the block ends without an error.

    Raises:
        WriteError: there is no space, or the folder around it cannot be written.
    """
    path = Path(path)
    ending = f"{platform.node()}.{os.getpid()}.tmp"
    temporary, before = beside(path, f".{ending}"), beside(path, f".before.{ending}")
    with writing(path, SPACE | ACCESS):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(temporary)
        _remove_leftovers(before)
        temporary.mkdir()
    try:
        with writing(path):
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    with open(Path(folder, name), "rb+") as file:
                        os.fsync(file.fileno())  # as in `atomic`
            if path.exists():  # no folder takes the place of another in one step everywhere
                os.rename(path, before)
            os.rename(temporary, path)
    finally:
        if before.exists() and not path.exists():
            os.rename(before, path)
        for folder in (temporary, before):
            shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(temporary: Path) -> None:
    """Remove files and folders that are called like a temporary one, whose writers were killed on
    this machine.
    """
    for file in _unfinished(temporary.parent):
        name, process, _ = file.name.rsplit(".", 2)
        if (
            name == temporary.name.rsplit(".", 2)[0]
            and process.isdecimal()
            and not _is_running(int(process))
        ):
            shutil.rmtree(file, True) if file.is_dir() else file.unlink(missing_ok=True)


@functools.lru_cache(maxsize=64)
def _unfinished(folder: Path) -> list[Path]:
    """Return what writers were at work on, or had left, when this process first wrote into a
    folder.

    Looked for once: with every file, it would take longer the more files there are.
    """
    return list(folder.glob(".*.tmp"))


def _is_running(process: int) -> bool:
    if os.name != "posix":  # there the question would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_sha256(folder: Path | str = PACKAGE) -> str:
    """Return one SHA-256 of names and content of all Python files of gdlib: what was computed with
    other code is another thing, also where there is no repository.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()
