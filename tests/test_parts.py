"""The files of the configuration: how they are joined, what words in them stand for, and where a
mistake is."""

import copy
from pathlib import Path

import pytest
import yaml

from gdlib.config import Config, ConfigError, load, parts
from gdlib.config.words import spelt_out
from gdlib.registry import UnknownName
from gdlib.text import read_yaml

ROOT = Path(__file__).parents[1]
DATASETS = """
datasets:
  nuclei:
    source: nuclei_phantom
    options: {size: [64, 64]}
    offsets: near
    patch: [32, 32]
  more:
    like: nuclei
    title: More
offsets:
  near: [[-1, 0], [0, -1]]
"""
METHODS = """
methods:
  none: []
  agd: [{term: agd, weight: 1.0}]
  igd: [{term: igd, weight: 0.1, options: {part: nodes}}]
  grd: [agd, igd, {term: agd, weight: 1.0, memory: true}]
teachers:
  large: {model: resunet}
students:
  small: {model: resunet, options: {widths: [4, 8, 16, 32, 64]}}
recipes:
  teacher: {steps: 10, validate_every: 5}
  student: {steps: 10, validate_every: 5}
"""
STUDIES = """
studies:
  first:
    datasets: [nuclei]
    teacher: large
    students: [small]
    methods: [none, grd]
    seeds: [0]
    recipe: {clip: 1.0, optimizer: {lr: 0.1}}
    student_recipe: {optimizer: {eps: 0.5}}
  second: {like: first, datasets: [more], student_recipe: {steps: 7}}
"""
DOOR = "study: first\nplot: {panel_methods: [none]}\n"
FILES = {
    "config/datasets.yaml": DATASETS,
    "config/methods.yaml": METHODS,
    "config/studies/all.yaml": STUDIES,
    "config.yaml": DOOR,
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return the folder of a small project, which is the working directory."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_later_files_count_more(project):
    assert [parts.shown(path) for path in parts.files(project)] == list(FILES)
    (project / "own.yaml").write_text(
        "study: second\nstudies: {first: {seeds: [1]}}\nplot: {dpi: 7}\n"
    )
    config = load(project, project / "own.yaml")
    assert config.study == "second"
    assert config.selected.seeds == (1,)  # of the one that it is like, too
    assert (config.plot.dpi, config.plot.panel_methods) == (7, ("none",))
    assert load(project, "own.yaml", changes={"study": "first"}).study == "first"
    # a file of one's own in the catalogue
    (project / "config" / "own.yaml").write_text("study: second\n")
    assert load(project).study == "first"
    (project / "other.yaml").write_text("study: second\n")
    assert load(project / "other.yaml").study == "second"


def test_every_file_of_the_project_is_read():
    root = ROOT
    content = [read_yaml(path) for path in parts.files(root)]
    assert set().union(*content) == set(parts.read(root))
    assert {name for one in content for name in one.get("studies", {})} == set(load(root).studies)
    for path in parts.files(root):
        text = path.read_text()
        tokens = list(yaml.scan(text))
        assert not [t for t in tokens if isinstance(t, yaml.AnchorToken | yaml.AliasToken)], path
        assert (
            "$schema=" + "../" * (len(path.relative_to(root).parts) - 1) + "workflow/schemas/"
            in text.split("\n")[0]
        )


def test_an_entry_of_the_catalogue_is_written_once(project):
    (project / "config" / "own.yaml").write_text("teachers: {large: {model: enet}}\n")
    with pytest.raises(
        ValueError,
        match=r'own\.yaml: "teachers\.large" is written in ' r"config/methods\.yaml, too",
    ):
        load(project)
    (project / "config" / "own.yaml").write_text("- teachers\n")
    with pytest.raises(ValueError, match=r"own\.yaml: this must be keys with values"):
        load(project)


# File, what is written there, what of that is wrong, and the message. The line is that of what is
# marked with `!`.
WRONG = [
    (
        "config/datasets.yaml",
        "patch: [32, 32]",
        "patch: [32, 30]",
        "datasets.nuclei.patch: [32, 30] does not fit",
    ),
    (
        "config/datasets.yaml",
        "offsets: near",
        "offsets: neat",
        'datasets.nuclei.offsets: there is no "neat"',
    ),
    (
        "config/datasets.yaml",
        "like: nuclei",
        "like: nuclej",
        'datasets.more.like: there is no "nuclej": did you mean',
    ),
    (
        "config/datasets.yaml",
        "title: More",
        "titel: More",
        'there is no key "datasets.more.titel": did you mean "title"',
    ),
    (
        "config/methods.yaml",
        "agd, igd,",
        "agd, idg,",
        'methods.grd: there is no "idg": did you mean "igd"',
    ),
    ("config/methods.yaml", "memory: true", "memory: 2", "methods.grd.terms.2.memory"),
    (
        "config/methods.yaml",
        "small: {model: resunet,",
        "small: {model: resnet,",
        "students.small: there is no network",
    ),
    (
        "config/studies/all.yaml",
        "clip: 1.0",
        "clp: 1.0",
        'there is no key "studies.first.recipe.clp"',
    ),
    (
        "config/studies/all.yaml",
        "datasets: [more]",
        "datasets: [moor]",
        'studies.second.datasets: there is no "moor"',
    ),
    (
        "config/studies/all.yaml",
        "methods: [none, grd]",
        "metods: []",
        'there is no key "studies.first.metods"',
    ),
    (
        "config.yaml",
        "study: first",
        "study: frist",
        'study: there is no "frist": did you mean "first"',
    ),
    ("config.yaml", "[none]", "[nun]", 'plot.panel_methods: there is no "nun"'),
]


@pytest.mark.parametrize(("file", "right", "wrong", "message"), WRONG, ids=lambda text: text[:30])
def test_a_mistake_names_file_line_and_key(project, file, right, wrong, message):
    text = FILES[file]
    assert text.count(right) == 1
    (project / file).write_text(text.replace(right, wrong))
    with pytest.raises(ConfigError) as error:
        load(project)
    line = text[: text.index(right)].count("\n") + 1
    assert str(error.value).startswith(f"{file}, line {line}: {message}")
    assert "\n" not in str(error.value)


def test_a_mistake_in_what_counts_more_is_told_of_that(project):
    (project / "own.yaml").write_text("# mine\nstudies:\n  first:\n    seeds: [-1]\n")
    with pytest.raises(ConfigError, match=r"^own\.yaml, line 4: studies\.first\.seeds\.0: "):
        load(project, project / "own.yaml")
    with pytest.raises(ConfigError, match=r'^--config: study: there is no "frist"'):
        load(project, changes={"study": "frist"})
    with pytest.raises(
        ConfigError, match=r'^--config: there is no key "stdy": did you mean ' r'"study"'
    ):
        load(project, changes={"stdy": "first"})
    (project / "config.yaml").write_text("plot: {}\n")  # what is missing is nowhere
    with pytest.raises(ConfigError, match=r'^config: the key "study" is missing'):
        load(project)
    (project / "config" / "studies" / "all.yaml").write_text(
        STUDIES.replace("    teacher: large\n", "")
    )
    with pytest.raises(
        ConfigError,
        match=r"^config/studies/all\.yaml, line 3: the key " r'"studies\.first\.teacher"',
    ):
        load(project, changes={"study": "first"})


def small():
    raw = {}
    for text in FILES.values():
        raw |= yaml.safe_load(text)
    return raw


def test_words_are_replaced_by_what_they_stand_for():
    raw = small()
    before = copy.deepcopy(raw)
    found = spelt_out(raw)
    assert raw == before
    assert found["datasets"]["more"] == {**found["datasets"]["nuclei"], "title": "More"}
    assert found["datasets"]["nuclei"]["offsets"] == [[-1, 0], [0, -1]]
    first, second = found["studies"]["first"], found["studies"]["second"]
    recipe = {"optimizer": {"eps": 0.5}, "steps": 7}
    assert second == {**first, "datasets": ["more"], "student_recipe": recipe}
    methods = before["methods"]
    assert found["methods"]["grd"] == [methods["agd"][0], methods["igd"][0], methods["grd"][2]]
    assert spelt_out(found) == found
    config = Config.parse(raw | {"study": "second"})
    chosen = config.run("more", "small", "grd", 0).recipe
    assert (chosen.steps, chosen.clip, chosen.optimizer.lr, chosen.optimizer.eps) == (
        7,
        1.0,
        0.1,
        0.5,
    )
    teacher = config.run("more", "large", "teacher", 0).recipe
    assert (teacher.steps, teacher.clip, teacher.optimizer.lr) == (10, 1.0, 0.1)
    assert "like" not in config.model_dump(mode="json")["studies"]["second"]


def test_what_belongs_to_another_source_or_folder_is_not_taken_over():
    base = {
        "source": "cremi",
        "options": {"samples": ["A"]},
        "folder": "cremi",
        "download": [1],
        "title": "CREMI",
    }
    for own, lost in (
        ({"title": "B"}, set()),
        ({"source": "cremi", "folder": "cremi"}, set()),
        ({"source": "ac34"}, {"options"}),
        ({"folder": "mine"}, {"download"}),
        ({"source": "folder", "folder": "mine"}, {"options", "download"}),
    ):
        found = spelt_out({"datasets": {"base": base, "own": {"like": "base", **own}}})["datasets"][
            "own"
        ]
        assert found == {key: value for key, value in base.items() if key not in lost} | own
    networks = {
        "a": {"model": "resunet", "options": {"widths": [1]}, "weights": "w"},
        "b": {"like": "a", "model": "enet"},
    }
    assert spelt_out({"teachers": networks})["teachers"]["b"] == {"model": "enet"}


def test_an_ablation_of_several_methods_is_one_for_each():
    raw = small()
    raw["ablations"] = {
        "bank": {"method": "grd", "keys": ["recipe.bank.capacity"], "values": [4]},
        "tune": {
            "title": "{method} times",
            "method": ["agd", "igd"],
            "keys": ["weight"],
            "values": [0.5, 2],
        },
    }
    raw["studies"]["first"]["ablations"] = ["bank", "tune"]
    config = Config.parse(raw)
    assert config.selected.ablations == ("bank", "tune_agd", "tune_igd")
    assert config.ablations["tune_igd"].title == "igd times"
    assert config.method("tune_igd=2").terms[0].weight == 0.2
    raw["ablations"]["tune_agd"] = raw["ablations"]["bank"]
    with pytest.raises(
        ConfigError, match=r'ablations\.tune: there is an ablation "tune_agd" ' r"already"
    ):
        Config.parse(raw)


@pytest.mark.parametrize(
    ("section", "entries", "message"),
    [
        ("studies", {"a": {"like": "a"}}, 'studies.a.like: "a" names itself'),
        (
            "datasets",
            {"a": {"like": "b"}, "b": {"like": "a"}},
            'datasets.b.like: "a" names "b" names "a"; one of them',
        ),
        ("ablations", {"a": {"like": "c"}}, 'ablations.a.like: there is no "c"'),
        (
            "recipes",
            {"student": {"like": "techer"}, "teacher": {}},
            'recipes.student.like: there is no "techer": did you',
        ),
        ("methods", {"a": ["a"]}, 'methods.a: "a" names itself'),
        (
            "methods",
            {"a": ["b"], "b": {"terms": ["c"]}, "c": ["a"]},
            'methods.c: "a" names "b" names "c" names "a"; one',
        ),
        (
            "methods",
            {"a": {"terms": [], "recipe": {"clip": 1}}, "b": ["a"]},
            'methods.b: "a" changes the recipe too',
        ),
        ("methods", {"a": ["b"]}, 'methods.a: there is no "b"'),
    ],
)
def test_words_that_lead_nowhere_are_one_sentence(section, entries, message):
    with pytest.raises(UnknownName) as error:
        spelt_out({section: entries})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["student_recipe", "recipe"])
