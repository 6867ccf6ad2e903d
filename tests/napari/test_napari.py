"""The plug-in in a real viewer, offscreen: the panel, the reader, the sample; and that all of it
costs nothing without napari."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import gdlib
from gdlib import io
from gdlib.io import outputs

pytest.importorskip("napari", reason="the extra `napari` is not installed: make test-napari")
pytest.importorskip("pytestqt", reason="pytest-qt is not installed: make test-napari")

from npe2 import PluginManifest

from gdlib.napari import panel as panels
from gdlib.napari.reader import MOST, layers, reader

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "gdlib" / "napari" / "napari.yaml"
WAIT = 600_000  # milliseconds; on a machine that is busy


@pytest.fixture
def viewer(make_napari_viewer, npe2pm):
    with npe2pm.tmp_plugin(manifest=PluginManifest.from_file(MANIFEST)):
        yield make_napari_viewer()


@pytest.fixture
def panel(viewer):
    _, widget = viewer.window.add_plugin_dock_widget("gdlib", "Find objects")
    return widget.panel


@pytest.fixture(scope="module")
def model():
    return gdlib.load("nuclei")


def nucleus(y, x, shape=(96, 112)):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return 150 / (1 + np.exp(np.hypot(rows - y, columns - x) - 12))


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).normal(10, 1, (96, 112))
    return (noise + nucleus(30, 30) + nucleus(60, 80)).astype(np.uint16)


def run(panel, qtbot, watch=None):
    panel.start()
    if watch and panel.worker:
        panel.worker.yielded.connect(watch)
    qtbot.waitUntil(lambda: panel.worker is None, timeout=WAIT)
    assert panel.run.enabled
    assert not panel.cancel.enabled
    return panel.message.value


def test_the_manifest_is_valid():
    command = [sys.executable, "-m", "npe2.cli", "validate", str(MANIFEST)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    known = {command.id for command in manifest.contributions.commands}
    given = manifest.contributions
    assert {one.command for one in [*given.widgets, *given.readers, *given.sample_data]} == known


def test_objects_become_a_layer_in_the_same_place(viewer, panel, model, picture, qtbot):
    image = viewer.add_image(picture, name="cells", scale=(0.5, 0.5), translate=(3, 4), units=("um", "um"))  # fmt: skip
    assert panel.image.value is image
    assert panel.network.value == "nuclei"
    assert "nuclei" in panel.about.value
    assert run(panel, qtbot) == "2 objects"
    labels = viewer.layers["cells nuclei"]
    assert np.array_equal(labels.data, model.segment(picture))
    assert labels.data.dtype == np.uint32
    assert (tuple(labels.scale), tuple(labels.translate)) == ((0.5, 0.5), (3, 4))
    assert labels.units == image.units
    labels.data[:] = 0  # what the user changes is not replaced
    assert run(panel, qtbot) == "2 objects"
    assert not labels.data.any()
    assert len(viewer.layers) == 3


def test_a_stack_section_by_section(viewer, panel, model, picture, qtbot):
    stack = np.stack([picture, picture[::-1], np.full_like(picture, 10)])
    viewer.add_image(stack, name="stack")
    parts = []
    assert run(panel, qtbot, parts.append) == "4 objects"
    assert parts == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert panel.progress.value == 100
    wanted = model.segment(stack, "TYX")
    assert np.array_equal(viewer.layers["stack nuclei"].data, wanted)


def test_what_runs_can_be_stopped(viewer, panel, picture, qtbot):
    viewer.add_image(np.stack([picture] * 500), name="long")
    said = run(panel, qtbot, lambda part: panel.stop() if part[0] == 2 else None)
    assert said == "stopped; nothing was added"
    assert len(viewer.layers) == 1


def test_size_of_objects(viewer, panel, picture, model, qtbot):
    large = np.kron(picture, np.ones((2, 2), picture.dtype))
    viewer.add_image(large, name="large")
    panel.diameter.value = 50
    run(panel, qtbot)
    assert np.array_equal(viewer.layers["large nuclei"].data, model.segment(large, diameter=50))


def test_pixels_of_a_volume_are_those_of_the_layer(viewer, panel):
    viewer.add_image(np.zeros((4, 8, 8), np.uint8), scale=(30, 6, 6), units=("nm",) * 3)
    assert not panel.pixel_size.visible
    panel.network.value = "neurons"
    assert panel.pixel_size.value == "0.03x0.006x0.006"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda panel, viewer: viewer.layers.clear(), "open an image first"),
        (lambda panel, viewer: setattr(panel.network, "value", "neurons"), "this network wants 3; of the"),
        (lambda panel, viewer: setattr(panel.network, "value", panels.OWN), "no file|is missing|a file"),
        (lambda panel, viewer: viewer.add_image(np.random.default_rng(0).integers(0, 9, (20, 30, 3)).astype(np.uint8), rgb=True), "split it"),
        (lambda panel, viewer: viewer.add_image(np.full((40, 50), np.nan, np.float32)), "NaN"),
    ],
    ids=["nothing", "flat", "no file", "colours", "no numbers"],
)  # fmt: skip
def test_mistakes_are_said_in_the_panel(change, words, viewer, panel, picture, qtbot):
    viewer.add_image(picture)
    change(panel, viewer)
    if viewer.layers:
        panel.image.value = viewer.layers[-1]
    count = len(viewer.layers)
    said = run(panel, qtbot)
    assert any(word in said for word in words.split("|")), said
    assert len(viewer.layers) == count


def test_a_colour_image_of_equal_colours_is_grey(viewer, panel, model, picture, qtbot):
    grey = np.clip(picture, 0, 255).astype(np.uint8)
    viewer.add_image(np.repeat(grey[..., None], 3, axis=-1), rgb=True, name="grey")
    assert run(panel, qtbot) == "2 objects"
    assert np.array_equal(viewer.layers["grey nuclei"].data, model.segment(grey))


def test_the_sample_opens_and_has_nuclei(viewer, panel, qtbot):
    (layer,) = viewer.open_sample("gdlib", "nuclei")
    assert layer.data.ndim == 2
    assert int(run(panel, qtbot).split()[0]) > 20


def test_our_files_are_read(viewer, tmp_path, picture):
    label = (picture > 80).astype(np.uint32)
    samples = [io.Sample(f"s{k}", picture[None], label, attrs={"voxel_size_nm": [500.0, 500.0]}) for k in range(2)]  # fmt: skip
    io.write_samples(tmp_path / "samples.h5", samples)
    opened = viewer.open(tmp_path / "samples.h5", plugin="gdlib")
    assert [layer.name for layer in opened] == ["s0 image", "s0 label", "s1 image", "s1 label"]
    assert [type(layer).__name__ for layer in opened] == ["Image", "Labels"] * 2
    assert np.array_equal(opened[1].data, label)
    assert np.allclose(opened[0].scale, 0.5)
    with io.create_h5(tmp_path / "predictions.h5") as file:
        io.put(file, "s0/affinity", np.zeros((3, 5, 6), np.uint8))
        io.put(file, "s0/foreground", np.ones((5, 6), np.uint8))
    opened = viewer.open(tmp_path / "predictions.h5", plugin="gdlib")
    assert [layer.name for layer in opened] == ["s0 foreground", "s0 affinity 1", "s0 affinity 2", "s0 affinity 3"]  # fmt: skip
    with h5py.File(tmp_path / "found.h5", "w") as file:
        file["volumes/raw"] = label
        file["volumes/raw"].attrs.update(
            {outputs.SOFTWARE: "gdlib 0.2.0, image 0", "resolution": [4.0, 4.0]}
        )
        file["other"] = picture
    ((values, about, kind),) = layers(str(tmp_path / "found.h5"))
    assert np.array_equal(values, label)
    assert (about["name"], kind) == ("volumes/raw label", "labels")
    assert np.allclose(about["scale"], 0.004)


def test_files_of_others_are_left_to_others(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["raw"] = np.zeros((4, 5))
    (tmp_path / "text.h5").write_text("no HDF5")
    assert reader(str(tmp_path / "other.h5")) is None
    assert reader(str(tmp_path / "text.h5")) is None
    assert reader(str(tmp_path / "missing.h5")) is None
    samples = (io.Sample(f"s{k:02}", np.zeros((1, 4, 5), np.uint8), np.zeros((4, 5), np.uint32)) for k in range(MOST + 3))  # fmt: skip
    io.write_samples(tmp_path / "many.h5", samples)
    assert len(reader(str(tmp_path / "many.h5"))(str(tmp_path / "many.h5"))) == 2 * MOST
