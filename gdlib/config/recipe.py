"""How a network is trained, as frozen, typed objects: every key, its default and what it means.

Torch-free. What all sections of the configuration have in common is here too.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gdlib.limits import FromTo, NotAll, Once
from gdlib.text import updated

Names = Annotated[tuple[str, ...], Once]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, numbers are finite, values never
    change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, and true would count as 1."""
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {kind, *get_args(kind)} & {int, float}:
            raise ValueError("must be a number, not true or false")
        return value


class Entry(Section):
    """A part of the configuration that has a name of its own."""

    like: str | None = Field(
        None,
        exclude=True,
        description="another one of the same kind, of which this one has all keys that it does not "
        "change; options of another "
        "source or model, and downloads of another folder, are not taken over",
    )

    @model_validator(mode="after")
    def _spelt_out(self) -> "Entry":
        if self.like is not None:  # gdlib.config.words takes it out where it may be
            raise ValueError(
                "`like` belongs into an entry with a name of its own, and names one "
                "of the same kind"
            )
        return self


class TermOptions(Section):
    """One weighted loss of a method."""

    term: str = Field(description="a file stem of gdlib/distill/terms, or package.module:Class")
    weight: float = Field(ge=0, description="factor in the sum of all terms")
    memory: bool = Field(False, description="compare with other images through the memory bank")
    level: str | Names | None = Field(
        None,
        description="feature map that is compared, by its name in both networks, or several names, "
        "the first that both have; "
        "else the embedding",
    )
    options: dict[str, Any] = Field({}, description="keyword arguments of the term")

    @property
    def name(self) -> str:
        """Unique name within a method, for logs: term, scope, options."""
        parts = [
            self.term.rpartition(":")[2],
            *(str(v) for v in self.options.values() if isinstance(v, str)),
        ]
        parts += (
            [self.level if isinstance(self.level, str) else self.level[0]] if self.level else []
        )
        return "_".join([*parts, "inter"] if self.memory else parts)


class Bank(Section):
    """Memory bank; see `gdlib.distill.bank.MemoryBank`."""

    capacity: int = Field(32, ge=1, description="images that are remembered, the paper's K")
    sample_size: int = Field(
        12, ge=1, description="images of them that are compared per step, the paper's L"
    )
    original_ring: bool = Field(False, description="PAPER: order and sampling of the original code")


class Unlabelled(Section):
    """What students learn from the unlabelled images of a dataset."""

    share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="of the patches of a batch, rounded, but at least one patch of each kind, that "
        "is of such images: for methods that learn from a teacher, or from `labels`; 0 for none",
    )
    labels: Literal["none", "teacher", "given"] = Field(
        "none",
        description="whose instances the losses of labels learn there. none: nobody's, and only "
        "what compares with a teacher acts there; teacher: those that the teacher finds and is "
        "sure "
        "of; given: those in `unlabelled_labels`, of any program",
    )
    sure: float = Field(
        0.75,
        ge=0.5,
        lt=1,
        description="where the teacher gives foreground, background or the border of two instances "
        "less probability than this, what it found is ignored; for all methods alike",
    )


class Geometry(Section):
    """Geometric augmentation; see `gdlib.data.augment.sampling_grid`."""

    flip: bool = Field(True, description="mirror each axis with probability 1/2")
    rotate90: bool = Field(
        True, description="turn by a multiple of 90 degrees in the last two axes"
    )
    scale: FromTo = Field((0.8, 1.25), description="range of the zoom factor in the last two axes")
    elastic: float = Field(
        2.0, ge=0, description="standard deviation, in pixels, of a smooth random displacement"
    )
    elastic_spacing: int = Field(32, ge=4, description="pixels between its control points")
    rotate: float = Field(
        0.0, ge=0, description="largest angle, in degrees, of a turn in the last two axes"
    )
    misalign: float = Field(
        0.0,
        ge=0,
        description="largest displacement, in pixels, of one section or of all from one "
        "on; volumes only",
    )
    probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="that a patch gets zoom, turn, displacement and, on its own, "
        "misalignment at all",
    )


