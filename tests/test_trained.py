"""One call: weights in, arrays in, labels out."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import gdlib
from gdlib import trained
from gdlib.io.failures import DataError
from gdlib.predict.predictor import Predictor
from gdlib.segment.parameters import chosen
from gdlib.segment.segmenters import segment


@pytest.fixture(scope="module")
def model(teacher):
    return gdlib.load(teacher, device="cpu", precision="float32", engine="torch")


@pytest.fixture(scope="module")
def expected(teacher, squares):
    """Return `expected(image)`, the labels by the parts that `gdlib segment` is made of.

    Image (1, Y, X).
    """
    predictor = Predictor.load(teacher, device="cpu", precision="float32", engine="torch")

    def find(image):
        found = predictor(image)
        parameters = predictor.header["segmentation"]["mutex_watershed"]
        return segment(
            found.affinity,
            found.foreground,
            predictor.header["offsets"],
            "mutex_watershed",
            **parameters,
        )

    return find


def test_axes_in_any_order_give_the_same_labels(model, squares, expected):
    images = [squares(seed)[0] for seed in range(3)]
    one, stack = images[0], np.stack(images)  # (C, Y, X), (T, C, Y, X)
    wanted = np.stack([expected(image) for image in images])
    assert wanted.max() > 3
    for image, axes in (
        (one[0], None),
        (one[0], "YX"),
        (one, None),
        (one, "CYX"),
        (one[0, ..., None], "YXC"),
    ):
        labels = model.segment(image, axes)
        assert labels.dtype == np.uint32
        np.testing.assert_array_equal(labels, wanted[0])
    np.testing.assert_array_equal(model.segment(one[0].T, "XY"), wanted[0])
    for image, axes in (
        (stack[:, 0], "TYX"),
        (stack[:, 0], "ZYX"),
        (stack, "TCYX"),
        (stack.transpose(1, 0, 2, 3), "CZYX"),
    ):
        np.testing.assert_array_equal(model.segment(image, axes), wanted)
    both = np.stack([stack, stack[::-1]])  # (T, Z, C, Y, X)
    found = model.segment(both, "tzcyx")
    np.testing.assert_array_equal(found, np.stack([wanted, wanted[::-1]]))


def test_prediction_is_that_of_the_predictor(model, teacher, squares):
    image, _ = squares(4)
    mine = model.predict(image[0])
    theirs = Predictor.load(teacher, device="cpu", precision="float32", engine="torch")(
        image, keep_embedding=True
    )
    for part in ("affinity", "foreground", "embedding"):
        np.testing.assert_array_equal(getattr(mine, part), getattr(theirs, part))
    assert mine.affinity.shape == (len(model.info["offsets"]), *image.shape[1:])
    assert model.ndim == 2
    assert repr(model).endswith(": resunet, 2D, 1 channel(s)>")


def test_parameters_reach_the_segmenter(model, squares):
    image, _ = squares(5)
    assert model.segment(image, min_size=10_000).max() == 0
    assert model.segment(image, foreground_threshold=1.0).max() == 0
    assert model.segment(image, segmenter="multicut", beta=0.4).max() > 3


@pytest.mark.parametrize(
    ("shape", "axes", "words"),
    [
        ((20, 20, 3), "YXC", "has 3 channel.s., and the network .* wants 1: choose which"),
        ((3, 20, 20), None, "has 3 channel"),
        ((20, 20), "YXC", "does not have the axes YXC"),
        ((20, 20), "ZY", "with Y and X among them"),
        ((20, 20), "XX", "does not have the axes XX"),
        ((20,), None, "does not have the axes CYX"),
        ((0, 20), None, "at least one pixel"),
    ],
)
def test_what_does_not_fit_is_one_sentence(model, shape, axes, words):
    with pytest.raises(DataError, match=words) as error:
        model.segment(np.zeros(shape), axes)
    assert "\n" not in str(error.value)


def test_several_frames_are_not_predicted_at_once(model):
    with pytest.raises(DataError, match=r"several frames: predict them one by one"):
        model.predict(np.zeros((2, 20, 20)), "TYX")


def test_wrong_parameters_are_told_before_anything_is_computed(model):
    with pytest.raises(
        ValueError,
        match=r"stride of mutex_watershed must be a whole number from 1 " r"to 1024 \(got 0\)",
    ):
        model.segment(np.zeros(3), stride=0)


def test_every_call_has_its_own_stride(teacher, squares):
    """What a network is asked for is that of the call, and not of the one before."""
    image, model = squares(0)[0], gdlib.load(teacher, device="cpu", precision="float32")
    found = Predictor.load(teacher, device="cpu", precision="float32")(image)
    for stride in (4, 1, 3, 5):
        labels = model.segment(image, segmenter="mutex_watershed", stride=stride)
        parameters = model.info["segmentation"]["mutex_watershed"] | {"stride": stride}
        expected = segment(
            found.affinity, found.foreground, model.info["offsets"], "mutex_watershed", **parameters
        )
        np.testing.assert_array_equal(labels, expected)
        np.testing.assert_array_equal(model.predict(image).affinity, found.affinity)


GIVEN = {
    "mutex_watershed": {"min_fragment": 50},
    "waterz": {"min_fragment": 50, "threshold": 0.3},
    "multicut": {"min_fragment": 50, "beta": 0.5},
}


@pytest.mark.skipif("neurons" not in trained.names(), reason="not in the package")
def test_only_what_a_segmenter_uses_is_computed(monkeypatch):
    """Of threads that share a network, each gets what it asks for."""
    model = gdlib.load("neurons", device="cpu", precision="float32", engine="torch")
    offsets, predict = model.info["offsets"], model._predictor.predict
    rng = np.random.default_rng(0)
    sites = rng.uniform(0, 64, (2, 8, 1, 1))
    near = np.sort(np.hypot(*(np.mgrid[:64, :64][:, None] - sites)), axis=0)
    volume = np.where(near[1] - near[0] < 4, 40, 160) + rng.normal(0, 8, (6, 64, 64))
    whole = model.predict(volume)
    counts, labels = [], {}

    def counted(*arguments):
        found = predict(*arguments)
        counts.append(len(found.affinity))
        return found

    def run(name):
        labels[name] = model.segment(volume, segmenter=name, **GIVEN[name])

    monkeypatch.setattr(model._predictor, "predict", counted)
    threads = [threading.Thread(target=run, args=(name,)) for name in GIVEN]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [3, 3, len(offsets)]
    for name, given in GIVEN.items():
        _, parameters = chosen(model.path, model.info, name, given)
        expected = segment(whole.affinity, whole.foreground, offsets, name, **parameters)
        assert expected.max() > 3
        np.testing.assert_array_equal(labels[name], expected)
    np.testing.assert_array_equal(model.predict(volume).affinity, whole.affinity)


def test_names_and_files(tmp_path, monkeypatch, teacher):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "cells.safetensors").write_bytes(teacher.read_bytes())
    monkeypatch.setattr(trained, "FOLDER", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    assert trained.names() == ["cells"]
    assert trained.find("cells") == tmp_path / "weights" / "cells.safetensors"
    assert gdlib.load("cells", device="cpu").info["model"] == "resunet"
    (tmp_path / "cells").mkdir()  # of images, perhaps
    assert trained.find("cells").is_file()
    (tmp_path / "cells").rmdir()
    (tmp_path / "cells").write_bytes(b"mine")  # a file goes before a name
    assert str(trained.find("cells")) == "cells"
    with pytest.raises(
        DataError,
        match=r'no file and no built-in network "cell": .*cells.*or give ' r"a weights file",
    ):
        trained.find("cell")
    for missing in ("other.safetensors", tmp_path / "nothing"):
        with pytest.raises(DataError, match=r"(?s)(other|nothing)"):
            gdlib.load(missing)


def test_threads_share_a_model(model, squares, expected):
    images = [squares(seed)[0] for seed in range(4)]
    found = [None] * len(images)

    def run(k):
        found[k] = model.segment(images[k])

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for labels, image in zip(found, images, strict=True):
        np.testing.assert_array_equal(labels, expected(image))


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import gdlib, sys; print(*(name for name in ('torch', 'numpy', 'h5py') if name in "
        "sys.modules)); gdlib.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == ""
    assert done.stderr.strip().endswith("AttributeError: module 'gdlib' has no attribute 'nothing'")


def test_what_the_readme_shows_runs(teacher, tmp_path, monkeypatch, squares):
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import gdlib\n.*?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(teacher.read_bytes())
    image = squares(0)[0][0]
    scope = {"image": image, "movie": np.stack([image, image])}
    exec(code, scope)
    assert scope["labels"].shape == (2, *image.shape)
    assert scope["found"].embedding.shape == (4, *image.shape)
