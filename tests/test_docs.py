"""Pages that are made are up to date, pages that are written say what the program does, and links
lead somewhere."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import tifffile
import yaml
from test_workflow import PARTS, planned, snakemake

from gdlib.config import Config
from gdlib.config.page import _options, _sections, json_schema, markdown, registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"
TUTORIAL = (DOCS / "tutorial.md").read_text()


def test_the_page_of_all_keys_is_up_to_date():
    assert (DOCS / "configuration.md").read_text() == markdown(), (
        "python -m gdlib schema --markdown > docs/configuration.md"
    )


def test_the_schema_is_up_to_date():
    assert json.loads(SCHEMA.read_text()) == json_schema(), (
        "python -m gdlib schema > workflow/schemas/config.schema.json"
    )


def test_every_key_has_a_meaning():
    for section in _sections():
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_every_option_of_a_plug_in_is_explained():
    for kind in (registry.SOURCES, registry.NETWORKS, registry.TERMS):
        for name in kind.names():
            for option, _, _, meaning in _options(kind, name):
                assert meaning, f"{name}: {option}"


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_catalogue_keeps_the_schema(validator, catalogue):
    validator.validate(catalogue)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("plot", "dpii"), 100),
        (("recipes", "student", "steps"), 0),
        (("recipes", "nobody"), {"steps": 1, "validate_every": 1}),
        (("studies", "quick", "teacher_recipe", "stepss"), 1),
        (("studies", "quick", "recipes", "neurites_phantom", "teacher", "batch"), 1),
        (("datasets", "bbbc039", "segmenters"), ["watershed"]),
        (("methods", "agd"), [{"term": "agd"}]),
    ],
)
def test_a_mistake_breaks_the_schema_and_the_check_alike(place, value, validator, raw):
    section = raw
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    assert not validator.is_valid(raw)
    with pytest.raises(ValueError, match="config"):
        Config.parse(raw)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("only",), "nuclei_phantom,neurites_phantom"),
        (("only",), ["nuclei_phantom"]),
        (
            ("methods", "agd"),
            {"terms": [{"term": "agd", "weight": 1}], "recipe": {"bank": {"capacity": 3}}},
        ),
        (("studies", "quick", "teacher"), ["resunet_w16", "resunet3d_w8"]),
    ],
)
def test_short_forms_are_in_the_schema(place, value, validator, raw):
    section = raw
    for key in place[:-1]:
        section = section[key]
    section[place[-1]] = value
    validator.validate(raw)
    Config.parse(raw)


def texts():
    """Return all texts of the program, with `…` for what is filled in, and those of Snakemake's
    messages."""
    found = []
    for path in [*(ROOT / "gdlib").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    for path in [*(ROOT / "workflow").rglob("*.smk")]:
        found += [
            re.sub(r"\{[^}]*\}", "…", text)
            for text in re.findall(r"""f?(?:"([^"\n]*)")""", path.read_text())
        ]
        found += [
            re.sub(r"\{[^}]*\}", "…", text)
            for text in re.findall(r"""f'([^'\n]*)'""", path.read_text())
        ]
    return found, Path(find_spec("snakemake.exceptions").origin).read_text()


def test_every_symptom_is_a_message_of_the_program():
    ours, theirs = texts()
    page = (DOCS / "troubleshooting.md").read_text()
    symptoms = re.findall(r"^####.*?`([^`]+)`(.*)$|\*\*`([^`]+)`\*\*(.*)", page, flags=re.MULTILINE)
    assert len(symptoms) > 20
    for heading, after, inline, behind in symptoms:
        message = heading or inline
        if message == "none":
            continue
        if "(Snakemake)" in after + behind:
            assert message in theirs
            continue
        parts = [part.strip() for part in message.split("…") if len(part.strip()) > 4]
        pattern = re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)
        assert any(pattern.search(text) for text in ours), message


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL),
        flags=re.MULTILINE,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "config" / "README.md", *sorted(DOCS.glob("*.md"))], ids=str
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


TIME = re.compile(r"\b\d[\d.,:]* (?:ms|s|seconds|min|minutes|hours|h)\b")
SPEAKING_OF_TIME = [
    page
    for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
    if TIME.search(page.read_text())
]


