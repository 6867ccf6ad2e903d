"""The configuration as frozen, typed objects. Torch-free: Snakemake parses it again for every job.

It is a catalogue (what exists) and studies (named selections of it: what to run), in the files of
`gdlib.config.parts`. A study may shrink a recipe but never changes what a name means. A run is
(dataset, network, method, seed); `Config.run` gathers all that its training needs, and nothing
else, so that an edit of the configuration re-runs exactly what depends on it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from gdlib import registry
from gdlib.config import parts
from gdlib.config.consistency import check_entries, check_study
from gdlib.config.mistakes import ConfigError, check_name, one_line, within
from gdlib.config.recipe import Recipe, Section, TermOptions
from gdlib.config.sections import (
    TEACHER,
    Ablation,
    Dataset,
    Method,
    Network,
    Plot,
    PlotMetrics,
    RunSpec,
    Segmenter,
    Study,
)
from gdlib.config.words import spelt_out
from gdlib.limits import Offsets, Place

SEGMENTERS = get_args(Segmenter)
ENSEMBLE = "ensemble"  # the model of a teacher that has members


def load(place: Path | str, *own: Path | str, changes: Mapping[str, Any] | None = None) -> "Config":
    """Read and check the configuration of a project.

    Args:
        place: folder of the project, or a file in place of its `config.yaml`.
        own: files that change it, the last one counts.
        changes: what counts more than all files.

    Raises:
        ConfigError: one line that says where the key is written that is wrong.
        ValueError: a file that is no YAML, or has a key twice, in one line too.
    """
    raw = parts.read(place, *own, changes=changes)
    try:
        return Config.parse(raw)
    except ConfigError as error:
        raise ConfigError(parts.located(str(error), [*parts.files(place), *own], changes)) from None


class Config(Section):
    """The whole of the configuration; every file may hold any part of it."""

    study: str = Field(description="the study that is run")
    only: tuple[str, ...] = Field(
        (), description="of the study's datasets these alone, a list or joined by commas"
    )
    raw_folders: tuple[Place, ...] = Field(
        ("raw",),
        min_length=1,
        description="where datasets are looked for, in this order; downloads go into the first",
    )
    download: bool = Field(
        False,
        description="fetch what the study lacks and may be downloaded; nothing is fetched unasked",
    )
    offsets: dict[str, Offsets] = Field({}, description="offsets that datasets can name")
    studies: dict[str, Study] = Field(description="what can be run")
    datasets: dict[str, Dataset] = Field(description="what there is to learn from")
    teachers: dict[str, Network] = Field(description="large networks")
    students: dict[str, Network] = Field(description="small networks")
    methods: dict[str, Method] = Field(
        description="how a student learns; `[]` is from labels alone"
    )
    ablations: dict[str, Ablation] = Field(
        {}, description="methods with one setting at several values"
    )
    recipes: dict[Literal["teacher", "student"], Recipe] = Field(description="how both are trained")
    plot: Plot = Field(Plot(), description="looks of tables and figures")

    _known: dict[tuple[str, str, str], Recipe] = PrivateAttr(default_factory=dict)

    @field_validator("only", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "Config":
        """Check everything that can be checked without running anything.

        Raises:
            ConfigError: one line that names the key and, for a wrong name, the nearest valid one.
        """
        try:
            config = cls.model_validate(spelt_out(raw))
            check_entries(config)
            check_name("study", config.study, config.studies)
            for name in config.only:
                check_name("only", name, config.studies[config.study].datasets)
            for name in config.studies:
                check_study(config, name)
        except ValidationError as error:
            raise ConfigError(one_line(error, cls)) from None
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"config: {error}") from None
        return config

    @property
    def selected(self) -> Study:
        """The study to run, with those of its datasets that are."""
        study = self.studies[self.study]
        chosen = tuple(name for name in study.datasets if name in self.only)
        return study.model_copy(update={"datasets": chosen}) if self.only else study

    @property
    def left_out(self) -> list[str]:
        """The datasets of the study that are not run."""
        return [
            name for name in self.studies[self.study].datasets if name not in self.selected.datasets
        ]

    def network(self, name: str) -> Network:
        """Return a teacher or student of the catalogue.

        Of several networks, the model is `ensemble`, and its options say what each of them is.
        """
        network = (self.teachers | self.students)[name]
        if not network.members:
            return network
        members = [
            {"model": one.model, "options": one.options}
            for one in (self.teachers[member] for member, _ in self.members(name))
        ]
        options = {**network.options, "members": members, "augment": network.augment}
        return network.model_copy(update={"model": ENSEMBLE, "options": options})

    def members(self, network: str) -> list[tuple[str, int]]:
        """Return name and seed of the members of an ensemble; nothing of any other network.

        One whose weights are given is there once.
        """
        chosen = (self.teachers | self.students)[network]
        found = []
        for member in chosen.members:
            once = self.teachers[member].weights is not None
            found += [(member, seed) for seed in chosen.member_seeds[: 1 if once else None]]
        return found

    def members_or_itself(self, network: str) -> tuple[str, ...]:
        """Return the names of networks that one is made of: of its members, or its own."""
        return (self.teachers | self.students)[network].members or (network,)

    def teacher_runs(self, dataset: str, teacher: str) -> list[tuple[str, str, str, int]]:
        """Return the runs of a teacher, the one that students learn from first."""
        seeds = self.selected.teacher_seeds
        seeds = seeds[:1] if self.members(teacher) else seeds
        return [(dataset, teacher, TEACHER, seed) for seed in seeds]

    def is_teacher(self, network: str) -> bool:
        """Is this the name of a teacher?"""
        return network in self.teachers

    def teachers_of(self, dataset: str) -> list[str]:
        """Return the teachers that the selected study uses on a dataset, the main one first."""
        main = self.fitting(self.selected.teachers, dataset)[0]
        more = self.fitting(self.selected.more_teachers, dataset)
        return list(dict.fromkeys([main, *more]))

    def teacher_of(self, dataset: str, method: str = TEACHER) -> str:
        """Return the teacher of a method on a dataset: the one it names, or the main one."""
        return method.partition("@")[2] or self.teachers_of(dataset)[0]

    def students_of(self, dataset: str) -> list[str]:
        """Return the students that the selected study trains on a dataset."""
        return self.fitting(self.selected.students, dataset)

    def fitting(self, networks: Iterable[str], dataset: str) -> list[str]:
        """Those of these networks that take images with as many axes as the dataset has."""
        return [n for n in networks if self.axes(n) in (None, self.datasets[dataset].ndim)]

    def axes(self, network: str) -> int | None:
        """Return the number of axes that a network takes, where its source text says it."""
        first = self.members_or_itself(network)[0]
        return registry.axes(self.network(first).model)

    def methods_of(self, dataset: str) -> list[str]:
        """Return all methods of the selected study on a dataset: by name, with its other teachers,
        and of its ablations.
        """
        study = self.selected
        other = self.teachers_of(dataset)[1:]
        more = [
            f"{m}@{teacher}"
            for teacher in other
            for m in study.methods
            if self.methods[m].terms or self.unlabelled_of(dataset, m) == "teacher"
        ]
        return [*study.methods, *more, *self.own_methods(study)[len(study.methods) :]]

    def own_methods(self, study: Study) -> list[str]:
        """The methods that a study names, and those of its ablations."""
        return [*study.methods, *(m for name in study.ablations for m in self.ablated(name))]

    def ablated(self, ablation: str) -> list[str]:
        """Return the names of the methods of an ablation, in the order of their values."""
        return [f"{ablation}={_text(value)}" for value in self.ablations[ablation].values]

    def method(self, name: str) -> Method:
        """Return a method: of the catalogue, with or without the teacher it names, or of an
        ablation.
        """
        name = name.partition("@")[0]
        ablation, is_one, text = name.partition("=")
        if not is_one:
            return self.methods[name]
        chosen = self.ablations[ablation]
        value = next(v for v in chosen.values if _text(v) == text)
        raw = self.methods[chosen.method].model_dump()
        for key in chosen.keys:
            _put(raw, key, value)
        return Method.model_validate(raw)

    def unlabelled_of(self, dataset: str, method: str) -> str | None:
        """Return whose instances a method sees in the unlabelled images of a dataset: of the
        `teacher`, or those `given` with them; None if it sees no such image.
        """
        if method == TEACHER or not self.datasets[dataset].unlabelled:
            return None
        chosen, recipe = self.method(method), self.recipe(self.study, dataset, "student")
        own = (recipe.changed(chosen.recipe) if chosen.recipe else recipe).unlabelled
        if own.share == 0:
            return None
        return own.labels if own.labels != "none" else "teacher" if chosen.terms else None

    def shown(self, dataset: str) -> PlotMetrics:
        """Return which metrics the report shows of a dataset."""
        return self.plot if self.datasets[dataset].ndim == 2 else self.plot.volumes

    def runs(self) -> list[tuple[str, str, str, int]]:
        """Return (dataset, network, method, seed) of every run of the selected study.

        Teachers first, members of ensembles after them.
        """
        study = self.selected
        out: list[tuple[str, str, str, int]] = []
        for dataset in study.datasets:
            beside = self.fitting(study.teachers_beside, dataset)
            teachers = dict.fromkeys([*self.teachers_of(dataset), *beside])
            found = [run for t in teachers for run in self.teacher_runs(dataset, t)]
            members = [one for t in teachers for one in self.members(t)]
            found += [(dataset, name, TEACHER, seed) for name, seed in members]
            out += dict.fromkeys(found)
            methods = self.methods_of(dataset)
            out += [
                (dataset, s, m, k)
                for s in self.students_of(dataset)
                for m in methods
                for k in study.seeds
            ]
        return out

    def recipe(self, study: str, dataset: str, role: str) -> Recipe:
        """Return a recipe with the changes of the dataset, of the study, and of the study for this
        dataset.
        """
        key = study, dataset, role
        if key not in self._known:  # every run asks
            *_, recipe = self.recipes_of(*key).values()
            patch = recipe.patch or self.datasets[dataset].patch
            self._known[key] = recipe.model_copy(update={"patch": patch})
        return self._known[key]

    def recipes_of(self, study: str, dataset: str, role: str) -> dict[str, Recipe]:
        """Return the recipe after each place of the configuration that has a say in it, by place.

        The last one counts.
        """
        chosen, recipe = self.studies[study], self.recipes[role]
        out = {f"recipes.{role}": recipe}
        for where, changes in (
            (f"datasets.{dataset}.recipe", self.datasets[dataset].recipe),
            (f"studies.{study}.recipe", chosen.recipe),
            (
                f"studies.{study}.{role}_recipe",
                chosen.teacher_recipe if role == TEACHER else chosen.student_recipe,
            ),
            (
                f"studies.{study}.recipes.{dataset}.{role}",
                chosen.recipes.get(dataset, {}).get(role, {}),
            ),
        ):
            if changes:
                with within(where):
                    recipe = out[where] = recipe.changed(changes)
        return out

    def run(self, dataset: str, network: str, method: str, seed: int) -> RunSpec:
        """Gather what one training of the selected study needs."""
        data, net = self.datasets[dataset], self.network(network)
        chosen = Method() if method == TEACHER else self.method(method)
        recipe = self.recipe(self.study, dataset, "teacher" if method == TEACHER else "student")
        recipe = recipe.changed(chosen.recipe) if chosen.recipe else recipe
        return RunSpec(
            dataset=dataset,
            network=network,
            method=method,
            seed=seed,
            model=net.model,
            options={**net.options, "in_channels": data.channels},
            channels=data.channels,
            offsets=data.offsets,
            normalisation=data.normalisation,
            targets=data.targets,
            segmenters=data.segmenters,
            recipe=recipe,
            terms=chosen.terms,
        )

    def raw_folder(self, dataset: str) -> Path | None:
        """Return where the files of a dataset are, or None for synthetic data.

        Raises:
            ConfigError: when the folder is in none of `raw_folders`, or empty.
        """
        folder = self.datasets[dataset].folder
        if folder is None:
            return None
        places = [Path(base) / folder for base in self.raw_folders]
        for place in places:
            if place.is_dir() and any(place.iterdir()):
                return place
        raise ConfigError(
            f'config: dataset "{dataset}" needs the folder {" or ".join(map(str, places))}, which '
            "does not exist or is empty; "
            f"{self.how_to_get(dataset)}, or add their place to raw_folders"
        )

    def new_folder(self, dataset: str) -> Path:
        """Return where the files of a dataset go that is not there."""
        return Path(self.raw_folders[0]) / (self.datasets[dataset].folder or "")

    def how_to_get(self, dataset: str) -> str:
        """Say how to get the files of a dataset that is not there, in half a sentence."""
        data, folder = self.datasets[dataset], str(self.new_folder(dataset))
        if data.by_hand:
            return data.by_hand.replace("{folder}", folder)
        if data.download:
            hosts = sorted({file.url.split("/")[2] for file in data.download})
            return f"`gdlib download {dataset}` fetches it from {' and '.join(hosts)} into {folder}"
        return f"put the files into {folder}"


def _text(value: Any) -> str:
    """A value as it is part of a method's name."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _put(method: dict[str, Any], key: str, value: Any) -> None:
    """Set one value of a method, `recipe.(key)` or `terms.(name).(key)`, in its plain form.

    `weight` multiplies all weights.
    """
    part, *path = key.split(".")
    if key == "weight":
        for term in method["terms"]:
            term["weight"] *= value
        return
    if part == "terms" and len(path) > 1:
        names = {TermOptions.model_validate(term).name: term for term in method["terms"]}
        check_name(f'key "{key}"', path[0], names)
        place, path = names[path[0]], path[1:]
    elif part == "recipe" and path:
        place = method["recipe"]
    else:
        raise registry.UnknownName(
            f'key "{key}": write weight, recipe.(key) or terms.(name of a term).(key)'
        )
    for step in path[:-1]:
        place = place.setdefault(step, {})
    place[path[-1]] = value
