"""Pages that are made are up to date, pages that are written say what the program does, and links
lead somewhere."""

import ast
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import jsonschema
import numpy as np
import pytest
import tifffile
import yaml
from test_architecture import GROUND, ROOMS

from gdlib import __version__
from gdlib.cli.main import EXAMPLES, _parser
from gdlib.config import Config
from gdlib.config.page import _options, _sections, json_schema, markdown, registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"
TUTORIAL = (DOCS / "tutorial.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "config/README.md")),
    *sorted(DOCS.glob("*.md")),
]


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
        (("studies", "quick", "recipes", "neurites_phantom_quick", "teacher", "batch"), 1),
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
        (("only",), "nuclei_phantom_quick,neurites_phantom_quick"),
        (("only",), ["nuclei_phantom_quick"]),
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text()), target


TIME = re.compile(r"\b\d[\d.,:]* (?:ms|s|seconds|min|minutes|hours|h)\b")
SPEAKING_OF_TIME = [page for page in PAGES if TIME.search(page.read_text())]


@pytest.mark.parametrize("page", SPEAKING_OF_TIME, ids=lambda page: page.name)
def test_a_page_that_speaks_of_time_says_of_which_processor(page):
    """With units for bfloat16 and without: most processors have none, and a time of the others is
    not theirs."""
    text = page.read_text()
    assert re.search("Xeon|EPYC", text)
    assert "bfloat16" in text
    assert "float32" in text.replace("bfloat16", "")


FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
PROGRAMS = ("gdlib", "make", "snakemake", "python", "pytest", "torchrun")


def commands(text):
    """Return the commands of a page, as lists of words: whole lines of its blocks, and what stands
    between backquotes; `> file`, `&` and what follows are the shell's."""
    lines = [
        line.removeprefix("$ ")
        for block in FENCE.findall(text)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`([^`]+)`", FENCE.sub("", text))
    found = []
    for line in lines:
        if line.split(" ")[0] in PROGRAMS and " " in line:
            words = shlex.split(line, comments=True)
            ends = [i for i, word in enumerate(words) if word in (">", "&", "&&", "|")]
            found.append(words[: min(ends, default=len(words))])
    return found


def parser_of(words):
    """Return the parser of a command of gdlib and the words that are left for it."""
    parser, words = _parser(), list(words)
    while parser._subparsers:
        (choices,) = (action.choices for action in parser._subparsers._group_actions)
        if not words or words[0].startswith("-"):
            break
        parser = choices[words.pop(0)]  # KeyError: no such command
    return parser, words


def mistake_of(words, studies):
    """Return what is wrong with a command of a page, None if nothing is."""
    program, *words = words
    if "-m" in words and words[words.index("-m") + 1] == "gdlib":
        program, words = "gdlib", words[words.index("-m") + 2 :]
    if program == "gdlib":
        try:
            parser, words = parser_of(words)
        except KeyError as error:
            return f"no command {error}"
        known = {option for action in parser._actions for option in action.option_strings}
        options = {word.partition("=")[0] for word in words if word.startswith("-")}
        return f"no option {options - known}" if options - known else None
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        wrong = [word for word in words if "=" not in word and word not in targets]
        return f"no target {wrong}" if wrong else None
    if program == "snakemake":
        known = {*studies, "mycells", "mine"}  # two that the pages themselves write
        wrong = {word[6:] for word in words if word.startswith("study=")} - known
        return f"no study {wrong}" if wrong else None
    if program == "python" and "-m" in words:
        module = words[words.index("-m") + 1]
        return None if find_spec(module) else f"no module {module}"
    files = [word for word in words if re.fullmatch(r"(?:benchmarks|tests|workflow)/\S+", word)]
    missing = [word for word in files if not (ROOT / word).exists()]
    return f"no file {missing}" if missing else None


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # it names what is gone
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_command_of_a_page_exists(page, catalogue):
    found = commands(page.read_text())
    mistakes = {" ".join(words): mistake_of(words, catalogue["studies"]) for words in found}
    assert {command: mistake for command, mistake in mistakes.items() if mistake} == {}


def test_the_examples_of_the_help_parse():
    for line in EXAMPLES.splitlines()[1:]:
        assert _parser().parse_args(shlex.split(line)[1:]).function


def test_the_whole_commands_of_the_readme_parse():
    blocks = "".join(FENCE.findall((ROOT / "README.md").read_text()))
    found = re.findall(r"^gdlib .*", blocks, flags=re.MULTILINE)
    assert len(found) >= 4
    for line in found:
        assert _parser().parse_args(shlex.split(line, comments=True)[1:]).function


@pytest.mark.parametrize(
    "command",
    [
        "gdlib segmentt images/",
        "gdlib segment images/ --outt found/",
        "gdlib step predictt",
        "make tests",
        "snakemake --config study=nuclej",
        "python -m gdlib step train --weight w",
        "python -m benchmarks.nothing",
        "python benchmarks/nothing.py",
    ],
)
def test_a_command_that_does_not_exist_is_found(command):
    (words,) = commands(f"`{command}`")
    assert mistake_of(words, ["nuclei"])


PATHS = re.compile(r"`((?:gdlib|workflow|tests|benchmarks|docs|config|profiles|envs)/[\w./-]+)`")
# What the pages themselves say to write.
WRITTEN = {
    "gdlib/data/sources/pairs.py",
    "gdlib/models/plain.py",
    "gdlib/distill/terms/cosine.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page):
    named = set(PATHS.findall(page.read_text())) - WRITTEN
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_name_of_the_package_that_a_page_uses_is_there(page):
    wrong = []
    for name in sorted(set(re.findall(r"`(gdlib(?:\.\w+)+)", page.read_text()))):
        try:
            resolve_name(name)
        except (ImportError, AttributeError):
            wrong.append(name)
    assert wrong == []


def test_the_list_of_rooms_is_that_of_the_imports():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|([^|]*)\|$", page, flags=re.MULTILINE)
    assert {room: re.findall(r"`(\w+)`", may) for room, may in rows} == {
        room: others.split() for room, others in ROOMS.items()
    }
    ground = page.partition("open to all:")[2].partition(".")[0]
    assert set(re.findall(r"`(\w+)`", ground)) == GROUND


def test_version_change_log_and_citation_agree():
    log = (ROOT / "CHANGELOG.md").read_text()
    (version, date), *_ = re.findall(r"^## \[([\d.]+)\] - (\S+)$", log, flags=re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (str(citation["version"]), str(citation["date-released"])) == (version, date)
    assert version == __version__


def test_the_catalogue_of_workflows_can_list_this_one():
    about = yaml.safe_load((ROOT / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert about["report"] is True
    assert about["software-stack-deployment"]["conda"] is True
    assert (ROOT / "config" / "README.md").exists()


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
    for folder, count in ((".", 60), ("new", 3)):
        for part in ("images", "labels"):
            assert len(list(Path(folder, part).glob("*.tif"))) == count
    assert tifffile.imread(next(Path("new/labels").glob("*.tif"))).max() == 1
