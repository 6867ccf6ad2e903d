"""The command line: the same results as the Python calls, one line for a mistake, and a whole study
without Snakemake."""

import csv
import io as text_io
import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

from gdlib import io
from gdlib.blockwise.blocks import BLOCK
from gdlib.cli.main import main
from gdlib.config import TEACHER, Config
from gdlib.evaluate.metrics import METRICS, evaluate
from gdlib.evaluate.scores import COUNTS, of_image
from gdlib.types import Embedding

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("prepare", "train", "predict", "segment", "evaluate", "baselines", "profile")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """`--threads` sets environment variables for the process; they must not outlive the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    monkeypatch.delenv("GDLIB_TRACEBACK", raising=False)
    # of this file, whose network the weights below name
    monkeypatch.setenv("GDLIB_PLUGINS", __name__)


def run(*arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code


def process(*arguments, **kwargs):
    command = [sys.executable, "-m", "gdlib", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.fixture
def refusal(capsys):
    """Return `refusal(*arguments)` -> the one line on stderr of a command that must fail."""

    def check(*arguments):
        capsys.readouterr()
        run(*arguments, code=1)
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.strip()]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("gdlib: error: ")
        assert len(lines[0]) > len("gdlib: error: ") + 10
        return lines[0]

    return check


@pytest.fixture
def images(tmp_path, squares):
    """Return a folder with a PNG, a 16-bit TIFF and a file that is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(squares(50)[0][0]).save(folder / "first.png")
    tifffile.imwrite(folder / "second.tif", squares(51, (33, 70))[0][0].astype(np.uint16) * 100)
    (folder / "notes.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def by_hand(teacher):
    """Return `by_hand(image, **parameters)` -> label, by the Python calls behind the command."""
    from gdlib.predict.predictor import Predictor
    from gdlib.segment.segmenters import segment

    predictor = Predictor.load(teacher, device="cpu", precision="float32")

    def make(image, segmenter="mutex_watershed", **parameters):
        prediction = predictor(image)
        parameters = predictor.header["segmentation"].get(segmenter, {}) | parameters
        return segment(
            prediction.affinity,
            prediction.foreground,
            predictor.header["offsets"],
            segmenter,
            **parameters,
        )

    return make


def segment_command(teacher, out, *images, **options):
    options = {"precision": "float32", "device": "cpu", **options}
    flags = [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    return ["segment", *images, "--model", teacher, "--out", out, *flags]


def test_segment_writes_labels_that_equal_the_python_calls(
    teacher, images, by_hand, squares, tmp_path, capsys
):
    out = tmp_path / "new" / "labels"
    run(*segment_command(teacher, out, images))
    assert sorted(path.name for path in out.iterdir()) == ["first.tif", "second.tif"]
    first, second = (tifffile.imread(out / name) for name in ("first.tif", "second.tif"))
    assert first.dtype == second.dtype == np.uint32
    assert np.array_equal(first, by_hand(squares(50)[0]))
    assert np.array_equal(second, by_hand(squares(51, (33, 70))[0].astype(np.uint16) * 100))
    assert evaluate(squares(50)[1], first)["aji"] > 0.5  # objects, by a network of forty steps
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{images / 'first.png'}: {first.max()} objects",
        f"{images / 'second.tif'}: {second.max()} objects",
    ]


def test_segment_takes_files_one_by_one_and_writes_what_viewers_open(
    teacher, images, by_hand, squares, tmp_path
):
    out = tmp_path / "labels"
    run(*segment_command(teacher, out, images / "second.tif", images / "first.png", threads=1))
    with tifffile.TiffFile(out / "first.tif") as file:
        page = file.pages[0]
        assert len(file.pages) == 1
        assert page.shape == (40, 44)
        assert page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
        assert np.array_equal(page.asarray(), by_hand(squares(50)[0]))
    assert not [path for path in out.iterdir() if path.suffix != ".tif"]


def test_what_fails_beside_the_network_stops_the_command(teacher, images, refusal, tmp_path):
    (tmp_path / "out" / "first.tif" / "taken").mkdir(parents=True)
    assert "first.tif" in refusal(*segment_command(teacher, tmp_path / "out", images))


@pytest.mark.parametrize("block", [16, "16x48"])
def test_segment_in_small_blocks_is_the_same(
    teacher, images, by_hand, squares, tmp_path, monkeypatch, block
):
    from gdlib.predict.predictor import Predictor

    seen, predict = [], Predictor.predict
    monkeypatch.setattr(
        Predictor, "predict", lambda self, *args: seen.append(args[1]) or predict(self, *args)
    )
    run(*segment_command(teacher, tmp_path, images / "second.tif", block=block))
    assert len(seen) == {16: 15, "16x48": 6}[block]
    found = tifffile.imread(tmp_path / "second.tif")
    assert np.array_equal(found, by_hand(squares(51, (33, 70))[0].astype(np.uint16) * 100))


def test_segment_parameters_of_ones_own(teacher, images, by_hand, squares, tmp_path):
    run(
        *segment_command(
            teacher, tmp_path / "a", images / "first.png", min_size=75, foreground_threshold=0.9
        )
    )
    result = tifffile.imread(tmp_path / "a" / "first.tif")
    image = squares(50)[0]
    assert np.array_equal(result, by_hand(image, min_size=75, foreground_threshold=0.9))
    assert not np.array_equal(result, by_hand(image))
    run(*segment_command(teacher, tmp_path / "b", images / "first.png", min_size=0))
    assert np.array_equal(tifffile.imread(tmp_path / "b" / "first.tif"), by_hand(image, min_size=0))
    command = segment_command(teacher, tmp_path / "c", images / "first.png", set="stride=3")
    run(*command, "--set", "foreground_threshold=0.75")
    expected = by_hand(image, stride=3, foreground_threshold=0.75)
    assert np.array_equal(tifffile.imread(tmp_path / "c" / "first.tif"), expected)


def test_segment_by_another_segmenter(teacher, images, by_hand, squares, tmp_path, capsys):
    run(
        *segment_command(
            teacher, tmp_path / "a", images / "first.png", segmenter="multicut", set="beta=0.3"
        )
    )
    expected = by_hand(squares(50)[0], segmenter="multicut", beta=0.3)
    assert np.array_equal(tifffile.imread(tmp_path / "a" / "first.tif"), expected)
    assert (
        "multicut was not tuned with these weights, only mutex_watershed" in capsys.readouterr().err
    )


def test_segment_needs_no_truth(teacher, images, refusal, tmp_path):
    """Users' images have no ground truth, so a segmenter that wants its foreground is refused,
    tuned or not."""
    command = segment_command(
        teacher, tmp_path / "a", images / "first.png", segmenter="mutex_watershed_masked"
    )
    line = refusal(*command)
    assert "mutex_watershed_masked needs the foreground of a ground truth" in line
    assert line.rstrip().endswith("choose mutex_watershed")
    assert not (tmp_path / "a").exists()


def test_segment_refuses_with_one_line(teacher, images, refusal, tmp_path, squares):
    out = tmp_path / "labels"
    good = images / "first.png"
    assert "missing.png" in refusal(*segment_command(teacher, out, images / "missing.png"))
    assert "notes.txt" in refusal(*segment_command(teacher, out, images / "notes.txt"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(*segment_command(teacher, out, tmp_path / "empty"))
    for model in (tmp_path / "missing.safetensors", good, tmp_path):
        assert str(model) in refusal(*segment_command(model, out, good))
    (images / "broken.png").write_bytes(good.read_bytes()[:100])
    assert "broken.png" in refusal(*segment_command(teacher, out, images / "broken.png"))
    Image.fromarray(squares(50)[0][0][..., None] // np.uint8([1, 2, 3])).save(images / "colour.png")
    line = refusal(*segment_command(teacher, out, images / "colour.png"))
    assert "colour.png" in line
    assert "1 channel" in line
    (tmp_path / "other").mkdir()
    Image.fromarray(squares(50)[0][0]).save(tmp_path / "other" / "first.tif")
    assert '"first"' in refusal(
        *segment_command(teacher, out, good, tmp_path / "other" / "first.tif")
    )
    assert '"nonsense"' in refusal(*segment_command(teacher, out, good, device="nonsense"))
    assert '"int7"' in refusal(*segment_command(teacher, out, good, precision="int7"))
    assert '"onnx"' in refusal(*segment_command(teacher, out, good, engine="onnx"))
    assert "waterz" in refusal(*segment_command(teacher, out, good, segmenter="watrz"))
    line = refusal(*segment_command(teacher, out, good, set="strid=2"))
    assert 'mutex_watershed has no parameter "strid": did you mean "stride"?' in line
    assert "block" in refusal(*segment_command(teacher, out, good, block="8x8x8"))
    assert "written over" in refusal(*segment_command(teacher, images, images / "second.tif"))
    with pytest.raises(SystemExit):
        main([str(part) for part in segment_command(teacher, out, good, set="stride")])
    assert not out.exists() or not list(out.iterdir())
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refusal(*segment_command(teacher, tmp_path / "file", good))


class Volume(nn.Module):
    """A network of volumes that needs no training: bright voxels of one brightness are one
    object."""

    ndim = 3
    divisor = (1, 2, 2)
    remainder = margin = (0, 0, 0)
    halo = (1, 1, 1)

    def __init__(self):
        super().__init__()
        self.foreground = nn.Conv3d(1, 1, 1)  # only so that there is a weight

    def forward(self, x):
        kernel = torch.ones(1, 1, 3, 3, 3)
        near = F.conv3d(x, kernel, padding=1) / F.conv3d(torch.ones_like(x), kernel, padding=1)
        angle = 3 * near
        return Embedding(torch.cat([angle.cos(), angle.sin(), angle], 1), 20 * (x - 0.1), {})


VOLUME_OFFSETS = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-2, 0, 0], [0, -5, 0], [0, 0, -5]]


@pytest.fixture
def volume_model(tmp_path):
    """Return the weights file of `Volume`, tuned for two segmenters."""
    tuned = {
        "multicut": {"beta": 0.5, "min_size": 3},
        "mutex_watershed": {"foreground_threshold": 0.4, "min_size": 5},
    }
    scores = dict.fromkeys(METRICS, 0.5)
    header = {
        "model": f"{__name__}:Volume",
        "options": {},
        "channels": 1,
        "offsets": VOLUME_OFFSETS,
        "normalisation": {"lower": 0.0, "upper": 100.0},
        "segmentation": tuned,
        "validation": {
            "multicut": scores | {"voi": 0.25},
            "mutex_watershed": scores | {"voi": 0.75},
        },
        "run": {
            "dataset": "blocks",
            "network": "volume",
            "method": "none",
            "seed": 0,
            "segmenters": ["mutex_watershed", "multicut"],
            "recipe": {"steps": 1, "batch_size": 1, "patch": [4, 8, 8]},
            "terms": [],
        },
        **{key: "?" for key in ("gdlib", "torch", "device", "precision", "step")},
    }
    path = tmp_path / "volume.safetensors"
    io.save_weights(path, Volume().state_dict(), header)
    return path


@pytest.fixture
def volume(tmp_path):
    """Return an HDF5 file with an image of boxes of different brightness, and the label of the
    boxes."""
    label = np.zeros((10, 40, 44), np.uint32)
    for number, (z, y, x) in enumerate(np.ndindex(2, 3, 3), start=1):
        label[5 * z : 5 * z + 4, 13 * y : 13 * y + 11, 14 * x : 14 * x + 12] = number
    image = np.append(0, 60 + 10 * np.random.default_rng(0).permutation(18)).astype(np.uint8)[label]
    with h5py.File(tmp_path / "brain.h5", "w") as file:
        raw = file.create_dataset("volumes/raw", data=image, chunks=(4, 16, 16))
        raw.attrs["resolution"] = (40.0, 4.0, 4.0)
        file["volumes/labels"] = label
        file["note"] = np.zeros(3)
    return tmp_path / "brain.h5", image, label


@pytest.fixture
def volume_by_hand(volume_model, volume):
    """Return the label that the Python calls give for the volume."""
    from gdlib.predict.predictor import Predictor
    from gdlib.segment.segmenters import segment

    predictor = Predictor.load(volume_model, device="cpu", precision="float32")
    prediction = predictor(volume[1][None])

    def make(segmenter="mutex_watershed", **parameters):
        parameters = predictor.header["segmentation"][segmenter] | parameters
        return segment(
            prediction.affinity, prediction.foreground, VOLUME_OFFSETS, segmenter, **parameters
        )

    return make


def test_segment_a_dataset_of_an_hdf5_file(volume_model, volume, volume_by_hand, tmp_path, capsys):
    path, _, label = volume
    out = tmp_path / "labels"
    run(*segment_command(volume_model, out, f"{path}:volumes/raw", block="4x16x16"))
    assert [item.name for item in out.iterdir()] == ["brain.h5"]  # and nothing temporary
    with h5py.File(out / "brain.h5") as file:
        found = file["volumes/raw"]
        assert found.dtype == np.uint32
        assert found.chunks is not None
        assert found.attrs["resolution"].tolist() == [40, 4, 4]
        # of the main segmenter, which is not the first by name
        assert np.array_equal(found[()], volume_by_hand())
        assert evaluate(label, found[()])["aji"] > 0.9
    assert capsys.readouterr().out == f"{path}:volumes/raw: {found_count(out)} objects\n"
    run(
        *segment_command(
            volume_model, out, f"{path}:/volumes/raw", segmenter="multicut", min_size=0
        )
    )
    with h5py.File(out / "brain.h5") as file:
        assert np.array_equal(file["volumes/raw"][()], volume_by_hand("multicut", min_size=0))


def found_count(folder):
    with h5py.File(folder / "brain.h5") as file:
        return file["volumes/raw"][()].max()


def test_segment_a_tiff_stack_and_a_file_with_one_dataset(
    volume_model, volume, volume_by_hand, tmp_path
):
    _, image, _ = volume
    scale = {"resolution": (5, 5), "metadata": {"axes": "ZCYX", "unit": "um", "spacing": 2}}
    # an axis of one pixel does no harm
    tifffile.imwrite(tmp_path / "stack.tif", image[:, None], imagej=True, **scale)
    run(*segment_command(volume_model, tmp_path / "a", tmp_path / "stack.tif", block=16))
    with tifffile.TiffFile(tmp_path / "a" / "stack.tif") as file:
        assert np.array_equal(file.asarray(), volume_by_hand())
        assert file.series[0].axes == "ZYX"
        assert file.pages[0].tags["XResolution"].value == (5, 1)
        assert file.imagej_metadata["unit"] == "um"
        assert file.imagej_metadata["spacing"] == 2
    (tmp_path / "files").mkdir()
    with h5py.File(tmp_path / "files" / "one.hdf5", "w") as file:
        file["image"] = image[None]  # channels first is fine too
    run(*segment_command(volume_model, tmp_path / "a", tmp_path / "files"))
    with h5py.File(tmp_path / "a" / "one.h5") as file:
        assert np.array_equal(file["image"][()], volume_by_hand())


# what was computed of the negative, or of one view alone, is of another image
@pytest.mark.parametrize(
    ("more", "left"),
    [([], 3 * 3 * 3 - 10), (["--invert"], 3 * 3 * 3), (["--augment"], 3 * 3 * 3)],
)
def test_a_volume_that_was_stopped_goes_on(
    more, left, volume_model, volume, volume_by_hand, tmp_path, monkeypatch
):
    from gdlib.predict.predictor import Predictor

    path, _, _ = volume
    out = tmp_path / "labels"
    command = segment_command(volume_model, out, f"{path}:volumes/raw", block="4x16x16")
    done, predict = [], Predictor.predict

    def stopped(self, *args):
        if len(done) == 10:
            raise KeyboardInterrupt
        done.append(args)
        return predict(self, *args)

    monkeypatch.setattr(Predictor, "predict", stopped)
    run(*command, code=130)
    assert [item.name for item in out.iterdir()] == [".brain.volumes%2Fraw.partial"]
    done.clear()
    monkeypatch.setattr(
        Predictor, "predict", lambda self, *args: done.append(args) or predict(self, *args)
    )
    run(*command, *more)
    assert len(done) == left
    assert [item.name for item in out.iterdir()] == ["brain.h5"]
    with h5py.File(out / "brain.h5") as file:
        assert np.array_equal(file["volumes/raw"][()], volume_by_hand()) == (more != ["--invert"])


@pytest.mark.parametrize("options", [("--channel", "1", "2"), ("--axes", "YX", "XY")])
def test_what_was_predicted_of_another_channel_or_axis_is_not_used(
    options, teacher, squares, tmp_path, monkeypatch
):
    from gdlib.cli.work import Work

    option, *values = options
    images = [squares(seed, (96, 96))[0][0] for seed in range(1 if option == "--axes" else 2)]
    tifffile.imwrite(tmp_path / "a.tif", np.stack(images), imagej=True, metadata={"axes": "CYX"})

    def command(folder, value):
        words = segment_command(teacher, tmp_path / folder, tmp_path / "a.tif", block=64)
        return [*words, option, value]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Work, "_finish", stopped)  # when all blocks are predicted
        run(*command("out", values[0]), code=130)
    assert (tmp_path / "out" / ".a.partial").exists()
    labels = []
    for folder in ("out", "new"):
        run(*command(folder, values[1]))
        labels.append(tifffile.imread(tmp_path / folder / "a.tif"))
    assert labels[0].max() > 3
    assert np.array_equal(*labels)


def test_volumes_that_cannot_be_segmented(volume_model, volume, teacher, refusal, tmp_path):
    path, image, _ = volume
    out = tmp_path / "labels"
    line = refusal(*segment_command(volume_model, out, f"{path}:volumes/rwa"))
    assert all(
        part in line
        for part in (str(path), '"volumes/rwa"', "volumes/raw (10, 40, 44)", "volumes/labels")
    )
    line = refusal(*segment_command(volume_model, out, path))
    assert "volumes/raw (10, 40, 44)" in line
    assert str(tmp_path / "no.h5") in refusal(
        *segment_command(volume_model, out, tmp_path / "no.h5:a")
    )
    tifffile.imwrite(tmp_path / "section.tif", image[0])
    line = refusal(*segment_command(volume_model, out, tmp_path / "section.tif"))
    assert all(part in line for part in ("section.tif", "(1, 40, 44)", "3 axes"))
    (tmp_path / "text.h5").write_text("nothing")
    assert str(tmp_path / "text.h5") in refusal(
        *segment_command(volume_model, out, tmp_path / "text.h5:a")
    )
    assert "written over" in refusal(
        *segment_command(volume_model, tmp_path, f"{path}:volumes/raw")
    )
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file["raw"] = np.zeros((0, 4, 4), np.uint8)
        file["nan"] = np.full((4, 4, 4), np.nan, np.float32)
    assert "at least one pixel" in refusal(
        *segment_command(volume_model, out, tmp_path / "empty.h5:raw")
    )
    line = refusal(*segment_command(volume_model, out, tmp_path / "empty.h5:nan"))
    assert all(part in line for part in ("empty.h5:nan", "NaN"))
    assert not out.exists() or not list(out.iterdir())


def test_a_volume_of_a_single_voxel_is_fine(volume_model, tmp_path):
    tifffile.imwrite(
        tmp_path / "one.tif",
        np.ones((1, 1, 1), np.uint8),
        photometric="minisblack",
        metadata={"axes": "ZYX"},
    )
    run(*segment_command(volume_model, tmp_path / "out", tmp_path / "one.tif"))


def test_evaluate_datasets_of_hdf5_files(volume, tmp_path, capsys):
    path, _, label = volume
    worse = np.where(label == 3, 2, label)
    with h5py.File(tmp_path / "found.h5", "w") as file:
        file["main"] = worse
    run("evaluate", f"{path}:volumes/labels", f"{tmp_path}/found.h5:main")
    expected = of_image(label, worse)
    check_table(capsys.readouterr().out, {"brain": expected, "mean": expected})
    tifffile.imwrite(tmp_path / "found.tif", worse)
    run("evaluate", f"{path}:volumes/labels", tmp_path / "found.tif")
    check_table(capsys.readouterr().out, {"brain": expected, "mean": expected})


def test_evaluate_refuses_datasets(volume, refusal):
    path, *_ = volume
    line = refusal("evaluate", f"{path}:volumes/lbls", f"{path}:volumes/labels")
    assert all(
        part in line for part in (str(path), '"volumes/lbls"', "volumes/labels (10, 40, 44)")
    )
    assert "volumes/raw" in refusal("evaluate", f"{path}:volumes/labels", path)


def test_info_of_several_segmenters(volume_model, capsys):
    run("info", volume_model)
    lines = capsys.readouterr().out.splitlines()
    about = [
        line.split(maxsplit=1)[1]
        for line in lines
        if line.startswith(("segmentation", "validation"))
    ]
    assert about == [
        "mutex_watershed: foreground_threshold 0.4, min_size 5",
        "mutex_watershed: voi_split 0.5000, voi_merge 0.5000, voi 0.7500, arand 0.5000",
        "multicut: beta 0.5, min_size 3",
        "multicut: voi_split 0.5000, voi_merge 0.5000, voi 0.2500, arand 0.5000",
    ]
    assert any("3D" in line for line in lines)


@pytest.fixture
def pairs(tmp_path):
    """Return folders of two labels and their segmentations, one perfect and one not."""
    label = np.zeros((20, 30), np.uint8)
    label[2:10, 2:10], label[2:10, 15:25] = 1, 2
    worse = label.astype(np.uint16)
    worse[2:10, 15:19] = 900
    for folder in ("labels", "found"):
        (tmp_path / folder).mkdir()
    Image.fromarray(label).save(tmp_path / "labels" / "a.png")
    tifffile.imwrite(tmp_path / "labels" / "b.tif", label)
    tifffile.imwrite(tmp_path / "found" / "a.tif", label.astype(np.uint32))
    tifffile.imwrite(tmp_path / "found" / "b.tif", worse)
    return tmp_path / "labels", tmp_path / "found", of_image(label, label), of_image(label, worse)


def check_table(text, expected):
    rows = list(csv.DictReader(text_io.StringIO(text)))
    assert [row.pop("sample") for row in rows] == list(expected)
    for row, scores in zip(rows, expected.values(), strict=True):
        assert list(row) == [*METRICS, *COUNTS]
        assert {key: float(value) for key, value in row.items()} == pytest.approx(scores, rel=1e-5)


def test_evaluate_prints_every_metric_and_the_mean(pairs, capsys, tmp_path):
    labels, found, good, bad = pairs
    assert good["aji"] == 1 > bad["aji"]
    expected = {"a": good, "b": bad, "mean": {key: (good[key] + bad[key]) / 2 for key in good}}
    run("evaluate", labels, found)
    check_table(capsys.readouterr().out, expected)
    run("evaluate", labels, found, "--out", tmp_path / "scores" / "a.csv")
    assert capsys.readouterr().out == ""
    check_table((tmp_path / "scores" / "a.csv").read_text(), expected)
    # Superfluous segmentations do no harm; single files may have any names.
    tifffile.imwrite(found / "c.tif", np.zeros((3, 3), np.uint8))
    run("evaluate", labels, found)
    check_table(capsys.readouterr().out, expected)
    run("evaluate", labels / "a.png", found / "b.tif")
    check_table(capsys.readouterr().out, {"a": bad, "mean": bad})


def test_the_mean_is_over_images_with_objects(pairs, capsys):
    labels, found, good, bad = pairs
    nothing, field = np.zeros((20, 30), np.uint8), np.ones((20, 30), np.uint8)
    for name, image in (("0", nothing), ("c", field)):
        tifffile.imwrite(labels / f"{name}.tif", nothing)
        tifffile.imwrite(found / f"{name}.tif", image)
    run("evaluate", labels, found)
    clean, filled = of_image(nothing, nothing), of_image(nothing, field)
    assert (clean["aji"], filled["aji"], filled["false_objects"], filled["false_pixels"]) == (
        1,
        0,
        1,
        600,
    )
    means = {
        name: {key: (one[key] + other[key]) / 2 for key in one}
        for name, one, other in (
            ("mean of images without objects", clean, filled),
            ("mean", good, bad),
        )
    }
    expected = {"0": clean, "a": good, "b": bad, "c": filled} | means
    check_table(capsys.readouterr().out, expected)
    run("evaluate", labels / "c.tif", found / "c.tif")
    check_table(capsys.readouterr().out, {"c": filled, "mean of images without objects": filled})


def test_evaluate_warns_of_images(squares, tmp_path, capsys):
    image, label = squares(3)
    noise = np.random.default_rng(0).integers(1, 2**16, label.shape).astype(np.uint16)
    for name, array in (("image", image[0]), ("noise", noise), ("label", label)):
        tifffile.imwrite(tmp_path / f"{name}.tif", array)
    good = tmp_path / "label.tif"
    for name in ("image", "noise"):
        for pair in ((tmp_path / f"{name}.tif", good), (good, tmp_path / f"{name}.tif")):
            run("evaluate", *pair)
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"warning: {tmp_path / name}.tif: this looks like an image")
    run("evaluate", good, good)
    assert capsys.readouterr().err == ""


