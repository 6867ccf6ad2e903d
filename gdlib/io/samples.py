"""Images with their ground truth, and what else is kept per image."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gdlib.io.failures import DataError
from gdlib.io.failures import WriteError as WriteError
from gdlib.io.hdf5 import BLOCK, create_h5, open_h5, put


@dataclass(frozen=True)
class Sample:
    """One image with its ground truth, if there is any.

    Attributes:
        id: unique name within the dataset.
        image: (C, [Z,] Y, X), uint8, uint16 or float32, intensities as recorded.
        label: ([Z,] Y, X) uint32 instance map, 0 = background; None of an unlabelled image.
        ignore: ([Z,] Y, X) bool, True where the label is not known: such voxels count neither in a
            loss nor in a metric. None if every voxel counts.
        attrs: what a reader may want to know: `source` (file name), `voxel_size_nm` (one number per
            axis, Z, Y, X).
    """

    id: str
    image: np.ndarray
    label: np.ndarray | None
    ignore: np.ndarray | None = None
    attrs: dict[str, Any] = field(default_factory=dict)


def write_samples(path: Path | str, samples: Iterable[Sample], **attrs: Any) -> int:
    """Write one split and return how many samples it has."""
    count = 0
    with create_h5(path, **attrs) as file:
        for sample in samples:
            group = file.create_group(sample.id)
            block = BLOCK if sample.image.ndim - 1 == len(BLOCK) else None
            put(group, "image", sample.image, block)
            if sample.label is not None:
                put(group, "label", sample.label.astype(np.uint32, copy=False), block)
            if sample.ignore is not None:
                put(group, "ignore", sample.ignore, block)
            for key, value in sample.attrs.items():
                group.attrs[key] = value
            count += 1
    return count


def read_samples(path: Path | str, ids: Iterable[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of a split in the order of their names, one in memory at a time."""
    with open_h5(path) as file:
        for name in sorted(file) if ids is None else ids:
            group = file[name]
            if not isinstance(group, h5py.Group) or not {"image", "label"} <= set(group):
                raise DataError(
                    f'{path}: "{name}" has no image and label, so this is no samples file; give one'
                )
            arrays = {key: group[key][()] for key in ("image", "label", "ignore") if key in group}
            attrs = {
                key: v.tolist() if isinstance(v, np.ndarray) else v
                for key, v in group.attrs.items()
            }
            yield Sample(name, **arrays, attrs=attrs)


def sample_ids(path: Path | str) -> list[str]:
    """Return the names of the samples of a file, sorted."""
    with open_h5(path) as file:
        return sorted(file)


def read_array(path: Path | str, sample: str, name: str) -> np.ndarray:
    """Return one dataset of one sample, e.g. `read_array(path, "a01", "label")`."""
    with open_h5(path) as file:
        if f"{sample}/{name}" not in file:
            raise DataError(
                f'{path}: there is no "{name}" of sample "{sample}"; make the file again'
            )
        return file[sample][name][()]


def read_attrs(path: Path | str) -> dict[str, Any]:
    """Return the file attributes, JSON decoded where it is JSON."""
    with open_h5(path) as file:
        return {key: _decode(value) for key, value in file.attrs.items()}


def _decode(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(("[", "{")):
        return json.loads(value)
    return value
