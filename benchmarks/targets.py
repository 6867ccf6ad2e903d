"""What networks learn from a label, against shifting the whole label once for every offset."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from benchmarks.bench import Bench
from benchmarks.scenes import OFFSETS, blobs
from gdlib import kernels

Arrays = tuple[np.ndarray, ...]


def shift_based(label: np.ndarray, offsets: Sequence[Sequence[int]]) -> Arrays:
    """Affinity targets and masks (B, K, [Z,] Y, X): every image shifted by every offset."""
    targets = np.zeros((len(label), len(offsets), *label.shape[1:]), bool)
    masks = np.zeros_like(targets)
    for b, image in enumerate(label):
        for k, offset in enumerate(offsets):
            # Element p of the shifted label is that at p + offset; what comes from outside is -1.
            neighbour = ndimage.shift(
                image, [-d for d in offset], order=0, cval=-1, prefilter=False
            )
            masks[b, k] = neighbour >= 0
            targets[b, k] = (neighbour == image) & masks[b, k]
    return targets, masks


def with_weights(label: np.ndarray, offsets: Sequence[Sequence[int]]) -> Arrays:
    """The same, and class weights of every image."""
    targets, masks = shift_based(label, offsets)
    weights = np.ones(targets.shape, np.float32)
    for target, mask, weight in zip(targets, masks, weights, strict=True):
        f = np.clip(target[mask].mean(), 0.05, 0.99)
        weight[target], weight[~target] = (1, f / (1 - f)) if f > 0.5 else ((1 - f) / f, 1)
        weight[~mask] = 0
    return targets, masks, weights


def differ(ours: Sequence[torch.Tensor], theirs: Arrays) -> float:
    """Largest relative difference of any element."""
    pairs = (
        (a.cpu().numpy().astype(np.float64), b.astype(np.float64))
        for a, b in zip(ours, theirs, strict=False)
    )
    return max(float((np.abs(a - b) / np.maximum(np.abs(b), 1)).max()) for a, b in pairs)


def run(bench: Bench) -> None:
    """Targets alone, and with masks and weights, in 2D and 3D."""
    shapes = {
        "2D": bench.pick((544, 544), (256, 256), (40, 44)),
        "3D": bench.pick((16, 128, 128), (8, 64, 64), (6, 30, 32)),
    }
    for axes, shape in shapes.items():
        offsets = OFFSETS[len(shape)]
        image = np.stack([blobs(shape, 25, seed) for seed in range(2)]).astype(np.int64)
        label = torch.from_numpy(image).to(bench.device)

        def targets(label=label, offsets=offsets):
            return (kernels.affinity_targets(label, offsets),)

        def everything(label=label, offsets=offsets):
            target, valid = (
                kernels.affinity_targets(label, offsets),
                kernels.inside(offsets, label.shape[1:], label.device),
            )
            return target, valid.expand_as(target), kernels.balance(target, valid)

        for name, ours, theirs in (
            ("affinity targets", targets, shift_based),
            ("targets, masks and class weights", everything, with_weights),
        ):
            found = bench.compare(
                f"{name}, {axes}",
                ours,
                lambda f=theirs, x=image, o=offsets: f(x, o),
                differ=differ,
                tolerance=1e-5,
                about="scipy.ndimage.shift of the label for every offset, as in the original",
                shape=list(image.shape),
            )
            if name == "affinity targets":
                bench.target(
                    f"{name} against shifting, {axes}", found["ratio"], 10, at_least=True, unit=" x"
                )
