"""`python -m benchmarks.references`: what it computes itself, and others, where they are installed."""

import csv
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from scipy.ndimage import uniform_filter

from benchmarks import instanseg, references
from gdlib import io

installed = importlib.util.find_spec("stardist") and importlib.util.find_spec("tensorflow")
has_instanseg = importlib.util.find_spec("instanseg") and importlib.util.find_spec("hyperopt")


def discs(seed, side=256, radius=12):
    """Return an image (1, Y, X) of bright discs that do not touch, and its label."""
    rng, y, x = np.random.default_rng(seed), *np.indices((side, side))
    label = np.zeros((side, side), np.uint32)
    for number, (row, column) in enumerate(np.ndindex(side // 32, side // 32), 1):
        centre = 32 * np.array([row, column]) + 16 + rng.integers(-3, 4, 2)
        label[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = number
    return (rng.normal(100, 5, label.shape) + 100 * (label > 0)).astype(np.uint16)[None], label


@pytest.fixture
def dataset(tmp_path):
    """The folder of a prepared dataset: two images for each part, one of the last without objects."""
    for number, part in enumerate(("train", "val", "test")):
        some = [io.Sample(f"{part}{i}", *discs(2 * number + i)) for i in range(2)]
        if part == "test":
            some[1] = io.Sample("empty", some[1].image, np.zeros_like(some[1].label))
        io.write_samples(tmp_path / "data/discs" / f"{part}.h5", some)
    return tmp_path / "data/discs"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["references", *map(str, words)])
    references.main()


def test_images_are_written_and_labels_scored(dataset, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "images", tmp_path / "test", "--data", dataset)
    out = tmp_path / "labels/discs"
    out.mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"empty.tif is missing; segment all test images first"):
        run(monkeypatch, "score", tmp_path / "labels", "--data", dataset)
    for sample in io.read_samples(dataset / "test.h5"):
        path = tmp_path / "test/discs" / f"{sample.id}.tif"
        assert np.array_equal(tifffile.imread(path), sample.image[0])
        half = np.where(sample.label > 32, 0, sample.label)  # of 64 discs
        tifffile.imwrite(out / path.name, half.astype(np.uint16))
    run(monkeypatch, "score", tmp_path / "labels", "--data", dataset)
    # the empty image is no part of the means
    assert "discs: 1 images, aji 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(64, 100), (448, 449), (520, 696), (900, 300)])
def test_foreground_in_parts_is_that_of_the_whole(shape):
    """Of a network that sees 31 pixels around each, also where parts meet."""
    image = np.random.default_rng(0).integers(0, 4000, shape).astype(np.uint16)

    def network(part):
        assert (part.shape, part.dtype) == ((1, 1, 512, 512), np.float32)
        return uniform_filter(part, (0, 0, 63, 63)) * 20

    found = references.foreground(image, network)
    scaled = (image - image.mean()) / image.std()
    padded = np.pad(scaled, 32, mode="symmetric")
    logit = uniform_filter(padded, 63)[32:-32, 32:-32] * 20
    assert np.allclose(found, 1 / (1 + np.exp(-logit)), atol=1e-4)


def test_foreground_is_cut_where_it_is_narrow():
    y, x = np.indices((60, 100))
    inside = ((y - 30) ** 2 + (x - 35) ** 2 < 225) | ((y - 30) ** 2 + (x - 62) ** 2 < 225)
    found = references.distance_watershed(inside.astype(np.float32))
    assert np.array_equal(found > 0, inside)
    assert len(np.unique(found[found > 0])) == 2
    assert found[30, 35] != found[30, 62]


def test_only_flat_images_of_one_channel_are_measured(tmp_path, monkeypatch):
    (tmp_path / "two").mkdir()
    image, label = discs(0)
    io.write_samples(tmp_path / "two/test.h5", [io.Sample("a", image.repeat(2, 0), label)])
    with pytest.raises(SystemExit, match="two: these programs are measured on 2D images of one"):
        run(monkeypatch, "images", tmp_path / "out", "--data", tmp_path / "two")


@pytest.mark.skipif(bool(installed), reason="StarDist is installed")
def test_without_stardist_it_says_what_to_install(dataset, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r'pip install "gdlib\[references\]"'):
        run(monkeypatch, "train", tmp_path / "model", "--data", dataset)
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit, match=r'stardist-predict2d is missing; .*"gdlib\[references\]"'):
        references.command(str(tmp_path / "model"), [], tmp_path, 1)


