"""Labels as OME-Zarr: in the folder of their image, or in one of their own."""

import itertools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io
from gdlib.data.omezarr import SUFFIX, Level, ZarrImage, library, open_zarr, split_zarr_path
from gdlib.io import outputs
from gdlib.volumes import jobs

CHUNK = {2: (1024, 1024), 3: (64, 128, 128)}  # pixels of a file, along the last axes
VERSION = {2: "0.4", 3: "0.5"}  # of OME-Zarr, by that of Zarr
LABELS = "labels"  # group of an image that has them


def target(path: str, out: Path, name: str) -> Path:
    """Return the folder of the label of an image.

    Args:
        path: of the image.
        out: a folder for labels; or `image.zarr:labels/NAME`, which puts them into the image.
        name: of labels in an image, where `out` is `image.zarr` alone.

    Raises:
        DataError: `out` is in another Zarr folder, or no place for labels.
    """
    root, inner = split_zarr_path(path) or (Path(path), "")
    place = split_zarr_path(out)
    if place is None:
        parts = [root.name.removesuffix(root.suffix), *filter(None, inner.split("/"))]
        return out / f"{'_'.join(parts)}{SUFFIX}"
    into, where = place
    if into.resolve() != root.resolve():
        raise io.DataError(
            f"{out}: this is a Zarr folder, but not that of {path}; put labels into their own "
            "image, or choose a folder that is none for --out"
        )
    image = open_zarr(path)
    group, _, own = f"/{where or f'{LABELS}/{name}'}".rpartition(f"/{LABELS}/")
    if not own or "/" in own or not image.levels or group.strip("/") not in ("", image.group):
        raise io.DataError(
            f"{out}: labels of this image cannot be put there; say --out "
            f"{root}:{LABELS}/NAME, or choose a folder that is no Zarr"
            if image.levels
            else f"{out}: {path} has no metadata of OME-Zarr, so labels cannot be put beside it; "
            "choose a folder that is no Zarr for --out"
        )
    return Path(into, image.group, LABELS, own)


def output(folder: Path, mark: str) -> outputs.Output:
    """Return the label for a check; no folder is replaced that is not a label of OME-Zarr."""
    image = mark.partition(", ")[2]
    return outputs.Output(
        folder,
        lambda path: str(_attributes(path).get(outputs.SOFTWARE)).endswith(image),
        is_kind=lambda path: "image-label" in _ome(_attributes(path)),
    )


def of_volume(folder: Path) -> outputs.Output:
    """Return the label of a volume of many jobs for a check, the same."""
    return outputs.Output(
        folder,
        lambda path: "weights_sha256" in _attributes(path).get("gdlib", {}),
        is_kind=lambda path: "image-label" in _ome(_attributes(path)),
    )


def write_label(
    folder: Path, image: ZarrImage, label: np.ndarray, mark: str, axes: str | None = None
) -> None:
    """Write a label.

    Args:
        folder: see `target`.
        image: of which it is.
        label: uint32.
        mark: what the label says of itself.
        axes: a letter per axis, the last of `ZYX` if left out.
    """
    _write(folder, image, [(..., label)], label.shape, axes, mark)


