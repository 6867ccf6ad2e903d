"""Networks that are run without torch: as with it, and only where it is sure to be the same."""

import importlib.util
import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import tifffile
import torch

from gdlib import devices, io, jit, trained
from gdlib.blockwise import lite, stored, vino
from gdlib.cli.main import main
from gdlib.predict.predictor import Predictor
from gdlib.registry import SOURCES
from gdlib.volumes.footprint import Need

usable = pytest.mark.skipif(
    not (devices.int8_pays() and importlib.util.find_spec("openvino") and jit.ENABLED),
    reason='needs a processor with AVX2, and pip install "gdlib[fast]"',
)
NUCLEI = trained.find("nuclei")
KEPT = {"device": "cpu", "precision": "int8"}


@pytest.fixture
def nuclei(tmp_path):
    """The network of the package with its form in 8 bits, to be damaged."""
    for path in (NUCLEI, io.int8_beside(NUCLEI)):
        shutil.copy(path, tmp_path)
    return tmp_path / NUCLEI.name


@pytest.fixture(scope="module")
def image():
    counts = {"images": dict.fromkeys(("train", "val", "test"), 1)}
    return next(iter(SOURCES.make("nuclei_phantom", None, **counts)["test"])).image


def same(one, other):
    """Are vectors the same, but for the order in which two libraries sum?"""
    return np.allclose(one, other, rtol=0, atol=1e-5)


def rewritten(weights, **changes):
    """Write the header of the form anew."""
    path = io.int8_beside(weights)
    state, header = io.load_weights(path)
    io.save_weights(path, state, header | changes)


@usable
@pytest.mark.parametrize("options", [{}, {"block": 64}, {"invert": True}, {"block": (48, 400)}])
def test_it_says_what_the_network_says_with_torch(image, options):
    one = Predictor.load(NUCLEI, **KEPT, **options)
    other = lite.load(NUCLEI, **KEPT, **options)
    assert isinstance(other, lite.Lite)
    assert other.blocks(image.shape[1:]) == one.blocks(image.shape[1:])
    assert other.largest_pass((900, 70), (64, 64)) == one.largest_pass((900, 70), (64, 64))
    assert (other.engine, other.precision, other.itemsize, other.device_type) == (
        *(one.engine, one.precision, one.itemsize, one.device_type),
    )
    mine, theirs = (tool(image[:, :150, :170], keep_embedding=True) for tool in (other, one))
    assert np.array_equal(mine.affinity, theirs.affinity)
    assert same(mine.embedding, theirs.embedding)
    assert np.array_equal(mine.foreground, theirs.foreground)
    assert mine.foreground.max() > 200


@usable
def test_it_needs_as_much_memory(image):
    about = ("mutex_watershed", {"stride": 4})
    for shape in ((100, 200), (5000, 4000)):
        needs = [Need(tool(NUCLEI, **KEPT), *about)(shape) for tool in (lite.load, Predictor.load)]
        assert needs[0] == pytest.approx(needs[1], rel=1e-3)


@usable
def test_it_is_taken_where_it_is_the_same(nuclei, monkeypatch, tmp_path):
    assert isinstance(trained.predictor(nuclei, **KEPT), lite.Lite)
    assert isinstance(trained.predictor(nuclei, device="cpu"), lite.Lite)
    for other in (
        {"precision": "float32"},
        {"engine": "torch", "precision": "auto"},
        {"augment": True},
    ):
        assert lite.load(nuclei, **(KEPT | other)) is None
        assert isinstance(trained.predictor(nuclei, **(KEPT | other)), Predictor)
    # a driver of a GPU is there: torch has to say whether one can be used
    monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path),))
    assert lite.load(nuclei) is None
    assert isinstance(lite.load(nuclei, device="cpu"), lite.Lite)
    monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path / "nothing"),))
    assert isinstance(lite.load(nuclei), lite.Lite)
    monkeypatch.setattr(devices, "int8_pays", lambda: False)
    assert lite.load(nuclei, device="cpu") is None
    assert lite.load(nuclei, **KEPT) is None


@usable
def test_what_is_wrong_is_left_to_who_says_it(nuclei, monkeypatch):
    rewritten(nuclei, network={"ndim": 2})
    assert lite.load(nuclei, **KEPT) is None  # of another version, perhaps
    assert isinstance(trained.predictor(nuclei, **KEPT), Predictor)
    state, header = io.load_weights(nuclei)
    io.save_weights(nuclei, state, header | {"step": 0})
    with pytest.raises(ValueError, match="made of other weights"):
        trained.predictor(nuclei, **KEPT)
    monkeypatch.setattr(vino, "is_installed", lambda name="openvino": False)
    with pytest.raises(ValueError, match=r"gdlib\[fast\]"):
        trained.predictor(nuclei, **KEPT)


openvino = pytest.mark.skipif(
    not (importlib.util.find_spec("openvino") and jit.ENABLED), reason='pip install "gdlib[fast]"'
)


