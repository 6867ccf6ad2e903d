"""Our HDF5 files as layers of napari: samples, predictions, segmentations, labels of
`gdlib segment`.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gdlib import io
from gdlib.io import outputs

Layer = tuple[np.ndarray, dict[str, Any], str]
MOST = 16  # samples of a file that become layers
# arrays of a sample, and what they become
KINDS = {"image": "image", "label": "labels", "foreground": "image", "affinity": "image"}


def reader(path: str | list[str]) -> Callable[[str | list[str]], list[Layer]] | None:
    """Return a function that reads a file, or None of what we did not write."""
    try:
        with h5py.File(path if isinstance(path, str) else path[0], "r") as file:
            return layers if any(True for _ in _arrays(file)) else None
    except OSError:  # it is no HDF5, or not there: napari will ask others, and say so
        return None


def layers(path: str | list[str]) -> list[Layer]:
    """Return the arrays of our files as layers.

    Raises:
        DataError: a file is damaged.
    """
    found: list[Layer] = []
    for one in [path] if isinstance(path, str) else path:
        with io.open_h5(one) as file:
            arrays = list(_arrays(file))
            names = list(dict.fromkeys(sample for sample, _, _ in arrays))
            for sample, kind, array in arrays:
                if sample in names[:MOST]:
                    found.append(_layer(sample or Path(one).stem, kind, array))
        if len(names) > MOST:
            _say(f"{one}: {len(names)} samples; the first {MOST} are shown")
    return found


def _arrays(file: h5py.File) -> Iterator[tuple[str, str, h5py.Dataset]]:
    """Yield name of the sample, kind and array."""
    for name in sorted(file):
        group = file[name]
        for kind in KINDS:
            if isinstance(group, h5py.Group) and isinstance(group.get(kind), h5py.Dataset):
                yield name, kind, group[kind]
    marked: list[h5py.Dataset] = []

    def add(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and _is_label(item):
            marked.append(item)

    file.visititems(add)
    yield from ((array.name.strip("/"), "label", array) for array in marked)


def _is_label(array: h5py.Dataset) -> bool:
    return str(array.attrs.get(outputs.SOFTWARE, "")).startswith("gdlib ")


def _layer(sample: str, kind: str, array: h5py.Dataset) -> Layer:
    about: dict[str, Any] = {"name": f"{sample} {kind}"}
    values = array[()]
    if kind == "image" and len(values) == 1:
        values = values[0]
    elif kind in ("image", "affinity"):
        about["channel_axis"] = 0
        about["name"] = [f"{sample} {kind} {k + 1}" for k in range(len(values))]
    sides = _sides({**array.parent.attrs, **array.attrs})
    if sides:
        ndim = array.ndim - (kind in ("image", "affinity"))
        about["scale"] = sides[-ndim:]
    return values, about, KINDS[kind]


def _sides(attributes: Mapping[str, Any]) -> list[float]:
    """Return the sides of a voxel in microns, none if they are not known."""
    for key, unit in (("voxel_size_nm", 1e-3), ("resolution", 1e-3), ("element_size_um", 1.0)):
        if key in attributes:
            return [float(side) * unit for side in np.ravel(attributes[key])]
    return []


def _say(text: str) -> None:
    from napari.utils.notifications import show_info

    show_info(text)
