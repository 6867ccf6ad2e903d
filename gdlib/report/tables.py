"""The tables of a paper, in Markdown and LaTeX: results of every method, and costs of the networks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from gdlib import io
from gdlib.config import TEACHER
from gdlib.metrics import METRICS
from gdlib.report.style import NONE, Titles, metric_title, title
from gdlib.report.summary import compare, measured_on, read_metrics, read_profiles, require, summarise

NO_GAP = "¹"
Profiles = Mapping[tuple[str, str], Mapping[str, Any]]


class Cell(NamedTuple):
    """Text of a table as it is read, before it is escaped."""

    text: str
    bold: bool = False


class Table(NamedTuple):
    """A table, ready to be written in any language. Rows are grouped by rules."""

    key: str
    caption: str
    header: list[str]
    groups: list[list[list[Cell]]]
    notes: list[str]
    names: int  # columns that hold names; the others hold numbers


def _number(mean: float, std: float = float("nan"), digits: int = 3, sign: str = "") -> str:
    text = f"{mean:{sign}.{digits}f}" + (f" ± {std:.{digits}f}" if np.isfinite(std) else "")
    return text.replace("-", "−")


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def result_tables(
    metrics: pd.DataFrame,
    profiles: Profiles | None = None,
    *,
    keys: Sequence[str],
    main: str,
    titles: Titles = None,
    budget: str = "",
) -> list[tuple[str, list[Table]]]:
    """Lay out the tables of all datasets; `table_markdown` and `table_tex` say what the arguments are.

    Returns:
        For every dataset its title and its tables: results, and costs of the networks where there are profiles.
    """
    require(metrics, (*keys, main))
    out = []
    for dataset, runs in metrics.groupby("dataset", sort=False):
        tables = [_results(runs, main, keys, titles, budget)]
        costs = {network: profile for (data, network), profile in (profiles or {}).items() if data == dataset}
        if costs:
            teachers = runs[runs["method"] == TEACHER]["network"]
            tables.append(_costs(dataset, costs, next(iter(teachers), None), titles))
        out.append((title(dataset, titles), tables))
    return out


def _results(runs: pd.DataFrame, main: str, keys: Sequence[str], titles: Titles, budget: str) -> Table:
    """Lay out the results on one dataset."""
    dataset = runs["dataset"].iloc[0]
    rows, paired = summarise(runs), compare(runs[runs["metric"] == main]).set_index(["student", "method"])
    digits = {key: 3 if rows[rows["metric"] == key]["mean"].abs().max() < 10 else 1 for key in (*keys, main)}
    name = METRICS[main].title
    header = ["network", "method", *map(metric_title, keys), f"Δ {name}", "gap closed", "p"]
    groups: list[list[list[Cell]]] = []
    marks = False
    teachers, students = rows[rows["method"] == TEACHER], rows[rows["method"] != TEACHER]
    for student, block in (*teachers.groupby("student", sort=False), *students.groupby("student", sort=False)):
        mean, std = (block.pivot(index="method", columns="metric", values=v) for v in ("mean", "std"))
        methods = list(dict.fromkeys(block["method"]))
        methods.sort(key=lambda m: m != NONE)  # stable: the plain student first, the others as they came
        best = {
            key: max(mean[key], key=lambda v, key=key: v if METRICS[key].better == "higher" else -v) for key in keys
        }
        group = []
        for method in methods:
            cells = [Cell(title(student, titles) if not group else ""), Cell(title(method, titles))]
            for key in keys:
                value, d = mean.loc[method, key], digits[key]
                top = len(methods) > 1 and f"{value:.{d}f}" == f"{best[key]:.{d}f}"  # what reads the same is as good
                cells.append(Cell(_number(value, std.loc[method, key], d), top))
            extra = ["", "", ""]
            if (student, method) in paired.index:
                pair = paired.loc[(student, method)]
                share, spread = 100 * pair["gap_closed"], 100 * pair["gap_closed_std"]
                no_gap = not np.isfinite(share)
                marks |= no_gap
                extra = [
                    _number(pair["difference"], pair["difference_std"], digits[main], "+"),
                    NO_GAP if no_gap else f"{_number(share, spread, 0)} %",
                    _p(pair["p"]),
                ]
            group.append([*cells, *map(Cell, extra)])
        groups.append(group)

    images = runs["sample"].nunique()
    seeds = {
        "students": sorted(set(runs[runs["method"] != TEACHER]["seed"])),
        "teacher": sorted(set(runs[runs["method"] == TEACHER]["seed"])),
    }
    facts = [f"{title(dataset, titles)}, test split, {images} image{'s' * (images != 1)}"]
    facts += [f"{role}: seed{'s' * (len(s) > 1)} {', '.join(map(str, s))}" for role, s in seeds.items() if s]
    caption = "; ".join([*facts, budget] if budget else facts) + "."
    notes = []
    if any(len(s) > 1 for s in seeds.values()):
        notes.append("Mean over images, then mean ± sample standard deviation over seeds.")
    if len(seeds["students"]) == 1:
        notes.append("One seed: there is no standard deviation, and another seed may change the order.")
    if len(paired):
        notes += [
            "Bold: best of each student.",
            f"Δ {name}: difference to the student without distillation, paired by seed.",
            "Gap closed: (method − student) / (teacher − student).",
            f"p: two-sided Wilcoxon signed-rank test of Δ {name} over the {images} images (averaged over seeds), not corrected "
            "for the number of comparisons; it speaks of these trained networks, not of other seeds.",
        ]
    if marks:
        why = "the teacher is not better than the plain student" if len(teachers) else "there is no teacher"
        notes.append(f"{NO_GAP} Not defined: {why}.")
    return Table(dataset, caption, header, groups, notes, names=2)


def _costs(dataset: str, costs: Mapping[str, Mapping[str, Any]], teacher: str | None, titles: Titles) -> Table:
    columns = {
        "parameters (M)": ("parameters", 1e-6),
        "GMACs": ("macs", 1e-9),
        "latency (ms)": ("latency_ms", 1),
        "90th percentile (ms)": ("latency_ms_p90", 1),
        "peak memory (MiB)": ("peak_memory_mib", 1),
    }
    shares = ("parameters", "macs", "latency_ms")
    group = []
    for network, profile in costs.items():
        cells = [title(network, titles)]
        for key, factor in columns.values():
            value, whole = profile.get(key), costs.get(teacher, {}).get(key)
            text = "–" if value is None else _digits(value * factor)
            share = (
                f" ({100 * value / whole:.2g} %)" if key in shares and value and whole and network != teacher else ""
            )
            cells.append(text + share)
        group.append([Cell(cell) for cell in cells])
    caption = f"Cost of the networks on one image of {title(dataset, titles)}: {measured_on(costs.values())}." + (
        " In parentheses: share of the teacher's." if teacher in costs else ""
    )
    return Table(f"{dataset}-cost", caption, ["network", *columns], [group], [], names=1)


def table_markdown(metrics: pd.DataFrame, profiles: Profiles | None = None, **layout: Any) -> str:
    """Return the results as Markdown.

    Args:
        metrics: columns `io.METRIC_COLUMNS`.
        profiles: (dataset, network) to profile; leave it out for no table of costs.
        layout: `keys`, the metrics to show; `main`, the metric of differences, gap and p; `titles` of datasets, networks and
            methods; `budget`, a text about the training for the caption.
    """
    parts = []
    for heading, tables in result_tables(metrics, profiles, **layout):
        parts.append(f"## {_markdown(heading)}")
        for table in tables:
            lines = [[_markdown(text) for text in table.header]]
            lines.append(["---"] * table.names + ["---:"] * (len(table.header) - table.names))
            for row in (row for group in table.groups for row in group):
                lines.append([f"**{_markdown(c.text)}**" if c.bold else _markdown(c.text) for c in row])
            parts.append(_markdown(table.caption))
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            if table.notes:
                parts.append(_markdown(" ".join(table.notes)))
    return "\n\n".join(parts) + "\n"


def table_tex(metrics: pd.DataFrame, profiles: Profiles | None = None, **layout: Any) -> str:
    """Return the results as LaTeX tables (package `booktabs`); the arguments are those of `table_markdown`."""
    parts = [r"% Needs \usepackage{booktabs}; read it with \input."]
    for table in (table for _, tables in result_tables(metrics, profiles, **layout) for table in tables):
        left = table.names
        body = [
            " \\\\\n".join(
                " & ".join(rf"\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in row) for row in group
            )
            for group in table.groups
        ]
        parts.append("\n".join([
            r"\begin{table*}[t]", r"\centering", r"\footnotesize",
            rf"\caption{{{_tex(table.caption)}}}", rf"\label{{tab:{table.key}}}",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(table.header) - left)}}}", r"\toprule",
            " & ".join(map(_tex, table.header)) + r" \\", r"\midrule",
            " \\\\\n\\midrule\n".join(body) + r" \\", r"\bottomrule", r"\end{tabular}",
            *([rf"\par\smallskip\raggedright {_tex(' '.join(table.notes))}"] if table.notes else []),
            r"\end{table*}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


_MARKDOWN = str.maketrans({c: "\\" + c for c in "\\|*`"})
_TEX = str.maketrans({
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": "$|$", "<": "$<$", ">": "$>$",
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "Δ": r"$\Delta$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "¹": "$^1$", "–": "--",
})  # fmt: skip


def _markdown(text: str) -> str:
    return text.translate(_MARKDOWN)


def _tex(text: str) -> str:
    return text.translate(_TEX)


def write(
    metrics: Iterable[Path | str],
    profiles: Iterable[Path | str],
    *,
    summary: Path | str,
    comparison: Path | str,
    markdown: Path | str,
    tex: Path | str,
    **layout: Any,
) -> None:
    """Read metrics and profiles; write summary and comparison (CSV) and the tables; `layout` as for `table_markdown`."""
    frame, costs = read_metrics(metrics), read_profiles(profiles)
    for path, table in ((summary, summarise(frame)), (comparison, compare(frame))):
        rows = table.astype(object).where(table.notna(), "")  # an empty field where there is no number
        io.write_rows(path, table.columns, rows.itertuples(index=False))
    io.write_text(markdown, table_markdown(frame, costs, **layout))
    io.write_text(tex, table_tex(frame, costs, **layout))
