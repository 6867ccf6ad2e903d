"""Augmented training patches as a pure function of (seed, step)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from gdlib import devices, io, kernels
from gdlib.data.augment import (
    augment_intensity,
    augment_sections,
    empty_patches,
    mirrored,
    sample_patch,
    sampling_grid,
)
from gdlib.data.intensity import intensity_range, learn, span
from gdlib.data.maps import TeacherMaps
from gdlib.types import Batch, Embedding

# bytes; a split that is larger stays in its file, and patches are read from there
IN_MEMORY = 2**31


def _tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor; torch can do little with uint32, so these bits become those of an
    int32.
    """
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)


def largest_id(
    labels: Sequence[np.ndarray | Tensor], pixels: int, device: torch.device
) -> int | None:
    """Find the largest id, so that what counts instances need not ask the device.

    Args:
        labels: of all patches.
        pixels: of a patch.
        device: of the patches.

    Returns:
        None on the CPU, which is not waited for, and where ids are so large that they say nothing
        of how many there are.
    """
    if device.type == "cpu" or not labels:
        return None
    largest = max(int(label.max()) for label in labels)
    return largest if largest <= pixels else None


def of_unlabelled(share: float, batch_size: int) -> int:
    """Return how many patches of a batch are of unlabelled images, at least one of each kind.

    >>> of_unlabelled(0.5, 4), of_unlabelled(0.1, 2), of_unlabelled(0.9, 2), of_unlabelled(0.3, 8)
    (2, 1, 1, 2)
    """
    if batch_size < 2:
        raise ValueError(
            "a batch of 1 patch has no room for labelled and unlabelled images; make batch_size 2 "
            "or more"
        )
    return min(max(round(share * batch_size), 1), batch_size - 1)


