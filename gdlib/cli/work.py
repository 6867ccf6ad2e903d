"""What `gdlib segment` does with every image: predict, segment, write, count."""

import argparse
import contextlib
import sys
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io, trained
from gdlib.cli import labels
from gdlib.cli.found import Found, draw
from gdlib.cli.images import open_image
from gdlib.io import outputs
from gdlib.io.failures import Failures, is_lack_of_memory
from gdlib.progress import Progress
from gdlib.volumes import memory, zarr_labels


@dataclass(frozen=True)
class Job:
    """One image and where its label goes.

    Attributes:
        path: as it was given.
        file: without the name of a dataset.
        dataset: of an HDF5 file, None of another one.
        target: file of the label; a folder where the image is OME-Zarr.
        inner: what is named in a Zarr folder, None of an image that is none.
    """

    path: str
    file: Path
    dataset: str | None
    target: Path
    inner: str | None = None

    @classmethod
    def of(cls, path: str, folder: Path, name: str) -> "Job":
        """Find out where the label of an image goes; `name` is for labels in an OME-Zarr."""
        from gdlib.data.files import open_volume
        from gdlib.data.omezarr import split_zarr_path

        file, dataset = io.split_h5_path(path)[0], None
        if not io.is_hdf5(path) and (split := split_zarr_path(path)):
            return cls(path, split[0], None, zarr_labels.target(path, folder, name), split[1])
        if split_zarr_path(folder):
            raise io.DataError(
                f"{folder}: labels of {path}, which is no OME-Zarr, cannot be put into one; choose "
                "another --out"
            )
        if io.is_hdf5(path):
            with open_volume(path) as volume:
                dataset = volume.name.strip("/")
        return cls(
            path, file, dataset, folder / f"{file.stem}{'.tif' if dataset is None else '.h5'}"
        )

    @property
    def mark(self) -> str:
        """What the label says of itself."""
        return outputs.mark(self.file, self.dataset or self.inner)

    @property
    def output(self) -> outputs.Output:
        """The label, for a check."""
        if self.inner is not None:
            return zarr_labels.output(self.target, self.mark)
        shown = f"{self.target}:{self.dataset}" if self.dataset else ""
        return outputs.Output(self.target, outputs.has_mark(self.mark, self.dataset), shown)

    @property
    def preview(self) -> Path:
        """The picture with outlines: beside the label, or beside the image that has it inside."""
        beside, name = self.target, self.target.stem
        if self.inner is not None and self.file in self.target.parents:
            beside, name = self.file, f"{self.file.stem}.{self.target.name}"
        return beside.with_name(f"{name}.preview.png")

    def hidden(self, ending: str) -> Path:
        """Return a hidden path beside the label, for what is not finished."""
        dataset = f".{urllib.parse.quote(self.dataset, safe='')}" if self.dataset else ""
        return io.beside(self.target.with_suffix(""), f"{dataset}.{ending}")


