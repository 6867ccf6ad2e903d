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
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from gdlib import io
from gdlib.boxes import Box, intersection, relative
from gdlib.data.axes import SECTIONS, View, fitted, kept_axes
from gdlib.data.intensity import Negative, ground_is_elsewhere, intensity_range, rescale
from gdlib.devices import choose_device, choose_precision
from gdlib.kernels.quantised import as_uint8, quantised_affinities
from gdlib.models import folded, trained, untrained
from gdlib.models.ensemble import VIEWS, turned
from gdlib.predict import int8
from gdlib.predict.engine import (
    ONNX,
    Engine,
    check_onnx,
    choose_engine,
    make_engine,
    onnx_engine,
)
from gdlib.types import Prediction

# pixels; larger ones waste less on context, where there is memory
BLOCK = {2: (1024, 1024), 3: (32, 256, 256)}


def legal_shape(network: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
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
        array, shape = seen, seen.shape
        self.array = Negative(array) if invert else array
        self.shape = shape[1:]
        self.normalisation = normalisation

    @cached_property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """What becomes 0 and 1, for each channel."""
        return intensity_range(self.array, **self.normalisation)

    @property
    def ground_is_elsewhere(self) -> bool:
        """Is most of the image as bright as objects were in the training, if that is known?"""
        level = self.normalisation.get("level")
        return level is not None and ground_is_elsewhere(self.array, *self.range, level)

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


class Predictor:
    """A trained network, ready to use on images of any size.

    Args:
        network: with its weights; a copy is made, so that it can go on training.
        header: of its weights file: channels, offsets, normalisation.
        device: name, or `auto`.
        precision: name of a torch type, or `auto`.
        engine: what runs the network, a key of `engine.ENGINES`; it is made ready at the first
            image.
        block: largest sides, in pixels, that are predicted in one pass (one number, or one per
            axis); the context comes on top. The result does not depend on it. `BLOCK` if left out;
            without a limit where an image is taken in one piece.
        levels: names of the feature maps that `features` returns, as far as the network has them.
        invert: see images as their negatives: where objects are dark on a bright ground, and were
            bright in the training.
        augment: see every image turned and mirrored in eight ways, in the plane (Y, X), and take
            the mean of all affinities, and of all foregrounds. Takes eight times as long.
        at_once: how many threads may use it at the same time, each with an image (see
            `engine.make_engine`).
    """

    def __init__(
        self,
        network: nn.Module,
        header: dict[str, Any],
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        engine: str = "torch",
        block: int | Sequence[int] | None = None,
        levels: Sequence[str] = (),
        invert: bool = False,
        augment: bool = False,
        at_once: int = 1,
    ) -> None:
        self.invert, self.at_once = invert, at_once
        self.views = range(VIEWS if augment else 1)
        alike = (network.divisor, network.halo or (0, 0))
        if augment and (
            any((*network.margin, *network.remainder))
            or any(sides[-2] != sides[-1] for sides in alike)
        ):
            raise ValueError(
                "this network loses margins, or does not see both axes of the plane in the same "
                "way, so that its images cannot be turned: leave --augment out"
            )
        self.levels = tuple(level for level in levels if level in network.levels)
        self.device = choose_device(str(device))
        self.dtype = choose_precision(precision, self.device)
        self.wanted_engine = engine
        self.engine = choose_engine(engine, self.device)
        self.network = folded(network).to(self.device)
        self.header = header
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

    @classmethod
    def load(cls, weights: Path | str, *, engine: str = "auto", **kwargs: Any) -> "Predictor":
        """Read a weights file and make its network, to be run by the fastest engine there is, in
        8 bits if there is a form for it (see `int8`); or an ONNX file of `gdlib export`, to be run
        by ONNX Runtime on the CPU.
        """
        if not io.is_onnx(weights):
            return cls._load(weights, engine, **kwargs)
        kwargs = check_onnx(weights, engine, **kwargs)
        network, header = untrained(weights, *io.HEADER)
        predictor = cls(network, header, **kwargs)
        predictor.engine, predictor.run = ONNX, onnx_engine(weights, header["channels"])
        return predictor

    @classmethod
    def _load(
        cls, weights: Path | str, engine: str, precision: str = "auto", **kwargs: Any
    ) -> "Predictor":
        device = choose_device(str(kwargs.get("device", "auto")))
        run = None
        if not kwargs.get("levels"):  # it has none
            run = int8.engine_for(weights, precision, device, engine, kwargs.get("at_once", 1))
        network, header = trained(weights, *io.HEADER)
        if run is None:
            return cls(network, header, engine=engine, precision=precision, **kwargs)
        predictor = cls(network, header, engine=engine, **kwargs)
        predictor.engine, predictor.dtype, predictor.run = "openvino", torch.int8, run
        return predictor

    def __call__(
        self, image: np.ndarray | h5py.Dataset, *, keep_embedding: bool = False
    ) -> Prediction:
        """Predict one image.

        Args:
            image: (C, [Z,] Y, X), intensities as recorded; an array, or a dataset on disk (see
                `Source`).
            keep_embedding: return the embedding too, which is D times four times as large as an
                image of 8 bits.

        Raises:
            DataError: for an image that the network cannot take.
        """
        source = self.source(image)
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

    @torch.inference_mode()
    def predict(self, source: Source, box: Box, kept: Box | None = None) -> Prediction:
        """Predict one part of an image.

        Args:
            source: the image.
            box: the part, one slice per axis.
            kept: where the embedding is wanted; that of the intersection with the box is returned,
                of the image as it is.
        """
        offsets = self.header["offsets"]
        low = [min(0, *o) for o in zip(*offsets, strict=True)]
        high = [max(0, *o) for o in zip(*offsets, strict=True)]
        reach = tuple(
            slice(max(0, s.start + a), min(n, s.stop + b))
            for s, a, b, n in zip(box, low, high, source.shape, strict=True)
        )
        image, frame = self._read(source, reach)
        inner, within = relative(box, frame), relative(reach, frame)
        affinity, foreground, wanted = _Mean(len(self.views)), _Mean(len(self.views)), None
        for view in self.views:
            embedding, logit = (
                turned(part, view, back=True) for part in self.forward(turned(image, view))[:2]
            )
            affinity.add(quantised_affinities(embedding, offsets, inner, within))
            foreground.add(as_uint8(logit[(0, *inner)].sigmoid()))
            if kept is not None and wanted is None:
                part = relative(intersection(box, kept), frame)
                wanted = embedding[(slice(None), *part)].cpu().numpy()
        return Prediction(affinity.rounded(), foreground.rounded(), wanted)

    @torch.inference_mode()
    def embed(self, source: Source, box: Box) -> tuple[Tensor, Tensor]:
        """Return embedding (D, *sides) and foreground logit (*sides) of one part of an image,
        float32, on the device.
        """
        (embedding, foreground, *_), frame = self._around(source, box)
        inner = relative(box, frame)
        return embedding[(slice(None), *inner)], foreground[(0, *inner)]

    @torch.inference_mode()
    def features(self, source: Source, box: Box) -> dict[str, tuple[Tensor, Box, tuple[int, ...]]]:
        """Return those voxels of the feature maps that cover one part of an image.

        Returns:
            For each of `levels` (C, *sides) float32 on the device, which voxels of the map of the
            whole image these are, and at which pixel of the image the first voxel of that map
            begins: at 0, or before.
        """
        (_, _, *maps), frame = self._around(source, box)
        found = {}
        for level, feature in zip(self.levels, maps, strict=True):
            strides = self.network.levels[level][1]
            # Map and output have one centre; all frames start at multiples of the stride, and so
            # have one corner.
            begin = [
                (f.stop - f.start - s * m) // 2
                for f, s, m in zip(frame, strides, feature.shape[1:], strict=True)
            ]
            corner = tuple(-(-b % s) for b, s in zip(begin, strides, strict=True))
            voxels = tuple(
                slice((part.start - c) // s, (part.stop - 1 - c) // s + 1)
                for part, c, s in zip(box, corner, strides, strict=True)
            )
            first = [
                (f.start + b - c) // s
                for f, b, c, s in zip(frame, begin, corner, strides, strict=True)
            ]
            inner = (slice(v.start - k, v.stop - k) for v, k in zip(voxels, first, strict=True))
            found[level] = feature[(slice(None), *inner)], voxels, corner
        return found

    def _around(self, source: Source, box: Box) -> tuple[tuple[Tensor, ...], Box]:
        """Return all that the network says, (C, *sides) each, and of which part of the image."""
        image, frame = self._read(source, box)
        return self.forward(image), frame

    def _read(self, source: Source, box: Box) -> tuple[Tensor, Box]:
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
        return torch.from_numpy(image), frame

    @torch.inference_mode()
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return embedding, foreground logit and `levels` of a normalised image (C, *sides) whose
        sides the network can take.
        """
        return tuple(part[0] for part in self.run(image[None]))

    @cached_property
    def run(self) -> Engine:
        """The network, ready to run."""
        self.engine, run = make_engine(
            self.wanted_engine,
            self.network,
            self.header["channels"],
            self.device,
            self.dtype,
            self.levels,
            self.at_once,
        )
        return run


class _Mean:
    """The mean of some arrays of 8 bits, which are not kept."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.total: np.ndarray | None = None

    def add(self, one: np.ndarray) -> None:
        if self.total is None:
            self.total = one if self.count == 1 else one.astype(np.uint16)
        else:
            self.total += one

    def rounded(self) -> np.ndarray:
        if self.count == 1:
            return self.total
        self.total += self.count // 2
        return (self.total // self.count).astype(np.uint8)


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
