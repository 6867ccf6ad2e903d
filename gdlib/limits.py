"""What people may choose: kinds of values with their ranges, each written once, and the sentence
about a value outside of it.

An option of a plug-in says its kind in its signature, `pool: Count = 1`; the command line, the
configuration and the header of weights are all checked against that, before anything is loaded.
Starts without torch.
"""

import argparse
import ast
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, Strict, TypeAdapter, ValidationError, WrapValidator

from gdlib.text import expanded


@dataclass(frozen=True)
class Range:
    """Annotation of an int or a float: an interval as one writes it, `[0, 1)` without its end."""

    interval: str = "(-inf, inf)"

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest number, or what they are below and above of."""
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    def words(self, whole: bool) -> str:
        """Say which numbers these are.

        >>> Range("[0, 1]").words(whole=False), Range("(0, inf)").words(whole=False)
        ('a number from 0 to 1', 'a number above 0')
        >>> Range("[1, inf)").words(whole=True)
        'a whole number of at least 1'
        """
        kind = "a whole number" if whole else "a number"
        low, high = (f"{end:.10g}" for end in self.ends)
        closed = self.interval[0] == "[", self.interval[-1] == "]"
        if high == "inf":
            return (
                kind
                if low == "-inf"
                else (f"{kind} {'of at least' if closed[0] else 'above'} {low}")
            )
        if closed == (True, True):
            return f"{kind} from {low} to {high}"
        return (
            f"{kind} {'of at least' if closed[0] else 'above'} {low} and "
            f"{'at most' if closed[1] else 'below'} {high}"
        )

    def signs(self) -> str:
        """Say the same briefly.

        >>> Range("(0, 1]").signs()
        '> 0 and ≤ 1'
        """
        both = zip(
            self.ends,
            ("≥" if self.interval[0] == "[" else ">", "≤" if self.interval[-1] == "]" else "<"),
            strict=True,
        )
        return " and ".join(f"{sign} {end:.10g}" for end, sign in both if math.isfinite(end))

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        closed = (
            low == value and self.interval[0] == "[",
            high == value and self.interval[-1] == "]",
        )
        return low < value < high or any(closed)

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

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        """Tell editors."""
        keys = (
            ("minimum" if self.interval[0] == "[" else "exclusiveMinimum"),
            ("maximum" if self.interval[-1] == "]" else "exclusiveMaximum"),
        )
        return handler(core) | {
            key: end for key, end in zip(keys, self.ends, strict=True) if math.isfinite(end)
        }


def _once(values: tuple) -> tuple:
    for value in values:
        if isinstance(values, tuple) and values.count(value) > 1:
            raise ValueError(
                f"{list(value) if isinstance(value, tuple) else value} is there "
                "twice; leave one out"
            )
    return values


def _offsets(offsets: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    for offset in _once(offsets):
        if len(offset) != len(offsets[0]):
            raise ValueError(
                f"{list(offset)} and {list(offsets[0])} have different numbers of axes"
            )
        if not any(offset):
            raise ValueError(f"{list(offset)} pairs every pixel with itself; leave it out")
    return offsets


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
Positive = Annotated[float, Range("(0, inf)")]
NotNegative = Annotated[float, Range("[0, inf)")]
Share = Annotated[float, Range("[0, 1]")]
NotAll = Annotated[float, Range("[0, 1)")]
Inside = Annotated[float, Range("(0, 1)")]
Integer = Annotated[int, Range()]
Count = Annotated[int, Range("[1, inf)")]
Whole = Annotated[int, Range("[0, inf)")]
Seed = Annotated[int, Range("[0, 4294967295]")]
Threads = Annotated[int, Range("[1, 1024]")]
Stride = Annotated[int, Range("[1, 1024]")]
Once = AfterValidator(_once)  # no value of a list is there twice
Offsets = Annotated[tuple[tuple[Integer, ...], ...], AfterValidator(_offsets)]
Place = Annotated[str, AfterValidator(expanded)]  # of a file or folder
# The smallest and the largest.
FromTo = Annotated[tuple[Positive, Positive], AfterValidator(_rising)]
CountFromTo = Annotated[tuple[Whole, Whole], AfterValidator(_rising)]
PerSplit = Annotated[dict[Literal["train", "val", "test"], Count], AfterValidator(_complete)]
# The first section, and the one after the last.
Sections = Annotated[
    dict[Literal["train", "val", "test"], tuple[Whole, Count]], AfterValidator(_complete)
]

# What an annotation of an option may be made of. A plain number is finite, and no true or false.
NAMES: dict[str, Any] = {
    key: value for key, value in globals().items() if get_origin(value) is Annotated
} | {
    "int": Integer,
    "float": Number,
    "str": str,
    "bool": Annotated[bool, Strict()],
    "tuple": tuple,
    "Sequence": Sequence,
    "Mapping": Mapping,
    "Literal": Literal,
}


def kind_of(annotation: ast.expr | None) -> Any:
    """Return the kind of value that an annotation in a source text stands for.

    What it says by other names is not checked.

    >>> kind_of(ast.parse("Sequence[str] | None", mode="eval").body)
    collections.abc.Sequence[str] | None
    """
    match annotation:
        case ast.Name(id=name):
            return NAMES.get(name, Any)
        case ast.Constant(value=value):
            return value
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return kind_of(left) | kind_of(right)
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in NAMES:
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return NAMES[name][tuple(map(kind_of, parts))]
    return Any


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
    """Return the first problem of a validation error as one sentence, about a value of this
    name.
    """
    problem = error.errors()[0]
    place = ".".join([name, *(str(part) for part in problem["loc"])])
    return f"{place} is missing" if problem["type"] == "missing" else f"{place} {words(problem)}"


def words(problem: Any) -> str:
    """Return what one problem of a validation error says, as the end of a sentence about the
    value.
    """
    text = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if not text.startswith("must"):
        text = (
            "does not fit: "
            f"{text if problem['type'] == 'value_error' else text[:1].lower() + text[1:]}"
        )
    got = repr(problem["input"])
    return f"{text} (got {got})" if len(got) < 100 else text


def argument(kind: Any) -> Callable[[str], Any]:
    """Return a `type` of argparse that reads a number of this kind, or JSON of any other."""

    def read(text: str) -> Any:
        try:
            if get_origin(kind) is Annotated:
                return checked("it", kind, _number_or_text(text))
            return checked("it", kind, json.loads(text))
        except json.JSONDecodeError as error:
            raise argparse.ArgumentTypeError(f"it must be JSON ({error})") from None
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def sides(text: str) -> int | tuple[int, ...]:
    """Read side lengths in pixels: one number for all axes, or one for each; a `type` of argparse.

    >>> sides("1024"), sides("32x256x256")
    (1024, (32, 256, 256))
    """
    try:
        numbers = checked("sides", tuple[Count, ...], list(map(_number_or_text, text.split("x"))))
    except ValueError:
        words = (
            "one side for all axes, or one for each as in 32x256x256, whole numbers of at least 1"
        )
        raise argparse.ArgumentTypeError(f"it must be {words} (got {text!r})") from None
    return numbers[0] if len(numbers) == 1 else numbers


def place(text: str) -> Path:
    """Read the place of a file or folder; a `type` of argparse.

    Shells leave the `~` of `--out=~/labels` as it is. An empty one, as of a variable that is not
    set, would be the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("it must be the name of a file or folder (got '')")
    return Path(os.path.expanduser(text))


def _number_or_text(text: str) -> int | float | str:
    try:
        return number(text)
    except ValueError:
        return text


def number(text: str) -> int | float:
    """Read a number, a whole one as such.

    >>> number("-1"), number("2.5"), number("1e3")
    (-1, 2.5, 1000.0)
    """
    try:
        return int(text)
    except ValueError:
        return float(text)
