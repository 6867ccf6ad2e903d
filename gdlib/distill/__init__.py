"""Distillation: a student, a frozen teacher, and a list of weighted terms that compare what the two
see.

A term never sees a network, nor from which of its maps the vectors are: the embedding or, by
choice, a level inside. It gets a `View` of each network's output (the relations that several terms
need, each computed once), the `Targets` of the batch, and, if it compares with other images, what
was sampled from the memory bank.
"""

from gdlib.distill.distiller import Asked, Distiller, forward_cropped
from gdlib.distill.targets import Targets
from gdlib.distill.term import Term, build_term
from gdlib.distill.view import View, check_comparable

__all__ = [
    "Asked",
    "Distiller",
    "Targets",
    "Term",
    "View",
    "build_term",
    "check_comparable",
    "forward_cropped",
]