def test_evaluate_refuses_with_one_line(pairs, refusal, tmp_path):
    labels, found, *_ = pairs
    out = ["--out", tmp_path / "scores.csv"]
    tifffile.imwrite(labels / "only.tif", np.ones((4, 4), np.uint8))
    line = refusal("evaluate", labels / "only.tif", found, *out)
    assert all(
        part in line for part in ("(only, ...)", "(a, ...)", str(labels / "only.tif"), str(found))
    )
    only = labels / "only.tif", found / "only.tif"
    tifffile.imwrite(only[1], np.ones((4, 5), np.uint8))
    line = refusal("evaluate", *only, *out)
    assert all(part in line for part in (str(only[1]), "(4, 4)", "(4, 5)"))
    tifffile.imwrite(only[1], np.full((4, 4), 0.5, np.float32))
    assert "integer" in refusal("evaluate", *only, *out)
    only[0].write_bytes(b"broken")
    line = refusal("evaluate", *only, *out)
    assert str(only[0]) in line
    assert str(found) not in line  # not the fault of the segmentation
    for paths in ((tmp_path / "missing", found), (labels, tmp_path / "missing")):
        assert f"{tmp_path / 'missing'}: the file is missing" in refusal("evaluate", *paths, *out)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8) + np.uint8([1, 2, 3])).save(labels / "a.png")
    assert "a.png" in refusal("evaluate", labels / "a.png", found / "a.tif", *out)
    assert not (tmp_path / "scores.csv").exists()


