"""The configuration as frozen, typed objects. Torch-free: Snakemake parses it again for every job.

`config.yaml` is a catalogue (what exists) and studies (named selections of it: what to run). A study may shrink a recipe but
never changes what a name means. A run is (dataset, network, method, seed); `Config.run` gathers all that its training needs, and
nothing else, so that an edit of the configuration re-runs exactly what depends on it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from gdlib import registry

TEACHER = "teacher"  # the method name of every teacher run
SPLITS = ("train", "val", "test")


class ConfigError(ValueError):
    """A mistake in the configuration, in one readable line."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Normalisation(Section):
    """Intensities: these percentiles of each image and channel become 0 and 1."""

    lower: float = Field(1.0, ge=0, lt=100)
    upper: float = Field(99.8, gt=0, le=100)


class Segmentation(Section):
    """Fixed values for `gdlib.segmentation.segment` on test images, in place of those tuned on validation images."""

    foreground_threshold: float | None = Field(None, gt=0, lt=1)
    stride: int | None = Field(None, ge=1, description="of the grid of the mutex edges, in pixels")
    min_size: int | None = Field(None, ge=0, description="smaller objects are removed, in pixels")


class Dataset(Section):
    """One dataset of the catalogue."""

    title: str = Field("", description="name in tables and figures")
    source: str = Field(description="a file stem of gdlib/data/sources, or package.module:function")
    options: dict[str, Any] = {}
    folder: str | None = Field(None, description="below one of `raw_folders`; none for synthetic data")
    channels: int = Field(1, ge=1)
    offsets: tuple[tuple[int, ...], ...] = Field(
        min_length=1, description="of the affinities, in pixels; the first ndim are attractive"
    )
    patch: tuple[PositiveInt, ...] = Field(description="side lengths of training patches, in pixels")
    normalisation: Normalisation = Normalisation()
    segmentation: Segmentation = Segmentation()


class Network(Section):
    """A teacher or a student of the catalogue."""

    title: str = ""
    model: str = Field(description="a file stem of gdlib/models, or package.module:Class")
    options: dict[str, Any] = {}
    weights: str | None = Field(None, description="trained weights of your own; then it is not trained")


