"""How a mistake in the configuration is told: one line that names the place, and the nearest valid
name.
"""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from gdlib import registry
from gdlib.config.recipe import Recipe
from gdlib.limits import words

# What pydantic puts between the keys of a place.
_NO_KEYS = r"\[key\]|str|int|constrained-str|tuple\[.*|function-.*"


class ConfigError(ValueError):
    """A mistake in the configuration, in one readable line."""


class within:
    """Prefix what is told of a mistake with the place in the configuration."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, ValidationError):
            raise ConfigError(one_line(error, Recipe, self.where)) from None
        if isinstance(error, ValueError) and not isinstance(error, ConfigError):
            raise registry.UnknownName(f"{self.where}: {error}") from None


def check_name(where: str, name: str, valid: Iterable[str]) -> None:
    """Raise `registry.UnknownName` unless a name is among the valid ones."""
    if name not in valid:
        raise registry.UnknownName(
            f'{where}: there is no "{name}": {registry.nearest(name, list(valid))}'
        )


def one_line(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Turn one problem of a validation error into one line, with the nearest valid key for an
    unknown one.
    """
    # A misspelt key is also a missing one; what was written is the better hint, and what our own
    # checks say.
    problem = min(
        error.errors(),
        key=lambda problem: problem["type"] not in ("extra_forbidden", "value_error"),
    )
    place = [str(part) for part in problem["loc"] if not re.fullmatch(_NO_KEYS, str(part))]
    where = ".".join(([prefix] if prefix else []) + place)
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(model, place[:-1])
        return f'config: there is no key "{where}": {registry.nearest(place[-1], valid)}'
    if problem["type"] == "missing":
        return f'config: the key "{where}" is missing'
    return f"config: {where}: {words(problem)}"


def _keys_at(model: Any, path: list[str]) -> list[str]:
    """Return the valid keys of the section at `path`, following fields, dict values and list
    items.
    """
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
        else:
            model = model.__args__[1] if model.__origin__ is dict else model.__args__[0]
    if hasattr(model, "__args__"):  # Optional[...]
        model = next(
            (m for m in model.__args__ if isinstance(m, type) and issubclass(m, BaseModel)), model
        )
    return list(model.model_fields) if hasattr(model, "model_fields") else []
