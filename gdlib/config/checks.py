"""Parts of a configuration that make sense by themselves.

What is wrong is a `ValueError` that names the place.
"""

from collections.abc import Iterable, Mapping, Sequence

from gdlib import registry
from gdlib.config.mistakes import check_name, within
from gdlib.config.recipe import Recipe, TermOptions
from gdlib.config.sections import Dataset, Network


def check_metrics(where: str, names: Iterable[str]) -> None:
    """Is each of these a metric?"""
    from gdlib.evaluate.metrics import METRICS

    for name in names:
        check_name(where, name, METRICS)


def check_terms(terms: tuple[TermOptions, ...]) -> None:
    """Are there these terms, and do they take their options?"""
    for term in terms:
        registry.TERMS.check(term.term, term.options | ({"memory": True} if term.memory else {}))
        if term.level and registry.TERMS.written(term.term, "needs_teacher") is False:
            raise ValueError(f'"{term.term}" learns from the label, and cannot have a level')
        if term.level and registry.TERMS.written(term.term, "whole"):
            raise ValueError(
                f'"{term.term}" compares the outputs as a whole, and cannot have a level'
            )
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"two terms of one method look the same: {', '.join(names)}")


def check_recipe(where: str, recipe: Recipe, has_teacher: bool = True) -> None:
    """Are there the terms and the metric of a recipe, and does none ask a teacher where there is
    none?
    """
    with within(f"{where}.terms"):
        check_terms(recipe.terms)
        for term in () if has_teacher else recipe.terms:
            if (
                ":" not in term.term
                and registry.TERMS.written(term.term, "needs_teacher") is not False
            ):
                raise ValueError(
                    f'"{term.term}" asks a teacher, and the teacher has none; put it into a method'
                )
    check_metrics(f"{where}.selection", [recipe.selection])


def check_patch(
    where: str, patch: Sequence[int], dataset: str, data: Dataset, networks: Mapping[str, Network]
) -> None:
    """Can the networks make patches of this size, and has every offset of the dataset a pair of
    pixels in it?
    """
    if len(patch) != data.ndim:
        raise ValueError(f'{where}: it must have {data.ndim} axes, as dataset "{dataset}" has')
    for name, network in networks.items():
        if (own := network.options.get("in_channels", data.channels)) != data.channels:
            raise ValueError(
                f'network "{name}": in_channels is {own}, but images of dataset "{dataset}" have '
                f"{data.channels} "
                "channel(s); leave it out"
            )
        divisor, rest = (
            registry.NETWORKS.written(network.model, key) for key in ("divisor", "remainder")
        )
        if (
            divisor
            and rest
            and any((n - r) % d for n, d, r in zip(patch, divisor, rest, strict=True))
        ):
            fits = [
                max(0, -((r - n) // d)) * d + r
                for n, d, r in zip(patch, divisor, rest, strict=True)
            ]
            plus = f" plus {list(rest)}" if any(rest) else ""
            raise ValueError(
                f'{where}: {list(patch)} does not fit the network "{name}", which takes multiples '
                "of "
                f"{list(divisor)}{plus}; choose for example {fits}"
            )
    for offset in data.offsets:
        if any(abs(step) >= side for step, side in zip(offset, patch, strict=True)):
            raise ValueError(
                f"{where}: no two pixels of a patch {list(patch)} are as far apart as "
                f"{list(offset)}, an offset of dataset "
                f'"{dataset}"; choose a larger patch, or leave out the offset'
            )
