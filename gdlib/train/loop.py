"""The one training loop, for teachers and students, in 2D and 3D: a teacher is a run without
distillation terms.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gdlib import __version__, io, processes
from gdlib.config import RunSpec
from gdlib.data.maps import TeacherMaps
from gdlib.data.patches import PatchSampler
from gdlib.data.scale import known_sizes
from gdlib.devices import choose_device
from gdlib.evaluate.metrics import is_better
from gdlib.evaluate.scores import worth
from gdlib.progress import Progress
from gdlib.train.teacher import check_maps
from gdlib.train.trainer import Trainer, own_random_numbers
from gdlib.train.validator import Validator

# steps; losses are averaged over them, so that nothing waits for the device at every step
LOG_EVERY = 10


class Interrupted(Exception):
    """The run was told to stop; its state is saved and the same call goes on from there."""


def fit(
    spec: RunSpec,
    *,
    train: Path | str,
    val: Path | str,
    weights: Path | str,
    last: Path | str,
    history: Path | str,
    state: Path | str,
    teacher: Path | str | None = None,
    maps: Sequence[Path | str] = (),
    unlabelled: Path | str | None = None,
    unlabelled_maps: Sequence[Path | str] = (),
    device: str = "auto",
    max_seconds: float = math.inf,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Train one network and write its weights.

    In several processes at once where `torchrun` started them.

    It may run in any thread and leaves the program as it was: it handles no signals, and torch's
    random numbers go on after it as if it had not been. While it runs nobody else should draw them:
    what drops channels at random would not repeat.

    Args:
        spec: what to train and how.
        train: samples `.h5` to learn from.
        val: samples `.h5` for validation while training, the choice of the best weights and of the
            segmentation parameters.
        weights: where the best weights go, with all that is needed to use them in the header: the
            better, each with parameters of its own, of those that were the best while training,
            with default parameters, and those of the last step.
        last: where the weights of the last step go.
        history: CSV with every loss and validation metric.
        state: folder of `resume.pt`, which is removed when training is complete.
        teacher: weights of the teacher, if a term needs one and the recipe asks it online.
        maps: files of `gdlib.train.ask.ask`, if a term needs a teacher and the recipe takes its
            maps.
        unlabelled: samples `.h5` of images that nobody has labelled, with what was found in them
            (`gdlib.train.label.label_images`), if the run shall learn from them too.
        unlabelled_maps: of the same teacher, for these images; as many as `maps`.
        device: name, or `auto`.
        max_seconds: stop and save the state after this time.
        stop: asked after every step whether to do so, e.g. the `is_set` of a `threading.Event`.

    Returns:
        Mean validation metrics of the best weights, with the first segmenter; nothing in processes
        that do not validate.

    Raises:
        Interrupted: it was told to stop, or `max_seconds` are over.
    """
    with processes.joined(choose_device(device)) as target, own_random_numbers(target):
        recipe, alone, leader = spec.recipe, processes.world() == 1, processes.rank() == 0
        if recipe.accumulate % processes.world():
            raise ValueError(
                f"{processes.world()} processes share the batches of a step: make accumulate, "
                f"which is {recipe.accumulate}, a multiple of that, with a smaller batch_size if "
                "the step shall stay the same"
            )
        # Validation first: a file that cannot be used must not cost a training.
        validator = Validator(spec, val, target) if leader else None
        known = TeacherMaps(maps, train) if maps else None
        more = TeacherMaps(unlabelled_maps, unlabelled) if unlabelled and unlabelled_maps else None
        check_maps(known, more, unlabelled)
        trainer = Trainer(spec, known or teacher, target)
        sampler = PatchSampler(
            train,
            **spec.drawing,
            margin=trainer.margin,
            device=target,
            maps=known,
            levels=trainer.levels,
            unlabelled=unlabelled,
            unlabelled_maps=more,
        )
        if validator is not None:
            validator.normalisation = sampler.normalisation
        resume = Path(state) / "resume.pt"
        fingerprint = _fingerprint(spec, train, val, teacher, unlabelled)
        fingerprint += "".join(maps.identity for maps in (known, more) if maps)
        if resume.exists():
            trainer.resume(resume, fingerprint)

        deadline = time.monotonic() + max_seconds
        name = f"{spec.network}/{spec.method}/seed{spec.seed}"
        bar = Progress(
            total=recipe.steps, initial=trainer.step, unit="step", desc=name, disable=not leader
        )
        with bar:
            bar.say(
                f"training on {_device_name(target)} in {str(trainer.dtype).removeprefix('torch.')}"
            )
            while trainer.step < recipe.steps:
                trainer.advance(sampler.batch(number) for number in trainer.batches())
                bar.update()
                if trainer.step % LOG_EVERY == 0 or trainer.step == recipe.steps:
                    bar.set_postfix(loss=f"{trainer.flush_losses():.4f}")
                if leader and (
                    trainer.step % recipe.validate_every == 0 or trainer.step == recipe.steps
                ):
                    trainer.consider(validator(trainer.deployed))
                    reached = f"{recipe.selection} {trainer.last_scores[recipe.selection]:.4f}"
                    best = ", the best so far" * (trainer.best_step == trainer.step)
                    bar.say(f"step {trainer.step}: validation {reached}{best}")
                # Several processes must agree, for which they wait for their devices: not at every
                # step.
                asked = alone or trainer.step % LOG_EVERY == 0
                asked = asked and processes.any_of(stop() or time.monotonic() > deadline, target)
                if leader and (
                    asked or (trainer.step % recipe.save_every == 0 and trainer.step < recipe.steps)
                ):
                    trainer.save(resume, fingerprint)
                if asked:
                    said = (
                        f"stopped after step {trainer.step} of {recipe.steps}; the same command "
                        "goes on from there"
                    )
                    bar.say(said)
                    raise Interrupted(said)
        if not leader:
            return {}

        header = {
            **spec.model_dump(mode="json", include={"model", "options", "channels", "offsets"}),
            "normalisation": sampler.normalisation,
            **known_sizes(train),
            "run": spec.model_dump(mode="json"),
            "gdlib": __version__,
            "torch": torch.__version__,
            "device": _device_name(target),
            "precision": str(trainer.dtype).removeprefix("torch."),
        }
        final = {name: tensor.clone() for name, tensor in trainer.deployed.state_dict().items()}
        bar.say(f"choosing segmentation parameters on {len(validator.samples)} validation images")
        # The best so far is so with default parameters; with tuned ones the last, whose rate has
        # come to rest, may be better.
        candidates = {trainer.best_step: trainer.best_state} | {recipe.steps: final}
        tuned = {}
        for step, tensors in candidates.items():
            trainer.deployed.load_state_dict(tensors)
            parameters, scores = validator.tune(trainer.deployed)
            tuned[step] = {"step": step, "segmentation": parameters, "validation": scores}
        kept = best_of(tuned, spec.segmenters[0], recipe.selection)
        io.save_weights(last, final, header | tuned[recipe.steps])
        io.write_rows(history, io.HISTORY_COLUMNS, trainer.history)
        print(
            f"{recipe.steps} steps took {trainer.seconds:.0f} s of training, validation not counted"
        )
        io.save_weights(weights, candidates[kept], header | tuned[kept])
        resume.unlink(missing_ok=True)
        return tuned[kept]["validation"][spec.segmenters[0]]


def best_of(tuned: Mapping[int, Mapping[str, Any]], segmenter: str, metric: str) -> int:
    """Return the step whose validation scores with a segmenter are the best by a metric; of equals
    the first given.
    """
    first, *others = tuned
    for step in others:
        one, best = (tuned[k]["validation"][segmenter] for k in (step, first))
        if is_better(metric, worth(one, metric), worth(best, metric)):
            first = step
    return first


def _fingerprint(spec: RunSpec, *files: Path | str | None) -> str:
    digest = hashlib.sha256(spec.model_dump_json().encode())
    for path in files:
        digest.update(io.sha256(path).encode() if path is not None else b"-")
    digest.update(io.code_sha256().encode())
    return digest.hexdigest()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
