"""From an image of any size to affinities and foreground, block by block, exactly as if it had been
computed at once.

An output pixel depends on the image within the `halo` of the network, and the output moves along
when the image is moved by multiples of its `divisor`. So a block that starts at such a multiple and
is computed with a halo of real context has the values of the whole image inside, and what was cut
off spoils nothing. For the affinities of a block, the embedding is computed as far beyond it as the
offsets reach. Nothing is blended, there are no seams, and memory depends on the block alone.

A network in which every pixel sees all others, `halo` None, has no such blocks: it takes each image
in one piece.
"""

import itertools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import h5py
import numpy as np

from gdlib import io
from gdlib.boxes import Box
from gdlib.data.axes import SECTIONS, View, fitted, kept_axes
from gdlib.data.intensity import Negative, ground_is_elsewhere, intensity_range, rescale
from gdlib.types import Offsets, Prediction

# pixels; larger ones waste less on context, where there is memory
BLOCK = {2: (1024, 1024), 3: (32, 256, 256)}


class Geometry(Protocol):
    """What has to be known of a network to cut an image; see `gdlib.models`."""

    ndim: int
    divisor: tuple[int, ...]
    remainder: tuple[int, ...]
    margin: tuple[int, ...]
    halo: tuple[int, ...] | None


def legal_shape(network: Geometry, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the smallest output sides `k * divisor + remainder` of a network that are at least
    these.
    """
    return tuple(
        -(-max(n - r, 0 if r else 1) // d) * d + r
        for n, d, r in zip(shape, network.divisor, network.remainder, strict=True)
    )


class Source:
    """An image that is read and normalised in parts.

    Args:
        array: (C, [Z,] Y, X), an array, or a dataset on disk that is read by slices; such a dataset
            may also be ([Z,] Y, X) where C is 1. Other axes may be there if they are of one pixel.
        channels: C that the network wants.
        ndim: number of axes that the network wants.
        normalisation: keyword arguments of `intensity_range`; the range is that of the whole image.
        invert: see the image as its negative.

    Attributes:
        as_recorded: (C, [Z,] Y, X), the image without other axes, and not inverted; of a dataset on
            disk a `View`, which is not read yet.
        array: the same as the network sees it, perhaps the negative.
        shape: ([Z,] Y, X).
    """

    def __init__(
        self,
        array: np.ndarray | h5py.Dataset,
        channels: int,
        ndim: int,
        normalisation: Mapping[str, float],
        invert: bool = False,
    ) -> None:
        shape = tuple(array.shape)
        if isinstance(array, np.ndarray):
            seen = fitted(array, ndim, leading=1)
        else:
            seen = View(array, kept_axes(shape, ndim + (channels > 1)), channel=channels == 1)
        if (
            seen.ndim != ndim + 1
            or seen.shape[0] != channels
            or 0 in shape
            or array.dtype.kind not in "buif"
        ):
            read_as = f", read as {shape[0]} channel(s) of {len(shape) - 1} axes," * isinstance(
                array, np.ndarray
            )
            raise io.DataError(
                f"an image of shape {shape}{read_as} and type {array.dtype} does not fit this "
                f"network, which wants real numbers, {channels} channel(s) and {ndim} axes of at "
                "least one pixel; convert the image or choose another "
                f"model{SECTIONS * (channels == 1 and ndim == 3)}"
            )
        self.as_recorded = seen
        self.array = Negative(seen) if invert else seen
        self.shape = seen.shape[1:]
        self.normalisation = normalisation

    @cached_property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """What becomes 0 and 1, for each channel."""
        return intensity_range(self.array, **self.normalisation)

    @property
    def ground_is_elsewhere(self) -> bool:
        """Is most of the image as bright as objects were in the training, if that is known?"""
        level, spread = (self.normalisation.get(key) for key in ("level", "spread"))
        return level is not None and ground_is_elsewhere(self.array, *self.range, level, spread)

    def read(self, starts: Sequence[int], stops: Sequence[int]) -> np.ndarray:
        """Return a box (C, *sides) float32, normalised.

        Beyond its borders the image is mirrored, as often as needed.
        """
        indices = [
            _mirror(np.arange(a, b), n) for a, b, n in zip(starts, stops, self.shape, strict=True)
        ]
        inside = tuple(slice(int(i.min()), int(i.max()) + 1) for i in indices)
        image = self.array[(slice(None), *inside)]
        for axis, (index, part) in enumerate(zip(indices, inside, strict=True), start=1):
            if len(index) != image.shape[axis] or index[0] != part.start:
                image = image.take(index - part.start, axis)
        with np.errstate(all="ignore"):
            image = rescale(image, *self.range)
        if not np.isfinite(image).all():
            raise io.DataError("the image has NaN or infinite pixels; replace them by numbers")
        return image


def _mirror(index: np.ndarray, n: int) -> np.ndarray:
    """Fold indices into [0, n) as a mirror at the centres of the first and the last pixel does."""
    index = np.abs(index) % max(1, 2 * n - 2)
    return np.where(index < n, index, 2 * n - 2 - index)


class Blockwise(ABC):
    """A trained network and its blocks, whatever runs it.

    Args:
        network: its geometry.
        header: of its weights file: channels, offsets, normalisation.
        block: largest sides, in pixels, that are predicted in one pass (one number, or one per
            axis); the context comes on top. The result does not depend on it. `BLOCK` if left out;
            without a limit where an image is taken in one piece.
        invert: see images as their negatives.
    """

    at_once = 1  # threads that may use it at the same time, each with an image
    # Affinities, but for those of nearest neighbours, are wanted only in rows of the image (y) that
    # are multiples of this; in others they are 0 (see `gdlib.segment.segmenters.stride`).
    stride = 1
    views = range(1)  # in which every image is seen
    engine: str  # what runs it
    precision: str  # type that it computes in, by torch's name
    itemsize: int  # bytes of a number of this type
    device_type = "cpu"

    def __init__(
        self,
        network: Geometry,
        header: dict[str, Any],
        block: int | Sequence[int] | None = None,
        invert: bool = False,
    ) -> None:
        self.network, self.header, self.invert = network, header, invert
        ndim = network.ndim
        if block is not None and network.halo is None:
            raise ValueError(
                "in this network every pixel sees the whole image, so that there are no blocks to "
                "compute one by one: leave the block out, or choose another network for images "
                "that do not fit into memory"
            )
        default = (sys.maxsize,) * ndim if network.halo is None else BLOCK[ndim]
        sides = (
            default
            if block is None
            else (block,) * ndim
            if isinstance(block, int)
            else tuple(block)
        )
        if len(sides) != ndim or min(sides) < 1:
            raise ValueError(
                f"a block of {sides} pixels does not fit this network: give one side, "
                f"or {ndim}, above 0"
            )
        self.block = sides
        self.is_default = block is None

    def __call__(
        self, image: np.ndarray | h5py.Dataset | Source, *, keep_embedding: bool = False
    ) -> Prediction:
        """Predict one image.

        Args:
            image: (C, [Z,] Y, X), intensities as recorded; an array, a dataset on disk (see
                `Source`), or what `source` made of one.
            keep_embedding: return the embedding too, which is D times four times as large as an
                image of 8 bits.

        Raises:
            DataError: for an image that the network cannot take.
        """
        source = image if isinstance(image, Source) else self.source(image)
        everything = tuple(slice(0, n) for n in source.shape)
        kept = everything if keep_embedding else None
        return assembled(
            source.shape,
            ((box, self.predict(source, box, kept)) for box in self.blocks(source.shape)),
        )

    def source(self, image: np.ndarray | h5py.Dataset) -> Source:
        """Return an image as this network sees it; for the arguments see `__call__`."""
        return Source(
            image,
            self.header["channels"],
            self.network.ndim,
            self.header["normalisation"],
            self.invert,
        )

    def ask_for(self, offsets: Offsets, stride: int = 1) -> None:
        """Let affinities of these offsets alone be predicted from now on, in rows of this `stride`:
        what a segmenter uses (see `gdlib.segment.segmenters`).
        """
        self.header, self.stride = {**self.header, "offsets": offsets}, stride

    def block_sides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the sides of the blocks an image is cut into, nearly equal and multiples of the
        network's divisor.

        Where nobody chose a block, an image no larger than one with its context is one block: it
        takes no more memory.
        """
        halo = self.network.halo or (0,) * len(self.block)
        padded = [side + 2 * h for side, h in zip(self.block, halo, strict=True)]
        if self.is_default and math.prod(shape) <= math.prod(padded):
            return tuple(shape)
        sides = []
        for n, side, d in zip(shape, self.block, self.network.divisor, strict=True):
            count = -(-n // max(d, side // d * d))
            sides.append(-(-n // (count * d)) * d)
        return tuple(sides)

    def blocks(self, shape: Sequence[int]) -> list[Box]:
        """Return the blocks of an image, in array order; together they cover each pixel once."""
        cuts = (
            [slice(k, min(k + side, n)) for k in range(0, n, side)]
            for n, side in zip(shape, self.block_sides(shape), strict=True)
        )
        return list(itertools.product(*cuts))

    def largest_pass(self, shape: Sequence[int], sides: Sequence[int]) -> tuple[int, ...]:
        """Return the sides of what the network reads at most at once, in an image that is predicted
        in parts of these sides.
        """
        network = self.network
        whole = legal_shape(network, shape)
        if network.halo is not None:
            spans = (max(0, *o) - min(0, *o) for o in zip(*self.header["offsets"], strict=True))
            context = (
                2 * (h - m) + d - 1
                for h, m, d in zip(network.halo, network.margin, network.divisor, strict=True)
            )
            part = legal_shape(
                network, [sum(lengths) for lengths in zip(sides, spans, context, strict=True)]
            )
            whole = [min(pair) for pair in zip(whole, part, strict=True)]
        return tuple(n + 2 * m for n, m in zip(whole, network.margin, strict=True))

    @abstractmethod
    def predict(self, source: Source, box: Box, kept: Box | None = None) -> Prediction:
        """Predict one part of an image.

        Args:
            source: the image.
            box: the part, one slice per axis.
            kept: where the embedding is wanted; that of the intersection with the box is returned.
        """

    @abstractmethod
    def alive(self, shape: Sequence[int]) -> tuple[float, int]:
        """Return how many bytes of tensors of float32 are alive at once per pixel that is read, in
        an image ([Z,] Y, X), and the length of pixel vectors.
        """

    def reach(self, source: Source, box: Box) -> Box:
        """Return the box with the neighbours that affinities of its pixels are about."""
        offsets = self.header["offsets"]
        low = [min(0, *o) for o in zip(*offsets, strict=True)]
        high = [max(0, *o) for o in zip(*offsets, strict=True)]
        return tuple(
            slice(max(0, s.start + a), min(n, s.stop + b))
            for s, a, b, n in zip(box, low, high, source.shape, strict=True)
        )

    def rows(self, box: Box) -> tuple[int, int]:
        """Return `stride`, and the first row of the box that is a multiple of it, in the box."""
        return self.stride, -box[-2].start % self.stride

    def read(self, source: Source, box: Box) -> tuple[np.ndarray, Box]:
        """Return what the network is to read, (C, *sides), and of which part of the image it will
        speak.

        This part holds the box, where all is as if the network had seen the whole image at once.
        """
        network = self.network
        whole = legal_shape(network, source.shape)
        halo = network.halo or source.shape  # None: all there is
        context = [h - m for h, m in zip(halo, network.margin, strict=True)]
        # All cuts are where the network may be cut; a side on the border of the image is what the
        # network makes of it.
        starts = [
            max(0, s.start - c) // d * d
            for s, c, d in zip(box, context, network.divisor, strict=True)
        ]
        sides = legal_shape(
            network, [s.stop + c - a for s, c, a in zip(box, context, starts, strict=True)]
        )
        stops = [min(a + side, n) for a, side, n in zip(starts, sides, whole, strict=True)]
        image = source.read(
            [a - m for a, m in zip(starts, network.margin, strict=True)],
            [b + m for b, m in zip(stops, network.margin, strict=True)],
        )
        frame = tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))
        return image, frame


def assembled(shape: Sequence[int], parts: Iterable[tuple[Box, Prediction]]) -> Prediction:
    """Put the blocks of an image together.

    Where blocks have an embedding, it is of the whole block.
    """
    out: dict[str, np.ndarray] = {}
    for box, part in parts:
        for name, array in vars(part).items():
            if array is not None:
                leading = array.shape[: array.ndim - len(shape)]
                if name not in out:
                    out[name] = np.empty((*leading, *shape), array.dtype)
                out[name][(..., *box)] = array
    return Prediction(**out)