def test_info(teacher, capsys, refusal, tmp_path):
    run("info", teacher)
    text = capsys.readouterr().out
    header = io.read_header(teacher)
    for part in (
        "resunet_4",
        "squares",
        "40 steps",
        "32x32",
        "seed 0",
        f"step {header['step']}",
        "gdlib",
    ):
        assert part in text
    assert f"mutex_watershed: aji {header['validation']['mutex_watershed']['aji']:.4f}" in text
    run("info", teacher, "--json")
    assert json.loads(capsys.readouterr().out) == header
    assert "purpose" not in text
    state, header = io.load_weights(teacher)
    header |= {
        "purpose": "bright squares",
        "data": "Drawn here, CC0 1.0.",
        "test": {"images": 2, "aji": 0.75},
    }
    io.save_weights(tmp_path / "known.safetensors", state, header)
    run("info", tmp_path / "known.safetensors")
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    for line in (
        ["purpose", "bright squares"],
        ["data", "Drawn here, CC0 1.0."],
        ["test", "2 image(s): aji 0.7500"],
    ):
        assert line in lines
    (tmp_path / "text.safetensors").write_text("nothing")
    for wrong in (tmp_path / "missing.safetensors", tmp_path / "text.safetensors"):
        assert str(wrong) in refusal("info", wrong)


