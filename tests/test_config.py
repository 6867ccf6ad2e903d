"""The configuration: every run of the catalogue can be built, every typo is one line that names key
and nearest valid name."""

import copy
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gdlib import registry
from gdlib.config import SEGMENTERS, TEACHER, Config, ConfigError, RunSpec, parts
from gdlib.segment import segmenters

ROOT = Path(__file__).resolve().parents[1]
STUDIES = tuple(parts.read(ROOT)["studies"])

# A catalogue of its own for the mistakes, so that an edit of config.yaml breaks no test of how
# mistakes are told.
SMALL = """
study: quick
raw_folders: [raw]
studies:
  quick:
    datasets: [nuclei_phantom]
    teacher: resunet_w16
    students: [resunet_tiny]
    methods: [none, agd, grd]
    seeds: [0, 1]
    teacher_recipe: {steps: 300}
    student_recipe: {steps: 200}
  nuclei:
    datasets: [bbbc039]
    teacher: resunet_w32
    students: [resunet_tiny]
    methods: [none, igd_intra]
    seeds: [0]
    student_recipe: {steps: 600}
datasets:
  nuclei_phantom:
    source: nuclei_phantom
    options: {size: [256, 256]}
    offsets: [[-1, 0], [0, -1], [-9, 0], [0, -9]]
    patch: [128, 128]
  bbbc039:
    source: bbbc039
    folder: bbbc039
    options: {split: heldout}
    offsets: [[-1, 0], [0, -1], [-9, 0], [0, -9]]
    patch: [128, 128]
teachers:
  resunet_w32: {model: resunet, options: {widths: [32, 64, 128, 256, 512]}}
  resunet_w16: {model: resunet, options: {widths: [16, 32, 64, 128, 256]}}
students:
  resunet_tiny: {model: resunet, options: {widths: [4, 8, 16, 32, 64]}}
methods:
  none: []
  agd: [{term: agd, weight: 1.0}]
  igd_intra: [{term: igd, weight: 1.0, options: {part: nodes}}]
  grd:
    - {term: agd, weight: 1.0}
    - {term: agd, weight: 1.0, memory: true}
    - {term: igd, weight: 0.1, options: {part: nodes}}
    - {term: igd, weight: 1.0, options: {part: edges}, memory: true}
recipes:
  teacher: {steps: 1000, batch_size: 8, validate_every: 250, optimizer: {lr: 1.0e-3}}
  student: {steps: 1000, batch_size: 8, validate_every: 250, optimizer: {lr: 2.0e-3, weight_decay: 1.0e-4}}
plot: {main_metric: aji, metrics: [aji, pq], panel_methods: [none, grd]}
"""


# What a catalogue with volumes has more.
VOLUMES = """
studies:
  both:
    datasets: [nuclei_phantom, neurites, bbbc039]
    teacher: [resunet_w16, cube_w8, resunet_w32, cube_w16]
    students: [resunet_tiny, cube_tiny, cube_small]
    methods: [none, grd]
    seeds: [0, 1]
    teacher_seeds: [4, 5]
    teacher_recipe: {patch: [64, 64]}
    student_recipe: {patch: [64, 64]}
    recipes:
      neurites:
        teacher: {patch: [4, 32, 32]}
        student: {patch: [8, 32, 32], steps: 7}
  cubes:
    datasets: [neurites]
    teacher: cube_w16
    students: [resunet_tiny, cube_tiny]
    methods: [none]
    seeds: [0]
datasets:
  neurites:
    source: neurites_phantom
    offsets: [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 0, -9]]
    patch: [8, 64, 64]
    targets: {background_connected: false, per_offset: true, border: 1}
    segmenters: [waterz, mutex_watershed]
    segmentation: {waterz: {threshold: 0.4, min_size: 30}}
    recipe: {batch_size: 2, selection: voi}
teachers:
  cube_w8: {model: resunet3d, options: {widths: [8, 16, 32, 64, 128]}}
  cube_w16: {model: resunet3d, options: {widths: [16, 32, 64, 128, 256]}}
students:
  cube_tiny: {model: resunet3d}
  cube_small: {model: resunet3d, options: {widths: [2, 4, 8, 16, 32]}}
"""


@pytest.fixture
def raw():
    """Return a small catalogue to spoil."""
    return yaml.safe_load(SMALL)


@pytest.fixture
def volumes(raw):
    """Return the small catalogue with volumes, its study `both` selected."""
    for section, entries in yaml.safe_load(VOLUMES).items():
        raw[section] |= entries
    return raw | {"study": "both"}


def at(raw, path):
    """The part of nested dicts and lists at a path such as `methods.grd.0`."""
    for key in path.split(".") if path else []:
        raw = raw[int(key)] if isinstance(raw, list) else raw[key]
    return raw


def rename(path, new):
    """Change the last key of a path, as a slip of the finger does."""

    def spoil(raw):
        parent, _, old = path.rpartition(".")
        section = at(raw, parent)
        section[new] = section.pop(old)

    return spoil


def put(path, value):
    """Set a key to a value."""

    def spoil(raw):
        parent, _, key = path.rpartition(".")
        section = at(raw, parent)
        section[int(key) if isinstance(section, list) else key] = value

    return spoil


def message(raw):
    with pytest.raises(ConfigError) as caught:
        Config.parse(raw)
    text = str(caught.value)
    assert text.startswith("config: ")
    assert "\n" not in text
    return text


def test_studies_of_the_catalogue(catalogue):
    assert {"smoke", "quick", "nuclei", "neurons"} <= set(STUDIES)
    assert Config.parse(catalogue).study == "quick"


@functools.cache
def built(model, options):
    """A network without weights, made once for all runs that have it."""
    import torch

    from gdlib.models import build

    with torch.device("meta"):
        return build(model, json.loads(options))


@functools.cache
def built_term(name, memory, options):
    from gdlib.distill import build_term

    return build_term(name, memory, json.loads(options))


