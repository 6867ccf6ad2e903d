"""How cost grows: with the area of images, instances, the memory bank, the batch and the volume.

And what fits into 24 GiB.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.bench import Bench, slope, synchronise, with_peak
from benchmarks.losses import TERMS, Ours, Scene
from benchmarks.scenes import NETWORKS, OFFSETS, bare_step, blobs, spoiled
from benchmarks.segmentation import predictions
from gdlib.evaluate.metrics import evaluate
from gdlib.models import build
from gdlib.predict.predictor import Predictor
from gdlib.segment.segmenters import segment

MEMORY = 24 * 1024  # MiB
Make = Callable[[Any], Callable[[], Any]]  # from a size to what is timed


def losses(bench: Bench, shape: Sequence[int], **scene: Any) -> Callable[[], Any]:
    """Return a call of all terms that brings back its memory first, which costs microseconds."""
    ours = Ours(Scene(shape, **scene).to(bench.device), tuple(TERMS), pool=1)

    def call() -> Any:
        ours.prepare()
        return ours()

    return call


def grow(
    bench: Bench, name: str, axis: str, expected: float, sizes: Sequence[float], make: Make
) -> None:
    """Time a call at several sizes in turns, and fit the exponent of its cost."""
    calls = [make(size) for size in sizes]
    times: list[list[float]] = [[] for _ in sizes]
    for round_ in range(bench.pick(6, 4, 2)):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            synchronise(bench.device)
            if round_ > 0:  # the first warms up
                found.append(1e3 * (time.perf_counter() - start))
    amounts = [float(np.prod(size)) for size in sizes]
    medians = [float(np.median(found)) for found in times]
    bench.add(
        name,
        times[-1],
        about=f"exponent of the cost by {axis}",
        axis=axis,
        expected=expected,
        slope=slope(amounts, medians),
        sizes=[np.atleast_1d(size).tolist() for size in sizes],
        ms_by_size=medians,
    )


def fits(
    bench: Bench, name: str, unit: str, sizes: Sequence[float], make: Make, about: str
) -> None:
    """Find how much memory a unit takes, and how many units 24 GiB hold."""
    peaks = []
    for size in sizes:
        call = make(size)
        call()
        start = time.perf_counter()
        peaks.append(with_peak(call, bench.device)[1])
        ms = 1e3 * (time.perf_counter() - start)
    if None in peaks:  # a system that does not tell
        return
    each = max((peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0]), 1e-6)
    most = (MEMORY - peaks[0]) / each + sizes[0]
    bench.add(
        name,
        [ms],
        peak_mib=peaks[-1],
        about=about,
        mib_per_unit=each,
        unit=unit,
        most_in_24_gib=most,
    )


def run(bench: Bench) -> None:
    """Losses, network, segmentation and metrics; then memory."""
    sides = bench.pick((136, 272, 544), (64, 128, 256), (32, 48))
    middle = sides[1]
    areas = [(side, side) for side in sides]
    memory = bench.pick(12, 12, 3)

    def terms(axis: str, expected: float, sizes: Sequence[Any], make: Make) -> None:
        grow(bench, f"losses by {axis}", axis, expected, sizes, make)

    counts, banks = bench.pick(
        ((8, 32, 128, 512), (2, 8, 32, 128)), ((8, 32, 128), (2, 8, 32)), ((4, 8), (2, 4))
    )
    batches = bench.pick((2, 4, 8), (2, 4), (2, 3))
    small, half = areas[0], (middle // 2, middle // 2)
    terms("image area", 1, areas, lambda shape: losses(bench, shape, memory=memory))
    terms("instances", 0, counts, lambda n: losses(bench, areas[1], instances=n, memory=memory))
    terms("images in memory", 0, banks, lambda n: losses(bench, half, memory=n))
    terms("batch", 1, batches, lambda n: losses(bench, small, batch=n, memory=memory))

    model, options = NETWORKS[2]["student"]
    header = {"channels": 1, "normalisation": {"lower": 1.0, "upper": 99.8}}
    rng = np.random.default_rng(0)

    def predict(
        shape: Sequence[int], network: tuple, block: Sequence[int] | None = None
    ) -> Callable[[], Any]:
        torch.manual_seed(0)
        about = header | {"offsets": OFFSETS[len(shape)]}
        predictor = Predictor(
            build(*network), about, device=bench.device, precision=bench.precision, block=block
        )
        image = rng.integers(0, 255, (1, *shape), np.uint8)
        return lambda: predictor(image)

    grow(
        bench,
        "prediction by image area",
        "image area",
        1,
        areas,
        lambda s: predict(s, (model, options)),
    )
    # of several blocks: a single one has no overlap
    depths = bench.pick((64, 128, 256), (16, 32), (4, 8))
    width, block = bench.pick((128, (16, 128, 128)), (64, (8, 64, 64)), (16, (4, 16, 16)))
    volumes = [(depth, width, width) for depth in depths]
    grow(
        bench,
        "prediction by volume, block by block",
        "volume",
        1,
        volumes,
        lambda s: predict(s, NETWORKS[3]["student"], block),
    )

    def instances(shape: Sequence[int]) -> Callable[[], Any]:
        _, affinity, foreground = predictions(
            tuple(shape), max(2, int(np.prod(shape)) // 3000), 0, 20
        )
        return lambda: segment(affinity, foreground, OFFSETS[2])

    grow(bench, "segmentation by image area", "image area", 1, areas, instances)

    def scores(shape: Sequence[int]) -> Callable[[], Any]:
        label = blobs(shape, max(12, int(np.prod(shape)) // 3000))
        found = spoiled(label)
        return lambda: evaluate(label, found)

    large = [(2 * n, 2 * n) for n in sides]
    grow(bench, "metrics by image area", "image area", 1, large, scores)

    batches = bench.pick((2, 4), (2, 3), (1, 2))
    shape = bench.pick((512, 688), (256, 256), (32, 32))

    def step(batch: int) -> Callable[[], Any]:
        network = bare_step(bench, 2, (batch, 1, *shape))
        terms = losses(bench, shape, batch=batch, memory=2)
        return lambda: (network(), terms())

    fits(
        bench,
        "training on images of BBBC039",
        "images in a batch",
        batches,
        step,
        "a step of the small student, then all terms on embeddings of student and teacher; "
        "linear in the batch",
    )
    sizes = [np.prod(volume) / 2**20 for volume in volumes[-2:]]
    fits(
        bench,
        "prediction of a volume in memory",
        "2^20 voxels",
        sizes,
        lambda size: predict(
            (round(size * 2**20 / width**2), width, width), NETWORKS[3]["student"], block
        ),
        "image, affinities and foreground in memory, network block by block; gdlib reads "
        "larger volumes from disk",
    )
