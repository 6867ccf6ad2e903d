"""What there is to choose of every segmenter: ranges, defaults, and what tuning tries.

Starts without numpy.

What each parameter does is said in `gdlib.segment.segmenters.segment`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gdlib import limits
from gdlib.registry import nearest


class Parameter(NamedTuple):
    """What there is to choose.

    Attributes:
        kind: range, of `gdlib.limits`.
        values: number of axes -> (default, values to try).
    """

    kind: Any
    values: dict[int, tuple[Any, tuple]]


# In 3D everything is foreground unless tuning finds otherwise: in most volumes the objects fill the
# whole image.
_FOREGROUND = Parameter(
    limits.Share, {2: (0.5, (0.3, 0.4, 0.5, 0.6, 0.7)), 3: (0.0, (0.0, 0.3, 0.5, 0.7))}
)
_SMALL = {
    "min_fragment": Parameter(
        limits.Whole, {2: (20, (10, 20, 40, 80, 160)), 3: (50, (0, 50, 200, 1000, 4000))}
    ),
    "min_size": Parameter(
        limits.Whole, {2: (20, (10, 20, 30, 40, 60)), 3: (50, (0, 50, 200, 1000, 4000))}
    ),
}
_EXPONENT = Parameter(limits.Positive, {2: (1.0, (1.0, 2.0, 4.0, 8.0)), 3: (1.0, (1.0, 2.0))})
_STRIDE = Parameter(limits.Stride, {2: (1, (1, 2, 4, 8)), 3: (4, (4, 8))})
_THRESHOLD = Parameter(
    limits.Share, dict.fromkeys((2, 3), (0.5, tuple(k / 20 for k in range(1, 20))))
)
_BETA = Parameter(limits.Inside, dict.fromkeys((2, 3), (0.5, tuple(k / 10 for k in range(1, 10)))))

# By segmenter; tuned in this order.
PARAMETERS: dict[str, dict[str, Parameter]] = {
    "mutex_watershed": {
        "foreground_threshold": _FOREGROUND,
        "stride": _STRIDE,
        "exponent": _EXPONENT,
    }
    | _SMALL,
    "waterz": {"foreground_threshold": _FOREGROUND, "threshold": _THRESHOLD} | _SMALL,
    "multicut": {"foreground_threshold": _FOREGROUND, "beta": _BETA} | _SMALL,
    "mutex_watershed_masked": {"stride": _STRIDE, "exponent": _EXPONENT} | _SMALL,
}


def defaults(segmenter: str, ndim: int) -> dict[str, Any]:
    """Return the parameters of a segmenter before any tuning.

    >>> defaults("mutex_watershed", 2)
    {'foreground_threshold': 0.5, 'stride': 1, 'exponent': 1.0, 'min_fragment': 20, 'min_size': 20}
    """
    return {name: parameter.values[ndim][0] for name, parameter in _of(segmenter).items()}


def grid(segmenter: str, ndim: int) -> dict[str, tuple]:
    """Return the values that `tune` tries, by parameter, in the order in which they are tuned.

    >>> grid("mutex_watershed", 2)["stride"]
    (1, 2, 4, 8)
    """
    return {name: parameter.values[ndim][1] for name, parameter in _of(segmenter).items()}


def ranges(segmenter: str) -> dict[str, Any]:
    """Return which values a segmenter takes, by parameter, as kinds of `gdlib.limits`."""
    return {name: parameter.kind for name, parameter in _of(segmenter).items()}


def checked(segmenter: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of a segmenter with values as it wants them.

    Raises:
        ValueError: one sentence on an unknown name, or a value outside of its range.

    >>> checked("multicut", {"beta": 1})
    Traceback (most recent call last):
    ValueError: beta of multicut must be a number above 0 and below 1 (got 1)
    """
    kinds = ranges(segmenter)
    for name in parameters:
        if name not in kinds:
            raise ValueError(f'{segmenter} has no parameter "{name}": {nearest(name, list(kinds))}')
    return {
        name: limits.checked(f"{name} of {segmenter}", kinds[name], value)
        for name, value in parameters.items()
    }


def is_masked(segmenter: str) -> bool:
    """Does this segmenter need the foreground of the ground truth?"""
    return segmenter.endswith("_masked")


def check_offsets(segmenter: str, offsets: Sequence[Sequence[int]]) -> None:
    """Raise `ValueError` unless a segmenter can use affinities of these offsets."""
    ndim = len(offsets[0])
    if len(offsets) < ndim:
        raise ValueError(
            f"the first {ndim} offsets are attractive, one for each axis, but there are "
            f"{len(offsets)}; add more"
        )
    wanted = [[-int(i == axis) for i in range(ndim)] for axis in range(ndim)]
    first = [list(offset) for offset in offsets[:ndim]]
    if segmenter in ("waterz", "multicut") and first != wanted:
        raise ValueError(
            f"{segmenter} needs affinities whose first offsets are {wanted}, but they are {first}"
        )


def main_segmenter(header: Mapping[str, Any]) -> str:
    """Return the segmenter that weights were chosen with.

    The order of `segmentation` is lost in their file.
    """
    return header.get("run", {}).get("segmenters", list(header["segmentation"]))[0]


def chosen(
    weights: Path | str, header: Mapping[str, Any], segmenter: str | None, given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Choose how to segment images without ground truth: as the weights were tuned, but for what is
    given.

    Args:
        weights: file of the weights, for messages.
        header: of the weights.
        segmenter: None for the one that the weights were chosen with.
        given: parameters.

    Returns:
        The segmenter, and all its parameters; those that were neither tuned nor given have their
        default.

    Raises:
        ValueError: one sentence on a segmenter that cannot be used, an unknown name, or a value
            outside of its range.
    """
    tuned = header["segmentation"]
    segmenter = segmenter or main_segmenter(header)
    valid = defaults(segmenter, len(header["offsets"][0]))
    if is_masked(segmenter):
        usable = ", ".join(name for name in tuned if not is_masked(name)) or "mutex_watershed"
        raise ValueError(
            f"{segmenter} needs the foreground of a ground truth, which an image that is to be "
            f"segmented does not have; choose {usable}"
        )
    own = checked(segmenter, given)
    try:
        stored = checked(
            segmenter, {key: v for key, v in tuned.get(segmenter, {}).items() if key not in own}
        )
    except ValueError as error:
        raise ValueError(f"{weights}: {error}; give another value, or other weights") from None
    return segmenter, valid | stored | own


def _of(segmenter: str) -> dict[str, Parameter]:
    if segmenter not in PARAMETERS:
        raise ValueError(
            f'there is no segmenter "{segmenter}"; choose one of {", ".join(PARAMETERS)}'
        )
    return PARAMETERS[segmenter]
