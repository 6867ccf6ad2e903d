"""Figures of images: segmentations with their errors, and embeddings as colours (of volumes
too).
"""

import colorsys
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from scipy import linalg, ndimage

from gdlib import io
from gdlib.boxes import Box
from gdlib.config import TEACHER
from gdlib.evaluate.metrics import METRICS, errors, evaluate, overlaps
from gdlib.report.figures.style import PAGE, STYLE, new_figure
from gdlib.report.names import Titles, title

# Bright, for dark images; they differ in lightness too, for readers who see fewer hues. Drawn in
# this order.
STATUS = {
    "correct": "#e6e6e6",
    "spurious": "#ffe119",
    "split": "#ff6fe0",
    "merged": "#1fb4ff",
    "missed": "#ff5a1f",
}
DASHES = (0, (2, 1))


def panel(
    sample: io.Sample,
    segmentations: Mapping[str, np.ndarray],
    key: str = "aji",
    titles: Titles = None,
    crop: int | None = None,
) -> Figure:
    """Draw image, ground truth and segmentations with their errors.

    Args:
        sample: image (C, Y, X) and label (Y, X); for volumes see `gdlib.report.figures.sections`.
        segmentations: method to label (Y, X), in the order of the panels.
        key: metric to print below each, of the whole image even where only a part is shown.
        titles: of methods.
        crop: side of the part to show, in pixels, where the students differ most; the whole image
            if left out.

    Returns:
        The figure, one page wide.
    """
    status = {
        m: _status(sample.label, segmentation, sample.ignore)
        for m, segmentation in segmentations.items()
    }
    wrong = [
        _wrong(sample.label, segmentations[m], status[m]) for m in segmentations if m != TEACHER
    ]
    # Where students differ; if they do not, where they err; if they do not either, where the
    # objects are.
    choices = [np.std(wrong, axis=0), np.mean(wrong, axis=0)] if wrong else []
    box = window(next((choice for choice in choices if choice.any()), sample.label > 0), crop)
    image, label = grey(sample.image)[box], sample.label[box]
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(2 + len(segmentations), label.shape, below=0.16)
        _show_sample(axes, sample, (), box)
        for axis, (method, segmentation) in zip(axes[2:], segmentations.items(), strict=True):
            show(axis, 0.75 * image, title(method, titles))
            axis.set_xlabel(
                f"{METRICS[key].title} "
                f"{evaluate(sample.label, segmentation, sample.ignore)[key]:.3f}",
                labelpad=3,
            )
            for name, colour in STATUS.items():
                source = label if name == "missed" else segmentation[box]
                shown = np.where(np.isin(source, status[method][name]), source, 0)
                if name != "correct":
                    tint = np.zeros((*shown.shape, 4))
                    tint[shown > 0] = (*to_rgb(colour), 0.3)
                    axis.imshow(tint, interpolation="nearest")
                outline(
                    axis,
                    shown,
                    colour,
                    0.5 if name == "correct" else 1.1,
                    DASHES if name == "missed" else "solid",
                )
        handles = []
        for name, colour in STATUS.items():
            # near-white lines need to be seen on paper
            look = (1.0, "#9a9a9a") if name == "correct" else (2.2, colour)
            line = DASHES if name == "missed" else "-"
            handles.append(
                Line2D([], [], linewidth=look[0], color=look[1], linestyle=line, label=name)
            )
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            handlelength=1.8,
            columnspacing=1.6,
        )
    return figure


def embeddings(
    sample: io.Sample,
    vectors: Mapping[str, np.ndarray],
    titles: Titles = None,
    crop: int | None = None,
) -> Figure:
    """Draw image, ground truth and embeddings as colours.

    Args:
        sample: image (C, [Z,] Y, X) and label ([Z,] Y, X); of a volume, the slice with most
            foreground is shown.
        vectors: method to embedding (D, [Z,] Y, X), in the order of the panels; colours are aligned
            to the first.
        titles: of methods.
        crop: side of the part to show, in pixels, where objects are most crowded; the whole image
            if left out.

    Returns:
        The figure, one page wide.
    """
    for method, vector in vectors.items():
        if vector.shape[1:] != sample.label.shape:
            raise io.DataError(
                f'the embedding of "{method}" has shape {vector.shape}, the image '
                f"{sample.label.shape}; predict again"
            )
    plane = _plane(sample.label)
    colours = embedding_colours(
        {method: vector[(slice(None), *plane)] for method, vector in vectors.items()}
    )
    label = sample.label[plane]
    touching = (ndimage.maximum_filter(label, 3) != label) & (label > 0)
    box = window(touching if touching.any() else label > 0, crop)
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(2 + len(vectors), label[box].shape)
        _show_sample(axes, sample, plane, box)
        for axis, (method, rgb) in zip(axes[2:], colours.items(), strict=True):
            show(axis, rgb[box], title(method, titles))
    return figure