@pytest.mark.parametrize("study", STUDIES)
def test_every_run_builds_its_spec_its_network_and_its_terms(catalogue, study):
    config = Config.parse(catalogue | {"study": study})
    runs = config.runs()
    chosen = config.selected
    assert (
        len(runs)
        == len(set(runs))
        == sum(
            len({run for run in runs if run[0] == d and run[2] == TEACHER})
            + len(config.students_of(d)) * len(config.methods_of(d)) * len(chosen.seeds)
            for d in chosen.datasets
        )
    )
    for dataset in chosen.datasets:
        teachers = {run[1:] for run in runs if run[0] == dataset and run[2] == TEACHER}
        expected = set()
        for name in (
            *config.teachers_of(dataset),
            *config.fitting(chosen.teachers_beside, dataset),
        ):
            seeds = chosen.teacher_seeds
            members = config.teachers[name].members
            expected |= {(name, TEACHER, seed) for seed in (seeds[:1] if members else seeds)}
            for member in members:
                expected |= {(member, TEACHER, s) for s in config.teachers[name].member_seeds}
        assert teachers == expected
    # none is left out of all datasets
    assert {network for _, network, _, _ in runs} >= set(chosen.students)
    for dataset, network, method, seed in runs:
        spec = config.run(dataset, network, method, seed)
        assert (spec.dataset, spec.network, spec.method, spec.seed) == (
            dataset,
            network,
            method,
            seed,
        )
        assert config.is_teacher(network) == (method == TEACHER)
        assert spec.options["in_channels"] == spec.channels == config.datasets[dataset].channels
        assert len(spec.patch) == len(spec.offsets[0])
        made = built(spec.model, json.dumps(spec.options))
        assert made.ndim == len(spec.patch)
        assert made.ndim == config.datasets[dataset].ndim
        sides = zip(spec.patch, made.divisor, made.remainder, strict=True)
        assert not [n for n, divisor, remainder in sides if (n - remainder) % divisor]
        names = [term.name for term in spec.all_terms]
        assert len(set(names)) == len(names) >= 2
        for term in spec.all_terms:
            assert built_term(term.term, term.memory, json.dumps(term.options))
        for segmenter in spec.segmenters:
            fixed = config.datasets[dataset].segmentation.get(segmenter, {})
            assert fixed.keys() <= segmenters.defaults(segmenter, made.ndim).keys()


def test_segmenters_are_those_there_are():
    assert set(SEGMENTERS) == set(segmenters.SEGMENTERS)


def test_every_source_takes_the_options_of_its_datasets(catalogue):
    config = Config.parse(catalogue)
    for data in config.datasets.values():
        registry.SOURCES.check(data.source, data.options)
        assert callable(registry.SOURCES.get(data.source))


def test_run_spec_survives_json(catalogue):
    config = Config.parse(catalogue)
    for run in config.runs():
        spec = config.run(*run)
        text = json.dumps(spec.model_dump(mode="json"))
        assert RunSpec.model_validate(json.loads(text)) == spec
        assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_slice_without_what_no_term_reads_is_a_spec_too(catalogue):
    config = Config.parse(catalogue)
    spec = config.run(*config.runs()[0]).model_dump(mode="json")
    del spec["recipe"]["bank"]
    assert RunSpec.model_validate(spec) == config.run(*config.runs()[0])


