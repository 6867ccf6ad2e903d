"""Trivial segmentations, to be beaten before a number means anything: no network, no training,
nothing tuned.

`BASELINES`, the dict at the end of this file, names them; a new one is a function from a sample to
a label ([Z,] Y, X) uint32, 0 = background, and one entry there.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.filters import threshold_otsu
from skimage.measure import label as connected_regions
from skimage.morphology import local_maxima
from skimage.segmentation import watershed

from gdlib import io
from gdlib.evaluate import scores


def one_segment(sample: io.Sample) -> np.ndarray:
    """Everything is one object: nothing split, all merged."""
    return np.ones(sample.label.shape, np.uint32)


def sections(sample: io.Sample) -> np.ndarray:
    """Every section of a volume is one object."""
    numbers = np.arange(1, len(sample.label) + 1, dtype=np.uint32)
    return np.broadcast_to(numbers[:, None, None], sample.label.shape)


def true_sections(sample: io.Sample) -> np.ndarray:
    """The ground truth cut apart at every section: a perfect segmentation in 2D that is never
    linked.
    """
    out = np.zeros(sample.label.shape, np.uint32)
    count = 0
    for section, cut in zip(sample.label, out, strict=True):
        cut[:] = connected_regions(section, background=0, connectivity=1)
        objects = int(cut.max(initial=0))
        cut[cut > 0] += count
        count += objects
    return out


def image_watershed(sample: io.Sample, smoothing: float = 2.0, rounding: float = 6.0) -> np.ndarray:
    """Seeded watershed on the smoothed image; objects are brighter than what separates them.

    What is above Otsu's threshold is inside objects, and seeds are where the distance to the rest,
    itself smoothed, is highest. If the inside is more than half of the image then the rest is taken
    for membranes, which are shared out, else for background.

    Args:
        sample: its attribute `voxel_size_nm`, if there is one, says how much higher than wide a
            voxel is.
        smoothing: standard deviation of the filter of the image, in voxels of the axis on which
            they are smallest.
        rounding: the same for the distance; more gives fewer and larger objects.

    Returns:
        ([Z,] Y, X) uint32, 0 = background.
    """
    size = np.array(sample.attrs.get("voxel_size_nm", (1.0,) * sample.label.ndim), float)
    size /= size.min()
    image = gaussian_filter(sample.image.mean(0, dtype=np.float32), smoothing / size)
    inside = image > threshold_otsu(image)
    distance = distance_transform_edt(inside, sampling=size).astype(np.float32)
    seeds = connected_regions(local_maxima(gaussian_filter(distance, rounding / size)) & inside)
    return watershed(-image, seeds, mask=None if inside.mean() > 0.5 else inside).astype(np.uint32)


def evaluate_baselines(path: Path | str) -> list[tuple[str, str, str, float]]:
    """Compute every metric of every baseline that makes sense for the samples.

    Args:
        path: samples `.h5`.

    Returns:
        Rows of baseline, sample, metric or count (see `gdlib.evaluate.scores`) and value.
    """
    rows = []
    for sample in io.read_samples(path):
        for name, (_, baseline) in BASELINES.items():
            if name in OF_VOLUMES and sample.label.ndim == 2:
                continue
            found = scores.of_image(sample.label, baseline(sample), sample.ignore)
            rows += [(name, sample.id, key, value) for key, value in found.items()]
    return rows


BASELINES: dict[str, tuple[str, Callable[[io.Sample], np.ndarray]]] = {
    "one_segment": ("one segment", one_segment),
    "sections": ("every section one segment", sections),
    "image_watershed": ("watershed of the image", image_watershed),
    "true_sections": ("true sections, not linked", true_sections),
}
OF_VOLUMES = ("sections", "true_sections")
