"""The files of a configuration: which there are, how they are joined, and where in them a key is
written.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gdlib.registry import PACKAGE
from gdlib.text import read_text, read_yaml, updated

# The catalogue, of which no file changes another, and what a lab chooses, which counts more.
PARTS = ("config/*.yaml", "config/studies/*.yaml", "config.yaml")


def home() -> Path:
    """Return where the Snakefile and the catalogue are: in the installed package, or beside it in
    a clone.
    """
    inside = PACKAGE / "_workflow"  # put there by setup.py
    return inside if inside.is_dir() else PACKAGE.parent


def files(place: Path | str) -> list[Path]:
    """Return the files of a project's configuration, the one that counts most at the end.

    Args:
        place: folder of the project, or a file that is read in place of its `config.yaml`, with the
            folder `config` beside it.
    """
    place = Path(place)
    *catalogue, last = PARTS
    chosen = place / last if place.is_dir() else place
    return [
        *(path for pattern in catalogue for path in sorted(chosen.parent.glob(pattern))),
        chosen,
    ]


def read(
    place: Path | str, *own: Path | str, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of these files, of one's own, and changes.

    What is later changes what is earlier, key by key.

    Raises:
        ValueError: one sentence that names the file, and the line where it is known.
    """
    *catalogue, chosen = files(place)
    found: dict[str, Any] = {}
    written: dict[tuple[str, str], Path] = {}
    for path in catalogue:
        content = _mapping(path)
        for section, entries in content.items():
            for name in entries if isinstance(entries, Mapping) else [""]:
                if other := written.get((section, name)):
                    key = f"{section}.{name}".rstrip(".")
                    raise ValueError(
                        f'{shown(path)}: "{key}" is written in {shown(other)}, too; put it into '
                        "one of them"
                    )
                written[section, name] = path
        found = updated(found, content)
    for path in (chosen, *own):
        found = updated(found, _mapping(path))
    return updated(found, changes or {})


def _mapping(path: Path | str) -> Mapping[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{shown(path)}: this must be keys with values, as in `study: quick`")
    return content


def shown(path: Path | str) -> str:
    """Return a path as people write it: from here, where it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def located(
    message: str, paths: Sequence[Path | str], changes: Mapping[str, Any] | None = None
) -> str:
    """Put in front of what is told of a key where this key is written, in place of `config: `, if
    it is written anywhere.

    Of an entry that is `like` another one, or of a part of a method's terms, this is the line of
    the entry.
    """
    text = message.removeprefix("config: ")
    quoted = re.match(r'(?:there is no key|the key) "([^"]+)"', text)
    key = quoted[1] if quoted else ".".join(text.split(": ")[:3])  # a place may be told in parts
    best, place = 0, "config"
    for path in paths:
        length, line = _follow(yaml.compose(read_text(path), Loader=yaml.SafeLoader), key)
        if length and length >= best:
            best, place = length, f"{shown(path)}, line {line}"
    length, _ = _follow(
        yaml.compose(yaml.safe_dump(dict(changes or {})), Loader=yaml.SafeLoader), key
    )
    return f"{'--config' if length and length >= best else place}: {text}"


def _follow(node: yaml.Node | None, key: str, line: int = 0) -> tuple[int, int]:
    """Return how much of a key leads somewhere below a node, in characters, and the line where that
    is written.
    """
    if isinstance(node, yaml.MappingNode):
        inner = [(str(one.value), one.start_mark, value) for one, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(str(number), value.start_mark, value) for number, value in enumerate(node.value)]
        key = key.removeprefix("terms.")  # a list is short for it
    else:
        inner = []
    found = [one for one in inner if f"{key}.".startswith(f"{one[0]}.")]
    if not found:
        return 0, line
    name, mark, value = max(found, key=lambda one: len(one[0]))
    length, line = _follow(value, key[len(name) + 1 :], mark.line + 1)
    return len(name) + 1 + length, line
