"""File contracts: complete or absent, equal content is equal bytes, a broken file is one sentence,
nothing is executed."""

import errno
import json
import os
import pickle
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from gdlib import io
from gdlib.data.files import read_volume
from gdlib.predict.predictor import Predictor

ROOT = Path(__file__).resolve().parents[1]


class Boom(Exception):
    """What a failing writer raises."""


class Evil:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def samples(count=2, dtype=np.uint8):
    for i in range(count):
        rng = np.random.default_rng(i)
        image = rng.integers(0, 200, (1, 9, 7)).astype(dtype)
        yield io.Sample(
            f"s{i}",
            image,
            rng.integers(0, 4, (9, 7)).astype(np.uint16),
            attrs={"source": f"{i}.png", "n": i},
        )


def volumes():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 9, (20, 70, 130)).astype(np.uint32)
    attrs = {"voxel_size_nm": [30.0, 6.0, 6.5]}
    image = rng.integers(0, 200, (2, 20, 70, 130)).astype(np.uint8)
    yield io.Sample("some", image, label, ignore=label == 3, attrs=attrs)
    yield io.Sample("none", image[:1, :5, :8, :9], label[:5, :8, :9], attrs=attrs)


def weights():
    import torch

    torch.manual_seed(0)
    image = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    return dict(image.state_dict()) | {"count": torch.tensor(7)}


def one_sentence(caught, *parts):
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


WRITERS = {
    "h5": lambda path: io.write_samples(
        path, samples(), split="train", options={"b": [1, 2], "a": None}, text=""
    ),
    "volumes": lambda path: io.write_samples(path, volumes()),
    "csv": lambda path: io.write_rows(path, ("a", "b"), [(1, 0.1), ("x", np.float64(1) / 3)]),
    "text": lambda path: io.write_text(path, "text\n"),
    "weights": lambda path: io.save_weights(path, weights(), {"b": 1, "a": [1, 2]}),
}


def failing_rows():
    yield (1, 2)
    raise Boom


def failing_samples():
    yield next(samples())
    raise Boom


def failing_file(path):
    with io.create_h5(path, a=1) as file:
        io.put(file.create_group("g"), "x", np.zeros(3))
        raise Boom


FAILING = {
    "h5": lambda path: io.write_samples(path, failing_samples()),
    "open h5": failing_file,
    "csv": lambda path: io.write_rows(path, ("a", "b"), failing_rows()),
}


def test_equal_content_is_equal_bytes(tmp_path):
    for name, write in WRITERS.items():
        write(tmp_path / name)
    time.sleep(1.1)  # time stamps in HDF5 have a resolution of a second
    for name, write in WRITERS.items():
        write(tmp_path / "again" / name)
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
        assert io.sha256(tmp_path / name) == io.sha256(tmp_path / "again" / name)


def test_other_content_is_other_bytes(tmp_path):
    io.write_samples(tmp_path / "one", samples(2))
    io.write_samples(tmp_path / "two", samples(3))
    assert io.sha256(tmp_path / "one") != io.sha256(tmp_path / "two")


