"""What several test files share: squares as objects, a run small enough to train in a second, a
trained pair of networks."""

import os

# Before torch is imported. Test processes and their children share two cores, and agree to the last
# bit.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GDLIB_CACHE"] = ""  # no network is kept

import copy
import fcntl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
# What takes longest begins first, so that no process of the tests is alone with it in the end.
FIRST = (
    "test_workflow.py",
    "test_models.py",
    "test_cli.py",
    "test_training.py",
    "test_waiting.py",
    "test_inference.py",
)
METHODS = {
    "teacher": [],
    "none": [],
    "grd": [
        {"term": "agd", "weight": 1.0},
        {"term": "agd", "weight": 1.0, "memory": True},
        {"term": "igd", "weight": 0.1, "options": {"part": "nodes"}},
        {"term": "igd", "weight": 0.1, "options": {"part": "edges"}},
        {"term": "igd", "weight": 1.0, "memory": True, "options": {"part": "edges"}},
    ],
    "levels": [
        {"term": "agd", "weight": 1.0, "level": "stride2"},
        {
            "term": "igd",
            "weight": 1.0,
            "level": "stride2",
            "memory": True,
            "options": {"part": "edges"},
        },
    ],
}
OFFSETS = {
    2: ((-1, 0), (0, -1), (-3, 0), (0, -3), (-9, 0), (0, -9)),
    3: (
        (-1, 0, 0),
        (0, -1, 0),
        (0, 0, -1),
        (-2, 0, 0),
        (0, -3, 0),
        (0, 0, -3),
        (0, -9, 0),
        (0, 0, -9),
    ),
}


def _squares(seed, shape=(40, 44), side=9, gap=3):
    """Bright squares of different brightness on a noisy ground: image (1, Y, X) uint8, label (Y, X)
    uint32."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint32)
    step = side + gap
    for number, (y, x) in enumerate(np.ndindex(shape[0] // step, shape[1] // step), start=1):
        dy, dx = rng.integers(0, gap, 2)
        label[y * step + dy : y * step + dy + side, x * step + dx : x * step + dx + side] = number
    bright = np.append(20.0, rng.uniform(80, 230, label.max()))
    image = np.clip(bright[label] + rng.normal(0, 5, shape), 0, 255).round().astype(np.uint8)
    return image[None], label


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return `once(name, make)` -> folder: the first process of the tests that asks makes it, and
    all use it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def get(name, make):
        folder, made = base / f"once_{name}", base / f"once_{name}.made"
        with open(base / f"once_{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def squares():
    """Return `make(seed, shape=(40, 44))` -> (image, label)."""
    return _squares


@pytest.fixture(scope="session")
def splits(tmp_path_factory):
    """Return {split: samples file} with four, two and two images of squares."""
    from gdlib import io

    folder = tmp_path_factory.mktemp("splits")
    out = {}
    for number, (split, count) in enumerate({"train": 4, "val": 2, "test": 2}.items()):
        samples = [io.Sample(f"{split}{i}", *_squares(10 * number + i)) for i in range(count)]
        out[split] = folder / f"{split}.h5"
        io.write_samples(out[split], samples, split=split)
    return out


@pytest.fixture(scope="session")
def catalogue():
    """Return the project's own configuration, its words replaced by what they stand for."""
    from gdlib.config import parts
    from gdlib.config.words import spelt_out

    return spelt_out(parts.read(ROOT))


@pytest.fixture
def raw(catalogue):
    """Return a copy of the catalogue to spoil."""
    return copy.deepcopy(catalogue)


@pytest.fixture(scope="session")
def make_spec():
    """Return `make(method="none", seed=0, model="resunet", widths=..., patch=..., ..., **recipe)`
    -> RunSpec of a training that takes a second."""
    from gdlib.config import RunSpec

    def make(
        method="none",
        seed=0,
        model="resunet",
        widths=(2, 2, 4, 4, 4),
        patch=(32, 32),
        normalisation=None,
        targets=None,
        segmenters=("mutex_watershed",),
        **recipe,
    ):
        recipe = {
            "steps": 6,
            "batch_size": 2,
            "patch": patch,
            "warmup": 2,
            "precision": "float32",
            "teacher": "online",
            "validate_every": 3,
            "validate_images": 1,
            "save_every": 2,
            "bank": {"capacity": 3, "sample_size": 2},
            **recipe,
        }
        return RunSpec.model_validate(
            {
                "dataset": "squares",
                "network": f"{model}_{widths[0]}",
                "method": method,
                "seed": seed,
                "model": model,
                "options": {"widths": list(widths), "in_channels": 1, "embedding_dim": 4},
                "channels": 1,
                "offsets": OFFSETS[len(patch)],
                "normalisation": normalisation or {},
                "targets": targets or {},
                "segmenters": segmenters,
                "recipe": recipe,
                "terms": METHODS[method],
            }
        )

    return make


@pytest.fixture(scope="session")
def train(splits):
    """Return `train(spec, folder, **kwargs)` -> mean validation metrics.

    Every file of the run goes into the folder.
    """
    from gdlib.train.loop import fit

    def run(spec, folder, **kwargs):
        files = {name: Path(folder) / f"{name}.safetensors" for name in ("weights", "last")}
        files |= {"history": Path(folder) / "history.csv", "state": Path(folder) / "state"}
        return fit(
            spec,
            **{"train": splits["train"], "val": splits["val"], "device": "cpu", **files, **kwargs},
        )

    return run


@pytest.fixture(scope="session")
def teacher(once, make_spec, train):
    """Return the weights file of a teacher that has learnt to tell bright from dark, on one core in
    seconds."""
    optimizer = {"lr": 0.02}
    spec = make_spec(
        "teacher",
        widths=(4, 4, 8, 8, 8),
        steps=40,
        batch_size=4,
        validate_every=20,
        optimizer=optimizer,
    )
    return once("teacher", lambda folder: train(spec, folder)) / "weights.safetensors"
