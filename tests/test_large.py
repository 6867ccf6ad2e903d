"""Images that memory does not hold: what they need is known before, and blocks of one process give
what one piece gives."""

import json
import mmap
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
import torch
from conftest import OFFSETS
from torch import nn

from gdlib import io
from gdlib.blockwise.blocks import BLOCK
from gdlib.cli import work
from gdlib.cli.images import open_image
from gdlib.cli.main import main
from gdlib.io.failures import is_lack_of_memory
from gdlib.models import build
from gdlib.predict import living
from gdlib.predict.predictor import Predictor
from gdlib.segment import mutex
from gdlib.segment.parameters import defaults
from gdlib.types import Embedding
from gdlib.volumes import footprint, grid, jobs, large, memory
from gdlib.volumes.footprint import choose
from gdlib.volumes.memory import GIB

MIB = 2**20
AS = ["--device", "cpu", "--precision", "float32", "--engine", "torch"]
ROOT = Path(__file__).resolve().parents[1]


# --- What there is ----------------------------------------------------------------------------------------------------


def system(root, **files):
    """Write files as Linux has them; `__` in a name is `/`, and `_dot_` a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FREE = {"proc__meminfo": "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  8000 kB\n"}
V2 = "sys__fs__cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (FREE, 8000),
        # Version 2: the limit of a group around that of the process counts too; what was read from
        # files can be given back.
        (
            {
                **FREE,
                "proc__self__cgroup": "0::/job/step\n",
                f"{V2}__job__step__memory_dot_max": "max\n",
                f"{V2}__job__step__memory_dot_current": "1\n",
                f"{V2}__job__memory_dot_max": f"{6000 * 1024}\n",
                f"{V2}__job__memory_dot_current": f"{2000 * 1024}\n",
                f"{V2}__job__memory_dot_stat": f"anon 5\ninactive_file {500 * 1024}\nslab 7\n",
            },
            4500,
        ),
        # In a container the path may be that of the host, and only the outermost group is there.
        (
            {
                **FREE,
                "proc__self__cgroup": "0::/docker/a1b2\n",
                f"{V2}__memory_dot_max": f"{3000 * 1024}\n",
                f"{V2}__memory_dot_current": f"{1000 * 1024}\n",
            },
            2000,
        ),
        # Version 1.
        (
            {
                **FREE,
                "proc__self__cgroup": "4:cpuset:/job\n3:memory:/job\n0::/\n",
                "sys__fs__cgroup__memory__job__memory_dot_limit_in_bytes": f"{7000 * 1024}\n",
                "sys__fs__cgroup__memory__job__memory_dot_usage_in_bytes": f"{6500 * 1024}\n",
                "sys__fs__cgroup__memory__job__memory_dot_stat": "cache 1\ntotal_inactive_file "
                f"{100 * 1024}\n",
                "sys__fs__cgroup__memory__memory_dot_limit_in_bytes": "9223372036854771712\n",
                "sys__fs__cgroup__memory__memory_dot_usage_in_bytes": "5\n",
            },
            600,
        ),
        # More is used than there may be.
        (
            {
                **FREE,
                "proc__self__cgroup": "0::/\n",
                f"{V2}__memory_dot_max": "4096\n",
                f"{V2}__memory_dot_current": "8192\n",
            },
            0,
        ),
    ],
)
def test_what_is_free_is_the_least_of_all_limits(files, expected, tmp_path):
    assert memory.available(system(tmp_path, **files)) == expected * 1024


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not a Linux system")
def test_what_is_free_here():
    assert 0 < memory.available() < 2**50
    held, block = memory.resident(), mmap.mmap(-1, 100 * MIB)  # not what was freed before
    np.frombuffer(block, np.uint8)[:] = 1
    assert 90 * MIB < memory.resident() - held < 110 * MIB
    assert memory.resident() < memory.budget() < memory.resident() + memory.available()
    limited = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({GIB}, {GIB})); from "
        "gdlib.volumes import memory; print(memory.available())"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0.5 * GIB < int(done.stdout) < GIB
    del block


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("std::bad_alloc"), True),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to "
                "allocate 4 bytes"
            ),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_lacking(error, expected):
    assert is_lack_of_memory(error) is expected


# --- What an image needs ----------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """The image, 8 maps, 2 maps of which one is kept, and at most two of these at once."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        x = self.two(self.one(x).relu_())
        return Embedding(x[:, :2], x[:, 2:], {})


