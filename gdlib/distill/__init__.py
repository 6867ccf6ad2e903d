"""Distillation: a student, a frozen teacher, and a list of weighted terms that compare what the two see.

A term never sees a network, nor from which of its maps the vectors are: the embedding or, by choice, a level inside. It gets
a `View` of each network's output (the relations that several terms need, each computed once), the `Truth` of the batch, and,
if it compares with other images, what was sampled from the memory bank.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gdlib import ops, parallel
from gdlib.distill.bank import Memory, MemoryBank
from gdlib.models import Embedding
from gdlib.registry import TERMS

Use = str | tuple[str, int]  # a relation in a `View`


@dataclass(frozen=True)
class Batch:
    """Augmented patches.

    Attributes:
        image: (B, C, [Z,] Y, X) float32, larger than the label by a margin where a network needs it.
        label: (B, [Z,] Y, X) int64, 0 = background.
        ids: (B,) int64 numbers of the patches, of which no two of a training are equal: the memory bank tells them apart by it.
        ignore: (B, [Z,] Y, X) boolean, where the label is not known.
        teacher: what the teacher says of these patches, if it was asked before (`gdlib.data.maps`).
        largest: no id in the label is larger; known where a device is better not asked.
    """

    image: Tensor
    label: Tensor
    ids: Tensor
    ignore: Tensor | None = None
    teacher: Embedding | None = None
    largest: int | None = None


class Truth:
    """Everything that follows from the labels of a batch; each part is computed on first use, once."""

    def __init__(
        self,
        label: Tensor,
        offsets: ops.Offsets,
        *,
        ignore: Tensor | None = None,
        background_connected: bool = True,
        per_offset: bool = False,
        largest: int | None = None,
    ) -> None:
        """See `gdlib.schema.Targets` and `Batch` for the last three."""
        self.label = label if ignore is None else label.masked_fill(ignore, 0)
        self.offsets = offsets
        self.ignore = ignore
        self.background_connected = background_connected
        self.per_offset = per_offset
        self.largest = largest

    @cached_property
    def pairs(self) -> ops.Pairs:
        """Neighbouring pixels and what they weigh."""
        targets = {"background_connected": self.background_connected, "per_offset": self.per_offset}
        return ops.Pairs(self.label, self.offsets, ignore=self.ignore, **targets)

    @property
    def affinity(self) -> Tensor:
        """(B, K, [Z,] Y, X) boolean target."""
        return self.pairs.target

    @property
    def balance(self) -> Tensor:
        """(B, K, [Z,] Y, X) class weights of the affinity targets, 0 outside and where a label is not known."""
        return self.pairs.weight

    @cached_property
    def instances(self) -> ops.Instances:
        """Pixel-to-node map without the background."""
        return ops.Instances(self.label, largest=self.largest)

    @cached_property
    def instances_and_background(self) -> ops.Instances:
        """Pixel-to-node map in which every background is a node too; what is not known belongs to none."""
        if self.ignore is None:
            return ops.Instances(self.label, background=True, largest=self.largest)
        largest = None if self.largest is None else self.largest + 1
        return ops.Instances((self.label + 1).masked_fill(self.ignore, 0), largest=largest)


class View:
    """One network's output on a batch, and the relations in it; each is computed on first use, once.

    Args:
        output: of the network.
        truth: of the same batch.
        uses: relations that will be asked for, and so are computed together, in one pass; see `Term.uses`.
        other: the view that `gram` and `pair_loss` will be asked about.
    """

    def __init__(
        self, output: Embedding, truth: Truth, uses: Collection[Use] = (), other: "View | None" = None
    ) -> None:
        self.output = output
        self.truth = truth
        one = max((use for use in uses if isinstance(use, tuple)), default=None)  # windows of one size in a pass
        self.uses = {use for use in uses if isinstance(use, str) or use == one}
        if self.uses.intersection(ops.PAIR_LOSSES):
            self.uses.add("affinity")
        self.other = other

    def feature(self, level: str, stride: Sequence[int]) -> Tensor:
        """(B, C, [Z,] Y, X) float32 feature map, of the voxels whose centres have a label."""
        feature = self.output.features[level].float()
        _, inner = label_at(self.truth.label, feature.shape[2:], stride)
        return feature[(..., *inner)]

    @cached_property
    def rows(self) -> Tensor:
        """(B, [Z,] Y, X, D) float32 raw embedding."""
        return ops.rows(self.output.embedding)

    @cached_property
    def unit(self) -> Tensor:
        """(B, [Z,] Y, X, D) rows of length one."""
        return ops.unit(self.rows)

    @cached_property
    def affinity(self) -> Tensor:
        """(B, K, [Z,] Y, X) cosine affinities."""
        return self._relate("affinity").affinity

    @cached_property
    def nodes(self) -> Tensor:
        """(B, M, D) mean raw embedding of every instance."""
        return self._relate("nodes").nodes

    def gram(self, other: "View | None" = None) -> Tensor:
        """(B, D, D) `ops.gram` of the unit vectors, or of what they are more than those of another view."""
        return self._relate("gram", other).gram

    def pair_loss(self, kind: str, other: "View | None" = None) -> Tensor:
        """Scalar of `ops.pair_losses`, where another view's affinities are the goal."""
        if kind in self.uses and (kind == "labels" or other is self.other):
            return self._pair_losses[kind]
        goal = None if other is None else other.affinity
        return ops.pair_losses(self.affinity, goal, self.truth.pairs, [kind])[kind]

    @cached_property
    def _pair_losses(self) -> dict[str, Tensor]:
        kinds = [kind for kind in ops.PAIR_LOSSES if kind in self.uses]
        goal = None if kinds == ["labels"] else self.other.affinity
        return ops.pair_losses(self.affinity, goal, self.truth.pairs, kinds)

    def means(self, side: int) -> Tensor:
        """(B, [z,] y, x, D) means of the unit vectors over windows of `side` pixels; in 3D they are 3 sections deep."""
        return self._relate(("means", side)).means

    def _relate(self, use: Use, other: "View | None" = None) -> ops.Relations:
        if use not in self.uses or (use == "gram" and other is not self.other):
            return self._compute({use}, other)
        return self._together

    @cached_property
    def _together(self) -> ops.Relations:
        return self._compute(self.uses, self.other)

    def _compute(self, uses: Collection[Use], other: "View | None") -> ops.Relations:
        subtract = other is not None and "gram" in uses
        if subtract:
            check_comparable(self.rows, other.rows)
        windows = [(3, side, side)[5 - self.rows.ndim :] for _, side in (use for use in uses if isinstance(use, tuple))]
        return ops.relate(
            self.rows,
            self.truth.offsets if "affinity" in uses else (),
            self.truth.instances if "nodes" in uses else None,
            "gram" in uses,
            other.rows if subtract else None,
            *windows,
        )


