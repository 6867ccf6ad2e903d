"""`gdlib quantise`, with NNCF."""

import shutil

import h5py
import numpy as np
import pytest
import tifffile
import torch

from gdlib import io, trained
from gdlib.cli.main import main
from gdlib.devices import int8_pays
from gdlib.models import build
from gdlib.predict import int8
from gdlib.predict.predictor import Predictor
from gdlib.registry import SOURCES

pytest.importorskip("nncf", reason='pip install "gdlib[quantise]"')
pytest.importorskip("openvino", reason='pip install "gdlib[fast]"')
COUNTS = dict.fromkeys(("train", "val", "test"), 2)


def copied(name, folder):
    return shutil.copy(trained.FOLDER / f"{name}.safetensors", folder / "mine.safetensors")


def phantoms(name, kind):
    return [sample.image for sample in SOURCES.make(name, None, **{kind: COUNTS})["test"]]


def inputs_agree(weights, image):
    """What the network itself says, on an image that it was not watched on."""
    plain = Predictor.load(weights, device="cpu", precision="float32", engine="torch")
    fast = Predictor.load(weights, device="cpu", precision="int8")
    assert fast.dtype == torch.int8
    one, other = (
        tool.embed(tool.source(image), tuple(slice(0, n) for n in image.shape[1:]))[0]
        for tool in (plain, fast)
    )
    error = ((one - other).norm() / one.norm()).item()
    assert 0.001 < error < 0.25


@pytest.mark.skipif(not int8_pays(), reason="needs a processor with AVX2")
def test_a_network_of_images(tmp_path, capsys):
    weights = copied("nuclei", tmp_path)
    images = phantoms("nuclei_phantom", "images")
    folder = tmp_path / "images"
    folder.mkdir()
    tifffile.imwrite(folder / "one.tif", images[0][0])
    # a stack, of which one section is looked at, and nothing
    stack = np.stack([images[0][0]] * 3)
    tifffile.imwrite(folder / "stack.tif", stack, imagej=True, metadata={"axes": "TYX"})
    tifffile.imwrite(folder / "empty.tif", np.zeros((64, 80), np.uint8))
    before = io.sha256(weights)
    assert main(["quantise", str(weights), str(folder), "--parts", "3"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{tmp_path}/mine.int8.safetensors: 0.5 MB; in 3 parts of the images")
    assert "by AJI 0." in told
    assert "━" not in told
    assert io.sha256(weights) == before
    header = io.read_header(io.int8_beside(weights))
    assert header["parts"] == 3
    assert header["agreement"]["aji"] > 0.8
    inputs_agree(weights, images[1])
    first = io.int8_beside(weights).read_bytes()
    assert main(["quantise", str(weights), str(folder / "one.tif")]) == 0  # its own is replaced
    assert io.int8_beside(weights).read_bytes() != first
    out = ["--out", str(tmp_path / "out")]
    assert main(["segment", str(folder / "one.tif"), "--model", str(weights), *out]) == 0
    assert len(np.unique(tifffile.imread(tmp_path / "out" / "one.tif"))) > 10


@pytest.mark.skipif(not int8_pays(), reason="needs a processor with AVX2")
def test_a_network_of_volumes(tmp_path, capsys):
    weights = copied("neurons_plain", tmp_path)
    volume = phantoms("neurites_phantom", "volumes")[0][0, :20, :64, :80]
    with h5py.File(tmp_path / "volume.h5", "w") as file:
        file["raw"] = volume
    given = [str(weights), f"{tmp_path}/volume.h5:raw", "--parts", "1"]
    assert main(["quantise", *given]) == 0
    assert "by VOI " in capsys.readouterr().out
    inputs_agree(weights, volume[None, :, 5:60])


@pytest.mark.skipif(not int8_pays(), reason="needs a processor with AVX2")
def test_a_network_in_which_every_pixel_sees_the_whole_image(tmp_path, squares, capsys):
    """It looks at whole images, of several sizes, and then takes those of any other."""
    torch.manual_seed(0)
    options = {"dims": [8, 8, 16, 16], "heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
    network = build("segformer", options)
    network.foreground.bias.data.fill_(3)  # so that something is found
    header = io.read_header(trained.FOLDER / "nuclei.safetensors")
    weights = tmp_path / "mine.safetensors"
    header |= {"model": "segformer", "options": options}
    io.save_weights(weights, network.state_dict(), header)
    images = [squares(number, shape)[0] for number, shape in enumerate([(70, 90), (64, 60)])]
    for number, image in enumerate(images):
        tifffile.imwrite(tmp_path / f"{number}.tif", image[0])
    files = [str(tmp_path / f"{number}.tif") for number in range(len(images))]
    assert main(["quantise", str(weights), *files]) == 0
    assert "in 2 parts of the images" in capsys.readouterr().out
    inputs_agree(weights, squares(5, shape=(100, 50))[0])


def test_another_file_is_not_replaced(tmp_path, capsys):
    weights = copied("nuclei", tmp_path)
    tifffile.imwrite(tmp_path / "image.tif", phantoms("nuclei_phantom", "images")[0][0])
    io.int8_beside(weights).write_text("mine")
    assert main(["quantise", str(weights), str(tmp_path / "image.tif")]) == 1
    assert "not from this command" in capsys.readouterr().err
    assert io.int8_beside(weights).read_text() == "mine"


def test_the_images_must_fit(tmp_path, capsys):
    weights = copied("nuclei", tmp_path)
    for image, told in (
        (np.zeros((40, 50), np.uint8), "the network finds no object here"),
        (np.full((40, 50), np.nan, np.float32), "the image has NaN"),
        (np.zeros((2, 3, 40, 50), np.complex64), "does not fit this network"),
    ):
        tifffile.imwrite(tmp_path / "image.tif", image)
        assert main(["quantise", str(weights), str(tmp_path / "image.tif")]) == 1
        error = capsys.readouterr().err
        assert f"{tmp_path}/image.tif" in error
        assert told in error
    assert not io.int8_beside(weights).exists()


def test_nothing_is_reported(tmp_path):
    """NNCF would tell its makers that it was used."""
    int8._library()
    from nncf.telemetry import wrapper

    assert isinstance(wrapper.telemetry, wrapper.NNCFTelemetryStub)
