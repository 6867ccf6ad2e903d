"""Networks of torch that predict images of any size, by torch or what else runs them; what is done
with blocks is in `gdlib.blockwise`.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gdlib import io
from gdlib.blockwise.blocks import Blockwise, Source
from gdlib.boxes import Box, intersection, relative
from gdlib.devices import choose_device, choose_precision
from gdlib.models import folded, shortened, trained, untrained
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
from gdlib.predict.living import held_per_pixel
from gdlib.predict.quantised import quantised_affinities, quantised_foreground
from gdlib.types import Prediction


class Predictor(Blockwise):
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
        shorten: compute with shorter vectors of the same lengths and angles where there are (see
            `gdlib.models.shortened`); those that are returned have their own length.
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
        shorten: bool = True,
    ) -> None:
        self.at_once = at_once
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
        network, self.basis = folded(network), None
        if shorten:
            network, self.basis = shortened(network)
        super().__init__(network.to(self.device), header, block, invert)

    @property
    def precision(self) -> str:
        """Name of the type that the network computes in."""
        return str(self.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of this type."""
        return self.dtype.itemsize

    @property
    def device_type(self) -> str:
        """Kind of the device."""
        return self.device.type

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
        predictor = cls(network, header, shorten=False, **kwargs)
        predictor.engine, predictor.run = ONNX, onnx_engine(weights, header["channels"])
        return predictor

    @classmethod
    def _load(
        cls, weights: Path | str, engine: str, precision: str = "auto", **kwargs: Any
    ) -> "Predictor":
        device = choose_device(str(kwargs.get("device", "auto")))
        form = None
        if not kwargs.get("levels"):  # it has none
            form = int8.form_for(weights, precision, device, engine)
        network, header = trained(weights, *io.HEADER)
        if form is None:
            return cls(network, header, engine=engine, precision=precision, **kwargs)
        predictor = cls(network, header, engine=engine, **kwargs)
        predictor.engine, predictor.dtype = "openvino", torch.int8
        predictor.run = int8.compiled(form.model, predictor.at_once)
        # that of the network may be another one, of the same space
        predictor.basis = None if form.basis is None else torch.from_numpy(form.basis)
        return predictor

    @torch.inference_mode()
    def predict(self, source: Source, box: Box, kept: Box | None = None) -> Prediction:
        """Predict one part of an image; see `Blockwise.predict`. With several views, the embedding
        is that of the image as it is.
        """
        offsets = self.header["offsets"]
        reach = self.reach(source, box)
        image, frame = self._read(source, reach)
        inner, within = relative(box, frame), relative(reach, frame)
        affinity, foreground, wanted = _Mean(len(self.views)), _Mean(len(self.views)), None
        for view in self.views:
            embedding, logit = (
                turned(part, view, back=True) for part in self.forward(turned(image, view))[:2]
            )
            affinity.add(quantised_affinities(embedding, offsets, inner, within, self.rows(box)))
            foreground.add(quantised_foreground(logit[(0, *inner)]))
            if kept is not None and wanted is None:
                part = relative(intersection(box, kept), frame)
                wanted = self.lengthened(embedding[(slice(None), *part)]).cpu().numpy()
        return Prediction(affinity.rounded(), foreground.rounded(), wanted)

    def alive(self, shape: Sequence[int]) -> tuple[float, int]:
        """Count it on an image; see `Blockwise.alive`."""
        largest = self.largest_pass(shape, shape)
        return held_per_pixel(self.network, self.header["channels"], largest)

    @torch.inference_mode()
    def embed(self, source: Source, box: Box) -> tuple[Tensor, Tensor]:
        """Return embedding (D, *sides) and foreground logit (*sides) of one part of an image,
        float32, on the device.
        """
        (embedding, foreground, *_), frame = self._around(source, box)
        inner = relative(box, frame)
        return self.lengthened(embedding[(slice(None), *inner)]), foreground[(0, *inner)]

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

    def lengthened(self, vectors: Tensor) -> Tensor:
        """Return vectors of `forward`, (R, *sides), in all their dimensions, (D, *sides)."""
        if self.basis is None:
            return vectors
        return torch.tensordot(self.basis.to(vectors.device), vectors, 1)

    def _around(self, source: Source, box: Box) -> tuple[tuple[Tensor, ...], Box]:
        """Return all that the network says, (C, *sides) each, and of which part of the image."""
        image, frame = self._read(source, box)
        return self.forward(image), frame

    def _read(self, source: Source, box: Box) -> tuple[Tensor, Box]:
        image, frame = self.read(source, box)
        return torch.from_numpy(image), frame

    @torch.inference_mode()
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return embedding, foreground logit and `levels` of a normalised image (C, *sides) whose
        sides the network can take. Vectors may be shortened (see `gdlib.models.shortened`).
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
