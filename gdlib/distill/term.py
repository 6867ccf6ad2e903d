"""What a loss is here: the class that a new one derives from."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from gdlib.distill.bank import Memory
from gdlib.distill.targets import Targets
from gdlib.distill.view import View
from gdlib.registry import TERMS


class Term(nn.Module):
    """One loss. Subclasses live one per file in `gdlib/distill/terms/`.

    Their weight belongs to the method, not to them.

    Attributes:
        needs_teacher: off for terms that learn from the label.
        whole: it compares the outputs as a whole, not one map, and cannot have a level.
        projected: at a level it gets the student's map with as many channels as the teacher's, by a
            learned projection; off for terms that compare similarities alone.
        apart: options that do not go together, each as a dict, written in the class body; the
            configuration refuses them.
        levels: feature maps that it reads from `View.output` itself, as far as the networks have
            them.
        uses: which of `affinity`, `nodes`, `gram` and `kernels.PAIR_LOSSES` of the student's view
            it asks for. Only for speed: these are computed together.
    """

    needs_teacher = True
    whole = False
    projected = True
    apart: Sequence[dict[str, Any]] = ()
    levels: Sequence[str] = ()
    uses: Collection[str] = ()

    def __init__(self, memory: bool = False) -> None:
        super().__init__()
        self.memory = memory

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Make learned modules that depend on the networks.

        They are trained along, saved to resume, and never deployed.
        """

    def record(self, teacher: View) -> dict[str, Tensor]:
        """What the memory bank keeps of each teacher image for this term alone: name to (B, ...)
        tensor. Only with memory.
        """
        return {}

    def entries(self, memory: Memory) -> Tensor:
        """Count the sampled entries of the memory bank, not empty, that this term compares with: a
        scalar.
        """
        return memory["valid"].sum()

    def forward(self, student: View, teacher: View, targets: Targets, memory: Memory) -> Tensor:
        """Return a scalar, averaged over the batch."""
        raise NotImplementedError


def build_term(name: str, memory: bool, options: dict) -> Term:
    """Make one term by name; only terms that can use the memory bank accept `memory=True`."""
    kwargs = {**options, "memory": True} if memory else options
    return TERMS.make(name, **kwargs)
