"""What can be written in the configuration, out of the models that check it: a JSON schema for
editors, a page for readers.
"""

import argparse
import ast
import json
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gdlib import registry
from gdlib.config.catalogue import SEGMENTERS, Config
from gdlib.limits import Range
from gdlib.segment.parameters import PARAMETERS

# Keys that change a part of a recipe: editors help there as they do in a whole one.
CHANGES = {
    "Dataset": ["recipe"],
    "Method": ["recipe"],
    "Study": ["recipe", "teacher_recipe", "student_recipe"],
}
# they stand in lists, and a list replaces a list; of all else a file may write a part
WHOLE = ("TermOptions", "RemoteFile")
INTRODUCTION = """# Every key of the configuration

Made by `gdlib schema --markdown > docs/configuration.md` from the modules in `gdlib/config/` that
check the files.

The configuration is a catalogue of what exists, and `studies`, named selections of it. The
catalogue and most studies are in `config/`, every file of which may hold any part of it
([config/README.md](../config/README.md) lists them); `config.yaml` says what is chosen, and counts
more. `study` names the study that is run; `--config study=nuclei` names another. Instead of editing
these files, one of your own may say what differs: `snakemake --cores all --configfile mine.yaml`.
All are merged key by key; a list replaces a list, and what is later counts: `config/`,
`config.yaml`, `--configfile`, `--config`. A key that is written twice in one file, or in two of
`config/`, is an error, for one of both would be forgotten; `gdlib check mine.yaml` tells file and
line of every such mistake, where Snakemake may only say that a file is no YAML. On the command
line, `--config` takes the keys of the first table that are text or true/false; anything nested
belongs in a file.

Anchors of YAML (`&name`, `*name`) do not reach from one file into another. Names do:

* `like: ac34`, in a dataset, study, network, ablation or recipe, takes all keys of another entry of
  the same kind that are not written anew. They are merged key by key, as files are. What belongs to
  something else is not taken over: options of another `source` or `model`, and downloads of another
  `folder`.
* `offsets: nuclei`, in a dataset, names some of `offsets`.
* `grd: [agd_intra, igd_intra]`: a method may name other methods, all of whose terms it has.
* `method: [at, cwd]`, in an ablation, makes one for each, `tune_at` and `tune_cwd` of `tune`.
  `{method}` in its title becomes the name, and a study that names `tune` has them all.

An unknown key is an error that names the nearest valid one. Editors that read JSON schemas complete
and check keys while you type, where the first line of the file is
`# yaml-language-server: $schema=workflow/schemas/config.schema.json`.

A recipe is put together from `recipes`, then `recipe` of the dataset, then `recipe` of the study,
then its `teacher_recipe` or `student_recipe`, then its `recipes` for that dataset, then `recipe` of
the method: each changes only the keys it names, and the last one counts.

`~` and environment variables are replaced in places of files and folders."""


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of every file of the configuration, and of one's own.

    It says less than the workflow checks: whether anything is missing, names exist, options fit and
    recipes add up is left to `Config.parse`.
    """
    schema = _bare(Config.model_json_schema())
    parts = schema["$defs"]
    for name, part in [("", schema), *parts.items()]:
        if name not in WHOLE:
            part.pop("required", None)
    own = {key: value for key, value in parts["Recipe"]["properties"].items() if key != "like"}
    parts["RecipeChanges"] = parts["Recipe"] | {
        "description": "Keys of a recipe that differ.",
        "properties": own,
    }
    for section, keys in CHANGES.items():
        for key in keys:
            field = parts[section]["properties"][key]
            parts[section]["properties"][key] = {
                "$ref": "#/$defs/RecipeChanges",
                "description": field["description"],
            }
    by_role = {role: {"$ref": "#/$defs/RecipeChanges"} for role in ("teacher", "student")}
    parts["Study"]["properties"]["recipes"]["additionalProperties"] = {
        "type": "object",
        "properties": by_role,
        "additionalProperties": False,
    }
    # Short forms that are accepted.
    offsets = parts["Dataset"]["properties"]["offsets"]
    offsets["anyOf"] = [
        {key: offsets.pop(key) for key in ("type", "items", "minItems")},
        {"type": "string"},
    ]
    terms = parts["Method"]["properties"]["terms"]
    terms["items"] = {
        "anyOf": [
            terms["items"],
            {"type": "string", "description": "a method that has these terms"},
        ]
    }
    parts["Method"] = {"anyOf": [{"type": "array", "items": terms["items"]}, parts["Method"]]}
    method = parts["Ablation"]["properties"]["method"]
    method["anyOf"] = [{"type": method.pop("type")}, {"type": "array", "items": {"type": "string"}}]
    only = schema["properties"]["only"]
    only["anyOf"] = [
        {"type": "array", "items": only.pop("items")},
        {"type": only.pop("type") and "string"},
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Configuration of gdlib",
    }


def _bare(node: Any, names: bool = False) -> Any:
    """A schema without its titles, which repeat the names of keys.

    `names`: what is not a schema but holds some by name.
    """
    if isinstance(node, list):
        return [_bare(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {key: one for key, one in node.items() if names or key != "title"}
    return {
        key: _bare(one, not names and key in ("properties", "$defs")) for key, one in kept.items()
    }


def markdown() -> str:
    """Return the page of all keys: a table for every section, options of plug-ins, parameters of
    segmenters, metrics.
    """
    parts = [INTRODUCTION]
    for model, places in _sections().items():
        where = ", ".join(f"`{place}`" for place in places) or "The file itself"
        rows = [_row(model.__name__, name, field) for name, field in model.model_fields.items()]
        about = " ".join((model.__doc__ or "").split())
        parts += [
            f"## {_heading(model)}",
            f"{where}. {about}",
            _table(("key", "value", "default", "meaning"), rows),
        ]
    for kind, place in (
        (registry.SOURCES, "`datasets.<name>.options`"),
        (registry.NETWORKS, "`teachers.<name>.options`, `students.<name>.options`"),
        (registry.TERMS, "`options` of a term"),
    ):
        parts += [
            f"## Options of a {kind.kind}",
            f"{place}. Those of a plug-in that lives elsewhere are its own.",
        ]
        rows = [(f"`{name}`", *row) for name in kind.names() for row in _options(kind, name)]
        without = [f"`{name}`" for name in kind.names() if not kind.parameters(name)]
        parts.append(_table((kind.kind, "option", "value", "default", "meaning"), rows))
        parts += [f"Without options: {', '.join(without)}."] if without else []
    parts += ["## Parameters of segmenters", _segmenters(), "## Metrics", _metrics()]
    return "\n\n".join(parts) + "\n"


def _sections() -> dict[type[BaseModel], list[str]]:
    """Every section and where in the file it may stand, in the order in which a reader meets
    them.
    """
    found: dict[type[BaseModel], list[str]] = {Config: []}

    def visit(model: type[BaseModel], place: str) -> None:
        for name, field in model.model_fields.items():
            for inner, path in _inside(field.annotation, f"{place}{name}"):
                known = inner in found
                found.setdefault(inner, []).append(path)
                if not known:
                    visit(inner, f"{path}.")

    visit(Config, "")
    return found


def _inside(annotation: Any, path: str) -> list[tuple[type[BaseModel], str]]:
    """The sections in a type, each with its place."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, path)]
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        names = "|".join(get_args(key)) if get_origin(key) is Literal else "name"
        return _inside(value, f"{path}.<{names}>")
    mark = "[]" if get_origin(annotation) is tuple else ""
    return [found for inner in get_args(annotation) for found in _inside(inner, path + mark)]


