"""Predictions of images of any size as files, with the memory of one block.

What was killed goes on where it was.

Finished blocks wait one after the other in a partial file. An HDF5 file would be no place for them:
one that a killed process leaves behind may not be readable at all.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np

from gdlib import io
from gdlib.blockwise.blocks import Blockwise, Source
from gdlib.boxes import Box, intersection, relative
from gdlib.progress import Progress
from gdlib.types import Prediction

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes from the same partial file there
    fcntl = None

# of a volume, as many central sections as have so many voxels are kept as embeddings
KEPT_PIXELS = 2**22
CHUNK_PIXELS = 2**18  # largest piece of a prediction that is compressed at once


def predict_blocks(
    predictor: Blockwise,
    images: Mapping[str, Source],
    partial: Path,
    identity: str,
    kept: Mapping[str, Box] | None = None,
) -> Iterator[tuple[str, Box, Prediction]]:
    """Predict images block by block into a partial file, and return an iterator that reads the
    blocks again from there.

    Memory is that of one block. A run that was killed goes on after the last block it finished.

    Args:
        predictor: the network.
        images: by name, e.g. `predictor.source(dataset)`.
        partial: file in which finished blocks wait, uncompressed; the caller removes it when it
            needs it no more.
        identity: says which weights and which data these are: a partial file of others is not used.
        kept: name -> box of which the embedding is wanted.

    Returns:
        Name, box and prediction of each block, in the order of names and boxes; embeddings are
        float16 here.

    Raises:
        DataError: an image has NaN or infinite pixels, or another process writes the same partial
            file.
    """
    kept = kept or {}

    def compute(name: str, box: Box) -> list[np.ndarray]:
        part = predictor.predict(images[name], box, kept.get(name))
        embedding = np.empty(0) if part.embedding is None else part.embedding
        return [part.affinity, part.foreground, embedding.astype(np.float16)]

    parts = finish_blocks(predictor, images, compute, partial, [identity, str(kept)])
    return (
        (name, box, Prediction(affinity, foreground, embedding if name in kept else None))
        for name, box, (affinity, foreground, embedding) in parts
    )


def finish_blocks(
    predictor: Blockwise,
    images: Mapping[str, Source],
    compute: Callable[[str, Box], list[np.ndarray]],
    partial: Path,
    identity: Sequence[str],
) -> Iterator[tuple[str, Box, list[np.ndarray]]]:
    """Compute something of every block of some images, and return an iterator over it, as
    `predict_blocks` does.

    Args:
        predictor: the network.
        images: by name.
        compute: of one block of the image of a name; always as many arrays.
        partial: see `predict_blocks`.
        identity: says what is computed, of which weights and data.
    """
    work = [(name, box) for name, image in images.items() for box in predictor.blocks(image.shape)]
    fingerprint = _fingerprint(predictor, images, identity)
    with io.writing(partial, io.SPACE | io.ACCESS):
        partial.parent.mkdir(parents=True, exist_ok=True)
        waiting = open(partial, "a+b")  # noqa: SIM115, closed below
    with io.writing(partial), waiting as file:
        lock(file)
        done = _finished(file, fingerprint)
        title = partial.stem.lstrip(".")
        writing: Future | None = None
        with (
            Progress(total=len(work), initial=done, unit="block", desc=title, leave=False) as bar,
            # one block goes to the disk while the next is predicted
            ThreadPoolExecutor(1) as writer,
        ):
            for name, box in work[done:]:
                try:
                    part = compute(name, box)
                except io.DataError as error:
                    partial.unlink()
                    raise io.DataError(f"{name}: {error}") from None
                if writing is not None:
                    writing.result()
                writing = writer.submit(_append, file, part)
                bar.update()
            if writing is not None:
                writing.result()
    return _read(partial, work, len(fingerprint))


def _append(file: BinaryIO, arrays: Sequence[np.ndarray]) -> None:
    np.save(file, len(arrays))
    for array in arrays:
        np.save(file, array)
    file.flush()
    os.fsync(file.fileno())  # what counts as finished must be there, even if the machine goes down


def _read(
    partial: Path, work: Sequence[tuple[str, Box]], start: int
) -> Iterator[tuple[str, Box, list[np.ndarray]]]:
    with open(partial, "rb") as file:
        file.seek(start)
        for name, box in work:
            yield name, box, _load(file)


def lock(file: BinaryIO) -> None:
    """Keep other processes from a file, until it is closed.

    One that another process has is a `DataError`.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise io.DataError(
            f"{file.name}: another process is at work on it; wait for it, or stop it"
        ) from None


def _finished(file: BinaryIO, fingerprint: bytes) -> int:
    """Count the blocks in a partial file, and cut off what a killed process left behind them."""
    file.seek(0)
    count, end = 0, len(fingerprint)
    if file.read(end) != fingerprint:
        file.truncate(0)
        file.write(fingerprint)
        return 0
    while True:
        try:
            _load(file)
        except (ValueError, EOFError):
            break
        count, end = count + 1, file.tell()
    file.truncate(end)
    file.seek(end)
    return count


def _load(file: BinaryIO) -> list[np.ndarray]:
    count = int(np.load(file, allow_pickle=False))
    return [np.load(file, allow_pickle=False) for _ in range(count)]


