"""What neighbouring blocks of a volume agree on: which of their segments are one object."""

from collections.abc import Sequence

import bioimage_cpp as bic
import numpy as np


def without_fragments(
    label: np.ndarray, min_fragment: int, cut: Sequence[tuple[bool, bool]]
) -> np.ndarray:
    """Give segments below `min_fragment` to touching larger ones, but for those that may go on
    beyond the cuts.
    """
    from skimage.segmentation import relabel_sequential  # takes a moment

    from gdlib.segment.fragments import given_away

    small = np.bincount(label.ravel()) < min_fragment
    small[:1] = False
    for axis, ends in enumerate(cut):
        for side, is_cut in zip((0, -1), ends, strict=True):
            if is_cut:
                small[label.take(side, axis)] = False
    if small.any():
        label = given_away(label.astype(np.int64, order="C"), small)
    return relabel_sequential(label)[0].astype(np.uint32)


def contacts(label: np.ndarray) -> np.ndarray:
    """Return which segments touch: (n, 3) int64, the smaller label, the larger one, and how many
    pairs of pixels do.
    """
    found = [np.empty(0, np.int64)]
    count = int(label.max(initial=0)) + 1
    for axis in range(label.ndim):
        before, after = (
            np.moveaxis(label, axis, 0)[part] for part in (slice(None, -1), slice(1, None))
        )
        touching = (before != after) & (before > 0) & (after > 0)
        u, v = before[touching].astype(np.int64), after[touching].astype(np.int64)
        found.append(np.minimum(u, v) * count + np.maximum(u, v))
    code, area = np.unique(np.concatenate(found), return_counts=True)
    return np.stack([code // count, code % count, area], 1)


def same(a: np.ndarray, b: np.ndarray, axis: int, face: int) -> np.ndarray:
    """Return the pairs of labels that are the same region in two segmentations of one place.

    Labels are compared piece by piece, a piece being what is connected here: an object that leaves
    a block twice and is one only beyond has two pieces. Two pieces are the same if more than half
    of the smaller one is common, and count if they cross the face.

    Args:
        a: ([Z,] Y, X) uint32, labels of one block, 0 = background.
        b: labels of the next block.
        axis: along which they are neighbours.
        face: where, in pixels; what is before it is the first block's own.

    Returns:
        (n, 3) int64: a label of each, and the area in which a piece of them crosses the face.
    """
    pieces = [bic.segmentation.label(label, connectivity=1).astype(np.int64) for label in (a, b)]
    sizes = [np.bincount(piece.ravel()) for piece in pieces]
    both = np.where((a > 0) & (b > 0), pieces[0] * len(sizes[1]) + pieces[1], 0)
    codes, first, common = np.unique(both, return_index=True, return_counts=True)
    smaller = np.minimum(sizes[0][codes // len(sizes[1])], sizes[1][codes % len(sizes[1])])
    planes = (np.searchsorted(codes, both.take(k, axis).ravel()) for k in (face - 1, face))
    area = np.minimum(*(np.bincount(plane, minlength=len(codes)) for plane in planes))
    found = (codes > 0) & (area > 0) & (2 * common > smaller)
    return np.stack([a.ravel()[first[found]], b.ravel()[first[found]], area[found]], 1).astype(
        np.int64
    )


def divided(group: np.ndarray, attracted: np.ndarray, repelled: np.ndarray) -> np.ndarray:
    """Divide the groups in which segments repel each other, by a multicut (greedy additive, Keuper
    et al., ICCV 2015).
    """
    doubtful = np.zeros(len(group), bool)
    doubtful[group[repelled[:, 0]]] = True  # groups
    edges = np.concatenate([attracted[doubtful[group[attracted[:, 0]]]], repelled * [1, 1, -1]])
    if not len(edges):
        return group
    nodes, ends = np.unique(edges[:, :2], return_inverse=True)
    code, index = np.unique(ends.reshape(-1, 2) @ [len(nodes), 1], return_inverse=True)
    graph = bic.graph.UndirectedGraph.from_unique_edges(
        len(nodes), np.stack([code // len(nodes), code % len(nodes)], 1).astype(np.uint64)
    )
    cost = np.bincount(index, weights=edges[:, 2])
    parts = bic.graph.multicut.GreedyAdditiveMulticut().optimize(
        bic.graph.multicut.MulticutObjective(graph, cost)
    )
    group = group.copy()
    group[nodes] = len(group) + np.asarray(parts).astype(np.int64)
    return np.unique(group, return_inverse=True)[1]