class Intensity(Section):
    """Intensity augmentation; see `gdlib.data.augment.augment_intensity`."""

    contrast: float = Field(0.3, ge=0, le=1, description="factor from [1 - contrast, 1 + contrast]")
    brightness: float = Field(
        0.1, ge=0, description="shift from [-brightness, brightness]; intensities are about 0 to 1"
    )
    gamma: float = Field(0.5, ge=0, description="exponent from [2^-gamma, 2^gamma]")
    blur: float = Field(
        1.0,
        ge=0,
        description="largest standard deviation, in pixels, of a blur in the last two axes",
    )
    noise: float = Field(0.05, ge=0, description="largest standard deviation of Gaussian noise")
    invert: float = Field(
        0.0, ge=0, le=1, description="probability that dark becomes bright and bright dark"
    )
    probability: float = Field(0.5, ge=0, le=1, description="of each other change")


class Sections(Section):
    """Augmentation of the sections of a volume; see `gdlib.data.augment.augment_sections`."""

    contrast: float = Field(
        0.0, ge=0, le=1, description="factor from [1 - contrast, 1 + contrast], for every section"
    )
    brightness: float = Field(
        0.0, ge=0, description="shift from [-brightness, brightness], for every section"
    )
    blur: float = Field(0.0, ge=0, description="largest standard deviation, in pixels, of a blur")
    motion: int = Field(
        0, ge=0, description="longest motion blur, in pixels; below 2 there is none"
    )
    missing: float = Field(
        0.0, ge=0, le=1, description="probability that a section becomes one grey"
    )
    probability: float = Field(
        0.1, ge=0, le=1, description="that a section is blurred, and that it is motion-blurred"
    )


class Augment(Section):
    """Training augmentation."""

    geometry: Geometry = Field(Geometry(), description="where pixels come from")
    intensity: Intensity = Field(Intensity(), description="of whole patches")
    empty: float = Field(
        0.02,
        ge=0,
        le=1,
        description="probability that a patch shows noise and no object, as empty fields do; 0 "
        "where "
        "`targets.background_connected` is off",
    )
    sections: Sections = Field(Sections(), description="of each section of a volume")


class Optimizer(Section):
    """Adam with or without decoupled weight decay."""

    name: Literal["adamw", "adam"] = Field(
        "adamw", description="weight decay apart from the gradient, or within it"
    )
    lr: float = Field(2e-3, gt=0, description="learning rate after the warm-up")
    betas: tuple[NotAll, NotAll] = Field((0.9, 0.999), description="decay of the running means")
    eps: float = Field(
        1e-8,
        gt=0,
        description="PAPER: the original trains with 0.01, which sets the scale of all its weights",
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="per step, times the learning rate with adamw"
    )
    amsgrad: bool = Field(False, description="keep the largest running mean of squares")


class Recipe(Entry):
    """How a network is trained."""

    steps: int = Field(gt=0, description="optimizer steps")
    batch_size: int = Field(8, gt=0, description="patches")
    accumulate: int = Field(1, ge=1, description="batches per optimizer step")
    patch: tuple[PositiveInt, ...] | None = Field(
        None, description="in pixels; the dataset's if left out"
    )
    optimizer: Optimizer = Field(Optimizer(), description="how gradients become steps")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="of the learning rate after the warm-up; cosine falls to 0"
    )
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the averaged weights; off if left out"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of the arithmetic; auto: bfloat16 where the hardware is faster in it, else "
        "float32, or float16 on a GPU",
    )
    compile: bool = Field(
        False,
        description="let torch.compile fuse the networks: about a minute before the first step, "
        "for long trainings on GPUs",
    )
    teacher: Literal["maps", "online"] = Field(
        "maps",
        description="how students learn what it says. maps: it is asked once about every whole "
        "training image, for all students, "
        "and patches are cut from that; online: about every patch of every step, as in the paper",
    )
    validate_every: int = Field(gt=0, description="steps between validations")
    validate_images: int = Field(
        8, ge=1, description="images of the validation split used while training"
    )
    save_every: int = Field(200, gt=0, description="steps between resumable states")
    selection: str = Field(
        "aji", description="validation metric that chooses weights and segmentation parameters"
    )
    terms: tuple[TermOptions, ...] = Field(
        (TermOptions(term="supervised", weight=1.0), TermOptions(term="foreground", weight=1.0)),
        description="what is learned from the ground truth; methods add theirs",
    )
    augment: Augment = Field(Augment(), description="random changes of the training patches")
    bank: Bank = Field(Bank(), description="memory of other images, for terms with `memory`")
    unlabelled: Unlabelled = Field(
        Unlabelled(), description="of students, on datasets that have `unlabelled` images"
    )

    def changed(self, changes: dict[str, Any]) -> "Recipe":
        """Return it with nested changes, checked."""
        return Recipe.model_validate(updated(self.model_dump(), changes))
