"""Downloads from a server on this machine that does what goes wrong in a network."""

import hashlib
import http.server
import io
import json
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
import yaml

from gdlib.cli.main import main
from gdlib.config import Config, ConfigError
from gdlib.config.sections import RemoteFile
from gdlib.data.download import RECORD, _stay_secure, download, unpack
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
    """Serves `files` (path -> content) and keeps path and headers of every request.

    Attributes:
        cut: path -> numbers of bytes after which the next replies break off.
        stall: keep a broken reply open until this is set.
        answers: path -> (status, headers) in place of the next replies.
    """

    daemon_threads = True

    def __init__(self):
        self.files, self.requests, self.cut, self.answers = {}, [], {}, {}
        self.stall = None
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def add(self, path, content, **about):
        """Serve a file, and return what the catalogue would say of it."""
        self.files[path] = content
        return RemoteFile(url=self.url(path), **about)

    def asked(self, path):
        return sum(name == path for name, _ in self.requests)


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, path = self.server, self.path[1:]
        server.requests.append((path, dict(self.headers)))
        status, headers = 200 if path in server.files else 404, {}
        if server.answers.get(path):
            status, headers = server.answers[path].pop(0)
        body = server.files.get(path, b"") if status == 200 else b""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        end = server.cut[path].pop(0) if server.cut.get(path) else None
        self.wfile.write(body[:end])
        self.wfile.flush()
        if end is not None and server.stall:
            server.stall.wait()


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
    hidden folder, without what tells addresses apart."""
    assert not folder.exists()
    staging = folder.with_name(f".{folder.name}.download")
    return {path.name.rpartition("-")[2] for path in staging.rglob("*") if path.is_file()}


def content_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
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
    found = content_of(folder)
    record = json.loads(found.pop(RECORD))
    assert found == {
        "images/a.tif": b"A" * 1000,
        "images/b.tif": b"B",
        "masks/a.png": b"mask",
        "sample.hdf": NOISE,
    }
    assert record["files"] == [
        {"url": server.url(path), "bytes": len(content), "sha256": sha256(content)}
        for path, content in server.files.items()
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["cells"]
    # One request for each file, one after the other, by a client that says who it is.
    assert [path for path, _ in server.requests] == ["v1/images.zip", "v1/masks.zip", "sample.hdf"]
    for _, headers in server.requests:
        assert headers["User-Agent"].startswith("gdlib/")
        assert headers["Accept-Encoding"] == "identity"
    printed = capsys.readouterr().out.splitlines()
    assert sha256(server.files["v1/masks.zip"]) in printed[1]
    assert ["none to compare" in line for line in printed] == [False, True, False, False]


def test_a_second_call_does_nothing(server, folder, capsys):
    files = [server.add("sample.hdf", NOISE)]
    folder.mkdir(parents=True)
    assert download(files, folder)  # an empty folder is none
    before = (folder / "sample.hdf").stat().st_mtime_ns
    assert not download(files, folder)
    assert "is already there, complete since 2" in capsys.readouterr().out
    (folder / RECORD).unlink()
    assert not download(files, folder)
    assert "not from here" in capsys.readouterr().out
    assert (folder / "sample.hdf").stat().st_mtime_ns == before
    assert len(server.requests) == 1


def test_a_folder_from_other_addresses_is_not_taken_for_this_one(server, folder):
    download([server.add("old.hdf", NOISE)], folder)
    with pytest.raises(DataError, match=r"raw/cells: .*other addresses; move it away"):
        download([server.add("new.hdf", NOISE)], folder)
    assert [path.name for path in folder.glob("*.hdf")] == ["old.hdf"]


def test_a_broken_transfer_is_tried_again(server, folder):
    server.cut["sample.hdf"] = [HALF]
    server.answers["other.hdf"] = [(503, {})]
    download([server.add("sample.hdf", NOISE), server.add("other.hdf", b"other")], folder)
    assert (folder / "sample.hdf").read_bytes() == NOISE
    assert (folder / "other.hdf").read_bytes() == b"other"
    assert len(server.requests) == 4


def test_the_next_call_has_what_has_come_whole(server, folder):
    """Also where a name is that of another file, somewhere else."""
    first = server.add("first.hdf", b"first", sha256=sha256(b"first"))
    server.cut["sample.hdf"] = [HALF]
    with pytest.raises(DataError, match=r"/sample\.hdf: the transfer failed \(.*200000.*run the"):
        download([first, server.add("sample.hdf", NOISE)], folder, attempts=1)
    assert left_over(folder) == {"first.hdf"}
    with pytest.raises(DataError, match="404"):
        download([first, RemoteFile(url=server.url("gone.hdf"))], folder, attempts=1)
    files = [
        first,
        server.add("sample.hdf", NOISE),
        server.add("v2/first.zip", zipped({"a": b"b"}), into="v2"),
    ]
    assert download(files, folder)
    assert content_of(folder).keys() == {"first.hdf", "sample.hdf", "v2/a", RECORD}
    assert server.asked("first.hdf") == 1


def test_an_older_file_of_the_same_name_is_not_taken(server, folder):
    old, new = server.add("old/a.hdf", b"old"), server.add("new/a.hdf", b"new")
    gone = RemoteFile(url=server.url("gone.hdf"))
    with pytest.raises(DataError):
        download([old, gone], folder, attempts=1)
    assert download([new], folder)
    assert (folder / "a.hdf").read_bytes() == b"new"


def test_a_wrong_checksum_leaves_nothing(server, folder):
    (file,) = files = [server.add("sample.hdf", NOISE, sha256=sha256(b"another"))]
    with pytest.raises(DataError) as caught:
        download(files, folder, attempts=1)
    assert left_over(folder) == set()
    for part in (file.url, sha256(NOISE), sha256(b"another"), "deleted"):
        assert part in str(caught.value)


def test_what_has_come_is_compared_again(server, folder):
    """With the checksum of the catalogue, which may have been written there in the meantime."""
    server.cut["other.hdf"] = [0]
    other = server.add("other.hdf", b"other")
    with pytest.raises(DataError):
        download([server.add("a.hdf", b"spoilt"), other], folder, attempts=1)
    download([server.add("a.hdf", b"right", sha256=sha256(b"right")), other], folder)
    assert (folder / "a.hdf").read_bytes() == b"right"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, r"/gone\.zip: the transfer failed \(404 .*find the file's new address"),
        (
            "http://127.0.0.1:9/sample.hdf",
            r"http://127\.0\.0\.1:9/sample\.hdf: the transfer failed",
        ),
    ],
)
def test_what_is_not_there_is_one_sentence(url, message, server, folder):
    with pytest.raises(DataError, match=message) as caught:
        download([RemoteFile(url=url or server.url("gone.zip"))], folder, attempts=1)
    assert "\n" not in str(caught.value)
    assert left_over(folder) == set()


def test_a_killed_download_leaves_no_file_and_starts_again(server, folder):
    files = [server.add("images.zip", zipped({"a.tif": NOISE}), into="images")]
    server.cut["images.zip"], server.stall = [HALF], threading.Event()
    text = json.dumps([file.model_dump() for file in files])
    command = [sys.executable, "-m", "gdlib", "step", "download", "--files", text]
    command += ["--folder", folder]
    staging = folder.with_name(".cells.download")
    with subprocess.Popen(command, cwd=ROOT) as process:
        while not any(path.stat().st_size for path in staging.glob("tmp*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    server.stall.set()
    (half,) = left_over(folder)
    assert half.startswith("tmp")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (folder / "images" / "a.tif").read_bytes() == NOISE
    assert not staging.exists()


def reply(url, status, location):
    """Return what `requests` makes of a redirection."""
    one = requests.Response()
    one.url, one.status_code, one.headers["Location"] = url, status, location
    return one


def test_no_redirect_from_a_secure_address_to_another():
    for to in ("http://x.org/b", "HTTP://x.org/b"):
        with pytest.raises(requests.RequestException, match=r"leads to .* which is not secure"):
            _stay_secure(reply("https://x.org/a", 302, to), timeout=1)
        _stay_secure(reply("http://x.org/a", 302, to))
    _stay_secure(reply("https://x.org/a", 302, "https://y.org/b"))
    _stay_secure(reply("https://x.org/a", 302, "/b"))


def test_redirects_are_followed_within_the_web(server, folder):
    new = server.add("new.hdf", NOISE)
    server.answers["sample.hdf"] = [
        (302, {"Location": new.url}),
        (302, {"Location": "ftp://127.0.0.1/x"}),
    ]
    assert download([server.add("sample.hdf", b"")], folder)
    assert (folder / "sample.hdf").read_bytes() == NOISE
    with pytest.raises(DataError, match=r"transfer failed .*ftp://127"):
        download([server.add("sample.hdf", b"")], folder.with_name("other"), attempts=1)


def test_a_full_disk_is_one_sentence(server, folder):
    """A limit of the file size stands for it."""
    files = [server.add("sample.hdf", NOISE)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, before[1]))
    try:
        with pytest.raises(
            WriteError, match=r"sample\.hdf: cannot be written \(file too large\); allow larger"
        ):
            download(files, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left_over(folder) == set()
    assert len(server.requests) == 1  # it is no reason to ask again
    download(files, folder)
    assert (folder / "sample.hdf").read_bytes() == NOISE


def test_a_folder_that_cannot_be_made_is_one_sentence(folder):
    folder.parent.write_text("a file")
    with pytest.raises(WriteError, match=r"\.cells\.download: cannot be written .*a file stands"):
        download([], folder)


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
    assert "images.zip" not in left_over(folder)
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
    assert server.asked("one.zip") == 1


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
    assert left_over(folder) == {"images.zip"}
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