# What is spoilt, the key that the message must name, and the name that it must suggest.
TYPOS = {
    "top": (rename("recipes", "recipies"), "recipies", "recipes"),
    "top, superfluous": (put("plots", {}), "plots", "plot"),
    "study": (rename("studies.quick.methods", "method"), "studies.quick.method", "methods"),
    "study recipe": (
        put("studies.quick.student_recipe.step", 3),
        "studies.quick.student_recipe.step",
        "steps",
    ),
    "study recipe, nested": (
        put("studies.quick.student_recipe.optimizer", {"lrate": 1}),
        "studies.quick.student_recipe.optimizer.lrate",
        "lr",
    ),
    "study recipe, two levels": (
        put("studies.quick.teacher_recipe.augment", {"intensity": {"gama": 1}}),
        "studies.quick.teacher_recipe.augment.intensity.gama",
        "gamma",
    ),
    "study recipe, term name": (
        put("studies.quick.student_recipe.terms", [{"term": "supervisd", "weight": 1}]),
        "studies.quick.student_recipe.terms",
        "supervised",
    ),
    "study recipe, metric": (
        put("studies.quick.student_recipe.selection", "f1_5"),
        "studies.quick.student_recipe.selection",
        "f1_50",
    ),
    "recipe": (
        rename("recipes.teacher.batch_size", "batchsize"),
        "recipes.teacher.batchsize",
        "batch_size",
    ),
    "recipe, metric": (
        put("recipes.student.selection", "ajii"),
        "recipes.student.selection",
        "aji",
    ),
    "recipe, name": (rename("recipes.student", "students"), "recipes.students", "'student'"),
    "optimizer": (
        rename("recipes.student.optimizer.weight_decay", "weightdecay"),
        "recipes.student.optimizer.weightdecay",
        "weight_decay",
    ),
    "optimizer, name": (
        put("recipes.student.optimizer.name", "adamm"),
        "recipes.student.optimizer.name",
        "'adam'",
    ),
    "bank": (
        put("recipes.student.bank", {"capasity": 3}),
        "recipes.student.bank.capasity",
        "capacity",
    ),
    "term key": (rename("methods.agd.0.weight", "wieght"), "methods.agd.terms.0.wieght", "weight"),
    "term name": (put("methods.agd.0.term", "adg"), "methods.agd", "agd"),
    "term option": (put("methods.agd.0.options", {"balancd": True}), "balancd", "balanced"),
    "model key": (
        rename("students.resunet_tiny.options", "option"),
        "students.resunet_tiny.option",
        "options",
    ),
    "model name": (
        put("students.resunet_tiny.model", "resnet"),
        "students.resunet_tiny",
        "resunet",
    ),
    "model option": (
        put("teachers.resunet_w16.options", {"width": [1]}),
        "teachers.resunet_w16",
        "widths",
    ),
    "one name for two": (
        put("teachers.bbbc039", {"model": "resunet"}),
        "bbbc039 is both a teacher and a dataset",
        "rename one",
    ),
    "dataset key": (rename("datasets.bbbc039.folder", "foldr"), "datasets.bbbc039.foldr", "folder"),
    "dataset section": (
        put("datasets.bbbc039.normalisation", {"uper": 99}),
        "datasets.bbbc039.normalisation.uper",
        "upper",
    ),
    "source name": (put("datasets.bbbc039.source", "bbbc39"), "datasets.bbbc039", "bbbc039"),
    "source option": (
        put("datasets.bbbc039.options", {"splits": "heldout"}),
        "datasets.bbbc039",
        "split",
    ),
    "plot key": (rename("plot.main_metric", "mainmetric"), "plot.mainmetric", "main_metric"),
    "plot metric": (put("plot.metrics", ["aji", "f1_81"]), "plot.metrics", "f1_80"),
    "plot table metric": (put("plot.table_metrics", ["dise"]), "plot.table_metrics", "dice"),
    "plot volumes": (put("plot.volumes", {"metrix": ["voi"]}), "plot.volumes.metrix", "metrics"),
    "plot volumes metric": (
        put("plot.volumes", {"metrics": ["voii"]}),
        "plot.volumes.metrics",
        "voi",
    ),
    "plot volumes table": (
        put("plot.volumes", {"table_metrics": ["voi_splt"]}),
        "plot.volumes.table_metrics",
        "voi_split",
    ),
    "plot volumes main": (
        put("plot.volumes", {"main_metric": "aji"}),
        "plot.volumes.main_metric",
        "plot.volumes.metrics",
    ),
    "targets": (
        put("datasets.bbbc039.targets", {"boarder": 1}),
        "datasets.bbbc039.targets.boarder",
        "border",
    ),
    "segmenter": (
        put("datasets.bbbc039.segmenters", ["watrz"]),
        "datasets.bbbc039.segmenters.0",
        "'waterz'",
    ),
    "segmentation": (
        put("datasets.bbbc039.segmentation", {"watrz": {"threshold": 0.5}}),
        "datasets.bbbc039.segmentation.watrz: ",
        "'waterz'",
    ),
    "segmentation, parameter": (
        put("datasets.bbbc039.segmentation", {"multicut": {"betta": 0.5}}),
        "datasets.bbbc039: segmentation.multicut",
        "beta",
    ),
    "segmentation, parameter of another segmenter": (
        put("datasets.bbbc039.segmentation", {"mutex_watershed": {"threshold": 0.5}}),
        "datasets.bbbc039: segmentation.mutex_watershed",
        "foreground_threshold",
    ),
    "augmentation of sections": (
        put("recipes.student.augment", {"sections": {"mising": 0.1}}),
        "recipes.student.augment.sections.mising",
        "missing",
    ),
    "dataset recipe": (
        put("datasets.bbbc039.recipe", {"step": 3}),
        "datasets.bbbc039.recipe.step",
        "steps",
    ),
    "dataset recipe, metric": (
        put("datasets.bbbc039.recipe", {"selection": "voii"}),
        "datasets.bbbc039.recipe.selection",
        "voi",
    ),
    "dataset recipe, term": (
        put("datasets.bbbc039.recipe", {"terms": [{"term": "supervised", "weigth": 1}]}),
        "datasets.bbbc039.recipe.terms.0.weigth",
        "weight",
    ),
    "dataset recipe of a dataset that no study has": (
        put(
            "datasets.more",
            {"source": "bbbc039", "offsets": [[-1, 0]], "patch": [8, 8], "recipe": {"emma": 0.9}},
        ),
        "datasets.more.recipe.emma",
        "ema",
    ),
    "study recipes, dataset": (
        put("studies.quick.recipes", {"nuclei_phantm": {}}),
        "studies.quick.recipes",
        "nuclei_phantom",
    ),
    "study recipes, role": (
        put("studies.quick.recipes", {"nuclei_phantom": {"studnt": {"steps": 3}}}),
        "studies.quick.recipes.nuclei_phantom.studnt: ",
        "'student'",
    ),
    "study recipes, key": (
        put("studies.quick.recipes", {"nuclei_phantom": {"student": {"optimizer": {"rl": 3}}}}),
        "studies.quick.recipes.nuclei_phantom.student.optimizer.rl",
        "lr",
    ),
    "study recipes, metric": (
        put("studies.quick.recipes", {"nuclei_phantom": {"student": {"selection": "arnd"}}}),
        "studies.quick.recipes.nuclei_phantom.student.selection",
        "arand",
    ),
    "study, one of several teachers": (
        put("studies.nuclei.teacher", ["resunet_w16", "resunet_w23"]),
        "studies.nuclei.teacher",
        "resunet_w32",
    ),
    "plot main metric": (put("plot.main_metric", "f1_90"), "plot.main_metric", "plot.metrics"),
    "plot method": (put("plot.panel_methods", ["none", "grdd"]), "plot.panel_methods", "grd"),
    "study name": (put("study", "quik"), "study", "quick"),
    "study, dataset": (
        put("studies.nuclei.datasets", ["bbbc039", "bbc039"]),
        "studies.nuclei.datasets",
        "bbbc039",
    ),
    "study, teacher": (
        put("studies.nuclei.teacher", "resunet_w23"),
        "studies.nuclei.teacher",
        "resunet_w32",
    ),
    "study, student": (
        put("studies.nuclei.students", ["resunet_tny"]),
        "studies.nuclei.students",
        "resunet_tiny",
    ),
    "study, method": (
        put("studies.nuclei.methods", ["none", "igd_infra"]),
        "studies.nuclei.methods",
        "igd_intra",
    ),
}


@pytest.mark.parametrize(("spoil", "key", "suggestion"), TYPOS.values(), ids=TYPOS)
def test_a_typo_is_one_line_with_the_key_and_the_nearest_name(raw, spoil, key, suggestion):
    spoil(raw)
    text = message(raw)
    assert key in text
    assert suggestion in text.replace(key, "")