def test_key_order_makes_no_difference(tmp_path):
    io.save_weights(tmp_path / "one", weights(), {"b": 1, "a": {"d": 1, "c": 2}})
    io.save_weights(tmp_path / "two", weights(), {"a": {"c": 2, "d": 1}, "b": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    for name, options in (
        ("one", {"b": 1, "a": {"d": 1, "c": 2}}),
        ("two", {"a": {"c": 2, "d": 1}, "b": 1}),
    ):
        io.write_samples(tmp_path / name, samples(1), options=options)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("before", [None, b"the complete file of an earlier run"])
@pytest.mark.parametrize("write", FAILING.values(), ids=FAILING)
def test_a_failing_writer_leaves_nothing_and_spoils_nothing(write, before, tmp_path):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(Boom):
        write(path)
    assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["file"])
    assert before is None or path.read_bytes() == before


def test_weights_that_cannot_be_written_leave_nothing(tmp_path):
    with pytest.raises(TypeError):
        io.save_weights(tmp_path / "w.safetensors", weights(), {"not JSON": object()})
    with pytest.raises(AttributeError):
        io.save_weights(tmp_path / "w.safetensors", {"not a tensor": 1}, {})
    assert not list(tmp_path.iterdir())


def test_readers_never_see_an_unfinished_file(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with io.atomic(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]
    with open(path) as reader:  # who has begun to read goes on in the same file
        io.write_text(path, "another")
        assert reader.read() == "whole"
    assert path.read_text() == "another"


def test_samples_come_back(tmp_path):
    path = tmp_path / "a.h5"
    written = [
        *samples(3),
        *(io.Sample(f"f{i}", s.image / 7, s.label) for i, s in enumerate(samples(1, np.float32))),
    ]
    assert io.write_samples(path, written, split="val", ids=["x"], text="") == 4
    assert io.sample_ids(path) == sorted(s.id for s in written)
    read = {s.id: s for s in io.read_samples(path)}
    assert list(read) == sorted(read)
    for sample in written:
        assert read[sample.id].image.dtype == sample.image.dtype
        assert np.array_equal(read[sample.id].image, sample.image)
        assert read[sample.id].label.dtype == np.uint32
        assert np.array_equal(read[sample.id].label, sample.label)
        assert read[sample.id].attrs == sample.attrs
    assert [s.id for s in io.read_samples(path, ["s2", "s0"])] == ["s2", "s0"]
    assert np.array_equal(io.read_array(path, "s1", "label"), written[1].label)
    assert io.read_attrs(path) == {"split": "val", "ids": ["x"], "text": ""}


def test_what_to_ignore_and_the_voxel_size_come_back(tmp_path):
    io.write_samples(tmp_path / "a.h5", volumes())
    read = {s.id: s for s in io.read_samples(tmp_path / "a.h5")}
    assert read["none"].ignore is None
    assert read["some"].ignore.dtype == bool
    assert np.array_equal(read["some"].ignore, read["some"].label == 3)
    assert all(s.attrs == {"voxel_size_nm": [30.0, 6.0, 6.5]} for s in read.values())


def layout_version(dataset):
    """Return which version of its message on the layout an array has, from the bytes of its header
    (HDF5 file format, IV.A.1.b and IV.A.2.i)."""
    with open(dataset.file.filename, "rb") as file:
        file.seek(h5py.h5o.get_info(dataset.id).addr)
        header = file.read(500)
    assert header[:5] == b"OHDR\x02"
    flags = header[5]
    start = 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10) + (1 << (flags & 3))
    while header[start] != 8:
        start += 4 + 2 * bool(flags & 4) + int.from_bytes(header[start + 1 : start + 3], "little")
    return header[start + 4 + 2 * bool(flags & 4)]


def test_programs_with_an_older_hdf5_can_read_what_is_written(tmp_path):
    """Those before 2.0 know versions up to 4."""
    with io.create_h5(tmp_path / "a.h5") as file:
        io.put(file, "image", np.arange(5000).reshape(50, 100))
    with h5py.File(tmp_path / "a.h5") as file:
        assert layout_version(file["image"]) in (3, 4)
    if h5py.version.hdf5_version_tuple >= (2,):  # and the check itself can fail
        with h5py.File(tmp_path / "b.h5", "w", libver="latest") as file:
            file.create_dataset("image", data=np.arange(5000), chunks=(100,), compression="gzip")
        with h5py.File(tmp_path / "b.h5") as file:
            assert layout_version(file["image"]) > 4


def test_volumes_are_stored_in_blocks_and_images_are_not(tmp_path):
    io.write_samples(tmp_path / "a.h5", volumes())
    with h5py.File(tmp_path / "a.h5") as file:
        chunks = {
            name: {key: item.chunks for key, item in group.items()} for name, group in file.items()
        }
    assert chunks["some"] == {
        "image": (1, 16, 64, 64),
        "label": (16, 64, 64),
        "ignore": (16, 64, 64),
    }
    assert chunks["none"] == {"image": (1, 5, 8, 9), "label": (5, 8, 9)}
    io.write_samples(tmp_path / "b.h5", samples(1))
    with h5py.File(tmp_path / "b.h5") as file:
        assert file["s0/image"].chunks == (1, 9, 7)
    with io.create_h5(tmp_path / "c.h5") as file:  # as h5py chooses
        io.put(file, "x", np.zeros((30, 500, 500), np.uint8))
        by_h5py = file.create_dataset("y", (30, 500, 500), np.uint8, compression="gzip").chunks
        assert file["x"].chunks == by_h5py


def test_weights_come_back(tmp_path):
    import torch

    path = tmp_path / "w.safetensors"
    header = {"model": "resunet", "options": {"widths": [1, 2]}, "none": None, "x": 0.1}
    io.save_weights(path, weights(), header)
    state, read = io.load_weights(path)
    assert read == io.read_header(path) == header
    assert state.keys() == weights().keys()
    for name, tensor in weights().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_rows_are_plain_csv(tmp_path):
    io.write_rows(tmp_path / "a.csv", ("name", "value"), [("a,b", 1 / 3), ("c", 2), ("d", 1.0)])
    assert (
        tmp_path / "a.csv"
    ).read_bytes() == b'name,value\r\n"a,b",0.3333333333\r\nc,2\r\nd,1\r\n'


BROKEN = {
    "empty": lambda path, good: path.write_bytes(b""),
    "text": lambda path, good: path.write_text("this is not it\n" * 20),
    "truncated": lambda path, good: path.write_bytes(good.read_bytes()[:-50]),
    "folder": lambda path, good: path.mkdir(),
    "missing": lambda path, good: None,
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("kind", ["h5", "weights"])
def test_a_broken_file_is_one_sentence(kind, spoil, tmp_path):
    good, path = tmp_path / "good", tmp_path / "broken"
    WRITERS[kind](good)
    spoil(path, good)
    readers = {
        "h5": [
            io.sample_ids,
            io.read_attrs,
            lambda p: list(io.read_samples(p)),
            lambda p: io.read_array(p, "s0", "label"),
        ],
        "weights": [io.read_header, io.load_weights],
    }
    for read in readers[kind]:
        with pytest.raises(io.DataError) as caught:
            read(path)
        one_sentence(caught, path)


def test_a_missing_array_is_one_sentence(tmp_path):
    io.write_samples(tmp_path / "a.h5", samples())
    for sample, name in (("s0", "affinity"), ("t9", "label")):
        with pytest.raises(io.DataError) as caught:
            io.read_array(tmp_path / "a.h5", sample, name)
        one_sentence(caught, tmp_path / "a.h5", f'"{sample}"', f'"{name}"')


def test_weights_of_others_are_refused_with_one_sentence(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"a": weights()["weight"].contiguous()}, path, metadata=metadata)
        for read in (io.read_header, io.load_weights):
            with pytest.raises(io.DataError, match="not written by gdlib") as caught:
                read(path)
            one_sentence(caught, path)


def test_no_pickle_is_executed(tmp_path):
    import torch

    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # the bait works
    marker.unlink()
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(Evil(marker)))
    torch.save({"state": Evil(marker)}, tmp_path / "zip.safetensors")
    for path in tmp_path.glob("*.safetensors"):
        for read in (io.read_header, io.load_weights):
            with pytest.raises(io.DataError) as caught:
                read(path)
            one_sentence(caught, path)
    assert not marker.exists()


