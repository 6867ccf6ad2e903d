"""Find plug-ins (data sources, networks, loss terms) by name without importing them.

The file name is the name: `gdlib/models/resunet.py` is the network `resunet`. A plug-in file lists
exactly one public object in `__all__`: a class or a function. A plug-in that lives elsewhere is
named `package.module:Object`.
"""

import ast
import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gdlib import limits

PACKAGE = Path(__file__).parent
# Code that carries or checks what is computed, or says what is, which reaches a job through its
# parameters; an edit of it makes no result another one.
CARRIERS = frozenset(
    path.relative_to(PACKAGE).as_posix()
    for pattern in (
        "__init__.py",
        "io/*.py",
        "config/*.py",
        "jit.py",
        "limits.py",
        "progress.py",
        "registry.py",
        "text.py",
    )
    for path in PACKAGE.glob(pattern)
)


class UnknownName(ValueError):
    """A name that no plug-in, option or catalogue entry has.

    The message carries the nearest valid one.
    """


def nearest(name: str, valid: list[str]) -> str:
    """Say which valid name was probably meant.

    >>> nearest("resnet", ["resunet", "enet"])
    'did you mean "resunet"?'
    """
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"valid names: {', '.join(sorted(valid))}"


class Registry:
    """The plug-ins of one package.

    Args:
        package: dotted name of the package whose files are the plug-ins.
        kind: what one plug-in is called in messages, e.g. `"network"`.
    """

    def __init__(self, package: str, kind: str) -> None:
        self.package = package
        self.kind = kind
        self.folder = PACKAGE.joinpath(*package.split(".")[1:])

    def names(self) -> list[str]:
        """Return the names of all plug-ins, from the file stems alone."""
        return sorted(
            path.stem for path in self.folder.glob("*.py") if not path.stem.startswith("_")
        )

    def file(self, name: str) -> str:
        """Return the file of a plug-in, relative to the package.

        Nothing of one that lives elsewhere.
        """
        return "" if ":" in name else (self.folder / f"{name}.py").relative_to(PACKAGE).as_posix()

    def check(self, name: str, options: dict[str, Any] | None = None) -> None:
        """Raise `UnknownName` unless the plug-in exists and has these options, `ValueError` on a
        value it does not take.

        Imports nothing. A plug-in named `package.module:Object` is checked when it is made.
        """
        if ":" in name:
            return
        file = self.folder / f"{name}.py"
        if not name.isidentifier() or name.startswith("_") or not file.is_file():
            raise UnknownName(f'there is no {self.kind} "{name}": {nearest(name, self.names())}')
        valid = self.parameters(name)
        for option, value in (options or {}).items():
            if option not in valid:
                raise UnknownName(
                    f'{self.kind} "{name}" has no option "{option}": {nearest(option, list(valid))}'
                )
            limits.checked(f'{self.kind} "{name}": {option}', self.kinds(name)[option], value)
        chosen = valid | (options or {})
        for apart in self.written(name, "apart") or ():
            if all(chosen[option] == value for option, value in apart.items()):
                raise ValueError(
                    f'{self.kind} "{name}" cannot have '
                    f"{' and '.join(f'{k} {v}' for k, v in apart.items())}"
                )

    def written(self, name: str, attribute: str) -> Any:
        """Return an attribute of a plug-in's class from the source text.

        Returns:
            None where it is not there, or computed, and of a plug-in that lives elsewhere.
        """
        return None if ":" in name else _assigned(_public(self.folder / f"{name}.py"), attribute)

    def parameters(self, name: str) -> dict[str, Any]:
        """Return the options of a plug-in, its keyword-only parameters, with their defaults.

        Read from the source text.

        The default is None where there is none, or where it is no plain value.
        """
        return {
            option: _literal(default)
            for option, (_, default) in _options(self.folder / f"{name}.py").items()
        }

    def kinds(self, name: str) -> dict[str, Any]:
        """Return which values the options of a plug-in take, as their annotations say in the words
        of `gdlib.limits`.
        """
        return {
            option: limits.kind_of(kind)
            for option, (kind, _) in _options(self.folder / f"{name}.py").items()
        }

    def make(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Import one plug-in and call its public object.

        Raises:
            UnknownName: there is no such plug-in, or it has no such option.
            ValueError: it does not take a value.
        """
        self.check(name, options)
        public = self.get(name)
        try:
            inspect.signature(public).bind(*arguments, **options)
        except TypeError as error:
            raise UnknownName(f'{self.kind} "{name}": {error}') from None
        return public(*arguments, **options)

    def get(self, name: str) -> Any:
        """Import one plug-in and return its public object."""
        if ":" in name:
            module_name, _, attribute = name.partition(":")
            try:
                return getattr(importlib.import_module(module_name), attribute)
            except (ImportError, AttributeError) as error:
                raise UnknownName(
                    f'cannot load {self.kind} "{name}" ({error}); install its package, or correct '
                    "the name"
                ) from error
        self.check(name)
        module = importlib.import_module(f"{self.package}.{name}")
        return getattr(module, module.__all__[0])


@functools.cache
def _public(path: Path) -> ast.FunctionDef | ast.ClassDef:
    """Return the syntax tree of the one object that a plug-in file lists in `__all__`."""
    tree = ast.parse(path.read_text())
    listed = _assigned(tree, "__all__")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and listed == [node.name]:
            return node
    raise UnknownName(
        f"{path}: a plug-in file needs `__all__` with exactly one name, of a class "
        "or a function in it"
    )


@functools.cache
def _options(path: Path) -> dict[str, tuple[ast.expr | None, ast.expr | None]]:
    """Return annotation and default of every option of a plug-in."""
    public = _public(path)
    if isinstance(public, ast.ClassDef):
        inits = [
            item
            for item in public.body
            if isinstance(item, ast.FunctionDef) and item.name == "__init__"
        ]
        if not inits:
            return {}
        public = inits[0]
    pairs = zip(public.args.kwonlyargs, public.args.kw_defaults, strict=True)
    return {argument.arg: (argument.annotation, default) for argument, default in pairs}


def _literal(node: ast.expr | None) -> Any:
    """Return the value of a plain expression, None of any other."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _assigned(scope: ast.Module | ast.ClassDef, name: str) -> Any:
    """Return the value of `name = value` in a module or class, None without one, or if it is no
    plain value.
    """
    for node in scope.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        ):
            return _literal(node.value)
    return None


