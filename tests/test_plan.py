"""What runs again after an edit, asked of the plan in milliseconds; Snakemake is asked of a few
edits in test_workflow.py.

A job is run again if the part of the configuration that it gets, its code or the jobs before it are
others, as the rules say and `jobs_of` repeats; that it repeats them rightly is a test of the
workflow, too.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gdlib import registry
from gdlib.config import TEACHER, Config, load, parts, plan
from gdlib.config.words import spelt_out
from gdlib.text import updated

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = spelt_out(parts.read(ROOT))
DATA, TEACHER_2D, STUDENT = "nuclei_phantom_small", "resunet_w8", "resunet_tiny"
VOLUMES, TEACHER_3D, STUDENT_3D = "neurites_phantom_small", "resunet3d_w8", "resunet3d_tiny"
TEACHING, NONE, GRD = "teacher/seed0", "none/seed0", "grd/seed0"
NETWORKS = {DATA: (TEACHER_2D, STUDENT), VOLUMES: (TEACHER_3D, STUDENT_3D)}
SEGMENTERS = {
    dataset: CATALOGUE["datasets"][dataset].get("segmenters", ["mutex_watershed"])
    for dataset in NETWORKS
}
FIGURES = {
    DATA: ("methods", "tradeoff", "curves", "panel", "embeddings"),
    VOLUMES: ("methods", "tradeoff", "curves", "panel", "embeddings", "neurons"),
}
STEPS = ("Train", "Predict", "Segment", "Evaluate")


class Job(NamedTuple):
    """Of one job what Snakemake compares: what it is told, its code, and the jobs whose files it
    reads."""

    rule: str
    told: tuple[str, ...]
    code: frozenset[str]
    before: frozenset[str]


def compact(value: Any) -> str:
    """JSON that is equal for equal content, as in the rules."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def jobs_of(config: Config) -> dict[str, Job]:
    """Return the jobs of the selected study by what the workflow calls them."""
    asked, out = plan.Plan(config), {}
    datasets, shown = asked.study.datasets, config.shown
    titles = asked.titles(datasets, *map(asked.networks_of, datasets))
    settings = {name: one["title"] for name, one in asked.ablations.items()}

    def add(
        name: str, rule: str, told: Iterable[Any], code: Iterable[str], before: Iterable[str] = ()
    ) -> str:
        out[name] = Job(rule, tuple(map(repr, told)), frozenset(code), frozenset(before))
        return name

    def tried(run: plan.Run, step: str) -> list[str]:
        return [
            f"{step} {named(run)} by {segmenter}"
            for segmenter in config.datasets[run[0]].segmenters
        ]

    def made(runs: Iterable[plan.Run]) -> list[str]:
        """The jobs that make the weights of these runs."""
        trained = asked.trained(runs := list(runs))
        joined = [run for run in runs if asked.members_of(run[0], run[1])]
        return [f"Train {named(run)}" for run in trained] + [
            f"Join the members of {named(run)}" for run in joined
        ]

    for dataset in datasets:
        data = config.datasets[dataset]
        keys = {"source", "options", "channels", "patch", "unlabelled"}
        read = data.model_dump(mode="json", include=keys)
        rule = "prepare_with_unlabelled" if data.unlabelled else "prepare"
        prepared = add(f"Prepare {dataset}", rule, [compact(read)], asked.prepare_code(dataset))
        for network in asked.networks_of(dataset):
            net = config.network(network)
            options = net.options | {"in_channels": data.channels}
            told = compact(
                {"dataset": dataset, "network": network, "model": net.model, "options": options}
            )
            code = asked.network_code("profile", network)
            add(f"Profile {dataset}/{network}", "profile", [told], code, [prepared])
        for run in asked.runs_on(dataset):
            _, network, method, _ = run
            before, trained = [prepared], bool(asked.trained([run]))
            whose, found = asked.unlabelled_of(run), ""
            teacher = config.teacher_of(dataset, method)
            source = made(asked.teacher_runs(dataset, teacher)[:1])
            if whose == "teacher":
                found = f"Let {teacher} label the unlabelled images of {dataset}"
                told = [compact(asked.labelling(dataset))]
                code = asked.network_code("label", teacher)
                before.append(add(found, "label_unlabelled", told, code, [prepared, *source]))
            if method != TEACHER and config.method(method).terms:
                if asked.spec_of(run).recipe.teacher == "online":
                    before += source
                else:
                    precision = config.recipe(config.study, dataset, "student").precision
                    for part in asked.parts_of(method):
                        ask = f"Ask {teacher} for the {part} of the training images of {dataset}"
                        level = ["--level", part] if part != "embedding" else []
                        code = asked.network_code("ask", teacher)
                        told = [level, precision]
                        before.append(add(ask, "ask_teacher", told, code, [prepared, *source]))
                        if whose:
                            ask = f"Ask {teacher} for the {part} of the unlabelled images of {dataset}"
                            before.append(
                                add(ask, "ask_of_unlabelled", told, code, [found, *source])
                            )
            if trained:
                rule = "train_teacher" if method == TEACHER else "train_student"
                told = compact(asked.train_spec(run))
                add(f"Train {named(run)}", rule, [told], asked.train_code(run), before)
            if members := asked.members_of(dataset, network):
                told, code = compact(asked.train_spec(run)), asked.network_code("join", network)
                add(*made([run]), "join_teachers", [told], code, [prepared, *made(members)])
            before = [prepared, *made([run])]
            predicted = add(
                f"Predict {named(run)}",
                "predict",
                [4],
                asked.network_code("predict", network),
                before,
            )
            for segmenter, segment, judge in zip(
                data.segmenters, tried(run, "Segment"), tried(run, "Evaluate"), strict=True
            ):
                override = compact(data.segmentation.get(segmenter, {}))
                add(segment, "segment", [override], plan.code("segment"), [predicted])
                about = compact(
                    dict(zip(("dataset", "network", "method", "seed"), run, strict=True))
                )
                add(judge, "evaluate", [about], plan.code("evaluate"), [segment, prepared])
        if data.ndim == 3:
            name = f"Evaluate trivial segmentations of {dataset}"
            add(name, "baselines", [], plan.code("baselines"), [prepared])

    report = plan.code("report")
    profiles = {
        dataset: [f"Profile {dataset}/{name}" for name in asked.networks_of(dataset)]
        for dataset in datasets
    }
    judged = {
        d: [name for run in asked.runs_on(d) for name in tried(run, "Evaluate")] for d in datasets
    }
    everything = [name for dataset in datasets for name in judged[dataset] + profiles[dataset]]
    teachers = [
        name
        for d in asked.volumes
        for teacher in config.teachers_of(d)
        for name in made(asked.teacher_runs(d, teacher))
    ]
    trivial = [f"Evaluate trivial segmentations of {d}" for d in asked.volumes]
    told = [
        {d: list(shown(d).table_metrics) for d in datasets},
        {d: shown(d).main_metric for d in datasets},
        titles | settings,
        {d: asked.budget(d) for d in datasets},
        {name: one["method"] for name, one in asked.ablations.items()},
        asked.unlabelled,
    ]
    table = add(
        "Summarize the study", "summarize", told, report, [*everything, *teachers, *trivial]
    )
    told = [titles, compact(asked.record())]  # as YAML, and with places of files
    add("Record where every number comes from", "provenance", told, report, [*everything, table])

    for dataset in datasets:
        networks, chosen = asked.titles(asked.networks_of(dataset)), asked.shown_on(dataset)
        methods, plot = [run[2] for run in chosen], config.plot
        main, metrics = shown(dataset).main_metric, list(shown(dataset).metrics)
        runs = asked.trained(asked.runs_on(dataset))
        first = [tried(run, "Segment")[0] for run in chosen]
        prepared = f"Prepare {dataset}"
        made = {
            "methods": ([metrics], judged[dataset]),
            "tradeoff": ([main], judged[dataset] + profiles[dataset]),
            "curves": (
                [main, [list(run[1:]) for run in runs]],
                [f"Train {named(run)}" for run in runs],
            ),
            "panel": (
                [main, config.datasets[dataset].ndim, methods, plot.panel_sample, plot.panel_crop],
                [prepared, *first],
            ),
            "embeddings": (
                [methods, plot.panel_sample, plot.panel_crop],
                [prepared, *(f"Predict {named(run)}" for run in chosen)],
            ),
        }
        if config.datasets[dataset].ndim == 3:
            made["neurons"] = ([methods, plot.panel_sample], [prepared, *first])
        for figure, (told, before) in made.items():
            rule = f"figure_{figure}"
            add(
                f"Draw {figure} of {dataset}",
                rule,
                [figure, networks, plot.dpi, *told],
                report,
                before,
            )
        for name, one in asked.ablations.items():
            told = ["ablation", name, one["method"], metrics, networks | settings, plot.dpi]
            add(
                f"Draw ablation {name} of {dataset}",
                "figure_ablation",
                told,
                report,
                judged[dataset],
            )
    return out


