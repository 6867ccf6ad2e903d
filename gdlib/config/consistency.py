"""What must be right between entries of a configuration, told as one line that names the place.

What an entry or a recipe can be asked by itself is in `gdlib.config.checks`.
"""

import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gdlib import registry
from gdlib.config.checks import check_metrics, check_patch, check_recipe, check_terms
from gdlib.config.mistakes import check_name, within
from gdlib.config.recipe import Recipe
from gdlib.config.sections import TEACHER, Method
from gdlib.segment.parameters import check_offsets, checked, is_masked

if TYPE_CHECKING:
    from gdlib.config.catalogue import Config


def check_entries(config: "Config") -> None:
    """Are there all things that an entry names, and do they go together?"""
    for check in (
        _check_keys,
        _check_datasets,
        _check_networks,
        _check_methods,
        _check_recipes,
        _check_plot,
    ):
        check(config)


def _check_keys(config: "Config") -> None:
    """Can each name be a part of the names of files?"""
    for group in ("studies", "datasets", "teachers", "students", "methods", "ablations"):
        for key in getattr(config, group):
            for name in config.ablated(key) if group == "ablations" else [key]:
                if not re.fullmatch(r"\w[^/{}\\\x00-\x1f]*", name):
                    raise registry.UnknownName(
                        f'{group}.{key}: the name "{name}" must begin with a letter or digit, '
                        'and cannot have "/", "\\", "{" or "}" in it'
                    )


def _check_datasets(config: "Config") -> None:
    """Are there the sources of datasets, and do their keys go together?"""
    for key, data in config.datasets.items():
        with within(f"datasets.{key}"):
            registry.SOURCES.check(data.source, data.options)
            for part in data.options.get("datasets", ()) if data.source == "joined" else ():
                check_name("options.datasets", part, config.datasets.keys() - {key})
            if data.download and (data.by_hand or not data.folder):
                raise registry.UnknownName(
                    "what is downloaded needs a `folder`, and is not got `by_hand`"
                )
            if len({file.name for file in data.download}) < len(data.download):
                raise registry.UnknownName("two files of `download` have the same name")
            if len(data.offsets[0]) != data.ndim:
                raise registry.UnknownName("offsets and patch must have the same number of axes")
            for segmenter, parameters in data.segmentation.items():
                with within(f"segmentation.{segmenter}"):
                    checked(segmenter, parameters)


def _check_networks(config: "Config") -> None:
    """Are there the models, and is each network one of both?"""
    for group, networks in (("teachers", config.teachers), ("students", config.students)):
        for key, network in networks.items():
            with within(f"{group}.{key}"):
                _check_members(config, network.members)
                network = config.network(key)
                registry.NETWORKS.check(network.model, network.options)
    for key, network in config.students.items():
        for word, given in (("weights", network.weights), ("members", network.members)):
            if given:
                raise registry.UnknownName(
                    f"students.{key}: a student is trained here; only a teacher can have `{word}`"
                )
    groups = {
        "a teacher": config.teachers, "a student": config.students, "a dataset": config.datasets,
    }  # fmt: skip
    for (one, names), (other, others) in itertools.combinations(groups.items(), 2):
        if clash := sorted(set(names) & set(others)):  # tables would show the title of one for both
            raise registry.UnknownName(f"{clash[0]} is both {one} and {other}: rename one")


def _check_members(config: "Config", members: Iterable[str]) -> None:
    """Can these networks be joined to one teacher?"""
    for name in members:
        check_name("members", name, config.teachers)
        network = config.teachers[name]
        if network.members:
            raise registry.UnknownName(f'members: "{name}" has members itself; name these')
        if any(registry.NETWORKS.written(network.model, "remainder") or ()):
            raise registry.UnknownName(
                f'members: "{name}" loses margins, and cannot be joined with others'
            )
    if len({config.axes(name) for name in members} - {None}) > 1:
        raise registry.UnknownName("members: some take images with 2 axes, and others with 3")


def _check_methods(config: "Config") -> None:
    """Are there the terms of methods and ablations?"""
    if TEACHER in config.methods:
        raise registry.UnknownName(
            f'methods: the name "{TEACHER}" is taken by the teacher\'s own training'
        )
    for key, method in config.methods.items():
        with within(f"methods.{key}"):
            if set(key) & set("=@"):
                raise registry.UnknownName('a name cannot have "=" or "@" in it')
        _check_method(config, f"methods.{key}", method)
    for key, ablation in config.ablations.items():
        check_name(f"ablations.{key}.method", ablation.method, config.methods)
        for name in config.ablated(key):
            with within(f"ablations.{key}"):
                method = config.method(name)
            _check_method(config, f"ablations.{key}", method)


def _check_recipes(config: "Config") -> None:
    """Are there both recipes, and do they fit with the changes of each dataset?"""
    for role in ("teacher", "student"):
        if role not in config.recipes:
            raise registry.UnknownName(f'the key "recipes.{role}" is missing')
        check_recipe(f"recipes.{role}", config.recipes[role])
        for key, data in config.datasets.items():
            with within(f"datasets.{key}.recipe"):
                recipe = config.recipes[role].changed(data.recipe)
            check_recipe(f"datasets.{key}.recipe", recipe)