def _row(section: str, name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    """Key, type with its limits, default, meaning."""
    signs = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ "}
    found = [
        (sign, getattr(limit, key, None)) for limit in field.metadata for key, sign in signs.items()
    ]
    limits = [f"{sign}{value:g}" for sign, value in found if value is not None]
    kind = _type(field.annotation).replace("{name: any, …}", "{key: value, …}")
    if name in CHANGES.get(section, ()):
        kind = "some keys of [Recipe](#recipe)"
    kind += f", {' and '.join(limits)}" if limits else ""
    default = "**required**" if field.is_required() else _value(field.get_default())
    return f"`{name}`", kind, default, field.description or ""


def _heading(model: type[BaseModel]) -> str:
    """What a section is called on the page."""
    return model.__name__.removesuffix("Options")


def _type(annotation: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{_heading(annotation)}](#{_heading(annotation).lower()})"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one) for one in inner if one is not type(None))
    if origin is Sequence:
        return f"[{_type(inner[0])}, …]"
    if origin is tuple:
        return (
            f"[{', '.join(map(_type, inner[:-1]))}, …]"
            if inner[-1] is Ellipsis
            else f"[{', '.join(map(_type, inner))}]"
        )
    if origin in (dict, Mapping):
        return f"{{name: {_type(inner[1])}, …}}"
    if annotation is Any:
        return "any"
    if origin is Annotated:
        base, *limits = inner
        if isinstance(limits[0], Range):
            return f"{_type(base)} {limits[0].signs()}".rstrip()
        # PositiveInt, or checked as a whole
        return f"{_type(base)} > 0" if base is int else _type(base)
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[annotation]


def _value(value: Any) -> str:
    """A default, as it would be written in YAML."""
    if value is None:
        return "–"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, tuple | list):
        return "`[" + ", ".join(_plain(one) for one in value) + "]`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        content = value.model_dump(exclude_defaults=True)
        return "{" + ", ".join(f"{key}: {_plain(one)}" for key, one in content.items()) + "}"
    if isinstance(value, bool) or value == "":
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _options(kind: registry.Registry, name: str) -> list[tuple[str, str, str, str]]:
    """Option, value, default and meaning of a plug-in, read from its source text."""
    tree = ast.parse((kind.folder / f"{name}.py").read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    # the plug-in itself comes first
    nodes.sort(key=lambda node: node.name not in ast.literal_eval(_listed(tree)))
    texts = "\n".join(ast.get_docstring(node) or "" for node in nodes)
    meanings = {}
    for option in kind.parameters(name):
        found = re.findall(rf"^    {option}: (.*(?:\n        .*)*)", texts, flags=re.MULTILINE)
        # of a function in the same file
        found = [text for text in found if not text.startswith("see `")] or found
        meanings[option] = " ".join(found[0].split()).rstrip(".") if found else ""
    kinds = kind.kinds(name)
    return [
        (f"`{o}`", _type(kinds[o]), _value(d), meanings[o])
        for o, d in kind.parameters(name).items()
    ]


def _listed(tree: ast.Module) -> ast.expr:
    """The value of `__all__`."""
    return next(
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
    )


def _segmenters() -> str:
    """The parameters of every segmenter before tuning.

    `gdlib.segment.segmenters.segment` says what they are.
    """
    rows = [
        (f"`{segmenter}`", f"`{name}`", _type(kind), *(_value(values[ndim][0]) for ndim in (2, 3)))
        for segmenter in SEGMENTERS
        for name, (kind, values) in PARAMETERS[segmenter].items()
    ]
    text = (
        "`datasets.<name>.segmentation.<segmenter>` fixes them on test images. Left out, they are "
        "tuned on validation images, starting from these values; "
        "`gdlib.segment.segmenters.segment` says what each does."
    )
    return text + "\n\n" + _table(("segmenter", "parameter", "value", "in 2D", "in 3D"), rows)


def _metrics() -> str:
    from gdlib.evaluate.metrics import METRICS

    rows = [(f"`{key}`", one.title, one.better, one.definition) for key, one in METRICS.items()]
    return "For `plot` and `selection`.\n\n" + _table(
        ("name", "title", "better", "what it is"), rows
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def add_schema(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib schema` to the command line."""
    schema = commands.add_parser(
        "schema",
        help="say what can be written in the configuration",
        description="Print the JSON schema of the configuration, by which editors complete and "
        "check it, or all keys as a page.",
    )
    schema.add_argument(
        "--markdown", action="store_true", help="print the page, docs/configuration.md"
    )
    schema.set_defaults(function=_print)


def _print(arguments: argparse.Namespace) -> None:
    print(
        markdown()
        if arguments.markdown
        else json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        end="",
    )
