"""Tables in long form."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gdlib.io.failures import WriteError as WriteError
from gdlib.io.files import atomic

HISTORY_COLUMNS = ("step", "split", "name", "value")


METRIC_COLUMNS = ("dataset", "network", "method", "seed", "segmenter", "sample", "metric", "value")


def write_rows(path: Path | str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file atomically; floats keep ten significant digits."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow(
                [f"{value:.10g}" if isinstance(value, float) else value for value in row]
            )