@openvino
@pytest.mark.parametrize(
    ("name", "precision", "shape"),
    [
        ("nuclei", "float32", (1, 150, 170)),
        ("worms", "bfloat16", (1, 90, 101)),
        ("neurons", "float32", (1, 6, 70, 50)),
    ],
)
def test_a_network_is_kept_as_it_was_converted(name, precision, shape, monkeypatch, tmp_path):
    monkeypatch.setenv("GDLIB_CACHE", str(tmp_path / "new" / "cache"))
    weights, options = trained.find(name), {"device": "cpu", "precision": precision}
    assert lite.load(weights, **options) is None
    first = trained.predictor(weights, **options)
    assert isinstance(first, Predictor)
    second = trained.predictor(weights, **options)
    assert isinstance(second, lite.Lite)
    for name in ("precision", "itemsize", "engine"):
        assert getattr(first, name) == getattr(second, name)
    image = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    one, other = (tool(image, keep_embedding=True) for tool in (first, second))
    assert np.array_equal(one.affinity, other.affinity)
    assert np.array_equal(one.foreground, other.foreground)
    assert same(one.embedding, other.embedding)
    about = ("multicut" if len(shape) == 4 else "mutex_watershed", {})
    assert Need(first, *about)(shape[1:]) == pytest.approx(
        Need(second, *about)(shape[1:]), rel=1e-3
    )
    (file,) = (tmp_path / "new" / "cache").iterdir()
    other_type = {"float32": "bfloat16", "bfloat16": "float32"}[precision]
    assert isinstance(lite.load(weights, device="cpu", precision=other_type), lite.Lite)
    assert lite.load(weights, device="cpu", precision="float16") is None
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert lite.load(weights, **options) is None  # it is damaged
    assert not file.exists()
    assert isinstance(trained.predictor(weights, **options), Predictor)
    assert isinstance(trained.predictor(weights, **options), lite.Lite)


