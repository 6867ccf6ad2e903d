"""Objects of volumes as they stand in space, beside what a segmentation makes of them."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy import ndimage

from gdlib import io
from gdlib.boxes import Box
from gdlib.config import TEACHER
from gdlib.evaluate.metrics import Overlaps
from gdlib.report.figures.pictures import pixel_size, scale_bar, show
from gdlib.report.figures.sections import counted, partners, voxel_size
from gdlib.report.figures.style import PAGE, STYLE, new_figure
from gdlib.report.figures.surfaces import Surface, render, surface, view
from gdlib.report.names import Titles, title

# The object itself, then what is joined to it, the largest first; the last colour is for all that
# follow.
COLOURS = (
    *("#3b76c4", "#e8853a", "#4da167", "#9b6bb3", "#d1495b", "#e3b23c"),
    *("#3fb5b5", "#8d6a4f", "#e07bb0", "#6f7d2c", "#565656"),
)
LACKING = "#cfcfcf"
JOINED = 0.1  # part of an object, or of a segment, that is more than an inaccurate border
RIM = 3  # voxels; an inaccurate border
CELLS = 240  # along the longest side of what is drawn, if voxels are small enough
WIDTH = 440  # of a drawing in pixels
TALLEST = 1.25  # height of a drawing over its width


def neurons(
    sample: io.Sample, segmentations: Mapping[str, np.ndarray], titles: Titles = None
) -> Figure:
    """Draw two objects in space, beside the segments that hold most of them.

    Args:
        sample: label (Z, Y, X); voxels are cubes if there is no attribute `voxel_size_nm`.
        segmentations: method to label (Z, Y, X), in the order of the columns.
        titles: of methods.

    Returns:
        The figure, one page wide. First row: the students' segment with most voxels of objects
        other than its first, and this first object; second row: of the ten largest other objects,
        the one whose segments fit best (mean IoU of the students). A segment has the colours of the
        objects it joins; grey is what it lacks of the object of its row. An object is joined, and
        drawn, if the segment holds more than a tenth of it, or if it is more than a tenth of the
        segment.
    """
    label, tables = counted(sample, segmentations)
    voxel = voxel_size(sample)
    boxes = ndimage.find_objects(label)
    judged = [tables[method] for method in segmentations if method != TEACHER] or list(
        tables.values()
    )
    chosen = _examples(judged)
    if not chosen:
        raise io.DataError(
            f'sample "{sample.id}" has no objects to draw; choose another with plot.panel_sample'
        )
    scenes = [
        _scene(neuron, label, segmentations, tables, boxes, voxel) for neuron in chosen.values()
    ]
    columns = 1 + len(segmentations)
    with mpl.rc_context(STYLE):
        side = (PAGE - 0.15) / columns - 0.04
        heights = [
            max(image.shape[0] / image.shape[1] for image in scene.images) for scene in scenes
        ]
        figure = new_figure(PAGE, side * sum(heights) + 0.2 + 0.2 * len(scenes))
        axes = figure.subplots(len(scenes), columns, squeeze=False, height_ratios=heights)
        names = ["ground truth", *(title(method, titles) for method in segmentations)]
        for line, reason, scene in zip(axes, chosen, scenes, strict=True):
            for axis, name, image, text in zip(line, names, scene.images, scene.texts, strict=True):
                show(axis, image, name if scene is scenes[0] else "")
                axis.add_collection(
                    LineCollection(scene.edges, colors="#c4c4c4", linewidths=0.5, zorder=-1)
                )
                axis.set_xlabel(text, labelpad=2)
            line[0].set_ylabel(reason, labelpad=3)
            scale_bar(
                line[0], scene.pixel if pixel_size(sample) else None, image.shape[:2], "black"
            )
    return figure


class Scene(NamedTuple):
    """One object, drawn in the same frame as it is and as every method has it."""

    images: list[np.ndarray]  # (rows, columns, 4)
    texts: list[str]
    edges: np.ndarray  # (12, 2, 2), the box around all that is drawn: x and y in pixels
    pixel: float  # side of a pixel in nm


def _scene(
    neuron: int,
    label: np.ndarray,
    segmentations: Mapping[str, np.ndarray],
    tables: Mapping[str, Overlaps],
    boxes: list[Box],
    voxel: tuple[float, ...],
) -> Scene:
    """Draw one object and, for every method, what is in the segment that holds most of it."""
    held = {method: _held(table, neuron) for method, table in tables.items()}
    weights: dict[int, int] = {}
    for _, joined, _ in held.values():
        for other, count in joined.items():
            weights[other] = weights.get(other, 0) + count
    order = [neuron, *sorted(weights, key=lambda other: -weights[other])]
    colours = {
        one: np.array(to_rgb(COLOURS[min(k, len(COLOURS) - 1)])) for k, one in enumerate(order)
    }
    union = [boxes[one - 1] for one in order]
    start = np.array([[b[k].start for k in range(3)] for b in union]).min(axis=0) * voxel
    stop = np.array([[b[k].stop for k in range(3)] for b in union]).max(axis=0) * voxel
    cell = max((stop - start).max() / CELLS, min(voxel) / 3)

    def part(one: int, mask: np.ndarray) -> Surface:
        found = surface(mask, voxel, cell)
        return found._replace(
            points=found.points + [s.start * v for s, v in zip(boxes[one - 1], voxel, strict=True)]
        )

    own = label[boxes[neuron - 1]] == neuron
    pieces = [[(part(neuron, own), colours[neuron])]]
    texts = [f"object {neuron}"]
    for method, (segment, joined, share) in held.items():
        drawn = []
        for one in (neuron, *joined):
            mask = label[boxes[one - 1]] == one
            inside = (
                mask & (segmentations[method][boxes[one - 1]] == segment)
                if segment
                else np.zeros_like(mask)
            )
            # What a segment lacks along membranes is no error to be seen: it takes in what is
            # within a few voxels.
            # a section is more than a border
            reach = [2 * RIM + 1 if v < 2 * min(voxel) else 1 for v in voxel]
            inside = ndimage.maximum_filter(inside, reach) & mask
            drawn.append((part(one, inside), colours[one]))
            if one == neuron and (mask & ~inside).any():
                drawn.append((part(one, mask & ~inside), np.array(to_rgb(LACKING))))
        pieces.append(drawn)
        more = f", with {len(joined)} other{'s' * (len(joined) > 1)}" if joined else ""
        texts.append(f"{100 * share:.0f} % of it{more}" if segment else "missed")

    # Some points: a square of those that are counted holds many.
    some = np.concatenate([s.points[::8] for drawn in pieces for s, _ in drawn])
    axes = max(
        (view(azimuth) for azimuth in range(15, 360, 30)),
        key=lambda a: _area(some @ a[:2].T, 4 * cell),
    )
    corners = np.array(list(itertools.product(*zip(start, stop, strict=True))))
    flat = corners @ axes[:2].T
    (left, bottom), (right, top) = flat.min(axis=0), flat.max(axis=0)
    margin = 0.02 * (right - left) + max(0, (top - bottom) / TALLEST - (right - left)) / 2
    # room for a scale bar
    frame = (left - margin, right + margin, bottom - 0.06 * (top - bottom), top + cell)
    pixel = (frame[1] - frame[0]) / WIDTH
    images = [render(drawn, axes, frame, pixel, cell) for drawn in pieces]
    ends = [
        (a, b)
        for a, b in itertools.combinations(range(8), 2)
        if (corners[a] != corners[b]).sum() == 1
    ]
    screen = (flat - [frame[0], frame[3]]) / [pixel, -pixel] - 0.5
    return Scene(images, texts, screen[np.array(ends)], pixel)


def _area(points: np.ndarray, side: float) -> int:
    """Count the squares of a side length that hold points (N, 2)."""
    return len(np.unique(np.floor(points / side).astype(np.int64) @ [1, 1_000_003]))


def _held(table: Overlaps, neuron: int) -> tuple[int, dict[int, int], float]:
    """Return the segment that holds most of an object, the other objects it joins with their
    voxels, and its share.
    """
    i, j, shared = table.pairs[:3]
    at = int(np.searchsorted(table.label_ids, neuron))
    segment = partners(table)[0][at]
    here = j == segment
    least = JOINED * np.minimum(table.label_sizes[i], shared[here].sum())
    joined = {
        int(table.label_ids[i[k]]): int(shared[k])
        for k in np.flatnonzero(here & (shared > least) & (i != at))
    }
    share = shared[here & (i == at)].sum() / table.label_sizes[at]
    return (
        int(table.segmentation_ids[segment]),
        dict(sorted(joined.items(), key=lambda item: -item[1])),
        float(share),
    )


def _examples(tables: list[Overlaps]) -> dict[str, int]:
    """Return the objects to show: why, and which."""
    worst, most, fit = 0, -1, {}
    for table in tables:
        i, j, shared, _, iou = table.pairs
        of_object, of_segment = partners(table)
        first = np.zeros(table.segmentation_ids.size, np.int64)
        np.maximum.at(first, j, shared)
        foreign = np.bincount(j, weights=shared, minlength=first.size) - first
        if table.objects[0] and foreign.max() > most:
            most, worst = foreign.max(), int(table.label_ids[of_segment[foreign.argmax()]])
        best = np.zeros(table.label_ids.size)
        mine = of_object[i] == j
        best[i[mine]] = iou[mine]
        for k in np.argsort(-table.label_sizes[1:], kind="stable")[:11] + 1:
            fit[int(table.label_ids[k])] = fit.get(int(table.label_ids[k]), 0) + best[k]
    worst = worst or next(iter(fit), 0)  # nothing was found at all
    others = [one for one in fit if one != worst][:10]
    return ({"worst merge": worst} if worst else {}) | (
        {"best of ten": max(others, key=fit.__getitem__)} if others else {}
    )