def test_the_package_has_no_other_way_to_unpickle():
    calls = re.compile(
        r"\bpickle\b|\bjoblib\b|allow_pickle\s*=\s*True|torch\.load\((?![^)]*weights_only=True)|yaml\.(unsafe_|full_)?load\("
        r"|\b(eval|exec)\("
    )
    files = [
        path for part in ("gdlib", "workflow", "benchmarks") for path in (ROOT / part).rglob("*.py")
    ]
    assert len(files) > 50
    files.remove(ROOT / "gdlib" / "jit.py")  # its cache is code of the user's own, as Numba's is
    for path in files:
        text = re.sub(r"\.eval\(|re\.compile\(", "", path.read_text())  # of networks
        assert not calls.search(text), path


def test_reading_a_header_imports_no_torch(tmp_path):
    io.save_weights(tmp_path / "w.safetensors", weights(), {"a": 1})
    code = (
        "import sys; from gdlib import io; print(io.read_header(sys.argv[1]), 'torch' in "
        "sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "w.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'a': 1} False"


def test_header_is_one_json_text(tmp_path):
    from safetensors import safe_open

    io.save_weights(tmp_path / "w.safetensors", weights(), {"b": 1, "a": [1.5]})
    with safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert file.metadata().keys() == {"gdlib"}
        header = json.loads(file.metadata()["gdlib"])
    assert len(header.pop("sha256")) == 64
    assert header == {"a": [1.5], "b": 1}


# --- Damage, full disks, folders that cannot be written ----------------------------------------------------------------


READERS = {
    # Of the attributes, HDF5 checks that they can be read, but keeps no checksum of texts.
    "h5": lambda path: [
        (s.id, s.image.tobytes(), s.label.tobytes(), list(s.attrs)) for s in io.read_samples(path)
    ],
    "weights": lambda path: {
        name: tensor.tolist() for name, tensor in io.load_weights(path)[0].items()
    },
    "state": lambda path: {
        k: getattr(v, "tolist", lambda v=v: v)() for k, v in io.load_state(path).items()
    },
    "maps": lambda path: io.read_array(path, "s", "x").tobytes(),
}


def asked(path):
    from gdlib.train.ask import _make

    with io.create_h5(path) as file:
        _make(file.create_group("s"), "x", (10, 12, 5))[:] = np.arange(600).reshape(10, 12, 5)