@pytest.mark.skipif(not installed, reason='no extra "references"')
@pytest.mark.long
def test_stardist_learns_stops_in_time_and_goes_on(dataset, tmp_path, monkeypatch, capsys):
    def call(*words):
        words = [sys.executable, "-m", "benchmarks.references", *map(str, words)]
        subprocess.run(words, check=True, cwd=references.__file__.rpartition("/benchmarks/")[0])

    model, rows = tmp_path / "model", []
    for seconds in (1, 40, 2):  # the last has nothing left to learn
        call("train", model, "--data", dataset, "--seconds", seconds, "--threads", 1)
        with (model / "history.csv").open(newline="") as file:
            rows.append([{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)])
    assert [len(some) for some in rows] == [1, 2, 2]
    first, second = rows[1]
    assert first == rows[0][0]
    assert first["step"] < second["step"]
    assert 1 <= first["seconds"] < 40 <= second["seconds"]
    assert second["val_loss"] < first["val_loss"]
    run(monkeypatch, "images", tmp_path / "test", "--data", dataset)
    call("segment", model, tmp_path / "test", tmp_path / "labels")
    run(monkeypatch, "score", tmp_path / "labels", "--data", dataset)
    assert "discs: 1 images, aji" in capsys.readouterr().out


def test_only_known_programs_are_trained(dataset, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="cellpose: there are stardist, instanseg"):
        run(monkeypatch, "train", tmp_path / "model", "--data", dataset, "--kind", "cellpose")


def test_a_folder_with_instansegs_network_is_segmented_by_it(tmp_path):
    (tmp_path / instanseg.FILE).touch()
    words = references.command(str(tmp_path), [tmp_path / "a.tif"], tmp_path / "out", 3)
    start = [sys.executable, "-m", "benchmarks.instanseg", "--threads", "3"]
    assert words == [*start, *map(str, (tmp_path, tmp_path / "out", tmp_path / "a.tif"))]


def test_instanseg_gets_the_one_channel_three_times():
    image = np.arange(12, dtype=np.uint16).reshape(3, 4)
    found = instanseg.channels(image)
    assert (found.shape, found.dtype) == ((3, 3, 4), np.float32)
    assert (found == image).all()


@pytest.mark.skipif(bool(has_instanseg), reason="InstanSeg is installed")
def test_without_instanseg_it_says_what_to_install(dataset, tmp_path, monkeypatch):
    model = tmp_path / "model"
    words = ("train", model, "--data", dataset, "--kind", "instanseg")
    with pytest.raises(SystemExit, match=r'pip install "gdlib\[references\]"'):
        run(monkeypatch, *words)
    assert not model.exists()
    with pytest.raises(SystemExit, match=r'install InstanSeg: .*"gdlib\[references\]"'):
        instanseg.load(model, 1)


@pytest.mark.skipif(not has_instanseg, reason='no extra "references"')
@pytest.mark.long
def test_instanseg_learns_stops_in_time_and_goes_on(dataset, tmp_path, monkeypatch, capsys):
    """A smaller network of smaller tiles, and few trials of thresholds."""
    small = ["--layers", "[8, 16]", "--tile_size", "64", "--window_size", "32"]
    monkeypatch.setattr(instanseg, "OPTIONS", small)
    monkeypatch.setattr(instanseg, "TRIALS", 3)
    model, rows = tmp_path / "model", []
    words = ("train", model, "--data", dataset, "--kind", "instanseg", "--threads", 1)
    for seconds in (1, 30, 2):  # the last has nothing left to learn
        run(monkeypatch, *words, "--seconds", seconds)
        with (model / "history.csv").open(newline="") as file:
            rows.append([{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)])
    assert len(rows[0]) == 1
    assert rows[1][0] == rows[0][0]
    assert len(rows[1]) > 2
    assert rows[2] == rows[1]
    first, last = rows[1][0], rows[1][-1]
    assert first["step"] < last["step"]
    assert 1 <= first["seconds"] < 30 <= last["seconds"]
    assert last["val_loss"] < first["val_loss"]
    run(monkeypatch, "images", tmp_path / "test", "--data", dataset)
    instanseg.segment(model, tmp_path / "labels/discs", [*(tmp_path / "test/discs").glob("*")], 1)
    capsys.readouterr()
    run(monkeypatch, "score", tmp_path / "labels", "--data", dataset)
    assert "discs: 1 images, aji" in capsys.readouterr().out
    run(monkeypatch, "network", model, tmp_path / "test/discs/empty.tif")
    args = instanseg.defaults()
    count = sum(p.numel() for p in instanseg.build(args)[0].parameters())
    assert f"{count} parameters" in capsys.readouterr().out
