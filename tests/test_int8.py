"""Networks in 8 bits: when they are taken, and that they see what they saw before."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch

from gdlib import io, trained
from gdlib.blockwise import vino
from gdlib.cli.main import main
from gdlib.devices import int8_pays
from gdlib.evaluate import scores
from gdlib.predict import int8
from gdlib.predict.predictor import Predictor
from gdlib.registry import SOURCES

usable = pytest.mark.skipif(
    not (int8_pays() and importlib.util.find_spec("openvino")),
    reason='needs a processor with AVX2, and pip install "gdlib[fast]"',
)


@pytest.fixture
def nuclei(tmp_path):
    """The network of the package with its form in 8 bits, to be damaged."""
    for name in ("nuclei.safetensors", "nuclei.int8.safetensors"):
        shutil.copy(trained.FOLDER / name, tmp_path)
    return tmp_path / "nuclei.safetensors"


@pytest.fixture(scope="module")
def image():
    counts = {"images": dict.fromkeys(("train", "val", "test"), 1)}
    return next(iter(SOURCES.make("nuclei_phantom", None, **counts)["test"])).image


@usable
def test_objects_are_those_of_float32(image):
    plain = trained.load("nuclei", precision="float32")
    fast = trained.load("nuclei", precision="int8")
    one, other = (network.predict(image[0]) for network in (plain, fast))
    difference = np.abs(one.affinity.astype(int) - other.affinity)
    assert 0 < difference.mean() < 6
    assert np.abs(one.foreground.astype(int) - other.foreground).mean() < 3
    found = scores.of_image(plain.segment(image[0]), fast.segment(image[0]))
    assert found["aji"] > 0.85
    assert found["objects"] > 10


@usable
def test_blocks_give_what_the_whole_gives(image):
    whole = Predictor.load(trained.find("nuclei"), precision="int8")(image)
    blocks = Predictor.load(trained.find("nuclei"), precision="int8", block=64)(image)
    # what is not in 8 bits may be summed in another order
    for name in ("affinity", "foreground"):
        difference = np.abs(getattr(whole, name).astype(int) - getattr(blocks, name))
        assert difference.max() <= 2


@usable
def test_it_is_taken_where_nothing_else_is_asked_for(nuclei):
    kept = {"device": "cpu"}
    assert Predictor.load(nuclei, **kept).dtype == torch.int8
    assert Predictor.load(nuclei, **kept, precision="float32").dtype == torch.float32
    assert Predictor.load(nuclei, **kept, engine="torch").dtype != torch.int8
    assert Predictor.load(nuclei, **kept, levels=["stride2"]).dtype != torch.int8
    io.int8_beside(nuclei).unlink()
    assert Predictor.load(nuclei, **kept).dtype != torch.int8


@usable
def test_it_is_not_taken_where_it_would_be_slower(nuclei, monkeypatch):
    monkeypatch.setattr(int8, "int8_pays", lambda: False)
    assert Predictor.load(nuclei, device="cpu").dtype != torch.int8


def test_who_asks_for_it_is_told_why_not(nuclei, monkeypatch):
    def reason(**options):
        with pytest.raises(ValueError, match=r"nuclei\.safetensors: precision int8: ") as told:
            Predictor.load(nuclei, precision="int8", **options)
        return str(told.value)

    assert "OpenVINO on the CPU" in reason(engine="torch")
    monkeypatch.setattr(vino, "is_installed", lambda name: False)
    assert "gdlib[fast]" in reason(device="cpu")
    monkeypatch.setattr(vino, "is_installed", lambda name: True)
    monkeypatch.setattr(int8, "int8_pays", lambda: False)
    assert "AVX2" in reason(device="cpu")
    monkeypatch.setattr(int8, "int8_pays", lambda: True)
    io.int8_beside(nuclei).unlink()
    assert "no nuclei.int8.safetensors" in reason(device="cpu")


@usable
def test_a_form_of_other_weights_is_not_taken(nuclei):
    state, header = io.load_weights(nuclei)
    io.save_weights(nuclei, state, header | {"step": 0})
    with pytest.warns(UserWarning, match=r"made of other weights; `gdlib quantise`"):
        assert Predictor.load(nuclei, device="cpu").dtype != torch.int8
    with pytest.raises(ValueError, match="made of other weights"):
        Predictor.load(nuclei, device="cpu", precision="int8")


@usable
def test_a_damaged_form_is_not_taken(nuclei):
    path = io.int8_beside(nuclei)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        assert Predictor.load(nuclei, device="cpu").dtype != torch.int8
    parts = {part: torch.zeros(9, dtype=torch.uint8) for part in int8.PARTS}
    io.save_weights(path, parts, {io.INT8_OF: io.sha256(nuclei)})
    with pytest.raises(ValueError, match="OpenVINO cannot read it"):
        Predictor.load(nuclei, device="cpu", precision="int8")


def test_it_is_no_network_of_its_own(nuclei, capsys, tmp_path):
    assert "nuclei.int8" not in trained.names()
    image = tmp_path / "image.png"
    image.touch()
    out = ["--out", str(tmp_path / "out")]
    assert main(["segment", str(image), "--model", str(io.int8_beside(nuclei)), *out]) == 1
    assert "give the weights beside it, nuclei.safetensors" in capsys.readouterr().err
    assert main(["info", str(nuclei)]) == 0
    assert "nuclei.int8.safetensors, made of 24 parts" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["", ".", "nowhere/weights.safetensors", "nowhere"])
def test_no_file_is_told_as_ever(path):
    with pytest.raises((io.DataError, OSError)):
        Predictor.load(path, device="cpu")


def test_what_it_takes_is_told(nuclei, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vino, "is_installed", lambda name: name != "nncf")
    assert main(["quantise", str(nuclei), str(tmp_path)]) == 1
    assert 'it needs nncf: pip install "gdlib[quantise]"' in capsys.readouterr().err
