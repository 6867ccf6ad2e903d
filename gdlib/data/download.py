"""Download data sets from their official addresses: verified, and all of a data set or nothing.

`pooch` fetches the files, one after the other, into a hidden folder beside the final one,
`raw/.<name>.download`. They are unpacked there, and moved when all of them have come: a folder of
raw data is complete or does not exist. `.download.json` in it says what was fetched.
"""

import contextlib
import datetime
import hashlib
import json
import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import pooch
import requests

from gdlib import __version__, io
from gdlib.io.failures import ACCESS, SPACE, DataError, writing
from gdlib.progress import Bar

RECORD = ".download.json"
HEADERS = {
    "User-Agent": f"gdlib/{__version__} (graph relation distillation; pooch)",
    "Accept-Encoding": "identity",
}
TIMEOUT = 60.0  # seconds without a byte after which a connection counts as broken
CHUNK = 1 << 16  # bytes
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


def download(files: Sequence[RemoteFile], folder: Path | str, *, attempts: int = 4) -> bool:
    """Fetch the files of a data set into a new folder, and print a line about each.

    Args:
        files: where they are and how they are unpacked.
        folder: final place; if something is in it already, nothing is fetched and nothing changed.
        attempts: how often each file is tried.

    Returns:
        Whether anything was fetched.

    Raises:
        DataError: a file cannot be had or is not what it should be; those that have come whole are
            kept for the next call.
        WriteError: there is no space, or the folder cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        _check_record(files, folder)
        return False
    staging = folder.with_name(f".{folder.name}.download")
    content, record, fetched = staging / "content", [], []
    shutil.rmtree(content, ignore_errors=True)  # of a call that was stopped while unpacking
    with writing(staging, SPACE | ACCESS):
        content.mkdir(parents=True)
    for half in staging.glob("tmp*"):  # of a call that was killed
        half.unlink()
    for file in files:
        fetched.append(path := _fetch(file, staging, attempts))
        sha256, size = io.sha256(path), path.stat().st_size
        record.append({"url": file.url, "bytes": size, "sha256": sha256})
        known = "as it must be" if file.sha256 else f"none to compare, so keep {folder / RECORD}"
        print(f"{file.name}: {size:,d} bytes, sha256 {sha256}, {known}", flush=True)
        if file.into is not None:
            unpack(path, content / file.into, inside=file.inside)
    for file, path in zip(files, fetched, strict=True):
        if file.into is None:
            path.replace(content / file.name)
        else:
            path.unlink()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    io.write_text(
        content / RECORD, json.dumps({"retrieved": today, "files": record}, indent=2) + "\n"
    )
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()  # an empty one, which some systems do not rename to
    content.replace(folder)
    with contextlib.suppress(OSError):  # somebody else's files may be there
        staging.rmdir()
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


def _fetch(file: RemoteFile, folder: Path, attempts: int) -> Path:
    """Fetch a file, if it is not there already, under a name that no other address has."""
    name = f"{hashlib.sha256(file.url.encode()).hexdigest()[:16]}-{file.name}"
    store = pooch.create(
        folder,
        "",
        registry={name: file.sha256},
        urls={name: file.url},
        retry_if_failed=attempts - 1,
    )
    try:
        with writing(folder / name):
            return Path(store.fetch(name, downloader=_transfer))
    except requests.RequestException as error:
        raise DataError(
            f"{file.url}: the transfer failed ({error}); run the command again later, and if that "
            "does not help, find the file's new address and write it into `download` of the dataset"
        ) from error
    except ValueError as error:  # which pooch raises for a checksum
        found = str(error).partition(". ")[0]
        raise DataError(
            f"{file.url}: this is another file than the known one ({found}); it was deleted: run "
            "the command again, and if that does not help, the file has changed at its source"
        ) from error


def _transfer(url: str, output: str, store: pooch.Pooch) -> None:
    title = url.rpartition("/")[2]
    # pooch sets the total, but asks before that whether there is any
    with Bar(desc=title, total=1, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        get = pooch.HTTPDownloader(
            progressbar=bar,
            chunk_size=CHUNK,
            headers=HEADERS,
            timeout=TIMEOUT,
            hooks={"response": _stay_secure},
        )
        get(url, output, store)


def _stay_secure(response: requests.Response, **_: object) -> None:
    """Follow no server from a secure address to one that is not."""
    to = response.headers.get("Location", "")
    if response.url.startswith("https:") and to.lower().startswith("http:"):
        raise requests.RequestException(f"the server leads to {to}, which is not secure")


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
            members = _members(archive, file, PurePosixPath(inside))
            for name, member in members:
                target = folder / name
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with writing(target), file.open(member) as source, open(target, "xb") as out:
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
) -> list[tuple[PurePosixPath, zipfile.ZipInfo]]:
    """Return the files that are wanted, with their names below `inside`."""
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
            wanted.append((path, member))
    return wanted
