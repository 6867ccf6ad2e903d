"""Downloads from a server on this machine that can do all that goes wrong in a network.

Messages about missing data.
"""

import contextlib
import email.utils
import hashlib
import http.server
import io
import json
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import yaml
from test_workflow import dry_run, planned, snakemake

from gdlib.cli.main import main
from gdlib.config import Config, ConfigError
from gdlib.config.sections import RemoteFile
from gdlib.data.download import RECORD, _Redirects, download, fetch, unpack
from gdlib.io.failures import DataError, WriteError

ROOT = Path(__file__).resolve().parents[1]
NOISE = np.random.default_rng(0).bytes(400_000)  # several reads long, and no zip archive
HALF = 200_000


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def zipped(members):
    """Return a zip archive of name -> content; a name may be a ZipInfo."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> content) and keeps the headers of every request, by path.

    Attributes:
        ranges: whether parts of files are given.
        validators: header that tells versions of a file apart, or None.
        chunked: send without a length.
        cut: path -> numbers of bytes after which the next replies break off; None for a whole one.
        stall: keep a broken reply open until this is set.
        answers: path -> (status, headers) in place of the next replies.
    """

    daemon_threads = True

    def __init__(self):
        self.files, self.requests, self.cut, self.answers = {}, [], {}, {}
        self.ranges, self.validators = True, "ETag"
        self.chunked = False
        self.stall = None
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def add(self, path, content, **about):
        """Serve a file, and return what the catalogue would say of it."""
        self.files[path] = content
        return RemoteFile(url=self.url(path), **about)

    def asked(self, path):
        return [headers for name, headers in self.requests if name == path]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, path = self.server, self.path[1:]
        server.requests.append((path, dict(self.headers)))
        if server.answers.get(path):
            status, headers = server.answers[path].pop(0)
            return self.reply(status, headers | {"Content-Length": "0"})
        if path not in server.files:
            return self.reply(404, {"Content-Length": "0"})
        content, start, headers = server.files[path], 0, {"Connection": "close"}
        tag = f'"{sha256(content)[:8]}"'
        if server.validators:
            headers[server.validators] = tag
        if server.ranges and "Range" in self.headers and self.headers["If-Range"] == tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.reply(
                    416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}
                )
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        headers |= (
            {"Transfer-Encoding": "chunked"}
            if server.chunked
            else {"Content-Length": str(len(body))}
        )
        self.reply(206 if start else 200, headers)
        end = server.cut[path].pop(0) if server.cut.get(path) else None
        with contextlib.suppress(ConnectionError):
            if server.chunked:
                self.wfile.write(b"%x\r\n" % len(body))
            self.wfile.write(body[:end])
            self.wfile.flush()
            if end is not None and server.stall:
                server.stall.wait()
            if server.chunked and end is None:
                self.wfile.write(b"\r\n0\r\n\r\n")
        self.close_connection = True

    def reply(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path):
    """Return where a data set goes."""
    return tmp_path / "raw" / "cells"


def left_over(folder):
    """Return the names of the files that an unfinished download has left, all of them in its own
    hidden folder."""
    assert not folder.exists()
    return {path.name for path in folder.with_name(f".{folder.name}.download").rglob("*")} - {
        "plan.json"
    }


# --- transfers -------------------------------------------------------------------------------------------------------