# Mistakes other than a wrong name; the message must name the key.
MISTAKES = {
    "missing section": (lambda raw: raw.pop("methods"), '"methods" is missing'),
    "missing key": (
        lambda raw: raw["methods"]["agd"][0].pop("weight"),
        "methods.agd.terms.0.weight",
    ),
    "missing recipe": (lambda raw: raw["recipes"].pop("teacher"), "recipes.teacher"),
    "wrong type": (put("recipes.teacher.steps", "many"), "recipes.teacher.steps"),
    "wrong range": (put("recipes.teacher.batch_size", 0), "recipes.teacher.batch_size"),
    "wrong section type": (
        put("studies.quick.student_recipe.optimizer", 3),
        "studies.quick.student_recipe.optimizer",
    ),
    "list for a section": (put("datasets.bbbc039", []), "datasets.bbbc039"),
    "name for a list": (put("studies.quick.methods", "grd"), "studies.quick.methods"),
    "no dataset": (put("studies.quick.datasets", []), "studies.quick.datasets"),
    "no teacher seed": (put("studies.quick.teacher_seeds", []), "studies.quick.teacher_seeds"),
    "axes of the patch": (put("datasets.bbbc039.patch", [8, 128, 128]), "datasets.bbbc039"),
    "axes of a study's patch": (
        put("studies.nuclei.student_recipe.patch", [8, 64, 64]),
        "studies.nuclei",
    ),
    "no offsets": (put("datasets.bbbc039.offsets", []), "datasets.bbbc039.offsets"),
    "empty patch": (put("datasets.bbbc039.patch", [0, 128]), "datasets.bbbc039.patch"),
    "segmentation without a segmenter": (
        put("datasets.bbbc039.segmentation", {"stride": 2}),
        "datasets.bbbc039.segmentation.stride",
    ),
    "a parameter that is no number": (
        put("datasets.bbbc039.segmentation", {"mutex_watershed": {"stride": "two"}}),
        "datasets.bbbc039.segmentation.mutex_watershed.stride: ",
    ),
    "no segmenter": (put("datasets.bbbc039.segmenters", []), "datasets.bbbc039.segmenters"),
    "no teacher": (put("studies.quick.teacher", []), "studies.quick.teacher"),
    "a teacher without a name": (put("studies.quick.teacher", ""), "studies.quick.teacher"),
    "a number for a teacher": (put("studies.quick.teacher", 3), "studies.quick.teacher: "),
    "negative border": (
        put("datasets.bbbc039.targets", {"border": -1}),
        "datasets.bbbc039.targets.border",
    ),
    "axes of a recipe's patch": (
        put("recipes.teacher.patch", [8, 64, 64]),
        "recipes.teacher.patch: it must have 2 axes",
    ),
    "axes of a dataset's patch": (
        put("datasets.bbbc039.recipe", {"patch": [8, 64, 64]}),
        'datasets.bbbc039.recipe.patch: it must have 2 axes, as dataset "bbbc039" has',
    ),
    "axes of a patch for one dataset": (
        put("studies.quick.recipes", {"nuclei_phantom": {"student": {"patch": [64]}}}),
        "studies.quick.recipes.nuclei_phantom.student.patch",
    ),
    "a word for a recipe": (
        put("studies.quick.recipes", {"nuclei_phantom": {"student": "long"}}),
        "studies.quick.recipes.nuclei_phantom.student: ",
    ),
    "no teacher for volumes": (
        put(
            "datasets.nuclei_phantom",
            {"source": "folder", "offsets": [[-1, 0, 0]], "patch": [8, 64, 64]},
        ),
        'studies.quick.teacher: none takes images with 3 axes, as dataset "nuclei_phantom" has',
    ),
    "memory for a term without": (
        put("methods.more", [{"term": "supervised", "weight": 1, "memory": True}]),
        "methods.more",
    ),
    "the same term twice": (
        put("methods.more", [{"term": "agd", "weight": 1}] * 2),
        "methods.more",
    ),
    "a method called teacher": (put("methods.teacher", []), "teacher"),
    "teacher and student of one name": (
        put("students.resunet_w16", {"model": "resunet"}),
        "resunet_w16",
    ),
    "weights of a student": (
        put("students.resunet_tiny.weights", "own.safetensors"),
        "students.resunet_tiny",
    ),
    "no name at all": (put("study", None), "study"),
}