@openvino
def test_what_is_kept_is_of_these_weights_and_this_code(nuclei, monkeypatch, tmp_path):
    monkeypatch.setenv("GDLIB_CACHE", str(tmp_path))
    before = lite.kept(nuclei)
    assert before.parent == tmp_path
    assert lite.kept(NUCLEI) == before  # wherever they are
    monkeypatch.setattr(io, "code_sha256", lambda: "of another version")
    assert lite.kept(nuclei) != before
    monkeypatch.undo()
    monkeypatch.setenv("GDLIB_CACHE", str(tmp_path))
    state, header = io.load_weights(nuclei)
    io.save_weights(nuclei, state, header | {"step": 0})
    assert lite.kept(nuclei) != before
    monkeypatch.setenv("GDLIB_CACHE", "")
    assert lite.kept(nuclei) is None
    monkeypatch.delenv("GDLIB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert lite.kept(nuclei).parent.as_posix() == "elsewhere/gdlib"


@openvino
def test_where_nothing_can_be_kept_nothing_is(nuclei, monkeypatch, tmp_path):
    options = {"device": "cpu", "precision": "float32"}
    (tmp_path / "file").touch()
    for folder in ("", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        monkeypatch.setenv("GDLIB_CACHE", folder)
        for _ in range(2):
            assert isinstance(trained.predictor(nuclei, **options), Predictor)
    monkeypatch.setenv("GDLIB_CACHE", str(tmp_path / "cache"))
    trained.predictor(nuclei, **options, engine="torch")
    assert not (tmp_path / "cache").exists()


@openvino
def test_the_newest_are_kept(nuclei, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("GDLIB_CACHE", str(cache))
    for k in range(lite.MOST):
        old = cache / f"{k}{lite.KEPT}"
        old.touch()
        os.utime(old, (k + 1, k + 1))
    (cache / "other").touch()
    trained.predictor(nuclei, device="cpu", precision="float32")
    left = {path.name for path in cache.iterdir()}
    assert left == {
        lite.kept(nuclei).name,
        "other",
        *(f"{k}{lite.KEPT}" for k in range(1, lite.MOST)),
    }


@pytest.mark.parametrize("facts", [None, {}, {"ndim": 2}, [1], "2", {"no": "such"}])
def test_facts_of_another_version(facts):
    assert lite.Facts.of({lite.FACTS: facts}) is None
    assert lite.Facts.of({}) is None


def without_torch(code, *arguments, **environment):
    """Run code in a process of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout.strip()


@usable
def test_a_command_on_images_does_not_import_torch(image, tmp_path):
    if not devices.has_only_cpu():
        pytest.skip("torch has to be asked for the GPU here")
    for name in "ab":
        tifffile.imwrite(tmp_path / f"{name}.tif", image[0])
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["raw"] = image[0]
    code = (
        "import sys; from gdlib.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, 'torch' in sys.modules)"
    )
    given = [tmp_path / "a.tif", tmp_path / "b.tif", f"{tmp_path}/c.h5:raw"]
    command = ["segment", *given, "--model", "nuclei", "--preview", "--diameter", "20"]
    for extra in ([], ["--table", tmp_path / "t.csv", "--memory", "1"]):
        said = without_torch(code, *command, *extra, "--overwrite", "--out", tmp_path / "out")
        assert said.splitlines()[-1] == "0 False"
    before = without_torch(code, *command, "--precision", "float32", "--out", tmp_path / "other")
    assert before.splitlines()[-1] == "0 True"
    # Of a program of our own, Numba gets ready without SciPy, of which a kernel of others may need
    # BLAS.
    for call, wanted in (("main()", False), ("main(sys.argv[1:])", True)):
        code = f"import sys; from gdlib.cli.main import main; {call}; print('scipy.linalg' in sys.modules)"
        said = without_torch(code, "segment", given[0], "--overwrite", "--out", tmp_path / "out")
        assert said.splitlines()[-1] == str(wanted)
    call = (
        "import sys, numpy, gdlib; found = gdlib.load().segment(numpy.zeros((64, 64), 'uint8'));"
        "print(found.max(), 'torch' in sys.modules)"
    )
    assert without_torch(call) == "0 False"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2,1"},
        {"MKL_NUM_THREADS": "1"},
    ],
)
def test_there_are_as_many_threads_as_torch_takes(given):
    code = (
        "from gdlib import devices; print(devices.threads()); import torch; "
        "print(torch.get_num_threads(), devices.threads())"
    )
    ours, torchs = without_torch(code, **given).splitlines()
    assert torchs.split() == [ours] * 2
    code = (
        "import threading; from gdlib import devices; all = devices.threads(); "
        "devices.use_threads(5); t = threading.Thread(target=lambda: print(devices.threads() == all"
        ")); t.start(); t.join(); print(devices.threads())"
    )
    assert without_torch(code, **given).split() == ["True", "5"]


def test_units_of_the_processor(monkeypatch, tmp_path):
    capable = getattr(torch.cpu, "get_capabilities", dict)()
    if "avx2" in capable and devices.CPUINFO.exists():
        assert devices.int8_pays() == bool(capable["avx2"])
        assert ("AVX512-BF16" in devices.bfloat16_units()) == bool(capable.get("avx512_bf16"))
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512_bf16x\n"
    )
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    assert devices.int8_pays()
    assert devices.bfloat16_units() == []
    cpuinfo.write_text("flags\t: amx_int8 amx_bf16 avx_vnni avx512_bf16\n")
    assert not devices.int8_pays()
    assert devices.bfloat16_units() == ["AMX", "AVX512-BF16"]
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n")  # of ARM
    assert not devices.int8_pays()
    assert devices.bfloat16_units() == []
    cpuinfo.unlink()  # not Linux: torch is asked
    assert devices.int8_pays() == bool(capable.get("avx2"))


def test_the_name_of_the_processor(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    monkeypatch.setattr(devices.platform, "processor", lambda: "")
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    cpuinfo.write_text(
        "processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC 9R14 \nstepping\t: 1\n"
    )
    assert devices.cpu_name() == "AMD EPYC 9R14"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n")  # of ARM
    assert devices.cpu_name() == "arm64"
    cpuinfo.unlink()  # not Linux
    assert devices.cpu_name() == "arm64"


@pytest.mark.skipif(not jit.ENABLED, reason="nothing is compiled here")
@pytest.mark.parametrize("shape", [(1, 1), (7, 30), (3, 5, 9)])
def test_probabilities_in_8_bits(shape):
    logit = np.random.default_rng(0).normal(scale=9, size=shape).astype(np.float32)
    logit.flat[0] = 1e4 if logit.size > 1 else -1e4
    expected = 255 / (1 + np.exp(-logit.astype(float).clip(-700, 700)))
    found = stored.foreground(logit)
    assert (found.dtype, found.shape) == (np.uint8, shape)
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    strided = np.repeat(logit, 2, axis=-1)[..., ::2]
    assert np.array_equal(stored.foreground(strided), found)


def test_arrays_are_those_that_were_written(nuclei):
    path = io.int8_beside(nuclei)
    arrays, header = io.load_arrays(path)
    state, same = io.load_weights(path)
    assert header == same
    assert {name: one.tobytes() for name, one in arrays.items()} == {
        name: one.numpy().tobytes() for name, one in state.items()
    }
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(io.DataError, match="is damaged"):
        io.load_arrays(path)


def test_messages_are_the_same(nuclei, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "complex.tif", np.zeros((40, 50), np.complex64))
    out = ["--model", str(nuclei), "--out", str(tmp_path / "out"), "--device", "cpu"]
    told = []
    for precision in ("auto", "float32"):
        command = ["segment", f"{tmp_path}/complex.tif", *out, "--precision", precision]
        assert main(command) == 1
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert "does not fit this network" in told[0]


AT_ONCE = """
import sys, threading
sys.setswitchinterval(1e-7)  # threads take turns as often as they can
import numpy as np
from gdlib.blockwise import lite
network = lite.load(sys.argv[1], device="cpu", precision="int8", at_once=2)
image, together = np.zeros((1, 1, 64, 64), np.float32), threading.Barrier(2)
def infer():
    together.wait()
    with network.run.lent(image):
        pass
threads = [threading.Thread(target=infer) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@usable
def test_two_threads_may_be_the_first_to_use_a_network():
    """OpenVINO waits for itself if its first arrays come from two threads: four in five times."""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", AT_ONCE, str(NUCLEI)], check=True, timeout=60)
