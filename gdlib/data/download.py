"""Download data sets from their official addresses: resumable, verified, polite, and all of a data
set or nothing.

Everything is fetched and unpacked in a hidden folder beside the final one, `raw/.<name>.download`,
and moved there when all of it has come and is verified: a folder of raw data is complete or does
not exist. `.download.json` in it says what was fetched. A transfer that breaks goes on where it
was, in the same call or in the next one, but only if the server says that its file is still the
same (HTTP `Range` with `If-Range`).
"""

import contextlib
import datetime
import email.utils
import errno
import http.client
import json
import os
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

from gdlib import __version__, io
from gdlib.io.failures import DataError
from gdlib.progress import Bar

RECORD = ".download.json"
HEADERS = {
    "User-Agent": f"gdlib/{__version__} (graph relation distillation; Python urllib)",
    "Accept-Encoding": "identity",
}
TIMEOUT = 60.0  # seconds without a byte after which a connection counts as broken
PATIENCE = 300.0  # seconds; a server that asks for a longer pause is left alone
CHUNK = 1 << 16  # bytes
# what a server says when it may be different next time
TRY_AGAIN = (408, 416, 425, 429, 500, 502, 503, 504)
# What goes wrong on the way; errors of the disk are not among them.
BROKEN = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
JUNK = ("__MACOSX", "Thumbs.db")  # which archivers leave in archives, as they do hidden files


class RemoteFile(Protocol):
    """A file to get; `gdlib.config.sections.RemoteFile` says what each means."""

    @property
    def url(self) -> str:
        """Address; its end is the name of the file."""

    @property
    def name(self) -> str:
        """Name of the file."""

    @property
    def sha256(self) -> str | None:
        """Checksum, if one is known."""

    @property
    def into(self) -> str | None:
        """Folder that the archive is unpacked into."""

    @property
    def inside(self) -> str:
        """Folder of the archive that alone is wanted."""


def download(
    files: Sequence[RemoteFile], folder: Path | str, *, attempts: int = 6, pause: float = 2.0
) -> bool:
    """Fetch the files of a data set one after the other into a new folder, and print a line about
    each.

    Args:
        files: where they are and how they are unpacked.
        folder: final place; if something is in it already, nothing is fetched and nothing changed.
        attempts: how often a transfer is tried in a row without a new byte.
        pause: seconds before the second attempt; doubled for every further one.

    Returns:
        Whether anything was fetched.

    Raises:
        DataError: when a file cannot be had or is not what it should be; what is in order is kept
            for the next call.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        _check_record(files, folder)
        return False
    staging = folder.with_name(f".{folder.name}.download")
    plan = json.dumps([file.model_dump(mode="json") for file in files])
    if not (staging / "plan.json").exists() or (staging / "plan.json").read_text() != plan:
        if staging.exists() and not any(
            path.name.lstrip(".").startswith("plan.json") for path in staging.iterdir()
        ):
            raise DataError(f"{staging}: this is in the way, and not from here; move it away")
        shutil.rmtree(staging, ignore_errors=True)  # of other files than these
        io.write_text(staging / "plan.json", plan)
    content, found = staging / "content", []
    for file in files:
        path = staging / file.name
        sha256 = (
            io.sha256(path)
            if path.exists()
            else fetch(file.url, path, file.sha256, attempts, pause)
        )
        found.append({"url": file.url, "bytes": path.stat().st_size, "sha256": sha256})
        known = (
            "as it must be" if file.sha256 else (f"with none to compare, so keep {folder / RECORD}")
        )
        print(f"{file.name}: {found[-1]['bytes']:,d} bytes, sha256 {sha256}, {known}", flush=True)
    shutil.rmtree(content, ignore_errors=True)  # of a call that was stopped while unpacking
    content.mkdir()
    for file in files:
        if file.into is not None:
            unpack(staging / file.name, content / file.into, inside=file.inside)
    for file in files:
        if file.into is None:
            (staging / file.name).replace(content / file.name)
    record = {"retrieved": datetime.datetime.now(datetime.UTC).date().isoformat(), "files": found}
    io.write_text(content / RECORD, json.dumps(record, indent=2) + "\n")
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()  # an empty one, which some systems do not rename to
    content.replace(folder)
    shutil.rmtree(staging)
    print(f"{folder}: complete")
    return True


def _check_record(files: Sequence[RemoteFile], folder: Path) -> None:
    record = folder / RECORD
    if not record.exists():
        print(
            f"{folder}: is already there, and not from here: nothing is downloaded; move it away "
            "to download it"
        )
        return
    known = json.loads(record.read_text())
    if [file["url"] for file in known["files"]] != [file.url for file in files]:
        raise DataError(
            f"{folder}: this was downloaded from other addresses; move it away to download it again"
        )
    print(f"{folder}: is already there, complete since {known['retrieved']}")


def fetch(
    url: str, path: Path, sha256: str | None = None, attempts: int = 6, pause: float = 2.0
) -> str:
    """Fetch one file; `path` exists when all of it has come and its checksum is right, and not
    before.

    Args:
        url: `http://` or `https://`; a secure address is never left for one that is not.
        path: the file; until it is complete, what has come is in `path.part` beside it.
        sha256: expected checksum, hexadecimal; None if nobody knows it.
        attempts: how often in a row without a new byte.
        pause: seconds before the second attempt, doubled for every further one, unless the server
            names another time.

    Returns:
        The checksum of the file.

    Raises:
        DataError: if the file is not there, the server does not recover, or the checksum is wrong.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(path)
    _complete(url, part, attempts, pause)
    found = io.sha256(part.path)
    if sha256 is not None and found != sha256:
        part.remove()
        raise DataError(
            f"{url}: the file has the sha256 {found}, but it must be {sha256}; it was deleted: run "
            "the command again, and if that does not help, the file has changed at its source"
        )
    part.path.replace(path)
    part.remove()
    return found


