"""Who may import whom, and other promises about the shape of the code, checked on its syntax trees."""

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

# Every import of gdlib by gdlib, at the top of a file or inside a function. `x.*` stands for all modules of a folder.
ALLOWED = {
    "gdlib": "gdlib.trained",
    "gdlib.__main__": "gdlib.cli",
    "gdlib.registry": "gdlib.limits",
    "gdlib.devices": "",
    "gdlib.process": "",
    "gdlib.io": "gdlib.failures",
    "gdlib.outputs": "gdlib gdlib.io",
    "gdlib.failures": "",
    "gdlib.metrics": "",
    "gdlib.scores": "gdlib.metrics",
    "gdlib.ops": "gdlib.native",
    "gdlib.jit": "gdlib.io",
    "gdlib.native": "gdlib.jit gdlib.loops",
    "gdlib.loops": "gdlib.jit",
    "gdlib.parallel": "",
    "gdlib.schema": "gdlib.limits",
    "gdlib.mistakes": "gdlib.limits gdlib.registry gdlib.schema",
    "gdlib.text": "",
    "gdlib.limits": "gdlib.text",
    "gdlib.parameters": "gdlib.limits gdlib.registry",
    "gdlib.checks": "gdlib.registry gdlib.mistakes gdlib.schema gdlib.metrics",
    "gdlib.words": "gdlib.registry gdlib.mistakes gdlib.text",
    "gdlib.parts": "gdlib.text",
    "gdlib.config": "gdlib.limits gdlib.registry gdlib.mistakes gdlib.checks gdlib.schema gdlib.parameters gdlib.parts "
    "gdlib.words",
    "gdlib.plan": "gdlib.registry gdlib.config gdlib.schema",
    "gdlib.segmentation": "gdlib.metrics gdlib.scores gdlib.mutex gdlib.parameters",
    "gdlib.mutex": "gdlib.jit gdlib.limits",
    "gdlib.baselines": "gdlib.io gdlib.scores",
    "gdlib.models": "gdlib.io gdlib.registry",
    "gdlib.models.*": "gdlib.models gdlib.ops gdlib.limits",
    "gdlib.models.resunet3d": "gdlib.models.resunet gdlib.limits",
    "gdlib.models.erfnet": "gdlib.models gdlib.models.enet gdlib.limits",
    # Of the models, the contract alone.
    "gdlib.distill": "gdlib.ops gdlib.parallel gdlib.registry gdlib.models gdlib.distill.bank",
    "gdlib.distill.bank": "gdlib.ops",
    "gdlib.distill.terms": "",
    "gdlib.distill.terms.*": "gdlib.ops gdlib.limits gdlib.distill gdlib.distill.bank",
    "gdlib.data": "",
    "gdlib.data.augment": "gdlib.ops",
    "gdlib.data.intensity": "",
    "gdlib.data.maps": "gdlib.io gdlib.distill",  # where voxels have their centres
    "gdlib.data.patches": "gdlib.io gdlib.ops gdlib.data.augment gdlib.data.intensity gdlib.data.maps "
    "gdlib.distill gdlib.models",  # the types of a batch
    "gdlib.data.axes": "",
    "gdlib.data.decoders": "",
    "gdlib.data.tiff": "gdlib.io gdlib.data.decoders",
    "gdlib.data.calibration": "gdlib.data.tiff",
    "gdlib.data.files": "gdlib.text gdlib.io gdlib.registry gdlib.data.tiff",
    "gdlib.data.sense": "gdlib.io",
    "gdlib.data.prepare": "gdlib.io gdlib.registry gdlib.data gdlib.data.axes gdlib.data.files gdlib.data.intensity "
    "gdlib.data.sense",
    "gdlib.data.download": "gdlib gdlib.io gdlib.progress gdlib.schema",
    "gdlib.data.sources": "",
    "gdlib.data.sources.*": "gdlib.io gdlib.limits gdlib.registry gdlib.data.files gdlib.data.sources._phantom",
    "gdlib.engine": "",
    "gdlib.inference": "gdlib.io gdlib.ops gdlib.engine gdlib.models gdlib.data.axes gdlib.data.intensity",
    "gdlib.streaming": "gdlib.progress gdlib.io gdlib.inference",
    "gdlib.grid": "gdlib.outputs gdlib.text gdlib.data.axes gdlib.limits gdlib.io gdlib.registry gdlib.parameters "
    "gdlib.data.files",
    "gdlib.volume_steps": "gdlib.io gdlib.outputs gdlib.limits gdlib.blockwise",
    "gdlib.blockwise": "gdlib gdlib.io gdlib.data.intensity gdlib.parameters gdlib.grid gdlib.inference gdlib.segmentation "
    "gdlib.data.files",
    "gdlib.memory": "",
    "gdlib.footprint": "gdlib.grid gdlib.inference gdlib.memory gdlib.segmentation",
    "gdlib.large": "gdlib gdlib.io gdlib.grid gdlib.blockwise gdlib.footprint gdlib.inference gdlib.progress gdlib.streaming",
    "gdlib.ask": "gdlib.io gdlib.inference gdlib.models gdlib.streaming",
    "gdlib.training": "gdlib gdlib.data.maps gdlib.data.patches gdlib.config gdlib.io gdlib.metrics gdlib.scores gdlib.judge "
    "gdlib.models "
    "gdlib.parallel gdlib.progress gdlib.distill gdlib.distill.bank gdlib.inference",
    "gdlib.trained": "gdlib.io gdlib.registry gdlib.inference gdlib.parameters gdlib.segmentation",
    "gdlib.judge": "gdlib.io gdlib.config gdlib.parameters gdlib.segmentation gdlib.inference",
    "gdlib.profile": "gdlib.models gdlib.inference",
    "gdlib.report": "",
    "gdlib.report.*": "gdlib.io gdlib.metrics gdlib.scores gdlib.config gdlib.report.*",
    "gdlib.reference": "gdlib.limits gdlib.registry gdlib.config gdlib.metrics gdlib.parameters",
    "gdlib.tensorboard": "gdlib.io gdlib.failures gdlib.limits",
    "gdlib.progress": "",
    "gdlib.bench": "gdlib gdlib.limits gdlib.io gdlib.outputs gdlib.inference",
    "gdlib.segmenting": "*",
    "gdlib.steps": "*",
    "gdlib.cli": "*",
}