def axes(network: str) -> int | None:
    """Return the number of axes that a network takes; see `Registry.written`."""
    return NETWORKS.written(network, "ndim")


SOURCES = Registry("gdlib.data.sources", "data source")
NETWORKS = Registry("gdlib.models", "network")
TERMS = Registry("gdlib.distill.terms", "loss term")


def needs(*files: str, without: Iterable[str] = ()) -> list[str]:
    """Return these files of the package and all that they import of it, directly or not.

    Paths are relative to it.

    Args:
        files: where to begin; these are always among what is returned.
        without: what is left out, and all that is imported by that alone; so are the carriers of
            results.

    Raises:
        FileNotFoundError: one of the files is not there. Without its inputs, Snakemake takes a
            result as given for ever.
    """
    left_out, found, waiting = CARRIERS.union(without), set(), list(files)
    for file in (*files, *without):
        if not (PACKAGE / file).is_file():
            raise FileNotFoundError(
                f"{PACKAGE / file}: the workflow names this file, but it does not exist"
            )
    while waiting:
        if (file := waiting.pop()) not in found:
            found.add(file)
            waiting += _imported(PACKAGE, file) - left_out
    return sorted(found)


@functools.cache
def _imported(package: Path, file: str) -> frozenset[str]:
    """Return the files of the package that one of them imports, in functions too, by its text
    alone.
    """
    text = (package / file).read_text()
    found = set()
    for module, names in re.findall(
        rf"^ *from {package.name}((?:\.\w+)*) import (\([^)]*\)|[^#\n]*)", text, re.MULTILINE
    ):
        folder = package.joinpath(*module.split(".")[1:])
        inner = [
            name.split()[0] for name in re.sub(r"#.*|[()]", "", names).split(",") if name.strip()
        ]
        modules = [folder / name for name in inner]
        for path in (folder, *modules):
            found |= {
                one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()
            }
    return frozenset(path.relative_to(package).as_posix() for path in found)
