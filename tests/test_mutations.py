"""The faults of `tests/mutations` still fit the code.

That the tests notice them is a command: `python -m tests.mutations`.
"""

import ast
from pathlib import Path

import pytest

from tests.mutations.table import FAULTS

ROOT = Path(__file__).parents[1]


def test_there_are_many_and_no_two_are_alike():
    assert len(FAULTS) >= 60
    assert (
        len({fault.name for fault in FAULTS})
        == len({(fault.file, fault.old) for fault in FAULTS})
        == len(FAULTS)
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_code(fault):
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.old) == 1, "say it anew in tests/mutations/faults.toml"
    assert fault.old != fault.new
    if fault.file.endswith(".py"):
        ast.parse(text.replace(fault.old, fault.new))
    files = [word for word in fault.tests if word.startswith("tests/")]
    assert files
    assert all((ROOT / file).is_file() for file in files)
