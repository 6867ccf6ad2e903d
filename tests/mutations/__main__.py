"""Put one fault after the other into a copy of the project, and see whether the tests notice it."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.table import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 900  # seconds; a fault may make the code hang, which is noticed


def main() -> int:
    """Return 0 if every fault was caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="faults with these words in their name or file (default: all)",
    )
    parser.add_argument("--list", action="store_true", help="only name the faults")
    parser.add_argument(
        "--tests", metavar="ARGS", help="arguments of pytest, instead of those in the table"
    )
    parser.add_argument(
        "--clean", action="store_true", help="run the tests without the faults: all must pass"
    )
    arguments = parser.parse_args()
    words = arguments.names
    faults = [
        fault
        for fault in FAULTS
        if not words or any(word in f"{fault.name} {fault.file}" for word in words)
    ]
    if arguments.list or not faults:
        print(*(f"{fault.file}: {fault.name}" for fault in faults), sep="\n")
        return not faults
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder) / "project")
        missed = [
            fault for fault in faults if not seen(copy, fault, arguments.tests, arguments.clean)
        ]
    print(f"{len(faults) - len(missed)} of {len(faults)} {'pass' if arguments.clean else 'caught'}")
    print(*(f"  {fault.file}: {fault.name}" for fault in missed), sep="\n", end="\n" * bool(missed))
    return bool(missed)


def copied(folder: Path) -> Path:
    """Copy what git knows, and what is new, into a folder of its own."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def seen(copy: Path, fault: Fault, tests: str | None, clean: bool) -> bool:
    """Run the tests with a fault in the copy, print a line, and return whether they noticed.

    Without it, whether they pass.
    """
    path = copy / fault.file
    right = path.read_text()
    assert right.count(fault.old) == 1, (
        f"{fault.name}: its text is not in {fault.file}, or more than once"
    )
    if not clean:
        path.write_text(right.replace(fault.old, fault.new))
    start = time.monotonic()
    # Real images are where they are for the project itself; compiled files of the fault must not be
    # left behind.
    raw = os.environ.get("GDLIB_RAW", ROOT.parent / "shared" / "data")
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "GDLIB_RAW": str(raw),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += shlex.split(tests) if tests else fault.tests
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        code, text = 1, "FAILED it hangs"
    path.write_text(right)
    ok = code == (0 if clean else 1)
    word = "passes" if clean and ok else "caught" if ok else "FAILS" if clean else "NOT CAUGHT"
    by = re.search(r"^FAILED (?:tests/)?(.*?)(?: - |$)", text, re.MULTILINE)
    notes = [f"[{by[1]}]"] if by else []
    notes += [f"(pytest ended with {code})"] if code not in (0, 1) else []
    print(
        f"{word:10} {time.monotonic() - start:6.1f} s  {fault.file}: {fault.name}",
        *notes,
        flush=True,
    )
    return ok


if __name__ == "__main__":
    sys.exit(main())
