"""Affinities to instances, against handing the same affinities to the library as they are."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import bioimage_cpp as bic
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage.morphology import remove_small_objects
from skimage.segmentation import relabel_sequential

from benchmarks.bench import Bench
from benchmarks.scenes import OFFSETS, blobs
from gdlib import kernels
from gdlib.evaluate import metrics
from gdlib.segment.parameters import defaults
from gdlib.segment.segmenters import segment


def predictions(
    shape: tuple[int, ...], count: int, seed: int, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a label, and affinities and foreground uint8 as a fair network gives them: blurred
    borders and noise.
    """
    label = blobs(shape, count, seed, radius)
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((count + 1, 16)).astype(np.float32)
    blur = (0.0,) * (len(shape) - 2) + (0.8, 0.8, 0)
    vectors = gaussian_filter(
        directions[label] + rng.standard_normal((*shape, 16), np.float32) * 0.6, blur
    )
    unit = kernels.unit(torch.from_numpy(vectors)[None])
    affinity = kernels.affinities(unit, OFFSETS[len(shape)])[0].clamp(0, 1).numpy()
    foreground = gaussian_filter((label > 0).astype(np.float32), blur[:-1])
    return label, *((255 * x).round().astype(np.uint8) for x in (affinity, foreground))


def plain(affinity: np.ndarray, foreground: np.ndarray, ndim: int, smallest: int) -> np.ndarray:
    """The mutex watershed on all pixels and all edges, then the background and small objects
    away.
    """
    weights = affinity.astype(np.float32) / 255
    weights[ndim:] = 1 - weights[ndim:]
    label = bic.segmentation.mutex_watershed(weights, OFFSETS[ndim], ndim)
    label = np.where(foreground >= 128, label, 0).astype(np.int64)
    return relabel_sequential(remove_small_objects(label, max_size=smallest - 1))[0]


def one(
    offsets: Sequence[Sequence[int]], parameters: dict, case: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Segment one of the cases."""
    return segment(case[1], case[2], offsets, **parameters)


class Worse:
    """How much lower the mean AJI of our labels is; keeps both."""

    def __init__(self, truth: list[np.ndarray]) -> None:
        self.truth = truth
        self.scores: list[float] = []

    def __call__(self, *both: list[np.ndarray]) -> float:
        """Compare two lists of labels."""
        pairs = (zip(self.truth, labels, strict=True) for labels in both)
        self.scores = [
            float(np.mean([metrics.evaluate(*pair)["aji"] for pair in images])) for images in pairs
        ]
        return self.scores[1] - self.scores[0]


def run(bench: Bench) -> None:
    """Some images with as many threads as there are cores, one image, and a volume without
    background.
    """
    threads = os.cpu_count() or 1
    shape = bench.pick((520, 696), (256, 256), (64, 64))
    count = bench.pick(2 * threads, threads, 2)
    images = [predictions(shape, bench.pick(120, 40, 6), seed, 20) for seed in range(count)]
    volume = predictions(
        bench.pick((16, 192, 192), (8, 96, 96), (6, 48, 48)), bench.pick(100, 20, 4), 0, np.inf
    )
    for title, cases, axes, workers, parameters in (
        ("mutex watershed, many images", images, 2, threads, {}),
        ("mutex watershed, one image", images[:1], 2, 1, {}),
        # of the default, 4, the result is another one
        ("mutex watershed, one volume", [volume], 3, 1, {"stride": 1}),
    ):
        smallest = defaults("mutex_watershed", axes)["min_size"]

        def ours(cases=cases, axes=axes, workers=workers, parameters=parameters):
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(partial(one, OFFSETS[axes], parameters), cases))

        def reference(cases=cases, axes=axes, smallest=smallest):
            return [plain(case[1], case[2], axes, smallest) for case in cases]

        worse = Worse([case[0] for case in cases])
        found = bench.compare(
            title,
            ours,
            reference,
            differ=worse,
            tolerance=0.01,
            least=2,
            shape=list(cases[0][0].shape),
            images=len(cases),
            about="bioimage-cpp on all pixels and edges; the difference is how much lower our "
            "AJI is",
        )
        found["aji"], found["reference_aji"] = worse.scores
        bench.target(
            f"{title}, against the plain use of the library",
            found["ratio"],
            5,
            at_least=True,
            unit=" x",
        )