class Term(nn.Module):
    """One loss. Subclasses live one per file in `gdlib/distill/terms/`; their weight belongs to the method, not to them.

    Attributes:
        needs_teacher: off for terms that learn from the label.
        whole: it compares the outputs as a whole, not one map, and cannot have a level.
        projected: at a level it gets the student's map with as many channels as the teacher's, by a learned projection; off for
            terms that compare similarities alone.
        apart: options that do not go together, each as a dict, written in the class body; the configuration refuses them.
        levels: feature maps that it reads from `View.output` itself, as far as the networks have them.
        uses: which of `affinity`, `nodes`, `gram`, `("means", side)` and `ops.PAIR_LOSSES` of the student's view it asks for.
            Only for speed: these are computed together.
    """

    needs_teacher = True
    whole = False
    projected = True
    apart: Sequence[dict[str, Any]] = ()
    levels: Sequence[str] = ()
    uses: Collection[Use] = ()

    def __init__(self, memory: bool = False) -> None:
        super().__init__()
        self.memory = memory

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Make learned modules that depend on the networks; they are trained along, saved to resume, and never deployed."""

    def record(self, teacher: View) -> dict[str, Tensor]:
        """What the memory bank keeps of each teacher image for this term alone: name to (B, ...) tensor. Only with memory."""
        return {}

    def entries(self, memory: Memory) -> Tensor:
        """Count the sampled entries of the memory bank, not empty, that this term compares with: a scalar."""
        return memory["valid"].sum()

    def forward(self, student: View, teacher: View, truth: Truth, memory: Memory) -> Tensor:
        """Return a scalar, averaged over the batch."""
        raise NotImplementedError


def check_comparable(student: Tensor, teacher: Tensor) -> None:
    """Raise unless the vectors (..., D) have the same length; terms that compare similarities alone do not need that."""
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"pixel vectors of the student have length {student.shape[-1]}, those of the teacher {teacher.shape[-1]}: give both "
            "the same embedding_dim, or use only intra-image agd and igd edges"
        )


def label_at(label: Tensor, shape: Sequence[int], stride: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Find the label of every voxel of a feature map that is coarser than the label, larger, or both.

    Args:
        label: (B, [Z,] Y, X).
        shape: of the map, without batch and channels; label and map have one centre.
        stride: pixels from one voxel of the map to the next.

    Returns:
        The label at the centres of those voxels that lie inside it (of the two middle pixels of an even stride, the first),
        and where these voxels are in the map.
    """
    places, inner = [], []
    for n, first, m, s in zip(
        label.shape[1:], first_centre(label.shape[1:], shape, stride), shape, stride, strict=True
    ):
        start, stop = max(0, -(first // s)), min(m, (n - 1 - first) // s + 1)
        places.append(torch.arange(first + s * start, first + s * stop, s, device=label.device))
        inner.append(slice(start, stop))
    return label[(slice(None), *torch.meshgrid(*places, indexing="ij"))], tuple(inner)


def first_centre(sides: Sequence[int], shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return at which pixel of a label the first voxel of a feature map has its centre; it may be outside. See `label_at`."""
    return [(n - s * m) // 2 + (s - 1) // 2 for n, m, s in zip(sides, shape, stride, strict=True)]


def build_term(name: str, memory: bool, options: dict) -> Term:
    """Make one term by name; only terms that can use the memory bank accept `memory=True`."""
    kwargs = {**options, "memory": True} if memory else options
    return TERMS.make(name, **kwargs)


def see(network: nn.Module, batch: Batch) -> Embedding:
    """Apply a network to as much of the image as it needs to say something about every pixel of the label, and no more."""
    sides = zip(batch.image.shape[2:], batch.label.shape[1:], network.margin, strict=True)
    spare = [(n - p) // 2 - m for n, p, m in sides]
    return network(batch.image[(..., *(slice(s, n - s) for s, n in zip(spare, batch.image.shape[2:], strict=True)))])


class Asked(nn.Module):
    """A teacher that was asked before: all that there is of it are its feature maps' names, channels and strides."""

    def __init__(self, levels: Mapping[str, tuple[int, tuple[int, ...]]]) -> None:
        super().__init__()
        self.levels = levels


class Distiller(nn.Module):
    """Student, teacher and terms as one module that maps a batch to named losses.

    Args:
        student: the network that is trained.
        teacher: frozen; only needed by terms with `needs_teacher`. `Asked` where every batch comes with what it says.
        terms: `(name, weight, term)`; names are unique.
        offsets: of the affinities.
        bank: needed when a term has memory.
        targets: options of `Truth`.
        levels: for every term the name of the feature map that it compares, or several, of which the first that both networks
            have is taken; None for the embedding. Where student and teacher differ in channels there, a learned linear
            projection of the student's is trained along, one for all terms that want it; it is used for nothing else. PAPER:
            the original's projections are drawn anew at every step and never trained, and its labels cover another field of
            view than its maps.
        together: so many batches are one optimizer step; they enter the bank together, after the last, with those of all
            processes (`gdlib.parallel`): no batch meets another of its step.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Sequence[tuple[str, float, Term]],
        offsets: ops.Offsets,
        bank: MemoryBank | None = None,
        targets: Mapping[str, bool] | None = None,
        levels: Sequence[str | Sequence[str] | None] | None = None,
        together: int = 1,
    ) -> None:
        super().__init__()
        self.together = together
        self.waiting: list[tuple[Tensor, Memory]] = []
        self.student = student
        self.names = [name for name, _, _ in terms]
        self.weights = [weight for _, weight, _ in terms]
        self.terms = nn.ModuleList(term for _, _, term in terms)
        self.offsets = offsets
        self.targets = dict(targets or {})
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
                mine, goal = student.levels[level][0], teacher.levels[level][0]
                if term.projected and mine != goal and level not in self.projections:
                    self.projections[level] = nn.Linear(mine, goal, bias=False)
            term.attach(student, self.teacher)

    def _check_level(self, name: str, level: str, term: Term, teacher: nn.Module | None) -> None:
        if not term.needs_teacher:
            raise ValueError(f'term "{name}" learns from the label, not from a teacher: it cannot have a level')
        if term.whole:
            raise ValueError(f'term "{name}" compares the outputs as a whole: it cannot have a level')
        if _stride(self.student, level) != _stride(teacher, level):
            raise ValueError(f'level "{level}" of student and teacher differ in resolution; choose another level')

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

        How many entries of the memory bank were sampled is then in `entries["entries"]`, with how many of them a term with
        memory compared in `entries["entries/<name>"]`.
        """
        truth = Truth(batch.label, self.offsets, ignore=batch.ignore, largest=batch.largest, **self.targets)
        teacher, memory = None, {}
        if self.teacher is not None:
            with torch.no_grad():
                teacher = View(batch.teacher or see(self.teacher, batch), truth, self._uses(None) - {"labels"})
        student = View(see(self.student, batch), truth, self._uses(None), teacher)
        # Loss arithmetic is float32 whatever precision the networks run in.
        with torch.autocast(batch.image.device.type, enabled=False):
            views = {level: self._at(level, student, teacher) for level in self.levels}
            if self.bank is not None:
                memory = self._recall(batch, views, step)
                self.entries["entries"] = memory["valid"].sum() if memory else batch.ids.new_zeros(())
            losses = {}
            for name, term, level in zip(self.names, self.terms, self.levels, strict=True):
                mine = {key.removeprefix(f"{name}/"): record for key, record in memory.items()}
                *seen, goal, truth = views[level]
                losses[name] = term(seen[term.projected], goal, truth, mine)
                if term.memory:
                    self.entries[f"entries/{name}"] = term.entries(mine) if mine else self.entries["entries"]
            total = sum(weight * losses[name] for name, weight in zip(self.names, self.weights, strict=True))
        return total, losses

    def _at(self, level: str | None, student: View, teacher: View | None) -> tuple[View, View, View | None, Truth]:
        """Views of the student as it is, of the student projected, and of the teacher, and the truth, at a feature map.

        Affinities there are of nearest neighbours.
        """
        truth = student.truth
        if level is None:
            return student, student, teacher, truth
        stride = _stride(self.student, level)
        shape = student.output.features[level].shape[2:]
        label, ignore = (None if x is None else label_at(x, shape, stride)[0] for x in (truth.label, truth.ignore))
        offsets = self.offsets[: truth.label.ndim - 1]
        at_level = Truth(label, offsets, ignore=ignore, largest=truth.largest, **self.targets)
        goal = View(Embedding(teacher.feature(level, stride), None, {}), at_level, self._uses(level) - {"labels"})
        mine = student.feature(level, stride)
        views = [View(Embedding(mine, None, {}), at_level, self._uses(level), goal)]
        if level in self.projections:
            projected = self.projections[level](mine.movedim(1, -1)).movedim(-1, 1)
            views.append(View(Embedding(projected, None, {}), at_level, self._uses(level), goal))
        return views[0], views[-1], goal, at_level

    def _uses(self, level: str | None) -> set[Use]:
        """What terms ask of the views at a level."""
        return {use for term, at in zip(self.terms, self.levels, strict=True) if at == level for use in term.uses}

    @torch.no_grad()
    def _recall(self, batch: Batch, views: Mapping[str | None, tuple], step: int) -> Memory:
        records: Memory = {}
        for name, term, level in zip(self.names, self.terms, self.levels, strict=True):
            if term.memory:  # each has its own: two that name their records alike may mean other maps, or other options
                records |= {f"{name}/{key}": record for key, record in term.record(views[level][-2]).items()}
        if self.bank.original_ring:  # PAPER: the original code enqueues first and so meets the current images again
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
        self.bank.enqueue(parallel.gather(ids), {name: parallel.gather(record) for name, record in records.items()})


def _common(names: str | Sequence[str] | None, *networks: nn.Module | None) -> str | None:
    """The first of several names of feature maps that all networks have; if there is none, the first."""
    if names is None or isinstance(names, str):
        return names
    return next((name for name in names if all(network and name in network.levels for network in networks)), names[0])


def _stride(network: nn.Module | None, level: str) -> tuple[int, ...]:
    """Stride of a feature map."""
    if network is None:
        raise ValueError(f'level "{level}" is compared with the teacher: it needs a term that learns from one')
    if level not in network.levels:
        raise ValueError(
            f'there is no level "{level}" in a {type(network).__name__}: it has {", ".join(network.levels)}'
        )
    return network.levels[level][1]