def named(run: plan.Run) -> str:
    """Return what the workflow calls a run."""
    return "{}/{}/{}/seed{}".format(*run)


def again(old: dict[str, Job], new: dict[str, Job], edited: str = "") -> set[str]:
    """Return the jobs that are run after an edit, of the configuration or of a file of the
    package."""
    found = {name for name, job in new.items() if job != old.get(name) or edited in job.code}
    while more := {name for name, job in new.items() if job.before & found} - found:
        found |= more
    return found


def run_of(dataset: str, run: str) -> str:
    """Return what the workflow calls a run, `none/seed0` or so, of a dataset's student or teacher."""
    teacher, student = NETWORKS[dataset]
    return f"{dataset}/{teacher if run.startswith('teacher') else student}/{run}"


def jobs(
    *runs: str, steps: tuple[str, ...] = STEPS, datasets: tuple[str, ...] = (DATA, VOLUMES)
) -> set[str]:
    """Return what the workflow calls these steps of these runs."""
    found = set()
    for dataset in datasets:
        for step in steps:
            ways = (
                [f" by {name}" for name in SEGMENTERS[dataset]]
                if step in ("Segment", "Evaluate")
                else [""]
            )
            found |= {f"{step} {run_of(dataset, run)}{way}" for run in runs for way in ways}
    return found


