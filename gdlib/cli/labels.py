"""Label files of `gdlib segment`."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io
from gdlib.io import outputs
from gdlib.volumes import zarr_labels
from gdlib.volumes.grid import CHUNK


def write_label(
    target: Path,
    dataset: str | None,
    label: np.ndarray,
    attributes: dict[str, Any],
    mark: str,
    axes: str | None = None,
) -> None:
    """Write a label.

    Args:
        target: TIFF file; HDF5 file, whose other datasets stay, if there is a `dataset`; folder of
            a label of a Zarr image.
        dataset: name in the HDF5 file, or None.
        label: uint32.
        attributes: size of the pixels, as of `gdlib.cli.images.open_image`.
        mark: what the label says of itself.
        axes: a letter per axis, the last of `ZYX` if left out.
    """
    import tifffile

    if "zarr" in attributes:
        zarr_labels.write_label(target, attributes["zarr"], label, mark, axes)
        return
    if dataset is None:
        options = _tiff_options(label.shape, attributes, mark, axes)
        with io.atomic(target) as temporary:
            tifffile.imwrite(temporary, label, **options)
        return
    with outputs.added_h5(target) as file:
        io.put(file, dataset, label, io.BLOCK if label.ndim == 3 else None)
        file[dataset].attrs.update(attributes | {outputs.SOFTWARE: mark})


def write_blocks(
    target: Path,
    dataset: str | None,
    plan: dict[str, Any],
    labels: Path,
    attributes: dict[str, Any],
    mark: str,
) -> None:
    """Write the label of an image that was segmented in blocks: a TIFF of tiles, a dataset whose
    chunks are copied, or OME-Zarr.
    """
    import tifffile

    from gdlib.volumes import jobs

    if "zarr" in attributes:
        zarr_labels.write_blocks(target, attributes["zarr"], plan, labels, mark)
        return
    if dataset is None:
        shape, tile = tuple(plan["shape"]), CHUNK[2]
        options = _tiff_options(shape, attributes, mark, None) | {
            "shape": shape,
            "dtype": np.uint32,
            "tile": tile,
        }
        with io.atomic(target) as temporary:
            tifffile.imwrite(temporary, jobs.tiles(plan, labels, tile), **options)
        return
    with outputs.added_h5(target) as file:
        label = jobs.gathered(plan, labels, file, dataset)
        label.attrs.update(attributes | {outputs.SOFTWARE: mark})


def _tiff_options(
    shape: tuple[int, ...], attributes: dict[str, Any], mark: str, axes: str | None
) -> dict[str, Any]:
    from gdlib.data.calibration import written

    # Of a file that will be compressed, tifffile does not see for itself that it may be too large
    # for a TIFF.
    large = {"bigtiff": 4 * math.prod(shape) >= 2**32}
    return (
        {
            "compression": "zlib",
            "compressionargs": {"level": 1},
            "photometric": "minisblack",
            "software": mark,
        }
        | large
        | written(attributes, shape, axes)
    )
