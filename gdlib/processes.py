"""Several processes, started by `torchrun`, that train one network together.

In a single process nothing here does anything.

They share the work of `accumulate`: each step's batches are dealt out to them, gradients are added
up, and what the teacher said goes into the memory bank of each. So the recipe alone says what is
computed; a run means the same in one process and in eight.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Meet the other processes, if there are any and the program has not done so, and leave them at
    the end.

    Yields:
        The device of this process.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield device
        return
    cuda = device.type == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else device
    with torch.cuda.device(device) if cuda else contextlib.nullcontext():
        # The others wait while the first one validates.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
        try:
            yield device
        finally:
            dist.destroy_process_group()


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; the one with number 0 validates and writes."""
    return dist.get_rank() if world() > 1 else 0


def add(tensors: Sequence[Tensor], mean: bool = False) -> None:
    """Replace tensors of one type by their sum, or mean, over all processes, in one message."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(part.view_as(tensor) / (world() if mean else 1))


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors (B, ...) of all processes, in their order."""
    if world() == 1:
        return tensor
    parts = [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world())
    ]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def any_of(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process; waits for the device."""
    if world() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)