OFFSETS = [[-1, 0], [0, -1], [-9, 0]]
STUDY = "studies.quick"
# What is spoilt, and all that the one line must say.
SENSELESS = {
    "a pixel and itself": (put("datasets.bbbc039.offsets", [*OFFSETS, [0, 0]]), "datasets.bbbc039.offsets", "[0, 0]"),
    "an offset twice": (
        put("datasets.bbbc039.offsets", [*OFFSETS, [-9, 0]]), "datasets.bbbc039.offsets", "[-9, 0] is there twice",
    ),
    "offsets of two kinds": (put("datasets.bbbc039.offsets", [*OFFSETS, [0, 0, -9]]), "datasets.bbbc039.offsets", "axes"),
    "too few offsets": (put("datasets.bbbc039.offsets", [[-1, 0]]), "datasets.bbbc039: ", "the first 2 offsets"),
    "no offset of a nearest neighbour, for multicut": (
        put("datasets.bbbc039", {"source": "bbbc039", "offsets": OFFSETS[1:], "patch": [64, 64], "segmenters": ["multicut"]}),
        "datasets.bbbc039: multicut needs", "[[-1, 0], [0, -1]]",
    ),
    "an offset as long as the patch": (
        put("datasets.bbbc039.offsets", [*OFFSETS, [0, -128]]),
        "datasets.bbbc039.patch: ", "[0, -128]", "[128, 128]",
    ),
    "an offset longer than the patch of a study": (
        put("studies.nuclei.student_recipe.patch", [64, 8]),
        "studies.nuclei.student_recipe.patch: ", "[64, 8]", '"resunet_tiny"', "[64, 16]",
    ),
    "a small patch of a method": (
        put("methods.agd", {"terms": [{"term": "agd", "weight": 1}], "recipe": {"patch": [0, 16]}}),
        "methods.agd.recipe.patch.0", "greater than 0",
    ),
    "a patch of a method that no network takes": (
        put("methods.agd", {"terms": [{"term": "agd", "weight": 1}], "recipe": {"patch": [40, 48]}}),
        "methods.agd.recipe.patch: ", "[40, 48]", "[48, 48]",
    ),
    "a patch that the teacher does not take": (
        put("datasets.bbbc039.patch", [100, 96]),
        "datasets.bbbc039.patch: ", '"resunet_w32"', "multiples of [16, 16]", "[112, 96]",
    ),
    "a patch that the student's teacher does not take": (
        lambda raw: (
            put("students.resunet_tiny", {"model": "enet"})(raw),
            put(f"{STUDY}.student_recipe", {"patch": [24, 24], "teacher": "online"})(raw),
        ),
        f"{STUDY}.student_recipe.patch: ", '"resunet_w16"', "[32, 32]",
    ),
    "a seed twice": (put(f"{STUDY}.seeds", [0, 0]), f"{STUDY}.seeds: ", "0 is there twice"),
    "a seed below 0": (put(f"{STUDY}.seeds", [-1]), f"{STUDY}.seeds.0: ", "from 0 to 4294967295 " "(got -1)"),
    "half a seed": (put(f"{STUDY}.seeds", [0.5]), f"{STUDY}.seeds.0: ", "a whole number"),
    "no seed": (put(f"{STUDY}.seeds", []), f"{STUDY}.seeds: "),
    "a teacher's seed twice": (put(f"{STUDY}.teacher_seeds", [1, 2, 1]), f"{STUDY}.teacher_seeds: ", "1 is there twice"),
    "a method twice": (put(f"{STUDY}.methods", ["grd", "none", "grd"]), f"{STUDY}.methods: ", "grd is there twice"),
    "no method": (put(f"{STUDY}.methods", []), f"{STUDY}.methods: "),
    "a dataset twice": (put(f"{STUDY}.datasets", ["bbbc039"] * 2), f"{STUDY}.datasets: ", "bbbc039 is there twice"),
    "a student twice": (put(f"{STUDY}.students", ["resunet_tiny"] * 2), f"{STUDY}.students: ", "is there twice"),
    "a teacher twice": (put(f"{STUDY}.teacher", ["resunet_w16"] * 2), f"{STUDY}.teacher: ", "resunet_w16 is " "there twice"),
    "a segmenter twice": (
        put("datasets.bbbc039.segmenters", ["waterz", "waterz"]), "datasets.bbbc039.segmenters: ", "waterz is there twice",
    ),
    "a metric twice": (put("plot.metrics", ["aji", "pq", "aji"]), "plot.metrics: ", "aji is there twice"),
    "a format twice": (put("plot.formats", ["png", "png"]), "plot.formats: ", "png is there twice"),
    "a value of an ablation twice": (
        put("ablations", {"size": {"method": "grd", "keys": ["recipe.bank.capacity"], "values": [8, 8]}}),
        "ablations.size.values: ", "8 is there twice",
    ),
    "a name that is a path": (put("datasets.a/b", {"source": "folder"}), "datasets.a/b"),
    "a name that is another folder": (lambda raw: raw["studies"].update({"..": raw["studies"]["quick"]}), '"..", '[:4]),
    "a value that is a path": (
        put("ablations", {"x": {"method": "agd", "keys": ["recipe.selection"], "values": ["../aji"]}}), "ablations.x",
    ),
    "no number": (put("recipes.student.optimizer.lr", math.nan), "recipes.student.optimizer.lr: ", "(got nan)"),
    "an endless number": (put("recipes.student.clip", math.inf), "recipes.student.clip: ", "finite", "(got inf)"),
    "a weight that is no number": (put("methods.agd.0.weight", math.nan), "methods.agd.terms.0.weight: ", "(got nan)"),
    "learning rate 0": (put("recipes.student.optimizer.lr", 0), "recipes.student.optimizer.lr: " "must be " "greater than 0"),
    "no steps": (put("recipes.student.steps", 0), "recipes.student.steps: must be greater than 0 " "(got 0)"),
    "no batch": (put("recipes.student.batch_size", -1), "recipes.student.batch_size: must be " "greater than 0"),
    "never validated": (put("recipes.student.validate_every", 0), "recipes.student.validate_every: " "must be " "greater than 0"),
    "never saved": (put("recipes.student.save_every", 0), "recipes.student.save_every: "),
    "an average of nothing": (put("recipes.student.ema", 1), "recipes.student.ema: must be " "less than " "1 (got 1)"),
    "a running mean of nothing": (
        put("recipes.student.optimizer.betas", [0.9, 1]), "recipes.student.optimizer.betas.1: ", "of at least 0 " "and below 1",
    ),
    "a zoom from large to small": (
        put("recipes.student.augment", {"geometry": {"scale": [1.2, 0.8]}}), "recipes.student.augment.geometry.scale: ",
    ),
    "a zoom to nothing": (
        put("recipes.student.augment", {"geometry": {"scale": [0, 1]}}), "recipes.student.augment.geometry.scale.0: ",
    ),
    "true for a number": (put("recipes.student.steps", True), "recipes.student.steps: must be " "a number", "(got True)"),
    "yes for a share": (put("recipes.student.ema", True), "recipes.student.ema: must be a number"),
    "true for an offset": (put("datasets.bbbc039.offsets", [*OFFSETS, [True, 0]]), "datasets.bbbc039.offsets.3.0: "),
    "a contrast that inverts": (
        put("recipes.student.augment", {"intensity": {"contrast": 2}}), "intensity.contrast: must " "be less " "than or " "equal to 1",
    ),
    "channels that the images have not": (
        put("students.resunet_tiny.options.in_channels", 3), '"resunet_tiny"', "in_channels is 3", '"nuclei_phantom" have 1',
    ),
    "options that do not go together": (
        put("methods.more", [{"term": "igd", "weight": 1, "memory": True, "options": {"part": "nodes"}}]),
        "methods.more: ", "cannot have part nodes and memory True",
    ),
    "a level of a term for whole outputs": (
        put("methods.more", [{"term": "response", "weight": 1, "level": "stride2"}]), "methods.more: ", '"response"', "level",
    ),
    "a level of the labels": (
        put("recipes.student.terms", [{"term": "supervised", "weight": 1, "level": "stride2"}]),
        "recipes.student.terms: ", '"supervised" learns from the label',
    ),
    "a teacher that asks a teacher": (
        put("recipes.teacher.terms", [{"term": "supervised", "weight": 1}, {"term": "agd", "weight": 1}]),
        "recipes.teacher.terms: ", '"agd" asks a teacher',
    ),
    "percentiles exchanged": (
        put("datasets.bbbc039.normalisation", {"lower": 99, "upper": 1}), "datasets.bbbc039.normalisation: ", "below upper",
    ),
}  # fmt: skip


