"""One training step, and everything that changes by it."""

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gdlib import io, processes
from gdlib.config import Recipe, RunSpec
from gdlib.data.maps import TeacherMaps
from gdlib.devices import choose_precision
from gdlib.distill import Asked, Distiller, build_term
from gdlib.distill.bank import MemoryBank, check_entries
from gdlib.evaluate.metrics import is_better
from gdlib.evaluate.scores import FALSE, worth
from gdlib.models import build
from gdlib.train.teacher import sides_of_maps, teacher_of
from gdlib.types import Batch

HISTORY_METRICS = ("aji", "dice", "f1_50", "pq", "arand", "voi")
DRAWING = ("cuda", "mps", "xpu")  # devices with random numbers of their own


class Trainer:
    """Everything that changes while training, so that it can be saved and taken back as a whole.

    Args:
        spec: what to train and how.
        teacher: its maps, or the file of its weights, where a term needs one.
        device: where all of it is.
    """

    def __init__(
        self, spec: RunSpec, teacher: TeacherMaps | Path | str | None, device: torch.device
    ) -> None:
        recipe = spec.recipe
        _seed(spec.seed, device)
        self.spec = spec
        self.device = device
        self.dtype = choose_precision(recipe.precision, device)
        if device.type == "cpu" and self.dtype == torch.bfloat16 and has_two_sections(spec):
            self.dtype = torch.float32
        student = build(spec.model, spec.options)
        terms = [
            (t.name, t.weight, build_term(t.term, t.memory, t.options)) for t in spec.all_terms
        ]
        frozen = (
            teacher_of(spec, teacher) if any(term.needs_teacher for _, _, term in terms) else None
        )
        networks = [student] if frozen is None or isinstance(frozen, Asked) else [student, frozen]
        self.levels = sides_of_maps(spec) if isinstance(frozen, Asked) else {}
        for network in networks:
            _check_patch(network, spec)
        self.margin = [
            max(sides) for sides in zip(*(network.margin for network in networks), strict=True)
        ]
        if (
            processes.world() > 1
        ):  # running statistics are averaged over processes, and forget as much per batch as in one
            for module in student.modules():
                if (
                    isinstance(module, nn.modules.batchnorm._BatchNorm)
                    and module.momentum is not None
                ):
                    module.momentum = 1 - (1 - module.momentum) ** processes.world()
        bank = MemoryBank(**recipe.bank.model_dump(), seed=spec.seed)
        targets = spec.targets.model_dump(exclude={"border"})
        # Per-pixel vectors are then contiguous, and convolutions faster.
        self.layout = torch.channels_last if student.ndim == 2 else torch.channels_last_3d
        if device.type == "mps":  # which gives wrong gradients for it
            self.layout = torch.contiguous_format
        levels = [t.level for t in spec.all_terms]
        together = recipe.accumulate // processes.world()
        self.distiller = Distiller(
            student,
            frozen,
            terms,
            spec.offsets,
            bank,
            targets,
            levels,
            together,
            pseudo=recipe.unlabelled.labels != "none",
        ).to(device)
        for network in networks:
            network.to(memory_format=self.layout)
            if recipe.compile:  # copies, as those that validate and are kept, are not
                network.compile(dynamic=False)
        self.distiller.train()
        self.learnable = [p for p in self.distiller.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.learnable, recipe)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.average = None if recipe.ema is None else copy.deepcopy(self.distiller.student)
        self.step = 0
        self.seconds = 0.0
        self.history: list[tuple[int, str, str, float]] = []
        self.best_state: dict[str, Tensor] = {}
        self.best_step = 0
        self.best_scores: dict[str, float] = {}
        self.last_scores: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    @property
    def deployed(self) -> nn.Module:
        """The network that is judged and kept: the student, or its moving average."""
        return self.distiller.student if self.average is None else self.average

    def batches(self) -> range:
        """Numbers of the batches of the next step that are this process's."""
        first = self.step * self.spec.recipe.accumulate
        return range(
            first + processes.rank(), first + self.spec.recipe.accumulate, processes.world()
        )

    def advance(self, batches: Iterator[Batch]) -> None:
        """Make one optimizer step over some batches."""
        start = time.perf_counter()
        recipe = self.spec.recipe
        # networks that drop channels at random must not drop the same ones in all processes
        if processes.world() > 1:
            _seed(self.spec.seed * 1_000_003 + self.batches().start, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, recipe)
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in zip(self.batches(), batches, strict=False):
            batch = replace(batch, image=batch.image.contiguous(memory_format=self.layout))
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                total, losses = self.distiller(batch, number)
            self.scaler.scale(total / recipe.accumulate).backward()
            for name, value in {
                "loss": total,
                **{f"loss/{n}": v for n, v in losses.items()},
            }.items():
                self._sums[name] = self._sums.get(name, 0) + value.detach()
            for name, count in self.distiller.entries.items():
                self._sums[name] = self._sums.get(name, 0) + count
            self._count += 1
        processes.add([p.grad for p in self.learnable if p.grad is not None])
        processes.add(
            [b for b in self.distiller.student.buffers() if b.is_floating_point()], mean=True
        )
        if recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.learnable, recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            follow(self.average, self.distiller.student, decay(self.step, recipe.ema))
        self.step += 1
        self.seconds += time.perf_counter() - start

    def flush_losses(self) -> float:
        """Move the summed losses into the history; return the mean total."""
        sums = torch.stack([total.float() for total in self._sums.values()])
        processes.add([sums])
        count = self._count * processes.world()
        means = {name: total / count for name, total in zip(self._sums, sums.tolist(), strict=True)}
        self._sums, self._count = {}, 0
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss became {means['loss']} before step {self.step}: lower "
                "recipes.*.optimizer.lr or a method's weight"
            )
        recipe, met = self.spec.recipe, {name for _, _, name, value in self.history if value}
        # it was full before
        if (self.step * recipe.accumulate - count) * recipe.batch_size >= recipe.bank.capacity:
            check_entries(
                {name: mean for name, mean in means.items() if name not in met},
                recipe.bank.capacity,
            )
        self.history += [(self.step, "train", name, value) for name, value in means.items()]
        self.history.append(
            (self.step, "train", "lr", learning_rate(self.step - 1, self.spec.recipe))
        )
        return means["loss"]

    def consider(self, scores: dict[str, float]) -> None:
        """Take note of a validation, and keep the weights if they are the best so far."""
        metric = self.spec.recipe.selection
        self.last_scores = scores
        self.history += [
            (self.step, "val", name, scores[name])
            for name in dict.fromkeys((metric, *HISTORY_METRICS))
        ]
        self.history += [(self.step, "val", name, scores[name]) for name in FALSE if name in scores]
        if not self.best_scores or is_better(
            metric, worth(scores, metric), worth(self.best_scores, metric)
        ):
            self.best_scores, self.best_step = scores, self.step
            self.best_state = {
                name: tensor.clone() for name, tensor in self.deployed.state_dict().items()
            }

    def _state(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler]:
        parts = {
            "student": self.distiller.student,
            "terms": self.distiller.terms,
            "projections": self.distiller.projections,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "average": self.average,
            "bank": self.distiller.bank,
        }
        return {name: part for name, part in parts.items() if part is not None}

    _PLAIN = (
        "step",
        "seconds",
        "history",
        "best_state",
        "best_step",
        "best_scores",
        "last_scores",
        "_sums",
        "_count",
    )

    def save(self, path: Path, fingerprint: str) -> None:
        """Write everything that is needed to go on with the same next losses."""
        content = {name: part.state_dict() for name, part in self._state().items()}
        content |= {name: getattr(self, name) for name in self._PLAIN}
        content |= {"fingerprint": fingerprint, "rng": torch.get_rng_state()}
        if self.device.type in DRAWING:  # where networks that drop channels at random draw from
            state = torch.get_device_module(self.device).get_rng_state(self.device)
            content["rng_device"] = {self.device.type: state}
        io.save_state(path, content)

    def resume(self, path: Path, fingerprint: str) -> None:
        """Take a saved state back, unless it belongs to another configuration, data or code.

        It may be of another kind of device, which had other random numbers and no such scaler.
        """
        try:
            content = io.load_state(path, self.device)
        except io.DataError as error:
            print(f"{error}; training starts anew", flush=True)
            return
        if content.get("fingerprint") != fingerprint:
            print(
                f"{path}: belongs to another configuration, data or code; training starts anew",
                flush=True,
            )
            return
        for name, part in self._state().items():
            if part is not self.scaler or content[name]:
                part.load_state_dict(content[name])
        for name in self._PLAIN:
            setattr(self, name, content[name])
        torch.set_rng_state(content["rng"].cpu())
        state = content.get("rng_device", {}).get(self.device.type)
        if state is not None:
            torch.get_device_module(self.device).set_rng_state(state.cpu(), self.device)
        print(f"resumed after step {self.step}", flush=True)


