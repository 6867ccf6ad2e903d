"""Who may import whom, and other promises about the shape of the code, checked on its syntax
trees."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gdlib import registry

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "gdlib").rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in FILES}

# The rooms, from the ground up, and what each may import beside its own files and the ground: rooms
# that stand before it.
GROUND = {
    "boxes",
    "devices",
    "limits",
    "processes",
    "progress",
    "quiet",
    "registry",
    "spread",
    "text",
    "types",
    "watch",
}
ROOMS = {
    "io": "",
    "jit": "io",
    "kernels": "io jit",
    "models": "io kernels",
    "evaluate": "io",
    "data": "io kernels",
    "segment": "io jit evaluate",
    "blockwise": "io jit data",
    "distill": "kernels models",
    "predict": "io jit kernels models data blockwise",
    "export": "io kernels models data segment blockwise predict",
    "config": "evaluate segment",
    "train": "io kernels models evaluate data segment blockwise distill predict config",
    "volumes": "io data segment blockwise predict",
    "report": "io evaluate config",
    "trained": "io data segment blockwise predict",
    "napari": "io data trained",
    "cli": "io models evaluate data segment blockwise predict export config train volumes report "
    "trained",
    "__main__": "cli",
}

# What Snakemake parses for every job, and what works on files alone, starts without the seconds
# that torch takes.
WITH_TORCH = re.compile(
    r"gdlib\.(processes|kernels|models|distill|predict|export|train|data\.(augment|maps|patches))(\..*)?"
)


def public_names(tree):
    """Return `__all__` of a file, None where it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [
            getattr(target, "id", None) for target in node.targets
        ] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


