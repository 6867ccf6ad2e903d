"""Text as people have it: in any Unicode encoding that says which it is, and YAML in which nothing
is lost in silence.

Starts without numpy.
"""

import codecs
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is


def read_text(path: Path | str) -> str:
    """Return what is in a text file: UTF-8, or what its byte order mark says.

    Raises:
        ValueError: one sentence, about the line that is something else.
    """
    content = Path(path).read_bytes()
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: this is not {encoding.upper()} text; save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(
            f"{path}: there are characters of code 0 in it, as in UTF-16 without a mark; save the "
            "file as UTF-8"
        )
    return text


def read_yaml(*paths: Path | str) -> Any:
    """Return the content of a YAML or JSON file, or of several, of which each changes what was
    before it, key by key.

    Raises:
        ValueError: one sentence that names file and line, also about a key that is written twice,
            of which YAML would take the last without a word.
    """
    found: Any = {}
    for path in paths:
        content = _read_yaml(path)
        found = (
            updated(found, content)
            if isinstance(found, Mapping) and isinstance(content, Mapping)
            else content
        )
    return found


def updated(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested mapping with changes, key by key, as Snakemake does it with what
    `--configfile` names.
    """
    out = {**base, **changes}
    for key in base.keys() & changes.keys():
        if isinstance(base[key], Mapping) and isinstance(changes[key], Mapping):
            out[key] = updated(base[key], changes[key])
    return out


def _read_yaml(path: Path | str) -> Any:
    text = read_text(path)
    try:
        try:
            content, twice = _parsed(text, LOADER)
        except yaml.YAMLError:  # the other one tells more about it
            content, twice = _parsed(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(_told(path, error)) from None
    except ValueError as error:  # a date that there is not
        raise ValueError(f"{path}: {error}") from None
    if twice:
        keys, first, again = twice
        lines = (
            f"twice in line {first}"
            if first == again
            else (f"in line {first} and again in line {again}")
        )
        raise ValueError(
            f'{path}: the key "{".".join(keys)}" is written {lines}; put what belongs to it '
            "together under one"
        )
    return content


def _parsed(text: str, kind: type) -> tuple[Any, tuple | None]:
    """Return the content, and the first key that is written twice."""
    loader = kind(text)
    node = loader.get_single_node()
    if node is None:
        return {}, None
    twice = next(_twice(node, set()), None)  # before merged keys join a mapping's own
    return loader.construct_document(node), twice


def _twice(
    node: yaml.Node, seen: set[int], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """Yield the keys that are written twice in one mapping, with the lines where."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, one in enumerate(node.value):
            yield from _twice(one, seen, (*keys, str(number)))
    if isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if (name := (key.tag, str(key.value))) in lines:
                yield (*keys, name[1]), lines[name], line
            lines[name] = line
            yield from _twice(value, seen, (*keys, name[1]))


def _told(path: Path | str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{path}, line {mark.line + 1}" if mark else str(path)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if alias := re.search(r"undefined alias:? '?([^']+)'?", problem):
        return (
            f'{place}: "*{alias[1]}" stands for what "&{alias[1]}" marks, but nothing in this file '
            "is marked so, and anchors of "
            "other files do not reach here; write out what it stands for, or use a name: `offsets: "
            "nuclei`, or `like:` the name "
            "of another entry"
        )
    if "'\\t'" in problem:
        return f"{place}: a tab stands where YAML wants spaces; replace it by spaces"
    return f"{place}: this is not YAML ({problem}); correct it"


def expanded(path: str) -> str:
    """Return a path with `~` and environment variables replaced.

    Raises:
        ValueError: there is no such variable.
    """
    path = os.path.expanduser(os.path.expandvars(path))
    if unknown := re.search(r"\$(\{\w+\}|[A-Za-z_]\w*)", path):
        raise ValueError(
            f"there is no environment variable {unknown[0]}; set it, or write the whole path"
        )
    return path