@pytest.mark.parametrize("page", SPEAKING_OF_TIME, ids=lambda page: page.name)
def test_a_page_that_speaks_of_time_says_of_which_processor(page):
    """With units for bfloat16 and without: most processors have none, and a time of the others is
    not theirs."""
    text = page.read_text()
    assert re.search("Xeon|EPYC", text)
    assert "bfloat16" in text
    assert "float32" in text.replace("bfloat16", "")


def test_the_catalogue_of_workflows_can_list_this_one():
    about = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert about["report"] is True
    assert about["software-stack-deployment"]["conda"] is True
    assert (ROOT / "config" / "README.md").exists()


def test_the_workflow_is_where_the_catalogue_looks_for_it(tmp_path):
    plans = []
    for start in ("Snakefile", "workflow/Snakefile"):
        result = snakemake(
            ROOT, tmp_path, "--dry-run", "--snakefile", ROOT / start, "--config", "study=smoke"
        )
        assert result.returncode == 0, result.stdout + result.stderr
        plans.append(planned(result.stdout + result.stderr))
    assert plans[0] == plans[1]
    assert len(plans[0]) > 50


@pytest.fixture(scope="module")
def project(tmp_path_factory, squares):
    """Return a folder with the project and the tutorial's images and file, but few and small."""
    folder = tmp_path_factory.mktemp("tutorial") / "project"
    folder.mkdir()
    for part in (*PARTS, "docs"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, folder / part)
    for name, count in (("raw/mycells", 9), ("new", 2)):
        for part in ("images", "labels"):
            (folder / name / part).mkdir(parents=True)
        for seed in range(count):
            image, label = squares(seed, shape=(128, 128))
            tifffile.imwrite(folder / name / "images" / f"{seed}.tif", image[0])
            tifffile.imwrite(folder / name / "labels" / f"{seed}.tif", label.astype(np.uint16))
    (entry,) = re.findall(r"^```yaml\n(.*?)^```", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
    entry, count = re.subn(
        r"steps: \d+, batch_size: \d+, validate_every: \d+",
        "steps: 2, batch_size: 2, validate_every: 2",
        entry,
    )
    assert count == 2
    entry = entry.replace("teacher: resunet_w16", "teacher: resunet_w8")
    (folder / "mycells.yaml").write_text(entry)
    return folder


def test_the_tutorial_works(project):
    blocks = re.findall(r"^```sh\n(.*?)^```", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
    commands = [command for block in blocks[2:] for command in block.splitlines()]
    assert "pip install" in blocks[0]
    assert blocks[1] == "gdlib download bbbc039\n"
    assert len(commands) == 9
    environment = os.environ | {"PYTHONPATH": str(project)}
    for command in commands:
        program, *arguments = shlex.split(command)
        start = {
            "gdlib": [sys.executable, "-m", "gdlib"],
            "snakemake": [Path(sys.executable).with_name("snakemake")],
        }.get(program, [program])
        done = subprocess.run(
            [*start, *arguments], cwd=project, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command == "cat logs/prepare/mycells.log":
            assert sum(map(int, re.findall(r"(\d+) images \(", done.stdout))) == 9
        if command.startswith("gdlib evaluate"):
            assert done.stdout.splitlines()[-1].startswith("mean,")
    assert (project / "mycells.html").stat().st_size > 1_000_000
    assert len(list((project / "new" / "found").glob("*.tif"))) == 2


def test_the_tutorial_makes_images_of_a_public_dataset(tmp_path, monkeypatch):
    """What it does to those who have none, on files in the layout of BBBC039."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    names = (
        (ROOT / "gdlib" / "data" / "splits" / "bbbc039" / "heldout" / "train.txt")
        .read_text()
        .split()
    )
    for folder in ("images", "masks"):
        Path("raw/bbbc039", folder).mkdir(parents=True)
    for name in names:
        mask = np.zeros((64, 64, 3), np.uint8)
        mask[10:30, 10:30, 0] = 1
        Image.fromarray(mask).save(f"raw/bbbc039/masks/{Path(name).stem}.png")
        tifffile.imwrite(f"raw/bbbc039/images/{Path(name).stem}.tif", np.zeros((64, 64), np.uint16))
    (code,) = re.findall(r"^```python\n(.*?)^```", TUTORIAL, flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "tutorial", "exec"), {})
    for folder, count in (("raw/mycells", 60), ("new", 3)):
        for part in ("images", "labels"):
            assert len(list(Path(folder, part).glob("*.tif"))) == count
    assert tifffile.imread(next(Path("new/labels").glob("*.tif"))).max() == 1
