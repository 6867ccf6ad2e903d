"""The memory bank: a ring of what the teacher said about recent crops of images.

It stores *records*, not feature maps: by the Gram identity (`kernels.gram`) an inter-image term
needs one D x D matrix of an image, which is 1 KiB instead of the 19 MiB of a 544 x 544 map of 16
channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gdlib import devices

Memory = dict[str, Tensor]


class MemoryBank(nn.Module):
    """Ring buffer of per-image records; part of the resumable state.

    Args:
        capacity: entries kept (the paper's K).
        sample_size: entries compared per step (the paper's L).
        seed: with the step number, decides which entries are sampled.
        original_ring: PAPER: reproduce the original code's bank, which enqueues before it samples,
            so that images are compared with themselves, writes its last slot twice per cycle of
            capacity + 1, and after each wrap samples only as many entries as were written since.
            Not reproduced: its fixed choice before the bank is full. Off: a ring that returns
            min(sample_size, filled) entries and never one of the current crops; others of the same
            image it does return.
    """

    def __init__(
        self,
        *,
        capacity: int = 32,
        sample_size: int = 12,
        seed: int = 0,
        original_ring: bool = False,
    ) -> None:
        super().__init__()
        self.capacity = capacity
        self.sample_size = sample_size
        self.seed = seed
        self.original_ring = original_ring
        self.register_buffer("ids", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self.records: Memory = {}

    def sample(self, current: Tensor, step: int) -> Memory:
        """Draw entries uniformly without replacement, none of the `current` crops.

        Args:
            current: (B,) ids of the crops of this step, see `Batch`.
            step: number of the step.

        Returns:
            Every record, as (L, ...), and `valid` (L,) boolean: fewer than L entries may qualify.
            Empty before the first record.
        """
        if not self.records:
            return {}
        allowed = self.ids >= 0
        if not self.original_ring:
            allowed &= ~torch.isin(self.ids, current)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = devices.send(
            torch.rand(self.capacity, generator=generator), self.ids.device
        ).masked_fill(~allowed, -1.0)
        score, chosen = order.topk(min(self.sample_size, self.capacity))
        memory = {name: record[chosen] for name, record in self.records.items()}
        memory["valid"] = score >= 0
        if self.original_ring:
            since_wrap = self.written % (self.capacity + 1)
            memory["valid"] &= torch.arange(len(score), device=score.device) < since_wrap
        return memory

    def enqueue(self, current: Tensor, records: Memory) -> None:
        """Store the records of the current images over the oldest entries.

        Args:
            current: (B,) ids.
            records: name to (B, ...).
        """
        for name, record in records.items():
            if name not in self.records:
                self.records[name] = record.new_zeros(self.capacity, *record.shape[1:])
        cycle = self.capacity + 1 if self.original_ring else self.capacity
        index = torch.arange(len(current), device=self.ids.device)
        slot = ((self.written + index) % cycle).clamp(max=self.capacity - 1)
        # A slot met twice gets its last image both times: the order of such writes is undefined.
        last = torch.where(slot[:, None] == slot, index, -1).amax(1)
        self.ids[slot] = current[last]
        for name, record in records.items():
            self.records[name][slot] = record[last]
        self.written += len(current)

    def get_extra_state(self) -> Memory:
        """Return the records, for `state_dict`."""
        return dict(self.records)

    def set_extra_state(self, state: Memory) -> None:
        """Take a copy of the records of `get_extra_state` back."""
        self.records = {name: record.clone() for name, record in state.items()}


def mean_record(memory: Memory, name: str) -> Tensor | None:
    """Mean of one record over the sampled entries, or None when nothing was sampled."""
    if name not in memory:
        return None
    valid = memory["valid"].to(memory[name].dtype)
    return torch.tensordot(valid, memory[name], dims=1) / valid.sum().clamp(min=1)


def check_entries(means: Mapping[str, float], capacity: int) -> None:
    """Raise if terms with memory have had nothing to compare with although the bank is full.

    Args:
        means: of `Distiller.entries` over the last batches, of terms that have never met an entry;
            other names do not count.
        capacity: of the bank.
    """
    for name in means:
        kind, _, term = name.partition("/")
        if kind == "entries" and term and not means[name]:
            why = (
                "patches in the memory bank show an instance: check the labels of the training "
                "images"
            )
            raise ValueError(
                f'the term "{term}" had nothing to compare with, as none of the {capacity} {why}'
            )
