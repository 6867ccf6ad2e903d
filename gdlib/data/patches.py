"""Images for networks: normalisation, and augmented training patches as a pure function of (seed, step)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdlib import io
from gdlib.data.augment import augment_intensity, sample_patch, sampling_grid
from gdlib.distill import Batch


def normalise(image: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Map each channel's `lower` and `upper` percentile to 0 and 1; values outside stay outside, a flat channel becomes 0.

    Where both percentiles are equal, as in an image with few bright pixels, minimum and maximum take their place.

    Args:
        image: (C, [Z,] Y, X), any real type.
        lower: percentile, e.g. 1.
        upper: percentile, e.g. 99.8.

    Returns:
        float32 array of the same shape.
    """
    flat = image.reshape(len(image), -1).astype(np.float32)
    low, high = np.percentile(flat, [lower, upper], axis=1, keepdims=True).astype(np.float32)
    flat_between = high <= low
    low = np.where(flat_between, flat.min(1, keepdims=True), low)
    high = np.where(flat_between, flat.max(1, keepdims=True), high)
    span = np.where(high > low, high - low, np.inf)
    return ((flat - low) / span).reshape(image.shape).astype(np.float32)


class PatchSampler:
    """Random augmented training patches; `batch(step)` depends on the seed and the step alone.

    That makes training resumable without a data-loader state, and gives every method of one seed the same patches in the same
    order: differences between methods are not differences of data.

    Args:
        path: samples `.h5`; read once and kept in memory.
        patch: side lengths in pixels.
        batch_size: patches per step.
        normalisation: keyword arguments of `normalise`.
        augment: keyword arguments of `sampling_grid` and `augment_intensity`.
        seed: of the run.
        device: where patches are made and returned.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        patch: Sequence[int],
        batch_size: int,
        normalisation: Mapping[str, float],
        augment: Mapping[str, Mapping[str, Any]],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.patch = tuple(patch)
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed
        self.images, self.labels = [], []
        for sample in io.read_samples(path):
            if any(n < p for n, p in zip(sample.label.shape, self.patch, strict=True)):
                raise io.DataError(
                    f'{path}: image "{sample.id}" of {sample.label.shape} pixels is smaller than the patch {self.patch}; '
                    "choose a smaller patch"
                )
            self.images.append(torch.from_numpy(normalise(sample.image, **normalisation)).to(device))
            self.labels.append(torch.from_numpy(sample.label.astype(np.int64)).to(device))
        if not self.images:
            raise io.DataError(f"{path}: there is no image to train on; check the split lists")

    def batch(self, step: int) -> Batch:
        """Return the patches of one step: image (B, C, *patch) float32, label (B, *patch) int64, ids (B,) int64."""
        # The CPU generator looks at the last 32 bits only; an odd factor spreads the seeds over them.
        generator = torch.Generator().manual_seed((self.seed * 2_654_435_761 + step) % 2**32)
        device = self.images[0].device
        ids = torch.randint(len(self.images), (self.batch_size,), generator=generator)
        shapes = torch.tensor([self.labels[i].shape for i in ids.tolist()])
        grid = sampling_grid(shapes, self.patch, generator, **self.augment["geometry"]).to(device)
        pairs = [sample_patch(self.images[i], self.labels[i], g) for i, g in zip(ids.tolist(), grid, strict=True)]
        image = torch.stack([image for image, _ in pairs])
        label = torch.stack([label for _, label in pairs])
        return Batch(augment_intensity(image, generator, **self.augment["intensity"]), label, ids.to(device))
