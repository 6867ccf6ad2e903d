"""Images for networks: normalisation, and augmented training patches as a pure function of (seed, step)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from gdlib import io, ops
from gdlib.data.augment import augment_intensity, augment_sections, mirrored, sample_patch, sampling_grid
from gdlib.distill import Batch

IN_MEMORY = 2**31  # bytes; a split that is larger stays in its file, and patches are read from there
SLAB = 2**24  # pixels looked at at once


def intensity_range(image: np.ndarray | h5py.Dataset, lower: float, upper: float) -> tuple[np.ndarray, np.ndarray]:
    """Find what becomes 0 and 1: two percentiles of each channel, or its minimum and maximum where they are equal.

    Args:
        image: (C, [Z,] Y, X), any real type, in memory or in a file; it is read slab by slab. Of images of more than
            2^24 pixels per channel in another type than uint8 and uint16, every n-th section or row is looked at.
        lower: percentile, e.g. 1.
        upper: percentile, e.g. 99.8.

    Returns:
        Two (C,) float32 arrays; equal values mean a flat channel.
    """
    out = np.empty((2, image.shape[0]), np.float32)
    thickness = max(1, SLAB // max(1, int(np.prod(image.shape[2:]))))
    slabs = [slice(k, k + thickness) for k in range(0, image.shape[1], thickness)]
    if image.dtype not in (np.uint8, np.uint16) and len(slabs) > 1:
        slabs = [slice(0, None, len(slabs))]
    for channel in range(image.shape[0]):
        if image.dtype in (np.uint8, np.uint16):
            count = sum(
                np.bincount(image[channel, slab].ravel(), minlength=2 ** (8 * image.dtype.itemsize)) for slab in slabs
            )
            values = np.flatnonzero(count)
            low, high = _percentiles(values, count[values], (lower, upper))
            lowest, highest = values[0], values[-1]
        else:
            flat = np.concatenate([image[channel, slab].ravel() for slab in slabs]).astype(np.float32)
            low, high = np.percentile(flat, [lower, upper])
            lowest, highest = flat.min(), flat.max()
        out[:, channel] = (low, high) if np.float32(high) > np.float32(low) else (lowest, highest)
    return out[0], out[1]


def _percentiles(values: np.ndarray, count: np.ndarray, percents: Sequence[float]) -> list[float]:
    """`np.percentile` of sorted values that occur `count` times."""
    last = np.cumsum(count) - 1  # position of the last occurrence of each value in the sorted data
    out = []
    for percent in percents:
        position = percent / 100 * last[-1]
        before, after = (values[np.searchsorted(last, p)] for p in (np.floor(position), np.ceil(position)))
        out.append(float(before) + (position - np.floor(position)) * (float(after) - float(before)))
    return out


def rescale(image: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Map `low` to 0 and `high` to 1; values outside stay outside, a flat channel becomes 0.

    Args:
        image: (C, [Z,] Y, X), any real type.
        low: (C,) float32, from `intensity_range`, as is `high`.
        high: (C,) float32.

    Returns:
        float32 array of the same shape.
    """
    column = (-1,) + (1,) * (image.ndim - 1)
    return (image.astype(np.float32) - low.reshape(column)) / _span(low, high).reshape(column)