def test_models(capsys, raw, refusal, tmp_path):
    catalogue = raw
    run("models", "--config", ROOT / "config.yaml")
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert set(table) == set(catalogue["teachers"]) | set(catalogue["students"])
    assert table["resunet_tiny"][0] == "student"
    assert table["resunet"][0] == "teacher"
    small, large = (int(table[name][1].replace(",", "")) for name in ("resunet_tiny", "resunet"))
    assert 100 * small < large
    assert table["resunet"][4] == "544x544"
    catalogue["teachers"]["volumes"] = {"model": "mala", "options": {"widths": [12, 60, 300, 1500]}}
    (tmp_path / "volumes.yaml").write_text(yaml.safe_dump(catalogue))
    run("models", "--config", tmp_path / "volumes.yaml", "--shape", 25, 56, 56)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    # The original's 84,020,644 parameters and 206.7 GMACs, and the foreground head.
    assert ["volumes", "teacher", "84,020,657", "13", "206.65", "25x56x56"] in lines
    assert all(line[-1] == "25x56x56" for line in lines)
    assert "missing.yaml" in refusal("models", "--config", tmp_path / "missing.yaml")
    assert "2 or 3 axes" in refusal("models", "--config", ROOT / "config.yaml", "--shape", 64)
    (tmp_path / "bad.yaml").write_text("a: [1\nb: }")
    assert "bad.yaml" in refusal("models", "--config", tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(catalogue | {"stdy": "quick"}))
    assert 'did you mean "study"?' in refusal("models", "--config", tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["segment"],
        ["evaluate"],
        ["info"],
        ["models"],
        ["step"],
        *(["step", step] for step in STEPS),
    ],
    ids=" ".join,
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: gdlib" in text
    assert len(text) > 200
    if command == ["evaluate"]:
        assert all(f"  {key}" in text for key in METRICS)
    if not command:
        assert all(name in text for name in ("segment", "evaluate", "info", "models", "step"))
    if command == ["step"]:
        assert all(name in text for name in STEPS)


