"""Volumes that no machine holds: every block is a job of its own, and blocks are joined where they
overlap.

| step | once per | reads | writes | holds in memory |
|---|---|---|---|---|
| plan | volume | the image, slab by slab | `plan.json` | a slab |
| predict | block | the image, as far as the network sees | `predictions/<block>.h5` | a pass, |
| | | | | the block's output |
| segment | block | predictions, of `overlap` pixels | `segments/<block>.h5` | the block |
| | | around it too | | with its overlap |
| match | block | labels where it overlaps the next blocks | `matches/<block>.h5` | an overlap |
| number | volume | sizes, matches and contacts, no pixels | `numbers.h5` | some 100 bytes |
| | | | | per segment |
| relabel | block | its labels | `labels/<block>.h5` | the block |
| join | volume | the labels of all blocks, as they are compressed | `labels.h5` | a chunk |

Predictions of a block are those of the whole volume (see `gdlib.predict.predictor`), so only the
cuts of the segmentation can differ from what one piece would give. Segments of neighbouring blocks
that are the same region where both look attract each other, by the area in which they cross the
face; segments of one block that touch repel each other, by the area in which they do: that block
saw a boundary there. Objects are what the multicut of this graph makes of it: one block that joins
two neurons by mistake does not join what all others keep apart. `min_fragment` is applied in
blocks, to segments that no block border cuts, `min_size` to whole objects. Nothing depends on the
order in which jobs run, all files are written atomically, and each says for which plan and settings
it was made: a stale one is an error, never a part of a result.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gdlib import __version__, io
from gdlib.boxes import Box, absolute, intersection, relative
from gdlib.data.files import open_volume
from gdlib.data.intensity import working_type
from gdlib.data.omezarr import open_zarr
from gdlib.io import outputs
from gdlib.segment import segmenters
from gdlib.segment.parameters import checked
from gdlib.volumes.grid import Grid, identity, open_array
from gdlib.volumes.stitch import contacts, divided, same, without_fragments

COMPRESSION = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "track_times": False}
SLAB = 2**24  # pixels of a volume that are in memory at once when it is written as TIFF


def plan(image: str, weights: Path, out: Path, *, block: Sequence[int], segmenter: str) -> None:
    """Write what all predictions have in common: the grid, the intensities of the whole volume, the
    network.

    Args:
        image: `volume.h5:dataset` or `volume.zarr`, ([Z,] Y, X) or (C, [Z,] Y, X).
        weights: of the network.
        out: `plan.json`.
        block: see `Grid`.
        segmenter: only the affinities that it uses are predicted.
    """
    from gdlib.predict.predictor import Predictor

    checked(segmenter, {})
    Grid(tuple(block), tuple(block), (0,) * len(block))
    predictor = Predictor.load(weights, device="cpu")
    if predictor.network.halo is None:
        raise ValueError(
            f"{weights}: every pixel of this network sees the whole image, so it cannot be cut; "
            "choose another"
        )
    with open_array(image) as volume:
        try:
            source = predictor.source(volume)
        except io.DataError as error:
            raise io.DataError(f"{image}: {error}") from None
        content = {
            "image": image,
            "identity": identity(volume),
            "weights_sha256": io.sha256(weights),
            **planned(predictor, source, block, segmenter),
        }
    io.write_text(out, json.dumps(content, indent=2) + "\n")


def planned(predictor: Any, source: Any, block: Sequence[int], segmenter: str) -> dict[str, Any]:
    """Return what a plan says of an image, but for which file it is and which the weights are.

    Args:
        predictor: see `gdlib.predict.predictor`.
        source: the image.
        block: see `Grid`.
        segmenter: only the affinities that it uses are predicted.
    """
    low, high = source.range
    return {
        "shape": list(source.shape),
        "block": list(block),
        "range": [low.tolist(), high.tolist()],
        "segmenter": segmenter,
        "offsets": segmenters.used(segmenter, predictor.header["offsets"]),
        "gdlib": __version__,
    }


def predict(
    plan: Mapping[str, Any],
    name: str,
    weights: Path,
    out: Path,
    *,
    device: str = "auto",
    passes: Any = None,
) -> None:
    """Predict a block: `affinity` (K, [Z,] Y, X) and `foreground` ([Z,] Y, X), uint8, as of the
    whole volume.

    Args:
        plan: content of `plan.json`.
        name: of the block.
        weights: of the network.
        out: file of the block.
        device: name, or `auto`.
        passes: largest sides that go through the network at once (see `Predictor`).
    """
    from gdlib.predict.predictor import Predictor

    if io.sha256(weights) != plan["weights_sha256"]:
        raise io.DataError(f"{weights}: these are not the weights of the plan; make the plan again")
    predictor = Predictor.load(weights, device=device, block=passes)
    predictor.ask_for(plan["offsets"])
    with open_array(plan["image"]) as volume:
        if identity(volume) != plan["identity"]:
            raise io.DataError(
                f"{plan['image']}: the file has changed since the plan was made; "
                "make the plan again"
            )
        source = predictor.source(volume)
        source.range = tuple(np.array(plan["range"], working_type(volume.dtype)))
        predict_with(predictor, source, plan, name, out)


def predict_with(
    predictor: Any, source: Any, plan: Mapping[str, Any], name: str, out: Path
) -> None:
    """Predict a block, see `predict`, with a predictor that has the offsets of the plan, and an
    open image with its range.
    """
    from gdlib.blockwise.blocks import assembled

    core = _grid(plan).core(name)
    sides = tuple(s.stop - s.start for s in core)
    try:
        parts = (
            (box, predictor.predict(source, absolute(box, core))) for box in predictor.blocks(sides)
        )
        prediction = assembled(sides, parts)
    except io.DataError as error:
        raise io.DataError(f"{plan['image']}: block {name}: {error}") from None
    with io.create_h5(out, made_for=_fingerprint(plan)) as file:
        block = io.BLOCK if len(sides) == 3 else None
        io.put(file, "affinity", prediction.affinity, block)
        io.put(file, "foreground", prediction.foreground, block)


def segment(
    plan: Mapping[str, Any], name: str, predictions: Path, out: Path, settings: Mapping[str, Any]
) -> None:
    """Segment a block with its overlap.

    Writes `label` uint32, consecutive, of the block with its overlap; of the block's own pixels
    `size`, how many each label has, and `contacts` (n, 3): two labels, and the area in which they
    touch.

    Args:
        plan: content of `plan.json`.
        name: of the block.
        predictions: folder of the predicted blocks.
        out: file of the block.
        settings: `overlap`, and `parameters` of the segmenter.
    """
    grid = _grid(plan, settings["overlap"])
    around, core = grid.around(name), grid.core(name)
    sides = tuple(s.stop - s.start for s in around)
    affinity, foreground = (
        np.empty((len(plan["offsets"]), *sides), np.uint8),
        np.empty(sides, np.uint8),
    )
    for other in grid.touching(name):
        theirs = grid.core(other)
        shared = intersection(around, theirs)
        with _opened(predictions / f"{other}.h5", _fingerprint(plan)) as file:
            affinity[(slice(None), *relative(shared, around))] = file["affinity"][
                (slice(None), *relative(shared, theirs))
            ]
            foreground[relative(shared, around)] = file["foreground"][relative(shared, theirs)]
    parameters = dict(settings["parameters"])
    min_fragment = parameters.pop("min_fragment", 0)
    parameters |= {"min_size": 0, "min_fragment": 0}
    label = segmenters.segment(
        affinity, foreground, plan["offsets"], plan["segmenter"], **parameters
    )
    del affinity, foreground
    cut = [(s.start > 0, s.stop < n) for s, n in zip(around, grid.shape, strict=True)]
    label = without_fragments(label, min_fragment, cut)
    own = label[relative(core, around)]
    size = np.bincount(own.ravel(), minlength=int(label.max(initial=0)) + 1)
    size[0] = 0  # the background
    with io.create_h5(out, made_for=_fingerprint(plan, settings)) as file:
        io.put(file, "label", label, io.BLOCK if label.ndim == 3 else None)
        io.put(file, "size", size)
        file["contacts"] = contacts(own)


def match(
    plan: Mapping[str, Any], name: str, segments: Path, out: Path, overlap: Sequence[int]
) -> None:
    """Find which segments of a block and of the next one along each axis are the same object.

    Writes a dataset `<axis>` for each, as `same` returns it.
    """
    grid = _grid(plan, overlap)
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(_opened(segments / f"{name}.h5"))
        target = stack.enter_context(io.create_h5(out, made_for=mine.attrs["made_for"]))
        for axis, other in grid.following(name).items():
            face = grid.core(name)[axis].stop
            box = list(grid.core(name))
            box[axis] = slice(grid.around(other)[axis].start, grid.around(name)[axis].stop)
            with _opened(segments / f"{other}.h5", mine.attrs["made_for"]) as theirs:
                a = mine["label"][relative(box, grid.around(name))]
                b = theirs["label"][relative(box, grid.around(other))]
            target[str(axis)] = same(a, b, axis, face - box[axis].start)


def number(plan: Mapping[str, Any], segments: Path, matches: Path, out: Path, min_size: int) -> int:
    """Give every segment of every block the number of its object, and return how many objects there
    are.

    Writes `number` uint32, all labels of all blocks one after the other, and `start` int64, where a
    block's begin.

    Args:
        plan: content of `plan.json`.
        segments: folder of the segmented blocks.
        matches: folder of their matches.
        out: `numbers.h5`.
        min_size: smaller objects become background, in pixels.
    """
    from scipy.sparse import coo_array  # here, for most images are done without blocks
    from scipy.sparse.csgraph import connected_components

    grid = _grid(plan)
    sizes, made_for = [], None
    for name in grid.names:
        with _opened(segments / f"{name}.h5", made_for) as file:
            sizes.append(file["size"][()])
            made_for = file.attrs["made_for"]
    start = dict(zip(grid.names, np.cumsum([0, *map(len, sizes)]), strict=False))
    size = np.concatenate(sizes)
    pairs = [np.empty((0, 3), np.int64)]
    for name in grid.names:
        with _opened(matches / f"{name}.h5", made_for) as file:
            for axis, other in grid.following(name).items():
                pairs.append(file[str(axis)][()] + [start[name], start[other], 0])
    attracted = np.concatenate(pairs)
    linked = coo_array(
        (np.ones(len(attracted), bool), attracted[:, :2].T), shape=(size.size, size.size)
    )
    group = connected_components(linked, directed=False)[1]
    # What is not linked stays apart anyway: only contacts inside of a group matter, and they are
    # few.
    pairs = [np.empty((0, 3), np.int64)]
    for name in grid.names:
        with _opened(segments / f"{name}.h5", made_for) as file:
            touching = file["contacts"][()] + [start[name], start[name], 0]
        pairs.append(touching[group[touching[:, 0]] == group[touching[:, 1]]])
    group = divided(group, attracted, np.concatenate(pairs))
    kept = np.bincount(group, weights=size) >= max(1, min_size)
    if (count := int(kept.sum())) >= 2**32:
        raise ValueError(
            f"{count} objects are more than 32-bit labels can tell apart; raise min_size"
        )
    with io.create_h5(out, made_for=made_for, objects=count) as file:
        io.put(file, "number", np.where(kept, np.cumsum(kept), 0).astype(np.uint32)[group])
        io.put(file, "start", np.array(list(start.values()), np.int64))
    return count


def relabel(
    plan: Mapping[str, Any],
    name: str,
    segments: Path,
    numbers: Path,
    out: Path,
    overlap: Sequence[int],
) -> None:
    """Write the block's part of the result: `label` uint32, its own pixels, in the chunks of the
    whole.
    """
    grid = _grid(plan, overlap)
    with _opened(segments / f"{name}.h5") as file:
        made_for = file.attrs["made_for"]
        label = file["label"][relative(grid.core(name), grid.around(name))]
        count = len(file["size"])
    with _opened(numbers, made_for) as file:
        start = file["start"][grid.names.index(name)]
        label = file["number"][start : start + count][label]
    with io.create_h5(out, made_for=made_for) as file:
        # Without a limit along its axes, the array may be smaller than a chunk.
        unlimited = (None,) * label.ndim
        file.create_dataset(
            "label", data=label, chunks=grid.chunk, maxshape=unlimited, **COMPRESSION
        )


def join(plan: Mapping[str, Any], labels: Path, out: Path, about: Mapping[str, Any]) -> None:
    """Put all blocks into one file, whose dataset is called as that of the image; chunks are copied
    as they are. The label of an OME-Zarr is an OME-Zarr, with the levels of its image.

    Args:
        plan: content of `plan.json`.
        labels: folder of the relabelled blocks.
        out: `labels.h5`, or `labels.zarr`.
        about: what else the file says about itself, e.g. the settings.
    """
    if not io.is_hdf5(plan["image"]):
        from gdlib.volumes.zarr_labels import write_blocks

        zarr = open_zarr(plan["image"])
        mark = outputs.mark(zarr.root, str(zarr.file.parent.relative_to(zarr.root)))
        write_blocks(out, zarr, plan, labels, mark, {**plan, **about})
        return
    with open_volume(plan["image"]) as image, io.create_h5(out, **plan, **about) as file:
        label = gathered(plan, labels, file, image.name)
        for key in ("resolution", "offset", "element_size_um"):  # where the voxels are
            if key in image.attrs:
                label.attrs[key] = image.attrs[key]


def gathered(plan: Mapping[str, Any], labels: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """Make a dataset of all relabelled blocks in an open file, whose chunks are copied as they
    are.
    """
    grid = _grid(plan)
    label = file.create_dataset(name, grid.shape, np.uint32, chunks=grid.chunk, **COMPRESSION)
    made_for = None
    for block in grid.names:
        corner = [s.start for s in grid.core(block)]
        with _opened(labels / f"{block}.h5", made_for) as part:
            made_for = part.attrs["made_for"]
            chunks = part["label"]
            for at in itertools.product(*map(range, [0] * label.ndim, chunks.shape, grid.chunk)):
                mask, content = chunks.id.read_direct_chunk(at)
                label.id.write_direct_chunk(tuple(np.add(corner, at)), content, mask)
    return label


def parts(plan: Mapping[str, Any], labels: Path) -> Iterator[tuple[Box, np.ndarray]]:
    """Yield all relabelled blocks, and which part of the whole each is."""
    grid, made_for = _grid(plan), None
    for name in grid.names:
        with _opened(labels / f"{name}.h5", made_for) as file:
            made_for = file.attrs["made_for"]
            yield grid.core(name), file["label"][()]


def tiles(plan: Mapping[str, Any], labels: Path, tile: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the tiles (Y, X) of all sections of all relabelled blocks, in the order of a TIFF file.

    As many rows or sections as have `SLAB` pixels are in memory.
    """
    grid = _grid(plan)
    *_, rows, columns = grid.shape
    section = rows * columns if len(grid.shape) == 3 else columns
    thickness = max(1, min(grid.chunk[0], SLAB // section)) if len(grid.shape) == 3 else tile[0]
    for start in range(0, grid.shape[0], thickness):
        slab = (
            slice(start, min(start + thickness, grid.shape[0])),
            *(slice(0, n) for n in grid.shape[1:]),
        )
        label = np.empty([s.stop - s.start for s in slab], np.uint32)
        for name in grid.names:
            core = grid.core(name)
            shared = intersection(slab, core)
            if all(s.start < s.stop for s in shared):
                with _opened(labels / f"{name}.h5") as file:
                    label[relative(shared, slab)] = file["label"][relative(shared, core)]
        for image in label.reshape(-1, *label.shape[-2:]):
            for y, x in itertools.product(
                *(range(0, n, side) for n, side in zip(image.shape, tile, strict=True))
            ):
                yield image[y : y + tile[0], x : x + tile[1]]


def _grid(plan: Mapping[str, Any], overlap: Sequence[int] | None = None) -> Grid:
    return Grid(
        tuple(plan["shape"]), tuple(plan["block"]), tuple(overlap or [0] * len(plan["shape"]))
    )


def _fingerprint(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _opened(path: Path, made_for: str | None = None) -> Iterator[h5py.File]:
    """Open a file of a block; one made for another plan or with other settings is an error."""
    with io.open_h5(path) as file:
        if (found := file.attrs.get("made_for")) is None or made_for not in (None, found):
            raise io.DataError(
                f"{path}: it was made for another plan or with other settings; move it away and "
                "make it again"
            )
        yield file