def _span(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """What a value is divided by; a flat channel becomes 0."""
    return np.where(high > low, high - low, np.inf).astype(np.float32)


def normalise(image: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Map each channel's `lower` and `upper` percentile to 0 and 1; see `intensity_range` and `rescale`."""
    return rescale(image, *intensity_range(image, lower, upper))


def _tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor; torch can do little with uint32, so these bits become those of an int32."""
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)


def largest_id(labels: Sequence[np.ndarray | Tensor], pixels: int, device: torch.device) -> int | None:
    """Find the largest id, so that what counts instances need not ask the device.

    Args:
        labels: of all patches.
        pixels: of a patch.
        device: of the patches.

    Returns:
        None on the CPU, which is not waited for, and where ids are so large that they say nothing of how many there are.
    """
    if device.type == "cpu" or not labels:
        return None
    largest = max(int(label.max()) for label in labels)
    return largest if largest <= pixels else None


class PatchSampler:
    """Random augmented training patches; `batch(step)` depends on the seed and the step alone.

    That makes training resumable without a data-loader state, and gives every method of one seed the same patches in the same
    order: differences between methods are not differences of data.

    Args:
        path: samples `.h5`. Up to 2 GiB are kept on the device; of a larger split, each patch reads the blocks that it needs.
        patch: side lengths of the label in pixels.
        margin: the image is larger by this on each side, for networks that lose it; 0 if left out.
        batch_size: patches per step.
        normalisation: keyword arguments of `intensity_range`.
        augment: keyword arguments of `sampling_grid`, `augment_intensity` and, for volumes, `augment_sections`.
        border: label pixels so near to another instance become background (`ops.widen_borders`).
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
        margin: Sequence[int] | None = None,
        border: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.patch = tuple(patch)
        self.margin = tuple(margin or [0] * len(self.patch))
        self.batch_size = batch_size
        self.augment = augment
        self.border = border
        self.seed = seed
        self.device = torch.device(device)
        self.samples: list[dict[str, Any]] = []
        with io.open_h5(path):  # tells a broken file in one sentence
            file = h5py.File(path, "r", rdcc_nbytes=2**26)
            size = sum(array.nbytes for sample in file.values() for array in sample.values())
            found = {
                name: {key: array if size > IN_MEMORY else array[()] for key, array in file[name].items()}
                for name in sorted(file)
            }
        for name, arrays in found.items():
            if any(n < p for n, p in zip(arrays["label"].shape, self.patch, strict=True)):
                raise io.DataError(
                    f'{path}: image "{name}" of {arrays["label"].shape} pixels is smaller than the patch {self.patch}; '
                    "choose a smaller patch"
                )
            low, high = intensity_range(arrays["image"], **normalisation)
            column = (-1,) + (1,) * len(self.patch)
            held = arrays | {"low": low.reshape(column), "span": _span(low, high).reshape(column)}
            self.samples.append(
                {k: _tensor(a).to(self.device) if isinstance(a, np.ndarray) else a for k, a in held.items()}
            )
        in_memory = [arrays["label"] for arrays in found.values() if size <= IN_MEMORY]
        self.largest = largest_id(in_memory, math.prod(self.patch), self.device)
        self.ignores = any("ignore" in sample for sample in self.samples)
        if not self.samples:
            raise io.DataError(f"{path}: there is no image to train on; check the split lists")

    def choose(self, step: int) -> tuple[torch.Generator, list[int]]:
        """Return which image each patch of a step is of, and the generator that draws everything else of the step."""
        # The CPU generator looks at the last 32 bits only; an odd factor spreads the seeds over them.
        generator = torch.Generator().manual_seed((self.seed * 2_654_435_761 + step) % 2**32)
        return generator, torch.randint(len(self.samples), (self.batch_size,), generator=generator).tolist()

    def batch(self, step: int) -> Batch:
        """Return the patches of one step: image (B, C, *patch + margins) float32, label (B, *patch) int64, ids (B,) int64."""
        generator, sources = self.choose(step)
        chosen = [self.samples[i] for i in sources]
        ids = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        shapes = torch.tensor([sample["label"].shape for sample in chosen])
        grid = sampling_grid(shapes, self.patch, generator, margin=self.margin, **self.augment["geometry"])
        patches = [self._cut(sample, g) for sample, g in zip(chosen, grid, strict=True)]
        image, label = (torch.stack([patch[k] for patch in patches]) for k in (0, 1))
        ignore = torch.stack([patch[2] for patch in patches]) if self.ignores else None
        if self.border:
            label = ops.widen_borders(label, self.border)
        label = label.long() & 0xFFFFFFFF
        image = augment_intensity(image, generator, **self.augment["intensity"])
        if len(self.patch) == 3:
            image = augment_sections(image, generator, **self.augment["sections"])
        return Batch(image, label, ops.send(ids, self.device), ignore, largest=self.largest)

    def _cut(self, sample: Mapping[str, Any], grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read the box that holds all points of a grid, and resample it."""
        places = mirrored(grid, sample["label"].shape).unbind(-1)  # on the CPU: to find the box, nothing waits
        ends = [place.aminmax() for place in places]
        box = tuple(slice(math.floor(low), math.ceil(high) + 1) for low, high in ends)
        inner = tuple(slice(m, m + p) for m, p in zip(self.margin, self.patch, strict=True))
        grid = ops.send(torch.stack([place - s.start for place, s in zip(places, box, strict=True)]), self.device)

        def read(name: str) -> Tensor:
            part = sample[name][(..., *box)]
            return part if isinstance(part, Tensor) else ops.send(_tensor(part), self.device)

        image = sample_patch((read("image").float() - sample["low"]) / sample["span"], grid.movedim(0, -1))
        nearest = tuple(grid[(slice(None), *inner)].round().long())
        label = read("label")[nearest]
        if "ignore" not in sample:  # but other samples may have it
            return image, label, torch.zeros_like(label, dtype=torch.bool)
        return image, label, read("ignore")[nearest]