class Work:
    """What is done with every image.

    Args:
        arguments: of the command line.
        header: of the weights.
        how: segmenter and its parameters.
        failed: takes what goes wrong with one image.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        header: dict[str, Any],
        how: tuple[str, dict[str, Any]],
        failed: Failures,
    ) -> None:
        from gdlib.predict.predictor import Predictor
        from gdlib.segment.segmenters import used

        self.arguments, self.failed = arguments, failed
        self.ndim = ndim = len(header["offsets"][0])
        self.segmenter, self.parameters = how
        keys = ("device", "precision", "engine", "block", "invert", "augment")
        self.predictor = Predictor.load(
            arguments.model, **{key: getattr(arguments, key) for key in keys}
        )
        self.predictor.header = {**header, "offsets": used(self.segmenter, header["offsets"])}
        self.weights = io.sha256(arguments.model)
        self.held = memory.resident()
        given = arguments.memory
        self.budget = max(1, int(given * memory.GIB)) if given else memory.budget()
        self.found = Found(arguments.table, arguments.preview, header, ndim)
        self.done = 0
        self.bar: Progress
        self.said: set[str] = set()

    def predict(
        self, job: Job, finishing: Future | None
    ) -> tuple[Any, dict[str, Any], int, np.ndarray | None] | None:
        """Predict an image; or do all of it if it has several frames, is to be seen in another
        size, or is to be done in blocks.
        """
        from gdlib.data.frames import Frames
        from gdlib.predict.files import file_identity, predict_blocks
        from gdlib.predict.predictor import assembled
        from gdlib.volumes.footprint import choose, is_large
        from gdlib.volumes.large import block_before, segment_in_blocks

        predictor, arguments, need = self.predictor, self.arguments, 0
        with (
            lack_of_memory(job.path),
            open_image(
                job.path,
                self.ndim,
                predictor.header["channels"],
                arguments.out,
                arguments.axes,
                arguments.channel,
            ) as (image, attributes),
        ):
            stored = attributes.get("zarr")
            identity = f"{stored.identity if stored else file_identity(job.file)} {job.path}"
            identity += " inverted" * arguments.invert
            by = self._factors(job, attributes)
            if isinstance(image, Frames) and not image.shape:
                image = image[()]
            if isinstance(image, Frames) or by is not None:
                if finishing is not None:
                    finishing.result()
                self._by_frames(job, image, attributes, by)
                return None
            with self._about(job.path, image):
                source = predictor.source(image)
                if source.ground_is_elsewhere:
                    self._say(
                        "most of it is as bright as objects were in the training; if objects are "
                        + (
                            "bright here, leave --invert out"
                            if arguments.invert
                            else "dark on a bright ground here, use --invert"
                        ),
                        job,
                    )
                large = self.budget and (arguments.memory or is_large(predictor, source.shape))
                if large:
                    choice = choose(
                        predictor,
                        source.shape,
                        self.segmenter,
                        self.parameters,
                        held=self.held + in_memory(image),
                        budget=self.budget,
                        before=block_before(job.hidden("blocks")),
                    )
            if large:
                print(f"{job.path}: {choice.sentence(self.budget)}", file=sys.stderr, flush=True)
                need = choice.need
                if finishing is not None:  # what is needed is that of one image
                    finishing.result()
                if choice.grid is not None:
                    count = segment_in_blocks(
                        choice,
                        source,
                        job.path,
                        job.hidden("blocks"),
                        partial(self._write_blocks, job, attributes),
                        identity=identity,
                        weights_sha256=self.weights,
                        segmenter=self.segmenter,
                        parameters=self.parameters,
                    )
                    if self.found.wants_image:
                        self._say("segmented in blocks: no table and no picture of it", job)
                    self.found.objects += count
                    self._done(job, count)
                    return None
            seen = _first_channel(image, self.ndim) if self.found.wants_image else None
            boxes = predictor.blocks(source.shape)
            if len(boxes) == 1:
                with self._about(job.path, image):
                    return predictor.predict(source, boxes[0]), attributes, need, seen
            blocks = predict_blocks(
                predictor, {job.path: source}, job.hidden("partial"), f"{self.weights} {identity}"
            )
            parts = ((box, part) for _, box, part in blocks)
            return assembled(source.shape, parts), attributes, need, seen

    def _factors(self, job: Job, attributes: dict[str, Any]) -> tuple[float, ...] | None:
        """Return by how much an image is to be enlarged, None for not at all."""
        from gdlib.data.scale import factors, microns

        header, given = self.predictor.header, self.arguments.pixel_size
        if self.arguments.diameter is None and given is None:
            if "pixel_size" not in header:
                return None
            given = microns(attributes, self.ndim)
        with self._about(job.path, None):
            by = factors(header, self.ndim, given, self.arguments.diameter)
        if by is not None and self.arguments.pixel_size is self.arguments.diameter is None:
            size = " x ".join(f"{side:.3g}" for side in given)
            self._say(
                f"its pixels are {size} microns, by which it is brought to those of the model; "
                "--pixel-size overrules this",
                job,
            )
        return by

    def _by_frames(
        self, job: Job, image: Any, attributes: dict[str, Any], by: tuple[float, ...] | None
    ) -> None:
        """Segment every frame on its own, in memory, and write all of them to one file."""
        from gdlib.data.frames import Frames

        axes = "ZYX"[-self.ndim :]
        if not isinstance(image, Frames):
            image = np.asarray(image)
            if image.ndim == self.ndim:  # a dataset on disk without channels
                image = image[None]
            image = Frames(image, f"C{axes}", self.ndim) if image.ndim == self.ndim + 1 else image
            if not isinstance(image, Frames):
                raise io.DataError(f"{job.path}: an image of shape {image.shape} cannot be scaled")
        if "Z" in image.axes and "sections" not in self.said:
            self.said.add("sections")
            self._say(
                "every section is segmented on its own, since the network is 2D"
                + trained.fitting(3),
                job,
            )
        label = np.empty(image.shape + image.sides, np.uint32)
        for index in np.ndindex(image.shape):
            frame = np.asarray(image[index])
            with self._about(job.path, frame):
                label[index] = trained.objects(
                    self.predictor,
                    frame,
                    self.predictor.header["offsets"],
                    self.segmenter,
                    self.parameters,
                    by,
                )
            name = " ".join(f"{axis}{k + 1}" for axis, k in zip(image.axes, index, strict=True))
            self._count(job, name, frame, label[index], attributes, by)
        self._check(job)
        axes = image.axes + axes
        labels.write_label(job.target, job.dataset, label, attributes, job.mark, axes)
        if self.arguments.preview:
            middle = tuple(n // 2 for n in image.shape)
            draw(job.preview, np.asarray(image[middle]), label[middle], job.mark)
        count = sum(
            len(np.unique(label[index])) - (0 in label[index]) for index in np.ndindex(image.shape)
        )
        frames = f" in {label[..., 0, 0].size} frames" if image.shape else ""
        self._done(job, count, frames)

    def finish(
        self,
        job: Job,
        prediction: Any,
        attributes: dict[str, Any],
        need: int,
        image: np.ndarray | None,
    ) -> None:
        """Find the objects of a predicted image, and write them."""
        from gdlib.segment.segmenters import segment

        with self.failed.noted():
            with lack_of_memory(job.path, need):
                label = segment(
                    prediction.affinity,
                    prediction.foreground,
                    self.predictor.header["offsets"],
                    self.segmenter,
                    **self.parameters,
                )
            self._check(job)
            labels.write_label(job.target, job.dataset, label, attributes, job.mark)
            self._count(job, "", image, label, attributes, None)
            if self.arguments.preview and image is not None:
                draw(job.preview, image, label, job.mark)
            self._done(job, int(label.max()))

    def _write_blocks(
        self, job: Job, attributes: dict[str, Any], plan: dict[str, Any], blocks: Path
    ) -> None:
        self._check(job)
        labels.write_blocks(job.target, job.dataset, plan, blocks, attributes, job.mark)

    def _check(self, job: Job) -> None:  # again: people go on working in their folders
        outputs.check([job.output], [], overwrite=self.arguments.overwrite)

    def _count(
        self,
        job: Job,
        frame: str,
        image: np.ndarray | None,
        label: np.ndarray,
        attributes: dict[str, Any],
        by: tuple[float, ...] | None,
    ) -> None:
        from gdlib.data.scale import microns

        sides = self.arguments.pixel_size or microns(attributes, self.ndim)
        sides = (sides,) * self.ndim if isinstance(sides, float) else sides
        self.found.add(job.path, frame, image, label, sides, by)

    def _say(self, text: str, job: Job) -> None:
        self.bar.write(f"{job.path}: {text}", file=sys.stderr)

    def _done(self, job: Job, count: int, frames: str = "") -> None:
        job.hidden("partial").unlink(missing_ok=True)
        self.done += 1
        self.bar.update()
        self.bar.write(f"{job.path}: {count} objects{frames}", file=sys.stdout)

    @contextlib.contextmanager
    def _about(self, path: str, image: Any) -> Iterator[None]:
        """Begin the sentence about an image that cannot be used with its path, and end it with a
        way out where there is one.
        """
        try:
            yield
        except ValueError as error:
            hint = ""
            sides = [n for n in getattr(image, "shape", ()) if n > 1]
            if self.ndim == 3 and len(sides) == 2:
                hint = trained.fitting(2)
            elif len(sides) == self.ndim + 1 and self.predictor.header["channels"] == 1:
                hint = "; or choose one channel with --channel"
            raise io.DataError(f"{path}: {error}{hint}") from None


def _first_channel(image: Any, ndim: int) -> np.ndarray:
    """Return an image in memory, (C, [Z,] Y, X), without other axes of one pixel."""
    array = np.asarray(image)
    sides = [n for n in array.shape if n > 1]
    if array.ndim == ndim + 1:
        return array
    return array.reshape(1, *(sides if len(sides) == ndim else array.shape[-ndim:]))


@contextlib.contextmanager
def lack_of_memory(path: str, need: int = 0) -> Iterator[None]:
    """Turn what any library says of too little memory into one sentence; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        cause = (str(error).splitlines() or ["no more is known"])[0]
        mend = (
            "close other programs, or say with --memory how many GiB may be used: it is then "
            "segmented in smaller blocks"
        )
        if "CUDA" in cause:
            mend = "choose a smaller --block, e.g. --block 512"
        elif need:
            mend += f" if it may need more (it was thought to need up to {need / memory.GIB:.1f})"
        raise io.DataError(f"{path}: there was too little memory ({cause}); {mend}") from error


def in_memory(image: Any) -> int:
    """Return the bytes of an image that is not read piece by piece."""
    return image.nbytes if isinstance(image, np.ndarray) and not isinstance(image, np.memmap) else 0
