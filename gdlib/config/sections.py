"""The sections of the configuration besides recipes as frozen, typed objects: every key, its
default and what it means. Torch-free.
"""

from typing import Annotated, Any, Literal

from pydantic import AllowInfNan, Field, PositiveInt, field_validator, model_validator

from gdlib.config.recipe import Entry, Names, Recipe, Section, TermOptions
from gdlib.limits import Offsets, Once, Place, Seed

TEACHER = "teacher"  # the method name of every teacher run
Segmenter = Literal["mutex_watershed", "waterz", "multicut", "mutex_watershed_masked"]
AnyFloat = Annotated[float, AllowInfNan()]  # where a range says more
Seeds = Annotated[tuple[Seed, ...], Once]


class Normalisation(Section):
    """Intensities: these percentiles of each image and channel become 0 and 1."""

    lower: float = Field(1.0, ge=0, lt=100, description="percentile that becomes 0")
    upper: float = Field(99.8, gt=0, le=100, description="percentile that becomes 1")
    noise: float = Field(
        0.1,
        gt=0,
        le=1,
        description="part of this range that noise alone may fill: without objects, an image is "
        "not stretched further; images as "
        "noisy as those of the training stay as they are; 1 for no limit, and so where "
        "`targets.background_connected` is off",
    )

    @model_validator(mode="after")
    def _rising(self) -> "Normalisation":
        if self.lower >= self.upper:
            raise ValueError(f"lower {self.lower:g} must be below upper {self.upper:g}")
        return self


class TargetsOptions(Section):
    """What networks learn from a label."""

    background_connected: bool = Field(
        True,
        description="two background pixels are one object; off for EM, where the background "
        "is membrane",
    )
    per_offset: bool = Field(
        False, description="balance connected and separated pairs of every offset alone"
    )
    border: int = Field(
        0,
        ge=0,
        description="pixels this near to another instance become background, in training alone",
    )


class RemoteFile(Section):
    """A file that may be downloaded freely; see `gdlib.data.download`."""

    url: str = Field(
        pattern=r"^https?://\S+/[^/?#]+$",
        description="official address; its end is the name of the file",
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="left out where nobody knows it; never made up"
    )
    into: str | None = Field(
        None,
        description="unpack this zip archive there, below the dataset's folder; `.` is that "
        "folder itself",
    )
    inside: str = Field(
        "", description="only what is below this folder of the archive, and without it"
    )

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition("/")[2]


