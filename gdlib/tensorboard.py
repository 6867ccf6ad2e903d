"""Training histories for TensorBoard, which then needs nothing of the trainings and they nothing of it.

`gdlib tensorboard results/quick` writes one event file per run below `results/quick/tensorboard`. A run that is still
training is shown as far as its last saved state. Called again, it adds what is new, so that a running TensorBoard goes on.

Reference: the formats TFRecord and `tensorflow.Event` of TensorFlow. An event is written by hand because the package that
could do it is larger than all that it would be used for.
"""

import argparse
import csv
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from gdlib import io
from gdlib.limits import Positive, argument

EVENTS = "events.out.tfevents.gdlib"  # TensorBoard looks for names like this
Row = tuple[int, str, float]  # step, tag, value


def histories(folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """Yield every run of a study, finished or not: its name and its history.

    Args:
        folder: of the study, `results/<study>`.
    """
    found = {path.parent.relative_to(folder / "runs"): path for path in folder.glob("runs/**/history.csv")}
    found |= {path.parent.relative_to(folder / "state"): path for path in folder.glob("state/**/resume.pt")}
    for name, path in sorted(found.items()):
        rows = _read_state(path) if path.suffix == ".pt" else _read_history(path)
        yield name.as_posix(), [(step, f"{split}/{quantity}", value) for step, split, quantity, value in rows]


def _read_history(path: Path) -> list[tuple[int, str, str, float]]:
    with open(path, newline="") as file:
        reader = csv.reader(file)
        if tuple(next(reader, ())) != io.HISTORY_COLUMNS:
            raise io.DataError(f"{path}: this is no training history; its columns are {', '.join(io.HISTORY_COLUMNS)}")
        return [(int(step), split, name, float(value)) for step, split, name, value in reader]


def _read_state(path: Path) -> list[tuple[int, str, str, float]]:
    return io.load_state(path)["history"]


def events(rows: Iterable[Row]) -> bytes:
    """Return an event file with these scalars, in their order.

    The time of an event is its step in seconds: equal histories give equal bytes, and a longer one begins with a shorter one.

    >>> len(events([])), len(events([(10, "train/loss", 0.5)]))
    (31, 79)
    """
    out = [_record(_bytes(3, b"brain.Event:2"))]
    for step, tag, value in rows:
        scalar = _bytes(1, _bytes(1, tag.encode()) + _float(2, value))
        out.append(_record(_double(1, float(step)) + _integer(2, step) + _bytes(5, scalar)))
    return b"".join(out)


def write(folder: Path, out: Path) -> int:
    """Write or continue the event files of all runs of a study; return how many runs there are."""
    count = 0
    for name, rows in histories(folder):
        path, content = out / name / EVENTS, events(rows)
        known = path.read_bytes() if path.exists() else b""
        if not known.startswith(events([])[: len(known)]):
            raise io.DataError(f"{path}: it is there already, and not from this command; choose another --out")
        if known and content.startswith(known):
            with open(path, "ab") as file:
                file.write(content[len(known) :])
        else:  # a new run, or one that was trained again
            with io.atomic(path) as temporary:
                temporary.write_bytes(content)
        count += 1
    return count


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
        description="Write the training histories of a study as event files, finished runs and those that are training. Look at "
        "them with `pip install tensorboard` and `tensorboard --logdir results/<study>/tensorboard`.",
    )
    parser.add_argument("study", type=Path, metavar="DIR", help="folder of the study, e.g. results/quick")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: tensorboard/ in that folder)")
    parser.add_argument(
        "--every", type=argument(Positive), metavar="S", help="go on, writing what is new every so many seconds"
    )
    parser.set_defaults(function=_tensorboard)


def _tensorboard(arguments: argparse.Namespace) -> None:
    out = arguments.out or arguments.study / "tensorboard"
    while True:
        count = write(arguments.study, out)
        if not count and not arguments.every:
            raise io.DataError(
                f"{arguments.study}: there is no training history; give the folder of a study, results/<study>"
            )
        print(f"{out}: {count} runs", flush=True)
        if not arguments.every:
            return
        time.sleep(arguments.every)
