"""What `gdlib export` writes gives what torch gives, alone and through gdlib; `make test-export`,
minutes, for torch's exporter takes 10 to 40 seconds of a processor for a network.

What these tests need is the extra `export`.
"""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from skimage.metrics import adapted_rand_error

import gdlib
from gdlib import io
from gdlib.cli.main import main
from gdlib.data.intensity import intensity_range, rescale
from gdlib.export import check
from gdlib.export.check import Different, checked
from gdlib.export.graph import Graph
from gdlib.export.torchscript import run_torchscript, write_torchscript
from gdlib.models import build
from gdlib.predict.predictor import Predictor
from gdlib.registry import NETWORKS
from gdlib.volumes.footprint import HELD

onnx = pytest.importorskip("onnx", reason='the extra is not installed: pip install "gdlib[export]"')
pytest.importorskip("onnxruntime", reason='pip install "gdlib[export]"')
pytest.importorskip("onnxscript", reason='pip install "gdlib[export]"')

from gdlib.export.onnx import run_onnx, write_onnx  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text()
OFFSETS = {
    2: [[-1, 0], [0, -1], [-9, 0], [0, 27], [3, -4]],
    3: [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, -9, 0], [2, 0, -5]],
}
SMALL = {  # options of networks that are large without them
    "nestedunet": {"widths": [4, 4, 8, 8, 8]},
    "resunet": {"widths": [2, 2, 4, 4, 4], "pooled_skips": True},
    "segformer": {
        "dims": [8, 8, 16, 16],
        "heads": [1, 1, 2, 2],
        "depths": [1, 1, 1, 1],
        "decoder_dim": 8,
    },
    "resunet3d": {"widths": [2, 2, 4, 4, 4]},
    "mala": {"widths": [2, 2, 4, 4]},
}


def run(*words, code=0):
    assert main([str(word) for word in words]) == code


@pytest.fixture
def small(monkeypatch):
    """Make the images of which a MALA is asked the smallest that it takes, which are large."""
    monkeypatch.setitem(check.LARGEST, 3, (3, 40, 50))
    monkeypatch.setitem(check.SMALL, 3, (2, 9, 11))


def predictor_of(model, normalisation):
    """Return an untrained network whose normalisations have something to do."""
    torch.manual_seed(0)
    network = build(model, SMALL.get(model, {}))
    header = {
        "model": model,
        "options": SMALL.get(model, {}),
        "channels": 1,
        "offsets": OFFSETS[network.ndim],
        "normalisation": normalisation,
        "segmentation": {"mutex_watershed": {}},
    }
    return Predictor(network, header, device="cpu", precision="float32")


def noise(ndim, dtype=np.uint8):
    shape = {2: (1, 90, 71), 3: (1, 7, 50, 41)}[ndim]
    return np.random.default_rng(0).gamma(3.0, 25, shape).clip(0, 255).astype(dtype)


@pytest.mark.parametrize("model", sorted(set(NETWORKS.names()) - {"enet"}))
def test_networks_as_torchscript(model, tmp_path, small):
    predictor = predictor_of(model, {"lower": 1.0, "upper": 99.8})
    write_torchscript(tmp_path / "a.pt", predictor.network, predictor.header)
    run = run_torchscript(tmp_path / "a.pt")
    assert checked(run, predictor, noise(predictor.network.ndim)) < 1e-3


def test_a_network_that_is_no_torchscript(tmp_path):
    predictor = predictor_of("enet", {"lower": 1.0, "upper": 99.8})
    with pytest.raises(
        ValueError, match=r"network enet cannot be written as TorchScript .* choose onnx"
    ):
        write_torchscript(tmp_path / "a.pt", predictor.network, predictor.header)


@pytest.mark.parametrize("model", NETWORKS.names())
def test_every_network_as_onnx(model, tmp_path, small):
    predictor = predictor_of(model, {"lower": 1.0, "upper": 99.8})
    write_onnx(tmp_path / "a.onnx", predictor.network, predictor.header, normalised=True)
    image = noise(predictor.network.ndim)
    assert checked(run_onnx(tmp_path / "a.onnx"), predictor, image, own_range=False) < 1e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(1, 90, 71), (2, 60, 83), (1, 7, 50, 41)])
