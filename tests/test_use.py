"""What users do with trained networks: by name, by channel, frame by frame, in another size, with
pictures and tables; for the built-in ones, that they find what they are for."""

import csv
import re
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

import gdlib
from gdlib import io, trained
from gdlib.cli.main import main
from gdlib.data.frames import Frames, channel_names, channel_number
from gdlib.data.scale import back, factors, microns, resized
from gdlib.io.failures import DataError

ROOT = Path(__file__).resolve().parents[1]


def segment(model, out, *arguments, code=0):
    command = ["segment", "--model", model, "--out", out, "--device", "cpu"]
    command += ["--precision", "float32", "--engine", "torch", *arguments]
    assert main([str(part) for part in command]) == code


@pytest.fixture(scope="module")
def model(teacher):
    return gdlib.load(teacher, device="cpu", precision="float32", engine="torch")


@pytest.fixture(scope="module")
def stack(squares):
    """(T, C, Y, X); the objects are in the second channel."""
    images = [squares(seed)[0][0] for seed in (50, 51)]
    return np.stack([np.stack([np.zeros_like(image), image]) for image in images])


FILES = {
    "OME, by name": (dict(ome=True, metadata={"axes": "TCYX", "Channel": {"Name": ["GFP", "DAPI"]}}), "DAPI"),
    "OME, by number": (dict(ome=True, metadata={"axes": "TCYX"}), "2"),
    "ImageJ": (dict(imagej=True, metadata={"axes": "TCYX"}), "2"),
    "ImageJ, by name": (dict(imagej=True, metadata={"axes": "TCYX", "Labels": ["GFP", "DAPI"] * 2}), "dapi"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_channel_of_a_movie_frame_by_frame(kind, teacher, model, stack, tmp_path, capsys):
    options, channel = FILES[kind]
    tifffile.imwrite(tmp_path / "movie.tif", stack, photometric="minisblack", **options)
    segment(teacher, tmp_path / "out", tmp_path / "movie.tif", "--channel", channel)
    wanted = model.segment(stack[:, 1], "TYX")
    with tifffile.TiffFile(tmp_path / "out" / "movie.tif") as file:
        assert file.series[0].axes == "TYX"
        assert np.array_equal(file.asarray(), wanted)
    count = sum(int(one.max()) for one in wanted)
    assert f"{count} objects in 2 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("axes", "order"),
    [("YXC", (2, 3, 1)), ("CYX", (1, 2, 3)), ("XYC", (3, 2, 1))],
)
def test_axes_that_a_file_does_not_name(axes, order, teacher, model, stack, tmp_path):
    array = stack.transpose((0, *order))[0]
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", metadata=None)
    segment(teacher, tmp_path, tmp_path / "a.tif", "--out", tmp_path / "out", "--axes", axes, "--channel", 2)  # fmt: skip
    found = tifffile.imread(tmp_path / "out" / "a.tif")
    assert np.array_equal(found, model.segment(stack[0, 1]))


def test_sections_of_a_volume_are_segmented_one_by_one(teacher, model, stack, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "z.tif", stack[:, 1], metadata={"axes": "ZYX"}, photometric="minisblack")  # fmt: skip
    segment(teacher, tmp_path / "out", tmp_path / "z.tif")
    assert "every section is segmented on its own" in capsys.readouterr().err
    found = tifffile.imread(tmp_path / "out" / "z.tif")
    assert np.array_equal(found, model.segment(stack[:, 1], "ZYX"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--channel", "3"], 'there is no channel "3" of 2'),
        (["--channel", "dapy"], "there is no channel"),
        (["--axes", "YX"], "does not have the axes YX"),
        (["--axes", "QQYX"], "does not have the axes QQYX"),
        (["--pixel-size", "0.5"], "do not say how large the pixels of their training images were"),
        (["--diameter", "9", "--pixel-size", "1x2x3"], "2 sides, not 3"),
        (["--diameter", "9"], "do not say how large the objects of their training images were"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, teacher, stack, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", metadata={"axes": "TCYX"})
    state, header = io.load_weights(teacher)
    del header["diameter"]  # as of an older version
    io.save_weights(tmp_path / "older.safetensors", state, header)
    segment(
        tmp_path / "older.safetensors", tmp_path / "out", tmp_path / "a.tif", *arguments, code=1
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(tmp_path.rglob("out/*"))


def test_picture_and_table(teacher, model, stack, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name, image in zip("ab", stack[:, 1], strict=True):
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", image, imagej=True, resolution=(2, 2), metadata={"unit": "um"})  # fmt: skip
    out = tmp_path / "out"
    arguments = [tmp_path / "in", "--preview", "--table", out / "all.csv"]
    segment(teacher, out, *arguments)
    assert "2 images" in capsys.readouterr().err
    with (out / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name, image in zip("ab", stack[:, 1], strict=True):
        label = tifffile.imread(out / f"{name}.tif")
        mine = [row for row in rows if row["image"].endswith(f"{name}.tif")]
        assert [int(row["label"]) for row in mine] == list(range(1, label.max() + 1))
        for row in mine:
            inside = label == int(row["label"])
            y, x = (place.mean() for place in np.nonzero(inside))
            expected = [inside.sum(), y, x, image[inside].mean(), inside.sum() / 4]
            keys = ("area", "y", "x", "mean_intensity", "area_microns")
            assert [float(row[key]) for key in keys] == pytest.approx(expected)
        with Image.open(out / f"{name}.preview.png") as picture:
            colours = np.asarray(picture)
        yellow = (colours == (255, 210, 0)).all(axis=2)
        assert yellow.any()
        assert (label[yellow] > 0).all()
    segment(teacher, out, *arguments)  # what it wrote itself is replaced
    (out / "a.preview.png").write_bytes((tmp_path / "in" / "a.tif").read_bytes())
    segment(teacher, out, *arguments, code=1)
    assert "a.preview.png is there already" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--diameter", "8"]], ids=["plain", "scaled"])
@pytest.mark.parametrize("ending", ["tif", "h5"])
@pytest.mark.parametrize("axis", [(0,), (2,), (0, 1)])
def test_axes_of_one_pixel_change_nothing(options, axis, ending, teacher, squares, tmp_path):
    image = squares(52, (96, 80))[0][0]
    found = []
    for folder, array in (("a", image), ("b", np.expand_dims(image, axis))):
        place = tmp_path / folder
        place.mkdir()
        if ending == "h5":
            with h5py.File(place / "a.h5", "w") as file:
                file["raw"] = array
        else:
            tifffile.imwrite(place / "a.tif", array, photometric="minisblack")
        arguments = ["--preview", "--table", place / "a.csv", *options]
        segment(teacher, place / "out", place / f"a.{ending}", *arguments)
        with Image.open(place / "out" / "a.preview.png") as picture:
            rows = (place / "a.csv").read_text().replace(str(place), "")
            found.append((rows, np.asarray(picture).tolist()))
    assert found[0][0].count("\n") > 20
    assert found[0] == found[1]


def test_a_pixel_size_beside_a_diameter_is_for_the_table(teacher, model, stack, tmp_path):
    image, table = stack[0, 1], tmp_path / "a.csv"
    tifffile.imwrite(tmp_path / "a.tif", image)
    arguments = ["--diameter", "8", "--pixel-size", "0.5x0.25", "--table", table]
    segment(teacher, tmp_path / "out", tmp_path / "a.tif", *arguments)
    wanted = model.segment(image, diameter=8)
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "a.tif"), wanted)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == wanted.max() > 3
    for row in rows:
        assert float(row["area_microns"]) == pytest.approx(float(row["area"]) / 8)
    with pytest.raises(ValueError, match="both say how the image is to be scaled"):
        model.segment(image, pixel_size=0.5, diameter=8)


@pytest.mark.parametrize("name", ["a.tif", "a.preview.png"])
def test_a_table_is_not_written_over_a_label(name, teacher, stack, tmp_path, capsys):
    tifffile.imwrite(tmp_path / "a.tif", stack[0, 1])
    (tmp_path / "link").symlink_to("out")
    for folder in ("out", "link"):
        table = tmp_path / folder / name
        arguments = ["--preview", "--table", table]
        segment(teacher, tmp_path / "out", tmp_path / "a.tif", *arguments, code=1)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{table}: a label or picture of this command goes there" in line
        assert "choose another --table" in line
    assert not list(tmp_path.rglob("out/*"))


def test_a_table_stays_where_no_image_could_be_segmented(teacher, stack, tmp_path):
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.tif").write_text("no image")
    table = tmp_path / "all.csv"
    segment(teacher, tmp_path / "out", tmp_path / "in", "--table", table, code=1)
    assert not table.exists()
    tifffile.imwrite(tmp_path / "in" / "a.tif", stack[0, 1])
    segment(teacher, tmp_path / "out", tmp_path / "in", "--table", table, code=1)
    rows = table.read_text()
    assert rows.count("\n") > 1
    (tmp_path / "in" / "a.tif").write_text("no image")
    segment(teacher, tmp_path / "out", tmp_path / "in", "--table", table, code=1)
    assert table.read_text() == rows


def test_pictures_of_several_datasets_of_a_file(teacher, stack, tmp_path):
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["a"], file["raw/b"] = stack[0, 1], stack[1, 1]
    datasets = [f"{tmp_path / 'v.h5'}:{name}" for name in ("a", "raw/b")]
    segment(teacher, tmp_path / "out", *datasets, "--preview")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"v.h5", "v.a.preview.png", "v.raw_b.preview.png"}
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["a"] = stack[0, 1]
    segment(teacher, tmp_path / "out", tmp_path / "w.h5", "--preview")
    assert (tmp_path / "out" / "w.preview.png").exists()


@pytest.mark.parametrize("shape", [(5, 1, 40, 44), (1, 5, 40, 44), (5, 40, 44)])
def test_frames_of_a_tiff_that_names_no_axis(shape, teacher, model, squares, tmp_path):
    frames = np.stack([squares(seed)[0][0] for seed in range(5)])
    tifffile.imwrite(tmp_path / "a.tif", frames.reshape(shape), photometric="minisblack")
    segment(teacher, tmp_path / "out", tmp_path / "a.tif")
    found = tifffile.imread(tmp_path / "out" / "a.tif")
    assert np.array_equal(found, model.segment(frames, "TYX"))


def test_size_of_pixels_and_objects():
    header = {"pixel_size": [0.03, 0.006, 0.006], "diameter": [10.0, 20.0, 30.0]}
    assert factors(header, 3) is None
    assert factors(header, 3, [0.03, 0.006, 0.006]) is None
    assert factors(header, 3, [0.06, 0.006, 0.003]) == pytest.approx((2, 1, 0.5))
    assert factors(header, 2, diameter=10) == (2.0, 2.0)
    with pytest.raises(DataError, match="beyond what can be right"):
        factors(header, 3, 500)
    for diameter in (None, 10):
        with pytest.raises(DataError, match="3 sides, not 2; give the pixel size as one number"):
            factors(header, 3, (1, 2), diameter)
    assert factors({"diameter": [10.0, 20.0, 30.0]}, 2, (500, 500), 10) == (2.0, 2.0)
    for found, ndim, wanted in (
        ({"element_size_um": [0.3, 0.1, 0.2]}, 3, (0.3, 0.1, 0.2)),
        ({"resolution": [30, 6, 6]}, 2, (0.006, 0.006)),
        ({"resolution": (2.0, 4.0), "resolutionunit": 1, "unit": "micron"}, 2, (0.25, 0.5)),
        ({"resolution": ((20000, 1), (20000, 1)), "resolutionunit": 3}, 2, (0.5, 0.5)),
        ({"resolution": ((72, 1), (72, 1)), "resolutionunit": 2}, 2, None),  # of a printer
        ({"resolution": (2.0, 2.0), "resolutionunit": 1, "unit": "pixel"}, 2, None),
        ({}, 2, None),
    ):
        assert microns(found, ndim) == (wanted and pytest.approx(wanted))


def test_there_and_back_again(squares):
    _, label = squares(1)
    for by in ((2.0, 2.0), (3.0, 1.5)):
        large = resized(label[None].astype(np.float32), by)[0]
        assert large.shape == tuple(round(n * f) for n, f in zip(label.shape, by, strict=True))
        assert np.array_equal(back(np.kron(label, np.ones((2, 2), int)), label.shape), label)
    assert resized(np.full((1, 9, 9), 7, np.uint16), (0.3, 0.3)) == pytest.approx(7)


def test_a_network_that_knows_its_size(teacher, squares, tmp_path, capsys):
    state, header = io.load_weights(teacher)
    _, label = squares(60)
    area = np.bincount(label.ravel())[1:]
    diameter = float(np.median(2 * np.sqrt(area / np.pi)))
    known = tmp_path / "known.safetensors"
    io.save_weights(known, state, header | {"diameter": [diameter / 2, diameter, diameter * 2]})
    model = gdlib.load(known, device="cpu", precision="float32", engine="torch")
    image = squares(60)[0][0]
    half = np.kron(image, np.ones((2, 2), image.dtype))  # objects twice as large
    labels = model.segment(half, diameter=2 * diameter)
    assert labels.shape == half.shape
    once, twice = model.segment(image), labels
    assert twice.max() == pytest.approx(once.max(), abs=2)
    tifffile.imwrite(tmp_path / "a.tif", image)
    segment(known, tmp_path / "out", tmp_path / "a.tif")
    assert "warning" not in capsys.readouterr().err
    io.save_weights(known, state, header | {"diameter": [70.0, 80.0, 90.0]})
    segment(known, tmp_path / "out", tmp_path / "a.tif")
    assert "those of its training images were 80" in capsys.readouterr().err


def test_frames_of_a_dataset_are_read_one_by_one():
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    frames = Frames(array, "TCYX", 2, channel=1)
    assert (frames.shape, frames.sides, frames.channels) == ((2,), (4, 5), 1)
    assert np.array_equal(frames[1,], array[1, 1:2])
    assert channel_number("1", [], 1) == 0


def test_channels_of_a_colour_png(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    assert channel_names(tmp_path / "a.png") == ["red", "green", "blue"]


def test_what_the_page_shows_runs(tmp_path, monkeypatch, squares):
    page = (ROOT / "docs" / "use.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("well.tif", squares(0, (64, 64))[0][0])
    scope = {}
    exec(code, scope)
    assert scope["labels"].shape == (2, 64, 64)


BUILT_IN = trained.names()


def test_built_in_networks_are_listed(capsys):
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert all(io.read_header(trained.find(name))["purpose"] in said for name in BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_networks_say_what_they_are(name):
    path = trained.find(name)
    assert path.stat().st_size < 1.5e6
    io.load_weights(path)  # the checksum too
    header = io.read_header(path)
    assert header["purpose"]
    assert header["data"]
    assert not re.search(r"/(work|home|root|tmp)/", str(header))
    assert f"## {name}" in (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize("name", [name for name in BUILT_IN if "neurons" not in name])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_built_in_networks_find_nothing_in_an_empty_field(name, dtype, precision):
    noise = np.random.default_rng(0).normal(100, 2, (160, 160))
    model = gdlib.load(name, device="cpu", precision=precision)
    for empty in (noise, noise[:20, :20], np.full((64, 64), 100)):
        assert model.segment(empty.astype(dtype)).max() == 0


def field(side=240):
    """Sixteen discs of a diameter of 22 pixels, bright on a dark ground with noise."""
    image = np.random.default_rng(1).normal(10, 1, (side, side))
    y, x = np.mgrid[:side, :side]
    for cy in range(30, side, 60):
        for cx in range(30, side, 60):
            image += 100 / (1 + np.exp(np.hypot(y - cy, x - cx) - 11))
    return image


@pytest.mark.skipif("nuclei" not in BUILT_IN, reason="not in the package")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_nuclei_are_found(dtype, precision):
    image = field().astype(dtype)
    model = gdlib.load("nuclei", device="cpu", precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = model.segment(image)
        cropped = model.segment(image[15:105, 10:])
    assert 14 <= labels.max() <= 18
    assert 7 <= cropped.max() <= 9
    # the same field, dark on a bright ground: it is told, and what it is for
    negative = 255 - image
    with pytest.warns(UserWarning, match="load it with invert=True"):
        model.segment(negative)
    inverted = gdlib.load("nuclei", device="cpu", precision=precision, invert=True)
    assert 14 <= inverted.segment(negative).max() <= 18
    with pytest.warns(UserWarning, match="load the network without invert"):
        inverted.segment(image)


@pytest.mark.skipif("nuclei" not in BUILT_IN, reason="not in the package")
@pytest.mark.parametrize("options", [[], ["--diameter", "14"], ["--threads", "1"]])
@pytest.mark.parametrize("frames", [0, 3])
def test_dark_objects_are_told_of_whatever_is_done(options, frames, tmp_path, capsys):
    image = (255 - field()).astype(np.uint8)
    stack = np.stack([image] * frames) if frames else image
    tifffile.imwrite(
        tmp_path / "dark.tif", stack, imagej=True, metadata={"axes": "TYX" if frames else "YX"}
    )
    command = ["segment", f"{tmp_path}/dark.tif", "--out", f"{tmp_path}/out", "--device", "cpu"]
    assert main([*command, *options]) == 0
    told = capsys.readouterr().err
    assert told.count("dark on a bright ground here, use --invert") == 1
    assert main([*command, *options, "--invert", "--overwrite"]) == 0
    assert "as bright as" not in capsys.readouterr().err


@pytest.mark.skipif("nuclei" not in BUILT_IN, reason="not in the package")
def test_what_is_scaled_or_has_frames_must_fit(tmp_path, capsys):
    image = field().astype(np.uint8)
    tifffile.imwrite(tmp_path / "one.tif", image)
    movie = np.stack([image] * 3)
    tifffile.imwrite(tmp_path / "movie.tif", movie, imagej=True, metadata={"axes": "TYX"})
    command = ["--out", f"{tmp_path}/out", "--device", "cpu", "--memory"]
    for name, options in (("one", ["--diameter", "4"]), ("movie", [])):
        given = ["segment", f"{tmp_path}/{name}.tif", *options, *command]
        assert main([*given, "0.01"]) == 1
        told = capsys.readouterr().err
        assert f"{name}.tif: as the network sees it" in told
        assert "not cut into blocks" in told
        assert not (tmp_path / "out" / f"{name}.tif").exists()
        assert main([*given, "20"]) == 0
        capsys.readouterr()


@pytest.mark.skipif("neurons" not in BUILT_IN, reason="not in the package")
def test_a_volume_without_the_size_of_its_pixels(tmp_path, capsys):
    volume = np.random.default_rng(0).integers(0, 255, (4, 48, 48), np.uint8)
    for name in "ab":
        tifffile.imwrite(
            tmp_path / f"{name}.tif", volume, photometric="minisblack", metadata={"axes": "ZYX"}
        )
    command = ["segment", f"{tmp_path}/a.tif", f"{tmp_path}/b.tif", "--model", "neurons"]
    command += ["--out", f"{tmp_path}/out", "--device", "cpu"]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert told.count("does not say how large its pixels are") == 1
    assert "0.03 x 0.006 x 0.006 microns, and --pixel-size" in told
    assert main([*command, "--overwrite", "--pixel-size", "0.03x0.006x0.006"]) == 0
    assert "how large its pixels" not in capsys.readouterr().err
