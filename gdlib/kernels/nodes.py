"""Instances as nodes: which pixel belongs to which, means over them, Gram matrices."""

import torch
from torch import Tensor


def numbered(label: Tensor) -> Tensor:
    """Number instances anew, all images together, where an id is larger than an image has pixels,
    as in cuts of large volumes.
    """
    if int(label.max()) <= label[0].numel():
        return label
    return torch.unique(label, return_inverse=True)[1].reshape(label.shape) + int(label.min() > 0)


class Instances:
    """Which node every pixel belongs to, for a batch, computed once and used for student and
    teacher.

    Every image has room for as many nodes as any: nodes are (B, M, D), and rows without an instance
    are 0.

    Attributes:
        index: (B * pixels,) int64, node of each pixel, counted through all images; B * M stands for
            no node.
        size: (B, M) float32, pixels of each node; 0 where an image has fewer.
        count: (B,) int64, nodes of each image.
    """

    def __init__(self, label: Tensor, background: bool = False, largest: int | None = None) -> None:
        """Number the instances of a batch.

        Args:
            label: (B, [Z,] Y, X) integer, 0 = background.
            background: make the background of each image a node too (PAPER: the original 3D code
                does).
            largest: no id is larger. It makes room for so many nodes; without it there is room for
                as many as there are, and to know that one must wait for the device.
        """
        batch = len(label)
        first = torch.arange(batch, device=label.device)[:, None]
        known = largest is not None
        if not known:
            label = numbered(label)
            largest = int(label.max())
        size = torch.zeros(batch, largest + 1, device=label.device)
        key = (label.reshape(batch, -1) + size.shape[1] * first).reshape(-1)
        size.view(-1).index_add_(0, key, size.new_ones(1).expand(len(key)))
        wanted = size > 0
        if not background:
            wanted[:, 0] = False
        self.count = wanted.sum(1)
        max_nodes = largest + background if known else int(self.count.max())
        node = torch.where(
            wanted, wanted.cumsum(1) - 1 + max_nodes * first, batch * max_nodes
        ).reshape(-1)
        self.index = node[key]
        self.size = (
            size.new_zeros(batch * max_nodes + 1)
            .index_add_(0, node, size.reshape(-1))[:-1]
            .reshape(batch, max_nodes)
        )


def pool_instances(rows: Tensor, instances: Instances) -> Tensor:
    """Mean vector of every instance: the nodes of the instance graph.

    Args:
        rows: (B, [Z,] Y, X, D).
        instances: of the same batch.

    Returns:
        (B, M, D); 0 where an image has fewer than M instances.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    size = instances.size.to(flat.dtype)
    total = flat.new_zeros(size.numel() + 1, flat.shape[1]).index_add(0, instances.index, flat)
    return total[:-1].reshape(*size.shape, flat.shape[1]) / size.clamp(min=1)[..., None]


def gram(rows: Tensor) -> Tensor:
    """Second-moment matrix of the vectors of each image, `1/n sum_p r_p r_p^T`.

    Args:
        rows: (B, n, D).

    Returns:
        (B, D, D). With G_M = gram(m) and G_D = gram(d), the mean over all pairs of `(m_p . d_q)^2`
        is `sum(G_M * G_D)`: relations between two images never need the pixel-pair matrix.
    """
    return rows.transpose(1, 2) @ rows / rows.shape[1]


def node_grams(nodes: Tensor, count: Tensor) -> Tensor:
    """`gram` of the nodes of each image, of which `count` (B,) are not 0: (B, M, D) -> (B, D, D).

    Zero without nodes.
    """
    return nodes.mT @ nodes / count.clamp(min=1)[:, None, None]
