"""The mathematics of pixels and instances, for losses, training and inference.

Dimension is data (2D = 3D).

Per-pixel vectors are kept as *rows*: (B, [Z,] Y, X, D). A channels-last network output is such an
array already, and every dot product of two pixels then reads two contiguous vectors. What losses
need of whole maps is computed by the compiled functions of `fused` on a CPU, else by the plain
ones beside them, which say what it means.
"""

from gdlib.kernels.affinities import (
    affinities,
    affinity_targets,
    balance,
    class_weights,
    count_pairs,
    inside,
    overlap,
    pairs_of,
    rows,
    unit,
    widen_borders,
)
from gdlib.kernels.nodes import Instances, gram, node_grams, numbered, pool_instances
from gdlib.kernels.relate import PAIR_LOSSES, Pairs, Relations, pair_loss, pair_losses, relate

__all__ = [
    "PAIR_LOSSES",
    "Instances",
    "Pairs",
    "Relations",
    "affinities",
    "affinity_targets",
    "balance",
    "class_weights",
    "count_pairs",
    "gram",
    "inside",
    "node_grams",
    "numbered",
    "overlap",
    "pair_loss",
    "pair_losses",
    "pairs_of",
    "pool_instances",
    "relate",
    "rows",
    "unit",
    "widen_borders",
]
