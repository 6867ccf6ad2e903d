"""Distillation: a student, a frozen teacher, and a list of weighted terms that compare what the two see.

A term never sees a network. It gets a `View` of each network's output (the relations that several terms need, each computed
once), the `Truth` of the batch, and, if it compares with other images, what was sampled from the memory bank.
"""

from collections.abc import Sequence
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
    """Augmented patches: `image` (B, C, [Z,] Y, X) float32, `label` (B, [Z,] Y, X) int64, `ids` (B,) int64 source images."""

    image: Tensor
    label: Tensor
    ids: Tensor


class Truth:
    """Everything that follows from the labels of a batch; each part is computed on first use, once."""

    def __init__(self, label: Tensor, offsets: ops.Offsets) -> None:
        self.label = label
        self.offsets = offsets

    @cached_property
    def affinity(self) -> Tensor:
        """(B, K, [Z,] Y, X) boolean target."""
        return ops.affinity_targets(self.label, self.offsets)

    @cached_property
    def inside(self) -> Tensor:
        """(K, [Z,] Y, X) boolean, false where the neighbour is outside the image."""
        return ops.inside(self.offsets, self.label.shape[1:], self.label.device)

    @cached_property
    def balance(self) -> Tensor:
        """(B, K, [Z,] Y, X) class weights of the affinity targets, 0 outside."""
        return ops.balance(self.affinity, self.inside)

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


def build_term(name: str, memory: bool, options: dict) -> Term:
    """Make one term by name; only terms that can use the memory bank accept `memory=True`."""
    kwargs = {**options, "memory": True} if memory else options
    return TERMS.get(name)(**kwargs)


class Distiller(nn.Module):
    """Student, teacher and terms as one module that maps a batch to named losses.

    Args:
        student: the network that is trained.
        teacher: frozen; only needed by terms with `needs_teacher`.
        terms: `(name, weight, term)`; names are unique.
        offsets: of the affinities.
        bank: needed when a term has memory.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        terms: Sequence[tuple[str, float, Term]],
        offsets: ops.Offsets,
        bank: MemoryBank | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.names = [name for name, _, _ in terms]
        self.weights = [weight for _, weight, _ in terms]
        self.terms = nn.ModuleList(term for _, _, term in terms)
        self.offsets = offsets
        self.bank = bank if any(term.memory for term in self.terms) else None
        self.teacher = teacher if any(term.needs_teacher for term in self.terms) else None
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)

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
        truth = Truth(batch.label, self.offsets)
        student = View(self.student(batch.image), truth)
        teacher, memory = None, {}
        if self.teacher is not None:
            with torch.no_grad():
                teacher = View(self.teacher(batch.image), truth)
        # Loss arithmetic is float32 whatever precision the networks run in.
        with torch.autocast(batch.image.device.type, enabled=False):
            if self.bank is not None:
                memory = self._recall(batch, teacher, step)
            losses = {
                name: term(student, teacher, truth, memory) for name, term in zip(self.names, self.terms, strict=True)
            }
            total = sum(weight * losses[name] for name, weight in zip(self.names, self.weights, strict=True))
        return total, losses

    @torch.no_grad()
    def _recall(self, batch: Batch, teacher: View, step: int) -> Memory:
        records: Memory = {}
        for term in self.terms:
            if term.memory:
                records.update(term.record(teacher))
        if self.bank.original_ring:  # PAPER: the original code enqueues first and so meets the current images again
            self.bank.enqueue(batch.ids, records)
            return self.bank.sample(batch.ids, step)
        memory = self.bank.sample(batch.ids, step)
        self.bank.enqueue(batch.ids, records)
        return memory