STORES = WRITERS | {
    "state": lambda path: io.save_state(path, weights() | {"step": 3}),
    "maps": asked,
}


@pytest.mark.parametrize("kind", READERS)
def test_no_flipped_byte_goes_unnoticed(kind, tmp_path):
    good, path = tmp_path / "good", tmp_path / "bad"
    STORES[kind](good)
    content = good.read_bytes()
    expected, refused = READERS[kind](good), 0
    places = np.random.default_rng(0).choice(len(content), 120, replace=False)
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x15]) + content[place + 1 :])
        try:
            wrong = READERS[kind](path) != expected  # equal: a byte that nobody reads
        except io.DataError as error:
            told = str(path) in str(error) and "\n" not in str(error)
            wrong, refused = not told, refused + 1
        assert not wrong, place
    assert refused > 0


def copy_both(outer, inner, path):
    with io.open_h5(outer) as one, io.open_h5(inner) as two, io.create_h5(path) as new:
        for name, file in (("one", one), ("two", two)):
            io.put(new, name, file["s1/image"][()])


def test_a_damaged_array_is_named_in_the_file_it_is_in(tmp_path):
    """Also where several files are open, and one of them for writing."""
    good, bad = tmp_path / "good.h5", tmp_path / "bad.h5"
    io.write_samples(good, samples(3))
    content = bytearray(good.read_bytes())
    with h5py.File(good) as file:
        chunk = file["s1/image"].id.get_chunk_info(0)
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    bad.write_bytes(content)
    for outer, inner in ((good, bad), (bad, good)):
        with pytest.raises(io.DataError) as caught:
            copy_both(outer, inner, tmp_path / "new.h5")
        one_sentence(caught, bad, '"s1/image"', "damaged", "make it again")
    assert not (tmp_path / "new.h5").exists()


def large_file(path):
    with io.create_h5(path, text="x" * 2000) as file:
        for i in range(3):
            io.put(
                file.create_group(f"g{i}"),
                "x",
                np.random.default_rng(i).integers(0, 255, (20, 500), np.uint8),
                (5, 100),
            )


FULL = {
    "h5": large_file,
    "csv": lambda path: io.write_rows(path, ("a",), [(i,) for i in range(5000)]),
    "text": lambda path: io.write_text(path, "text\n" * 5000),
    "weights": lambda path: io.save_weights(path, {"a": __import__("torch").zeros(7000)}, {}),
    "state": lambda path: io.save_state(
        path, {f"a{i}": __import__("torch").zeros(500) for i in range(14)}
    ),
}


