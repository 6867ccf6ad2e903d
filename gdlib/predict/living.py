"""What a network holds of memory while it computes: the tensors that are alive at once."""

import contextlib
import copy
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdlib.blockwise.blocks import legal_shape

# pixels of an image on which tensors are counted; they grow with it
TRIAL = {2: (128, 128), 3: (8, 32, 32)}


def held_per_pixel(
    network: nn.Module, channels: int, whole: Sequence[int] | None = None
) -> tuple[float, int]:
    """Return how many bytes of tensors are alive at once, per pixel that is read, and the length of
    pixel vectors.

    Args:
        network: of which a copy is run.
        channels: of its image.
        whole: sides of what is read, for a network in which every pixel sees all others: there it
            matters.
    """
    if network.halo is None:
        sides, where = whole, "meta"
    else:
        inner = legal_shape(network, TRIAL[network.ndim])
        sides, where = [n + 2 * m for n, m in zip(inner, network.margin, strict=True)], "cpu"
    peak, length = live_bytes(network, channels, sides, where)
    return peak / math.prod(sides), length


def live_bytes(
    network: nn.Module, channels: int, sides: Sequence[int], device: str
) -> tuple[int, int]:
    """Return how many bytes of tensors are alive at once in a pass, the image among them, and the
    length of pixel vectors.

    Args:
        network: of which a copy is run.
        channels: of its image.
        sides: ([Z,] Y, X) of the image, in pixels; there must be a way to cut it so.
        device: `cpu`, or `meta`, where nothing is computed, so that an image of any size is no
            matter.
    """
    network = copy.deepcopy(network).to(device)
    # of what a network makes itself; it takes torch a second to get ready for this
    there = torch.device(device) if device == "meta" else contextlib.nullcontext()
    with torch.inference_mode(), there, _Living() as living:
        out = network(torch.zeros(1, channels, *sides, device=device))
    return living.peak, out.embedding.shape[1]


class _Living(TorchDispatchMode):
    """Adds up the sizes of all storages that operations make, and takes off those that are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.size = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and what would do it takes a second to load

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and (storage := tensor.untyped_storage()) not in self.known
            ):
                self.known.add(storage)
                self.size += storage.nbytes()
                self.peak = max(self.peak, self.size)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.size -= size
