"""Augmented patches against scipy, one patch after the other, and against what the small student
can take.
"""

import math
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from benchmarks.bench import Bench
from benchmarks.scenes import bare_step, spec, trainings
from gdlib import io
from gdlib.config import RunSpec
from gdlib.data.augment import sampling_grid
from gdlib.data.patches import PatchSampler


class Plain:
    """Patches by scipy and numpy, with the same random numbers in the same order.

    Intensity changes of sections are left out.
    """

    def __init__(self, run: RunSpec, path: Path) -> None:
        self.run = run
        self.samples = list(io.read_samples(path))
        self.images = []
        for sample in self.samples:
            low, high = np.percentile(
                sample.image, [run.normalisation.lower, run.normalisation.upper]
            )
            self.images.append(
                (sample.image[0].astype(np.float32) - np.float32(low)) / np.float32(high - low)
            )

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return images (B, [Z,] Y, X) float32 and labels."""
        run, augment = self.run, self.run.drawing["augment"]
        generator = torch.Generator().manual_seed((run.seed * 2_654_435_761 + step) % 2**32)
        batch = run.recipe.batch_size
        ids = torch.randint(len(self.samples), (batch,), generator=generator).tolist()
        shapes = torch.tensor([self.samples[i].label.shape for i in ids])
        grid = sampling_grid(shapes, run.patch, generator, **augment["geometry"]).numpy()
        images, labels = [], []
        for i, places in zip(ids, np.moveaxis(grid, -1, 1), strict=True):
            images.append(ndimage.map_coordinates(self.images[i], places, order=1, mode="mirror"))
            labels.append(
                ndimage.map_coordinates(self.samples[i].label, places, order=0, mode="mirror")
            )
        return np.stack(self._intensity(images, generator, **augment["intensity"])), np.stack(
            labels
        )

    @staticmethod
    def _intensity(
        images, generator, *, contrast, brightness, gamma, blur, noise, invert, probability
    ):
        batch = len(images)
        if invert > 0:
            negative = (torch.rand(batch, generator=generator) < invert).tolist()
            images = [
                1 - image if dark else image for image, dark in zip(images, negative, strict=True)
            ]

        def draw(low: float, high: float, neutral: float) -> list[float]:
            value = low + (high - low) * torch.rand(batch, generator=generator)
            return torch.where(
                torch.rand(batch, generator=generator) < probability, value, neutral
            ).tolist()

        exponent = [2**e for e in draw(-gamma, gamma, 0.0)] if gamma > 0 else [1.0] * batch
        sigma = draw(0.0, blur, 0.0) if blur > 0 else [0.0] * batch
        factor, shift = draw(1 - contrast, 1 + contrast, 1.0), draw(-brightness, brightness, 0.0)
        normal = (
            torch.randn(batch, 1, *images[0].shape, generator=generator).numpy()[:, 0]
            if noise > 0
            else None
        )
        strength = draw(0.0, noise, 0.0) if noise > 0 else None
        out, reach = [], max(1, math.ceil(3 * max(sigma)))
        for k, image in enumerate(images):
            inner = image.clip(0, 1)
            image = image + np.maximum(inner, 1e-6) ** exponent[k] - inner
            if sigma[k] > 0:
                image = ndimage.gaussian_filter(
                    image, max(sigma[k], 0.05), mode="mirror", axes=(-2, -1), radius=reach
                )
            image = image * factor[k] + shift[k]
            out.append(image if normal is None else image + normal[k] * strength[k])
        return out


def differ(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of pixels with another label, or mean absolute difference of intensities, whichever is
    larger.

    Places half-way between two pixels have two nearest labels.
    """
    return max(float((ours[1] != theirs[1]).mean()), float(np.abs(ours[0] - theirs[0]).mean()))


def run(bench: Bench) -> None:
    """Patches of the nuclei and of the neurites, and the step that they feed."""
    for axes, (patch, batch, data) in trainings(bench).items():
        about = spec(len(patch), patch, batch)
        sampler = PatchSampler(data, **about.drawing, device=bench.device)
        plain = Plain(about, data) if axes == "2D" else None
        steps = iter(range(10**9))
        theirs = iter(range(10**9))

        def ours(sampler=sampler, steps=steps):
            made = sampler.batch(next(steps))
            return made.image[:, 0].cpu().numpy(), made.label.cpu().numpy()

        found = bench.compare(
            f"a batch of patches, {axes}",
            ours,
            None if plain is None else lambda p=plain, s=theirs: p(next(s)),
            differ=None if plain is None else differ,
            tolerance=1e-3,
            shape=[batch, *patch],
            about="scipy map_coordinates and gaussian_filter for each patch",
        )
        step = bench.compare(
            f"the student's step that it feeds, {axes}",
            bare_step(bench, len(patch), (batch, 1, *patch)),
            about="forward, backward and optimizer",
        )
        share = 100 * found["ms"] / step["ms"]
        bench.target(
            f"time to make a batch against the student's step on it, {axes}", share, 100, unit=" %"
        )