class Term(Section):
    """One weighted loss of a method."""

    term: str = Field(description="a file stem of gdlib/distill/terms, or package.module:Class")
    weight: float = Field(ge=0)
    memory: bool = Field(False, description="compare with other images through the memory bank")
    options: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Unique name within a method, for logs: term, scope, options."""
        parts = [self.term.rpartition(":")[2], *(str(v) for v in self.options.values() if isinstance(v, str))]
        return "_".join([*parts, "inter"] if self.memory else parts)


class Bank(Section):
    """Memory bank; see `gdlib.distill.bank.MemoryBank`."""

    capacity: int = Field(32, ge=1)
    sample_size: int = Field(12, ge=1)
    original_ring: bool = False


class Geometry(Section):
    """Geometric augmentation; see `gdlib.data.augment.sampling_grid`."""

    flip: bool = True
    rotate90: bool = True
    scale: tuple[float, float] = (0.8, 1.25)
    elastic: float = Field(2.0, ge=0)
    elastic_spacing: int = Field(32, ge=4)
    probability: float = Field(0.5, ge=0, le=1)


class Intensity(Section):
    """Intensity augmentation; see `gdlib.data.augment.augment_intensity`."""

    contrast: float = Field(0.3, ge=0)
    brightness: float = Field(0.1, ge=0)
    gamma: float = Field(0.5, ge=0)
    blur: float = Field(1.0, ge=0)
    noise: float = Field(0.05, ge=0)
    probability: float = Field(0.5, ge=0, le=1)


class Augment(Section):
    """Training augmentation."""

    geometry: Geometry = Geometry()
    intensity: Intensity = Intensity()


class Optimizer(Section):
    """Adam with or without decoupled weight decay."""

    name: Literal["adamw", "adam"] = "adamw"
    lr: float = Field(2e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(
        1e-8, gt=0, description="PAPER: the original trains with 0.01, which sets the scale of all its weights"
    )
    weight_decay: float = Field(1e-4, ge=0)
    amsgrad: bool = False


class Recipe(Section):
    """How a network is trained."""

    steps: int = Field(gt=0, description="optimizer steps")
    batch_size: int = Field(8, gt=0)
    accumulate: int = Field(1, ge=1, description="batches per optimizer step")
    patch: tuple[PositiveInt, ...] | None = Field(None, description="in pixels; the dataset's if left out")
    optimizer: Optimizer = Optimizer()
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; off if left out")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    validate_every: int = Field(gt=0, description="steps between validations")
    validate_images: int = Field(8, ge=1, description="images of the validation split used while training")
    save_every: int = Field(200, gt=0, description="steps between resumable states")
    selection: str = Field("aji", description="validation metric that chooses weights and segmentation parameters")
    terms: tuple[Term, ...] = (Term(term="supervised", weight=1.0), Term(term="foreground", weight=1.0))
    augment: Augment = Augment()
    bank: Bank = Bank()


class Study(Section):
    """A selection of the catalogue, and how large."""

    title: str = ""
    datasets: tuple[str, ...] = Field(min_length=1)
    teacher: str
    students: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    teacher_seeds: tuple[int, ...] = Field((0,), min_length=1, description="students learn from the first")
    teacher_recipe: dict[str, Any] = Field({}, description="changes to recipes: teacher")
    student_recipe: dict[str, Any] = Field({}, description="changes to recipes: student")


class Plot(Section):
    """Looks only: an edit here redraws figures and never retrains."""

    dpi: int = Field(200, gt=0)
    formats: tuple[Literal["png", "pdf", "svg"], ...] = ("png", "pdf")
    metrics: tuple[str, ...] = ("aji", "pq", "f1_50", "f1_80")
    main_metric: str = "aji"
    table_metrics: tuple[str, ...] = ("aji", "dice", "f1_50", "pq")
    panel_sample: int = Field(0, ge=0, description="which of the kept test images the image figures show")
    panel_methods: tuple[str, ...] = ("none", "grd")
    panel_crop: int | None = Field(None, gt=0, description="side of the shown crop, in pixels")


class RunSpec(Section):
    """All that one training needs to know; it travels as JSON and is kept in the header of the weights."""

    dataset: str
    network: str
    method: str
    seed: int
    model: str
    options: dict[str, Any]
    channels: int
    offsets: tuple[tuple[int, ...], ...]
    normalisation: Normalisation
    recipe: Recipe
    terms: tuple[Term, ...] = Field(description="of the method, on top of the recipe's")

    @property
    def all_terms(self) -> tuple[Term, ...]:
        """Supervision and distillation together."""
        return (*self.recipe.terms, *self.terms)

    @property
    def patch(self) -> tuple[int, ...]:
        """Side lengths of the training patches, in pixels."""
        assert self.recipe.patch is not None
        return self.recipe.patch


class Config(Section):
    """The whole of `config.yaml`."""

    study: str
    raw_folders: tuple[str, ...] = Field(("raw",), description="where datasets are looked for, in this order")
    studies: dict[str, Study]
    datasets: dict[str, Dataset]
    teachers: dict[str, Network]
    students: dict[str, Network]
    methods: dict[str, tuple[Term, ...]]
    recipes: dict[Literal["teacher", "student"], Recipe]
    plot: Plot = Plot()

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "Config":
        """Check everything that can be checked without running anything.

        Raises:
            ConfigError: one line that names the key and, for a wrong name, the nearest valid one.
        """
        try:
            config = cls.model_validate(raw)
            config._check_names()
            _check_name("study", config.study, config.studies)
            for name in config.studies:
                config._check_study(name)
        except ValidationError as error:
            raise ConfigError(_one_line(error, cls)) from None
        except registry.UnknownName as error:
            raise ConfigError(f"config: {error}") from None
        return config

    @property
    def selected(self) -> Study:
        """The study to run."""
        return self.studies[self.study]

    def network(self, name: str) -> Network:
        """Return a teacher or student of the catalogue."""
        return (self.teachers | self.students)[name]

    def is_teacher(self, network: str) -> bool:
        """Is this the name of a teacher?"""
        return network in self.teachers

    def runs(self) -> list[tuple[str, str, str, int]]:
        """Return (dataset, network, method, seed) of every run of the selected study; teachers first."""
        study = self.selected
        out: list[tuple[str, str, str, int]] = []
        for dataset in study.datasets:
            out += [(dataset, study.teacher, TEACHER, seed) for seed in study.teacher_seeds]
            out += [(dataset, s, m, seed) for s in study.students for m in study.methods for seed in study.seeds]
        return out

    def run(self, dataset: str, network: str, method: str, seed: int) -> RunSpec:
        """Gather what one training of the selected study needs."""
        study = self.selected
        data, net = self.datasets[dataset], self.network(network)
        changes = study.teacher_recipe if method == TEACHER else study.student_recipe
        recipe = _merge(self.recipes["teacher" if method == TEACHER else "student"], changes)
        if recipe.patch is None:
            recipe = recipe.model_copy(update={"patch": data.patch})
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
            recipe=recipe,
            terms=() if method == TEACHER else self.methods[method],
        )

    def raw_folder(self, dataset: str) -> Path | None:
        """Return where the files of a dataset are, or None for synthetic data.

        Raises:
            ConfigError: when the folder is in none of `raw_folders`.
        """
        folder = self.datasets[dataset].folder
        if folder is None:
            return None
        for base in self.raw_folders:
            if (Path(base) / folder).is_dir():
                return Path(base) / folder
        raise ConfigError(
            f'config: dataset "{dataset}" needs the folder {" or ".join(str(Path(b) / folder) for b in self.raw_folders)}, '
            "which does not exist; put the files there or add their place to raw_folders"
        )

    def _check_names(self) -> None:
        for key, data in self.datasets.items():
            with _within(f"datasets.{key}"):
                registry.SOURCES.check(data.source, data.options)
                if len({len(o) for o in data.offsets} | {len(data.patch)}) != 1:
                    raise registry.UnknownName("offsets and patch must have the same number of axes")
        for group, networks in (("teachers", self.teachers), ("students", self.students)):
            for key, network in networks.items():
                with _within(f"{group}.{key}"):
                    registry.NETWORKS.check(network.model, network.options)
        for key, network in self.students.items():
            if network.weights is not None:
                raise registry.UnknownName(
                    f"students.{key}: a student is trained here; only a teacher can have `weights`"
                )
        clash = set(self.teachers) & set(self.students)
        if clash:
            raise registry.UnknownName(f"{sorted(clash)[0]} is both a teacher and a student: rename one")
        if TEACHER in self.methods:
            raise registry.UnknownName(f'methods: the name "{TEACHER}" is taken by the teacher\'s own training')
        for key, terms in self.methods.items():
            with _within(f"methods.{key}"):
                _check_terms(terms)
        for role in ("teacher", "student"):
            if role not in self.recipes:
                raise registry.UnknownName(f'the key "recipes.{role}" is missing')
            _check_recipe(f"recipes.{role}", self.recipes[role])
        _check_metrics("plot.metrics", self.plot.metrics)
        _check_metrics("plot.table_metrics", self.plot.table_metrics)
        for method in self.plot.panel_methods:
            _check_name("plot.panel_methods", method, self.methods)
        if self.plot.main_metric not in self.plot.metrics:
            raise registry.UnknownName(f'plot.main_metric: "{self.plot.main_metric}" is not among plot.metrics')

    def _check_study(self, name: str) -> None:
        study = self.studies[name]
        for key, chosen, catalogue in (
            ("datasets", study.datasets, self.datasets),
            ("teacher", (study.teacher,), self.teachers),
            ("students", study.students, self.students),
            ("methods", study.methods, self.methods),
        ):
            for one in chosen:
                _check_name(f"studies.{name}.{key}", one, catalogue)
        for role, changes in (("teacher", study.teacher_recipe), ("student", study.student_recipe)):
            where = f"studies.{name}.{role}_recipe"
            with _within(where):
                recipe = _merge(self.recipes[role], changes)
            _check_recipe(where, recipe)
            if recipe.patch and any(len(self.datasets[d].patch) != len(recipe.patch) for d in study.datasets):
                raise registry.UnknownName(f"{where}.patch: it must have as many axes as the datasets")


class _within:
    """Prefix an error with the place in the configuration."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, registry.UnknownName):
            raise registry.UnknownName(f"{self.where}: {error}") from None
        if isinstance(error, ValidationError):
            raise ConfigError(_one_line(error, Recipe, self.where)) from None