def drawn(*figures: str, datasets: tuple[str, ...] = (DATA, VOLUMES)) -> set[str]:
    """Return what the workflow calls the jobs of these figures."""
    return {
        f"Draw {figure} of {dataset}"
        for dataset in datasets
        for figure in figures
        if figure in FIGURES[dataset]
    }


def asking(*parts: str, datasets: tuple[str, ...] = (DATA, VOLUMES)) -> set[str]:
    """Return what the workflow calls the jobs that ask teachers for these parts of their output."""
    return {
        f"Ask {NETWORKS[dataset][0]} for the {part} of the training images of {dataset}"
        for dataset in datasets
        for part in parts
    }


def code_of(step: str) -> str:
    """Return the file where the code of a step begins."""
    return plan.STEPS[step].files[0]


TABLES = {"Summarize the study", "Record where every number comes from"}
ASKED = asking("embedding")
ALL_FIGURES = drawn(*FIGURES[VOLUMES])
NUMBERS = TABLES | drawn("methods", "tradeoff")  # what shows test metrics
JUDGED = jobs(TEACHING, NONE, GRD, steps=("Evaluate",)) | NUMBERS
TRIVIAL = {f"Evaluate trivial segmentations of {VOLUMES}"}
# What is edited: (changes of the configuration, or the name of a file of the package; what runs
# again).
CONTRACT: dict[str, tuple[dict[str, Any] | str, set[str]]] = {
    "nothing": ({}, set()),
    "plot option": ({"plot": {"dpi": 100}}, ALL_FIGURES),
    "plotted metrics": ({"plot": {"metrics": ["aji", "dice"]}}, drawn("methods", datasets=(DATA,))),
    "plotted metrics of volumes": (
        {"plot": {"volumes": {"metrics": ["voi", "arand"]}}},
        drawn("methods", datasets=(VOLUMES,)),
    ),
    "title of a dataset": ({"datasets": {DATA: {"title": "Small"}}}, TABLES),
    "segmentation parameter": (
        {"datasets": {DATA: {"segmentation": {"mutex_watershed": {"min_size": 30}}}}},
        jobs(TEACHING, NONE, GRD, steps=("Segment", "Evaluate"), datasets=(DATA,))
        | TABLES
        | drawn("methods", "tradeoff", "panel", datasets=(DATA,)),
    ),
    "weight of a method": (
        {"methods": {"grd": [term | {"weight": 2.0} for term in CATALOGUE["methods"]["grd"]]}},
        jobs(GRD) | TABLES | ALL_FIGURES,
    ),
    "weight of a method that another one names": (
        {"methods": {"igd_nodes": [{"term": "igd", "weight": 0.2, "options": {"part": "nodes"}}]}},
        jobs(GRD) | TABLES | ALL_FIGURES,
    ),
    "weight of a method that is not run": (
        {"methods": {"at": [{"term": "at", "weight": 9.0}]}},
        set(),
    ),
    "memory bank": (
        {"recipes": {"student": {"bank": {"capacity": 16}}}},
        jobs(GRD) | TABLES | ALL_FIGURES,
    ),
    "recipe of one dataset": (
        {"studies": {"smoke": {"recipes": {VOLUMES: {"student": {"steps": 11}}}}}},
        jobs(NONE, GRD, datasets=(VOLUMES,))
        | TABLES
        | drawn(*FIGURES[VOLUMES], datasets=(VOLUMES,)),
    ),
    "one more seed": (
        {"studies": {"smoke": {"seeds": [0, 1]}}},
        jobs("none/seed1", "grd/seed1") | NUMBERS | drawn("curves"),
    ),
    "one more student": (  # of images; the teacher has been asked
        {"studies": {"smoke": {"students": [STUDENT, STUDENT_3D, "enet"]}}},
        {message.replace(STUDENT, "enet") for message in jobs(NONE, GRD, datasets=(DATA,))}
        | {f"Profile {DATA}/enet"}
        | TABLES
        | drawn(*FIGURES[DATA], datasets=(DATA,)),
    ),
    "a method that compares a feature map": (  # of the teacher's only this is asked for
        {"studies": {"smoke": {"methods": ["none", "grd", "fitnet"]}}},
        jobs("fitnet/seed0") | asking("stride8", "stride9") | NUMBERS | drawn("curves"),
    ),
    "teacher online": (
        {"recipes": {"student": {"teacher": "online"}}},
        jobs(GRD) | TABLES | ALL_FIGURES,
    ),
    "one more method": (
        {"studies": {"smoke": {"methods": ["none", "grd", "igd"]}}},
        jobs("igd/seed0") | NUMBERS | drawn("curves"),
    ),
    "code of a loss term": (registry.TERMS.file("igd"), jobs(GRD) | TABLES | ALL_FIGURES),
    "code of a loss term that is not run": (registry.TERMS.file("at"), set()),
    "code of a network": (
        registry.NETWORKS.file("resunet3d"),
        jobs(TEACHING, NONE, GRD, datasets=(VOLUMES,))
        | asking("embedding", datasets=(VOLUMES,))
        | {f"Profile {VOLUMES}/{network}" for network in NETWORKS[VOLUMES]}
        | TABLES
        | drawn(*FIGURES[VOLUMES], datasets=(VOLUMES,)),
    ),
    "code of the memory bank": (plan.BANK, jobs(GRD) | TABLES | ALL_FIGURES),
    "code of the training loop": (
        code_of("train"),
        jobs(TEACHING, NONE, GRD) | ASKED | TABLES | ALL_FIGURES,
    ),
    "code of the metrics": (plan.NUMBERS[0], JUDGED | TRIVIAL),
    "code that carries results": (sorted(registry.CARRIERS)[-1], set()),
}


