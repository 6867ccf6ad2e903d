"""What every job of a study pays before it works: the interpreter, and what a step imports."""

import ast
import subprocess
import sys

from benchmarks.bench import FOLDER, Bench
from gdlib.cli import steps

# What Numba costs a job: it is imported, and the first compiled loop is read from the cache.
FIRST_WATERSHED = """
import numpy as np
from gdlib.segment.mutex import mutex_watershed
mutex_watershed(np.zeros((2, 8, 8), np.uint8), np.ones((8, 8), bool), [(-1, 0), (0, -1)])
"""


def imports() -> dict[str, list[str]]:
    """Return for every step of the workflow the modules that it imports, from the source of
    `gdlib.cli.steps`.
    """
    with open(steps.__file__) as file:
        tree = ast.parse(file.read())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
            modules = [n.module for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
            if any(module.startswith("gdlib") for module in modules):
                found[node.name[1:]] = ["gdlib.cli.main", *dict.fromkeys(modules)]
    return found


def start(code: str):
    """Return a call that runs some Python in a new process."""

    def call() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=FOLDER.parent,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        return done.stdout

    return call


def run(bench: Bench) -> None:
    """Start each kind of process."""
    empty = start("pass")
    about = "the interpreter alone"
    cases = {
        "gdlib --help": "import gdlib.cli.main, contextlib\nwith contextlib.suppress(SystemExit): "
        "gdlib.cli.main.main(['--help'])",
        "parse the configuration": ("from gdlib.config import load; load('.')"),
    }
    cases |= {f"step {name}": f"import {', '.join(modules)}" for name, modules in imports().items()}
    cases["step segment, first mutex watershed"] = f"{cases['step segment']}\n{FIRST_WATERSHED}"
    for name, code in cases.items():
        heavy = (
            start(f"{code}\nimport sys; print('torch' in sys.modules)")().splitlines()[-1] == "True"
        )
        found = bench.compare(name, start(code), empty, about=about, least=2, imports_torch=heavy)
        # that was of this process, not of the new one
        found["peak_mib"] = found["reference_peak_mib"] = None
