"""The conda environments offer what was tested with pip: same packages, same versions, nothing
forgotten.

That conda-forge has these versions is not shown here; it takes `snakemake --use-conda
--conda-create-envs-only`. What jobs find in the environments is shown by `make test-conda`, where
there is a conda command.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
ENVS = sorted((ROOT / "envs").glob("*.yaml"))
# conda name: PyPI name, where they differ
PYPI = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
DISTRIBUTION = {
    "skimage": "scikit-image",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "bioimage_cpp": "bioimage-cpp",
}
DISTRIBUTION |= dict.fromkeys(("bioimageio", "loguru"), "bioimageio.core")  # logs by the other
DISTRIBUTION |= {"contourpy": "matplotlib"}  # a part of it that has its own package
# what tables and figures import
TORCH_FREE = ("report/*.py", "metrics.py", "io.py", "config.py", "registry.py")


def packages(path: Path) -> dict[str, str]:
    """Return PyPI name -> pinned version (major.minor) of an environment."""
    found = {}
    for item in yaml.safe_load(path.read_text())["dependencies"]:
        for spec in item["pip"] if isinstance(item, dict) else [item]:
            name, _, version = spec.partition(" ")
            found[PYPI.get(name, name)] = (
                version.removeprefix("==").removeprefix("=").removesuffix(".*")
            )
    return found


def imports(*paths: Path, everywhere: bool) -> set[str]:
    """Return the distributions that files import: at their top, or in their functions too."""
    names = set()
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree) if everywhere else tree.body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
    roots = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"gdlib"}
    return {DISTRIBUTION.get(name, name) for name in roots}


@pytest.fixture(scope="module")
def tested() -> dict[str, str]:
    """Versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if re.match(r"[\w.-]+==", line))
    return {name.lower().replace("_", "-"): version for name, version in pins.items()}


@pytest.fixture(scope="module")
def declared() -> dict[str, Requirement]:
    """Dependencies of pyproject.toml, and of the extras that the steps of the default study use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return {
        r.name: r
        for r in map(Requirement, [*project["dependencies"], *extras["em"], *extras["fast"]])
    }


@pytest.mark.parametrize("path", ENVS, ids=lambda path: path.stem)
def test_versions_are_the_tested_ones(path, tested, declared):
    for name, pin in packages(path).items():
        if name in ("python", "pip"):
            continue
        assert re.fullmatch(r"\d+\.\d+", pin), f"{name} {pin}: pin major.minor"
        assert name in declared, f"{name} is not a dependency of pyproject.toml"
        version = Version(tested[name])
        assert (version.major, version.minor) == Version(pin).release, (
            f"{name}: {pin} here, {version} in constraints.txt"
        )
        assert version in declared[name].specifier


@pytest.mark.parametrize("path", ENVS, ids=lambda path: path.stem)
def test_only_from_conda_forge(path):
    content = yaml.safe_load(path.read_text())
    assert content.keys() == {"channels", "dependencies"}
    assert content["channels"] == ["conda-forge", "nodefaults"]


@pytest.mark.parametrize("path", ENVS, ids=lambda path: path.stem)
def test_every_pin_is_one_that_conda_and_pip_read_alike(path):
    """`name =1.2` and, for pip, `name ==1.2.*`: any 1.2, and nothing that only one of their solvers
    understands."""
    conda = yaml.safe_load(path.read_text())["dependencies"]
    pip = [spec for item in conda if isinstance(item, dict) for spec in item["pip"]]
    for spec in filter(lambda item: item != "pip" and isinstance(item, str), conda):
        assert re.fullmatch(r"[a-z0-9-]+ =\d+\.\d+", spec), spec
    for spec in pip:
        assert re.fullmatch(r"[a-z0-9-]+ ==\d+\.\d+\.\*", spec), spec
        assert not any(
            isinstance(item, str) and item.startswith(f"{spec.split()[0]} ") for item in conda
        )
    assert ("pip" in conda) == bool(pip)  # else conda warns, and puts it in itself


def test_python_is_one_that_is_supported(declared):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = Requirement(f"python{project['requires-python']}").specifier
    versions = {packages(path)["python"] for path in ENVS}
    assert len(versions) == 1
    assert versions.pop() in wanted


def test_every_dependency_is_in_an_environment(declared):
    assert set(declared) <= set().union(*map(packages, ENVS))


def test_steps_find_what_they_import():
    files = [p for p in (ROOT / "gdlib").rglob("*.py") if "report" not in p.parts]
    offered = set(packages(ROOT / "envs" / "gdlib.yaml"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    # An extra may be missing where a function asks for it, and then says so.
    optional = {Requirement(text).name for texts in extras.values() for text in texts}
    optional.add("hdf5plugin")  # of those who have files that need it
    assert imports(*files, everywhere=False) <= offered
    assert imports(*files, everywhere=True) <= offered | optional


def test_report_finds_what_it_imports_and_needs_no_torch():
    files = [p for pattern in TORCH_FREE for p in (ROOT / "gdlib").glob(pattern)]
    files += (ROOT / "workflow" / "scripts").glob("*.py")
    offered = set(packages(ROOT / "envs" / "report.yaml"))
    assert imports(*files, everywhere=False) <= offered
    # Of its own files, in functions too; it may read the images of a study, not find instances in
    # them.
    files = [p for p in files if "report" in p.parts or "scripts" in p.parts]
    assert imports(*files, everywhere=True) <= offered
    assert "torch" not in offered


def test_every_rule_has_the_environment_of_its_kind():
    found = set()
    for path in (ROOT / "workflow").rglob("*.smk"):
        for block in re.split(
            r"^ *(?=(?:rule|checkpoint)(?: \w+)?:)", path.read_text(), flags=re.MULTILINE
        )[1:]:
            body = block.split("\nuse rule")[0]
            name = body.partition(":")[0]
            environments = re.findall(r'conda:\s+"[./]*envs/(\w+)\.yaml"', body)
            if "script:" in body:
                assert environments == ["report"], name
            elif "gdlib" in body.partition("shell:")[2]:
                assert environments == ["gdlib"], name
            found |= set(environments)
    assert found == {path.stem for path in ENVS}
