"""What follows from the labels of a batch."""

from functools import cached_property

from torch import Tensor

from gdlib import kernels, types


class Targets:
    """Everything that follows from the labels of a batch.

    Each part is computed on first use, once.
    """

    def __init__(
        self,
        label: Tensor,
        offsets: types.Offsets,
        *,
        ignore: Tensor | None = None,
        background_connected: bool = True,
        per_offset: bool = False,
        largest: int | None = None,
    ) -> None:
        """See `gdlib.config.sections.TargetsOptions` and `Batch` for the last three."""
        self.label = label if ignore is None else label.masked_fill(ignore, 0)
        self.offsets = offsets
        self.ignore = ignore
        self.background_connected = background_connected
        self.per_offset = per_offset
        self.largest = largest

    @cached_property
    def pairs(self) -> kernels.Pairs:
        """Neighbouring pixels and what they weigh."""
        targets = {"background_connected": self.background_connected, "per_offset": self.per_offset}
        return kernels.Pairs(self.label, self.offsets, ignore=self.ignore, **targets)

    @property
    def affinity(self) -> Tensor:
        """(B, K, [Z,] Y, X) boolean target."""
        return self.pairs.target

    @property
    def balance(self) -> Tensor:
        """(B, K, [Z,] Y, X) class weights of the affinity targets, 0 outside and where a label is
        not known.
        """
        return self.pairs.weight

    @cached_property
    def instances(self) -> kernels.Instances:
        """Pixel-to-node map without the background."""
        return kernels.Instances(self.label, largest=self.largest)

    @cached_property
    def instances_and_background(self) -> kernels.Instances:
        """Pixel-to-node map in which every background is a node too.

        What is not known belongs to none.
        """
        if self.ignore is None:
            return kernels.Instances(self.label, background=True, largest=self.largest)
        largest = None if self.largest is None else self.largest + 1
        return kernels.Instances((self.label + 1).masked_fill(self.ignore, 0), largest=largest)
