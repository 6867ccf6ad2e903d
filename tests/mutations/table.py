"""Faults of one line that the tests must notice: what the code would be with a slip that is easily
made; see `faults.toml`."""

import shlex
import tomllib
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """One slip.

    Attributes:
        name: what went wrong.
        file: where, from the root of the project.
        old: text that is there exactly once.
        new: what stands in its place.
        by: what is expected to notice, as arguments of pytest, files below `tests`.
    """

    name: str
    file: str
    old: str
    new: str
    by: str

    @property
    def tests(self) -> list[str]:
        """Return the arguments of pytest."""
        return [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(self.by)]


_TABLE = tomllib.loads((Path(__file__).parent / "faults.toml").read_text())
FAULTS = [
    Fault(name, file, **slip) for file, slips in _TABLE.items() for name, slip in slips.items()
]
