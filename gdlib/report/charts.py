"""Figures of numbers: methods against each other, accuracy against cost, training curves."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from gdlib import io
from gdlib.config import TEACHER
from gdlib.metrics import METRICS
from gdlib.report.style import COLUMN, NONE, STYLE, Look, Titles, looks, metric_title, new_figure, title
from gdlib.report.tables import per_seed, summarise

HISTORY_POINTS = 40  # at most so many points per curve: losses are averaged between them


def methods(metrics: pd.DataFrame, keys: Sequence[str], titles: Titles = None) -> Figure:
    """Draw every method as mean, standard deviation and single seeds, one panel per metric.

    Args:
        metrics: columns `io.METRIC_COLUMNS`, one dataset.
        keys: metrics to show.
        titles: of networks and methods.

    Returns:
        The figure, one column wide. Lines mark the teacher and the student without distillation. Axes need not start at zero.
    """
    _one_dataset(metrics)
    seeds, summary = per_seed(metrics), summarise(metrics)
    look = looks(metrics["method"], titles)
    students = [n for n in dict.fromkeys(metrics[metrics["method"] != TEACHER]["network"])]
    rows = []  # (student, method) from top to bottom
    for student in students:
        names = [m for m in dict.fromkeys(metrics[metrics["network"] == student]["method"]) if m != TEACHER]
        rows += [(student, m) for m in sorted(names, key=lambda m: m != NONE)]
    columns = min(2, len(keys))
    lines = -(-len(keys) // columns)
    space = 0.6 * (len(students) > 1)  # room for the name of a student above its methods
    place = {row: k + space * (1 + students.index(row[0])) for k, row in enumerate(rows)}
    height = 0.145 * (max(place.values()) + 1) + 0.42
    with mpl.rc_context(STYLE):
        figure = new_figure(COLUMN, lines * height + 0.3)
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for axis, key in zip(axes.flat, keys, strict=False):
            axis.set_title(metric_title(key), pad=4)
            teacher = summary.query("method == @TEACHER and metric == @key")["mean"]
            for value in teacher:
                axis.axvline(value, color=look[TEACHER].colour, linestyle=(0, (3, 2)), linewidth=0.8, zorder=1)
            for (student, method), y in place.items():
                here = "network == @student and method == @method and metric == @key"
                points, row = seeds.query(here)["value"], summary.query(here)
                if row.empty:
                    continue
                mean, std, n = row.iloc[0][["mean", "std", "n"]]
                _, colour, marker, _ = look[method]
                if method == NONE:
                    last = max(v for k, v in place.items() if k[0] == student)
                    axis.vlines(mean, y - 0.4, last + 0.4, colour, linewidth=0.8, zorder=1)
                if n > 1:
                    axis.plot([mean - std, mean + std], [y, y], color=colour, linewidth=1.6, alpha=0.55, zorder=2)
                    axis.plot(points, [y] * len(points), "o", color=colour, markersize=2.2, markeredgewidth=0, zorder=3)
                axis.plot(mean, y, marker, color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.5, zorder=4)
            axis.set_ylim(max(place.values()) + 0.6, -0.6)
            axis.set_yticks(list(place.values()), [look[m].title for _, m in place])
            axis.tick_params(axis="y", length=0)
            axis.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
            axis.margins(x=0.06)
            axis.spines["left"].set_visible(False)
            axis.grid(axis="y", color="#ececec", linewidth=0.6, zorder=0)
            axis.set_axisbelow(True)
            if space:
                for student in students:
                    top = min(v for k, v in place.items() if k[0] == student)
                    axis.text(0, top - 0.75, title(student, titles), transform=axis.get_yaxis_transform(), fontsize=6.5, weight="bold", va="center")
        for axis in axes.flat[len(keys) :]:
            axis.set_visible(False)
        several = summary[summary["method"] != TEACHER]["n"].max() > 1
        handles = [_handle(Look("mean ± std over seeds" if several else "mean", "#444444"), linestyle="-" if several else "none")]
        if several:
            handles.append(Line2D([], [], color="#444444", marker="o", markersize=2.2, linestyle="none", label="one seed"))
        if TEACHER in look:
            name = title(metrics[metrics["method"] == TEACHER]["network"].iloc[0], titles)
            handles.append(Line2D([], [], color=look[TEACHER].colour, linestyle=(0, (3, 2)), linewidth=0.8, label=f"{look[TEACHER].title} ({name})"))
        if NONE in look:
            handles.append(Line2D([], [], color=look[NONE].colour, linewidth=0.8, label=f"{look[NONE].title}, no distillation"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2, columnspacing=1.5, handlelength=2)
    return figure


def tradeoff(metrics: pd.DataFrame, profiles: Mapping[str, Mapping[str, Any]], key: str, titles: Titles = None) -> Figure:
    """Draw accuracy against the number of parameters and against latency.

    Args:
        metrics: columns `io.METRIC_COLUMNS`, one dataset.
        profiles: network to profile.
        key: metric of the vertical axis.
        titles: of networks and methods.

    Returns:
        The figure, one column wide. Methods of one student cost the same: they stand side by side around their common place.
    """
    _one_dataset(metrics)
    summary = summarise(metrics[metrics["metric"] == key])
    look = looks(metrics["method"], titles)
    networks = [n for n in dict.fromkeys(summary["student"]) if n in profiles]
    some = profiles[networks[0]]
    device = f"{some.get('device', '')}, {some.get('threads', '?')} threads".lstrip(", ")
    shape = " × ".join(map(str, some.get("image_shape", [])))
    costs = {
        "parameters": ("parameters", 1.0),
        f"latency (ms per image of {shape})\n" + textwrap.shorten(device, 44, placeholder=" …"): ("latency_ms", 1.0),
    }
    with mpl.rc_context(STYLE):
        figure = new_figure(COLUMN, 2.45)
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (label, (name, factor)) in zip(axes, costs.items(), strict=True):
            for network in networks:
                x = profiles[network][name] * factor
                rows = summary[summary["student"] == network]
                for k, (_, row) in enumerate(rows.iterrows()):
                    shift = ScaledTranslation((k - (len(rows) - 1) / 2) * 4.2 / 72, 0, figure.dpi_scale_trans)
                    _, colour, marker, _ = look[row["method"]]
                    error = row["std"] if row["n"] > 1 else None
                    axis.errorbar(x, row["mean"], error, fmt=marker, color=colour, markersize=4.5, markeredgecolor="white", markeredgewidth=0.5, elinewidth=0.8, transform=axis.transData + shift)
            axis.set_xscale("log")
            axis.set_xlabel(label)
            axis.grid(color="#ececec", linewidth=0.6)
            axis.set_axisbelow(True)
        axes[0].set_ylabel(metric_title(key))
        figure.legend(handles=[_handle(one) for one in look.values()], loc="outside upper center", ncols=4)
    return figure


def curves(history: pd.DataFrame, key: str, titles: Titles = None) -> Figure:
    """Draw training loss and validation metric against steps: mean over seeds and, as a band, standard deviation.

    Args:
        history: columns network, method, seed and `io.HISTORY_COLUMNS`, one dataset.
        key: validation metric.
        titles: of networks and methods.

    Returns:
        The figure, one row per student. The loss is the sum of the terms that all methods share, so that methods can be
        compared; a line marks the teacher's last validation.
    """
    look = looks(history["method"], titles)
    students = history[history["method"] != TEACHER]
    names = [set(run["name"]) for _, run in students[students["split"] == "train"].groupby(["network", "method", "seed"])]
    shared = {name for name in set.intersection(*names) if name.startswith("loss/")}
    chosen = shared or {"loss"}
    networks = list(dict.fromkeys(students["network"]))
    teacher = history.query("method == @TEACHER and split == 'val' and name == @key")
    with mpl.rc_context(STYLE):
        figure = new_figure(COLUMN, 1.75 * len(networks) + 0.45)
        axes = figure.subplots(len(networks), 2, sharex="row", squeeze=False)
        for (left, right), network in zip(axes, networks, strict=True):
            runs = students[students["network"] == network]
            losses = runs[(runs["split"] == "train") & runs["name"].isin(chosen)]
            _bands(left, losses.groupby(["method", "seed", "step"], sort=False)["value"].sum(), look)
            scores = runs[(runs["split"] == "val") & (runs["name"] == key)]
            _bands(right, scores.groupby(["method", "seed", "step"], sort=False)["value"].mean(), look)
            if len(teacher):
                last = teacher.sort_values("step").groupby("seed")["value"].last().mean()
                right.axhline(last, color=look[TEACHER].colour, linestyle=(0, (3, 2)), linewidth=0.8)
            left.set_yscale("log")
            left.set_ylabel("training loss" + (" (shared terms)" if shared else ""))
            right.set_ylabel(f"validation {metric_title(key)}")
        figure.legend(handles=[_handle(one, linestyle=one.line, marker="") for one in look.values()], loc="outside upper center", ncols=4)
    return figure


def _bands(axis: Axes, values: pd.Series, look: Mapping[str, Look]) -> None:
    for method, runs in values.groupby("method", sort=False):
        table = runs.droplevel("method").unstack("seed").sort_index()
        width = -(-len(table) // HISTORY_POINTS)
        table = table.groupby(np.arange(len(table)) // width).mean().set_index(table.index[np.arange(0, len(table), width)])
        mean, std = table.mean(axis=1), table.std(axis=1)
        axis.plot(table.index, mean, color=look[method].colour, linestyle=look[method].line)
        if table.shape[1] > 1:
            axis.fill_between(table.index, mean - std, mean + std, color=look[method].colour, alpha=0.13, linewidth=0)
    axis.set_xlabel("optimizer step")


def _handle(look: Look, **changes: Any) -> Line2D:
    style = {"linestyle": "none", "marker": look.marker, "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5} | changes
    return Line2D([], [], color=look.colour, label=look.title, **style)


def _one_dataset(metrics: pd.DataFrame) -> None:
    if metrics["dataset"].nunique() != 1:
        raise io.DataError(f"a figure shows one dataset, not {', '.join(metrics['dataset'].unique())}")
