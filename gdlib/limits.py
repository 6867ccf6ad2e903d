"""What people may choose: kinds of values with their ranges, each written once, and the sentence about a value outside of it.

An option of a plug-in says its kind in its signature, `pool: Count = 1`; the command line, the configuration and the header of
weights are all checked against that, before anything is loaded. Starts without torch.
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, TypeAdapter, ValidationError, WrapValidator


@dataclass(frozen=True)
class Range:
    """Annotation of an int or a float: from `low` to `high`, without these two where they are `open`."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def words(self, whole: bool) -> str:
        """Say which numbers these are.

        >>> Range(0, 1).words(whole=False), Range(0, open=True).words(whole=False), Range(1).words(whole=True)
        ('a number from 0 to 1', 'a number above 0', 'a whole number of at least 1')
        """
        kind = "a whole number" if whole else "a number"
        if math.isinf(self.high):
            return kind if math.isinf(self.low) else f"{kind} {'above' if self.open else 'of at least'} {self.low:g}"
        ends = ("above", "and below") if self.open else ("from", "to")
        return f"{kind} {ends[0]} {self.low:.10g} {ends[1]} {self.high:.10g}"

    def __contains__(self, value: float) -> bool:
        inside = self.low < value < self.high if self.open else self.low <= value <= self.high
        return inside and math.isfinite(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Let pydantic check it."""

        def check(value: Any, number: Callable) -> Any:
            try:
                if not isinstance(value, bool | str) and (found := number(value)) in self:
                    return found
            except ValidationError:
                pass
            raise ValueError(f"must be {self.words(source is int)}")

        return WrapValidator(check).__get_pydantic_core_schema__(source, handler)


def words(kind: Any) -> str:
    """Say which values are of a kind that has a range.

    >>> words(Inside)
    'a number above 0 and below 1'
    """
    base, limits = get_args(kind)
    return limits.words(base is int)


def once(values: tuple) -> tuple:
    """Raise unless every value is there once."""
    for value in values:
        if values.count(value) > 1:
            shown = list(value) if isinstance(value, tuple) else value
            raise ValueError(f"{shown} is there twice; leave one out")
    return values


def _complete(values: dict) -> dict:
    for split in ("train", "val", "test"):
        if split not in values:
            raise ValueError(f"must have {split}, as well as the other two splits")
    return values


def _rising(pair: tuple) -> tuple:
    if pair[0] > pair[1]:
        raise ValueError("must be the smaller number, then the larger one")
    return pair


Number = Annotated[float, Range()]
Positive = Annotated[float, Range(0, open=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
Inside = Annotated[float, Range(0, 1, open=True)]
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Stride = Annotated[int, Range(1, 1024)]
Counts = Annotated[tuple[Count, Count], AfterValidator(_rising)]
Numbers = Annotated[tuple[NotNegative, NotNegative], AfterValidator(_rising)]
Sizes = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]
PerSplit = Annotated[dict[Literal["train", "val", "test"], Count], AfterValidator(_complete)]

# What an annotation in the source text of a plug-in may be made of.
NAMES: dict[str, Any] = {key: value for key, value in globals().items() if key[0].isupper()} | {"Literal": Literal}


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def checked(name: str, kind: Any, value: Any) -> Any:
    """Return a value as its kind has it.

    Args:
        name: what the value is of, for the message.
        kind: one of the kinds above, or any other type that pydantic can check.
        value: what somebody chose.

    Raises:
        ValueError: one sentence that names range and value.

    >>> checked("stride", Stride, 0)
    Traceback (most recent call last):
    ValueError: stride must be a whole number from 1 to 1024 (got 0)
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(told(error, name)) from None


def told(error: ValidationError, name: str) -> str:
    """Return the first problem of a validation error as one sentence, about a value of this name."""
    problem = error.errors()[0]
    place = ".".join([name, *(str(part) for part in problem["loc"])])
    if problem["type"] == "missing":
        return f"{place} is missing"
    return f"{place} {words_of(problem)} (got {problem['input']!r})"


def words_of(problem: Any) -> str:
    """Return what one problem of a validation error says, as the end of a sentence about the value."""
    words = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return words if words.startswith("must") else f"does not fit: {words[:1].lower()}{words[1:]}"


def argument(kind: Any) -> Callable[[str], Any]:
    """Return a `type` of argparse that reads a number of this kind."""

    def read(text: str) -> Any:
        try:
            value: Any = number(text)
        except ValueError:
            value = text
        try:
            return checked("it", kind, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def number(text: str) -> int | float:
    """Read a number, a whole one as such.

    >>> number("-1"), number("2.5"), number("1e3")
    (-1, 2.5, 1000.0)
    """
    try:
        return int(text)
    except ValueError:
        return float(text)
