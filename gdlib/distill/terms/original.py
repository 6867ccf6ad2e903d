"""AGD and IGD as the paper's original code computes them, where that differs from the formulas: for
the method `grd_original`, and for ablations of single differences.

With every option at its default a part is what `agd` or `igd` is.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View, check_comparable
from gdlib.distill.bank import mean_record
from gdlib.distill.terms.agd import agd_inter_loss
from gdlib.distill.terms.igd import edge_inter_loss, edge_loss, with_nodes
from gdlib.limits import Count
from gdlib.types import Offsets

__all__ = ["Original"]


class Original(Term):
    """One part of graph relation distillation, with the differences of the original code.

    Args:
        part: `affinities`, `nodes` or `edges`.
        memory: compare with the memory bank instead of within the image; not `nodes`.
        balanced: affinities within an image; as in `agd`.
        wrap_around: PAPER: affinities within an image; also of the pairs that `torch.roll` makes
            across opposite borders, as the original 2D code does.
        pool: PAPER: affinities between images; average-pool the unit vectors over windows of this
            side before they are compared, as the original code does (7). 1 compares all pixels.
        power: PAPER: exponent of the distance of nodes. The original code takes the norm without
            the square, 1.
        background: PAPER: make the background a node too, as the original 3D code does.
        detach_norm: PAPER: treat the norm in the cosine of an edge as a constant, as the original
            code does; same value, other gradient.
        accumulate: PAPER: edges between images; weigh the sampled memory images as the original
            code does, whose node list grows inside its loop: the l-th image gets `2 N_b / (N_b +
            sum_(k<l) K_k)` instead of 1.
    """

    apart = ({"part": "nodes", "memory": True},)

    def __init__(
        self,
        *,
        part: Literal["affinities", "nodes", "edges"] = "edges",
        memory: bool = False,
        balanced: bool = False,
        wrap_around: bool = False,
        pool: Count = 1,
        power: Literal[1, 2] = 2,
        background: bool = False,
        detach_norm: bool = False,
        accumulate: bool = False,
    ) -> None:
        super().__init__(memory)
        self.part = part
        self.wrap_around, self.pool = wrap_around, pool
        self.power, self.background = power, background
        self.detach_norm, self.accumulate = detach_norm, accumulate
        self.kind = "balanced" if balanced else "teacher"
        if part != "affinities":
            self.uses = () if background else ("nodes",)
        elif memory:
            self.uses = ("gram",) if pool == 1 else ()
        else:
            self.uses = () if wrap_around else (self.kind,)

    def record(self, teacher: View) -> dict[str, Tensor]:
        """Keep the Gram matrix of each image's vectors or nodes, and the number of nodes."""
        if self.part == "affinities":
            return {"gram": self._gram(teacher)}
        nodes, count = self._nodes(teacher, teacher.targets)
        return {"gram": kernels.node_grams(self._unit(nodes), count), "count": count.float()}

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss; a differentiable 0 without instances or memory."""
        if self.part == "nodes" or self.memory:
            check_comparable(student.rows, teacher.rows)
        if self.memory and not memory:
            return student.rows.sum() * 0
        if self.part == "affinities":
            return self._affinity_loss(student, teacher, targets, memory)
        nodes, count = self._nodes(student, targets)
        nodes_teacher, _ = self._nodes(teacher, targets)
        if self.part == "nodes":
            return node_loss(nodes, nodes_teacher, count, self.power)
        edges = self._unit(nodes), self._unit(nodes_teacher), count
        if not self.memory:
            return edge_loss(*edges)
        memory = with_nodes(memory)
        gram = accumulated(memory, count) if self.accumulate else mean_record(memory, "gram")
        return edge_inter_loss(*edges, gram)

    def entries(self, memory: dict) -> Tensor:
        """Count the sampled entries; for edges, those that have a node."""
        return (memory if self.part == "affinities" else with_nodes(memory))["valid"].sum()

    def _affinity_loss(
        self, student: View, teacher: View, targets: Targets, memory: dict
    ) -> Tensor:
        if self.memory:
            return agd_inter_loss(self._gram(student, teacher), mean_record(memory, "gram"))
        if self.wrap_around:
            wrapped = (affinities_wrapped(v.unit, targets.offsets) for v in (student, teacher))
            return kernels.pair_losses(*wrapped, None, ["teacher"])["teacher"]
        return student.pair_loss(self.kind, teacher)

    def _gram(self, view: View, other: View | None = None) -> Tensor:
        """(B, D, D) second moments of the unit vectors, pooled if asked, or of what they are more
        than those of another view.
        """
        if self.pool == 1:
            return view.gram(other)
        window = (3, self.pool, self.pool)[5 - view.rows.ndim :]
        means = pool_windows(kernels.unit(view.rows), window)
        if other is not None:
            means = means - pool_windows(kernels.unit(other.rows), window)
        return kernels.gram(means.flatten(1, -2))

    def _nodes(self, view: View, targets: Targets) -> tuple[Tensor, Tensor]:
        if not self.background:
            return view.nodes, targets.instances.count
        instances = targets.instances_and_background
        return kernels.pool_instances(view.rows, instances), instances.count

    def _unit(self, nodes: Tensor) -> Tensor:
        if self.detach_norm:
            return nodes / (nodes.norm(dim=2, keepdim=True).detach() + 1e-8)
        return F.normalize(nodes, dim=2)


def affinities_wrapped(unit: Tensor, offsets: Offsets) -> Tensor:
    """Like `kernels.affinities`, but the image is a torus."""
    dims = tuple(range(1, unit.ndim - 1))
    return torch.stack([(unit * unit.roll([-d for d in o], dims)).sum(-1) for o in offsets], 1)


def pool_windows(rows: Tensor, window: Sequence[int]) -> Tensor:
    """Mean over windows that lie side by side; the last one of an axis may be cut off.

    One matrix product for each axis, forward and backward faster on a CPU than torch's pooling.

    Args:
        rows: (B, [Z,] Y, X, D).
        window: ([z,] y, x) side lengths, in pixels.

    Returns:
        (B, [ceil(Z / z),] ceil(Y / y), ceil(X / x), D).
    """
    for axis, width in enumerate(window, 1):
        before, sides = rows.shape[:axis], rows.shape[axis + 1 :]
        number = torch.arange(rows.shape[axis], device=rows.device) // width
        member = (
            number == torch.arange(-(-rows.shape[axis] // width), device=rows.device)[:, None]
        ).to(rows.dtype)
        mean = member / member.sum(1, keepdim=True)
        flat = rows.reshape(before.numel(), rows.shape[axis], sides.numel())
        rows = (mean @ flat).reshape(*before, len(mean), *sides)
    return rows


def node_loss(student: Tensor, teacher: Tensor, count: Tensor, power: int) -> Tensor:
    """`mean_b mean_i ||v_i^S - v_i^T||^power`; see `gdlib.distill.terms.igd.node_loss`."""
    distance = (student - teacher).square().sum(2)
    if power == 1:  # the root has no gradient at 0
        distance = torch.where(distance > 0, distance, 1.0).sqrt() * (distance > 0)
    return (distance.sum(1) / count.clamp(min=1)).mean()


def accumulated(memory: dict, count: Tensor) -> Tensor:
    """(B, D, D) the sum of the Gram matrices in memory, weighed for images of `count` (B,) nodes as
    by a list of nodes that grows, over the number of all.
    """
    valid = memory["valid"].float()
    others = memory["count"] * valid
    before, own = others.cumsum(0) - others, count.float()[:, None]
    share = 2 * own / (own + before).clamp(min=1) * valid
    return torch.einsum("bl,lde->bde", share, memory["gram"]) / len(valid)
