"""The loss of a batch: student and teacher see it, and each term compares them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdlib import processes, types
from gdlib.distill.bank import Memory, MemoryBank
from gdlib.distill.targets import Targets
from gdlib.distill.term import Term
from gdlib.distill.view import View
from gdlib.kernels.levels import label_at
from gdlib.types import Batch, Embedding


def forward_cropped(network: nn.Module, batch: Batch) -> Embedding:
    """Apply a network to as much of the image as it needs to say something about every pixel of the
    label, and no more.
    """
    sides = zip(batch.image.shape[2:], batch.label.shape[1:], network.margin, strict=True)
    spare = [(n - p) // 2 - m for n, p, m in sides]
    return network(
        batch.image[
            (..., *(slice(s, n - s) for s, n in zip(spare, batch.image.shape[2:], strict=True)))
        ]
    )


class Views(NamedTuple):
    """What a term may look at, of the embedding or of a feature map."""

    student: View
    projected: View
    """of the student, with as many channels as the teacher's"""
    teacher: View | None
    targets: Targets


class Asked(nn.Module):
    """A teacher that was asked before: all that there is of it are its feature maps' names,
    channels and strides.
    """

    def __init__(self, levels: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        super().__init__()
        self.levels = levels


class Distiller(nn.Module):
    """Student, teacher and terms as one module that maps a batch to named losses.

    Args:
        student: the network that is trained.
        teacher: frozen; only needed by terms with `needs_teacher`. `Asked` where every batch comes
            with what it says.
        terms: `(name, weight, term)`; names are unique.
        offsets: of the affinities.
        bank: needed when a term has memory.
        target_options: of `Targets`.
        levels: for every term the name of the feature map that it compares, or several, of which
            the first that both networks have is taken; None for the embedding. Where student and
            teacher differ in channels there, a learned linear projection of the student's is
            trained along, one for all terms that want it; it is used for nothing else. PAPER: the
            original's projections are drawn anew at every step and never trained, and its labels
            cover another field of view than its maps.
        pseudo: losses of labels act on unlabelled images too, on what was found there; else these
            see the labelled ones alone, and what compares with the teacher sees all.
        together: so many batches are one optimizer step; they enter the bank together, after the
            last, with those of all processes (`gdlib.processes`): no batch meets another of its
            step.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Sequence[tuple[str, float, Term]],
        offsets: types.Offsets,
        bank: MemoryBank | None = None,
        target_options: Mapping[str, bool] | None = None,
        levels: Sequence[str | Sequence[str] | None] | None = None,
        together: int = 1,
        pseudo: bool = False,
    ) -> None:
        super().__init__()
        self.pseudo = pseudo
        self.together = together
        self.waiting: list[tuple[Tensor, Memory]] = []
        self.student = student
        self.names = [name for name, _, _ in terms]
        self.weights = [weight for _, weight, _ in terms]
        self.terms = nn.ModuleList(term for _, _, term in terms)
        self.offsets = offsets
        self.target_options = dict(target_options or {})
        self.levels = [_common(level, student, teacher) for level in levels or [None] * len(terms)]
        self.bank = bank if any(term.memory for term in self.terms) else None
        self.entries: dict[str, Tensor] = {}
        self.teacher = teacher if any(term.needs_teacher for term in self.terms) else None
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
        self.projections = nn.ModuleDict()
        for name, level, term in zip(self.names, self.levels, self.terms, strict=True):
            if level is not None:
                self._check_level(name, level, term, teacher)
                channels = [network.levels[level][0] for network in (student, teacher)]
                if term.projected and len({*channels}) == 2 and level not in self.projections:
                    self.projections[level] = nn.Linear(*channels, bias=False)
            term.attach(student, self.teacher)

    def _check_level(self, name: str, level: str, term: Term, teacher: nn.Module | None) -> None:
        if not term.needs_teacher:
            raise ValueError(
                f'term "{name}" learns from the label, not from a teacher: it cannot have a level'
            )
        if term.whole:
            raise ValueError(
                f'term "{name}" compares the outputs as a whole: it cannot have a level'
            )
        if _stride(self.student, level) != _stride(teacher, level):
            raise ValueError(
                f'level "{level}" of student and teacher differ in resolution; choose another level'
            )

    def train(self, mode: bool = True) -> "Distiller":
        """Set the mode of the student; the teacher always stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the total loss and its unweighted parts.

        Args:
            batch: augmented patches; student and teacher see the same.
            step: number of the optimizer step; decides, with the bank's seed, what is sampled.

        How many entries of the memory bank were sampled is then in `entries["entries"]`, with how
        many of them a term with memory compared in `entries["entries/<name>"]`.
        """
        label, ignore = batch.label, batch.ignore
        if batch.unlabelled and ignore is not None:
            # Where a teacher is unsure there is no instance, but what it says there counts.
            label, ignore = label.masked_fill(ignore, 0), ignore.clone()
            ignore[-batch.unlabelled :] = False
        targets = self._targets(label, ignore, batch.largest)
        teacher, memory = None, {}
        if self.teacher is not None:
            with torch.no_grad():
                teacher = View(
                    batch.teacher or forward_cropped(self.teacher, batch),
                    targets,
                    self._uses(None) - {"labels"},
                )
        output = forward_cropped(self.student, batch)
        labelled = self._labelled(batch, output) if batch.unlabelled else None
        uses = self._uses(None) - ({"labels"} if labelled else set())
        student = View(output, targets, uses, teacher)
        # Loss arithmetic is float32 whatever precision the networks run in.
        with torch.autocast(batch.image.device.type, enabled=False):
            views = {level: self._at(level, student, teacher) for level in self.levels}
            if self.bank is not None:
                memory = self._recall(batch, views, step)
                self.entries["entries"] = (
                    memory["valid"].sum() if memory else batch.ids.new_zeros(())
                )
            losses = {}
            for name, term, level in zip(self.names, self.terms, self.levels, strict=True):
                at, its = views[level], _of(name, memory)
                if labelled and not term.needs_teacher:
                    at = Views(labelled, labelled, None, labelled.targets)
                seen = at.projected if term.projected else at.student
                losses[name] = term(seen, at.teacher, at.targets, its)
                if term.memory:
                    self.entries[f"entries/{name}"] = (
                        term.entries(its) if its else self.entries["entries"]
                    )
            total = sum(
                weight * losses[name] for name, weight in zip(self.names, self.weights, strict=True)
            )
        return total, losses

    def _targets(self, label: Tensor, ignore: Tensor | None, largest: int | None) -> Targets:
        return Targets(label, self.offsets, ignore=ignore, largest=largest, **self.target_options)

    def _labelled(self, batch: Batch, output: Embedding) -> View:
        """What losses of labels look at where some patches of a batch are of unlabelled images."""
        part = slice(None if self.pseudo else len(batch.label) - batch.unlabelled)
        ignore = None if batch.ignore is None else batch.ignore[part]
        targets = self._targets(batch.label[part], ignore, batch.largest)
        output = Embedding(output.embedding[part], output.foreground[part], {})
        return View(output, targets, {"labels"})

    def _at(self, level: str | None, student: View, teacher: View | None) -> Views:
        """What terms see at a feature map, where affinities are of nearest neighbours, or of the
        embedding.
        """
        targets = student.targets
        if level is None:
            return Views(student, student, teacher, targets)
        stride = _stride(self.student, level)
        shape = student.output.features[level].shape[2:]
        label, ignore = (
            None if x is None else label_at(x, shape, stride)[0]
            for x in (targets.label, targets.ignore)
        )
        offsets = self.offsets[: targets.label.ndim - 1]
        at_level = Targets(
            label, offsets, ignore=ignore, largest=targets.largest, **self.target_options
        )

        def view(feature: Tensor, *other: View) -> View:
            uses = self._uses(level) - (set() if other else {"labels"})
            return View(Embedding(feature, None, {}), at_level, uses, *other)

        teacher = view(teacher.feature(level, stride))
        feature = student.feature(level, stride)
        student = projected = view(feature, teacher)
        if level in self.projections:
            feature = self.projections[level](feature.movedim(1, -1)).movedim(-1, 1)
            projected = view(feature, teacher)
        return Views(student, projected, teacher, at_level)

    def _uses(self, level: str | None) -> set[str]:
        """What terms ask of the views at a level."""
        return {
            use
            for term, at in zip(self.terms, self.levels, strict=True)
            if at == level
            for use in term.uses
        }

    @torch.no_grad()
    def _recall(self, batch: Batch, views: Mapping[str | None, Views], step: int) -> Memory:
        records: Memory = {}
        for name, term, level in zip(self.names, self.terms, self.levels, strict=True):
            # each has its own: two that name their records alike may mean other maps, or other
            # options
            if term.memory:
                records |= {
                    f"{name}/{key}": record
                    for key, record in term.record(views[level].teacher).items()
                }
        # PAPER: the original code enqueues first and so meets the current images again
        if self.bank.original_ring:
            self._enqueue(batch.ids, records)
            return self.bank.sample(batch.ids, step)
        memory = self.bank.sample(batch.ids, step)
        self.waiting.append((batch.ids, records))
        if len(self.waiting) == self.together:
            for ids, records in self.waiting:
                self._enqueue(ids, records)
            self.waiting.clear()
        return memory

    def _enqueue(self, ids: Tensor, records: Memory) -> None:
        self.bank.enqueue(
            processes.gather(ids),
            {name: processes.gather(record) for name, record in records.items()},
        )


def _of(name: str, memory: Memory) -> Memory:
    """The records of one term."""
    return {key.removeprefix(f"{name}/"): record for key, record in memory.items()}


def _common(names: str | Sequence[str] | None, *networks: nn.Module | None) -> str | None:
    """The first of several names of feature maps that all networks have.

    If there is none, the first.
    """
    if names is None or isinstance(names, str):
        return names
    return next(
        (name for name in names if all(network and name in network.levels for network in networks)),
        names[0],
    )


def _stride(network: nn.Module | None, level: str) -> tuple[int, ...]:
    """Stride of a feature map."""
    if network is None:
        raise ValueError(
            f'level "{level}" is compared with the teacher: it needs a term that learns from one'
        )
    if level not in network.levels:
        raise ValueError(
            f'there is no level "{level}" in a {type(network).__name__}: it has '
            f"{', '.join(network.levels)}"
        )
    return network.levels[level][1]
