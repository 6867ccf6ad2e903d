"""From an image to affinities and foreground, by overlapping blocks that are blended as embeddings.

Blending before affinities are computed leaves no seams: an affinity across a block border compares two blended vectors.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdlib import io, ops
from gdlib.data.patches import normalise
from gdlib.models import build, folded


@dataclass(frozen=True)
class Prediction:
    """What a network says about one image.

    Attributes:
        affinity: (K, [Z,] Y, X) uint8, 255 a; negative cosines are 0.
        foreground: ([Z,] Y, X) uint8, 255 p.
        embedding: (D, [Z,] Y, X) float32, raw.
    """

    affinity: np.ndarray
    foreground: np.ndarray
    embedding: np.ndarray


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of this name; `auto` takes an accelerator if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'device "{name}" cannot be used: {str(error).splitlines()[0]}') from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type that networks compute in; `auto` takes bfloat16 where the hardware multiplies in it, else float32."""
    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name)
    if name != "auto":
        raise ValueError(f'there is no precision "{name}": choose auto, float32, bfloat16 or float16')
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Without matrix units for it, bfloat16 is slower than float32 on a CPU.
    fast = device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return torch.bfloat16 if fast else torch.float32


class Predictor:
    """A trained network, ready to use on images of any size.

    Args:
        network: with its weights; a copy is made, so that it can go on training.
        header: of its weights file: channels, offsets, normalisation, segmentation.
        device: name, or `auto`.
        precision: name of a torch type, or `auto`.
        block: largest side, in pixels, that is computed in one pass.
        halo: context, in pixels, added on each side of a block; neighbours are blended over it.
    """

    def __init__(
        self,
        network: nn.Module,
        header: dict[str, Any],
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        block: int = 1024,
        halo: int = 64,
    ) -> None:
        self.device = choose_device(str(device))
        self.dtype = choose_precision(precision, self.device)
        layout = {"memory_format": torch.channels_last} if network.ndim == 2 else {}
        self.network = folded(network).to(self.device, **layout)
        self.header = header
        self.block = block
        self.halo = halo

    @classmethod
    def load(cls, weights: Path | str, **kwargs: Any) -> "Predictor":
        """Read a weights file and make its network."""
        state, header = io.load_weights(weights)
        network = build(header["model"], header["options"])
        network.load_state_dict(state)
        return cls(network, header, **kwargs)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> Prediction:
        """Predict one image.

        Args:
            image: (C, [Z,] Y, X), intensities as recorded.
        """
        channels, ndim = self.header["channels"], self.network.ndim
        if image.ndim != ndim + 1 or len(image) != channels:
            raise io.DataError(
                f"an image of shape {image.shape} does not fit this network, which wants {channels} channel(s) and "
                f"{ndim} axes; convert the image or choose another model"
            )
        data = torch.from_numpy(normalise(image, **self.header["normalisation"]))
        embedding, foreground = self.embed(data)
        affinity = ops.affinities(ops.unit(ops.rows(embedding[None])), self.header["offsets"])[0]
        return Prediction(
            (affinity.clamp_(0, 1) * 255).round_().to(torch.uint8).cpu().numpy(),
            (foreground.sigmoid() * 255).round().to(torch.uint8).cpu().numpy(),
            embedding.cpu().numpy(),
        )

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blended embedding (D, *shape) and the foreground logit (*shape), both float32.

        Args:
            image: (C, *shape), normalised.
        """
        shape = image.shape[1:]
        pieces = [self._pieces(n) for n in shape]
        if all(len(axis) == 1 for axis in pieces):
            return self._forward(image)
        total: Tensor | None = None
        for corner in itertools.product(*pieces):
            box = tuple(slice(start, stop) for start, stop in corner)
            embedding, foreground = self._forward(image[(slice(None), *box)])
            piece = torch.cat([embedding, foreground[None], torch.ones_like(foreground)[None]])
            for axis, ((start, stop), n) in enumerate(zip(corner, shape, strict=True)):
                ramp = self._ramp(start, stop, n).reshape(-1, *(1,) * (len(shape) - 1 - axis))
                piece *= ramp.to(piece)
            if total is None:
                total = piece.new_zeros(len(piece), *shape)
            total[(slice(None), *box)] += piece
        total[:-1] /= total[-1]
        return total[:-2], total[-2]

    def _pieces(self, n: int) -> list[tuple[int, int]]:
        """Cut an axis into overlapping pieces of at most `block` pixels; all starts are multiples of the pooling."""
        if n <= self.block:
            return [(0, n)]
        divisor = self.network.divisor
        inner = max(divisor, (self.block - 2 * self.halo) // divisor * divisor)
        count = max(1, -(-(n - 2 * self.halo) // inner))
        return [(k * inner, min(n, (k + 1) * inner + 2 * self.halo)) for k in range(count)]

    def _ramp(self, start: int, stop: int, n: int) -> Tensor:
        """Blending weight along one axis: 1 inside, falling linearly to 0 over the inner half of the overlap with a neighbour.

        The outer quarter of the overlap, half a halo wide, counts nothing: there the network sees the cut.
        """
        weight = torch.ones(stop - start)
        width = min(2 * self.halo, stop - start)
        slope = (2 * (torch.arange(width) + 0.5) / max(width, 1) - 0.5).clamp(0, 1)
        if start > 0:
            weight[:width] *= slope
        if stop < n:
            weight[len(weight) - width :] *= slope.flip(0)
        return weight

    def _forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        shape = image.shape[1:]
        padding = [(-n) % self.network.divisor for n in shape]
        x = image[None].to(self.device)
        if any(padding):
            mode = "reflect" if all(p < n for p, n in zip(padding, shape, strict=True)) else "replicate"
            x = F.pad(x, [side for p in reversed(padding) for side in (0, p)], mode=mode)
        if self.network.ndim == 2:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.network(x)
        inner = tuple(slice(n) for n in shape)
        return output.embedding[0].float()[(slice(None), *inner)], output.foreground[0, 0].float()[inner]


def predict_split(
    predictor: Predictor, data: Path | str, out: Path | str, *, weights_sha256: str, keep_embeddings: int = 0
) -> None:
    """Predict every sample of a split and write the predictions file.

    Args:
        predictor: the network.
        data: samples `.h5`.
        out: predictions `.h5`.
        weights_sha256: of the weights file, kept as an attribute.
        keep_embeddings: for so many samples, the first by name, the embedding is kept too (float16), for figures.
    """
    kept = io.sample_ids(data)[:keep_embeddings]
    attrs = {key: predictor.header[key] for key in ("offsets", "segmentation")}
    with io.create_h5(out, **attrs, kept=kept, weights_sha256=weights_sha256) as file:
        for sample in io.read_samples(data):
            prediction = predictor(sample.image)
            group = file.create_group(sample.id)
            io.put(group, "affinity", prediction.affinity)
            io.put(group, "foreground", prediction.foreground)
            if sample.id in kept:
                io.put(group, "embedding", prediction.embedding.astype(np.float16))