def _complete(url: str, part: "_Part", attempts: int, pause: float) -> None:
    """Ask until all of a file is there."""
    failures, most = 0, part.size
    while True:
        wait = None
        try:
            return _transfer(url, part)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in TRY_AGAIN:
                raise DataError(
                    f"{url}: the server says {error.code} {error.reason}; find the file's new "
                    "address and write it into `download` of the dataset"
                ) from None
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{part.size}":
                return None  # stopped between the last byte and here
            if error.code == 416:
                part.remove()  # it is longer than the file
            reason, wait = f"{error.code} {error.reason}", _retry_after(error.headers)
        except BROKEN as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        failures = 1 if part.size > most else failures + 1
        most = max(most, part.size)
        wait = pause * 2 ** (failures - 1) if wait is None else wait
        if failures >= attempts or wait > PATIENCE:
            pleased = f", come back in {wait:.0f} s" if wait > PATIENCE else ""
            raise DataError(
                f"{url}: the transfer failed ({reason}{pleased}); run the command again later, it "
                "goes on from there"
            )
        time.sleep(wait)


class _Part:
    """An incomplete file, and what the server said of the file that it is a part of."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f"{path.name}.part")
        self.notes = path.with_name(f"{path.name}.part.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def validator(self) -> str | None:
        """What tells this version of the file from another one; without it, a part is of no use."""
        return (
            json.loads(self.notes.read_text())["validator"]
            if self.size and self.notes.exists()
            else None
        )

    def note(self, headers: http.client.HTTPMessage) -> None:
        """Remember which version of the file begins here."""
        tag = headers.get("ETag")
        validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
        io.write_text(self.notes, json.dumps({"validator": validator}))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to another address, but at no step from a secure one to one that is not, and
    only within the web.
    """

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        secure = req.full_url.startswith("https:")
        if not newurl.startswith("https:") and (secure or not newurl.startswith("http:")):
            raise DataError(
                f"{req.full_url}: the server leads to {newurl}, which is not secure; "
                "correct the address"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, part: _Part) -> None:
    """Ask once, and write what comes to the end of the part.

    An error if the server stops before the end of the file.
    """
    headers, start = dict(HEADERS), 0
    if (validator := part.validator) is not None:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": validator}
    opener = urllib.request.build_opener(_Redirects)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as reply:
        if reply.status == 206 and reply.headers.get("Content-Range", "").startswith(
            f"bytes {part.size}-"
        ):
            start = part.size
        # all of it: it was never asked for less, or it is another version, or the server cannot do
        # less
        else:
            part.remove()
            part.note(reply.headers)
        length = reply.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with (
            io.writing(part.path),
            open(part.path, "ab") as file,
            _progress(part, start, total) as bar,
        ):
            while chunk := reply.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.size != total:
        raise http.client.IncompleteRead(b"", total - part.size)


def _progress(part: _Part, start: int, total: int | None) -> Bar:
    title = part.path.name.removesuffix(".part")
    return Bar(
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        desc=title,
        disable=None,
        leave=False,
        mininterval=1,
    )


def _retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Return how many seconds the server asks to wait, given as a number or a date.

    None if it does not.
    """
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    with contextlib.suppress(ValueError):
        then = email.utils.parsedate_to_datetime(text)
        return max(0.0, (then - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None


def unpack(archive: Path, folder: Path, inside: str = "") -> None:
    """Unpack a zip archive, checking every member's CRC.

    Hidden files and what archivers leave behind stay out.

    Args:
        archive: the file; it is deleted if it is broken, so that the next call fetches it again.
        folder: where to; files that are there stay.
        inside: only what is below this folder of the archive, and without it.

    Raises:
        DataError: for a broken archive, and for one with a member that is a link or would leave the
            folder.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = list(_members(archive, file, PurePosixPath(inside)))
            folder.mkdir(parents=True, exist_ok=True)
            if sum(member.file_size for member, _ in members) > shutil.disk_usage(folder).free:
                raise io.WriteError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            for member, name in members:
                target = folder / name
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with io.writing(target), file.open(member) as source, open(target, "xb") as out:
                        shutil.copyfileobj(source, out)
                except (FileExistsError, NotADirectoryError):
                    raise DataError(
                        f"{archive}: {name} is there twice; unpack the archive by hand"
                    ) from None
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        archive.unlink()
        raise DataError(
            f"{archive}: this is not a whole zip archive ({error}); it was deleted: run the "
            "command again"
        ) from error
    if not members:
        raise DataError(
            f'{archive}: there is no file below "{inside or "."}" in it; correct '
            "`inside` of the dataset"
        )


def _members(
    archive: Path, file: zipfile.ZipFile, inside: PurePosixPath
) -> Iterator[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """Yield the files that are wanted with their names below `inside`.

    All names are looked at before the first is given.
    """
    wanted = []
    for member in file.infolist():
        path = PurePosixPath(member.filename)
        bad = (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in member.orig_filename
            or ":" in member.filename
        )
        if bad or stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(
                f'{archive}: the member "{member.filename}" would leave the folder; do not trust '
                "this archive"
            )
        if member.is_dir() or not path.is_relative_to(inside):
            continue
        path = path.relative_to(inside)
        if not any(part.startswith(".") or part in JUNK for part in path.parts):
            wanted.append((member, path))
    yield from wanted