def test_bytes_that_are_alive_are_counted():
    # 8 maps beside the image, which the caller holds, then 3 beside the 8 and the image.
    network = Chain()
    assert living.live_bytes(network, 1, (100, 200), "cpu") == (4 * 100 * 200 * (1 + 8 + 3), 2)
    # nobody has so much
    assert living.live_bytes(network, 1, (10**5, 10**5), "meta") == (4 * 10**10 * 12, 2)
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def predictor_of(model="resunet", **options):
    torch.manual_seed(0)
    network = build(
        model, {"widths": [4, 8, 16, 32, 64], **options} if model == "resunet" else options
    )
    header = {
        "channels": 1,
        "offsets": OFFSETS[network.ndim],
        "normalisation": {"lower": 1.0, "upper": 99.8},
    }
    return Predictor(network, header, device="cpu", precision="float32")


PEAK = """
import re, sys
from pathlib import Path
def peak():  # the other source of it begins with what the parent had
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
MEASURE = (
    PEAK
    + """
import numpy as np
from gdlib.segment import segmenters
from gdlib.segment.parameters import defaults
from gdlib.volumes import memory
sys.path.insert(0, "tests")
from conftest import OFFSETS
segmenter, *shape = sys.argv[1], *map(int, sys.argv[2:])
ndim, rng = len(shape), np.random.default_rng(0)
side = 20
place = np.indices(shape[-2:]) // side
wall = (np.indices(shape[-2:]) % side == 0).any(0)
affinity = np.empty((len(OFFSETS[ndim]), *shape), np.uint8)
for k, offset in enumerate(OFFSETS[ndim]):
    same = (np.roll(place, offset[-2:], (1, 2)) == place).all(0)
    affinity[k] = rng.integers(150, 250, shape[-2:], np.uint8) * same
