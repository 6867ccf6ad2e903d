"""A step of training as users run it, against forward, backward and optimizer of the same
network.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import Bench, synchronise
from benchmarks.scenes import bare_step, folder, roof, spec, trainings
from gdlib.cli import process
from gdlib.distill import Targets, Term, View


class Clock(Term):
    """A loss of 0 that notes when it was asked: once in every step of a training."""

    needs_teacher = False
    seen: list[float] = []

    def forward(
        self, student: View, teacher: View | None, targets: Targets, memory: Mapping[str, Tensor]
    ) -> Tensor:
        """Return 0."""
        self.seen.append(time.perf_counter())
        return student.output.embedding.new_zeros(())


def train(
    bench: Bench, steps: int, ndim: int, patch: Sequence[int], batch: int, data: Path, out: Path
) -> np.ndarray:
    """Train the small student and write its weights into a folder.

    Return the time of every step but the last, in ms.
    """
    from gdlib.train.loop import fit

    Clock.seen.clear()
    clock = {"term": "benchmarks.train:Clock", "weight": 0.0}
    with contextlib.redirect_stdout(StringIO()), contextlib.redirect_stderr(StringIO()):
        fit(
            spec(ndim, patch, batch, [clock], steps=steps, precision=bench.precision),
            train=data,
            val=data,
            weights=out / "weights.safetensors",
            last=out / "last.safetensors",
            history=out / "history.csv",
            state=out / "state",
            device=str(bench.device),
        )
    return 1e3 * np.diff(Clock.seen)


def run(bench: Bench) -> None:
    """Steps of a real training in 2D and 3D, in turns with bare ones.

    A time is the mean of as many steps as there are between two entries in the log, after some that
    warm up.
    """
    process.keep_memory()  # as the command line does
    warm, together, count = bench.pick((5, 10, 4), (3, 10, 2), (1, 1, 2))
    for axes, (patch, batch, data) in trainings(bench).items():
        bare = bare_step(bench, len(patch), (batch, 1, *patch))
        times, reference = [], []
        for _ in range(bench.pick(3, 2, 1)):
            with TemporaryDirectory(dir=folder()) as out:
                steps = train(
                    bench, warm + together * count + 1, len(patch), patch, batch, data, Path(out)
                )
            times += steps[warm:].reshape(count, together).mean(1).tolist()
            for number in range(warm + together * count):
                if number == warm:
                    start = time.perf_counter()
                bare()
            synchronise(bench.device)
            reference.append(1e3 * (time.perf_counter() - start) / (together * count))
        found = bench.add(
            f"a step of training, {axes}",
            times,
            reference,
            shape=[batch, *patch],
            about="forward, backward and optimizer of the same network on a batch "
            "that is there already",
        )
        with FlopCounterMode(display=False) as counter:
            bare()
        found["precision"] = bench.precision
        found["gflop_per_s"] = 1e-6 * counter.get_total_flops() / found["ms"]
        overhead = found["ms"] / found["reference_ms"]
        bench.target(f"a step of training against the bare one, {axes}", overhead, 1.15, unit=" x")
    roof(bench)
