"""IGD, instance graph distillation: nodes are mean embeddings of instances, edges their cosine
similarities.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View, check_comparable

__all__ = ["IGD"]


def node_loss(student: Tensor, teacher: Tensor, count: Tensor, power: int = 2) -> Tensor:
    """`mean_b mean_i ||v_i^S - v_i^T||^power` over the instances i of each image b.

    Args:
        student: (B, M, D) nodes, 0 where an image has fewer than M.
        teacher: likewise, no gradient.
        count: (B,) nodes of each image; one without instances counts as 0.
        power: 2 is the paper's formula. PAPER: the original code takes the norm without the square,
            power 1.
    """
    squared = (student - teacher).square().sum(2)
    if power == 1:  # the root has no gradient at 0
        squared = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    return (squared.sum(1) / count.clamp(min=1)).mean()


def edge_loss(student: Tensor, teacher: Tensor, count: Tensor) -> Tensor:
    """Compare the edges of both networks, over all pairs of instances of the same image:
    `mean_b 1/N_b^2 sum_ij (s_i . s_j - t_i . t_j)^2`.

    With D = S - T the matrix of differences is `D S^T + T D^T`, and its squared norm, by Gram
    matrices over the vector dimension, `<D^T D, S^T S + T^T T> + 2 <D^T T, (D^T S)^T>`. Nodes that
    are 0 add nothing. Where student and teacher agree every part is small, so that float32 is
    enough: the difference of `||S^T S||^2`, `2 ||S^T T||^2` and `||T^T T||^2` would need float64,
    which Apple's GPUs do not have.

    Args:
        student: (B, M, D) nodes of length one, 0 where an image has fewer than M.
        teacher: likewise, no gradient; its D may be another.
        count: (B,) nodes of each image.
    """
    missing = student.shape[2] - teacher.shape[2]  # axes that are 0 change no similarity
    student, teacher = F.pad(student, (0, max(0, -missing))), F.pad(teacher, (0, max(0, missing)))
    d = student.shape[2]
    g = kernels.node_grams(torch.cat([student - teacher, student, teacher], 2), count)
    dd, ds, dt = g[:, :d].split(d, 2)
    ss, tt = g[:, d : 2 * d, d : 2 * d], g[:, 2 * d :, 2 * d :]
    return (dd * (ss + tt) + 2 * dt * ds.mT).sum((1, 2)).mean()


def edge_inter_loss(student: Tensor, teacher: Tensor, count: Tensor, memory_gram: Tensor) -> Tensor:
    """Compare the edges to the teacher's nodes y_l of each sampled memory image l:
    `mean_b mean_l mean_(i, j) (s_i . y_lj - t_i . y_lj)^2`.

    Args:
        student: (B, M, D) nodes of length one, 0 where an image has fewer than M.
        teacher: likewise, no gradient.
        count: (B,) nodes of each image.
        memory_gram: (D, D) mean over l of `1/K_l sum_j y_lj y_lj^T`, or (B, D, D) with a weight per
            image in it.

    Reference: arXiv 2401.06370, inter-image L_edge; both graphs are compared with the teacher's
        memory.
    """
    return (kernels.node_grams(student - teacher, count) * memory_gram).sum((1, 2)).mean()


class IGD(Term):
    """Instance graph distillation, one part of it.

    Args:
        part: `nodes` or `edges`.
        memory: compare with nodes of the memory bank (edges only) instead of within the image.
        power: exponent of the node distance; see `node_loss`.
        background: PAPER: make the background a node too, as the original 3D code does.
        detach_norm: PAPER: treat the norm in the cosine of an edge as a constant, as the original
            code does; same value, other gradient.
        accumulate: PAPER: weigh the sampled memory images as the original code does, whose node
            list grows inside its loop: the l-th image gets `2 N_b / (N_b + sum_(k<l) K_k)` instead
            of 1.
    """

    apart = ({"part": "nodes", "memory": True},)  # nodes of other images are other objects

    def __init__(
        self,
        *,
        part: Literal["nodes", "edges"] = "edges",
        memory: bool = False,
        power: Literal[1, 2] = 2,
        background: bool = False,
        detach_norm: bool = False,
        accumulate: bool = False,
    ) -> None:
        super().__init__(memory)
        if part not in ("nodes", "edges") or (part == "nodes" and memory) or power not in (1, 2):
            raise ValueError(
                f'igd: part "{part}" with memory {memory} and power {power}: part is "nodes" '
                "(within the image only; "
                'power 1 or 2) or "edges"'
            )
        self.part = part
        self.power = power
        self.background = background
        self.detach_norm = detach_norm
        self.accumulate = accumulate
        self.uses = () if background else ("nodes",)

    def _graph(self, view: View) -> tuple[Tensor, kernels.Instances]:
        if self.background:
            instances = view.targets.instances_and_background
            return kernels.relate(view.rows, instances=instances).nodes, instances
        return view.nodes, view.targets.instances

    def _unit(self, nodes: Tensor) -> Tensor:
        if self.detach_norm:
            return nodes / (nodes.norm(dim=2, keepdim=True).detach() + 1e-8)
        return F.normalize(nodes, dim=2)

    def record(self, teacher: View) -> dict[str, Tensor]:
        """Keep the Gram matrix of each image's unit nodes, and their number."""
        nodes, instances = self._graph(teacher)
        return {
            f"igd_gram_{self.background:d}": kernels.node_grams(self._unit(nodes), instances.count),
            f"igd_count_{self.background:d}": instances.count.float(),
        }

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss; a differentiable 0 without instances or memory."""
        nodes, instances = self._graph(student)
        nodes_teacher, _ = self._graph(teacher)
        if self.part == "nodes" or self.memory:
            check_comparable(nodes, nodes_teacher)
        if self.part == "nodes":
            return node_loss(nodes, nodes_teacher, instances.count, power=self.power)
        if not self.memory:
            return edge_loss(self._unit(nodes), self._unit(nodes_teacher), instances.count)
        if f"igd_gram_{self.background:d}" not in memory:
            return nodes.sum() * 0
        gram = self._memory_gram(memory, instances)
        return edge_inter_loss(self._unit(nodes), self._unit(nodes_teacher), instances.count, gram)

    def entries(self, memory: dict) -> Tensor:
        """Count the sampled entries that have an instance."""
        return self._usable(memory).sum()

    def _usable(self, memory: dict) -> Tensor:
        return memory["valid"] & (memory[f"igd_count_{self.background:d}"] > 0)

    def _memory_gram(self, memory: dict, instances: kernels.Instances) -> Tensor:
        gram = memory[f"igd_gram_{self.background:d}"]
        count = memory[f"igd_count_{self.background:d}"]
        weight = self._usable(memory).float()
        if self.accumulate:
            count = count * weight
            before = count.cumsum(0) - count
            own = instances.count.float()[:, None]
            share = 2 * own / (own + before).clamp(min=1) * weight
            return torch.einsum("bl,lde->bde", share, gram) / len(weight)
        return torch.tensordot(weight, gram, dims=1) / weight.sum().clamp(min=1)
