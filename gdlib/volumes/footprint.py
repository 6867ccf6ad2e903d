"""What an image will need of memory, before anything is computed, and how it is cut into blocks
where that is too much.

| part | bytes |
|---|---|
| the process as it is | as measured, with the image where that is held in memory |
| the network | its largest pass: the tensors that are alive at once, counted on a small image |
| the prediction | one for each affinity and for the foreground, per pixel |
| the segmentation | per pixel, as measured for each segmenter with all pixels foreground |
| | (`Segmenter.memory`) |

It is what is needed at most, but for predictions that are little more than noise. Where objects
fill a fifth of an image, a third is enough. In blocks (see `gdlib.volumes.jobs`), a block is
predicted while another one, with its overlap, is segmented.
"""

import copy
import itertools
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gdlib.blockwise.blocks import BLOCK, Blockwise, legal_shape
from gdlib.segment import segmenters
from gdlib.volumes import grid
from gdlib.volumes.grid import Grid
from gdlib.volumes.memory import GIB

# How much of the tensors that are alive an engine holds, by axes: what was measured in float32 over
# the networks of the catalogue is between half and 1.25 times as much. Both keep some in an order
# of their own, and share others.
HELD = {
    "torch": {2: 1.4, 3: 1.0},
    "openvino": {2: 1.75, 3: 0.75},
    "onnxruntime": {2: 1.75, 3: 1.5},
}
SMALLEST_PASS = {2: (128, 128), 3: (8, 64, 64)}  # pixels; smaller ones compute little but context


@dataclass(frozen=True)
class Choice:
    """How an image is segmented.

    Attributes:
        predictor: with passes that fit.
        whole: bytes needed at most in one piece.
        need: bytes needed at most as it is done.
        grid: None in one piece.
    """

    predictor: Blockwise
    whole: int
    need: int
    grid: Grid | None = None

    def sentence(self, budget: int) -> str:
        """Say what is needed, what there is, and what is done about it."""
        if self.grid is None:
            return (
                f"needs up to {gib(self.need)} GiB of memory, and {gib(budget)} may be used: it "
                "is segmented in one piece"
            )
        sides = "x".join(map(str, self.grid.sides))
        return (
            f"in one piece it would need up to {gib(self.whole)} GiB of memory, and {gib(budget)} "
            f"may be used (--memory): it is segmented in {len(self.grid.names)} blocks of {sides} "
            f"pixels, which need up to {gib(self.need)}"
        )


def is_large(predictor: Blockwise, shape: Sequence[int]) -> bool:
    """Is an image larger than what goes through the network at once, so that it matters what it
    needs?
    """
    halo = predictor.network.halo or (0,) * len(shape)
    return math.prod(shape) > math.prod(
        side + 2 * h for side, h in zip(BLOCK[len(shape)], halo, strict=True)
    )


class Need:
    """Tells what images need at most in one piece, besides what the process has.

    Args:
        predictor: of the images.
        segmenter: a key of `SEGMENTERS`.
        parameters: of it.
    """

    def __init__(self, predictor: Blockwise, segmenter: str, parameters: Mapping[str, Any]) -> None:
        self.predictor = predictor
        ndim = predictor.network.ndim
        self.channels = len(segmenters.used(segmenter, predictor.header["offsets"])) + 1
        self.per_pixel = self.channels + segmenters.SEGMENTERS[segmenter].memory(
            ndim, self.channels - 1, **parameters
        )
        self._passes: dict[tuple[int, ...] | None, _Pass] = {}
        self._lock = threading.Lock()  # tensors are followed in one thread at a time

    def __call__(self, shape: Sequence[int]) -> int:
        """Return the bytes for an image ([Z,] Y, X)."""
        return self.network(self.predictor, shape, shape) + int(self.per_pixel * math.prod(shape))

    def network(self, predictor: Blockwise, shape: Sequence[int], part: Sequence[int]) -> int:
        """Return the bytes of the largest pass of a predictor with other blocks, if parts of these
        sides are wanted.
        """
        network = self.predictor.network
        # where every pixel sees all, how large the image is matters
        trial = None if network.halo is not None else legal_shape(network, shape)
        with self._lock:
            if trial not in self._passes:
                self._passes[trial] = _Pass(self.predictor, shape)
            return self._passes[trial].memory(predictor, shape, part)