# What Snakemake parses for every job, and what works on files alone, starts without the seconds that torch takes.
TORCH_FREE = re.compile(
    r"gdlib(\.(__main__|bench|cli|devices|limits|process|parameters|reference|steps|tensorboard|registry|schema|config|parts|words|plan|io|memory|outputs|failures|trained|jit|loops|mutex|segmenting|grid|blockwise|volume_steps|metrics|scores|segmentation|baselines|report(\..*)?"
    r"|data|data\.(axes|calibration|decoders|tiff|files|prepare|sense|download|sources(\..*)?)))?"
)


def public_names(tree):
    """Return `__all__` of a file, None where it has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return None


def imported(tree, everywhere):
    """Yield the modules that a syntax tree imports; a name of gdlib is a module of ours or else its package."""
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
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from at_import([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def loaded(name):
    """Return all modules, ours and others, that are loaded when one of ours is imported, as far as our files say."""
    seen, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if module in MODULES:
            waiting += imported(MODULES[module], everywhere=False)
            waiting += [module.rpartition(".")[0]] if "." in module else []  # a module brings its package
    return seen


def matches(name, pattern):
    return pattern == "*" or name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1]))


def rule_for(name):
    return ALLOWED.get(name) if name in ALLOWED else ALLOWED.get(name.rpartition(".")[0] + ".*")


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    rule = rule_for(name)
    assert rule is not None, f"{name} is new: say in ALLOWED what it may import"
    ours = {module for module in imported(MODULES[name], everywhere=True) if module.partition(".")[0] == "gdlib"}
    wrong = {module for module in ours if not any(matches(module, pattern) for pattern in rule.split())}
    assert not wrong


def test_rules_are_about_modules_that_exist():
    for rule in ALLOWED:
        assert any(matches(name, rule) for name in MODULES), rule
    assert sum(bool(TORCH_FREE.fullmatch(name)) for name in MODULES) > 15


@pytest.mark.parametrize("name", [name for name in MODULES if TORCH_FREE.fullmatch(name)])
def test_torch_free(name):
    heavy = {module for module in loaded(name) if module.partition(".")[0] in ("torch", "torchvision")}
    assert not heavy | ({"safetensors.torch"} & loaded(name))


def test_torch_free_in_practice():
    names = [name for name in MODULES if TORCH_FREE.fullmatch(name) and name != "gdlib.__main__"]
    code = (
        "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_needs_torch_says_so():
    """The check above can see torch."""
    for name in ("gdlib.ops", "gdlib.training", "gdlib.data.patches", "gdlib.distill.terms.agd"):
        assert "torch" in loaded(name)


def test_the_library_knows_nothing_of_the_workflow():
    for name, tree in MODULES.items():
        roots = {module.partition(".")[0] for module in imported(tree, everywhere=True)}
        assert not roots & {"snakemake", "workflow", "tests", "conftest"}, name


def test_config_stays_light():
    others = {module.partition(".")[0] for module in loaded("gdlib.config")} - {"gdlib"}
    assert others <= set(sys.stdlib_module_names) | {"pydantic", "yaml"}


def test_no_cycles():
    graph = {name: set(imported(tree, everywhere=False)) & set(MODULES) for name, tree in MODULES.items()}
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
    return [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    tree = MODULES[name]
    assert ast.get_docstring(tree)
    listed = public_names(tree)
    for node in public(tree.body):
        assert ast.get_docstring(node), node.name
        if isinstance(node, ast.ClassDef) and (listed is None or node.name in listed):
            for method in public(node.body):
                assert ast.get_docstring(method), f"{node.name}.{method.name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_is_long(path):
    assert len(path.read_text().splitlines()) <= 450


PLUGINS = [(kind, name) for kind in (registry.SOURCES, registry.NETWORKS, registry.TERMS) for name in kind.names()]


def test_plug_ins_are_found():
    sources = {"ac34", "bbbc039", "cremi", "dsb2018", "folder", "neurites_phantom", "nuclei_phantom"}
    assert sources <= set(registry.SOURCES.names())
    assert {"mala", "mobilenetv2", "nestedunet", "resunet", "resunet3d", "segformer"} <= set(registry.NETWORKS.names())
    assert {"supervised", "foreground", "agd", "igd"} <= set(registry.TERMS.names())


@pytest.mark.parametrize(("kind", "name"), PLUGINS, ids=[f"{kind.package}.{name}" for kind, name in PLUGINS])
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
        found += [f"{path.relative_to(ROOT)}: {line}" for line in text.splitlines() if ABSOLUTE.search(line)]
    assert not found


def test_the_search_for_absolute_paths_finds_them():
    for folder in ("home", "work", "Users"):
        assert ABSOLUTE.search(f'open("/{folder}/me/a.png")')
        for before in ("a", "..", "https://x.org", "{x}", "/proc"):
            assert not ABSOLUTE.search(f"{before}/{folder}/b")
