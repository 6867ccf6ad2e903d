"""All metrics of a pair of label maps, against scikit-image, and against loops over pairs of
objects.
"""

import numpy as np
from skimage.metrics import adapted_rand_error, variation_of_information

from benchmarks.bench import Bench
from benchmarks.scenes import blobs, spoiled, tiled
from gdlib.evaluate.metrics import evaluate

Scores = dict[str, float]


def of_skimage(label: np.ndarray, segmentation: np.ndarray) -> Scores:
    """What scikit-image has of ours."""
    split, merge = variation_of_information(label, segmentation, ignore_labels=(0,))
    return {
        "arand": adapted_rand_error(label, segmentation, ignore_labels=(0,))[0],
        "voi_split": split,
        "voi_merge": merge,
    }


def of_loops(label: np.ndarray, segmentation: np.ndarray) -> Scores:
    """Scores of objects: masks of every label object and of every segment that it meets."""
    truth, found = (np.unique(x[x > 0]) for x in (label, segmentation))
    pairs = []
    for i in truth:
        mask = label == i
        for j in np.unique(segmentation[mask]):
            if j:
                other = segmentation == j
                pairs.append((i, j, (mask & other).sum(), (mask | other).sum()))
    i, j, inner, outer = (np.array(x) for x in zip(*pairs, strict=True))
    iou = inner / outer
    best_of_truth = [max(2 * inner[i == k] / (inner + outer)[i == k], default=0) for k in truth]
    best_of_found = [max(2 * inner[j == k] / (inner + outer)[j == k], default=0) for k in found]
    chosen = {
        k: max((n for n in range(len(pairs)) if i[n] == k), key=lambda n: iou[n], default=None)
        for k in truth
    }
    taken = [n for n in chosen.values() if n is not None]
    union = sum(outer[n] for n in taken) + sum(
        (label == k).sum() for k, n in chosen.items() if n is None
    )
    union += sum((segmentation == k).sum() for k in found if k not in j[taken])
    hits, objects = iou > 0.5, len(truth) + len(found)
    return {
        "aji": sum(inner[n] for n in taken) / union,
        "dice": 2
        * ((label > 0) & (segmentation > 0)).sum()
        / ((label > 0).sum() + (segmentation > 0).sum()),
        "pq": 2 * iou[hits].sum() / objects,
        "sbd": min(np.mean(best_of_truth), np.mean(best_of_found)),
        "dic": abs(len(truth) - len(found)),
        **{f"f1_{t}": 2 * (iou > t / 100).sum() / objects for t in (50, 60, 70, 80, 90)},
        **{
            f"ap_{t}": (iou > t / 100).sum() / (objects - (iou > t / 100).sum())
            for t in (50, 60, 70, 80, 90)
        },
    }


def differ(ours: Scores, theirs: Scores) -> float:
    """Largest difference of a metric that both have."""
    return max(abs(ours[key] - value) for key, value in theirs.items())


def run(bench: Bench) -> None:
    """An image of nuclei and a volume of neurons."""
    nuclei = blobs(bench.pick((520, 696), (260, 348), (64, 80)), bench.pick(120, 60, 12), radius=14)
    neurons = tiled(
        bench.pick((100, 1024, 1024), (32, 256, 256), (8, 64, 64)),
        bench.pick((100, 128, 128), (32, 128, 128), (8, 32, 32)),
        40,
    )
    for name, label, limit in (
        ("a volume of neurons", neurons, 2000),
        ("an image of nuclei", nuclei, 10),
    ):
        pair = label, spoiled(label)
        shape = " x ".join(map(str, label.shape))
        found = bench.compare(
            f"all metrics, {name}",
            lambda p=pair: evaluate(*p),
            lambda p=pair: of_skimage(*p),
            differ=differ,
            tolerance=1e-6,
            about="scikit-image, for ARAND and VOI alone",
            shape=list(label.shape),
            least=2,
        )
        bench.target(f"all metrics, {shape}", found["ms"], limit, unit=" ms")
        bench.target(
            f"against ARAND and VOI of scikit-image, {shape}",
            found["ratio"],
            10,
            at_least=True,
            unit=" x",
        )
    bench.compare(
        "all metrics, an image of nuclei, loops",
        lambda: evaluate(*pair),
        lambda: of_loops(*pair),
        differ=differ,
        tolerance=1e-9,
        about="numpy, masks of every pair of objects that meet, for the metrics of objects",
    )