def test_the_range_is_that_of_gdlib(shape, dtype):
    """Percentiles and noise by torch's operations, against those of `gdlib.data.intensity`."""
    rng = np.random.default_rng(1)
    channels, ndim = shape[0], len(shape) - 1
    network = build("resunet" if ndim == 2 else "resunet3d", {"widths": [2, 2, 4, 4, 4]})
    image = rng.gamma(3.0, 20, shape)
    image[:, ..., :9, :9] *= 4
    flat = np.full(shape, 7)
    empty = rng.normal(120, 5, shape)
    for more in ({}, {"contrast": [40.0] * channels, "level": [0.25] * channels}):
        how = {"lower": 1.0, "upper": 99.8, **more}
        graph = Graph(network, OFFSETS[ndim], how)
        for one in (image, flat, empty):
            one = one.clip(0, 255).astype(dtype)
            if dtype == np.float32:
                one = one + np.float32(0.25)  # not whole: of whole numbers it knows the rounding
            wanted = intensity_range(one, **how)
            found = graph._range(torch.from_numpy(one[None].astype(np.float32)))
            for a, b in zip(found, wanted, strict=True):
                np.testing.assert_allclose(a[0].numpy(), b, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def exported(teacher, squares, tmp_path_factory):
    """Return an ONNX file of the trained network of the suite, and the image it was tried with."""
    folder = tmp_path_factory.mktemp("exported")
    image = squares(3, shape=(70, 90))[0]
    tifffile.imwrite(folder / "image.tif", image[0])
    run(
        "export",
        teacher,
        "--to",
        "onnx",
        "--out",
        folder / "model.onnx",
        "--image",
        folder / "image.tif",
    )
    return folder / "model.onnx", image


def test_labels_are_those_of_torch(exported, teacher, squares):
    mine = gdlib.load(exported[0])
    theirs = gdlib.load(teacher, device="cpu", precision="float32", engine="torch")
    assert mine.info == theirs.info
    for seed in range(3):
        image = squares(seed, shape=(61, 47))[0][0]
        labels = mine.segment(image)
        assert labels.max() > 5
        np.testing.assert_array_equal(labels, theirs.segment(image))
    found, wanted = mine.predict(image), theirs.predict(image)
    assert np.abs(found.affinity.astype(int) - wanted.affinity).max() <= 1
    assert np.abs(found.foreground.astype(int) - wanted.foreground).max() <= 1
    np.testing.assert_allclose(found.embedding, wanted.embedding, atol=1e-4)


def test_segment_runs_it_in_blocks_too(exported, teacher, squares, tmp_path):
    image = squares(5, shape=(200, 150))[0]
    tifffile.imwrite(tmp_path / "a.tif", image[0])
    for model, out, more in (
        (exported[0], "onnx", ["--block", "64"]),
        (teacher, "torch", ["--engine", "torch", "--precision", "float32", "--device", "cpu"]),
    ):
        run("segment", tmp_path / "a.tif", "--model", model, "--out", tmp_path / out, *more)
    labels = [tifffile.imread(tmp_path / out / "a.tif") for out in ("onnx", "torch")]
    assert labels[1].max() > 30
    np.testing.assert_array_equal(*labels)


def test_what_it_says_of_itself(exported, teacher):
    model = onnx.load(exported[0])
    about = {entry.key: entry.value for entry in model.metadata_props}
    header = io.read_header(teacher)
    assert json.loads(about["gdlib"]) == header == io.read_header(exported[0])
    assert json.loads(about["offsets"]) == header["offsets"]
    assert json.loads(about["segmentation"]) == header["segmentation"]
    assert about["weights_sha256"] == io.sha256(teacher)
    assert about["gdlib_version"] == gdlib.__version__
    assert [str(entry.version) for entry in model.opset_import if not entry.domain] == [
        about["opset"]
    ]
    contract = json.loads(about["contract"])
    names = ["image", "low", "high"], ["affinity", "foreground", "embedding"]
    assert (
        tuple([v.name for v in part] for part in (model.graph.input, model.graph.output)) == names
    )
    assert set(names[0] + names[1]) <= set(contract)
    assert contract["image"]["axes"] == "bcyx"
    assert contract["halo"] == list(build(header["model"], header["options"]).halo)
    # nothing of the machine it was made on
    assert b"site-packages" not in exported[0].read_bytes()
    assert str(ROOT).encode() not in exported[0].read_bytes()


def test_as_the_page_runs_it(exported, tmp_path, monkeypatch, teacher):
    """Ten lines with ONNX Runtime alone, and a few more to objects."""
    monkeypatch.chdir(tmp_path)
    Path("nuclei.onnx").write_bytes(exported[0].read_bytes())
    tifffile.imwrite("image.tif", exported[1][0])
    code = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(code[0].splitlines()) <= 10
    assert "gdlib" not in code[0]
    scope = {}
    exec(code[0], scope)
    model = gdlib.load(teacher, device="cpu", precision="float32", engine="torch")
    wanted = model.predict(exported[1][0])
    np.testing.assert_allclose(scope["affinity"][0] * 255, wanted.affinity, atol=0.6)
    np.testing.assert_allclose(scope["foreground"][0, 0] * 255, wanted.foreground, atol=0.6)
    exec(code[1], scope)
    labels = model.segment(exported[1][0])
    assert labels.max() > 5
    assert adapted_rand_error(labels, scope["labels"])[0] < 0.05


def test_a_given_range_is_that_of_the_whole_image(exported, teacher):
    predictor = Predictor.load(teacher, device="cpu", precision="float32", engine="torch")
    path, image = exported
    low, high = intensity_range(image, **predictor.header["normalisation"])
    part = image[:, 20:52, 10:58]
    wanted = check.expected(predictor, rescale(part, low, high))
    found = run_onnx(path)(part[None].astype(np.float32), low, high)
    own = run_onnx(path)(part[None].astype(np.float32), None, None)
    np.testing.assert_allclose(found[0][0], wanted[0], atol=1e-4)
    assert np.abs(own[0][0] - wanted[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--engine", "openvino"], "not with engine openvino; leave --engine out"),
        (["--precision", "bfloat16"], "not with precision bfloat16"),
        (["--device", "cuda:0"], "not with device cuda:0"),
    ],
)
def test_what_cannot_be_chosen(exported, tmp_path, words, sentence, capsys):
    tifffile.imwrite(tmp_path / "a.tif", exported[1][0])
    run(
        "segment",
        tmp_path / "a.tif",
        "--model",
        exported[0],
        "--out",
        tmp_path / "out",
        *words,
        code=1,
    )
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_one_sentence(tmp_path, capsys):
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, [1])], [info("y", 1, [1])])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.save(model, tmp_path / "foreign.onnx")
    (tmp_path / "page.onnx").write_text("<html>")
    (tmp_path / "words.onnx").write_text("some words")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((30, 30), np.uint8))
    for name, sentence in (
        ("foreign", "was not written by `gdlib export`"),
        ("page", "a web page"),
        ("words", "not a readable ONNX file"),
        ("nothing", "the file is missing"),
    ):
        path = tmp_path / f"{name}.onnx"
        for words in (
            ["info", path],
            ["segment", tmp_path / "a.tif", "--model", path, "--out", tmp_path / "o"],
        ):
            run(*words, code=1)
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert sentence in error
        with pytest.raises(io.DataError, match=sentence):
            gdlib.load(path)
    assert not (tmp_path / "o").exists()


