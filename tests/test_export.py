"""`gdlib export` before anything is computed: what it says where its packages are missing, or where
it may not write. What it writes is tested by `make test-export`."""

import importlib.util
import sys

import numpy as np
import pytest
import tifffile

import gdlib
from gdlib import export, io
from gdlib.cli.main import main


@pytest.fixture
def without(monkeypatch):
    """Return `hide(*names)`, after which these packages are not installed."""
    real = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name in names else real(name, *a)
        )
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def told(capsys, *words):
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_missing_extra_is_one_sentence(without, teacher, tmp_path, capsys):
    without("onnx", "onnxscript", "onnxruntime")
    out = tmp_path / "out" / "a.onnx"
    error = told(capsys, "export", teacher, "--to", "onnx", "--out", out)
    assert '--to onnx needs onnx, onnxscript, onnxruntime: pip install "gdlib[export]"' in error
    assert not out.parent.exists()
    export.check_installed("torchscript")
    (tmp_path / "a.onnx").write_bytes(b"anything")
    with pytest.raises(io.DataError, match=r'run by ONNX Runtime: pip install "gdlib\[export\]"'):
        gdlib.load(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("onnx", "a.pt", "a.pt: a file of this kind ends in .onnx; choose another --out"),
        ("torchscript", "there.pt", "there already, and not from this command"),
    ],
)
def test_a_place_that_is_not_right(kind, name, sentence, teacher, tmp_path, capsys):
    (tmp_path / "there.pt").write_text("mine")
    error = told(capsys, "export", teacher, "--to", kind, "--out", tmp_path / name)
    assert sentence in error
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_weights_are_not_written_over(teacher, tmp_path, capsys):
    copy = tmp_path / "a.pt"
    copy.write_bytes(teacher.read_bytes())
    words = ["export", copy, "--to", "torchscript", "--out", copy, "--overwrite"]
    assert "it is an input of this command" in told(capsys, *words)


def test_an_image_that_does_not_fit(teacher, tmp_path, capsys):
    import numpy as np
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 20, 20), np.uint8), photometric="minisblack")
    words = ["export", teacher, "--to", "torchscript", "--out", tmp_path / "out" / "a.pt"]
    error = told(capsys, *words, "--image", tmp_path / "a.tif")
    assert f"{tmp_path / 'a.tif'}: " in error
    assert "does not fit this network" in error
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_of_it():
    code = (
        "import sys; from gdlib.cli.main import _parser; _parser('export'); "
        "print(*{'torch', 'onnx', 'onnxruntime', 'bioimageio'} & set(sys.modules))"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_an_image_that_is_too_small_to_compare(teacher, tmp_path, capsys):
    image = tmp_path / "small.tif"
    tifffile.imwrite(image, np.zeros((4, 90), np.uint8))
    words = ["export", teacher, "--to", "torchscript", "--out", tmp_path / "a.pt", "--image", image]
    assert "small.tif: an image of 4 x 90 pixels is too small" in told(capsys, *words)
    assert not (tmp_path / "a.pt").exists()