def decay(step: int, ema: float) -> float:
    """Share of the average that stays at a step, counted from 0: less at first, or the random start
    would be a part of it.
    """
    return min(ema, (1 + step) / (10 + step))


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move weights and running statistics to `decay` times themselves plus the rest of the
    network's; whole numbers jump.

    As `torch.optim.swa_utils.AveragedModel` does, which waits for the device to know whether it is
    the first time.
    """
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    mine, theirs = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    torch._foreach_lerp_(mine, theirs, 1 - decay)
    for count, other in pairs:
        if not count.is_floating_point():
            count.copy_(other)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then constant or half a cosine down
    to 0.
    """
    lr = recipe.optimizer.lr
    if step < recipe.warmup:
        return lr * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return lr
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    options = recipe.optimizer.model_dump()
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.pop("name")]
    return kind(parameters, **options)


def own_random_numbers(device: torch.device) -> contextlib.AbstractContextManager:
    """Networks draw from torch's generators, of the CPU and of the device: give them back as they
    were.
    """
    return torch.random.fork_rng(
        [device] if device.type in DRAWING else [], device_type=device.type
    )


def has_two_sections(spec: RunSpec) -> bool:
    """Has a network of volumes a feature map of just two sections of its patches?

    There torch 2.13 on processors with bfloat16 units returns weight gradients of convolutions in
    bfloat16 with memory in them that nobody has written, now and then not a number; with one
    section, or three and more, it was never seen (tests/test_training.py).
    """
    return len(spec.patch) == 3 and any(sides[0] == 2 for sides in sides_of_maps(spec).values())


def _seed(number: int, device: torch.device) -> None:
    """Seed the generators that a network on this device draws from, and no others."""
    torch.default_generator.manual_seed(number)
    if device.type in DRAWING:
        state = torch.Generator(device).manual_seed(number).get_state()
        torch.get_device_module(device).set_rng_state(state, device)


def _check_patch(network: nn.Module, spec: RunSpec) -> None:
    """Raise unless the network can make an output of the size of the patch."""
    sides = zip(spec.patch, network.divisor, network.remainder, strict=False)
    if len(spec.patch) != network.ndim or any(
        (side - remainder) % divisor for side, divisor, remainder in sides
    ):
        plus = f" plus {tuple(network.remainder)}" if any(network.remainder) else ""
        raise ValueError(
            f'a patch {spec.patch} does not fit "{spec.network}" or its teacher: '
            f"choose multiples of {tuple(network.divisor)}{plus}"
        )