def imported(tree, everywhere):
    """Yield the modules that a syntax tree imports.

    A name of gdlib is a module of ours or else its package.
    """
    nodes = ast.walk(tree) if everywhere else at_import(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def at_import(body):
    """Yield what runs when a module is imported: everything but the insides of functions."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from at_import(
                [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            )


def loaded(name):
    """Return all modules, ours and others, that are loaded when one of ours is imported, as far as
    our files say."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if module in MODULES:
            waiting += imported(MODULES[module], everywhere=False)
            # a module brings its package
            waiting += [module.rpartition(".")[0]] if "." in module else []
    return seen


def room_of(name):
    """Return the room of a module, "ground" for what every room may use.

    The package's own file is everybody's.
    """
    first = name.split(".")[1] if "." in name else "ground"
    return "ground" if first in GROUND else first


def test_imports_go_one_way():
    wrong = []
    for name, tree in MODULES.items():
        room = room_of(name)
        if name == "gdlib":
            continue  # `gdlib.load` asks for `trained` when it is called
        allowed = {room, "ground", *ROOMS.get(room, "").split()}
        ours = {
            module
            for module in imported(tree, everywhere=True)
            if module.partition(".")[0] == "gdlib"
        }
        wrong += [
            f"{name} imports {module}" for module in sorted(ours) if room_of(module) not in allowed
        ]
    assert not wrong


def test_rooms_are_those_that_exist():
    assert {room_of(name) for name in MODULES} == {"ground", *ROOMS}
    assert {name.removeprefix("gdlib.") for name in MODULES if room_of(name) == "ground"} == {
        "gdlib",
        *GROUND,
    }
    for room, others in ROOMS.items():
        before = list(ROOMS)[: list(ROOMS).index(room)]
        assert set(others.split()) <= set(before), room


def test_torch_free():
    wrong = []
    for name in MODULES:
        heavy = {module.partition(".")[0] for module in loaded(name)} & {"torch", "torchvision"}
        if heavy and not WITH_TORCH.fullmatch(name):
            wrong.append(name)
    assert not wrong


def test_torch_free_in_practice():
    names = [
        name for name in MODULES if not WITH_TORCH.fullmatch(name) and name != "gdlib.__main__"
    ]
    code = (
        "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_job_of_the_report_imports_what_it_needs():
    """Of the packages that take long: tables draw nothing, and most figures test nothing."""
    heavy = {"matplotlib", "pandas", "scipy"}
    for name, needed in {
        "gdlib.report.tables.results": {"pandas"},
        "gdlib.report.provenance.record": set(),
        "gdlib.report.figures.make": {"matplotlib"},
        "gdlib.report.figures.charts": {"matplotlib", "pandas"},
    }.items():
        found = {module.partition(".")[0] for module in loaded(name)} & heavy
        assert found == needed, name


def test_to_segment_an_image_nothing_of_training_is_imported():
    for name in (
        "gdlib.cli.segment",
        "gdlib.predict.predictor",
        "gdlib.trained",
        "gdlib.volumes.large",
    ):
        rooms = {room_of(module) for module in everything(name) if module in MODULES}
        assert not rooms & {"train", "distill"}, name


def everything(name):
    """Return all modules that are imported when one of ours is used, inside its functions too."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += imported(MODULES[module], everywhere=True) if module in MODULES else []
    return seen


def test_the_library_knows_nothing_of_the_workflow():
    for name, tree in MODULES.items():
        roots = {module.partition(".")[0] for module in imported(tree, everywhere=True)}
        assert not roots & {"snakemake", "workflow", "tests", "conftest"}, name


def test_config_stays_light():
    others = {module.partition(".")[0] for module in loaded("gdlib.config")} - {"gdlib"}
    assert others <= set(sys.stdlib_module_names) | {"pydantic", "yaml"}


def test_no_cycles():
    graph = {
        name: set(imported(tree, everywhere=False)) & set(MODULES) for name, tree in MODULES.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(path.pop())

    for name in graph:
        visit(name)


def public(body):
    return [
        n
        for n in body
        if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
    ]


def test_everything_public_has_a_docstring():
    without = [name for name, tree in MODULES.items() if not ast.get_docstring(tree)]
    for name, tree in MODULES.items():
        listed = public_names(tree)
        for node in public(tree.body):
            without += [f"{name}.{node.name}"] * (not ast.get_docstring(node))
            if isinstance(node, ast.ClassDef) and (listed is None or node.name in listed):
                without += [
                    f"{name}.{node.name}.{m.name}"
                    for m in public(node.body)
                    if not ast.get_docstring(m)
                ]
    assert not without


def test_no_module_and_no_function_is_long():
    """A guide for the reader, not a number to fill."""
    long = [
        name
        for name, path in zip(MODULES, FILES, strict=True)
        if len(path.read_text().splitlines()) > 600
    ]
    assert not long


PLUGINS = [
    (kind, name)
    for kind in (registry.SOURCES, registry.NETWORKS, registry.TERMS)
    for name in kind.names()
]


def test_plug_ins_are_found():
    sources = {
        "ac34",
        "bbbc039",
        "cremi",
        "dsb2018",
        "folder",
        "neurites_phantom",
        "nuclei_phantom",
    }
    assert sources <= set(registry.SOURCES.names())
    assert {"mala", "mobilenetv2", "nestedunet", "resunet", "resunet3d", "segformer"} <= set(
        registry.NETWORKS.names()
    )
    assert {"supervised", "foreground", "agd", "igd"} <= set(registry.TERMS.names())


@pytest.mark.parametrize(
    ("kind", "name"), PLUGINS, ids=[f"{kind.package}.{name}" for kind, name in PLUGINS]
)
def test_a_plug_in_file_has_one_public_name_with_options_by_keyword(kind, name):
    tree = MODULES[f"{kind.package}.{name}"]
    (only,) = public_names(tree)
    assert only in {node.name for node in public(tree.body)}
    thing = kind.get(name)
    assert (thing.__name__, thing.__module__) == (only, f"{kind.package}.{name}")
    # What the configuration may set is what is there to be set, each with a default.
    parameters = dict(inspect.signature(thing).parameters)
    if kind is registry.SOURCES:
        assert next(iter(parameters)) == "root"
        del parameters["root"]
    read = kind.parameters(name)
    assert list(read) == list(parameters)
    for parameter in parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
        assert read[parameter.name] in (parameter.default, None)


def test_a_plug_in_of_no_name_or_of_another_package():
    with pytest.raises(registry.UnknownName, match="resunet"):
        registry.NETWORKS.get("resunett")
    with pytest.raises(registry.UnknownName, match="Nothing"):
        registry.NETWORKS.get("gdlib.models.resunet:Nothing")
    assert registry.NETWORKS.get("gdlib.models.resunet:ResUNet") is registry.NETWORKS.get("resunet")


def tracked():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


ABSOLUTE = re.compile(r"(?<![\w.)}>])/(?:home|root|work|Users|mnt|media|scratch|opt)/\w")


def test_no_absolute_paths():
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}: {line}"
            for line in text.splitlines()
            if ABSOLUTE.search(line)
        ]
    assert not found
