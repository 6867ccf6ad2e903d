"""A study of seconds, and what it takes to disturb it: every fault is real, none is simulated."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import h5py
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("Snakefile", "config", "config.yaml", "envs", "gdlib", "profiles", "workflow")
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
DATA, TEACHER, STUDENT = "dots", "resunet_w8", "resunet_tiny"
RUNS = f"results/faults/runs/{DATA}"
TEACHING = f"{DATA}/{TEACHER}/teacher/seed0"
RECIPE = {"batch_size": 2, "patch": [32, 32], "save_every": 4}
STUDY = {
    "study": "faults",
    "datasets": {
        DATA: {
            "source": "nuclei_phantom",
            "options": {
                "size": [64, 64],
                "count": [5, 10],
                "images": {"train": 4, "val": 1, "test": 2},
            },
            "offsets": [[-1, 0], [0, -1], [-3, 0], [0, -3], [-9, 0], [0, -9]],
            "patch": [32, 32],
        }
    },
    "studies": {
        "faults": {
            "title": "Faults",
            "datasets": [DATA],
            "teacher": TEACHER,
            "students": [STUDENT],
            "methods": ["none", "grd"],
            "seeds": [0],
            "teacher_recipe": {**RECIPE, "steps": 40, "validate_every": 20},
            "student_recipe": {**RECIPE, "steps": 12, "validate_every": 6},
        }
    },
    "plot": {"dpi": 60, "formats": ["png"]},
}
EXACT = (".h5", ".safetensors", ".csv")  # what is the same, byte for byte, each time it is made
PATIENCE = 600  # seconds


class Study:
    """The study in a folder of its own."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        folder.mkdir(exist_ok=True)
        (folder / "overlay.yaml").write_text(yaml.safe_dump(STUDY))

    def command(self, *targets: str, cores: int = 2, options: tuple[str, ...] = ()) -> list[str]:
        """Return the command that makes targets, all by default."""
        # Jobs of one thread: those of several wait for each other where something else needs the
        # cores.
        command = [
            SNAKEMAKE,
            "--directory",
            self.folder,
            "--cores",
            cores,
            "--max-threads",
            1,
            *options,
        ]
        return [
            *map(str, command),
            "--configfile",
            str(self.folder / "overlay.yaml"),
            "--",
            *targets,
        ]

    def run(self, *targets: str, before: tuple[str, ...] = (), **how) -> tuple[int, str]:
        """Run to the end; return exit status and output."""
        command = [*before, *self.command(*targets, **how)]
        done = subprocess.run(
            command,
            cwd=self.repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        return done.returncode, done.stdout

    def finish(self, *targets: str) -> str:
        """Run to the end, which must be a good one.

        What a killed Snakemake left locked is unlocked, as it asks for.
        """
        if self.locked():
            status, output = self.run(options=("--unlock",))
            assert status == 0, output
        status, output = self.run(*targets)
        assert status == 0, output
        return output

    def locked(self) -> bool:
        """Tell whether a Snakemake left its lock."""
        return any((self.folder / ".snakemake" / "locks").glob("*"))

    def exact(self) -> dict[str, bytes]:
        """Return the content of all files that must be equal each time, by name.

        Hidden ones are nobody's result.
        """
        files = [path for part in ("data", "results") for path in (self.folder / part).rglob("*")]
        relative = {path.relative_to(self.folder): path for path in files if path.suffix in EXACT}
        shown = {
            name: path
            for name, path in relative.items()
            if not any(p.startswith(".") for p in name.parts)
        }
        return {
            str(name): path.read_bytes()
            for name, path in shown.items()
            if "state" not in name.parts
        }

    def hidden(self) -> list[str]:
        """Return the names of unfinished files."""
        files = [path for part in ("data", "results") for path in (self.folder / part).rglob(".*")]
        return sorted(str(path.relative_to(self.folder)) for path in files)

    def log(self, name: str) -> str:
        """Return the log of a job."""
        return (self.folder / "logs" / "faults" / f"{name}.log").read_text()

    def jobs(self, output: str) -> dict[str, tuple[str, float]]:
        """Return rule and duration in seconds of every job, by its message, from what Snakemake
        printed."""
        found, started, now = {}, {}, 0.0
        for line in output.splitlines():
            if match := re.fullmatch(r"\[(\w{3} \w{3} .*\d{4})\]", line):
                now = datetime.strptime(match[1], "%a %b %d %H:%M:%S %Y").timestamp()
            elif match := re.fullmatch(r"Job (\d+): (.*)", line):
                started[match[1]] = (match[2], now)
            elif (match := re.fullmatch(r"Finished jobid: (\d+) \(Rule: (\w+)\)", line)) and match[
                1
            ] in started:
                message, start = started[match[1]]
                found[message] = (match[2], now - start)
        return found


class Running:
    """A study that is running, with all its processes in one group."""

    def __init__(self, study: Study, *targets: str, **how) -> None:
        self.study, self.file = study, study.folder / "output.txt"
        with open(self.file, "w") as out:
            self.process = subprocess.Popen(
                study.command(*targets, **how),
                cwd=study.repository, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        """What it printed up to now."""
        return self.file.read_text()

    def wait_until(self, condition, seconds: float = PATIENCE) -> bool:
        """Wait for a condition; return whether it came true before the end of the process or of the
        time."""
        until = time.monotonic() + seconds
        while (
            not (true := condition()) and self.process.poll() is None and time.monotonic() < until
        ):
            time.sleep(0.003)
        return bool(true)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send all processes a signal, and wait until the last is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        status = self.process.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:  # its children, too
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.01)
        return status


def assert_whole(study: Study, reference: Study) -> None:
    """Every file that is there under its name is complete.

    Of those that can be compared, the right one.
    """
    right = reference.exact()
    for name, content in study.exact().items():
        assert content == right[name], name
    for path in study.folder.rglob("*.png"):
        if not path.name.startswith("."):
            with Image.open(path) as image:
                image.load()


def assert_same_end(study: Study, reference: Study) -> None:
    """The study ended as the undisturbed one: every number, every weight.

    And nothing is left to do.
    """
    assert study.exact() == reference.exact()
    assert_whole(study, reference)
    assert study.hidden() == []
    status, output = study.run(options=("--dry-run",))
    assert status == 0, output
    assert "Nothing to be done" in output


def flip(path: Path, place: int) -> None:
    """Flip a bit, as a failing disk does."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def middle_of(path: Path, dataset: str) -> int:
    """Return where the first stored piece of an array of an HDF5 file has its middle."""
    with h5py.File(path) as file:
        array = file[next(iter(file))][dataset] if dataset not in file else file[dataset]
        chunk = array.id.get_chunk_info(0)
    return chunk.byte_offset + chunk.size // 2
