"""IGD, instance graph distillation: nodes are mean embeddings of instances, edges their cosine
similarities.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gdlib import kernels
from gdlib.distill import Targets, Term, View, check_comparable
from gdlib.distill.bank import mean_record

__all__ = ["IGD"]


class IGD(Term):
    """Instance graph distillation, one part of it.

    Args:
        part: `nodes` or `edges`.
        memory: compare with nodes of the memory bank (edges only) instead of within the image.
    """

    apart = ({"part": "nodes", "memory": True},)  # nodes of other images are other objects
    uses = ("nodes",)

    def __init__(self, *, part: Literal["nodes", "edges"] = "edges", memory: bool = False) -> None:
        super().__init__(memory)
        if part not in ("nodes", "edges") or (part == "nodes" and memory):
            raise ValueError(
                f'igd: part "{part}" with memory {memory}: part is "nodes" (within the image only) '
                'or "edges"'
            )
        self.part = part

    def record(self, teacher: View) -> dict[str, Tensor]:
        """Keep the Gram matrix of each image's unit nodes, and their number."""
        count = teacher.targets.instances.count
        gram = kernels.node_grams(F.normalize(teacher.nodes, dim=2), count)
        return {"gram": gram, "count": count.float()}

    def forward(self, student: View, teacher: View, targets: Targets, memory: dict) -> Tensor:
        """Return the scalar loss; a differentiable 0 without instances or memory."""
        if self.part == "nodes" or self.memory:
            check_comparable(student.nodes, teacher.nodes)
        count = targets.instances.count
        if self.part == "nodes":
            return node_loss(student.nodes, teacher.nodes, count)
        edges = F.normalize(student.nodes, dim=2), F.normalize(teacher.nodes, dim=2), count
        if not self.memory:
            return edge_loss(*edges)
        if not memory:
            return student.nodes.sum() * 0
        return edge_inter_loss(*edges, mean_record(with_nodes(memory), "gram"))

    def entries(self, memory: dict) -> Tensor:
        """Count the sampled entries that have an instance."""
        return with_nodes(memory)["valid"].sum()


def node_loss(student: Tensor, teacher: Tensor, count: Tensor) -> Tensor:
    """`mean_b mean_i ||v_i^S - v_i^T||^2` over the instances i of each image b.

    Args:
        student: (B, M, D) nodes, 0 where an image has fewer than M.
        teacher: likewise, no gradient.
        count: (B,) nodes of each image; one without instances counts as 0.
    """
    squared = (student - teacher).square().sum(2)
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


def with_nodes(memory: dict) -> dict:
    """The memory of which only entries that have an instance are valid."""
    return memory | {"valid": memory["valid"] & (memory["count"] > 0)}
