"""All that happens between an image and its affinities as one module, in operations that other
programs have too.

It is written such that `torch.export` and `torch.jit.script` understand it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib.data.intensity import GAUSSIAN_MEDIAN, ROUNDING, STEPS
from gdlib.models import folded
from gdlib.types import Offsets

OUTPUTS = ("affinity", "foreground", "embedding")


class Heads(nn.Module):
    """A network without its feature maps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = folded(network).cpu()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return embedding and foreground logit."""
        out = self.network(image)
        return out.embedding, out.foreground


class Graph(nn.Module):
    """A network with what is around it.

    Intensities are normalised as by `gdlib.data.intensity`, and sides are filled up by mirroring as
    `gdlib.blockwise` does it, so that the image may be of any size (but see `export.SMALLEST`).
    Only a network that does not pad by itself (`margin`) wants sides that it can take, and the
    context in them.

    Args:
        network: in 2D or 3D.
        offsets: K displacements.
        normalisation: keyword arguments of `intensity_range`; None for images that are normalised.
    """

    def __init__(
        self, network: nn.Module, offsets: Offsets, normalisation: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.heads: nn.Module = Heads(network)
        self.offsets = [list(offset) for offset in offsets]
        self.divisor = [1] * network.ndim if any(network.margin) else list(network.divisor)
        self.normalised = normalisation is None
        found = {"lower": 0.0, "upper": 100.0, **(normalisation or {})}
        self.lower, self.upper = float(found["lower"]), float(found["upper"])
        self.has_contrast = found.get("contrast") is not None
        self.steps, self.rounding, self.sigmas = list(STEPS), ROUNDING, GAUSSIAN_MEDIAN / 6
        self.register_buffer("contrast", torch.tensor(found.get("contrast") or [0.0]))
        self.register_buffer("level", torch.tensor(found.get("level") or [0.0]))

    def forward(
        self, image: Tensor, low: Tensor | None = None, high: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict images.

        Args:
            image: (B, C, [Z,] Y, X) float32, finite.
            low: (C,) what becomes 0, as where the image is a part of a larger one. Each image's own
                range if left out, or in an export to ONNX if it is NaN.
            high: (C,) what becomes 1.

        Returns:
            Affinity (B, K, *sides) and foreground (B, 1, *sides) in [0, 1], embedding
            (B, D, *sides); each side smaller than that of the image by twice the `margin`.
        """
        if not self.normalised:
            image = self._scaled(image, low, high)
        sides = image.shape[2:]
        for axis, divisor in enumerate(self.divisor):
            side = (sides[axis] + divisor - 1) // divisor * divisor
            image = image.index_select(axis + 2, mirrored(sides[axis], side, image.device))
        embedding, foreground = self.heads(image)
        for axis, divisor in enumerate(self.divisor):
            if divisor > 1:
                embedding = embedding.narrow(axis + 2, 0, sides[axis])
                foreground = foreground.narrow(axis + 2, 0, sides[axis])
        return self._affinities(embedding), foreground.sigmoid(), embedding

    def _scaled(self, image: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
        if low is None or high is None:
            lows, highs = self._range(image)
        elif torch.jit.is_scripting():
            lows, highs = self._given_range(image, low, high)
        else:  # a branch of the exported graph, so that a given range costs nothing
            lows, highs = torch.cond(
                low.isnan().any(), self._own_range, self._given_range, (image, low, high)
            )
        width = torch.where(highs > lows, highs - lows, float("inf"))
        for _ in range(image.dim() - 2):
            lows, width = lows.unsqueeze(-1), width.unsqueeze(-1)
        return (image - lows) / width

    def _given_range(self, image: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels = image.shape[0], image.shape[1]
        return low.expand(batch, channels).clone(), high.expand(batch, channels).clone()

    def _own_range(self, image: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._range(image)

    def _range(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See `gdlib.data.intensity.intensity_range`; (B, C) each."""
        values = image.flatten(2).sort(-1)[0]
        low, high = percentile(values, self.lower), percentile(values, self.upper)
        flat = high <= low
        low = torch.where(flat, values[..., 0], low)
        high = torch.where(flat, values[..., -1], high)
        if self.has_contrast:
            more = (self.contrast * self._noise(image) - (high - low)).clamp(min=0)
            more = torch.where((high == low) & (more == 0), 1.0, more)
            low, high = low - self.level * more, high + (1 - self.level) * more
        return low, high

    def _noise(self, image: Tensor) -> Tensor:
        """See `gdlib.data.intensity.pixel_noise`, but all pixels count; (B, C)."""
        whole = (image == image.round()).flatten(2).all(-1)
        noise = torch.where(whole, self.rounding, 0.0)
        for step in self.steps:
            part = image
            for axis in (-1, -2):
                middle = cut(part, axis, step, -step)
                part = cut(part, axis, 2 * step, None) - 2 * middle + cut(part, axis, 0, -2 * step)
            ripples = part.abs().flatten(2).sort(-1)[0]
            noise = torch.maximum(noise, percentile(ripples, 50.0) * self.sigmas)
        return noise

    def _affinities(self, embedding: Tensor) -> Tensor:
        unit = F.normalize(embedding, dim=1)
        out: list[Tensor] = []
        for offset in self.offsets:
            pad: list[int] = []
            for d in offset:
                pad = [max(0, -d), max(0, d)] + pad  # noqa: RUF005, which is not scripted
            there = F.pad(unit, pad)
            for axis, d in enumerate(offset):
                there = there.narrow(axis + 2, max(0, d), unit.shape[axis + 2])
            out.append((unit * there).sum(1).clamp(0, 1))
        return torch.stack(out, 1)


def mirrored(n: int, side: int, device: torch.device) -> Tensor:
    """Return indices of `side` pixels from the first one on, folded into [0, n) as by a mirror."""
    last = torch.full([], n - 1, dtype=torch.int64, device=device)
    index = torch.arange(side, device=device).remainder((2 * last).clamp(min=1))
    return torch.minimum(index, 2 * last - index)


def cut(x: Tensor, axis: int, start: int, stop: int | None) -> Tensor:
    """Return a slice along an axis; what is beyond the array is not there."""
    return torch.ops.aten.slice(x, axis, start, stop)


def percentile(values: Tensor, percent: float) -> Tensor:
    """Return what `np.percentile` does of the last axis, which is sorted."""
    last = torch.full([1], values.shape[-1] - 1, dtype=torch.float64, device=values.device)
    # of whole numbers, for an exporter writes others in float32
    position = last * float(round(percent * 10_000)) / 1_000_000.0
    before = values.index_select(-1, position.floor().long())[..., 0]
    after = values.index_select(-1, position.ceil().long())[..., 0]
    return before + (position - position.floor()).float() * (after - before)