def _check_name(where: str, name: str, valid: Iterable[str]) -> None:
    if name not in valid:
        raise registry.UnknownName(f'{where}: there is no "{name}": {registry.nearest(name, list(valid))}')


def _check_metrics(where: str, names: Iterable[str]) -> None:
    from gdlib.metrics import METRICS

    for name in names:
        _check_name(where, name, METRICS)


def _check_terms(terms: tuple[Term, ...]) -> None:
    for term in terms:
        registry.TERMS.check(term.term, term.options | ({"memory": True} if term.memory else {}))
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise registry.UnknownName(f"two terms of one method look the same: {', '.join(names)}")


def _check_recipe(where: str, recipe: Recipe) -> None:
    with _within(f"{where}.terms"):
        _check_terms(recipe.terms)
    _check_metrics(f"{where}.selection", [recipe.selection])


def _merge(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """Apply nested changes to a recipe and check the result."""

    def deep(base: Any, over: Any) -> Any:
        if isinstance(base, dict) and isinstance(over, dict):
            return base | {key: deep(base.get(key), value) for key, value in over.items()}
        return over

    return Recipe.model_validate(deep(recipe.model_dump(), changes))


def _one_line(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Turn one problem of a validation error into one line, with the nearest valid key for an unknown one."""
    # A misspelt key is also a missing one; what was written is the better hint.
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    place = [str(part) for part in problem["loc"]]
    where = ".".join(([prefix] if prefix else []) + place)
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(model, place[:-1])
        return f'config: there is no key "{where}": {registry.nearest(place[-1], valid)}'
    if problem["type"] == "missing":
        return f'config: the key "{where}" is missing'
    return f"config: {where}: {problem['msg'].lower()} (got {problem['input']!r})"


def _keys_at(model: Any, path: list[str]) -> list[str]:
    """Return the valid keys of the section at `path`, following fields, dict values and list items."""
    for part in path:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
        else:
            model = model.__args__[1] if model.__origin__ is dict else model.__args__[0]
    if hasattr(model, "__args__"):  # Optional[...]
        model = next((m for m in model.__args__ if isinstance(m, type) and issubclass(m, BaseModel)), model)
    return list(model.model_fields) if hasattr(model, "model_fields") else []