def _fingerprint(
    predictor: Blockwise, images: Mapping[str, Source], identity: Sequence[str]
) -> bytes:
    """What all blocks of a partial file have in common.

    Another weight, image, block or line of code is another file.
    """
    content = {
        "identity": list(identity),
        "images": {
            name: [image.shape, str(image.array.dtype), image.normalisation]
            for name, image in images.items()
        },
        "block": predictor.block,
        "offsets": predictor.header.get("offsets"),
        "stride": predictor.stride,
        "made with": made_with(predictor),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest().encode() + b"\n"


def made_with(predictor: Blockwise) -> str:
    """Return a digest of all that predictions depend on, but for images and weights: with another
    one, nothing goes on.
    """
    content = {
        "precision": predictor.precision,
        "device": predictor.device_type,
        "engine": predictor.engine,
        "views": len(predictor.views),
        "torch": version("torch"),
        "code": io.code_sha256(),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def file_identity(path: Path | str) -> str:
    """Say which file this is without reading it: where, how large, how old."""
    status = Path(path).stat()
    return f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"


def predict_split(
    predictor: Blockwise,
    data: Path | str,
    out: Path | str,
    *,
    weights_sha256: str,
    keep_embeddings: int = 0,
    **about: Any,
) -> None:
    """Predict every sample of a split and write the predictions file, with the memory of one block.

    Finished blocks wait in `.<name of out>.partial` beside it, so that the same call goes on where
    a killed one was; the file itself appears when it is complete.

    Args:
        predictor: the network.
        data: samples `.h5`.
        out: predictions `.h5`.
        weights_sha256: of the weights file, kept as an attribute.
        keep_embeddings: for so many samples, the first by name, the embedding is kept too
            (float16), for figures; of a volume some central sections. Its attribute `origin` says
            where it begins.
        about: other attributes.
    """
    out = Path(out)
    partial = out.with_name(f".{out.name}.partial")
    attrs = {key: predictor.header[key] for key in ("offsets", "segmentation")}
    with io.open_h5(data) as samples:
        images = images_of(predictor, samples)
        kept = {name: _central(images[name].shape) for name in list(images)[:keep_embeddings]}
        identity = f"{weights_sha256} {file_identity(data)}"
        blocks = predict_blocks(predictor, images, partial, identity, kept)
        attrs |= {"kept": list(kept), "weights_sha256": weights_sha256, "engine": predictor.engine}
        with io.create_h5(out, **attrs, **about) as file:
            for name, box, part in blocks:
                if name not in file:
                    _create(
                        file.create_group(name), predictor, images[name].shape, part, kept.get(name)
                    )
                file[name]["affinity"][(slice(None), *box)] = part.affinity
                file[name]["foreground"][box] = part.foreground
                if part.embedding is not None and part.embedding.size:
                    inner = relative(intersection(box, kept[name]), kept[name])
                    file[name]["embedding"][(slice(None), *inner)] = part.embedding
    partial.unlink()


def images_of(predictor: Blockwise, samples: h5py.File) -> dict[str, Source]:
    """Return the images of an open samples file by name, as a network sees them.

    Raises:
        DataError: it is no samples file, or the network cannot take an image of it.
    """
    images = {}
    for name in sorted(samples):
        if f"{name}/image" not in samples:
            raise io.DataError(
                f'{samples.filename}: "{name}" has no image, so this is not a samples file; '
                "give one"
            )
        try:
            images[name] = predictor.source(samples[name]["image"])
        except io.DataError as error:
            raise io.DataError(f'{samples.filename}: sample "{name}": {error}') from None
    return images


def _central(shape: tuple[int, ...]) -> Box:
    """All of an image; of a volume, some sections in the middle."""
    if len(shape) == 2:
        return tuple(slice(0, n) for n in shape)
    count = min(shape[0], max(1, KEPT_PIXELS // math.prod(shape[1:])))
    start = (shape[0] - count) // 2
    return (slice(start, start + count), *(slice(0, n) for n in shape[1:]))


def _create(
    group: h5py.Group,
    predictor: Blockwise,
    shape: tuple[int, ...],
    part: Prediction,
    kept: Box | None,
) -> None:
    """Make the datasets of one image, in chunks that fit its blocks: each is then compressed
    once.
    """
    sides = list(predictor.block_sides(shape))
    while math.prod(sides) > CHUNK_PIXELS and any(n % 2 == 0 for n in sides):
        largest = max(n for n in sides if n % 2 == 0)
        sides[sides.index(largest)] //= 2
    options = {"compression": "gzip", "compression_opts": 1, "shuffle": True, "track_times": False}

    def create(name: str, shape: Sequence[int], dtype: type) -> None:
        chunks = tuple(
            min(pair)
            for pair in zip((1,) * (len(shape) - len(sides)) + tuple(sides), shape, strict=True)
        )
        group.create_dataset(name, shape, dtype, chunks=chunks, **options)

    create("affinity", (len(part.affinity), *shape), np.uint8)
    create("foreground", shape, np.uint8)
    if kept is not None:
        create("embedding", (len(part.embedding), *(s.stop - s.start for s in kept)), np.float16)
        group["embedding"].attrs["origin"] = [s.start for s in kept]