foreground = np.full(shape, 255, np.uint8)
del place, wall, same
small = tuple(slice(0, 40) for _ in shape)
run = lambda part: segmenters.segment(
    affinity[(slice(None), *part)], foreground[part], OFFSETS[ndim], segmenter, **defaults(segmenter, ndim)
)
run(small)  # what is loaded at first use
held = memory.resident()
assert run(tuple(slice(None) for _ in shape)).max() > 100
print(peak() - held)
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.long
@pytest.mark.parametrize("segmenter", ["mutex_watershed", "waterz", "multicut"])
@pytest.mark.parametrize("shape", [(700, 700), (8, 250, 250)], ids=["2D", "3D"])
def test_the_estimate_of_the_segmentation_is_near_what_it_takes(segmenter, shape):
    if segmenter == "waterz":
        pytest.importorskip("waterz")
    command = [sys.executable, "-c", MEASURE, segmenter, *map(str, shape)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parameters = defaults(segmenter, len(shape))
    each = footprint.segmenters.SEGMENTERS[segmenter].memory(
        len(shape), len(OFFSETS[len(shape)]), **parameters
    )
    assert 0.6 < int(done.stdout) / (each * np.prod(shape)) < 1.15


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
@pytest.mark.long
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_the_estimate_of_a_pass_is_near_what_it_takes(engine):
    if engine == "openvino":
        pytest.importorskip("openvino")
    code = PEAK + (
        "sys.path.insert(0, 'tests'); import numpy as np\n"
        "from test_large import predictor_of\nfrom gdlib.volumes import footprint, memory\n"
        f"p = predictor_of(); p.wanted_engine = p.engine = {engine!r}\n"
        "source = p.source(np.zeros((1, 900, 900), np.uint8) + np.arange(900, dtype=np.uint8))\n"
        "thought = footprint._Pass(p, source.shape).memory(p, source.shape, source.shape)\n"
        "source.range\nheld = memory.resident()\np.predict(source, p.blocks(source.shape)[0])\n"
        "print(thought, peak() - held)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    thought, taken = map(int, done.stdout.split())
    assert 0.5 < taken / thought < 1.25


def test_images_in_one_piece_in_blocks_or_not_at_all():
    predictor = predictor_of()
    parameters = defaults("mutex_watershed", 2)

    def need(size, budget, **more):
        return choose(
            predictor,
            (size, size),
            "mutex_watershed",
            parameters,
            held=300 * MIB,
            budget=budget,
            **more,
        )

    one = need(8000, 100 * GIB)
    assert one.grid is None
    assert one.need == one.whole > 300 * MIB + 8000 * 8000 * (7 + mutex.memory(2, 6))
    assert "needs up to" in one.sentence(100 * GIB)
    assert need(8000, one.whole).grid is None
    seen = []
    for budget in (one.whole - 1, 4 * GIB, 2 * GIB, GIB, GIB // 2):
        choice = need(8000, budget)
        assert choice.need <= budget
        assert choice.whole == one.whole
        seen.append((np.prod(choice.grid.block), np.prod(choice.predictor.block)))
        sentence = choice.sentence(budget)
        assert (
            f"segmented in {len(choice.grid.names)} blocks of "
            f"{'x'.join(map(str, choice.grid.sides))} pixels" in sentence
        )
        assert "\n" not in sentence
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) >= 3
    assert predictor.block == BLOCK[2]  # the next image has its own choice
    # Memory does not grow with the image.
    assert abs(need(20000, 3 * GIB).need - need(40000, 3 * GIB).need) < 0.3 * GIB
    with pytest.raises(
        ValueError,
        match=r"in one piece it needs .* GiB .*, and 0\.29 may be used; in blocks it "
        r"is .* at least",
    ):
        need(8000, 302 * MIB)
    # What was stopped goes on with the blocks that it had, if they fit; else it begins anew.
    assert need(8000, 100 * GIB, before=(1024, 1024)).grid.block == (1024, 1024)
    assert need(8000, GIB, before=(8000, 8000)).grid.block != (8000, 8000)


def test_passes_that_somebody_chose_stay():
    predictor, parameters = predictor_of(), defaults("multicut", 2)
    for sides in ((1024, 1024), (700, 300)):
        predictor.block, predictor.is_default = sides, sides == (1024, 1024)
        found = choose(predictor, (8000, 8000), "multicut", parameters, held=0, budget=200 * MIB)
        assert (found.predictor.block == sides) is not predictor.is_default


def test_a_network_without_blocks_says_so():
    predictor = predictor_of(
        "segformer",
        dims=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        heads=[1, 1, 1, 1],
        decoder_dim=8,
        in_channels=1,
    )
    assert footprint.is_large(predictor, (1200, 1200))
    with pytest.raises(
        ValueError, match=r"every pixel sees the whole image.*choose another " r"network"
    ) as error:
        choose(
            predictor, (3000, 3000), "multicut", defaults("multicut", 2), held=0, budget=GIB // 4
        )
    assert "\n" not in str(error.value)


def test_what_goes_through_the_network_at_most():
    predictor = predictor_of()
    for shape in ((3000, 2500), (700, 5000), (40, 50)):
        source = SimpleNamespace(shape=shape, read=None)
        sides = []
        source.read = lambda starts, stops, sides=sides: (
            sides.append([b - a for a, b in zip(starts, stops, strict=True)])
            or (_ for _ in ()).throw(KeyError)
        )
        for box in predictor.blocks(shape):
            with pytest.raises(KeyError):
                predictor.predict(source, box)
        most = predictor.largest_pass(shape, predictor.block_sides(shape))
        largest = np.max(sides, 0)
        assert (largest <= most).all()
        assert (np.array(most) - largest < 3 * np.array(predictor.network.divisor)).all()


# --- In blocks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a test has many of them, in a process of no size."""
    monkeypatch.setattr(grid, "BLOCK", {2: (128, 128), 3: (8, 16, 16)})
    monkeypatch.setattr(grid, "OVERLAP", {2: (16, 16), 3: (4, 8, 8)})
    monkeypatch.setattr(memory, "resident", lambda: 0)


@pytest.fixture
def limited(teacher, small_blocks, tmp_path):
    """Return `limited(image, out, *flags)`: `gdlib segment` with just less memory than one piece
    would need."""

    def run(image, *flags, code=0, out=tmp_path / "blocks", share=0.999):
        predictor = Predictor.load(teacher, device="cpu", precision="float32", engine="torch")
        with open_image(image, predictor.network.ndim, 1, tmp_path) as (array, _):
            shape = predictor.source(array).shape
            segmenter, parameters = (
                "mutex_watershed",
                predictor.header["segmentation"]["mutex_watershed"],
            )
            held = work.in_memory(array)
            whole = choose(predictor, shape, segmenter, parameters, held=held, budget=2**60).whole
        command = [
            "segment",
            image,
            "--model",
            teacher,
            "--out",
            out,
            *AS,
            "--memory",
            f"{share * whole / GIB:.12f}",
        ]
        command += flags
        assert main([str(part) for part in command]) == code
        return Path(out)

    run.out = tmp_path / "blocks"
    return run


@pytest.fixture(scope="module")
def field(squares, tmp_path_factory):
    """Return a TIFF file of 380 x 380 pixels with 961 squares."""
    path = tmp_path_factory.mktemp("field") / "field.tif"
    tifffile.imwrite(path, squares(7, (380, 380))[0][0])
    return path


@pytest.fixture(scope="module")
def one_piece(field, teacher, tmp_path_factory):
    """Return the label of the field in one piece."""
    out = tmp_path_factory.mktemp("one")
    command = ["segment", field, "--model", teacher, "--out", out, *AS]
    assert main([str(part) for part in command]) == 0
    return tifffile.imread(out / "field.tif")


def matched(one, other):
    """Return, for every object of one label, whether an object of the other has an IoU above 0.9
    with it."""
    pairs, common = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1, return_counts=True)
    sizes = np.bincount(one.ravel()), np.bincount(other.ravel())
    union = sizes[0][pairs[0]] + sizes[1][pairs[1]] - common
    found = np.zeros(len(sizes[0]), bool)
    found[pairs[0][(common / union > 0.9) & (pairs > 0).all(0)]] = True
    return found[1:]


def test_an_image_in_blocks_is_that_of_one_piece(field, one_piece, limited, capsys):
    out = limited(field)
    captured = capsys.readouterr()
    assert [path.name for path in out.iterdir()] == ["field.tif"]
    with tifffile.TiffFile(out / "field.tif") as file:
        assert file.pages[0].is_tiled
        assert not file.is_bigtiff
        assert len(file.pages) == 1
        label = file.asarray()
    assert label.dtype == np.uint32
    assert np.array_equal(np.unique(label), np.arange(label.max() + 1))
    assert captured.out == f"{field}: {label.max()} objects\n"
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{field}: in one piece it would need up to ")
    assert "it is segmented in 9 blocks of 128x128 pixels" in line
    assert one_piece.max() > 800
    here, there = matched(one_piece, label), matched(label, one_piece)
    assert here.mean() > 0.99
    assert there.mean() > 0.99
    far = np.ones(label.shape, bool)  # beyond where two blocks look, nothing may differ
    for axis, face in ((0, 128), (0, 256), (1, 128), (1, 256)):
        np.moveaxis(far, axis, 0)[face - 16 : face + 16] = False
    assert here[np.unique(one_piece[far])[1:] - 1].all()


def test_rows_of_a_stride_in_blocks(field, teacher, limited, tmp_path):
    """Blocks with their overlap begin at no multiple of it."""
    limited(field, "--set", "stride=3", share=0.8)
    command = ["segment", field, "--model", teacher, "--out", tmp_path / "one", *AS]
    assert main([str(part) for part in [*command, "--set", "stride=3"]]) == 0
    whole, label = (tifffile.imread(out / "field.tif") for out in (tmp_path / "one", limited.out))
    assert whole.max() > 800
    # the network of the tests learned for seconds: it was 0.988 with one of two choices of its steps
    assert matched(whole, label).mean() > 0.98
    assert matched(label, whole).mean() > 0.98


def test_a_dataset_in_blocks(field, one_piece, limited, tmp_path):
    with h5py.File(tmp_path / "field.h5", "w") as file:
        data = file.create_dataset("volumes/raw", data=tifffile.imread(field), chunks=(100, 100))
        data.attrs["resolution"] = [4.0, 4.0]
    out = limited(f"{tmp_path / 'field.h5'}:volumes/raw")
    with h5py.File(out / "field.h5") as file:
        found = file["volumes/raw"]
        assert found.dtype == np.uint32
        assert found.attrs["resolution"].tolist() == [4, 4]
        assert matched(one_piece, found[()]).mean() > 0.99


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"compression": "zlib", "tile": (64, 64)},
        {"byteorder": ">"},
        {"rowsperstrip": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape", [(90, 100), (90, 100, 3), (6, 40, 50)], ids=["grey", "colour", "stack"]
)
def test_large_tiff_files_are_mapped(options, shape, monkeypatch, tmp_path):
    from gdlib.data import tiff
    from gdlib.data.files import read_image

    array = np.random.default_rng(0).integers(0, 60000, shape).astype(np.uint16)
    kind = "rgb" if shape[-1] == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", array, photometric=kind, **options)
    read = read_image(tmp_path / "a.tif", scratch=tmp_path / "new")
    assert not isinstance(read, np.memmap)
    monkeypatch.setattr(tiff, "MAPPED", 1000)
    mapped = read_image(tmp_path / "a.tif", scratch=tmp_path / "new")
    assert isinstance(mapped, np.memmap)
    assert mapped.dtype == read.dtype == np.uint16
    assert np.array_equal(mapped, read)
    assert not list((tmp_path / "new").glob("*"))  # the copy has no name
    assert work.in_memory(mapped) == 0 < work.in_memory(read)