class PatchSampler:
    """Random augmented training patches; `batch(step)` depends on the seed and the step alone.

    That makes training resumable without a data-loader state, and gives every method of one seed
    the same patches in the same
    order: differences between methods are not differences of data.

    Args:
        path: samples `.h5`. Up to 2 GiB are kept on the device; of a larger split, each patch reads
            the blocks that it needs.
        patch: side lengths of the label in pixels.
        margin: the image is larger by this on each side, for networks that lose it; 0 if left out.
        batch_size: patches per step.
        normalisation: keyword arguments of `learn`.
        augment: `geometry`, `intensity` and, for volumes, `sections`: keyword arguments of
            `sampling_grid`, `augment_intensity` and `augment_sections`; and perhaps `empty`, the
            probability that a patch is one of `empty_patches` in place of what was drawn.
        border: label pixels so near to another instance become background, see
            `kernels.widen_borders`.
        seed: of the run.
        device: where patches are made and returned.
        maps: what a teacher says about these images, to be cut along; else batches come without.
        levels: for each of its feature maps that is wanted, the sides that the student's has of a
            patch.
        unlabelled: samples `.h5` of images that nobody has labelled, with what was found in them;
            the last patches of every batch are of them, the others are as without.
        share: part of the patches that these are, rounded to whole ones, at least one of each kind.
        unlabelled_maps: what a teacher says about them; needed if there are `maps`.

    Attributes:
        normalisation: keyword arguments of `intensity_range`, as learned from the labelled images.
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
        maps: TeacherMaps | None = None,
        levels: Mapping[str, Sequence[int]] | None = None,
        unlabelled: Path | str | None = None,
        share: float = 0.5,
        unlabelled_maps: TeacherMaps | None = None,
    ) -> None:
        self.maps = maps
        self.levels = levels or {}
        self.patch = tuple(patch)
        self.margin = tuple(margin or [0] * len(self.patch))
        self.batch_size = batch_size
        self.augment = augment
        self.border = border
        self.seed = seed
        self.device = torch.device(device)
        found = self._open(path)
        if not found:
            raise io.DataError(f"{path}: there is no image to train on; check the split lists")
        others = {} if unlabelled is None else self._open(unlabelled)
        self.normalisation = learn(found.values(), **normalisation)
        self.samples = [self._held(name, arrays, maps) for name, arrays in found.items()]
        self.samples += [self._held(name, a, unlabelled_maps) for name, a in others.items()]
        self.labelled = len(found)  # the first of them
        self.of_unlabelled = of_unlabelled(share, batch_size) if others else 0
        labels = [arrays["label"] for arrays in (*found.values(), *others.values())]
        in_memory = labels if all(isinstance(label, np.ndarray) for label in labels) else []
        self.largest = largest_id(in_memory, math.prod(self.patch), self.device)
        self.ignores = any("ignore" in sample for sample in self.samples)

    def _open(self, path: Path | str) -> dict[str, dict[str, Any]]:
        """Return the arrays of all samples of a file by name, in memory or not."""
        with io.open_h5(path):  # tells a broken file in one sentence
            file = h5py.File(path, "r", rdcc_nbytes=2**26)
            size = sum(array.nbytes for sample in file.values() for array in sample.values())
            found = {
                name: {
                    key: array if size > IN_MEMORY else array[()]
                    for key, array in file[name].items()
                }
                for name in sorted(file)
            }
        for name, arrays in found.items():
            if "label" not in arrays:
                raise io.DataError(
                    f'{path}: image "{name}" has no label; let a teacher find objects in it '
                    "(`gdlib "
                    "step label`), or put those of another program into `unlabelled_labels/`"
                )
            if any(n < p for n, p in zip(arrays["label"].shape, self.patch, strict=True)):
                raise io.DataError(
                    f'{path}: image "{name}" of {arrays["label"].shape} pixels is smaller than the '
                    f"patch {self.patch}; "
                    "choose a smaller patch"
                )
        return found

    def _held(
        self, name: str, arrays: Mapping[str, Any], maps: TeacherMaps | None
    ) -> dict[str, Any]:
        """Return all that patches of an image are made of."""
        low, high = intensity_range(arrays["image"], **self.normalisation)
        column = (-1,) + (1,) * len(self.patch)
        held = arrays | {
            "name": name,
            "maps": maps,
            "low": low.reshape(column),
            "span": span(low, high).reshape(column),
        }
        return {
            k: _tensor(a).to(self.device) if isinstance(a, np.ndarray) else a
            for k, a in held.items()
        }

    def choose(self, step: int) -> tuple[torch.Generator, list[int]]:
        """Return which image each patch of a step is of, and the generator that draws everything
        else of the step.
        """
        # The CPU generator looks at the last 32 bits only; an odd factor spreads the seeds over
        # them.
        generator = torch.Generator().manual_seed((self.seed * 2_654_435_761 + step) % 2**32)
        sources = torch.randint(self.labelled, (self.batch_size,), generator=generator)
        if self.of_unlabelled:  # random numbers of their own leave all others as they are
            seed = (self.seed * 2_654_435_761 + step) % 2**32 ^ 0x55555555
            own = torch.Generator().manual_seed(seed)
            sources[-self.of_unlabelled :] = torch.randint(
                self.labelled, len(self.samples), (self.of_unlabelled,), generator=own
            )
        return generator, sources.tolist()

    def batch(self, step: int) -> Batch:
        """Return the patches of one step: image (B, C, *patch + margins) float32, label (B, *patch)
        int64, ids (B,) int64.
        """
        generator, sources = self.choose(step)
        chosen = [self.samples[i] for i in sources]
        ids = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        shapes = torch.tensor([sample["label"].shape for sample in chosen])
        grid = sampling_grid(
            shapes, self.patch, generator, margin=self.margin, **self.augment["geometry"]
        )
        patches = [self._cut(sample, g) for sample, g in zip(chosen, grid, strict=True)]
        image, label = (torch.stack([patch[k] for patch in patches]) for k in (0, 1))
        ignore = torch.stack([patch[2] for patch in patches]) if self.ignores else None
        said = {part: torch.stack([patch[3][part] for patch in patches]) for part in patches[0][3]}
        if self.border:
            label = kernels.widen_borders(label, self.border)
        label = label.long() & 0xFFFFFFFF
        if self.augment.get("empty", 0) > 0:
            image, label, ignore, said = self._emptied(image, label, ignore, said, step)
        image = augment_intensity(image, generator, **self.augment["intensity"])
        if len(self.patch) == 3:
            image = augment_sections(image, generator, **self.augment["sections"])
        said = {part: vectors.movedim(-1, 1) for part, vectors in said.items()}
        teacher = (
            Embedding(said.pop("embedding", None), said.pop("foreground", None), said)
            if self.maps
            else None
        )
        ids = devices.send(ids, self.device)
        return Batch(image, label, ids, ignore, teacher, self.largest, self.of_unlabelled)

    def _emptied(
        self,
        image: Tensor,
        label: Tensor,
        ignore: Tensor | None,
        said: dict[str, Tensor],
        step: int,
    ) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """Put noise without objects in the place of some patches.

        Random numbers of their own leave all others as they are.

        Of this noise no teacher has said anything. It gets, everywhere, what the teacher says on
        average of the background that was there, so that it says what is true: one background.
        """
        generator = torch.Generator().manual_seed(~(self.seed * 2_654_435_761 + step) % 2**32)
        which = (torch.rand(len(image), generator=generator) < self.augment["empty"]).nonzero()[
            :, 0
        ]
        if not len(which):
            return image, label, ignore, said
        noise = empty_patches((len(which), *image.shape[1:]), generator, **self.normalisation)
        which = devices.send(which, self.device)
        image = image.index_copy(0, which, devices.send(noise, self.device))
        for part, vectors in said.items():
            centres = self.maps.centres(part, self.patch, self.levels)
            centres = (
                devices.send(c, self.device) if isinstance(c, Tensor) else c for c in centres
            )
            there = label.index_select(0, which)[(slice(None), *centres)]
            weight = (there == 0).unsqueeze(-1) + 1e-6  # without background, of all there is
            old = vectors.index_select(0, which)
            axes = tuple(range(1, there.ndim))
            mean = (old.float() * weight).sum(axes, keepdim=True) / weight.sum(axes, keepdim=True)
            said[part] = vectors.index_copy(
                0, which, mean.to(old.dtype).expand_as(old).contiguous()
            )
        label = label.index_fill(0, which, 0)
        return image, label, None if ignore is None else ignore.index_fill(0, which, False), said

    def _cut(
        self, sample: Mapping[str, Any], grid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Read the box that holds all points of a grid, and resample it: image, label, ignore and
        the teacher's maps.
        """
        # on the CPU: to find the box, nothing waits
        places = mirrored(grid, sample["label"].shape).unbind(-1)
        ends = [place.aminmax() for place in places]
        box = tuple(slice(math.floor(low), math.ceil(high) + 1) for low, high in ends)
        inner = tuple(slice(m, m + p) for m, p in zip(self.margin, self.patch, strict=True))
        grid = torch.stack([place - s.start for place, s in zip(places, box, strict=True)])
        nearest = grid[(slice(None), *inner)].round().long()  # of label and maps alike
        said = {}
        if sample["maps"] is not None:
            pixels = [place + s.start for place, s in zip(nearest, box, strict=True)]
            said = sample["maps"].cut(sample["name"], pixels, self.levels)
            said = {part: devices.send(vectors, self.device) for part, vectors in said.items()}
        grid, nearest = devices.send(grid, self.device), tuple(devices.send(nearest, self.device))

        def read(name: str) -> Tensor:
            part = sample[name][(..., *box)]
            return part if isinstance(part, Tensor) else devices.send(_tensor(part), self.device)

        image = sample_patch(
            (read("image").float() - sample["low"]) / sample["span"], grid.movedim(0, -1)
        )
        label = read("label")[nearest]
        if "ignore" not in sample:  # but other samples may have it
            return image, label, torch.zeros_like(label, dtype=torch.bool), said
        return image, label, read("ignore")[nearest], said
