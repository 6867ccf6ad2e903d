"""The style of Python and Snakemake files, checked by their own tools."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent  # the tools of this environment, whether or not it is activated


@pytest.mark.parametrize(
    "command",
    [
        "ruff check",
        "ruff format --check",
        "snakefmt --check Snakefile workflow",
        "snakemake --lint",
    ],
)
def test_clean(command):
    program, *arguments = command.split()
    result = subprocess.run([BIN / program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
