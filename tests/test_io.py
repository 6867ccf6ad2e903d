"""File contracts: complete or absent, equal content is equal bytes, a broken file is one sentence, nothing is executed."""

import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from gdlib import io

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
            f"s{i}", image, rng.integers(0, 4, (9, 7)).astype(np.uint16), attrs={"source": f"{i}.png", "n": i}
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
    "h5": lambda path: io.write_samples(path, samples(), split="train", options={"b": [1, 2], "a": None}, text=""),
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


def test_volumes_are_stored_in_blocks_and_images_are_not(tmp_path):
    io.write_samples(tmp_path / "a.h5", volumes())
    with h5py.File(tmp_path / "a.h5") as file:
        chunks = {name: {key: item.chunks for key, item in group.items()} for name, group in file.items()}
    assert chunks["some"] == {"image": (1, 16, 64, 64), "label": (16, 64, 64), "ignore": (16, 64, 64)}
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
    assert (tmp_path / "a.csv").read_bytes() == b'name,value\r\n"a,b",0.3333333333\r\nc,2\r\nd,1\r\n'


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
    calls = re.compile(r"\bpickle\b|\bjoblib\b|allow_pickle\s*=\s*True|torch\.load\((?![^)]*weights_only=True)")
    for path in sorted((ROOT / "gdlib").rglob("*.py")):
        assert not calls.search(path.read_text()), path


def test_reading_a_header_imports_no_torch(tmp_path):
    io.save_weights(tmp_path / "w.safetensors", weights(), {"a": 1})
    code = "import sys; from gdlib import io; print(io.read_header(sys.argv[1]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "w.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'a': 1} False"


def test_header_is_one_json_text(tmp_path):
    from safetensors import safe_open

    io.save_weights(tmp_path / "w.safetensors", weights(), {"b": 1, "a": [1.5]})
    with safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert file.metadata().keys() == {"gdlib"}
        assert json.loads(file.metadata()["gdlib"]) == {"a": [1.5], "b": 1}
