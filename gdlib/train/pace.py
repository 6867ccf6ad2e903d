"""How long a step of a training takes here, measured by making some."""

import contextlib
import time
from io import StringIO
from pathlib import Path

import torch

from gdlib import io
from gdlib.config import RunSpec
from gdlib.data.intensity import learn
from gdlib.models import build
from gdlib.train.ask import ask
from gdlib.train.loop import Interrupted, fit

FIRST = 2  # steps that are not counted: something is compiled, memory is asked for
STEPS = 12  # at most so many are counted
SECONDS = 15.0  # and no more after that
IMAGES = 4  # to learn from: a step sees patches, however many images there are
NEVER = 10**6  # steps until the training would end, or validate, or save itself


def seconds_per_step(
    spec: RunSpec,
    *,
    train: Path | str,
    val: Path | str,
    folder: Path | str,
    teacher: RunSpec | Path | str | None = None,
    threads: int = 1,
) -> float:
    """Return the mean time of a training step, validation not counted.

    Args:
        spec: of the training.
        train: samples `.h5`.
        val: samples `.h5`.
        folder: for what is made and not needed afterwards.
        teacher: what the method learns from, if it needs a teacher: weights, or the training of one
            that is not there yet; how good it is does not matter for the time.
        threads: CPU threads.
    """
    folder = Path(folder)
    before, came = torch.get_num_threads(), []

    def enough() -> bool:
        came.append(time.perf_counter())
        counted = len(came) - FIRST
        return counted >= STEPS or (counted > 0 and came[-1] - came[FIRST - 1] > SECONDS)

    recipe = spec.recipe.model_copy(
        update={"steps": NEVER, "validate_every": NEVER, "save_every": NEVER}
    )
    few = folder / "few.h5"
    if not few.exists():
        names = io.sample_ids(train)[:IMAGES]
        io.write_samples(few, io.read_samples(train, names), split="train")
    places = {key: folder / f"{key}.out" for key in ("weights", "last", "history")}
    torch.set_num_threads(threads)
    try:
        silent = StringIO()
        with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
            maps = [_maps(teacher, few, folder)] if teacher and spec.terms else []
            fit(
                spec.model_copy(update={"recipe": recipe}),
                train=few,
                val=val,
                **places,
                state=folder / f"{spec.network}-{spec.method}",
                maps=maps,
                stop=enough,
            )
    except Interrupted:
        return (came[-1] - came[FIRST - 1]) / (len(came) - FIRST)
    finally:
        torch.set_num_threads(before)
    raise AssertionError("a training of that many steps does not end")


def _maps(teacher: RunSpec | Path | str, samples: Path, folder: Path) -> Path:
    """Ask a teacher about these images."""
    if isinstance(teacher, RunSpec):
        images = (vars(sample) for sample in io.read_samples(samples))
        header = teacher.model_dump(
            mode="json", include={"model", "options", "channels", "offsets"}
        )
        normalisation = learn(images, **teacher.normalisation.model_dump())
        network = build(teacher.model, teacher.options)
        header["normalisation"] = normalisation
        teacher = folder / "teacher.safetensors"
        io.save_weights(teacher, network.state_dict(), header)
    ask(teacher, samples, folder / "maps.h5")
    return folder / "maps.h5"