def test_like_where_nothing_has_a_name_is_told(place):
    raw = small()
    raw["studies"]["first"][place] = {"like": "first"}
    with pytest.raises(
        ConfigError, match=rf"studies\.first\.{place}.*`like` belongs into an " r"entry"
    ):
        Config.parse(raw)


@pytest.mark.parametrize(
    "raw", [None, [], {"studies": 3}, {"methods": {"a": 3}}, {"ablations": {"a": []}}]
)
def test_what_is_no_configuration_at_all_is_told_later(raw):
    assert spelt_out(raw) == raw
    with pytest.raises(ConfigError):
        Config.parse(raw)


def test_volumes_of_ones_own_are_like_a_phantom(tmp_path):
    """As README and tutorial say."""
    own = """
    study: mine
    datasets: {mine: {like: neurites_phantom, title: Mine, source: folder, folder: mine}}
    studies:
      mine: {datasets: [mine], teacher: resunet3d_w8, students: [resunet3d_tiny], methods: [none, grd], seeds: [0]}
    """
    (tmp_path / "own.yaml").write_text(own)
    config = load(ROOT, tmp_path / "own.yaml")
    mine, phantom = config.datasets["mine"], config.datasets["neurites_phantom"]
    assert mine.options == {}
    assert mine.model_copy(
        update={"title": "", "source": "", "folder": None, "options": {}}
    ) == phantom.model_copy(update={"title": "", "source": "", "options": {}})
    assert config.run("mine", "resunet3d_tiny", "grd", 0).recipe.selection == "voi"