def choose(
    predictor: Blockwise,
    shape: Sequence[int],
    segmenter: str,
    parameters: Mapping[str, Any],
    *,
    held: int,
    budget: int,
    before: Sequence[int] | None = None,
) -> Choice:
    """Take an image in one piece where that fits, else in the blocks and passes that compute the
    fewest pixels twice.

    Args:
        predictor: of the image; its passes may become smaller where nobody chose them.
        shape: ([Z,] Y, X).
        segmenter: a key of `SEGMENTERS`.
        parameters: of it.
        held: bytes that the process has.
        budget: bytes that it may have.
        before: largest sides of a block of a run that was stopped; it goes on in blocks, in those
            if they fit.

    Raises:
        ValueError: it does not fit in any way; one sentence.
    """
    ndim = len(shape)
    needed = Need(predictor, segmenter, parameters)
    whole = held + needed(shape)
    if whole <= budget and not before:
        return Choice(predictor, whole, whole)
    told = f"in one piece it needs up to {gib(whole)} GiB of memory, and {gib(budget)} may be used"
    if predictor.network.halo is None:
        raise ValueError(
            f"{told}; in this network every pixel sees the whole image, so that there are no "
            "blocks: choose another network, a machine with more memory, or a larger --memory to "
            "try all the same"
        )
    found = []
    passes = (
        _halved(predictor.block, SMALLEST_PASS[ndim]) if predictor.is_default else [predictor.block]
    )
    overlap = grid.OVERLAP[ndim]
    before = tuple(before) if before else None
    blocks = [before] if before else []
    blocks += _halved(grid.BLOCK[ndim], [2 * side for side in overlap])
    for sides, block in itertools.product(passes, blocks):
        smaller = copy.copy(predictor)  # it shares the network
        smaller.block, smaller.is_default = sides, predictor.is_default and sides == predictor.block
        cut = Grid(tuple(shape), block, overlap)
        around = [
            min(n, side + 2 * o) for n, side, o in zip(shape, cut.sides, overlap, strict=True)
        ]
        network = needed.network(smaller, shape, cut.sides)
        rest = needed.channels * math.prod(cut.sides) + needed.per_pixel * math.prod(around)
        need = held + network + int(rest)
        largest = smaller.largest_pass(shape, smaller.block_sides(cut.sides))
        twice = math.prod(largest) / math.prod(smaller.block_sides(cut.sides)) + math.prod(
            around
        ) / math.prod(cut.sides)
        found.append((block != before, twice, need, Choice(smaller, whole, need, cut)))
    fitting = [entry for entry in found if entry[2] <= budget]
    if not fitting:
        least = min(entry[2] for entry in found)
        raise ValueError(
            f"{told}; in blocks it is {gib(least)} at least: choose a machine with more memory, or "
            "a larger --memory to try all the same"
        )
    return min(fitting, key=lambda entry: entry[:2])[-1]


def gib(size: int) -> str:
    """Return bytes as GiB, to be read."""
    return f"{size / GIB:.1f}" if size > GIB / 2 else f"{size / GIB:.2g}"


def _halved(sides: Sequence[int], smallest: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield sides, and their halves as long as there is something to halve."""
    while True:
        yield tuple(sides)
        if all(side <= least for side, least in zip(sides, smallest, strict=True)):
            return
        sides = [
            min(side, max(least, side // 2)) for side, least in zip(sides, smallest, strict=True)
        ]


class _Pass:
    """What a network holds while it computes, by the number of pixels that it reads."""

    def __init__(self, predictor: Blockwise, shape: Sequence[int]) -> None:
        channels = predictor.header["channels"]
        if predictor.device_type == "cuda":  # it holds them there
            self.per_pixel = 4.0 * channels
            return
        alive, dimension = predictor.alive(shape)
        # in 8 bits not everything is
        held = HELD[predictor.engine][len(shape)] * max(2, predictor.itemsize) / 4 * alive
        # Vectors in float32, and once more where they were seen turned or are not in lines: torch
        # has given back what it held by then, but for a copy. Then the image as it is read and
        # normalised.
        self.per_pixel = (
            held + 8 * dimension if predictor.engine == "openvino" else max(held, 12 * dimension)
        )
        self.per_pixel += 32 * channels

    def memory(self, predictor: Blockwise, shape: Sequence[int], part: Sequence[int]) -> int:
        return int(
            self.per_pixel * math.prod(predictor.largest_pass(shape, predictor.block_sides(part)))
        )