def test_no_disk_for_a_copy_of_the_image(monkeypatch, tmp_path):
    from gdlib.data import tiff
    from gdlib.data.files import read_image

    def full(*_):
        raise OSError(28, "No space left on device")

    tifffile.imwrite(tmp_path / "a.tif", np.ones((90, 100), np.uint8), compression="zlib")
    monkeypatch.setattr(tiff, "MAPPED", 1000)
    monkeypatch.setattr(tiff.os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        io.WriteError,
        match=r"decoded copy of the image: cannot be written .no space left.*free " r"some space",
    ):
        read_image(tmp_path / "a.tif", scratch=tmp_path)


class Stop(Exception):
    """Somebody has killed it."""


def stopped(monkeypatch, module, name, after):
    """Let a function be called so many times; return the list of its calls."""
    calls, function = [], getattr(module, name)

    def call(*args, **kwargs):
        if len(calls) == after:
            raise Stop
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize(
    ("step", "after"),
    [("predict_with", 5), ("segment", 3), ("match", 4), ("relabel", 2), ("tiles", 0)],
)
def test_what_was_stopped_goes_on(step, after, field, one_piece, limited, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        stopped(patch, jobs, step, after)
        with pytest.raises(Stop):
            limited(field)
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == [".field.blocks"]
    with monkeypatch.context() as patch:
        predicted = stopped(patch, jobs, "predict_with", 99)
        segmented = stopped(patch, jobs, "segment", 99)
        limited(field)
    if step == "predict_with":
        assert len(predicted) == 9 - after
    else:
        assert len(predicted) < 9
    assert len(segmented) <= 9 - (
        after if step == "segment" else 9 if step in ("match", "relabel", "tiles") else 0
    )
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["field.tif"]
    assert matched(one_piece, tifffile.imread(tmp_path / "blocks" / "field.tif")).mean() > 0.99


def stop_after_segments(limited, field, monkeypatch, count):
    """Segment the first blocks of an image, and return the folder of what is left."""
    with monkeypatch.context() as patch:
        stopped(patch, jobs, "segment", count)
        with pytest.raises(Stop):
            limited(field)
    return limited.out / ".field.blocks"


def test_other_parameters_need_no_other_prediction(field, limited, monkeypatch):
    folder = stop_after_segments(limited, field, monkeypatch, 2)
    kept = {path.name for path in (folder / "predictions").iterdir()}
    assert len(kept) > 4
    with monkeypatch.context() as patch:
        predicted = stopped(patch, jobs, "predict_with", 99)
        segmented = stopped(patch, jobs, "segment", 99)
        limited(field, "--min-size", "30")
    assert len(predicted) == 9 - len(kept)
    assert len(segmented) == 9
    assert np.bincount(tifffile.imread(limited.out / "field.tif").ravel())[1:].min() >= 30


def test_nothing_is_kept_of_another_image(field, limited, monkeypatch):
    plan = stop_after_segments(limited, field, monkeypatch, 2) / "plan.json"
    io.write_text(plan, json.dumps(json.loads(plan.read_text()) | {"identity": "another"}))
    predicted = stopped(monkeypatch, jobs, "predict_with", 99)
    limited(field)
    assert len(predicted) == 9


def test_too_small_a_disk_is_said_before(field, limited, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    predicted = stopped(monkeypatch, jobs, "predict_with", 0)
    limited(field, code=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"gdlib: error: {field}: in blocks it needs about ")
    assert "choose another folder for --out" in line
    assert not predicted


def test_two_processes_do_not_share_blocks(field, limited, capsys, tmp_path):
    folder = tmp_path / "blocks" / ".field.blocks"
    folder.mkdir(parents=True)
    with open(folder / "lock", "a+b") as file:
        large.lock(file)
        limited(field, code=1)
    assert "another process is at work on it" in capsys.readouterr().err


def test_pixels_that_are_no_numbers(limited, tmp_path, capsys):
    image = np.random.default_rng(0).random((300, 600)).astype(np.float32)
    image[299, 599] = np.nan
    tifffile.imwrite(tmp_path / "holes.tif", image)
    limited(tmp_path / "holes.tif", code=1)
    assert f"error: {tmp_path / 'holes.tif'}: " in (
        line := capsys.readouterr().err.splitlines()[-1]
    )
    assert "NaN or infinite pixels" in line
    assert not list((tmp_path / "blocks").iterdir())


def test_less_memory_than_any_block_needs(field, limited, capsys):
    limited(field, code=1, share=0.001)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {field}: in one piece it needs up to" in line
    assert "a larger --memory to try all the same" in line


@pytest.mark.parametrize("text", ["0", "-1", "many", "nan", "inf"])
def test_memory_is_a_number_of_gib(text, teacher, capsys):
    with pytest.raises(SystemExit):
        main(["segment", "a.tif", "--model", str(teacher), "--out", "a", f"--memory={text}"])
    assert "argument --memory: it must be a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            MemoryError("std::bad_alloc"),
            "too little memory (std::bad_alloc); close other programs, or say with --memory",
        ),
        (MemoryError(), "too little memory (no more is known); close"),
        (
            RuntimeError("CUDA out of memory.\nTried"),
            "(CUDA out of memory.); choose a smaller --block",
        ),
    ],
)
@pytest.mark.parametrize("where", ["predict", "segment"])
def test_too_little_memory_after_all_is_one_sentence(
    error, told, where, field, teacher, tmp_path, monkeypatch, capsys
):
    def fail(*_, **__):
        raise error

    if where == "predict":
        monkeypatch.setattr(Predictor, "predict", fail)
    else:
        monkeypatch.setattr(footprint.segmenters, "segment", fail)
    assert (
        main(
            [
                "segment",
                str(field),
                "--model",
                str(teacher),
                "--out",
                str(tmp_path),
                "--device",
                "cpu",
            ]
        )
        == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"gdlib: error: {field}: there was ")
    assert told in line


def test_other_errors_are_not_called_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), work.lack_of_memory("a.tif"):
        raise RuntimeError("shapes do not fit")