def changed(changes: dict[str, Any]) -> Config:
    """Return the configuration of the smoke study with these changes."""
    return Config.parse(updated(parts.read(ROOT), {"study": "smoke", **changes}))


@pytest.fixture(scope="module")
def before() -> dict[str, Job]:
    """Return the jobs of the smoke study."""
    return jobs_of(load(ROOT, changes={"study": "smoke"}))


@pytest.mark.parametrize("what", CONTRACT)
def test_an_edit_runs_again_exactly_what_depends_on_it(what, before):
    change, expected = CONTRACT[what]
    if isinstance(change, str):
        assert (registry.PACKAGE / change).is_file()
        assert again(before, before, change) == expected
    else:
        assert again(before, jobs_of(changed(change))) == expected


SOME = {
    "datasets": {DATA: {"unlabelled": ["train_000[2-7]"]}},
    "studies": {
        "smoke": {"datasets": [DATA], "methods": ["none", "grd", "grd_labelled", "pseudo"]}
    },
}
LABELLED = {f"Let {TEACHER_2D} label the unlabelled images of {DATA}"}
ASKED_OF_THEM = {f"Ask {TEACHER_2D} for the embedding of the unlabelled images of {DATA}"}
WITH_THEM = (
    jobs(GRD, "pseudo/seed0", datasets=(DATA,)) | TABLES | drawn(*FIGURES[DATA], datasets=(DATA,))
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"recipes": {"student": {"unlabelled": {"share": 0.3}}}}, WITH_THEM),
        (
            {"recipes": {"student": {"unlabelled": {"sure": 0.8}}}},
            LABELLED | ASKED_OF_THEM | WITH_THEM,
        ),
        (
            {"datasets": {DATA: {"segmentation": {"mutex_watershed": {"min_size": 30}}}}},
            LABELLED
            | ASKED_OF_THEM
            | WITH_THEM
            | jobs(
                TEACHING,
                NONE,
                "grd_labelled/seed0",
                steps=("Segment", "Evaluate"),
                datasets=(DATA,),
            ),
        ),
        ("train/label.py", LABELLED | ASKED_OF_THEM | WITH_THEM),
    ],
)
def test_an_edit_of_what_is_unlabelled_is_for_those_who_see_it(change, expected):
    code = change if isinstance(change, str) else ""
    edit = {} if code else change
    new = jobs_of(changed(updated(SOME, edit)))
    assert again(jobs_of(changed(SOME)), new, code) == expected


