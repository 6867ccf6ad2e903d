"""Some of many things, evenly spread: neighbours in a list are often alike, as in a well plate."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def spread(things: Sequence[Any], count: int) -> list[Any]:
    """Return at most so many of some things, evenly from the first to the last.

    >>> spread("abcdefg", 3), spread("abcdefg", 1), spread("ab", 3), spread("", 4)
    (['a', 'd', 'g'], ['a'], ['a', 'b'], [])
    """
    places = np.linspace(0, len(things) - 1, min(count, len(things))).round().astype(int)
    return [things[k] for k in places]