def test_a_data_set_arrives_in_its_layout(server, folder, capsys):
    archive = zipped({"images/a.tif": b"A" * 1000, "images/b.tif": b"B", "masks/": b""})
    files = [
        server.add("v1/images.zip", archive, sha256=sha256(archive), into="."),
        server.add("v1/masks.zip", zipped({"a.png": b"mask"}), into="masks"),
        server.add("sample.hdf", NOISE, sha256=sha256(NOISE)),
    ]
    assert download(files, folder)
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    record = json.loads(found.pop(RECORD))
    assert found == {
        "images/a.tif": b"A" * 1000,
        "images/b.tif": b"B",
        "masks/a.png": b"mask",
        "sample.hdf": NOISE,
    }
    assert [file["sha256"] for file in record["files"]] == [
        sha256(server.files[path]) for path in server.files
    ]
    assert [file["url"] for file in record["files"]] == [file.url for file in files]
    assert [file["bytes"] for file in record["files"]] == [
        len(content) for content in server.files.values()
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["cells"]
    # One request for each file, one after the other, by a client that says who it is.
    assert [path for path, _ in server.requests] == ["v1/images.zip", "v1/masks.zip", "sample.hdf"]
    for _, headers in server.requests:
        assert headers["User-Agent"].startswith("gdlib/")
        assert headers["Accept-Encoding"] == "identity"
    printed = capsys.readouterr().out
    assert sha256(server.files["v1/masks.zip"]) in printed
    assert "none to compare" in printed.splitlines()[1]
    assert "none to compare" not in printed.splitlines()[0] + printed.splitlines()[2]


def test_a_second_call_does_nothing(server, folder, capsys):
    files = [server.add("sample.hdf", NOISE)]
    assert download(files, folder)
    before = (folder / "sample.hdf").stat().st_mtime_ns
    assert not download(files, folder)
    assert len(server.requests) == 1
    assert (folder / "sample.hdf").stat().st_mtime_ns == before
    assert "is already there, complete since 2" in capsys.readouterr().out


def test_files_of_ones_own_are_left_alone(server, folder, capsys):
    folder.mkdir(parents=True)
    files = [server.add("sample.hdf", NOISE)]
    assert download(files, folder)  # an empty folder is none
    (folder / RECORD).unlink()
    (folder / "sample.hdf").write_bytes(b"mine")
    assert not download(files, folder)
    assert (folder / "sample.hdf").read_bytes() == b"mine"
    assert "not from here" in capsys.readouterr().out
    assert len(server.requests) == 1


def test_a_folder_from_other_addresses_is_not_taken_for_this_one(server, folder):
    download([server.add("old.hdf", NOISE)], folder)
    with pytest.raises(DataError, match=r"raw/cells: .*other addresses; move it away"):
        download([server.add("new.hdf", NOISE)], folder)
    assert [path.name for path in folder.glob("*.hdf")] == ["old.hdf"]


@pytest.mark.parametrize(
    ("chunked", "validator"), [(False, "ETag"), (False, "Last-Modified"), (True, "ETag")]
)
def test_a_broken_transfer_goes_on_where_it_was(server, folder, chunked, validator):
    server.chunked, server.validators = chunked, validator
    server.cut["sample.hdf"] = [HALF, None]
    download([server.add("sample.hdf", NOISE)], folder, pause=0)
    assert (folder / "sample.hdf").read_bytes() == NOISE
    first, second = server.asked("sample.hdf")
    assert "Range" not in first
    start = int(second["Range"].removeprefix("bytes=").removesuffix("-"))
    assert start == HALF if not chunked else 0 < start <= HALF
    assert second["If-Range"] == f'"{sha256(NOISE)[:8]}"'


def test_the_next_call_goes_on_too(server, folder):
    files = [
        server.add("first.hdf", b"first"),
        server.add("sample.hdf", NOISE, sha256=sha256(NOISE)),
    ]
    server.cut["sample.hdf"] = [HALF, HALF // 2]
    with pytest.raises(DataError, match="goes on from there"):
        download(files, folder, attempts=1)
    assert left_over(folder) == {"first.hdf", "sample.hdf.part", "sample.hdf.part.json"}
    download(files, folder, pause=0)
    assert (folder / "sample.hdf").read_bytes() == NOISE
    assert [headers.get("Range") for headers in server.asked("sample.hdf")] == [
        None,
        "bytes=200000-",
        "bytes=300000-",
    ]
    assert len(server.asked("first.hdf")) == 1


def test_half_of_another_version_is_thrown_away(server, folder):
    files = [server.add("sample.hdf", NOISE)]
    server.cut["sample.hdf"] = [HALF]
    with pytest.raises(DataError):
        download(files, folder, attempts=1)
    server.files["sample.hdf"] = NOISE[::-1]
    download(files, folder, attempts=1)
    assert (folder / "sample.hdf").read_bytes() == NOISE[::-1]
    assert server.asked("sample.hdf")[1]["Range"] == "bytes=200000-"


def test_half_of_a_file_from_elsewhere_is_thrown_away(server, folder):
    server.cut["old/sample.hdf"] = [HALF]
    with pytest.raises(DataError):
        download([server.add("old/sample.hdf", NOISE)], folder, attempts=1)
    download([server.add("new/sample.hdf", NOISE[::-1])], folder)
    assert (folder / "sample.hdf").read_bytes() == NOISE[::-1]
    assert "Range" not in server.asked("new/sample.hdf")[0]


@pytest.mark.parametrize("lacks", ["ranges", "validators"])
def test_a_server_that_cannot_go_on_is_asked_for_all_of_it(server, folder, lacks):
    setattr(server, lacks, None)
    server.cut["sample.hdf"] = [HALF, None]
    download([server.add("sample.hdf", NOISE)], folder, pause=0)
    assert (folder / "sample.hdf").read_bytes() == NOISE
    assert ("Range" in server.asked("sample.hdf")[1]) == (lacks == "ranges")


def test_a_part_that_is_the_whole_is_not_fetched_again(server, tmp_path):
    url = server.add("sample.hdf", NOISE).url
    server.cut["sample.hdf"] = [HALF]
    with pytest.raises(DataError):
        fetch(url, tmp_path / "sample.hdf", attempts=1)
    (tmp_path / "sample.hdf.part").write_bytes(NOISE)  # as when stopped after the last byte
    assert fetch(url, tmp_path / "sample.hdf", attempts=1) == sha256(NOISE)
    assert [path.name for path in tmp_path.iterdir()] == ["sample.hdf"]
    (tmp_path / "sample.hdf.part").write_bytes(NOISE + b"more")
    (tmp_path / "sample.hdf.part.json").write_text(
        json.dumps({"validator": f'"{sha256(NOISE)[:8]}"'})
    )
    fetch(url, tmp_path / "sample.hdf", pause=0)
    assert (tmp_path / "sample.hdf").read_bytes() == NOISE
    assert [headers.get("Range") for headers in server.asked("sample.hdf")[1:]] == [
        "bytes=400000-", "bytes=400004-", None,
    ]  # fmt: skip


def test_progress_gives_new_attempts_and_none_ends_them(server, folder):
    files = [server.add("sample.hdf", NOISE)]
    server.cut["sample.hdf"] = [100_000, 100_000, 100_000, None]
    download(files, folder, attempts=2, pause=0)
    assert len(server.requests) == 4
    server.ranges, server.cut["other.hdf"] = False, [HALF, HALF - 1, HALF, HALF - 1]
    with pytest.raises(DataError, match="transfer failed"):
        download([server.add("other.hdf", NOISE)], folder.with_name("other"), attempts=3, pause=0)
    assert len(server.asked("other.hdf")) == 3


def test_a_wrong_checksum_leaves_nothing(server, folder):
    files = [server.add("sample.hdf", NOISE, sha256=sha256(b"another"))]
    with pytest.raises(DataError) as caught:
        download(files, folder)
    assert left_over(folder) == set()
    for part in (files[0].url, sha256(NOISE), sha256(b"another"), "deleted"):
        assert part in str(caught.value)
    assert len(server.requests) == 1


def test_a_missing_file_is_asked_for_once(server, folder):
    with pytest.raises(
        DataError,
        match=r"/gone\.zip: the server says 404 Not Found; find the " r"file's new address",
    ):
        download([RemoteFile(url=server.url("gone.zip"))], folder)
    assert len(server.requests) == 1
    assert left_over(folder) == set()


@pytest.fixture
def pauses(monkeypatch):
    """Return the list of seconds that a download waits between its attempts, in no time."""
    seconds = []
    monkeypatch.setattr("gdlib.data.download.time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_a_busy_server_is_given_the_time_it_asks_for(server, folder, kind, pauses):
    # A date has whole seconds, some of which are over when it is read.
    text = "100" if kind == "seconds" else email.utils.formatdate(time.time() + 200, usegmt=True)
    server.answers["sample.hdf"] = [(503, {"Retry-After": text})]
    download([server.add("sample.hdf", NOISE)], folder, pause=0)
    (pause,) = pauses
    assert pause == 100 if kind == "seconds" else 100 < pause <= 200
    assert len(server.requests) == 2


def test_a_server_that_asks_for_too_long_is_left_alone(server, folder):
    server.answers["sample.hdf"] = [(429, {"Retry-After": "3600"})]
    with pytest.raises(DataError, match=r"429 Too Many Requests, come back in 3600 s"):
        download([server.add("sample.hdf", NOISE)], folder)
    assert len(server.requests) == 1


def test_pauses_grow(server, folder, pauses):
    server.answers["sample.hdf"] = [(500, {}), (502, {}), (503, {})]
    with pytest.raises(DataError, match="503"):
        download([server.add("sample.hdf", NOISE)], folder, attempts=3, pause=7)
    assert pauses == [7, 14]
    assert len(server.requests) == 3


def test_no_server_at_all(folder):
    with pytest.raises(DataError, match="transfer failed"):
        download([RemoteFile(url="http://127.0.0.1:9/sample.hdf")], folder, attempts=2, pause=0)


def test_a_full_or_broken_disk_is_no_reason_to_ask_again(server, tmp_path):
    url = server.add("sample.hdf", NOISE).url
    (tmp_path / "sample.hdf.part.json").mkdir()
    with pytest.raises(IsADirectoryError):
        fetch(url, tmp_path / "sample.hdf", pause=0)
    assert len(server.requests) == 1


def test_a_killed_download_goes_on(server, folder):
    files = [server.add("images.zip", zipped({"a.tif": NOISE}), into="images")]
    server.cut["images.zip"], server.stall = [HALF, None], threading.Event()
    text = json.dumps([file.model_dump() for file in files])
    command = [
        sys.executable,
        "-m",
        "gdlib",
        "step",
        "download",
        "--files",
        text,
        "--folder",
        folder,
    ]
    part = folder.with_name(".cells.download") / "images.zip.part"
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not (part.exists() and part.stat().st_size):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    server.stall.set()
    assert left_over(folder) == {"images.zip.part", "images.zip.part.json"}
    kept = part.stat().st_size
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (folder / "images" / "a.tif").read_bytes() == NOISE
    assert server.asked("images.zip")[1]["Range"] == f"bytes={kept}-"


@pytest.mark.parametrize("to", ["http://127.0.0.1:9/x", "ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_no_redirect_from_a_secure_address_to_another(to):
    """Not even on the way to a secure one; nothing is asked for there."""
    request = urllib.request.Request("https://x.org/a.zip")
    with pytest.raises(
        DataError,
        match=r"https://x\.org/a\.zip: the server leads to .* which is " r"not secure; correct",
    ):
        _Redirects().redirect_request(request, None, 302, "Found", {}, to)
    assert (
        _Redirects().redirect_request(request, None, 302, "Found", {}, "https://y.org/b").full_url
        == "https://y.org/b"
    )


def test_redirects_are_followed_within_the_web(server, folder):
    server.add("new.hdf", NOISE)
    server.answers["sample.hdf"] = [
        (302, {"Location": server.url("new.hdf")}),
        (302, {"Location": "ftp://127.0.0.1/x"}),
    ]
    assert download([server.add("sample.hdf", b"")], folder)
    assert (folder / "sample.hdf").read_bytes() == NOISE
    with pytest.raises(DataError, match="leads to ftp://127"):
        download([server.add("sample.hdf", b"")], folder.with_name("other"))


def test_a_full_disk_is_one_sentence(server, folder):
    """A limit of the file size stands for it; what has come is kept for the next call."""
    files = [server.add("sample.hdf", NOISE)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, before[1]))
    try:
        with pytest.raises(
            WriteError,
            match=r"sample\.hdf\.part: cannot be written \(file too " r"large\); allow larger",
        ):
            download(files, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    download(files, folder)
    assert (folder / "sample.hdf").read_bytes() == NOISE
    assert server.asked("sample.hdf")[1]["Range"].startswith("bytes=")


# --- archives --------------------------------------------------------------------------------------------------------


def damaged(content):
    """Return the archive with one bit of its first member flipped.

    If it is compressed, it makes no sense any more.
    """
    place = content.index(b"a.tif") + len(b"a.tif")
    return content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :]


@pytest.mark.parametrize(
    "spoil", [lambda c: c[:-1000], lambda c: b"<html>", damaged], ids=["short", "page", "bit"]
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_broken_archive_is_fetched_again(spoil, compression, server, folder):
    info = zipfile.ZipInfo("a.tif")
    info.compress_type = compression
    whole = zipped({info: NOISE})
    files = [server.add("images.zip", spoil(whole), into=".")]
    with pytest.raises(DataError, match="not a whole zip archive"):
        download(files, folder)
    assert not {"images.zip", "images.zip.part"} & left_over(folder)
    server.files["images.zip"] = whole
    download(files, folder)
    assert (folder / "a.tif").read_bytes() == NOISE


def test_a_call_that_was_stopped_while_unpacking_starts_to_unpack_again(server, folder):
    whole = zipped({"b.tif": b"b"})
    files = [
        server.add("one.zip", zipped({"a.tif": b"a"}), into="."),
        server.add("two.zip", whole[:-1], into="."),
    ]
    with pytest.raises(DataError, match=r"two\.zip: this is not a whole zip"):
        download(files, folder)
    assert "a.tif" in left_over(folder)
    server.files["two.zip"] = whole
    download(files, folder)
    assert {path.name for path in folder.iterdir()} == {"a.tif", "b.tif", RECORD}
    assert len(server.asked("one.zip")) == 1


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name",
    [
        "../outside.txt",
        "a/../../outside.txt",
        "/outside.txt",
        "C:outside.txt",
        "..\\outside.txt",
        link("a"),
    ],
    ids=str,
)
def test_no_member_may_leave_the_folder(name, server, folder):
    files = [
        server.add("images.zip", zipped({"good.txt": b"good", name: b"../../.."}), into="deep/er")
    ]
    with pytest.raises(DataError, match="would leave the folder; do not trust this archive"):
        download(files, folder)
    assert left_over(folder) <= {"images.zip", "content", "deep", "er"}
    assert not list(folder.parents[1].rglob("*outside*"))


def test_only_what_is_wanted_is_unpacked(tmp_path):
    archive = tmp_path / "repository.zip"
    junk = {
        "__MACOSX/top/data/._a.png": b"",
        "top/data/.DS_Store": b"",
        "top/data/x/Thumbs.db": b"",
    }
    archive.write_bytes(
        zipped({"top/README": b"", "top/data/x/a.png": b"a", "top/database/b.png": b"b", **junk})
    )
    unpack(archive, tmp_path / "out", inside="top/data")
    assert [
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")
    ] == ["x/a.png"]
    assert not list(tmp_path.rglob("Thumbs.db"))
    with pytest.raises(DataError, match=r'there is no file below "nowhere" in it'):
        unpack(archive, tmp_path / "none", inside="nowhere")


def test_an_archive_that_is_larger_than_the_disk_is_not_unpacked(tmp_path, monkeypatch):
    archive = tmp_path / "bomb.zip"
    archive.write_bytes(zipped({"a.bin": bytes(10**6), "b.bin": bytes(10**6)}))
    assert archive.stat().st_size < 10**4
    free = shutil.disk_usage(tmp_path)._replace(free=2 * 10**6 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(WriteError, match=r"out: cannot be written \(no space left on device"):
        unpack(archive, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_member_that_is_a_file_and_a_folder(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped({"a": b"file", "a/b": b"in it"}))
    with pytest.raises(DataError, match="a/b is there twice"):
        unpack(archive, tmp_path / "out")


def test_archives_do_not_overwrite_each_other(server, folder):
    files = [
        server.add(f"{name}.zip", zipped({"a.png": name.encode()}), into=".")
        for name in ("one", "two")
    ]
    with pytest.raises(DataError, match=r"two\.zip: a\.png is there twice"):
        download(files, folder)
    assert not folder.exists()


# --- the catalogue and its messages ----------------------------------------------------------------------------------


def test_the_catalogue_says_how_to_get_every_data_set(catalogue, tmp_path):
    config = Config.parse(catalogue | {"raw_folders": [str(tmp_path)]})
    for name, data in config.datasets.items():
        if data.folder:
            assert data.download or data.by_hand, name
            with pytest.raises(ConfigError) as caught:
                config.raw_folder(name)
            assert f"{tmp_path / data.folder}" in config.how_to_get(name)
            assert config.how_to_get(name) in str(caught.value)
            assert all(file.url.startswith("https://") for file in data.download)
            # Nothing is taken for an archive that is none, and the other way round.
            assert all(
                file.url.endswith(".zip") == (file.into is not None) for file in data.download
            )
    assert all(
        file.sha256 for name in ("bbbc039", "cremi") for file in config.datasets[name].download
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"download": [{"url": "ftp://x.org/a.zip"}]}, "datasets.bbbc039.download.0.url: "),
        ({"download": [{"url": "https://x.org/"}]}, "datasets.bbbc039.download.0.url: "),
        (
            {"download": [{"url": "https://x.org/a", "sha256": "abc"}]},
            "datasets.bbbc039.download.0.sha256: ",
        ),
        (
            {"download": [{"url": "https://x.org/a", "md5": "abc"}]},
            '"datasets.bbbc039.download.0.md5": valid names: ',
        ),
        (
            {"download": [{"url": f"https://x.org/{i}/a"} for i in (1, 2)]},
            "datasets.bbbc039: two files of `download`",
        ),
        ({"by_hand": "ask the authors"}, "datasets.bbbc039: what is downloaded "),
        ({"folder": None}, "datasets.bbbc039: what is downloaded "),
    ],
)
def test_a_mistake_in_the_catalogue_is_one_line(changes, message, raw):
    raw["datasets"]["bbbc039"] |= changes
    with pytest.raises(ConfigError) as caught:
        Config.parse(raw)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_some_datasets_of_a_study(raw):
    raw["study"] = "quick"
    everything = Config.parse(raw)
    assert everything.left_out == []
    for only in ("neurites_phantom_quick", ["neurites_phantom_quick"]):
        config = Config.parse(raw | {"only": only})
        assert config.selected.datasets == ("neurites_phantom_quick",)
        assert config.left_out == ["nuclei_phantom_quick"]
        assert config.runs() == [
            run for run in everything.runs() if run[0] == "neurites_phantom_quick"
        ]
    assert (
        Config.parse(raw | {"only": "neurites_phantom_quick,nuclei_phantom_quick"}).runs()
        == everything.runs()
    )
    with pytest.raises(ConfigError, match='config: only: there is no "bbbc039"'):
        Config.parse(raw | {"only": "bbbc039"})


STUDY = {
    "title": "Test", "datasets": ["bbbc039", "nuclei_phantom_small", "dsb2018", "ac34"], "methods": ["none"], "seeds": [0],
    "teacher": ["resunet_w8", "resunet3d_w8"], "students": ["resunet_tiny", "resunet3d_tiny"],
}  # fmt: skip


def start(folder, **changes):
    """Start the study, which lacks data.

    Nothing is found but what is in `raw` and `more` of the folder.
    """
    changes = {
        "study": "test",
        "studies": {"test": STUDY},
        "raw_folders": ["raw", "more"],
        **changes,
    }
    (folder / "overlay.yaml").write_text(yaml.safe_dump(changes))
    return snakemake(ROOT, folder, "--cores", "1", "--configfile", folder / "overlay.yaml")


def test_all_that_is_missing_is_told_before_anything_runs(tmp_path):
    (tmp_path / "more" / "ac3ac4" / "files").mkdir(parents=True)
    result = start(tmp_path)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-5:] == [
        'config: study "test" has no data of bbbc039, dsb2018 in raw or more:',
        "  bbbc039: `gdlib download bbbc039` fetches it from data.broadinstitute.org into "
        "raw/bbbc039",
        "  dsb2018: `gdlib download dsb2018` fetches it from github.com into raw/dsb2018",
        "To download bbbc039, dsb2018 first: --config study=test download=true",
        "To go on with the rest: --config study=test only=nuclei_phantom_small,ac34",
    ]


def test_the_whole_study_can_be_planned_without_data(tmp_path):
    changes = {"study": "test", "studies": {"test": STUDY}, "raw_folders": ["raw"]}
    result = dry_run(ROOT, tmp_path, changes)
    assert result.returncode == 0, result.stderr
    assert 'config: study "test" has no data of bbbc039, dsb2018, ac34 in raw:' in result.stderr
    assert "Planned as if all were there." in result.stderr
    found = planned(result.stdout + result.stderr)
    assert {job for job in found if job.startswith("Prepare ")} == {
        f"Prepare {name}" for name in STUDY["datasets"]
    }
    assert not [job for job in found if job.startswith("Download ")]


def test_what_cannot_be_downloaded_is_told_even_where_downloads_are_allowed(tmp_path):
    result = start(tmp_path, download=True)
    assert result.returncode != 0
    first, second, third = result.stderr.splitlines()[-3:]
    assert first == 'config: study "test" has no data of ac34 in raw or more:'
    assert second.startswith("  ac34: get AC3 and AC4 from https://")
    assert "raw/ac3ac4" in second
    assert (
        third == "To go on with the rest: --config study=test download=true "
        "only=bbbc039,nuclei_phantom_small,dsb2018"
    )


def test_the_advice_works(tmp_path):
    result = start(tmp_path)
    download_them, go_on = (
        line.partition("--config ")[2].split() for line in result.stderr.splitlines()[-2:]
    )
    assert download_them == [
        "study=test",
        "download=true",
        "only=bbbc039,nuclei_phantom_small,dsb2018",
    ]
    overlay = tmp_path / "overlay.yaml"
    for arguments, names in ((download_them, {"bbbc039", "dsb2018"}), (go_on, set())):
        result = snakemake(
            ROOT, tmp_path, "--dry-run", "--configfile", overlay, "--config", *arguments
        )
        assert result.returncode == 0, result.stderr
        found = planned(result.stdout + result.stderr)
        assert {job for job in found if job.startswith("Download ")} == {
            f"Download raw/{name}" for name in names
        }
        assert {job for job in found if job.startswith("Prepare ")} == {
            f"Prepare {name}" for name in {*names, "nuclei_phantom_small"}
        }
        left_out = [
            line
            for line in result.stderr.splitlines()
            if line.startswith("Left out of study test: ")
        ]
        assert left_out == [
            "Left out of study test: "
            + ", ".join(n for n in STUDY["datasets"] if n not in arguments[-1])
        ]
    assert not (tmp_path / "raw").exists()


def overlay_of(remote, folder):
    """Write a configuration whose only data set is this file, in `folder/raw`, and return its
    path."""
    mine = {
        "source": "folder",
        "folder": "cells",
        "offsets": [[-1, 0], [0, -1]],
        "patch": [32, 32],
        "download": [remote],
    }
    path = folder / "overlay.yaml"
    study = {"study": "test", "studies": {"test": STUDY | {"datasets": ["cells"]}}}
    path.write_text(yaml.safe_dump(study | {"datasets": {"cells": mine}, "raw_folders": ["raw"]}))
    return path


def test_the_workflow_downloads_once_and_goes_on(server, squares, tmp_path):
    members = {}
    for number in range(6):
        for part, array in zip(("images", "labels"), squares(number), strict=True):
            file = io.BytesIO()
            tifffile.imwrite(file, np.squeeze(array))
            members[f"{part}/{number}.tif"] = file.getvalue()
    remote = server.add("cells.zip", zipped(members), into=".")
    overlay = overlay_of(remote.model_dump(), tmp_path)
    more = ("--configfile", overlay, "--cores", "1")
    target = ("--", "data/cells/test.h5")

    result = snakemake(ROOT, tmp_path, *more, "--config", "download=true", *target)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path.name for path in (tmp_path / "raw" / "cells").iterdir()} == {
        "images",
        "labels",
        RECORD,
    }
    assert (
        sha256(server.files["cells.zip"])
        in (tmp_path / "logs" / "download" / "cells.log").read_text()
    )
    # The switch is not needed any more, and changes nothing.
    for switch in (("--config", "download=true"), ()):
        result = snakemake(ROOT, tmp_path, *more, *switch, *target)
        assert "Nothing to be done" in result.stdout + result.stderr
    result = snakemake(ROOT, tmp_path, *more, "--", "download")
    assert result.returncode == 0, result.stderr
    assert len(server.requests) == 1


def test_a_download_that_fails_leaves_the_data_missing(server, tmp_path):
    overlay = overlay_of({"url": server.url("gone.zip"), "into": "."}, tmp_path)
    result = snakemake(
        ROOT, tmp_path, "--configfile", overlay, "--cores", "1", "--config", "download=true"
    )
    assert result.returncode != 0
    assert "404 Not Found" in result.stderr
    result = snakemake(ROOT, tmp_path, "--configfile", overlay, "--dry-run")
    assert 'config: study "test" has no data of cells in raw:' in result.stderr


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own_catalogue(server, catalogue, tmp_path):
    """Return a catalogue file whose BBBC039 is on this server."""
    files = [server.add("images.zip", zipped({"images/a.tif": b"a"}), into=".").model_dump()]
    catalogue = catalogue | {"raw_folders": [str(tmp_path / "raw"), str(tmp_path / "more")]}
    catalogue["datasets"] = catalogue["datasets"] | {
        "bbbc039": catalogue["datasets"]["bbbc039"] | {"download": files}
    }
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump(catalogue))
    return path