def test_the_order_of_keys_runs_nothing(before):
    def reverse(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reverse(value[key]) for key in reversed(value)}
        return [reverse(item) for item in value] if isinstance(value, list) else value

    assert (
        again(before, jobs_of(Config.parse(reverse(parts.read(ROOT)) | {"study": "smoke"})))
        == set()
    )


@pytest.mark.parametrize("study", CATALOGUE["studies"])
def test_every_study_can_be_planned(study):
    config = load(ROOT, changes={"study": study})
    found = jobs_of(config)
    made = [run for run in config.runs() if not config.network(run[1]).weights]
    assert len([name for name in found if name.startswith(("Train ", "Join "))]) == len(made)
    assert not set().union(*(job.before for job in found.values())) - found.keys()


def test_a_teacher_of_ones_own_is_not_trained(before):
    found = jobs_of(changed({"teachers": {TEACHER_2D: {"weights": "mine.safetensors"}}}))
    assert before.keys() - found.keys() == jobs(TEACHING, steps=("Train",), datasets=(DATA,))
    assert (
        jobs(NONE, GRD) | jobs(TEACHING, steps=("Predict", "Segment", "Evaluate")) <= found.keys()
    )


# --- Which code ------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Return `write(file, text)` for a package `gdlib` of a few files."""
    folder = tmp_path / "gdlib"
    monkeypatch.setattr(registry, "PACKAGE", folder)
    monkeypatch.setattr(registry, "CARRIERS", frozenset({"io.py"}))

    def write(file: str, text: str = "") -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)

    return write


