"""A program that uses gdlib is left as it was, whatever it asks for and in whichever thread.

Only the command line does more.
"""

import ctypes
import importlib.util
import json
import locale
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def is_mapped():
    """Whether the C library gets a large array from the system alone, as glibc does unless it was
    told to keep memory."""

    class Info(ctypes.Structure):
        names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_int) for name in names.split()]

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo"):
        return None
    libc.mallinfo.restype, libc.malloc.restype, libc.free.argtypes = (
        Info,
        ctypes.c_void_p,
        [ctypes.c_void_p],
    )
    before = libc.mallinfo().hblks
    array = libc.malloc(2**27)
    after = libc.mallinfo().hblks
    libc.free(array)
    return after > before


def state():
    """Everything of a process that a library could change for it."""
    import matplotlib as mpl
    import torch

    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "malloc": is_mapped(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "random numbers": (
            random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state(legacy=False)),  # noqa: NPY002
        ),
        "torch": (
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled("cpu"), torch.distributed.is_initialized(),
        ),
        "numpy": (np.geterr(), np.get_printoptions()),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook, os.fstat(1).st_ino, os.fstat(2).st_ino),
        "modules": (list(sys.path), [name for name, module in sys.modules.items() if module is None]),
        "locale": locale.setlocale(locale.LC_ALL),
        "processes": multiprocessing.get_start_method(allow_none=True),
        "matplotlib": str(list(dict.items(mpl.rcParams))),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
    }  # fmt: skip


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def actions(train, val, teacher, folder, spec, student):
    """Everything that a program could ask for, by name."""
    import pandas as pd
    import torch

    from gdlib import io
    from gdlib.cli import process
    from gdlib.config import RunSpec
    from gdlib.config.sections import RemoteFile
    from gdlib.data.download import download
    from gdlib.predict.cost import profile
    from gdlib.predict.predictor import Predictor
    from gdlib.report.figures import charts, style
    from gdlib.segment.parameters import defaults
    from gdlib.segment.segmenters import SEGMENTERS, segment
    from gdlib.train import ask, loop

    spec, student = RunSpec.model_validate(spec), RunSpec.model_validate(student)
    image = next(io.read_samples(val)).image

    def fit(spec, **options):
        run = Path(folder) / spec.method
        files = {name: run / f"{name}.safetensors" for name in ("weights", "last")}
        files |= {"history": run / "history.csv", "state": run / "state"}
        loop.fit(spec, train=train, val=val, device="cpu", **files, **options)

    def load():
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
            threading.Thread(target=server.serve_forever).start()
            (Path(folder) / "a.txt").write_text("a")
            file = RemoteFile(url=f"http://127.0.0.1:{server.server_port}/a.txt")
            download([file], Path(folder) / "raw")
            server.shutdown()

    def be_stopped():
        try:
            fit(spec, stop=lambda: True)
        except loop.Interrupted:
            return
        raise AssertionError("it went on")

    def ask_teacher():
        ask.ask(teacher, train, f"{folder}/maps.h5", device="cpu")

    def segment_all():
        found = Predictor.load(teacher, engine="torch", device="cpu")(image)
        for name in sorted(SEGMENTERS):
            if name != "waterz" or importlib.util.find_spec("waterz"):
                segment(found.affinity, found.foreground, spec.offsets, name, **defaults(name, 2))

    def plot():
        rows = pd.read_csv(f"{folder}/{spec.method}/history.csv").assign(
            dataset="squares", network="small", method="none", seed=0
        )
        style.save(charts.curves(rows, "aji"), Path(folder) / "curves.png")

    def handle_signals():
        signal.signal(signal.SIGTERM, lambda *_: None)

    return {
        "download": load,
        "be stopped": be_stopped,
        "train": lambda: fit(spec),
        "distil": lambda: fit(student, teacher=teacher),
        "ask a teacher": ask_teacher,
        "predict": lambda: Predictor.load(teacher, engine="torch", device="cpu")(image),
        "predict with the fastest engine": lambda: Predictor.load(teacher, device="cpu")(image),
        "segment": segment_all,
        "profile": lambda: profile(spec.model, spec.options, (32, 32), device="cpu"),
        "plot": plot,
        # What the check must see; at last, as there is no way back from some of it.
        "draw": lambda: torch.rand(1),
        "seed": lambda: torch.manual_seed(7),
        "handle signals": handle_signals,
        "set a variable": lambda: os.environ.update(GDLIB_PLUGINS="a"),
        "ignore warnings": lambda: warnings.simplefilter("ignore"),
        "use other threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        "keep memory": process.keep_memory,
    }


SEEN = {
    "draw": ["random numbers"], "seed": ["random numbers"], "handle signals": ["signals"],
    "set a variable": ["environment"], "ignore warnings": ["warnings"], "use other threads": ["threads"],
    "keep memory": ["malloc"] if is_mapped() is not None else [],
}  # fmt: skip
ASKED = (
    "download",
    "be stopped", "train", "distil", "ask a teacher", "predict", "predict with the fastest engine", "segment", "profile", "plot",
)  # fmt: skip


def main(given):
    """Do everything in a thread, but for what only the first one can; print what it changed."""
    import scipy.stats  # noqa: F401 - imports add filters of warnings, as those of the first optimizer
    import torch

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    changes = {}
    for name, action in actions(**given).items():
        before = state()
        if name in SEEN:
            action()
        else:
            errors = []
            threading.excepthook = errors.append
            thread = threading.Thread(target=action)
            before = state()
            thread.start()
            thread.join()
            assert not errors, errors
        after = state()
        changes[name] = [key for key in before if before[key] != after[key]]
    print(json.dumps(changes))


@pytest.fixture(scope="module")
def changes(tmp_path_factory, splits, teacher, make_spec):
    """Return what each action changed, in a process of its own."""
    files = {"train": splits["train"], "val": splits["val"], "teacher": teacher}
    given = {
        name: str(path)
        for name, path in (files | {"folder": tmp_path_factory.mktemp("host")}).items()
    }
    specs = {
        "spec": make_spec("none", steps=2, validate_every=2),
        "student": make_spec("grd", steps=2),
    }
    given |= {name: spec.model_dump(mode="json") for name, spec in specs.items()}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(given)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_left_out(changes):
    assert list(changes) == [*ASKED, *SEEN]


@pytest.mark.parametrize("name", ASKED)
def test_a_program_is_left_as_it_was(name, changes):
    assert changes[name] == []


@pytest.mark.parametrize("name", SEEN)
def test_a_change_would_be_seen(name, changes):
    assert changes[name] == SEEN[name]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