def test_the_command_downloads_once(server, own_catalogue, tmp_path, capsys):
    for _ in range(2):
        assert main(["download", "bbbc039", "--config", str(own_catalogue)]) == 0
    assert (tmp_path / "raw" / "bbbc039" / "images" / "a.tif").read_bytes() == b"a"
    assert len(server.requests) == 1
    (tmp_path / "raw").rename(tmp_path / "more")  # it is found wherever the studies look for it
    assert main(["download", "bbbc039", "nuclei_phantom", "--config", str(own_catalogue)]) == 0
    assert len(server.requests) == 1
    assert "nuclei_phantom: is made here" in capsys.readouterr().out
    assert (
        main(
            ["download", "bbbc039", "--to", str(tmp_path / "there"), "--config", str(own_catalogue)]
        )
        == 0
    )
    assert (tmp_path / "there" / "bbbc039" / "images" / "a.tif").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bbbc93", 'there is no dataset "bbbc93": did you mean "bbbc039"?'),
        ("ac34", "https://lichtman.rc.fas.harvard.edu/vast/AC3AC4Package.zip"),
        ("fib25", "https://github.com/janelia-flyem/neuroproof_examples"),
    ],
)
def test_the_command_says_what_it_cannot_download(name, message, own_catalogue, capsys):
    assert main(["download", name, "--config", str(own_catalogue)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