def test_the_list_of_commands_says_what_each_says_of_itself():
    """The list is printed without an import of what they are made of."""
    from gdlib.cli.main import _parser

    alone, full = (
        {
            action.dest: action.help
            for action in parser._subparsers._group_actions[0]._choices_actions
        }
        for parser in (_parser("nothing"), _parser())
    )
    assert alone == full
    code = (
        "import sys; from gdlib.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'numpy', 'pydantic', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_every_option_has_its_help():
    from gdlib.cli.main import _parser

    for parser in (
        _parser()._subparsers._group_actions[0].choices[name]
        for name in ("segment", "evaluate", "models")
    ):
        for action in parser._actions:
            assert action.help, (parser.prog, action.dest)


def test_version(capsys):
    from gdlib import __version__

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == ["gdlib", __version__]


def test_a_traceback_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("GDLIB_TRACEBACK", "1")
    with pytest.raises(io.DataError):
        main(["info", str(tmp_path / "missing.safetensors")])


def test_as_a_program(teacher, images, by_hand, squares, tmp_path):
    done = process(*segment_command(teacher, tmp_path / "out", images / "first.png"))
    assert done.returncode == 0, done.stderr
    assert "objects" in done.stdout
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "first.tif"), by_hand(squares(50)[0]))
    done = process("info", tmp_path / "missing.safetensors")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gdlib: error: ")
    assert done.stderr.count("\n") == 1
    done = process()
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_a_closed_pipe_is_no_error(monkeypatch, capsys):
    class Closed(text_io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        run("models", "--config", ROOT / "config.yaml", "--shape", 16, 16)
    assert capsys.readouterr().err == ""


def test_scores_are_not_computed_for_a_run_without_a_name(splits, tmp_path, refusal):
    out = tmp_path / "metrics.csv"
    where = ["--data", splits["test"], "--segmentation", splits["test"], "--out", out]
    named = {"dataset": "nuclei", "network": "tiny", "method": "none", "seed": 0}
    for part in named:
        less = json.dumps({key: value for key, value in named.items() if key != part})
        assert f"--run: {part} missing" in refusal(
            "step", "evaluate", *where, "--run", less, "--segmenter", "multicut"
        )
    assert not out.exists()


def test_threads_are_set_before_torch_reads_them(splits, tmp_path):
    spec = {"model": "resunet", "options": {"widths": [1, 1, 1, 1, 1]}}
    out = tmp_path / "profile.json"
    command = [
        "step",
        "profile",
        "--spec",
        json.dumps(spec),
        "--data",
        splits["test"],
        "--out",
        out,
        "--threads",
        2,
    ]
    done = process(
        *command,
        "--device",
        "cpu",
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["threads"] == 2


@pytest.fixture
def tiny(raw):
    """Return a study of a minute in seconds: six images of 64 x 64 pixels, a teacher and a student
    of few channels."""
    raw["datasets"]["tiny"] = {
        "source": "nuclei_phantom",
        "options": {
            "size": [64, 64],
            "images": {"train": 3, "val": 2, "test": 2},
            "radius": [5.0, 7.0],
            "count": [100, 160],
        },
        "offsets": [[-1, 0], [0, -1], [-3, 0], [0, -3], [-9, 0], [0, -9]],
        "patch": [48, 48],
        "segmentation": {"mutex_watershed": {"min_size": 12}},
    }
    raw["teachers"]["big"] = {
        "model": "resunet",
        "options": {"widths": [4, 4, 8, 8, 8], "embedding_dim": 8},
    }
    raw["students"]["small"] = {
        "model": "resunet",
        "options": {"widths": [2, 2, 4, 4, 4], "embedding_dim": 8},
    }
    recipe = {
        "steps": 12,
        "batch_size": 2,
        "warmup": 1,
        "validate_every": 6,
        "save_every": 5,
        "optimizer": {"lr": 0.02},
    }
    raw["studies"]["tiny"] = {
        "datasets": ["tiny"],
        "teacher": "big",
        "students": ["small"],
        "methods": ["none", "grd"],
        "seeds": [0],
        "teacher_recipe": recipe,
        "student_recipe": recipe,
    }
    return Config.parse(raw | {"study": "tiny"})


def arrays(path, sample):
    with io.open_h5(path) as file:
        return set(file[sample])


def dump(section, **kwargs):
    return json.dumps(section.model_dump(mode="json", **kwargs))


def train_command(spec, data, folder, **kwargs):
    command = [
        "step",
        "train",
        "--spec",
        dump(spec),
        "--train",
        data["train"],
        "--val",
        data["val"],
        "--device",
        "cpu",
    ]
    command += [f"--weights={folder}/weights.safetensors", f"--last={folder}/last.safetensors"]
    command += [f"--history={folder}/history.csv", f"--state={folder}/state"]
    return command + [
        part for key, value in kwargs.items() for part in (f"--{key.replace('_', '-')}", value)
    ]


def online(spec):
    """Return a run that asks its teacher at every step."""
    return spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"teacher": "online"})})