def write_blocks(
    folder: Path,
    image: ZarrImage,
    plan: Mapping[str, Any],
    labels: Path,
    mark: str,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the label of an image that was segmented in blocks, block by block; `about` becomes the
    attribute `gdlib`.
    """
    _write(folder, image, jobs.parts(plan, labels), plan["shape"], None, mark, about)


def _write(
    folder: Path,
    image: ZarrImage,
    parts: Iterable[tuple[Any, np.ndarray]],
    shape: Sequence[int],
    letters: str | None,
    mark: str,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write a pyramid: the parts into the level of the image, and the others, each pixel that of
    the nearest centre, from the one before.
    """
    zarr, inside = library(folder), folder.parent.name == LABELS and image.root in folder.parents
    axes, levels = _geometry(image, shape, letters or "ZYX"[-len(shape) :])
    first = image.level
    if not inside:
        levels, first = levels[first:], 0
    with io.atomic_folder(folder) as temporary:
        group = zarr.create_group(store=str(temporary), zarr_format=image.zarr_format)
        arrays = [_created(group, str(k), level, axes) for k, level in enumerate(levels)]
        for box, part in parts:
            if box is ...:
                arrays[first][...] = part.reshape(levels[first].shape)
            else:  # there is one frame
                arrays[first][(0,) * (len(axes) - len(box)) + tuple(box)] = part
        for k in range(first + 1, len(arrays)):
            _resample(arrays[k - 1], arrays[k])
        for k in reversed(range(first)):
            _resample(arrays[k + 1], arrays[k])
        about = {"multiscales": [_multiscale(folder.stem, axes, levels)]}
        about["image-label"] = {"source": {"image": "../../"}} if inside else {}
        group.attrs.update({**_versioned(about, image.zarr_format), outputs.SOFTWARE: mark})
        if more:
            group.attrs.update({"gdlib": dict(more)})
    if inside:
        _list(zarr, image, folder.name)


def _geometry(
    image: ZarrImage, shape: Sequence[int], letters: str
) -> tuple[list[dict[str, Any]], list[Level]]:
    """Return axes and levels of a label: those of its image but for channels, in the order TZYX."""
    if not image.levels:
        axes = [{"name": a.lower(), "type": "time" if a == "T" else "space"} for a in letters]
        count = len(shape)
        return axes, [Level(tuple(shape), (1.0,) * count, (0.0,) * count)]
    kept = [image.letters.index(axis) for axis in "TZYX" if axis in image.letters]

    def of(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[place] for place in kept)

    levels = [Level(of(one.shape), of(one.scale), of(one.translation)) for one in image.levels]
    return list(of(image.axes)), levels


def _created(group: Any, name: str, level: Level, axes: Sequence[dict[str, Any]]) -> Any:
    largest = CHUNK[3 if "z" in [axis["name"].lower() for axis in axes] else 2]
    sides = (1,) * (len(axes) - len(largest)) + largest
    options: dict[str, Any] = {"dimension_names": [axis["name"] for axis in axes]}
    if group.metadata.zarr_format == 2:
        options = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    chunks = tuple(min(pair) for pair in zip(sides, level.shape, strict=True))
    return group.create_array(name, shape=level.shape, dtype="uint32", chunks=chunks, **options)


def _resample(source: Any, target: Any) -> None:
    """Fill a level from another one, chunk by chunk."""
    nearest = [
        ((np.arange(n) + 0.5) * m / n).astype(np.intp)
        for n, m in zip(target.shape, source.shape, strict=True)
    ]
    cuts = (range(0, n, side) for n, side in zip(target.shape, target.chunks, strict=True))
    for corner in itertools.product(*cuts):
        box = tuple(slice(k, k + side) for k, side in zip(corner, target.chunks, strict=True))
        taken = [index[part] for index, part in zip(nearest, box, strict=True)]
        label = source[tuple(slice(index[0], index[-1] + 1) for index in taken)]
        for axis, index in enumerate(taken):
            label = label.take(index - index[0], axis)
        target[box] = label


def _multiscale(
    name: str, axes: Sequence[dict[str, Any]], levels: Sequence[Level]
) -> dict[str, Any]:
    datasets = []
    for k, level in enumerate(levels):
        moves: list[dict[str, Any]] = [{"type": "scale", "scale": list(level.scale)}]
        if any(level.translation):
            moves.append({"type": "translation", "translation": list(level.translation)})
        datasets.append({"path": str(k), "coordinateTransformations": moves})
    return {"name": name, "axes": list(axes), "datasets": datasets}


def _versioned(about: dict[str, Any], zarr_format: int) -> dict[str, Any]:
    version = VERSION[zarr_format]
    if zarr_format == 3:
        return {"ome": {"version": version, **about}}
    about["multiscales"][0]["version"] = about["image-label"]["version"] = version
    return about


def _list(zarr: Any, image: ZarrImage, name: str) -> None:
    """Add a label to the list that the group of an image's labels keeps."""
    store, path = str(image.root), f"{image.group}/{LABELS}".strip("/")
    group = zarr.open_group(store=store, path=path, mode="a", zarr_format=image.zarr_format)
    ome = _ome(group.attrs.asdict())
    if name not in ome.get(LABELS, []):
        names = [*ome.get(LABELS, []), name]
        new = {"ome": {"version": VERSION[3], **ome, LABELS: names}}
        group.attrs.update(new if image.zarr_format == 3 else {LABELS: names})
    # a list of all that is in a folder, which some programs make, would not have it
    if zarr.open_group(store=store, mode="r").metadata.consolidated_metadata is not None:
        with warnings.catch_warnings(action="ignore"):  # not in the specification of Zarr 3
            zarr.consolidate_metadata(store)


def _attributes(folder: Path) -> dict[str, Any]:
    """Return the attributes of a group, none of what is no group."""
    for name, key in (("zarr.json", "attributes"), (".zattrs", None)):
        try:
            found = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            continue
        found = found.get(key) if key and isinstance(found, dict) else found
        return found if isinstance(found, dict) else {}
    return {}


def _ome(attributes: dict[str, Any]) -> dict[str, Any]:
    found = attributes.get("ome")
    return found if isinstance(found, dict) else attributes