def test_needed_is_what_is_imported_directly_or_not(package):
    package(
        "a.py",
        "import numpy\nfrom gdlib import b, io\n\ndef f():\n    from gdlib.room import (\n        "
        "c,  # not d\n    )\n",
    )
    package(
        "b.py", "from gdlib.e import one as two\nfrom elsewhere import d\nfrom gdlibrary import d\n"
    )
    package("e.py", "from gdlib.b import back\n")
    package("io.py", "from gdlib import d\n")
    package("d.py")
    package("room/__init__.py")
    package("room/c.py", "from gdlib.room.deep import x\n")
    package("room/deep.py")
    assert registry.needs("a.py") == [
        "a.py",
        "b.py",
        "e.py",
        "room/__init__.py",
        "room/c.py",
        "room/deep.py",
    ]
    assert registry.needs("e.py") == ["b.py", "e.py"]
    assert registry.needs("a.py", without=["room/c.py", "b.py"]) == ["a.py", "room/__init__.py"]
    assert registry.needs("io.py", "room/c.py") == ["d.py", "io.py", "room/c.py", "room/deep.py"]


@pytest.mark.parametrize("arguments", [(["gone.py"], []), (["a.py"], ["gone.py"])])
def test_a_file_that_is_gone_is_told(package, arguments):
    package("a.py")
    with pytest.raises(FileNotFoundError, match=r"gone\.py: the workflow names this file"):
        registry.needs(*arguments[0], without=arguments[1])


def test_what_is_named_is_there():
    """Else a step would be run again for code that it does not need, or not for code that it
    needs."""
    for step, (files, without) in plan.STEPS.items():
        for file in files:
            assert list(registry.PACKAGE.glob(file)), (step, file)
        everything = registry.needs(*plan.code(step), without=())
        assert set(without) <= set(everything), (step, "leaves out what it does not import")
    assert all((registry.PACKAGE / file).is_file() for file in registry.CARRIERS)


def test_no_step_needs_what_only_starts_it():
    """An edit of the command line, of the plan or of the configuration makes no result another
    one."""
    found = set().union(*map(plan.code, plan.STEPS))
    assert not [
        file
        for file in found
        if "cli" in file or "steps" in file or "plan" in file or "config" in file
    ]


def test_training_needs_its_own_network_and_terms_alone():
    asked = plan.Plan(load(ROOT, changes={"study": "smoke"}))
    by_method = {
        method: set(asked.train_code((DATA, STUDENT, method, 0))) for method in ("none", "grd")
    }
    terms = {registry.TERMS.file(name) for name in registry.TERMS.names()}
    own = {registry.TERMS.file(name) for name in ("supervised", "foreground")}
    assert by_method["none"] & terms == own
    assert by_method["grd"] & terms == own | {registry.TERMS.file(name) for name in ("agd", "igd")}
    assert by_method["grd"] - by_method["none"] - terms == {plan.BANK}
    networks = {registry.NETWORKS.file(name) for name in registry.NETWORKS.names()}
    assert by_method["none"] & networks == {registry.NETWORKS.file("resunet")}
    # a plug-in that lives elsewhere
    assert plan.code("train", "", without=[]) == plan.code("train")


def test_reading_a_dataset_needs_its_source_and_its_lists():
    asked = plan.Plan(load(ROOT, changes={"study": "nuclei"}))
    found = asked.prepare_code("bbbc039")
    assert registry.SOURCES.file("bbbc039") in found
    assert [file for file in found if file.endswith("heldout/train.txt")]
    assert registry.SOURCES.file("celegans") not in found
    phantom = plan.Plan(load(ROOT)).prepare_code("nuclei_phantom")
    assert registry.SOURCES.file("_phantom") in phantom