@pytest.mark.parametrize("kind", FULL)
def test_no_space_left_is_one_sentence_and_leaves_nothing(kind, tmp_path):
    """A limit of the file size stands for a full disk.

    The process must survive it, up to its end.
    """
    FULL[kind](tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    for part in (10, size // 7, size // 3, size // 2, 9 * size // 10, size - 1):
        process = os.fork()  # HDF5 has crashed whole processes here
        if not process:
            resource.setrlimit(resource.RLIMIT_FSIZE, (part, resource.RLIM_INFINITY))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                FULL[kind](tmp_path / "file")
            except io.WriteError as error:
                right = error.errno == errno.EFBIG and str(error).startswith(
                    f"{tmp_path / 'file'}: cannot be written ("
                )
                os._exit(0 if right else 3)
            except BaseException:
                os._exit(4)
            os._exit(5)
        assert os.waitpid(process, 0)[1] == 0, part
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert size > 10_000


def test_the_command_survives_a_full_disk(tmp_path):
    """With its one sentence as the last line, whatever HDF5 says while Python ends."""
    code = (
        "import resource, sys; from gdlib import io; from gdlib.cli import info, main; import numpy as "
        "np\n"
        "def work(arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))\n"
        "    noise = np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8)\n"
        "    io.write_samples(sys.argv[1], [io.Sample('a', noise[None], noise)])\n"
        "info._info = work; sys.exit(main.main(['info', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.h5"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert (
        f"gdlib: error: {tmp_path / 'a.h5'}: cannot be written (file too large); allow"
        in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_every_cause_has_a_mend(tmp_path):
    for number in io.SPACE | io.ACCESS:
        with (
            pytest.raises(io.WriteError) as caught,
            io.writing(tmp_path / "a", io.SPACE | io.ACCESS),
        ):
            raise OSError(number, os.strerror(number))
        one_sentence(caught, tmp_path / "a", "cannot be written", "; ")
    # other errors are not ours to explain
    with pytest.raises(FileNotFoundError), io.atomic(tmp_path / "a"):
        (tmp_path / "nowhere").read_text()


def test_a_folder_that_cannot_be_made_is_one_sentence():
    with pytest.raises(io.WriteError) as caught:
        io.write_text("/sys/kernel/a.txt", "")
    one_sentence(caught, "a.txt", "make its folder writable")


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "a.csv"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {
        number: f".a.csv.{platform.node()}.{number}.tmp" for number in (gone.pid, os.getppid())
    }
    names["other"] = f".a.csv.elsewhere.{gone.pid}.tmp"  # of a machine of which we know nothing
    for name in names.values():
        (tmp_path / name).touch()
    io.write_text(path, "x")
    assert {p.name for p in tmp_path.iterdir()} == {"a.csv", names[os.getppid()], names["other"]}


# --- Nothing in a file leads out of it or is run -----------------------------------------------------------------------


def external_link(file, secret):
    file["s0/image"] = h5py.ExternalLink(secret, "/a")


def external_link_of_a_group(file, secret):
    del file["s0"]
    file["s0"] = h5py.ExternalLink(secret, "/")


def virtual(file, secret):
    layout = h5py.VirtualLayout((3, 4), np.uint8)
    layout[:] = h5py.VirtualSource(secret, "a", (3, 4))
    file["s0"].create_virtual_dataset("image", layout)


def external_storage(file, secret):
    file["s0"].create_dataset("image", (3, 4), np.uint8, external=[(secret, 0, 12)])


ESCAPES = [external_link, external_link_of_a_group, virtual, external_storage]


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("relative", [False, True])
def test_hdf5_does_not_lead_to_another_file(escape, relative, tmp_path):
    (tmp_path / "in").mkdir()
    secret, path = tmp_path / "secret.h5", tmp_path / "in" / "a.h5"
    with h5py.File(secret, "w") as file:
        file["a"] = file["image"] = np.full((3, 4), 7, np.uint8)
    io.write_samples(path, samples(1))
    with h5py.File(path, "r+") as file:
        del file["s0/image"]
        escape(file, "../secret.h5" if relative else str(secret))
    # the bait works; those are looked for where the process is
    if not (relative and escape is external_storage):
        with h5py.File(path) as file:
            assert file["s0/image"].shape == (3, 4)
    ours = [
        io.sample_ids,
        io.read_attrs,
        lambda p: list(io.read_samples(p)),
        lambda p: io.read_array(p, "s0", "image"),
    ]
    for read in (*ours, lambda p: read_volume(p, "s0/image")):
        with pytest.raises(io.DataError) as caught:
            read(path)
        one_sentence(caught, path, "another file", "secret.h5", "copy it into this one")


def test_links_within_a_file_are_fine(tmp_path):
    io.write_samples(tmp_path / "a.h5", samples(1))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["again"] = h5py.SoftLink("/s0")
    assert np.array_equal(io.read_array(tmp_path / "a.h5", "again", "image"), next(samples()).image)


def test_a_weights_file_does_not_say_which_code_is_run(tmp_path, monkeypatch):
    path, marker = tmp_path / "w.safetensors", tmp_path / "executed"
    header = {"options": {"args": ["touch", str(marker)]}}
    io.save_weights(path, weights(), header | {"model": "subprocess:run"})
    for read in (io.load_weights, Predictor.load):
        with pytest.raises(io.DataError) as caught:
            read(path)
        one_sentence(caught, path, "subprocess:run", "GDLIB_PLUGINS=subprocess")
    assert not marker.exists()
    for model, trusted, fine in (
        ("my.nets:Net", "other,my.nets", True),
        ("my.nets.two:Net", "my.nets", True),
        ("my.netsy:Net", "my.nets", False),
        ("gdlib.models.resunet:ResUNet", "", True),
        ("gdlibx:ResUNet", "", False),
        ("resunet", "", True),
    ):
        io.save_weights(path, weights(), {"model": model})
        monkeypatch.setenv(io.PLUGINS, trusted)
        if fine:
            assert io.load_weights(path)[1] == {"model": model}
        else:
            with pytest.raises(io.DataError, match="environment variable"):
                io.load_weights(path)


def test_no_pickle_in_a_state_is_executed(tmp_path):
    import torch

    path, marker = tmp_path / "resume.pt", tmp_path / "executed"
    torch.save({"state": Evil(marker)}, path)
    with pytest.raises(io.DataError) as caught:
        io.load_state(path)
    one_sentence(caught, path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the bait works


def test_who_may_read_what_is_written(tmp_path):
    """As of any other file: on a cluster colleagues use the weights."""
    (tmp_path / "plain").touch()
    io.save_weights(tmp_path / "w.safetensors", {}, {})
    io.write_text(tmp_path / "t.txt", "")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
