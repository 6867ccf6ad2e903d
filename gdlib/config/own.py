"""A configuration for images of one's own, chosen from what is measured of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

NAME = "mycells"  # of the dataset and of the study
STUDENT = {2: "resunet_tiny", 3: "resunet3d_tiny"}
TEACHER = {2: "resunet_w8", 3: "resunet3d_w8"}  # what a laptop trains in minutes

# The catalogue's pairs of pixels for nuclei are 1, 3, 5, 9 and 27 pixels apart, of nuclei that are
# 27 to 29 pixels wide (median of BBBC039: 28.7): the neighbours, and these parts of an object.
PARTS = (3 / 27, 5 / 27, 9 / 27, 1)
# Its pairs for neurons: so many sections, and so many pixels within a section.
SECTIONS = (1, 2, 3, 4)
PARTS_3D = (3 / 27, 9 / 27, 1)
# The sides of the catalogue's patches: 128 for nuclei that are 28.7 pixels wide, 192 for worms that
# are 110 long, 256 for leaves of up to 150. So several objects are in a patch, and long ones whole.
WIDTHS, LENGTHS = 4.5, 1.7
SIDES = (32, 256)
SIDES_3D = (32, 160)
STEP = 16  # a side must be a multiple of it, for the five levels of a ResUNet
DEPTH = 12  # sections of a patch of the catalogue's volumes; even, for two levels along z


@dataclass(frozen=True)
class Measured:
    """What was found in images and labels.

    Attributes:
        images: number.
        objects: number in all of them.
        channels: of every image.
        smallest: least side of all images along each axis, ([z,] y, x) in pixels.
        largest: the same for the greatest side.
        width: median over objects of the diameter of a disc of their area; in volumes, of that of
            their largest section.
        length: 95th percentile over objects of the longer side of their box in y and x.
        depth: median over objects of their number of sections; 1 in images.
        unlabelled: number of images without labels.
    """

    images: int
    objects: int
    channels: int
    smallest: tuple[int, ...]
    largest: tuple[int, ...]
    width: float
    length: float
    depth: float = 1
    unlabelled: int = 0

    @property
    def ndim(self) -> int:
        """Number of axes, 2 or 3."""
        return len(self.smallest)

    def sentence(self) -> str:
        """Say what there is.

        >>> known = Measured(2, 40, 1, (64, 80), (64, 96), 12.3, 20)
        >>> print(known.sentence())  # doctest: +NORMALIZE_WHITESPACE
        2 images of 64 x 80 to 64 x 96 pixels (y, x), 1 channel; 40 objects with a median
        diameter of 12.3 pixels, 5 % longer than 20
        """
        kind = "volumes" if self.ndim == 3 else "images"
        sizes = dict.fromkeys(" x ".join(map(str, side)) for side in (self.smallest, self.largest))
        text = (
            f"{self.images} {kind} of {' to '.join(sizes)} pixels "
            f"({', '.join('zyx'[-self.ndim :])}), {self.channels} "
            f"channel{'s' * (self.channels > 1)}; "
            f"{self.objects} objects with a median diameter of {self.width:.1f} pixels, 5 % "
            f"longer than {self.length:.0f}"
        )
        text += f", half in more than {self.depth:.0f} sections" * (self.ndim == 3)
        return text + f"; {self.unlabelled} {kind} without labels" * bool(self.unlabelled)


def methods(found: Measured) -> tuple[str, str]:
    """Return the method of a student that learns from labels alone, and of one that learns from the
    teacher too: where there are images without labels, what it finds in these, by which outlines
    were measured to be better (docs/results.md). With volumes that was not tried.
    """
    return "none", "pseudo" if found.unlabelled and found.ndim == 2 else "grd"


class Choice(NamedTuple):
    """What suits the objects.

    Attributes:
        offsets: pairs of pixels that are compared, ([z,] y, x).
        patch: sides of what is cut from images for training.
        why: a sentence about each.
    """

    offsets: tuple[tuple[int, ...], ...]
    patch: tuple[int, ...]
    why: tuple[str, str]


def choose(found: Measured) -> Choice:
    """Choose offsets and patch from the sizes of objects and images.

    Raises:
        ValueError: an image is too small to learn from; the sentence begins with its size.
    """
    least, most = SIDES if found.ndim == 2 else SIDES_3D
    if min(found.smallest[-2:]) < least or (found.ndim == 3 and found.smallest[0] < 2):
        floor = f"{least} x {least}" if found.ndim == 2 else f"2 x {least} x {least}"
        raise ValueError(
            f"the smallest image has {' x '.join(map(str, found.smallest))} pixels, and networks "
            f"need {floor}; leave small images out, or join them"
        )
    wanted = max(WIDTHS * found.width, LENGTHS * found.length)
    side = min(max(STEP * round(wanted / STEP), least), most)
    patch = tuple(min(side, n // STEP * STEP) for n in found.smallest[-2:])
    parts = PARTS if found.ndim == 2 else PARTS_3D
    reach = min(patch) // 2  # farther pairs would be rare in a patch
    steps = sorted({1, *(min(max(1, round(part * found.width)), reach) for part in parts)})
    if found.ndim == 2:
        offsets = [offset for n in steps for offset in ((-n, 0), (0, -n))]
    else:
        depth = min(DEPTH, found.smallest[0] // 2 * 2)
        patch = (depth, *patch)
        # not beyond the object, nor the patch
        deep = [n for n in SECTIONS if n == 1 or n <= min(found.depth, depth - 1)]
        offsets = [(-1, 0, 0), (0, -1, 0), (0, 0, -1)]
        for place in range(1, max(len(deep), len(steps))):
            offsets += [(-n, 0, 0) for n in deep[place : place + 1]]
            offsets += [
                offset for n in steps[place : place + 1] for offset in ((0, -n, 0), (0, 0, -n))
            ]
    cut = ", but half a patch at most" if found.width > reach else ""
    return Choice(
        tuple(offsets),
        patch,
        (
            f"pairs of pixels {', '.join(map(str, steps))} apart: neighbours, and up to the "
            f"diameter of an object{cut}, as in the catalogue's nuclei",
            f"patches of {' x '.join(map(str, patch))} pixels: several objects in each, long ones "
            f"whole, if the images allow",
        ),
    )


class Steps(NamedTuple):
    """How long both networks are trained, in steps, and a sentence about why."""

    teacher: int
    student: int
    why: str


# Those of the tutorial, after which the end is seen soon; not the best networks. A step of a volume
# takes several times as long as one of an image.
STEPS = {
    ndim: Steps(steps, 500, "the steps are few, so that you see the end soon; more make it better")
    for ndim, steps in ((2, 1200), (3, 600))
}


def written(
    found: Measured,
    choice: Choice,
    steps: Steps | None = None,
    *,
    title: str,
    weights: str | None = None,
    model: tuple[str, dict] | None = None,
    regions: bool = False,
    level: int = 0,
) -> str:
    """Return the text of a configuration, to be read and edited.

    Args:
        found: what there is.
        choice: what suits it.
        steps: how long to train; `STEPS` if left out.
        title: what readers call the images.
        weights: of a teacher, if there is one.
        model: name and options of its network.
        regions: each connected region of a label is an object.
        level: resolution of OME-Zarr that is read.
    """
    text = json.dumps  # YAML that is right whatever is in a name

    def listed(values: Sequence) -> str:
        return text([list(v) if isinstance(v, tuple) else v for v in values])

    volumes, steps = found.ndim == 3, steps or STEPS[found.ndim]
    teacher = "given" if weights else TEACHER[found.ndim]
    batch = 2 if volumes else 4
    options = {"channels": found.channels} if found.channels > 1 else {}
    options |= {"label_regions": True} if regions else {}
    options |= {"level": level} if level else {}
    lines = [
        "# What `gdlib distill` found and chose. Edit it, and give the same command again: what",
        "# depends on the edit is made again, and nothing else. Every key is in "
        "docs/configuration.md",
        "# of the project, https://arxiv.org/abs/2401.06370 is the method.",
        f"# {found.sentence()}",
        f"study: {NAME}",
        "raw_folders: [raw] # beside this file: links to your images and labels",
        "datasets:",
        f"  {NAME}:",
        f"    title: {text(title)}",
    ]
    if volumes:
        lines += ["    like: neurites_phantom # targets, augmentation and metrics for volumes"]
    lines += [
        "    source: folder",
        f"    folder: {NAME}",
        f"    options: {text(options)} # more in gdlib/data/sources/folder.py",
    ]
    if found.unlabelled:
        lines += ["    unlabelled: true # from these the student of the teacher learns, too"]
    if found.channels > 1:
        lines += [f"    channels: {found.channels}"]
    lines += [
        f"    # {choice.why[0]}",
        f"    offsets: {listed(choice.offsets)}",
        f"    # {choice.why[1]}",
        f"    patch: {listed(choice.patch)}",
    ]
    if volumes:
        lines += ["    segmenters: [multicut]"]
    else:
        lines += ["    targets: {per_offset: true} # each distance counts alike"]
    if weights and model:
        network, own = model
        lines += [
            "teachers:",
            "  given: # used as it is, not trained",
            "    title: Given teacher",
            f"    model: {text(network)}",
            f"    options: {text(own)}",
            f"    weights: {text(weights)}",
        ]
    validate = [max(1, math.ceil(n / 4)) for n in (steps.teacher, steps.student)]
    lines += [
        "studies:",
        f"  {NAME}:",
        f"    title: {text(title)}",
        f"    datasets: [{NAME}]",
        f"    teacher: {teacher}",
        f"    students: [{STUDENT[found.ndim]}]",
        f"    methods: [{', '.join(methods(found))}] # from your labels, and from the teacher too",
        "    seeds: [0] # [0, 1, 2] tells whether a difference is more than chance",
        f"    # {steps.why}",
        "    teacher_recipe: "
        f"{{steps: {steps.teacher}, batch_size: {batch}, validate_every: {validate[0]}}}",
        "    student_recipe: "
        f"{{steps: {steps.student}, batch_size: {batch}, validate_every: {validate[1]}}}",
    ]
    return "\n".join(lines) + "\n"