def test_a_whole_study_without_snakemake(tiny, tmp_path, capsys):
    data = {split: tmp_path / "data" / f"{split}.h5" for split in ("train", "val", "test")}
    dataset = dump(tiny.datasets["tiny"], include={"source", "options", "channels", "patch"})
    run(
        "step",
        "prepare",
        "--dataset",
        dataset,
        *(f"--{split}={path}" for split, path in data.items()),
    )
    assert [len(io.sample_ids(path)) for path in data.values()] == [3, 2, 2]

    weights = None
    for name, network, method, seed in tiny.runs():
        spec = online(tiny.run(name, network, method, seed))
        folder = tmp_path / network / method
        given = {"teacher": weights} if method == "grd" else {}
        capsys.readouterr()
        run(*train_command(spec, data, folder, **given))
        assert "validation: aji" in capsys.readouterr().out
        header = io.read_header(folder / "weights.safetensors")
        assert header["run"]["method"] == method
        if method == TEACHER:
            weights = folder / "weights.safetensors"

        predictions, segmentation, metrics = (
            folder / "predictions.h5",
            folder / "segmentation.h5",
            folder / "metrics.csv",
        )
        common = [
            "--weights",
            folder / "weights.safetensors",
            "--data",
            data["test"],
            "--device",
            "cpu",
        ]
        run("step", "predict", *common, "--out", predictions, "--keep-embeddings", 1)
        override = json.dumps(tiny.datasets[name].segmentation["mutex_watershed"])
        segmenter = ["--segmenter", "mutex_watershed"]
        run(
            "step",
            "segment",
            "--predictions",
            predictions,
            "--out",
            segmentation,
            "--override",
            override,
            "--threads",
            2,
            *segmenter,
        )
        identity = {"dataset": name, "network": network, "method": method, "seed": seed}
        columns = identity | {"segmenter": "mutex_watershed"}
        evaluation = [
            "--data",
            data["test"],
            "--segmentation",
            segmentation,
            "--run",
            json.dumps(identity),
        ]
        run("step", "evaluate", *evaluation, "--out", metrics, *segmenter)

        kept = [
            sample
            for sample in io.sample_ids(data["test"])
            if "embedding" in arrays(predictions, sample)
        ]
        assert kept == io.sample_ids(data["test"])[:1]
        attrs = io.read_attrs(segmentation)
        assert attrs["segmenter"] == "mutex_watershed"
        assert attrs["parameters"] == header["segmentation"]["mutex_watershed"] | {"min_size": 12}
        assert attrs["weights_sha256"] == io.sha256(folder / "weights.safetensors")
        with metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == io.METRIC_COLUMNS
        truth = {sample.id: sample.label for sample in io.read_samples(data["test"])}
        assert len(rows) == len(truth) * len(METRICS | COUNTS)
        for row in rows:
            assert {key: row[key] for key in columns} == {
                key: str(value) for key, value in columns.items()
            }
            found = io.read_array(segmentation, row["sample"], "label")
            assert found.dtype == np.uint32
            assert float(row["value"]) == pytest.approx(
                of_image(truth[row["sample"]], found)[row["metric"]], rel=1e-8
            )

        spec = {"dataset": name, "network": network, "model": spec.model, "options": spec.options}
        out = tmp_path / f"{network}.json"
        run(
            "step",
            "profile",
            "--spec",
            json.dumps(spec),
            "--data",
            data["test"],
            "--out",
            out,
            "--device",
            "cpu",
        )
        profile = json.loads(out.read_text())
        assert profile["network"] == network
        assert profile["image_shape"] == [64, 64]
        assert all(
            profile[key] > 0 for key in ("parameters", "macs", "latency_ms", "latency_ms_p90")
        )
    assert json.loads((tmp_path / "big.json").read_text())["macs"] > profile["macs"]