def test_code_that_nobody_trusts_is_not_run(exported, tmp_path):
    model = onnx.load(exported[0])
    for entry in model.metadata_props:
        if entry.key == "gdlib":
            entry.value = json.dumps(json.loads(entry.value) | {"model": "evil.module:Network"})
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(io.DataError, match=r'a.onnx: its network is "evil.module:Network"'):
        gdlib.load(tmp_path / "a.onnx")


def test_what_is_another_function_is_not_written(teacher, tmp_path, monkeypatch, capsys, squares):
    """A network that is not what the exporter sees: it is told, and nothing is left."""
    from gdlib.export import torchscript

    real = torchscript.Graph

    def biased(network, *others):
        graph = real(network, *others)
        with torch.no_grad():
            graph.heads.network.foreground.bias += 0.1
        return graph

    monkeypatch.setattr(torchscript, "Graph", biased)
    tifffile.imwrite(tmp_path / "a.tif", squares(0)[0][0])
    command = ["export", teacher, "--to", "torchscript", "--out", tmp_path / "out" / "a.pt"]
    run(*command, "--image", tmp_path / "a.tif", code=1)
    assert re.search(
        r"foreground of an image of .* differs from that of torch by 0\.0\d",
        capsys.readouterr().err,
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_torchscript_runs_without_gdlib(teacher, tmp_path, squares):
    image = squares(1, shape=(50, 61))[0]
    tifffile.imwrite(tmp_path / "a.tif", image[0])
    command = ["export", teacher, "--to", "torchscript", "--out", tmp_path / "a.pt"]
    run(*command, "--image", tmp_path / "a.tif")
    run(*command, "--image", tmp_path / "a.tif")  # its own file may be replaced
    np.save(tmp_path / "image.npy", image)
    code = (
        "import sys, numpy as np, torch; model = torch.jit.load('a.pt'); "
        "image = torch.from_numpy(np.load('image.npy').astype('float32'))[None]; "
        "np.save('found.npy', model(image)[0][0].numpy()); assert 'gdlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    model = gdlib.load(teacher, device="cpu", precision="float32", engine="torch")
    found = np.load(tmp_path / "found.npy") * 255
    np.testing.assert_allclose(found, model.predict(image[0]).affinity, atol=0.6)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(io.EXPORTED)]
        assert json.loads(archive.read(name))["offsets"] == model.info["offsets"]


def test_memory_of_it_is_known():
    assert {"torch", "openvino", "onnxruntime"} == set(HELD)


def test_a_difference_is_found():
    predictor = predictor_of("resunet", {"lower": 1.0, "upper": 99.8})

    def wrong(image, low, high):
        return [np.zeros((len(image), count, *image.shape[2:])) for count in (5, 1)]

    with pytest.raises(Different, match="affinity of an image of 1x90x71, one of 1, differs"):
        checked(wrong, predictor, noise(2))


@pytest.fixture(scope="module")
def package(teacher, squares, tmp_path_factory):
    """Return a package of bioimage.io of the trained network of the suite, and an image for it."""
    pytest.importorskip("bioimageio.core", reason='pip install "gdlib[export]"')
    folder = tmp_path_factory.mktemp("package")
    image = squares(2, shape=(300, 280))[0]
    tifffile.imwrite(folder / "image.tif", image[0])
    words = ["export", teacher, "--to", "bioimageio", "--out", folder / "cells.zip"]
    run(*words, "--image", folder / "image.tif")
    return folder / "cells.zip", image


def test_a_package_passes_the_test_of_core(package):
    """As anybody would test it: in a process of its own, which knows nothing of gdlib."""
    code = (
        "import sys; from bioimageio.core import test_model; "
        "summary = test_model(sys.argv[1], devices=['cpu']); "
        "print(summary.status, 'gdlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, package[0]], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "passed False", done.stdout + done.stderr


def test_a_package_that_fails_the_test_is_not_written(
    package, tmp_path, monkeypatch, capsys, teacher
):
    from gdlib.export import bioimageio

    def again(path, *_, **__):  # what takes long is there already
        with zipfile.ZipFile(package[0]) as archive:
            path.write_bytes(archive.read("weights.onnx"))

    def wrong(folder, *others):
        tensors(folder, *others)
        np.save(folder / "foreground.npy", np.load(folder / "foreground.npy") * 0.9)

    tensors = bioimageio._test_tensors
    monkeypatch.setattr(bioimageio, "write_onnx", again)
    words = ["export", teacher, "--to", "bioimageio", "--out", tmp_path / "out" / "a.zip"]
    words += ["--image", package[0].with_name("image.tif")]
    run(*words)
    monkeypatch.setattr(bioimageio, "_test_tensors", wrong)
    (tmp_path / "out" / "a.zip").unlink()
    run(*words, code=1)
    assert "the package did not pass its test: " in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_licence_that_there_is_not(teacher, tmp_path, capsys):
    words = ["export", teacher, "--to", "bioimageio", "--out", tmp_path / "a.zip"]
    run(*words, "--license", "mine", code=1)
    assert 'there is no licence "mine"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_a_package(package, teacher):
    import yaml
    from PIL import Image

    with zipfile.ZipFile(package[0]) as archive:
        names = set(archive.namelist())
        text = next(name for name in names if name.endswith((".yaml", ".yml")))
        about = yaml.safe_load(archive.read(text))
        assert json.loads(archive.read(io.EXPORTED)) == io.read_header(teacher)
        with archive.open(about["covers"][0]["source"]) as file:
            width, height = Image.open(file).size
        card = archive.read("README.md").decode()
    assert width == 2 * height
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [author["name"] for author in about["authors"]] == [citation["authors"][0]["name"]]
    assert about["license"] == citation["license"]
    (paper,) = citation["references"]
    assert about["cite"][0]["url"] == paper["url"]
    assert paper["title"] in about["cite"][0]["text"]
    assert about["config"]["gdlib"]["offsets"] == io.read_header(teacher)["offsets"]
    assert set(about["weights"]) == {"onnx", "torchscript"}
    halo = {axis.get("halo") for axis in about["outputs"][0]["axes"]}
    reach = np.abs(io.read_header(teacher)["offsets"]).max()
    assert build("resunet", io.read_header(teacher)["options"]).halo[0] + reach in halo
    for heading in ("Objects", "Intensities", "Training", "Validation"):
        assert f"## {heading}" in card


def test_objects_as_the_card_of_a_package_says(package, teacher):
    with zipfile.ZipFile(package[0]) as archive:
        card = archive.read("README.md").decode()
        scope = {}
        for name in ("affinity", "foreground"):
            with archive.open(f"{name}.npy") as file:
                scope[name] = np.load(file)[0]
        with archive.open("image.npy") as file:
            image = np.load(file)[0]
    scope["foreground"] = scope["foreground"][0]
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code, scope)
    model = gdlib.load(teacher, device="cpu", precision="float32", engine="torch")
    labels = model.segment(image)
    assert labels.max() > 30
    assert adapted_rand_error(labels, scope["labels"])[0] < 0.05
