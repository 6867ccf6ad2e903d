"""Made-up images, labels, embeddings and runs that the groups share.

Everything follows from its seed.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from benchmarks.bench import Bench
from gdlib import io
from gdlib.config import RunSpec
from gdlib.registry import SOURCES

OFFSETS = {
    2: tuple(
        tuple(-step * (axis == k) for k in range(2))
        for step in (1, 3, 5, 9, 27)
        for axis in range(2)
    ),
    3: tuple(
        tuple(-step * (axis == k) for k in range(3))
        for steps in ((1, 1, 1), (2, 3, 3), (3, 9, 9), (4, 27, 27))
        for axis, step in enumerate(steps)
    ),
}
NETWORKS = {
    2: {
        "student": ("resunet", {"widths": [4, 8, 16, 32, 64]}),
        "student for processors": ("leanunet", {}),
        "teacher": ("resunet", {"widths": [32, 64, 179, 349, 680]}),
    },
    3: {
        "student": ("resunet3d", {"widths": [4, 8, 16, 24, 32]}),
        "student for processors": ("leanunet3d", {}),
        "teacher": ("resunet3d", {"widths": [32, 64, 128, 256, 512]}),
    },
}
_FOLDER = TemporaryDirectory(prefix="gdlib-bench-")


def folder() -> Path:
    """Return a folder that is removed when the process ends."""
    return Path(_FOLDER.name)


def blobs(
    shape: Sequence[int], count: int, seed: int = 0, radius: float | None = None
) -> np.ndarray:
    """Return a label ([Z,] Y, X) uint32 of `count` objects: what is nearest to each of as many
    points, and not too far.

    Args:
        shape: in pixels.
        count: of objects.
        seed: of the points.
        radius: largest distance from the point, in pixels; by default objects fill a bit less than
            the half of the image.
    """
    rng = np.random.default_rng(seed)
    points = np.unravel_index(rng.choice(int(np.prod(shape)), count, replace=False), shape)
    away = np.ones(shape, bool)
    away[points] = False
    ids = np.zeros(shape, np.uint32)
    ids[points] = np.arange(1, count + 1)
    distance, nearest = distance_transform_edt(away, return_indices=True)
    if radius is None:
        radius = 0.5 * (np.prod(shape) / count) ** (1 / len(shape))
    return np.where(distance <= radius, ids[tuple(nearest)], 0).astype(np.uint32)


def tiled(shape: Sequence[int], tile: Sequence[int], count: int, seed: int = 0) -> np.ndarray:
    """Return a large label made of copies of one of `blobs`, each with ids of its own."""
    part = blobs(tile, count, seed)
    out = np.zeros(shape, np.uint32)
    for number, corner in enumerate(
        np.ndindex(*(n // t for n, t in zip(shape, tile, strict=True)))
    ):
        box = tuple(slice(c * t, (c + 1) * t) for c, t in zip(corner, tile, strict=True))
        out[box] = np.where(part > 0, part + number * count, 0)
    return out


def spoiled(label: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a label with mistakes, as if segmented: moved borders, a tenth of the objects merged,
    a tenth cut in two.
    """
    out = np.roll(label, range(label.ndim), range(label.ndim)).astype(np.int64)
    count = int(out.max())
    rng = np.random.default_rng(seed)
    new = np.arange(count + 1)
    merged = rng.choice(np.arange(1, count), count // 10, replace=False)
    new[merged] = merged + 1
    cut = np.zeros(count + 1, bool)
    cut[rng.choice(np.arange(1, count + 1), count // 10, replace=False)] = True
    half = np.arange(label.shape[-1]) // 8 % 2 == 0
    return np.where(cut[out] & half, new[out] + count, new[out]).astype(np.uint32)


def embeddings(labels: np.ndarray, channels: int, noise: float, seed: int) -> Tensor:
    """Return raw pixel vectors (B, D, [Z,] Y, X) float32: one direction for every object of every
    image, and noise.
    """
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((int(labels.max()) + 1, channels), np.float32)
    vectors = directions[labels] + noise * rng.standard_normal(
        (*labels.shape, channels), np.float32
    )
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(vectors, -1, 1)))


@cache
def samples(source: str, size: tuple[int, ...], count: int) -> Path:
    """Return a samples file of a phantom of the catalogue."""
    option = {"nuclei_phantom": "images", "neurites_phantom": "volumes"}[source]
    counts = {"train": count, "val": 1, "test": 1}
    splits = SOURCES.get(source)(None, size=size, **{option: counts})
    path = folder() / f"{source}-{'x'.join(map(str, size))}-{count}.h5"
    io.write_samples(path, splits["train"])
    return path


def trainings(bench: Bench) -> dict[str, tuple[tuple[int, ...], int, Path]]:
    """Return for 2D and 3D the patch, the batch and the samples that training is measured with."""
    nuclei = bench.pick(((256, 256), 8), ((256, 256), 4), ((64, 64), 2))
    neurites = bench.pick(((24, 112, 112), 1), ((24, 112, 112), 1), ((8, 40, 40), 1))
    return {
        "2D": (bench.pick((128, 128), (64, 64), (32, 32)), 8, samples("nuclei_phantom", *nuclei)),
        "3D": (
            bench.pick((12, 96, 96), (8, 64, 64), (6, 32, 32)),
            2,
            samples("neurites_phantom", *neurites),
        ),
    }


def spec(
    ndim: int, patch: Sequence[int], batch_size: int, terms: Sequence[dict] = (), **recipe: Any
) -> RunSpec:
    """Return what the training of the small student on phantoms needs to know.

    The rest is the catalogue's.
    """
    model, options = NETWORKS[ndim]["student"]
    # patches of noise are none that another way to cut them would have
    nuclei = {"augment": {"empty": 0.0}}
    neurons = {
        "augment": {
            "geometry": {"scale": [0.9, 1.1], "elastic": 2.0, "rotate": 15, "misalign": 6},
            "intensity": {"blur": 0.0, "noise": 0.03},
            "sections": {
                "contrast": 0.15,
                "brightness": 0.08,
                "blur": 2.0,
                "motion": 7,
                "missing": 0.03,
            },
        }
    }
    return RunSpec.model_validate(
        {
            "dataset": "phantom",
            "network": "student",
            "method": "bench",
            "seed": 0,
            "model": model,
            "options": options,
            "channels": 1,
            "offsets": OFFSETS[ndim],
            "normalisation": {},
            "targets": {}
            if ndim == 2
            else {"background_connected": False, "per_offset": True, "border": 1},
            "segmenters": ["mutex_watershed"],
            "recipe": {
                "steps": 10,
                "batch_size": batch_size,
                "patch": list(patch),
                "validate_every": 10**6,
                "validate_images": 1,
                "save_every": 10**6,
                **(nuclei if ndim == 2 else neurons),
                **recipe,
            },
            "terms": list(terms),
        }
    )


def roof(bench: Bench) -> None:
    """Time a large product of matrices: what no network can be faster than."""
    n = bench.pick(2048, 1024, 128) * (4 if bench.device.type == "cuda" else 1)
    a, b = (
        torch.rand(n, n, device=bench.device).to(getattr(torch, bench.precision)) for _ in range(2)
    )
    found = bench.compare(
        "a product of matrices", lambda: a @ b, about="the most operations per second", shape=[n, n]
    )
    found.update({"precision": bench.precision, "gflop_per_s": 2e-6 * n**3 / found["ms"]})


def bare_step(bench: Bench, ndim: int, image: Sequence[int]) -> Any:
    """Return a call that makes one step of the small student alone: forward, backward and
    optimizer, no loss and no data.

    Args:
        bench: says on which device.
        ndim: number of axes.
        image: (B, 1, [Z,] Y, X).
    """
    from gdlib.models import build

    torch.manual_seed(0)
    model, options = NETWORKS[ndim]["student"]
    layout = torch.channels_last if ndim == 2 else torch.channels_last_3d
    network = build(model, options).to(bench.device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    dtype = getattr(torch, bench.precision)
    x = torch.rand(*image, device=bench.device).contiguous(memory_format=layout)
    gradients: list[Tensor] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
            output = network(x)
        outputs = [output.embedding, output.foreground]
        if not gradients:
            gradients.extend(torch.randn_like(part) / part.numel() for part in outputs)
        torch.autograd.backward(outputs, gradients)
        optimizer.step()

    return step