def test_segmenting_again_gives_the_same_bytes_with_any_number_of_threads(
    teacher, splits, tmp_path
):
    run(
        "step",
        "predict",
        "--weights",
        teacher,
        "--data",
        splits["test"],
        "--out",
        tmp_path / "p.h5",
        "--device",
        "cpu",
    )
    run(
        "step",
        "predict",
        "--weights",
        teacher,
        "--data",
        splits["test"],
        "--out",
        tmp_path / "q.h5",
        "--device",
        "cpu",
    )
    assert io.sha256(tmp_path / "p.h5") == io.sha256(tmp_path / "q.h5")
    for name, threads in (("a", 1), ("b", 3)):
        out = tmp_path / f"{name}.h5"
        command = [
            "step",
            "segment",
            "--predictions",
            tmp_path / "p.h5",
            "--out",
            out,
            "--threads",
            threads,
        ]
        run(*command, "--segmenter", "mutex_watershed")
    assert io.sha256(tmp_path / "a.h5") == io.sha256(tmp_path / "b.h5")


def test_an_interrupted_step_exits_with_75_and_goes_on(tiny, splits, tmp_path, capsys):
    spec = tiny.run("tiny", "small", "none", 0)
    spec = spec.model_copy(
        update={"recipe": spec.recipe.model_copy(update={"steps": 3, "patch": (32, 32)})}
    )
    command = [str(part) for part in train_command(spec, splits, tmp_path, max_seconds=1e-6)]
    for step in (1, 2, 3):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 75
        assert f"stopped after step {step} of 3" in capsys.readouterr().err
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["resume.pt"]
    run(*command)
    assert (tmp_path / "weights.safetensors").exists()


def test_steps_refuse_with_one_line(tiny, teacher, splits, refusal, tmp_path):
    out = tmp_path / "out.h5"
    missing = tmp_path / "missing.h5"
    large = online(tiny.run("tiny", "small", "grd", 0))
    spec = large.model_copy(update={"recipe": large.recipe.model_copy(update={"patch": (32, 32)})})
    folder = tmp_path / "run"
    assert '"grd"' in refusal(*train_command(spec, splits, folder))
    assert str(missing) in refusal(
        *train_command(spec, splits | {"val": missing}, folder, teacher=teacher)
    )
    assert "smaller than the patch" in refusal(
        *train_command(large, splits, folder, teacher=teacher)
    )
    broken = train_command(spec, splits, folder)
    broken[broken.index("--spec") + 1] = '{"dataset": "tiny"}'
    assert "network" in refusal(*broken)
    predict = ["step", "predict", "--weights", teacher, "--out", out, "--device", "cpu", "--data"]
    assert str(missing) in refusal(*predict, missing)
    run = json.dumps({"dataset": "d", "network": "n", "method": "m", "seed": 0})
    evaluation = [
        "step",
        "evaluate",
        "--data",
        splits["test"],
        "--run",
        run,
        "--out",
        out,
        "--segmenter",
        "waterz",
    ]
    assert str(splits["val"]) in refusal(*evaluation, "--segmentation", splits["val"])
    segmentation = ["step", "segment", "--out", out, "--segmenter", "waterz", "--predictions"]
    line = refusal(*segmentation, splits["test"])
    assert str(splits["test"]) in line
    assert "no predictions file" in line
    assert str(missing) in refusal(*segmentation, missing)
    dataset = json.dumps({"source": "nucle_phantom", "options": {}, "channels": 1, "patch": [8, 8]})
    files = [f"--{split}={tmp_path / split}.h5" for split in ("train", "val", "test")]
    assert "nuclei_phantom" in refusal("step", "prepare", "--dataset", dataset, *files)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def volume_split(volume, tmp_path):
    """Return a samples file with one volume, a part of which does not count."""
    _, image, label = volume
    ignore = np.zeros(label.shape, bool)
    ignore[:5] = True
    io.write_samples(tmp_path / "test.h5", [io.Sample("brain", image[None], label, ignore)])
    return tmp_path / "test.h5"


