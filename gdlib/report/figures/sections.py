"""Sections of volumes with segmentations and their mistakes."""

import colorsys
import textwrap
from collections.abc import Callable, Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from gdlib import io
from gdlib.boxes import Box
from gdlib.config import TEACHER
from gdlib.evaluate.metrics import METRICS, Overlaps, overlaps
from gdlib.report.figures.pictures import (
    STATUS,
    grey,
    outline,
    pixel_size,
    scale_bar,
    show,
    window,
)
from gdlib.report.figures.style import PAGE, STYLE, new_figure
from gdlib.report.names import Titles, title

MISTAKES = {  # 1, 2 and 3 in `mistakes`
    "split": "another segment holds more of the object",
    "merged": "the segment holds more of another object",
    "missed": "there is no segment",
}
SHADOW = [withStroke(linewidth=1.6, foreground="#00000090")]  # of white lines on bright images


def panel(
    sample: io.Sample,
    segmentations: Mapping[str, np.ndarray],
    key: str = "voi",
    titles: Titles = None,
    crop: int | None = None,
) -> Figure:
    """Draw a section and a cut across the sections, with segmentations and their mistakes.

    Args:
        sample: image (C, Z, Y, X) and label (Z, Y, X); voxels are cubes if there is no attribute
            `voxel_size_nm`.
        segmentations: method to label (Z, Y, X), in the order of the columns.
        key: metric to print below each, of the whole volume.
        titles: of methods.
        crop: side of the part of the section to show, in voxels; the whole section if left out.

    Returns:
        The figure, one page wide. Section, part and cut are those where the students differ most;
        the cut is half as deep as it is wide. A segment has the colour of the object that it holds
        most of, a paler one if another holds more of that.
    """
    label, tables = counted(sample, segmentations)
    students = [method for method in segmentations if method != TEACHER]

    def wrong(section: int) -> np.ndarray:
        return np.array(
            [mistakes(label[section], segmentations[m][section], tables[m]) > 0 for m in students]
        )

    section, box, row = _place(label, wrong if students else None, crop)
    z, y, x = voxel_size(sample)
    width = box[1].stop - box[1].start
    depth = min(max(round(width * x / z / 2), 1), len(label))
    start = min(max(section - depth // 2, 0), len(label) - depth)
    cut: Box = (slice(start, start + depth), box[1])
    views = {"xy": ((section,), box, y / x), "xz": ((slice(None), row), cut, z / x)}
    heights = [(b[0].stop - b[0].start) * aspect / width for _, b, aspect in views.values()]

    columns = 2 + len(segmentations)
    with mpl.rc_context(STYLE):
        side = (PAGE - 0.27) / columns - 0.04
        figure = new_figure(PAGE, 2 * sum(heights) * side + 0.48)
        axes = figure.subplots(4, columns, squeeze=False, height_ratios=heights * 2)
        colours = palette(int(label.max()))
        for k, (name, (plane, part, aspect)) in enumerate(views.items()):
            image, truth = grey(sample.image[(slice(None), *plane)])[part], label[plane][part]
            show(axes[k, 0], image, "" if k else "image", aspect)
            if not k:  # the cut has the same scale, both ways
                scale_bar(axes[k, 0], pixel_size(sample), image.shape[:2], effects=SHADOW)
            axes[k, 0].axhline(
                (section if k else row) - part[0].start,
                color="white",
                linewidth=0.7,
                linestyle=(0, (4, 3)),
                path_effects=SHADOW,
            )
            room = heights[k] * side > 0.5  # for words
            place = f"\nrow {row}" if k else f"\nsection {section}"
            axes[k, 0].set_ylabel(name + place * room, labelpad=3)
            show(axes[k, 1], _stain(image, truth, colours), "" if k else "ground truth", aspect)
            outline(axes[k, 1], truth, "white", 0.4)
            for column, (method, segmentation) in enumerate(segmentations.items(), start=2):
                found = segmentation[plane][part]
                coloured = _colours_of(tables[method], colours, segmentation.max())
                heading = "" if k else title(method, titles)
                show(axes[k, column], _stain(image, found, coloured), heading, aspect)
                outline(axes[k, column], found, "white", 0.4)
                axis, kind = axes[2 + k, column], mistakes(truth, found, tables[method])
                shown = 0.25 + 0.6 * image
                for value, mistake in enumerate(MISTAKES, start=1):
                    shown[kind == value] = 0.25 * image[kind == value] + 0.75 * np.array(
                        to_rgb(STATUS[mistake])
                    )
                show(axis, shown, "", aspect)
                outline(axis, truth, "white", 0.3)
                if column == 2:
                    beside = axis.annotate(
                        name + "\nmistakes" * room,
                        (0, 0.5),
                        (-3, 0),
                        "axes fraction",
                        "offset points",
                        rotation=90,
                        ha="right",
                        va="center",
                        ma="center",
                    )
                    beside.set_in_layout(False)  # there is room
                if k:
                    axis.set_xlabel(
                        f"{METRICS[key].title} {METRICS[key].compute(tables[method]):.3f}",
                        labelpad=3,
                    )
        for axis in axes[2:, :2].flat:
            axis.remove()
        free = figure.add_subplot(axes[0, 0].get_gridspec()[2:, :2])
        free.set_axis_off()
        texts = {
            mistake: textwrap.fill(f"{mistake}: {text}", 32) for mistake, text in MISTAKES.items()
        }
        handles = [Patch(color=STATUS[mistake], label=text) for mistake, text in texts.items()]
        free.legend(
            handles=handles, loc="center", handlelength=1.2, labelspacing=0.9
        ).set_in_layout(False)
    return figure


def voxel_size(sample: io.Sample) -> tuple[float, ...]:
    """Return the side lengths of a voxel (Z, Y, X) in nm, 1 if they are not known."""
    return tuple(map(float, sample.attrs.get("voxel_size_nm", (1, 1, 1))))


def counted(
    sample: io.Sample, segmentations: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, Overlaps]]:
    """Return the label without what is ignored, and how every segmentation overlaps with it."""
    label = sample.label if sample.ignore is None else np.where(sample.ignore, 0, sample.label)
    return label, {
        method: overlaps(sample.label, found, sample.ignore)
        for method, found in segmentations.items()
    }


def mistakes(label: np.ndarray, segmentation: np.ndarray, table: Overlaps) -> np.ndarray:
    """Say of every voxel of an object whether it is with its own.

    An object and a segment belong to each other if each holds most of the other.

    Args:
        label: part of a ground truth, any shape, 0 = does not count.
        segmentation: same part of a segmentation.
        table: of the whole volume, which says what holds most of what.

    Returns:
        uint8 of the same shape: 2 (merged) where the segment holds more of another object; else 1
        (split) where another segment holds more of the object; 3 (missed) where there is no
        segment; else 0.
    """
    of_object, of_segment = partners(table)
    i, j = _positions(table.label_ids, label), _positions(table.segmentation_ids, segmentation)
    out = np.where(of_segment[j] != i, 2, of_object[i] != j).astype(np.uint8)
    out[j == 0] = 3
    out[i == 0] = 0
    return out


def palette(count: int) -> np.ndarray:
    """Return (count + 1, 3): a colour for each id, neighbours far apart; background black."""
    tones = ((0.75, 1.0), (0.5, 1.0), (0.85, 0.8))
    return np.array(
        [(0, 0, 0), *(colorsys.hsv_to_rgb(0.618034 * k % 1, *tones[k % 3]) for k in range(count))]
    )


def _place(
    label: np.ndarray, wrong: Callable[[int], np.ndarray] | None, crop: int | None
) -> tuple[int, Box, int]:
    """Return the section, the part of it and the row where students differ; if they do not, err.

    Or else, objects are.
    """

    def interest(section: int) -> list[np.ndarray]:
        masks = None if wrong is None else wrong(section)
        judged = [] if masks is None else [np.std(masks, axis=0), np.mean(masks, axis=0)]
        return [*judged, label[section] > 0]

    totals = np.array([[one.sum() for one in interest(section)] for section in range(len(label))])
    choice = next((k for k in range(totals.shape[1]) if totals[:, k].any()), 0)
    section = int(totals[:, choice].argmax())
    chosen = interest(section)[choice]
    box = window(chosen, crop)
    return section, box, box[0].start + int(chosen[box].sum(axis=1).argmax())


def partners(table: Overlaps) -> tuple[np.ndarray, np.ndarray]:
    """Return for every object the segment that holds most of it, and the converse, as positions.

    0 = none.
    """
    i, j, shared = table.pairs[:3]
    order = np.argsort(shared, kind="stable")  # of several values for one place, the last stays
    of_object, of_segment = (
        np.zeros(table.label_ids.size, np.int64),
        np.zeros(table.segmentation_ids.size, np.int64),
    )
    of_object[i[order]] = j[order]
    of_segment[j[order]] = i[order]
    return of_object, of_segment


def _positions(ids: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the position of every id of a part in the sorted `ids`.

    Of those that are not there, 0.
    """
    places = np.zeros(max(int(ids[-1]), int(part.max(initial=0))) + 1, np.int64)
    places[ids] = np.arange(ids.size)
    return places[part]


def _colours_of(table: Overlaps, colours: np.ndarray, highest: int) -> np.ndarray:
    """Return (highest + 1, 3): every segment in the colour of its object, paler if it is not the
    object's first.
    """
    of_object, of_segment = partners(table)
    own = colours[table.label_ids[of_segment].astype(int)]
    own[of_segment == 0] = 0.6  # in no object
    second = of_object[of_segment] != np.arange(of_segment.size)
    own[second] = 0.45 * own[second] + 0.55
    out = np.full((int(highest) + 1, 3), 0.6)
    out[table.segmentation_ids] = own
    return out


def _stain(image: np.ndarray, label: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Colour the objects of an image (Y, X, 3)."""
    return np.where((label > 0)[..., None], 0.5 * image + 0.5 * colours[label], image)
