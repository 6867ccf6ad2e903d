"""What `gdlib segment` does with every image: predict, segment, write, count."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import devices, io, quiet, trained
from gdlib.cli import labels
from gdlib.cli.found import Counted, Found, draw
from gdlib.cli.images import open_image
from gdlib.cli.job import Job
from gdlib.cli.together import Room, workers
from gdlib.io import outputs
from gdlib.io.failures import Failures, is_lack_of_memory
from gdlib.progress import Progress
from gdlib.volumes import memory

if TYPE_CHECKING:
    from pathlib import Path

    from gdlib.blockwise.blocks import Blockwise, Source
    from gdlib.data.frames import Frames


# Pixels, by number of axes; a larger image is alone, and goes on from where it was stopped.
LARGE = {2: 2**24, 3: 2**21}
LARGE_FILE = 2**25  # bytes; it would be read twice if it were opened to see that it is large


class Work:
    """What is done with every image.

    Images are segmented at the same time, each by a thread of its own, but for those that are
    `alone`: these have all threads, and all the memory.

    Args:
        arguments: of the command line.
        header: of the weights.
        how: segmenter and its parameters.
        count: of images.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        header: dict[str, Any],
        how: tuple[str, dict[str, Any]],
        count: int,
    ) -> None:
        from gdlib.segment.segmenters import stride, used
        from gdlib.volumes.footprint import Need

        self.arguments = arguments
        self.ndim = len(header["offsets"][0])
        self.segmenter, self.parameters = how
        self.header = {**header, "offsets": used(self.segmenter, header["offsets"])}
        self.stride = stride(self.segmenter, self.parameters)
        self.threads = devices.threads()
        self.on_cpu = devices.on_cpu(arguments.device)
        # another device computes one image, while a thread finds the objects of another one
        self.at_once = min(self.threads, count) if self.on_cpu else 1
        self.workers = self.at_once if self.on_cpu else 2
        self._predictors: dict[int, Blockwise] = {}
        predictor = self._predictor(self.at_once)
        self.turn = threading.Semaphore(self.at_once)
        self.writing = threading.Lock()
        self.weights = io.sha256(arguments.model)
        self.held = memory.resident()
        given = arguments.memory
        self.budget = max(1, int(given * memory.GIB)) if given else memory.budget()
        self.free = self.budget and max(1, self.budget - self.held)
        self.room = Room(self.free)
        self.need = Need(predictor, *how)
        self.found = Found(arguments.table, arguments.preview, header, self.ndim)
        self.bar: Progress
        self.said: set[tuple[str, str]] = set()
        self.told_of_sections = self.told_of_pixels = False
        self.stopped = False

    def run(self, jobs: Sequence[Job], failed: Failures) -> None:
        """Segment images; what they have is taken in, and told, in their order.

        Args:
            jobs: the images.
            failed: takes what goes wrong with one image.
        """
        if len(jobs) == 1:
            with failed.noted():
                self._done(jobs[0], self.alone(jobs[0]))
            return
        each = max(1, self.threads // self.at_once)
        with workers(self.workers, each) as pool:
            try:
                for job, future in [(job, pool.submit(self.beside, job)) for job in jobs]:
                    with failed.noted():
                        self._done(job, future.result() or self.alone(job))
            except BaseException:
                self.stopped = True
                raise

    def alone(self, job: Job) -> Counted:
        """Segment an image while nothing else is done."""
        with self.room.alone():
            return self._segment(job, self._predictor(1), is_alone=True)

    def beside(self, job: Job) -> Counted | None:
        """Segment an image while other threads segment others; or return None, since it is to be
        done `alone`.
        """
        with contextlib.suppress(OSError):  # what is wrong is said where it is read
            if job.inner is job.dataset is None and job.file.stat().st_size > LARGE_FILE:
                return None
        return self._segment(job, self._predictors[self.at_once], is_alone=False)

    def _predictor(self, at_once: int) -> Blockwise:
        """Return the network, ready for so many threads that share the processor."""
        if at_once not in self._predictors:
            keys = ("device", "precision", "engine", "block", "invert", "augment")
            options = {key: getattr(self.arguments, key) for key in keys}
            devices.use_threads(max(1, self.threads // at_once))
            predictor = trained.predictor(self.arguments.model, at_once=at_once, **options)
            predictor.ask_for(self.header["offsets"], self.stride)
            _ = predictor.run  # is made here, and not by each thread
            devices.use_threads(self.threads)
            for other in set(self._predictors) - {1, self.at_once}:
                del self._predictors[other]  # of frames of an image before
            self._predictors[at_once] = predictor
        return self._predictors[at_once]

    def _segment(self, job: Job, predictor: Blockwise, *, is_alone: bool) -> Counted | None:
        from gdlib.blockwise.blocks import assembled
        from gdlib.data.frames import Frames

        held = memory.resident()
        with (
            lack_of_memory(job.path),
            open_image(
                job.path,
                self.ndim,
                self.header["channels"],
                self.arguments.out,
                self.arguments.axes,
                self.arguments.channel,
            ) as (image, attributes),
        ):
            if isinstance(image, Frames) and not image.shape:
                image = image[()]
            if isinstance(image, Frames) and not is_alone:  # then frames are seen at the same time
                return None
            by = self._factors(job, attributes)
            if isinstance(image, Frames):
                return self._by_frames(job, predictor, image, attributes, by, is_alone)
            with self._about(job.path, image):
                source = predictor.source(image)
            if by is not None:
                one = Frames(source.as_recorded, f"C{'ZYX'[-self.ndim :]}", self.ndim)
                return self._by_frames(job, predictor, one, attributes, by, is_alone)
            with self._about(job.path, image):
                if not is_alone and self._must_be_alone(source.shape):
                    return None
                self._look_at(job, source, attributes)
            if is_alone:
                return self._whole(job, predictor, image, source, attributes, held)
            with self._taken(source.shape):
                with self.turn, self._about(job.path, image):
                    boxes = predictor.blocks(source.shape)
                    parts = ((box, predictor.predict(source, box)) for box in boxes)
                    prediction = assembled(source.shape, parts)
                return self._finish(job, prediction, attributes, 0, self._seen(source))

    def _look_at(self, job: Job, source: Source, attributes: dict[str, Any]) -> None:
        """Say so if objects may be dark where they were bright in the training, or of another size
        since nobody knows that of the pixels.
        """
        from gdlib.data.scale import microns

        known, given = self.header.get("pixel_size"), self.arguments
        is_unsaid = known and given.pixel_size is given.diameter is None and not self.told_of_pixels
        if is_unsaid and microns(attributes, self.ndim) is None:
            self.told_of_pixels = True
            self._say(
                "it does not say how large its pixels are, and is taken as it is; those of the "
                f"model are {' x '.join(f'{side:.3g}' for side in known)} microns, and "
                "--pixel-size says what they are here",
                job,
            )
        if source.ground_is_elsewhere:
            ways = "use --invert", "leave --invert out"
            self._say(trained.bright_ground(given.invert, *ways), job)

    def _must_be_alone(self, shape: Sequence[int]) -> bool:
        """Is an image so large that it takes long, or more than its part of the memory?"""
        if math.prod(shape) > LARGE[self.ndim]:
            return True
        return bool(self.free) and self.need(shape) > self.free // self.workers

    @contextlib.contextmanager
    def _taken(self, shape: Sequence[int]) -> Iterator[None]:
        with self.room.taken(self.need(shape)):
            if self.stopped:
                raise KeyboardInterrupt
            yield

    def _whole(
        self,
        job: Job,
        predictor: Blockwise,
        image: Any,
        source: Source,
        attributes: dict[str, Any],
        held: int,
    ) -> Counted:
        """Segment an image in one piece, or in blocks if it is large and does not fit."""
        from gdlib.blockwise.blocks import assembled
        from gdlib.predict.files import file_identity, predict_blocks
        from gdlib.volumes.footprint import choose, is_large
        from gdlib.volumes.large import block_before, segment_in_blocks

        need = 0
        stored = attributes.get("zarr")
        identity = f"{stored.identity if stored else file_identity(job.file)} {job.path}"
        given = self.arguments
        identity += f" axes {given.axes}, channel {given.channel}" + " inverted" * given.invert
        if self.budget and (self.arguments.memory or is_large(predictor, source.shape)):
            with self._about(job.path, image):
                choice = choose(
                    predictor,
                    source.shape,
                    self.segmenter,
                    self.parameters,
                    held=held + in_memory(image),
                    budget=self.budget,
                    before=block_before(job.hidden("blocks")),
                )
            print(f"{job.path}: {choice.sentence(self.budget)}", file=sys.stderr, flush=True)
            need = choice.need
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
                return Counted(count)
        boxes = predictor.blocks(source.shape)
        if len(boxes) == 1:
            with self._about(job.path, image):
                prediction = predictor.predict(source, boxes[0])
        else:
            blocks = predict_blocks(
                predictor, {job.path: source}, job.hidden("partial"), f"{self.weights} {identity}"
            )
            prediction = assembled(source.shape, ((box, part) for _, box, part in blocks))
        return self._finish(job, prediction, attributes, need, self._seen(source))

    def _seen(self, source: Source) -> np.ndarray | None:
        return np.asarray(source.as_recorded) if self.found.wants_image else None

    def _factors(self, job: Job, attributes: dict[str, Any]) -> tuple[float, ...] | None:
        """Return by how much an image is to be enlarged, None for not at all."""
        from gdlib.data.scale import factors, microns

        header, given = self.header, self.arguments.pixel_size
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
        self,
        job: Job,
        predictor: Blockwise,
        image: Frames,
        attributes: dict[str, Any],
        by: tuple[float, ...] | None,
        is_alone: bool,
    ) -> Counted | None:
        """Segment every frame on its own, in memory, and write all of them to one file; None if
        that is to be done `alone`.
        """
        from gdlib.data.scale import resized_sides

        if "Z" in image.axes and not self.told_of_sections:
            self.told_of_sections = True
            self._say(
                "every section is segmented on its own, since the network is 2D"
                + trained.fitting(3),
                job,
            )
        # of what the network sees, or of what there is; the larger needs more
        sides = max(image.sides, resized_sides(image.sides, by or (1,) * self.ndim), key=math.prod)
        if not is_alone and self._must_be_alone(sides):
            return None
        frames = list(np.ndindex(image.shape))
        held = 4 * math.prod(image.shape + image.sides)  # labels of all frames
        if is_alone:
            self._check_memory(job, predictor, sides, held)
        first = np.asarray(image[frames[0]])
        with self._about(job.path, first):
            self._look_at(job, predictor.source(first), attributes)
        label = np.empty(image.shape + image.sides, np.uint32)

        def one(predictor: Blockwise, index: tuple[int, ...]) -> Counted:
            # a large one on disk is not read twice
            frame = np.asarray(image[index]) if any(index) else first
            with self._about(job.path, frame):
                label[index] = trained.objects(
                    predictor, frame, self.header["offsets"], self.segmenter, self.parameters, by
                )
            name = " ".join(f"{axis}{k + 1}" for axis, k in zip(image.axes, index, strict=True))
            return self._count(job, name, frame, label[index], attributes, by)

        counted = Counted()
        if not is_alone:
            with self._taken(sides), self.turn:
                counted.add(one(predictor, ()))
        else:
            together = self._frames_at_once(sides, len(frames), held)
            predictor = self._predictor(together)
            with workers(together, max(1, self.threads // together)) as pool:
                for part in pool.map(partial(one, predictor), frames):
                    counted.add(part)
        axes = image.axes + "ZYX"[-self.ndim :]
        with self._written(job):
            labels.write_label(job.target, job.dataset, label, attributes, job.mark, axes)
        if self.arguments.preview:
            middle = tuple(n // 2 for n in image.shape)
            draw(job.preview, np.asarray(image[middle]), label[middle], job.mark)
        if image.shape:
            counted.frames = f" in {len(frames)} frames"
        return counted

    def _check_memory(
        self, job: Job, predictor: Blockwise, sides: Sequence[int], held: int
    ) -> None:
        """Refuse what does not fit, since nothing that is scaled or has frames is cut into
        blocks.
        """
        from gdlib.volumes.footprint import gib, is_large

        if not self.budget or not (self.arguments.memory or is_large(predictor, sides)):
            return
        if (need := self.held + held + self.need(sides)) > self.budget:
            raise io.DataError(
                f"{job.path}: as the network sees it, {' x '.join(map(str, sides))} pixels, it "
                f"needs up to {gib(need)} GiB of memory, and {gib(self.budget)} may be used; what "
                "is scaled, and frames, are not cut into blocks: scale or cut it before, or give a "
                "larger --memory to try all the same"
            )

    def _frames_at_once(self, sides: Sequence[int], count: int, held: int) -> int:
        """Return how many frames of one image are segmented at the same time."""
        if not self.on_cpu:
            return 1
        fitting = max(1, (self.free - held) // self.need(sides)) if self.free else count
        return min(count, self.threads, fitting)

    def _finish(
        self,
        job: Job,
        prediction: Any,
        attributes: dict[str, Any],
        need: int,
        image: np.ndarray | None,
    ) -> Counted:
        """Find the objects of a predicted image, and write them."""
        from gdlib.segment.segmenters import segment

        with lack_of_memory(job.path, need):
            label = segment(
                prediction.affinity,
                prediction.foreground,
                self.header["offsets"],
                self.segmenter,
                **self.parameters,
            )
        with self._written(job):
            labels.write_label(job.target, job.dataset, label, attributes, job.mark)
        if self.arguments.preview and image is not None:
            draw(job.preview, image, label, job.mark)
        return self._count(job, "", image, label, attributes, None)

    def _write_blocks(
        self, job: Job, attributes: dict[str, Any], plan: dict[str, Any], blocks: Path
    ) -> None:
        with self._written(job):
            labels.write_blocks(job.target, job.dataset, plan, blocks, attributes, job.mark)

    @contextlib.contextmanager
    def _written(self, job: Job) -> Iterator[None]:
        # labels of several images may go into one HDF5 file, or one Zarr
        with self.writing if job.dataset or job.inner is not None else contextlib.nullcontext():
            # again: people go on working in their folders
            outputs.check([job.output], [], overwrite=self.arguments.overwrite)
            yield

    def _count(
        self,
        job: Job,
        frame: str,
        image: np.ndarray | None,
        label: np.ndarray,
        attributes: dict[str, Any],
        by: tuple[float, ...] | None,
    ) -> Counted:
        from gdlib.data.scale import microns

        sides = self.arguments.pixel_size or microns(attributes, self.ndim)
        sides = (sides,) * self.ndim if isinstance(sides, float) else sides
        return self.found.count(job.path, frame, image, label, sides, by)

    def _say(self, text: str, job: Job) -> None:
        if (job.path, text) in self.said:  # before it was seen that it is to be done alone
            return
        self.said.add((job.path, text))
        self.bar.write(f"{job.path}: {text}", file=sys.stderr)

    def _done(self, job: Job, counted: Counted) -> None:
        job.hidden("partial").unlink(missing_ok=True)
        self.found.add(counted)
        self.bar.update()
        with quiet.aloud():
            self.bar.write(
                f"{job.path}: {counted.objects} objects{counted.frames}", file=sys.stdout
            )

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
            elif len(sides) == self.ndim + 1 and self.header["channels"] == 1:
                hint = "; or choose one channel with --channel"
            raise io.DataError(f"{path}: {error}{hint}") from None


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