def _check_plot(config: "Config") -> None:
    """Are there the metrics and methods that are shown?"""
    for where, shown in (("plot", config.plot), ("plot.volumes", config.plot.volumes)):
        check_metrics(f"{where}.metrics", shown.metrics)
        check_metrics(f"{where}.table_metrics", shown.table_metrics)
        if shown.main_metric not in shown.metrics:
            raise registry.UnknownName(
                f'{where}.main_metric: "{shown.main_metric}" is not among {where}.metrics'
            )
    for method in config.plot.panel_methods:
        check_name("plot.panel_methods", method, config.methods)


def _check_method(config: "Config", where: str, method: Method) -> None:
    with within(where):
        check_terms(method.terms)
    if method.recipe:
        with within(f"{where}.recipe"):
            recipe = config.recipes["student"].changed(method.recipe)
        check_recipe(f"{where}.recipe", recipe)


def check_study(config: "Config", name: str) -> None:
    """Is there all that a study names, and can it be trained on all its datasets?"""
    study = config.studies[name]
    for key, chosen, catalogue in (
        ("datasets", study.datasets, config.datasets),
        ("teacher", study.teachers, config.teachers),
        ("students", study.students, config.students),
        ("more_teachers", study.more_teachers, config.teachers),
        ("teachers_beside", study.teachers_beside, config.teachers),
        ("methods", study.methods, config.methods),
        ("ablations", study.ablations, config.ablations),
        ("recipes", study.recipes, config.datasets),
    ):
        for one in chosen:
            check_name(f"studies.{name}.{key}", one, catalogue)
    for dataset in study.datasets:
        axes = config.datasets[dataset].ndim
        for key, networks in (("teacher", study.teachers), ("students", study.students)):
            if networks and not config.fitting(networks, dataset):
                raise registry.UnknownName(
                    f"studies.{name}.{key}: none takes images with {axes} axes, as dataset "
                    f'"{dataset}" has; add one'
                )
        data = config.datasets[dataset]
        with within(f"datasets.{dataset}"):
            for segmenter in data.segmenters:
                check_offsets(segmenter, data.offsets)
        for role in ("teacher", "student"):
            recipes = config.recipes_of(name, dataset, role)
            for where, recipe in recipes.items():
                check_recipe(where, recipe, has_teacher=role != TEACHER)
            networks = [
                *config.fitting(study.teachers, dataset)[:1],
                *config.fitting(study.more_teachers, dataset),
                *config.fitting(study.teachers_beside, dataset) * (role == TEACHER),
            ]
            networks = [one for name in networks for one in config.members_or_itself(name)]
            if role == "student":  # a teacher that is asked online sees the patches too
                own = [config.method(method) for method in config.own_methods(study)]
                asked = any(
                    m.terms and m.recipe.get("teacher", recipe.teacher) == "online" for m in own
                )
                networks = config.fitting(study.students, dataset) + networks * asked
            used = {key: config.network(key) for key in networks}
            patches = {
                where: one.patch for where, one in recipes.items() if one.patch == recipe.patch
            }
            where, patch = (
                next(iter(patches.items())) if recipe.patch else (f"datasets.{dataset}", None)
            )
            check_patch(f"{where}.patch", patch or data.patch, dataset, data, used)
        with within(f"studies.{name}"):
            _check_unlabelled(config, config.own_methods(study), dataset, recipe)
        for method in config.own_methods(study):
            if "patch" in (changes := config.method(method).recipe):
                patch = recipe.changed(changes).patch or data.patch
                check_patch(f"methods.{method}.recipe.patch", patch, dataset, data, used)


def _check_unlabelled(
    config: "Config", methods: Iterable[str], dataset: str, recipe: Recipe
) -> None:
    """Can these methods learn from unlabelled images of a dataset as they want to?"""
    data = config.datasets[dataset]
    for name in methods:
        method = config.method(name)
        own = recipe.changed(method.recipe) if method.recipe else recipe
        said, labels = f'method "{name}" on dataset "{dataset}"', own.unlabelled.labels
        if labels != "none" and not data.unlabelled:
            raise ValueError(
                f"{said} learns from unlabelled images, of which there are none; name some in "
                f"`unlabelled` of the dataset, or leave the method out"
            )
        if (
            not data.unlabelled
            or not own.unlabelled.share
            or not (method.terms or labels != "none")
        ):
            continue
        if labels == "given" and method.terms:
            raise ValueError(
                f"{said} learns from given labels and from a teacher; make two methods of it"
            )
        if labels == "given" and data.unlabelled is not True:
            raise ValueError(
                f"{said} learns from labels that are given with unlabelled images, but those are "
                "training images without theirs; put images into `unlabelled/` and labels into "
                "`unlabelled_labels/` of a dataset of the source `folder`, with `unlabelled: true`"
            )
        if own.batch_size < 2:
            raise ValueError(
                f"{said} learns from labelled and unlabelled images, and a batch of 1 patch has no "
                "room for both; make batch_size 2 or more"
            )
        if own.unlabelled.sure != recipe.unlabelled.sure:
            raise ValueError(
                f"{said} has an `unlabelled.sure` of its own, but a teacher labels an image once "
                "for "
                "all methods; write it into the recipe of the study or dataset"
            )
        if all(map(is_masked, data.segmenters)):
            raise ValueError(
                f"{said} learns from what the teacher finds in unlabelled images, and all "
                "segmenters "
                "of the dataset need the true foreground; add `mutex_watershed`"
            )