def test_the_cache_of_earlier_versions_is_told(raw):
    raw["studies"]["quick"]["teacher_cache"] = 200
    text = message(raw)
    assert text.startswith("config: studies.quick: ")
    assert "`teacher_cache` is no more: a teacher is asked once" in text
    assert "leave the key out" in text


def test_a_patch_need_not_fit_a_teacher_whose_maps_are_cut(raw):
    raw["students"]["resunet_tiny"] = {"model": "enet"}
    raw["studies"]["quick"]["student_recipe"] = {"patch": [24, 24]}
    Config.parse(raw)


@pytest.mark.parametrize("what", SENSELESS)
def test_what_makes_no_sense_is_one_line_with_key_value_and_range(raw, what):
    spoil, *words = SENSELESS[what]
    spoil(raw)
    text = message(raw)
    assert [word for word in words if word not in text] == [], text


def test_a_run_is_checked_as_the_configuration_is(raw):
    spec = Config.parse(raw).run("bbbc039", "resunet_tiny", "grd", 0).model_dump(mode="json")
    for offsets in ([[-1, 0], [0, 0]], [[-1, 0], [-1, 0]], [[-1, 0], [0, 0, -1]]):
        with pytest.raises(ValueError, match="offsets"):
            RunSpec.model_validate(spec | {"offsets": offsets})


