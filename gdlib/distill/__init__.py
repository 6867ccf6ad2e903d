"""Distillation: a student, a frozen teacher, and a list of weighted terms that compare what the two see.

A term never sees a network, nor from which of its maps the vectors are: the embedding or, by choice, a level inside. It gets
a `View` of each network's output (the relations that several terms need, each computed once), the `Truth` of the batch, and,
if it compares with other images, what was sampled from the memory bank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from gdlib import ops
from gdlib.distill.bank import Memory, MemoryBank
from gdlib.models import Embedding
from gdlib.registry import TERMS


@dataclass(frozen=True)
class Batch:
    """Augmented patches.

    Attributes:
        image: (B, C, [Z,] Y, X) float32, larger than the label by a margin where a network needs it.
        label: (B, [Z,] Y, X) int64, 0 = background.
        ids: (B,) int64 source images.
        ignore: (B, [Z,] Y, X) boolean, where the label is not known.
    """

    image: Tensor
    label: Tensor
    ids: Tensor
    ignore: Tensor | None = None


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
    ) -> None:
        """See `gdlib.schema.Targets` for the last two."""
        self.label = label if ignore is None else label.masked_fill(ignore, 0)
        self.offsets = offsets
        self.ignore = ignore
        self.background_connected = background_connected
        self.per_offset = per_offset

    @cached_property
    def affinity(self) -> Tensor:
        """(B, K, [Z,] Y, X) boolean target."""
        return ops.affinity_targets(self.label, self.offsets, self.background_connected)

    @cached_property
    def inside(self) -> Tensor:
        """(K, [Z,] Y, X) boolean, false where the neighbour is outside the image."""
        return ops.inside(self.offsets, self.label.shape[1:], self.label.device)

    @cached_property
    def balance(self) -> Tensor:
        """(B, K, [Z,] Y, X) class weights of the affinity targets, 0 outside and where a label is not known."""
        valid = self.inside if self.ignore is None else self.inside & ~ops.pairs_of(self.ignore, self.offsets)
        return ops.balance(self.affinity, valid, self.per_offset)

    @cached_property
    def instances(self) -> ops.Instances:
        """Pixel-to-node map without the background."""
        return ops.Instances(self.label)

    @cached_property
    def instances_and_background(self) -> ops.Instances:
        """Pixel-to-node map in which every background is a node too."""
        return ops.Instances(self.label, background=True)


class View:
    """One network's output on a batch, and the relations in it; each is computed on first use, once.

    Args:
        output: of the network.
        truth: of the same batch.
    """

    def __init__(self, output: Embedding, truth: Truth) -> None:
        self.output = output
        self.truth = truth

    @cached_property
    def rows(self) -> Tensor:
        """(B, [Z,] Y, X, D) float32 raw embedding."""
        return ops.rows(self.output.embedding.float())

    @cached_property
    def unit(self) -> Tensor:
        """(B, [Z,] Y, X, D) rows of length one."""
        return ops.unit(self.rows)

    @cached_property
    def affinity(self) -> Tensor:
        """(B, K, [Z,] Y, X) cosine affinities."""
        return ops.affinities(self.unit, self.truth.offsets)

    @cached_property
    def nodes(self) -> Tensor:
        """(N, D) mean raw embedding of every instance."""
        return ops.pool_instances(self.rows, self.truth.instances)


class Term(nn.Module):
    """One loss. Subclasses live one per file in `gdlib/distill/terms/`; their weight belongs to the method, not to them."""

    needs_teacher = True

    def __init__(self, memory: bool = False) -> None:
        super().__init__()
        self.memory = memory

    def record(self, teacher: View) -> dict[str, Tensor]:
        """What the memory bank keeps of each teacher image: name to (B, ...) tensor. Only for terms with memory."""
        return {}

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
    for n, m, s in zip(label.shape[1:], shape, stride, strict=True):
        first = (n - s * m) // 2 + (s - 1) // 2  # centre of the first voxel
        start, stop = max(0, -(first // s)), min(m, (n - 1 - first) // s + 1)
        places.append(torch.arange(first + s * start, first + s * stop, s, device=label.device))
        inner.append(slice(start, stop))
    return label[(slice(None), *torch.meshgrid(*places, indexing="ij"))], tuple(inner)


def build_term(name: str, memory: bool, options: dict) -> Term:
    """Make one term by name; only terms that can use the memory bank accept `memory=True`."""
    kwargs = {**options, "memory": True} if memory else options
    return TERMS.get(name)(**kwargs)


def see(network: nn.Module, batch: Batch) -> Embedding:
    """Apply a network to as much of the image as it needs to say something about every pixel of the label, and no more."""
    sides = zip(batch.image.shape[2:], batch.label.shape[1:], network.margin, strict=True)
    spare = [(n - p) // 2 - m for n, p, m in sides]
    return network(batch.image[(..., *(slice(s, n - s) for s, n in zip(spare, batch.image.shape[2:], strict=True)))])


class Distiller(nn.Module):
    """Student, teacher and terms as one module that maps a batch to named losses.

    Args:
        student: the network that is trained.
        teacher: frozen; only needed by terms with `needs_teacher`.
        terms: `(name, weight, term)`; names are unique.
        offsets: of the affinities.
        bank: needed when a term has memory.
        targets: options of `Truth`.
        levels: for every term the name of the feature map that it compares, None for the embedding. Where student and teacher
            differ in channels there, a learned linear projection of the student's is trained along; it is used for nothing
            else. PAPER: the original's projections are drawn anew at every step and never trained, and its labels cover another
            field of view than its maps.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Sequence[tuple[str, float, Term]],
        offsets: ops.Offsets,
        bank: MemoryBank | None = None,
        targets: Mapping[str, bool] | None = None,
        levels: Sequence[str | None] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.names = [name for name, _, _ in terms]
        self.weights = [weight for _, weight, _ in terms]
        self.terms = nn.ModuleList(term for _, _, term in terms)
        self.offsets = offsets
        self.targets = dict(targets or {})
        self.levels = list(levels or [None] * len(terms))
        self.bank = bank if any(term.memory for term in self.terms) else None
        self.teacher = teacher if any(term.needs_teacher for term in self.terms) else None
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
        for name, level, term in zip(self.names, self.levels, self.terms, strict=True):
            if level is not None and not term.needs_teacher:
                raise ValueError(f'term "{name}" learns from the label, not from a teacher: it cannot have a level')
        self.projections = nn.ModuleDict()
        for level in filter(None, dict.fromkeys(self.levels)):
            mine, goal = _channels(student, level), _channels(teacher, level)
            if student.levels[level][1] != teacher.levels[level][1]:
                raise ValueError(f'level "{level}" of student and teacher differ in resolution; choose another level')
            if mine != goal:
                self.projections[level] = nn.Linear(mine, goal, bias=False)

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
        """
        truth = Truth(batch.label, self.offsets, ignore=batch.ignore, **self.targets)
        student = View(see(self.student, batch), truth)
        teacher, memory = None, {}
        if self.teacher is not None:
            with torch.no_grad():
                teacher = View(see(self.teacher, batch), truth)
        # Loss arithmetic is float32 whatever precision the networks run in.
        with torch.autocast(batch.image.device.type, enabled=False):
            views = {level: self._at(level, student, teacher) for level in self.levels}
            if self.bank is not None:
                memory = self._recall(batch, views, step)
            losses = {}
            for name, term, level in zip(self.names, self.terms, self.levels, strict=True):
                mine = {key.removeprefix(f"{level}/"): record for key, record in memory.items()} if level else memory
                losses[name] = term(*views[level], mine)
            total = sum(weight * losses[name] for name, weight in zip(self.names, self.weights, strict=True))
        return total, losses

    def _at(self, level: str | None, student: View, teacher: View | None) -> tuple[View, View | None, Truth]:
        """Views of both networks, and the truth, at a feature map; affinities there are of nearest neighbours."""
        truth = student.truth
        if level is None:
            return student, teacher, truth
        stride = self.student.levels[level][1]
        nearest = self.offsets[: truth.label.ndim - 1]
        maps, at_level = [], None
        for view in (student, teacher):
            feature = view.output.features[level].float()
            label, inner = label_at(truth.label, feature.shape[2:], stride)
            ignore = None if truth.ignore is None else label_at(truth.ignore, feature.shape[2:], stride)[0]
            at_level = at_level or Truth(label, nearest, ignore=ignore, **self.targets)
            maps.append(feature[(..., *inner)])
        if level in self.projections:
            maps[0] = self.projections[level](maps[0].movedim(1, -1)).movedim(-1, 1)
        views = [View(Embedding(part, None, {}), at_level) for part in maps]
        return views[0], views[1], at_level

    @torch.no_grad()
    def _recall(self, batch: Batch, views: Mapping[str | None, tuple[View, View, Truth]], step: int) -> Memory:
        records: Memory = {}
        for term, level in zip(self.terms, self.levels, strict=True):
            if term.memory:
                mine = term.record(views[level][1])
                records.update({f"{level}/{key}": record for key, record in mine.items()} if level else mine)
        if self.bank.original_ring:  # PAPER: the original code enqueues first and so meets the current images again
            self.bank.enqueue(batch.ids, records)
            return self.bank.sample(batch.ids, step)
        memory = self.bank.sample(batch.ids, step)
        self.bank.enqueue(batch.ids, records)
        return memory


def _channels(network: nn.Module | None, level: str) -> int:
    """Channels of a feature map."""
    if network is None:
        raise ValueError(f'level "{level}" is compared with the teacher: it needs a term that learns from one')
    if level not in network.levels:
        raise ValueError(
            f'there is no level "{level}" in a {type(network).__name__}: it has {", ".join(network.levels)}'
        )
    return network.levels[level][0]
