"""Training histories for TensorBoard, which then needs nothing of the trainings and they nothing of
it.

`gdlib tensorboard results/quick` writes one event file per run below `results/quick/tensorboard`. A
run that is still training is shown as far as its last saved state. Called again, it adds what is
new, so that a running TensorBoard goes on.

Reference: the formats TFRecord and `tensorflow.Event` of TensorFlow. An event is written by hand
    because the package that
could do it is larger than all that it would be used for.
"""

import argparse
import csv
import struct
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from gdlib import io
from gdlib.io.failures import Failures
from gdlib.limits import Positive, argument, place

EVENTS = "events.out.tfevents.gdlib"  # TensorBoard looks for names like this
Row = tuple[int, str, float]  # step, tag, value


def histories(folder: Path) -> dict[str, Path]:
    """Return every run of a study, finished or not: its name, and the file with its history.

    Args:
        folder: of the study, `results/<study>`.
    """
    found = {
        path.parent.relative_to(folder / "runs"): path
        for path in folder.glob("runs/**/history.csv")
    }
    found |= {
        path.parent.relative_to(folder / "state"): path
        for path in folder.glob("state/**/resume.pt")
    }
    return {name.as_posix(): path for name, path in sorted(found.items())}


def read(path: Path) -> list[Row]:
    """Return the history in one of these files."""
    rows = _read_state(path) if path.suffix == ".pt" else _read_history(path)
    return [(step, f"{split}/{quantity}", value) for step, split, quantity, value in rows]


def _read_history(path: Path) -> list[tuple[int, str, str, float]]:
    try:
        with open(path, newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) == io.HISTORY_COLUMNS:
                return [
                    (int(step), split, name, float(value)) for step, split, name, value in reader
                ]
    except ValueError as error:
        raise io.DataError(
            f"{path}: not a readable training history ({error}); train again"
        ) from None
    raise io.DataError(
        f"{path}: this is no training history; it must have the columns "
        f"{', '.join(io.HISTORY_COLUMNS)}"
    )


def _read_state(path: Path) -> list[tuple[int, str, str, float]]:
    try:
        state = io.load_state(path)
    except io.DataError as error:
        raise io.DataError(f"{error}; it will be there again when the training goes on") from error
    if "history" not in state:
        raise io.DataError(
            f"{path}: this is no saved state of a training; give the folder of a "
            "study, results/<study>"
        )
    return state["history"]


def events(rows: Iterable[Row]) -> bytes:
    """Return an event file with these scalars, in their order.

    The time of an event is its step in seconds: equal histories give equal bytes, and a longer one
    begins with a shorter one.

    >>> len(events([])), len(events([(10, "train/loss", 0.5)]))
    (31, 79)
    """
    out = [_record(_bytes(3, b"brain.Event:2"))]
    for step, tag, value in rows:
        scalar = _bytes(1, _bytes(1, tag.encode()) + _float(2, value))
        out.append(_record(_double(1, float(step)) + _integer(2, step) + _bytes(5, scalar)))
    return b"".join(out)


def write(folder: Path, out: Path) -> tuple[int, Failures]:
    """Write or continue the event files of all runs of a study.

    Return how many runs there are, and what failed.
    """
    runs, failed = histories(folder), Failures()
    for name, path in runs.items():
        with failed.noted():
            _write(out / name / EVENTS, events(read(path)))
    return len(runs), failed


def _write(path: Path, content: bytes) -> None:
    known = path.read_bytes() if path.exists() else b""
    if not known.startswith(events([])[: len(known)]):
        raise io.DataError(
            f"{path}: it is there already, and not from this command; choose another --out"
        )
    if known and content.startswith(known):
        with open(path, "ab") as file:
            file.write(content[len(known) :])
    else:  # a new run, or one that was trained again
        with io.atomic(path) as temporary:
            temporary.write_bytes(content)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked(length) + content + _masked(content)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _crc_table()


def crc32c(content: bytes) -> int:
    """Return the Castagnoli checksum.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked(content: bytes) -> bytes:
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def add_tensorboard(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib tensorboard` to the command line."""
    parser = commands.add_parser(
        "tensorboard",
        help="write training histories for TensorBoard",
        description="Write the training histories of a study as event files, finished runs and "
        "those that are training. Look at "
        "them with `pip install tensorboard` and `tensorboard --logdir "
        "results/<study>/tensorboard`.",
    )
    parser.add_argument(
        "study", type=place, metavar="DIR", help="folder of the study, e.g. results/quick"
    )
    parser.add_argument(
        "--out",
        type=place,
        metavar="DIR",
        help="where to write (default: tensorboard/ in that folder)",
    )
    parser.add_argument(
        "--every",
        type=argument(Positive),
        metavar="S",
        help="go on, writing what is new every so many seconds",
    )
    parser.set_defaults(function=_tensorboard)


def _tensorboard(arguments: argparse.Namespace) -> None:
    out = arguments.out or arguments.study / "tensorboard"
    while True:
        count, failed = write(arguments.study, out)
        if not count and not arguments.every:
            raise io.DataError(
                f"{arguments.study}: there is no training history; give the folder of a study, "
                "results/<study>"
            )
        print(f"{out}: {count - len(failed.errors)} runs", flush=True)
        if not arguments.every:
            return failed.tell(count, "runs could not be shown")
        print(*failed.errors, sep="\n", end="\n" * bool(failed.errors), file=sys.stderr, flush=True)
        time.sleep(arguments.every)