@pytest.mark.parametrize(("spoil", "key"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_the_key(raw, spoil, key):
    spoil(raw)
    assert key in message(raw)


@pytest.mark.parametrize("content", [None, [], "study", {}])
def test_not_a_catalogue_at_all(content):
    message(content)


def test_a_far_name_gets_the_list_of_valid_ones(raw):
    put("students.resunet_tiny.model", "zzz")(raw)
    assert f"valid names: {', '.join(registry.NETWORKS.names())}" in message(raw)


def test_a_plug_in_of_another_package_is_not_looked_for(raw):
    put("students.own", {"model": "my.package:Net", "options": {"anything": 1}})(raw)
    assert Config.parse(raw).students["own"].model == "my.package:Net"
    with pytest.raises(registry.UnknownName, match=r"my\.package:Net"):
        registry.NETWORKS.get("my.package:Net")


def test_values_never_change(catalogue):
    config = Config.parse(catalogue)
    with pytest.raises(ValueError, match="frozen"):
        config.study = "smoke"
    with pytest.raises(ValueError, match="frozen"):
        config.recipes["teacher"].optimizer.lr = 1.0


def test_study_recipe_merges_deeply_and_leaves_the_catalogue_alone(raw):
    put(
        "studies.quick.student_recipe",
        {"optimizer": {"lr": 0.5}, "augment": {"geometry": {"flip": False}}},
    )(raw)
    put("recipes.student.optimizer", {"lr": 0.002, "eps": 0.01, "betas": [0.8, 0.9]})(raw)
    before = copy.deepcopy(raw)
    config = Config.parse(raw)
    student = config.run("nuclei_phantom", "resunet_tiny", "grd", 0).recipe
    base = config.recipes["student"]
    # Changed is what is named, nothing beside it.
    assert student.optimizer == base.optimizer.model_copy(update={"lr": 0.5})
    assert student.optimizer.eps == 0.01
    assert not student.augment.geometry.flip
    assert student.augment.geometry.model_copy(update={"flip": True}) == base.augment.geometry
    assert student.augment.intensity == base.augment.intensity
    left_out = {"optimizer", "augment", "patch"}
    assert student.model_dump(exclude=left_out) == base.model_dump(exclude=left_out)
    # The catalogue, the teacher and other studies are as before.
    assert base.optimizer.lr == 0.002
    assert config.run("nuclei_phantom", "resunet_w16", TEACHER, 0).recipe.optimizer.lr == 1e-3
    other = Config.parse(raw | {"study": "nuclei"}).run("bbbc039", "resunet_tiny", "grd", 0).recipe
    assert other.optimizer.lr == 0.002
    assert raw == before


def test_patch_is_the_studys_or_else_the_datasets(raw):
    assert Config.parse(raw).run("nuclei_phantom", "resunet_tiny", "none", 0).patch == (128, 128)
    put("studies.quick.student_recipe.patch", [64, 96])(raw)
    config = Config.parse(raw)
    assert config.run("nuclei_phantom", "resunet_tiny", "none", 0).patch == (64, 96)
    assert config.run("nuclei_phantom", "resunet_w16", TEACHER, 0).patch == (128, 128)


def test_networks_go_to_the_datasets_with_their_number_of_axes(volumes):
    config = Config.parse(volumes)
    students = {
        "nuclei_phantom": ["resunet_tiny"],
        "neurites": ["cube_tiny", "cube_small"],
        "bbbc039": ["resunet_tiny"],
    }
    # the first that fits
    teachers = {"nuclei_phantom": "resunet_w16", "neurites": "cube_w8", "bbbc039": "resunet_w16"}
    expected = []
    for dataset, mine in students.items():
        assert config.teacher_of(dataset) == teachers[dataset]
        assert config.students_of(dataset) == mine
        expected += [
            (dataset, teachers[dataset], TEACHER, 4),
            (dataset, teachers[dataset], TEACHER, 5),
        ]
        expected += [(dataset, s, m, k) for s in mine for m in ("none", "grd") for k in (0, 1)]
    assert config.runs() == expected
    assert config.selected.teachers == ("resunet_w16", "cube_w8", "resunet_w32", "cube_w16")
    one = Config.parse(volumes | {"study": "cubes"})
    assert one.selected.teachers == ("cube_w16",)
    assert one.runs() == [
        ("neurites", "cube_w16", TEACHER, 0),
        ("neurites", "cube_tiny", "none", 0),
    ]


def test_a_network_of_another_package_fits_every_dataset(volumes):
    put("teachers.own", {"model": "my.package:Net"})(volumes)
    put("studies.both.teacher", ["own", "cube_w8"])(volumes)
    config = Config.parse(volumes)
    assert {config.teacher_of(dataset) for dataset in config.selected.datasets} == {"own"}


def test_a_study_without_students_needs_none(volumes):
    put("studies.both.students", [])(volumes)
    assert {method for _, _, method, _ in Config.parse(volumes).runs()} == {TEACHER}


def test_students_that_fit_no_dataset_are_told(volumes):
    put("studies.both.students", ["resunet_tiny"])(volumes)
    text = message(volumes)
    assert 'studies.both.students: none takes images with 3 axes, as dataset "neurites" has' in text


# Where a recipe is changed, from the weakest to the strongest.
PLACES = [
    "recipes.student",
    "datasets.neurites.recipe",
    "studies.both.student_recipe",
    "studies.both.recipes.neurites.student",
]


@pytest.mark.parametrize("count", range(1, len(PLACES) + 1))
def test_the_nearest_change_of_a_recipe_wins(volumes, count):
    for k, place in enumerate(PLACES[:count]):
        at(volumes, place)["clip"] = 10.0 + k  # all want it
        at(volumes, place)["optimizer"] = (
            {"betas": [0.5, 0.9]} if k == 0 else {["lr", "eps", "weight_decay"][k - 1]: 0.25}
        )
    recipe = Config.parse(volumes).run("neurites", "cube_tiny", "none", 0).recipe
    assert recipe.clip == 9.0 + count
    assert recipe.optimizer.betas == (0.5, 0.9)
    assert [recipe.optimizer.lr, recipe.optimizer.eps, recipe.optimizer.weight_decay].count(
        0.25
    ) == count - 1
    # Changes of the dataset hold for its teacher and in other studies, those of a study nowhere
    # else.
    teacher = Config.parse(volumes).run("neurites", "cube_w8", TEACHER, 0).recipe
    assert teacher.clip == (11.0 if count > 1 else None)
    other = (
        Config.parse(volumes | {"study": "cubes"}).run("neurites", "cube_tiny", "none", 0).recipe
    )
    assert other.clip == 10.0 + min(count - 1, 1)
    flat = Config.parse(volumes).run("bbbc039", "resunet_tiny", "none", 0).recipe
    assert flat.clip == (12.0 if count > 2 else 10.0)


def test_recipes_of_one_dataset(volumes):
    config = Config.parse(volumes)
    assert config.run("nuclei_phantom", "resunet_tiny", "grd", 0).patch == (64, 64)
    assert config.run("neurites", "cube_w8", TEACHER, 0).patch == (4, 32, 32)
    student = config.run("neurites", "cube_tiny", "grd", 0)
    assert (student.patch, student.recipe.steps) == ((8, 32, 32), 7)
    assert (student.recipe.batch_size, student.recipe.selection) == (2, "voi")
    assert config.run("nuclei_phantom", "resunet_tiny", "grd", 0).recipe.steps == 1000
    assert config.recipe("cubes", "neurites", "teacher").patch == (8, 64, 64)  # the dataset's
    del volumes["studies"]["both"]["recipes"]
    text = message(volumes)
    assert (
        'studies.both.teacher_recipe.patch: it must have 3 axes, as dataset "neurites" has' in text
    )


def test_targets_and_segmenters_reach_the_run(volumes):
    config = Config.parse(volumes)
    spec = config.run("neurites", "cube_tiny", "grd", 0)
    assert spec.targets.model_dump() == {
        "background_connected": False,
        "per_offset": True,
        "border": 1,
    }
    assert spec.segmenters == ("waterz", "mutex_watershed")
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec
    plain = config.run("bbbc039", "resunet_tiny", "grd", 0)
    assert plain.targets.model_dump() == {
        "background_connected": True,
        "per_offset": False,
        "border": 0,
    }
    assert plain.segmenters == ("mutex_watershed",)


def test_fixed_parameters_keep_their_type(volumes):
    """A whole number stays one: sizes and strides are counted in pixels."""
    fixed = Config.parse(volumes).datasets["neurites"].segmentation["waterz"]
    assert fixed == {"threshold": 0.4, "min_size": 30}
    assert [type(value) for value in fixed.values()] == [float, int]
    assert json.loads(json.dumps(fixed)) == fixed


def test_volumes_show_metrics_of_their_own(volumes):
    config = Config.parse(volumes)
    assert config.shown("bbbc039").main_metric == "aji"
    assert config.shown("bbbc039").metrics == ("aji", "pq")
    assert config.shown("neurites").main_metric == "voi"
    default = config.shown("neurites")
    # the rest is as before, not that of images in 2D
    put("plot.volumes", {"main_metric": "arand"})(volumes)
    changed = Config.parse(volumes).shown("neurites")
    assert changed.model_copy(update={"main_metric": "voi"}) == default
    assert changed.main_metric == "arand"


def test_a_teacher_has_no_terms_of_a_method(raw):
    config = Config.parse(raw)
    assert config.run("nuclei_phantom", "resunet_w16", TEACHER, 0).terms == ()
    assert [term.name for term in config.run("nuclei_phantom", "resunet_tiny", "grd", 0).all_terms] == [
        "supervised", "foreground", "agd", "agd_inter", "igd_nodes", "igd_edges_inter",
    ]  # fmt: skip


def test_raw_folder_is_the_first_that_exists(raw, tmp_path):
    raw["raw_folders"] = [str(tmp_path / "first"), str(tmp_path / "second")]
    config = Config.parse(raw)
    assert config.raw_folder("nuclei_phantom") is None
    with pytest.raises(ConfigError) as caught:
        config.raw_folder("bbbc039")
    text = str(caught.value)
    assert "\n" not in text
    assert all(
        name in text
        for name in ('"bbbc039"', str(tmp_path / "first" / "bbbc039"), "second", "raw_folders")
    )
    (tmp_path / "first" / "bbbc039").mkdir(parents=True)  # empty
    (tmp_path / "second" / "bbbc039" / "images").mkdir(parents=True)
    assert config.raw_folder("bbbc039") == tmp_path / "second" / "bbbc039"
    (tmp_path / "first" / "bbbc039" / "images").mkdir()
    assert config.raw_folder("bbbc039") == tmp_path / "first" / "bbbc039"


def test_parsing_imports_no_torch():
    code = (
        "import sys; from gdlib.config import load; c = load('.'); [c.run(*r) for r in c.runs()]; "
        "print([m for m in ('torch', 'h5py', 'skimage', 'scipy', 'snakemake') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_nearest():
    assert registry.nearest("resnet", ["resunet", "enet"]) == 'did you mean "resunet"?'
    assert registry.nearest("zzz", ["b", "a"]) == "valid names: a, b"


# A method with a recipe, ablations, and students of more than one teacher.
MORE = """
studies:
  more:
    datasets: [nuclei_phantom]
    teacher: resunet_w16
    more_teachers: [resunet_w32, resunet_w16]
    students: [resunet_tiny]
    methods: [none, grd]
    ablations: [bank_size, both_weights]
    seeds: [0]
methods:
  slow: {terms: [{term: agd, weight: 1.0}], recipe: {optimizer: {lr: 1.0e-4}}}
ablations:
  bank_size: {title: bank size K, method: grd, keys: [recipe.bank.capacity], values: [4, 32]}
  both_weights: {method: grd, keys: [terms.agd.weight, terms.igd_edges_inter.weight], values: [0.5, 2]}
  balance: {method: grd, keys: [terms.agd.options.balanced], values: [false, true]}
  flip: {method: slow, keys: [recipe.augment.geometry.flip], values: [true, false]}
"""


@pytest.fixture
def more(raw):
    for section, entries in yaml.safe_load(MORE).items():
        raw.setdefault(section, {}).update(entries)
    return raw | {"study": "more"}


def weights(config, method):
    spec = config.run("nuclei_phantom", "resunet_tiny", method, 0)
    return {term.name: term.weight for term in spec.terms}


def test_methods_of_a_study_with_ablations_and_more_teachers(more):
    config = Config.parse(more)
    assert config.methods_of("nuclei_phantom") == [
        *("none", "grd", "grd@resunet_w32"),
        *("bank_size=4", "bank_size=32", "both_weights=0.5", "both_weights=2"),
    ]
    teachers = [run for run in config.runs() if run[2] == TEACHER]
    assert teachers == [
        ("nuclei_phantom", name, TEACHER, 0) for name in ("resunet_w16", "resunet_w32")
    ]
    assert config.teacher_of("nuclei_phantom", "grd@resunet_w32") == "resunet_w32"
    for method in ("none", "grd", "bank_size=4"):
        assert config.teacher_of("nuclei_phantom", method) == "resunet_w16"


def test_an_ablation_changes_what_it_names_and_nothing_else(more):
    config = Config.parse(more)
    base = config.run("nuclei_phantom", "resunet_tiny", "grd", 0)
    bank = config.run("nuclei_phantom", "resunet_tiny", "bank_size=4", 0)
    assert bank.recipe.bank.capacity == 4
    assert bank.recipe.bank.sample_size == base.recipe.bank.sample_size
    same = base.recipe.bank.model_copy(update={"capacity": 4})
    assert bank.recipe == base.recipe.model_copy(update={"bank": same})
    assert bank.terms == base.terms
    assert weights(config, "grd") == {
        "agd": 1.0,
        "agd_inter": 1.0,
        "igd_nodes": 0.1,
        "igd_edges_inter": 1.0,
    }
    assert weights(config, "both_weights=2") == {
        "agd": 2,
        "agd_inter": 1.0,
        "igd_nodes": 0.1,
        "igd_edges_inter": 2,
    }
    for value in (False, True):
        assert config.method(f"balance={str(value).lower()}").terms[0].options == {
            "balanced": value
        }
    still = config.run("nuclei_phantom", "resunet_tiny", "flip=false", 0)
    assert not still.recipe.augment.geometry.flip
    assert still.recipe.optimizer.lr == 1e-4
    assert config.method("grd@resunet_w32") == config.method("grd")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    {
        "recipe of a method": ("methods.slow.recipe", {"optimiser": {"lr": 1}}, "optimizer"),
        "name of a method": ("methods.a=b", [], '"="'),
        "base of an ablation": ("ablations.bank_size.method", "gdr", "grd"),
        "key of an ablation": (
            "ablations.bank_size.keys",
            ["bank.capacity"],
            "write weight, recipe.",
        ),
        "term of an ablation": (
            "ablations.balance.keys",
            ["terms.agdd.options.balanced"],
            "agd",
        ),
        "option of an ablation": (
            "ablations.balance.keys",
            ["terms.agd.options.balancd"],
            "balanced",
        ),
        "value of an ablation": ("ablations.bank_size.values", [0], "greater than or equal to 1"),
        "no value": ("ablations.bank_size.values", [], "ablations.bank_size.values"),
        "ablation of a study": ("studies.more.ablations", ["bank_sise"], "bank_size"),
        "another teacher": ("studies.more.more_teachers", ["resunet_w"], "resunet_w"),
    }.values(),
    ids=str,
)
def test_mistakes_in_ablations_are_one_line(more, path, value, words):
    section, _, key = path.rpartition(".")
    at(more, section)[key] = value
    with pytest.raises(ConfigError) as error:
        Config.parse(more)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
