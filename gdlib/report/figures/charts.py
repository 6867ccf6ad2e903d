"""Figures of numbers: methods against each other, ablations, accuracy against cost, training
curves.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from gdlib import io
from gdlib.config import TEACHER
from gdlib.evaluate.metrics import METRICS
from gdlib.report.figures.style import COLUMN, PAGE, STYLE, new_figure
from gdlib.report.names import (
    NONE,
    Look,
    Titles,
    ablation_of,
    looks,
    metric_title,
    named_teacher,
    title,
)
from gdlib.report.tables.summary import measured_on, per_seed, require

GRID = "#ececec"
REFERENCE = {"linestyle": (0, (3, 2)), "linewidth": 0.8}  # the teacher, where it is a line
OTHERS = ((0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))  # line styles of the other teachers
DARK = "#444444"  # what stands for any method
COSTS = (  # key of the profile, factor, label, in words
    ("parameters", 1e-6, "parameters (millions)", "fewer", "more"),
    ("latency_ms", 1, "latency (ms per image)", "faster", "slower"),
)
SEED = {"marker": "o", "markersize": 1.9, "markeredgewidth": 0}
EDGE = {"markeredgecolor": "white", "markeredgewidth": 0.5}
HISTORY_POINTS = 40  # at most so many points per curve: losses are averaged between them


def methods(metrics: pd.DataFrame, keys: Sequence[str], titles: Titles = None) -> Figure:
    """Draw every method as mean, standard deviation and single seeds, one panel per metric.

    Args:
        metrics: columns `io.METRIC_COLUMNS`, one dataset; only its main segmenter, the first, is
            shown, and no ablation.
        keys: metrics to show.
        titles: of networks and methods.

    Returns:
        The figure, one column wide (one page with several students or long titles). Lines mark the
        teachers and the student without distillation. Axes need not start at zero.
    """
    metrics = _shown(metrics)
    require(metrics, keys)
    look = looks(metrics["method"], titles)
    values = _seed_values(metrics)
    networks = dict.fromkeys(network for network, method, _ in values if method == TEACHER)
    lines_of = dict(zip(networks, (REFERENCE["linestyle"], *OTHERS), strict=False))
    teachers = {n: REFERENCE | {"linestyle": lines_of.get(n, OTHERS[-1])} for n in networks}
    students = list(dict.fromkeys(network for network, method, _ in values if method != TEACHER))
    rows = list(
        dict.fromkeys((network, method) for network, method, _ in values if method != TEACHER)
    )
    rows.sort(key=lambda row: (students.index(row[0]), row[1] != NONE))  # stable
    space = 1.1 if len(students) > 1 else 0  # room for the name of a student above its methods
    place = {row: k + space * (1 + students.index(row[0])) for k, row in enumerate(rows)}
    bottom, several = max(place.values()), max(map(len, values.values())) > 1
    narrow = len(students) < 2 and max(len(one.title) for one in look.values()) < 24
    width, most = (COLUMN, 2) if narrow else (PAGE, 4)
    columns = min(most, len(keys))
    lines = -(-len(keys) // columns)
    with mpl.rc_context(STYLE):
        figure = new_figure(
            width, lines * (0.145 * (bottom + 1) + 0.4) + 0.13 * -(-4 // columns) + 0.1
        )
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axis, key in zip(axes.flat, keys, strict=False):
            for network, line in teachers.items():
                axis.axvline(
                    values[network, TEACHER, key].mean(), color=look[TEACHER].colour, **line
                )
            for (student, method), y in place.items():
                points = values.get((student, method, key), np.empty(0))
                if method == NONE and points.size:
                    last = max(other for row, other in place.items() if row[0] == student)
                    axis.vlines(
                        points.mean(),
                        y - 0.4,
                        last + 0.4,
                        look[NONE].colour,
                        linewidth=0.8,
                        zorder=1,
                    )
                _dot(axis, points, y, look[method])
            axis.set_title(metric_title(key), pad=4)
            axis.set_ylim(bottom + 0.6, -0.6)
            axis.set_yticks(list(place.values()), [look[method].title for _, method in place])
            axis.tick_params(axis="y", length=0)
            axis.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
            axis.margins(x=0.06)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="y", color=GRID, linewidth=0.6)
            axis.set_axisbelow(True)
        for axis in axes[:, 0] if space else ():
            for student in students:
                top = min(y for row, y in place.items() if row[0] == student)
                axis.annotate(
                    title(student, titles),
                    (0, top - 0.9),
                    xycoords=axis.get_yaxis_transform(),
                    xytext=(-4, 0),
                    textcoords="offset points",
                    weight="bold",
                    ha="right",
                    va="center",
                )
        for axis in axes.flat[len(keys) :]:
            axis.set_visible(False)
        handles = _seed_handles(several)
        for network, line in teachers.items():
            name = textwrap.shorten(title(network, titles), 22, placeholder=" …")
            handles.append(
                Line2D(
                    [],
                    [],
                    color=look[TEACHER].colour,
                    **line,
                    label=f"{look[TEACHER].title}, {name}",
                )
            )
        if NONE in look:
            handles.append(
                Line2D(
                    [],
                    [],
                    color=look[NONE].colour,
                    linewidth=0.8,
                    label=f"{look[NONE].title}, no distillation",
                )
            )
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.5)
    return figure


def _seed_handles(several: bool) -> list[Line2D]:
    if not several:
        return [_handle(Look("one seed", DARK))]
    return [
        _handle(Look("mean ± std over seeds", DARK), linestyle="-"),
        _handle(Look("one seed", DARK), **SEED),
    ]


def ablation(
    metrics: pd.DataFrame, name: str, base: str, keys: Sequence[str], titles: Titles = None
) -> Figure:
    """Draw metrics against the values of one setting of a method.

    Args:
        metrics: columns `io.METRIC_COLUMNS`, one dataset; only its main segmenter, the first, is
            shown.
        name: of the ablation: its methods are called `name=value`.
        base: the method whose setting it is.
        keys: metrics to show.
        titles: of networks, methods and the ablation.

    Returns:
        The figure, one page wide: a row per student, a panel per metric, values at equal distances.
        Lines mark the student without distillation and the method as it is in the catalogue, with a
        band of one standard deviation; the teacher, which may be far away, is a number.
    """
    metrics = _main_segmenter(metrics)
    require(metrics, keys)
    found = [method for method in metrics["method"].unique() if ablation_of(method) == name]
    if not found:
        raise io.DataError(f'there is no run of the ablation "{name}"; train its methods first')
    settings = {method: method.partition("=")[2] for method in found}
    ordered = all(map(_is_number, settings.values()))
    if ordered:
        found.sort(key=lambda method: float(settings[method]))
    look = looks([TEACHER, NONE, base], titles)
    values = _seed_values(metrics)
    students = list(dict.fromkeys(network for network, method, _ in values if method != TEACHER))
    teacher = next((network for network, method, _ in values if method == TEACHER), None)
    place = np.arange(len(found))
    with mpl.rc_context(STYLE):
        figure = new_figure(PAGE, 1.65 * len(students) + 0.25)
        axes = figure.subplots(len(students), len(keys), sharex=True, squeeze=False)
        for row, student in zip(axes, students, strict=True):
            for axis, key in zip(row, keys, strict=True):
                for method in (NONE, base):
                    _level(axis, values.get((student, method, key), np.empty(0)), look[method])
                points = [
                    values.get((student, method, key), np.array([np.nan])) for method in found
                ]
                means = np.array([one.mean() for one in points])
                spread = [one.std(ddof=1) if one.size > 1 else 0.0 for one in points]
                axis.errorbar(
                    place,
                    means,
                    spread,
                    linestyle="-" if ordered else "none",
                    color=DARK,
                    linewidth=1,
                    zorder=3,
                )
                axis.plot(place, means, zorder=4, **_marker(Look("", DARK)))
                for x, one in zip(place, points, strict=True):
                    if one.size > 1:
                        axis.plot(np.full(one.size, x + 0.16), one, **_seed_marker(Look("", DARK)))
                of_teacher = values.get((teacher, TEACHER, key), np.empty(0))
                if student == students[0]:
                    note = f"\nteacher {of_teacher.mean():.3f}" if of_teacher.size else ""
                    axis.set_title(metric_title(key) + note, pad=4)
                axis.set_xlim(-0.5, len(found) - 0.5)
                axis.set_xticks(place, [settings[method] for method in found])
                axis.yaxis.set_major_locator(MaxNLocator(5))
                axis.margins(y=0.08)
                axis.grid(axis="y", color=GRID, linewidth=0.6)
                axis.set_axisbelow(True)
            if len(students) > 1:
                row[0].set_ylabel(title(student, titles), weight="bold")
        figure.supxlabel(title(name, titles), fontsize=7)
        handles = _seed_handles(max(map(len, values.values())) > 1)
        handles += [
            Line2D([], [], color=look[m].colour, linewidth=1, label=f"{look[m].title}, {what}")
            for m, what in ((NONE, "no distillation"), (base, "as in the catalogue"))
            if any(method == m for _, method, _ in values)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, columnspacing=1.5)
    return figure


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


def _level(axis: Axes, points: np.ndarray, look: Look) -> None:
    """Draw a mean as a line across the panel, its standard deviation as a band."""
    if points.size:
        axis.axhline(points.mean(), color=look.colour, linewidth=1, zorder=2)
    if points.size > 1:
        spread = points.std(ddof=1)
        band = points.mean() - spread, points.mean() + spread
        axis.axhspan(*band, color=look.colour, alpha=0.13, linewidth=0, zorder=1)


def _seed_values(metrics: pd.DataFrame) -> dict[tuple[str, str, str], np.ndarray]:
    """(network, method, metric) to the mean over images of every seed."""
    groups = per_seed(metrics).groupby(["network", "method", "metric"], sort=False)["value"]
    return {key: values.to_numpy() for key, values in groups}


def _dot(axis: Axes, points: np.ndarray, y: float, look: Look) -> None:
    """Draw mean, standard deviation and single seeds on one line."""
    if points.size > 1:
        spread = points.std(ddof=1)
        axis.plot(
            [points.mean() - spread, points.mean() + spread], [y, y], color=look.colour, linewidth=1
        )
        # Below the line, so that the mean does not hide them.
        axis.plot(points, np.full(points.size, y + 0.34), **_seed_marker(look))
    if points.size:
        axis.plot(points.mean(), y, zorder=4, **_marker(look))


def tradeoff(
    metrics: pd.DataFrame,
    profiles: Mapping[str, Mapping[str, Any]],
    key: str,
    titles: Titles = None,
) -> Figure:
    """Draw accuracy against the number of parameters and against latency.

    Args:
        metrics: columns `io.METRIC_COLUMNS`, one dataset; only its main segmenter, the first, is
            shown, and no ablation.
        profiles: network to profile.
        key: metric of the vertical axis.
        titles: of networks and methods.

    Returns:
        The figure, one page wide. Methods of one student cost the same: they stand around a line at
        that cost.
    """
    metrics = _shown(metrics)
    require(metrics, [key])
    look = looks(metrics["method"], titles)
    values = {
        (network, method): points
        for (network, method, one), points in _seed_values(metrics).items()
        if one == key
    }
    teacher = next((network for network, method in values if method == TEACHER), None)
    networks = list(dict.fromkeys(network for network, _ in values))
    if missing := [network for network in networks if network not in profiles]:
        raise io.DataError(
            f"there is no profile of {', '.join(missing)}; give one for every network"
        )
    with mpl.rc_context(STYLE):
        columns = 1 + len(look) // 25  # of the legend
        figure = new_figure(PAGE, max(2.2, 0.14 * -(-len(look) // columns) + 0.35))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (name, factor, label, fewer, more) in zip(axes, COSTS, strict=True):
            cost = {network: factor * profiles[network][name] for network in networks}
            for rank, network in enumerate(sorted(networks, key=cost.__getitem__)):
                dots = sorted(
                    (points.mean(), method)
                    for (other, method), points in values.items()
                    if other == network
                )
                ends = dots[0][0], dots[-1][0]
                axis.vlines(cost[network], *ends, color="#cccccc", linewidth=0.8, zorder=1)
                lanes = min(len(dots), 2 if len(dots) < 10 else 4)
                for k, (mean, method) in enumerate(dots):
                    # Neighbours in value step aside, so that all are seen; the line is where they
                    # belong.
                    step = (k % lanes - (lanes - 1) / 2) * 4.5 / 72
                    shift = ScaledTranslation(step, 0, figure.dpi_scale_trans)
                    axis.plot(
                        cost[network],
                        mean,
                        transform=axis.transData + shift,
                        **_marker(look[method]),
                    )
                text = title(network, titles)
                if teacher and network != teacher:
                    ratio = cost[teacher] / cost[network]
                    times = max(ratio, 1 / ratio)
                    text += f"\n{times:.{int(times < 10)}f} × {fewer if ratio > 1 else more}"
                # Names stand below and above in turn: neighbours on the axis do not collide.
                above = rank % 2
                axis.annotate(
                    text,
                    (cost[network], ends[above]),
                    xytext=(0, 6 if above else -6),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if above else "top",
                    fontsize=6.5,
                )
            low, high = min(cost.values()), max(cost.values())
            room = max(high / low, 10) ** 0.2
            axis.set_xscale("log")
            axis.set_xlim(low / room, high * room)
            _plain_ticks(axis.xaxis)
            axis.set_xlabel(label)
            axis.grid(color=GRID, linewidth=0.6)
            axis.set_axisbelow(True)
        low, high = min(map(np.mean, values.values())), max(map(np.mean, values.values()))
        room = 0.28 * (high - low) or 0.1
        axes[0].set_ylim(low - room, high + room)
        axes[0].set_ylabel(metric_title(key))
        setting = measured_on(profiles[network] for network in networks)
        figure.supxlabel(f"one image of {setting}", fontsize=6, color="#666666")
        figure.legend(
            handles=[_handle(one) for one in look.values()],
            loc="outside right upper",
            ncols=columns,
        )
    return figure


def curves(history: pd.DataFrame, key: str, titles: Titles = None) -> Figure:
    """Draw training loss and validation metric against steps: mean over seeds and, as a band,
    standard deviation.

    Args:
        history: columns network, method, seed and `io.HISTORY_COLUMNS`, one dataset. What was
            learned from other teachers than the first is not shown, nor are ablations.
        key: validation metric.
        titles: of networks and methods.

    Returns:
        The figure, one row per student, wider for many methods. The loss is the sum of the terms
        that all methods share, so that methods can be compared; a line marks the first teacher's
        best validation.
    """
    history = history[
        [not (ablation_of(method) or named_teacher(method)) for method in history["method"]]
    ]
    look = looks(history["method"], titles)
    students = history[history["method"] != TEACHER]
    names = [
        set(run["name"])
        for _, run in students[students["split"] == "train"].groupby(["network", "method", "seed"])
    ]
    shared = {name for name in set.intersection(*names) if name.startswith("loss/")}
    chosen = shared or {"loss"}
    networks = list(dict.fromkeys(students["network"]))
    teacher = history.query("method == @TEACHER and split == 'val' and name == @key")
    teacher = teacher[teacher["network"] == teacher["network"].iloc[0]] if len(teacher) else teacher
    with mpl.rc_context(STYLE):
        columns, width = (4, COLUMN) if len(look) <= 8 else (7, PAGE)
        lines = -(-len(look) // columns)  # of the legend
        figure = new_figure(width, 1.75 * len(networks) + 0.14 * lines + 0.2)
        axes = figure.subplots(len(networks), 2, sharex="row", squeeze=False)
        for (left, right), network in zip(axes, networks, strict=True):
            runs = students[students["network"] == network]
            at = ["method", "seed", "step"]
            losses = (
                runs[(runs["split"] == "train") & runs["name"].isin(chosen)]
                .groupby(at, sort=False)["value"]
                .sum()
            )
            scores = (
                runs[(runs["split"] == "val") & (runs["name"] == key)]
                .groupby(at, sort=False)["value"]
                .mean()
            )
            _bands(left, losses, look)
            _bands(right, scores, look)
            if len(teacher):
                best = (
                    teacher.groupby("seed")["value"]
                    .agg("max" if METRICS[key].better == "higher" else "min")
                    .mean()
                )
                right.axhline(best, color=look[TEACHER].colour, **REFERENCE)
            if losses.min() > 0 and losses.max() > 5 * losses.min():
                left.set_yscale("log")
                _plain_ticks(left.yaxis)
            if len(networks) > 1:
                left.set_title(title(network, titles), loc="left", weight="bold")
            left.set_ylabel("training loss" + (" (shared terms)" if shared else ""))
            right.set_ylabel(f"validation {metric_title(key)}")
        handles = [_handle(one, linestyle=one.line, marker="") for one in look.values()]
        figure.legend(handles=handles, loc="outside upper center", ncols=-(-len(look) // lines))
    return figure


def _bands(axis: Axes, values: pd.Series, look: Mapping[str, Look]) -> None:
    for method, runs in values.groupby("method", sort=False):
        table = runs.droplevel("method").unstack("seed").sort_index()
        width = -(-len(table) // HISTORY_POINTS)
        table = table.reset_index().groupby(np.arange(len(table)) // width).mean().set_index("step")
        mean, std = table.mean(axis=1), table.std(axis=1)
        axis.plot(table.index, mean, color=look[method].colour, linestyle=look[method].line)
        if table.shape[1] > 1:
            axis.fill_between(
                table.index,
                mean - std,
                mean + std,
                color=look[method].colour,
                alpha=0.13,
                linewidth=0,
            )
    axis.set_xlabel("optimizer step")


def _plain_ticks(axis: Axis) -> None:
    """Write 1, 2, 5, 10 ... on a logarithmic axis, not powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _marker(look: Look) -> dict[str, Any]:
    marker = {
        "linestyle": "none",
        "color": look.colour,
        "marker": look.marker,
        "markersize": 4.6,
    } | EDGE
    if look.hollow:
        marker |= {
            "markersize": 4,
            "markerfacecolor": "white",
            "markeredgecolor": look.colour,
            "markeredgewidth": 0.9,
        }
    return marker


def _seed_marker(look: Look) -> dict[str, Any]:
    return _marker(look._replace(hollow=False)) | SEED


def _handle(look: Look, **changes: Any) -> Line2D:
    return Line2D([], [], label=look.title, **_marker(look) | changes)


def _shown(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the main segmenter, the first, of the one dataset, without ablations."""
    return _main_segmenter(metrics[~metrics["method"].map(ablation_of).astype(bool)])


def _main_segmenter(metrics: pd.DataFrame) -> pd.DataFrame:
    if metrics["dataset"].nunique() != 1:
        raise io.DataError(
            f"a figure shows one dataset, not {', '.join(metrics['dataset'].unique())}"
        )
    return metrics[metrics["segmenter"] == metrics["segmenter"].iloc[0]]
