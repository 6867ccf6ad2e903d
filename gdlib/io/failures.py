"""What went wrong, in sentences: of many inputs some, or something that no other part of gdlib
explains.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

SPACE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EFBIG: "allow larger files (ulimit -f) and run the same command again",
}
ACCESS = {
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "make its folder writable, or choose another one"
    ),
    **dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR), "a file stands where a folder is wanted: choose another one"
    ),
    errno.ENAMETOOLONG: "choose a shorter name",
}
MENDS = {
    errno.ENOENT: "check its name and folder",
    errno.EISDIR: "name a file in it",
    errno.ENOTDIR: "a part of this path is a file; correct it",
    errno.ENAMETOOLONG: "shorten it",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EIO: "the disk or the network behind it failed; try again, or get the file from "
    "elsewhere",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "change who may read or write it, or choose another one",
    ),
}


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence that names file, cause and mend."""


class WriteError(OSError):
    """A file that cannot be written.

    The message is one sentence that names file, cause and mend.
    """

    def __str__(self) -> str:
        """Return the sentence."""
        return (
            f"{self.filename}: cannot be written ({self.strerror.lower()}); "
            f"{(SPACE | ACCESS)[self.errno]}"
        )


@contextlib.contextmanager
def writing(path: Path | str, causes: Iterable[int] = SPACE) -> Iterator[None]:
    """Turn what any library raises for want of space into a `WriteError` about `path`.

    Other errors pass.
    """
    try:
        yield
    except Exception as error:
        link: BaseException | None = error
        # torch tells it in the cause of its error, HDF5 and safetensors in their text
        while link is not None:
            found = re.search(r"\b(?:errno =|os error) (\d+)", str(link))
            number = getattr(link, "errno", None) or (int(found[1]) if found else None)
            if number in causes:
                raise WriteError(number, os.strerror(number), str(path)) from error
            link = link.__cause__ or link.__context__
        raise


def sentences(error: BaseException) -> list[str]:
    """Return what to tell the user of an error, a line each.

    Of a group, what it says of all comes last.
    """
    if isinstance(error, ExceptionGroup):
        return [line for one in error.exceptions for line in sentences(one)] + [error.message]
    text = " ".join(str(error).split())
    if is_lack_of_memory(error):
        text = (
            f"there was too little memory ({text or 'no more is known'}); give it more, or "
            "smaller images or blocks"
        )
    elif isinstance(error, OSError) and error.filename and not isinstance(error, WriteError):
        mend = MENDS.get(error.errno, "try again when that is mended")
        text = f"{error.filename}: {(error.strerror or type(error).__name__).lower()}; {mend}"
    return [text]


def is_lack_of_memory(error: BaseException) -> bool:
    """Does an error, of any library, say that there was not enough memory?"""
    said = isinstance(error, RuntimeError) and re.search(
        "bad_alloc|allocat|out of memory", str(error), re.IGNORECASE
    )
    return isinstance(error, MemoryError) or bool(said)


class Failures:
    """Lets a command go on with the rest where one of many inputs cannot be used, and tells all of
    them in the end.
    """

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    @contextlib.contextmanager
    def noted(self, kind: type[Exception] = DataError) -> Iterator[None]:
        """Keep an error of the input for later.

        Others, as of a full disk, would come again, and pass.
        """
        try:
            yield
        except kind as error:
            self.errors.append(error)

    def tell(self, count: int, what: str) -> None:
        """Raise what was noted, if anything.

        Args:
            count: how many inputs there were.
            what: in the plural, and what became of those that failed, e.g. `images could not be
                segmented`.

        Raises:
            DataError: the only input failed.
            ExceptionGroup: some failed.
        """
        if count == len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise ExceptionGroup(f"{len(self.errors)} of {count} {what}", self.errors)