def test_the_step_inside_the_true_foreground(teacher, splits, refusal, tmp_path):
    predictions, out = tmp_path / "p.h5", tmp_path / "s.h5"
    run(
        "step",
        "predict",
        "--weights",
        teacher,
        "--data",
        splits["test"],
        "--out",
        predictions,
        "--device",
        "cpu",
    )
    command = [
        "step",
        "segment",
        "--predictions",
        predictions,
        "--out",
        out,
        "--segmenter",
        "mutex_watershed_masked",
    ]
    command += ["--override", '{"min_size": 0, "min_fragment": 0}']
    assert "needs the foreground of the ground truth; give the samples as --data" in refusal(
        *command
    )
    run(*command, "--data", splits["test"])
    for sample in io.read_samples(splits["test"]):
        found = io.read_array(out, sample.id, "label")
        assert np.array_equal(found > 0, sample.label > 0)
        assert found.max() > 1
    line = refusal(*command, "--data", splits["val"])
    assert str(splits["val"]) in line
    assert 'no "label" of sample' in line


def test_the_steps_of_a_volume(
    volume_split, volume, volume_model, volume_by_hand, refusal, tmp_path
):
    predictions, out = tmp_path / "p.h5", tmp_path / "s.h5"
    common = ["--weights", volume_model, "--data", volume_split, "--device", "cpu"]
    run(
        "step",
        "predict",
        *common,
        "--out",
        predictions,
        "--keep-embeddings",
        1,
        "--block",
        "4x16x16",
    )
    assert arrays(predictions, "brain") == {"affinity", "foreground", "embedding"}
    assert (
        io.read_attrs(predictions)["segmentation"] == io.read_header(volume_model)["segmentation"]
    )
    command = ["step", "segment", "--predictions", predictions, "--out", out, "--segmenter"]
    run(*command, "multicut", "--override", '{"min_size": 0}')
    found = io.read_array(out, "brain", "label")
    assert np.array_equal(found, volume_by_hand("multicut", min_size=0))
    about = {
        "segmenter": "multicut",
        "parameters": {"beta": 0.5, "min_size": 0},
        "weights_sha256": io.sha256(volume_model),
    }
    assert io.read_attrs(out) == about

    identity = json.dumps({"dataset": "d", "network": "n", "method": "m", "seed": 3})
    evaluation = [
        "step",
        "evaluate",
        "--data",
        volume_split,
        "--run",
        identity,
        "--segmenter",
        "multicut",
    ]
    run(*evaluation, "--segmentation", out, "--out", tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {tuple(row[key] for key in io.METRIC_COLUMNS[:6]) for row in rows} == {
        ("d", "n", "m", "3", "multicut", "brain")
    }
    expected = of_image(volume[2][5:], found[5:])  # the rest does not count
    assert {row["metric"]: float(row["value"]) for row in rows} == pytest.approx(expected, rel=1e-8)
    assert expected != of_image(volume[2], found)

    line = refusal(*command, "waterz")
    assert all(
        part in line for part in (str(predictions), '"waterz"', "multicut", "mutex_watershed")
    )
    with h5py.File(out, "r+") as file:
        del file["brain/label"]
        file["brain/label"] = found[1:]
    line = refusal(*evaluation, "--segmentation", out, "--out", tmp_path / "m2.csv")
    assert all(part in line for part in (str(out), '"brain"', "(9, 40, 44)"))


def test_the_profile_of_a_volume_is_that_of_a_block(volume_split, tmp_path, monkeypatch):
    from gdlib.predict.cost import count_macs

    monkeypatch.setitem(BLOCK, 3, (4, 16, 64))
    spec = {"model": "resunet3d", "options": {"widths": [1, 1, 1, 1, 1]}}
    out = tmp_path / "profile.json"
    run(
        "step",
        "profile",
        "--spec",
        json.dumps(spec),
        "--data",
        volume_split,
        "--out",
        out,
        "--device",
        "cpu",
    )
    profile = json.loads(out.read_text())
    assert profile["image_shape"] == [4, 16, 44]
    assert profile["macs"] == count_macs(spec["model"], spec["options"], (4, 16, 44)) > 0


def test_baselines(volume_split, splits, refusal, tmp_path):
    from gdlib.evaluate.trivial import BASELINES

    out = tmp_path / "baselines.csv"
    run(
        "step",
        "baselines",
        "--dataset",
        "d",
        "--val",
        volume_split,
        "--test",
        splits["test"],
        "--out",
        out,
    )
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ("dataset", "split", "baseline", "sample", "metric", "value")
    assert {row["dataset"] for row in rows} == {"d"}
    assert {row["baseline"] for row in rows} == set(BASELINES)
    assert {(row["split"], row["sample"]) for row in rows} == {
        ("val", "brain"),
        ("test", "test0"),
        ("test", "test1"),
    }
    value = next(
        row["value"]
        for row in rows
        if row["baseline"] == "one_segment" and row["metric"] == "arand"
    )
    sample = next(io.read_samples(volume_split))
    expected = evaluate(sample.label[5:], np.ones_like(sample.label[5:]))["arand"]
    assert float(value) == pytest.approx(expected)
    missing = tmp_path / "missing.h5"
    line = refusal(
        "step",
        "baselines",
        "--dataset",
        "d",
        "--val",
        missing,
        "--test",
        missing,
        "--out",
        tmp_path / "x.csv",
    )
    assert str(missing) in line