def embedding_colours(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turn embeddings into colours that can be compared.

    Vectors get unit length, as the affinities see them. The first three principal components of
    each network, with unit variance, are rotated onto those of the first network (orthogonal
    Procrustes over all pixels) and become red, green, blue between their 1st and 99th percentiles.

    Args:
        vectors: name to embedding (D, [Z,] Y, X); all of the same image, D may differ.

    Returns:
        Name to ([Z,] Y, X, 3) in [0, 1].
    """
    reference, out = None, {}
    for name, vector in vectors.items():
        rows = vector.reshape(len(vector), -1).T.astype(np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        rows -= rows.mean(axis=0)
        variances, axes = np.linalg.eigh(rows.T @ rows / len(rows))
        axes, variances = axes[:, ::-1][:, :3], variances[::-1][:3]
        # eigenvectors have no sign
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
        scores = np.zeros((len(rows), 3))
        # A component without variance (D < 3, dead channels) stays 0 instead of showing amplified
        # rounding.
        scores[:, : len(variances)] = (
            rows @ axes * np.where(variances > 1e-10, 1 / np.sqrt(np.maximum(variances, 1e-10)), 0)
        )
        if reference is None:
            reference = scores
        else:
            scores = scores @ linalg.orthogonal_procrustes(scores, reference)[0]
        low, high = np.percentile(scores, (1, 99), axis=0)
        rgb = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
        out[name] = rgb.reshape(*vector.shape[1:], 3)
    return out


def window(interest: np.ndarray, side: int | None) -> Box:
    """Return a square of a plane, centred on where `interest` (Y, X) is densest, moved inside.

    All of it without `side`.
    """
    if side is None:
        return tuple(slice(0, n) for n in interest.shape)
    density = ndimage.gaussian_filter(interest.astype(float), side / 4, mode="constant")
    centre = np.unravel_index(density.argmax(), density.shape)
    starts = [
        min(max(int(c) - side // 2, 0), max(n - side, 0))
        for c, n in zip(centre, interest.shape, strict=True)
    ]
    return tuple(slice(s, min(s + side, n)) for s, n in zip(starts, interest.shape, strict=True))


def instance_colours(label: np.ndarray) -> np.ndarray:
    """Return (Y, X, 3): every object in a colour of its own, background black."""
    ids, places = np.unique(label, return_inverse=True)
    # Hues in steps of the golden ratio: neighbours in the list of ids are far apart.
    table = [
        (0, 0, 0) if i == 0 else colorsys.hsv_to_rgb(0.618034 * k % 1, 0.75, 1.0)
        for k, i in enumerate(ids.tolist())
    ]
    return np.array(table)[places.reshape(label.shape)]


def outline(
    axis: Axes, label: np.ndarray, colour: str, width: float, dashes: str | tuple = "solid"
) -> None:
    """Draw the outlines of the objects of a plane, each for itself where they touch."""
    ids, dense = np.unique(label, return_inverse=True)
    dense = dense.reshape(label.shape) + (ids[0] != 0)
    for k, box in enumerate(ndimage.find_objects(dense), start=1):
        if box is not None:
            mask = np.pad(dense[box] == k, 1)  # so that outlines close at the edge of the image
            y, x = (np.arange(s.start - 1, s.stop + 1) for s in box)
            drawn = axis.contour(
                x, y, mask, [0.5], colors=colour, linewidths=width, linestyles=[dashes]
            )
            drawn.set_in_layout(False)


def _status(
    label: np.ndarray, segmentation: np.ndarray, ignore: np.ndarray | None = None
) -> dict[str, list[int]]:
    """Sort segmentation ids (for `missed`: label ids) by what went wrong with them, each into one
    group.
    """
    wrong = errors(label, segmentation, ignore=ignore)
    table = overlaps(label, segmentation, ignore)
    i, j, intersection = table.pairs[:3]
    mostly = intersection > 0.5 * table.segmentation_sizes[j]
    piece = table.segmentation_ids[j[mostly & np.isin(table.label_ids[i], wrong["split"])]].tolist()
    out = {
        "merged": wrong["merged"],
        "split": [s for s in piece if s not in wrong["merged"]],
        "missed": wrong["missed"],
    }
    out["spurious"] = [s for s in wrong["spurious"] if s not in out["merged"] + out["split"]]
    done = set(out["merged"] + out["split"] + out["spurious"])
    out["correct"] = [s for s in table.segmentation_ids[1:].tolist() if s not in done]
    return out


def _wrong(label: np.ndarray, segmentation: np.ndarray, status: dict[str, list[int]]) -> np.ndarray:
    """Return where a segmentation is wrong, as a mask of whole objects."""
    found = status["merged"] + status["split"] + status["spurious"]
    return np.isin(segmentation, found) | np.isin(label, status["missed"])


def _plane(label: np.ndarray) -> tuple[int, ...]:
    """Return the index of the slice with most foreground of a volume, nothing of a plane."""
    return (int((label > 0).sum(axis=(1, 2)).argmax()),) if label.ndim == 3 else ()


def grey(image: np.ndarray) -> np.ndarray:
    """(C, Y, X) to (Y, X, 3) in [0, 1], as seen: three channels are colours, others are
    averaged.
    """
    low, high = np.percentile(image, (0.5, 99.8), axis=(1, 2), keepdims=True)
    scaled = np.clip((image - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.moveaxis(
        scaled if len(image) == 3 else np.repeat(scaled.mean(axis=0, keepdims=True), 3, axis=0),
        0,
        -1,
    )


def _canvas(count: int, shape: tuple[int, ...], below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels of a shape.

    `below` is room for text under the panels, in inches.
    """
    columns = count if count <= 6 else -(-count // 2)
    rows = -(-count // columns)
    side = PAGE / columns
    figure = new_figure(PAGE, rows * (side * shape[0] / shape[1] + 0.2 + below) + below)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    return figure, axes[:count]


def show(axis: Axes, image: np.ndarray, name: str, aspect: float = 1.0) -> None:
    """Draw an image (Y, X, 3) without a frame; `aspect` is the height of a pixel over its width."""
    axis.set_axis_on()
    axis.imshow(image, interpolation="nearest", aspect=aspect)
    axis.set_autoscale_on(False)  # what is drawn on top does not move the borders
    axis.set_title(name, pad=3)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _show_sample(axes: list[Axes], sample: io.Sample, plane: tuple[int, ...], box: Box) -> None:
    """Image and ground truth, the first two panels."""
    image, label = grey(sample.image[(slice(None), *plane)])[box], sample.label[plane]
    show(axes[0], image, "image")
    scale_bar(axes[0], pixel_size(sample), image.shape[:2])
    show(axes[1], 0.45 * image + 0.55 * instance_colours(label)[box], "ground truth")
    outline(axes[1], label[box], "white", 0.5)


def pixel_size(sample: io.Sample) -> float | None:
    """Return the side of a pixel along x in nm, None if it is not known."""
    return (
        float(np.ravel(sample.attrs["voxel_size_nm"])[-1])
        if "voxel_size_nm" in sample.attrs
        else None
    )


def scale_bar(
    axis: Axes,
    nm: float | None,
    shape: tuple[int, ...],
    colour: str = "white",
    effects: list | None = None,
) -> None:
    """Draw a bar of a round length of about a quarter of the width of an image, whose pixels are
    `nm` wide if that is known.
    """
    if nm is None:
        return
    pixel = nm / 1000  # µm
    length = max(
        (
            n * 10.0**e
            for e in range(-3, 5)
            for n in (1, 2, 5)
            if n * 10.0**e <= 0.3 * shape[1] * pixel
        ),
        default=None,
    )
    if length is not None:
        y, x = 0.94 * shape[0], 0.05 * shape[1]
        axis.plot(
            [x, x + length / pixel],
            [y, y],
            color=colour,
            linewidth=2,
            solid_capstyle="butt",
            path_effects=effects,
        )
        around = withStroke(linewidth=1.5, foreground="black" if colour == "white" else "white")
        axis.text(
            x,
            y - 0.03 * shape[0],
            f"{length:g} µm",
            color=colour,
            fontsize=6.5,
            path_effects=[around],
        )