class Dataset(Entry):
    """One dataset of the catalogue."""

    title: str = Field("", description="name in tables and figures")
    source: str = Field(description="a file stem of gdlib/data/sources, or package.module:function")
    options: dict[str, Any] = Field({}, description="keyword arguments of the source")
    folder: Place | None = Field(
        None, description="below one of `raw_folders`; none for synthetic data"
    )
    download: tuple[RemoteFile, ...] = Field(
        (), description="what together makes the content of the folder"
    )
    by_hand: str = Field(
        "",
        description="in place of `download`, how one gets the files and what of them goes into the "
        "folder, as half a sentence",
    )
    channels: int = Field(1, ge=1, description="of the images")
    offsets: Offsets = Field(
        min_length=1, description="of the affinities, in pixels; the first ndim are attractive"
    )
    patch: tuple[PositiveInt, ...] = Field(
        description="side lengths of training patches, in pixels"
    )
    normalisation: Normalisation = Field(Normalisation(), description="how intensities are scaled")
    targets: TargetsOptions = Field(
        TargetsOptions(), description="what networks learn from a label"
    )
    segmenters: Annotated[tuple[Segmenter, ...], Once] = Field(
        ("mutex_watershed",),
        min_length=1,
        description="how affinities become instances; the first chooses weights",
    )
    segmentation: dict[Segmenter, dict[str, int | AnyFloat]] = Field(
        {},
        description="fixed parameters of a segmenter on test images, in place of those tuned "
        "on validation images",
    )
    unlabelled: bool | Names = Field(
        False,
        description="images without labels that students may learn from; true: those of the source "
        "itself (`folder`: in `unlabelled/`), or training images whose labels are not looked at, "
        "by "
        "name, in which `*` stands for any characters",
    )
    recipe: dict[str, Any] = Field({}, description="changes to both recipes for this dataset")

    @field_validator("unlabelled", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        is_list = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        if not isinstance(value, bool) and not is_list:
            raise ValueError("must be true, or a list of names of images, each as text")
        return value

    @property
    def ndim(self) -> int:
        """Number of axes of its images."""
        return len(self.patch)


class Network(Entry):
    """A teacher or a student of the catalogue."""

    title: str = Field("", description="name in tables and figures")
    model: str = Field(
        "", description="a file stem of gdlib/models, or package.module:Class; or `members`"
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the model")
    weights: Place | None = Field(
        None,
        description="trained weights: a file, or the name of a network that comes with the "
        "package; then it is not trained",
    )
    members: Names = Field(
        (),
        description="in place of `model`, a teacher that is several: teachers that are trained "
        "first, and whose affinities and foreground are averaged",
    )
    member_seeds: Seeds = Field((0,), min_length=1, description="with which each is trained")
    augment: bool = Field(
        False, description="members see an image turned and mirrored, in all eight ways"
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> "Network":
        if bool(self.model) == bool(self.members):
            raise ValueError("must have either `model`, or `members`, which are teachers")
        if self.members and self.weights:
            raise ValueError("is made of its `members`, and cannot have `weights`")
        several = {"member_seeds", "augment"} & self.model_fields_set
        if several and not self.members:
            raise ValueError(f"{sorted(several)[0]} is of a teacher that has `members`; add them")
        return self


class Method(Section):
    """What is added to the supervised loss; a list of terms alone is short for it."""

    terms: tuple[TermOptions, ...] = Field(
        (), description="weighted losses, on top of the recipe's"
    )
    recipe: dict[str, Any] = Field({}, description="changes to the student's recipe")

    @model_validator(mode="before")
    @classmethod
    def _of_terms(cls, value: Any) -> Any:
        return {"terms": value} if isinstance(value, list | tuple) else value


class Ablation(Entry):
    """One setting of a method at several values.

    Each is a method of its own, named `ablation=value`.
    """

    title: str = Field("", description="name in tables and figures")
    method: str = Field(description="the method that is changed")
    keys: Names = Field(
        min_length=1,
        description="what gets the value: recipe.(key), or terms.(name of a term).(key); or "
        "`weight`: it multiplies all weights",
    )
    values: Annotated[tuple[bool | int | float | str, ...], Once] = Field(
        min_length=1, description="what it gets, one after the other"
    )


class Study(Entry):
    """A selection of the catalogue, and how large."""

    title: str = Field("", description="name in the report")
    datasets: Names = Field(min_length=1, description="what networks are trained and tested on")
    teacher: str | Names = Field(
        min_length=1, description="or several: a dataset takes the first for its number of axes"
    )
    students: Names = Field(description="a dataset takes those for its number of axes")
    methods: Names = Field(min_length=1, description="by which every student is trained")
    ablations: Names = Field((), description="their methods are run too")
    more_teachers: Names = Field(
        (),
        description="students learn from these too, by every method that asks a teacher: "
        "`method@teacher`",
    )
    teachers_beside: Names = Field(
        (), description="teachers that no student learns from, for the table alone"
    )
    seeds: Seeds = Field(min_length=1, description="of the students; each is a training of its own")
    teacher_seeds: Seeds = Field(
        (0,), min_length=1, description="of the teachers; students learn from the first"
    )
    recipe: dict[str, Any] = Field({}, description="changes to both recipes")
    teacher_recipe: dict[str, Any] = Field({}, description="changes to recipes: teacher")
    student_recipe: dict[str, Any] = Field({}, description="changes to recipes: student")
    recipes: dict[str, dict[Literal["teacher", "student"], dict[str, Any]]] = Field(
        {}, description="more changes, by dataset and role"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_cache(cls, value: Any) -> Any:
        if isinstance(value, dict) and "teacher_cache" in value:
            raise ValueError(
                "`teacher_cache` is no more: a teacher is asked once about every training image, "
                "and each step draws fresh "
                "patches; leave the key out"
            )
        return value

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teacher, or the teachers."""
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher


class PlotMetrics(Section):
    """Which metrics are shown."""

    metrics: Names = Field(("aji", "pq", "f1_50", "f1_80"), description="in figures")
    main_metric: str = Field(
        "aji", description="of differences, gaps and tests, and of accuracy against cost"
    )
    table_metrics: Names = Field(("aji", "dice", "f1_50", "pq"), description="in tables")


class PlotVolumes(PlotMetrics):
    """Which metrics are shown of datasets in 3D."""

    metrics: Names = Field(("voi", "voi_split", "voi_merge", "arand"), description="in figures")
    main_metric: str = Field(
        "voi", description="of differences, gaps and tests, and of accuracy against cost"
    )
    table_metrics: Names = Field(
        ("voi_split", "voi_merge", "voi", "arand"), description="in tables"
    )


class Plot(PlotMetrics):
    """Looks only: an edit here redraws figures and never retrains.

    Its own metrics are those of datasets in 2D.
    """

    dpi: int = Field(200, gt=0, description="pixels per inch of figures")
    formats: Annotated[tuple[Literal["png", "pdf", "svg"], ...], Once] = Field(
        ("png", "pdf"), min_length=1, description="of every figure; the report shows the first"
    )
    volumes: PlotVolumes = Field(PlotVolumes(), description="the same for datasets in 3D")
    panel_sample: int = Field(
        0, ge=0, description="which of the kept test images the image figures show"
    )
    panel_methods: Names = Field(
        ("none", "grd"), description="in figures of images, beside the teacher"
    )
    panel_crop: int | None = Field(None, gt=0, description="side of the shown crop, in pixels")


class RunSpec(Section):
    """All that one training needs to know.

    It travels as JSON and is kept in the header of the weights.
    """

    dataset: str
    network: str
    method: str
    seed: int
    model: str
    options: dict[str, Any]
    channels: int
    offsets: Offsets
    normalisation: Normalisation
    targets: TargetsOptions
    segmenters: tuple[Segmenter, ...]
    recipe: Recipe
    terms: tuple[TermOptions, ...] = Field(description="of the method, on top of the recipe's")

    @property
    def all_terms(self) -> tuple[TermOptions, ...]:
        """Supervision and distillation together."""
        return (*self.recipe.terms, *self.terms)

    @property
    def patch(self) -> tuple[int, ...]:
        """Side lengths of the training patches, in pixels."""
        assert self.recipe.patch is not None
        return self.recipe.patch

    @property
    def drawing(self) -> dict[str, Any]:
        """All that its training patches depend on besides the images: arguments of
        `gdlib.data.patches.PatchSampler`.
        """
        recipe = self.recipe.model_dump(mode="json", include={"patch", "batch_size", "augment"})
        normalisation = self.normalisation.model_dump(mode="json")
        if not self.targets.background_connected:
            recipe["augment"]["empty"], normalisation["noise"] = 0.0, 1.0  # no image is empty
        return {
            **recipe,
            "normalisation": normalisation,
            "border": self.targets.border,
            "share": self.recipe.unlabelled.share,
            "seed": self.seed,
        }
