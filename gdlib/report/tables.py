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
from gdlib.report.summary import (
    compare,
    measured_on,
    read_baselines,
    read_metrics,
    read_profiles,
    read_validation,
    require,
    summarise,
)

NO_GAP = "¹"
Profiles = Mapping[tuple[str, str], Mapping[str, Any]]


class Cell(NamedTuple):
    """Text of a table as it is read, before it is escaped."""

    text: str
    bold: bool = False


class Table(NamedTuple):
    """A table, ready to be written in any language. Rows are grouped by rules; a row of one cell is the title of a block."""

    key: str
    caption: str
    header: list[str]  # may have line breaks
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
    keys: Sequence[str] | Mapping[str, Sequence[str]],
    main: str | Mapping[str, str],
    titles: Titles = None,
    budget: str | Mapping[str, str] = "",
    baselines: pd.DataFrame | None = None,
    validation: pd.DataFrame | None = None,
) -> list[tuple[str, list[Table]]]:
    """Lay out the tables of all datasets; `table_markdown` and `table_tex` say what the arguments are.

    Returns:
        For every dataset its title and its tables: results, trivial baselines where there are any, and costs of the networks
        where there are profiles.
    """
    out = []
    for dataset, runs in metrics.groupby("dataset", sort=False):
        shown, chief, training = (v[dataset] if isinstance(v, Mapping) else v for v in (keys, main, budget))
        require(runs, (*shown, chief))
        tables = [_results(runs, chief, shown, titles, training)]
        trivial = baselines[baselines["dataset"] == dataset] if baselines is not None else ()
        if len(trivial):
            known = validation[validation["dataset"] == dataset] if validation is not None else runs[:0]
            tables.append(_baselines(runs, trivial, known, shown, titles))
        costs = {network: profile for (data, network), profile in (profiles or {}).items() if data == dataset}
        if costs:
            teachers = runs[runs["method"] == TEACHER]["network"]
            tables.append(_costs(dataset, costs, next(iter(teachers), None), titles))
        out.append((title(dataset, titles), tables))
    return out


def _results(runs: pd.DataFrame, main: str, keys: Sequence[str], titles: Titles, budget: str) -> Table:
    """Lay out the results on one dataset, one block of rows per segmenter."""
    dataset, images = runs["dataset"].iloc[0], runs["sample"].nunique()
    rows, name = summarise(runs), METRICS[main].title
    paired = compare(runs[runs["metric"] == main]).set_index(["segmenter", "student", "method"])
    digits = {key: 3 if rows[rows["metric"] == key]["mean"].abs().max() < 10 else 1 for key in (*keys, main)}
    header = ["network", "method", *map(metric_title, keys), f"Δ {name}", "gap closed", *["p"] * (images > 1)]
    groups: list[list[list[Cell]]] = []
    blocks = rows.groupby("segmenter", sort=False)
    for segmenter, block in blocks:
        heading = [[Cell(title(segmenter, titles))]] if len(blocks) > 1 else []
        roles = block[block["method"] == TEACHER], block[block["method"] != TEACHER]
        for student, runs_of in (item for role in roles for item in role.groupby("student", sort=False)):
            mean, std = (runs_of.pivot(index="method", columns="metric", values=v) for v in ("mean", "std"))
            methods = list(dict.fromkeys(runs_of["method"]))
            methods.sort(key=lambda m: m != NONE)  # stable: the plain student first, the others as they came
            group: list[list[Cell]] = []
            for method in methods:
                cells = [Cell(title(student, titles) if not group else ""), Cell(title(method, titles))]
                for key in keys:
                    best = mean[key].max() if METRICS[key].better == "higher" else mean[key].min()
                    value, d = mean.loc[method, key], digits[key]
                    # What reads the same is as good.
                    top = len(methods) > 1 and f"{value:.{d}f}" == f"{best:.{d}f}"
                    cells.append(Cell(_number(value, std.loc[method, key], d), top))
                extra = ["", "", ""]
                if (segmenter, student, method) in paired.index:
                    pair = paired.loc[(segmenter, student, method)]
                    share, spread = 100 * pair["gap_closed"], 100 * pair["gap_closed_std"]
                    extra = [
                        _number(pair["difference"], pair["difference_std"], digits[main], "+"),
                        f"{_number(share, spread, 0)} %" if np.isfinite(share) else NO_GAP,
                        _p(pair["p"]),
                    ]
                group.append([*cells, *map(Cell, extra)][: len(header)])
            groups.append(heading + group)
            heading = []

    seeds = {
        "students": sorted(set(runs[runs["method"] != TEACHER]["seed"])),
        "teacher": sorted(set(runs[runs["method"] == TEACHER]["seed"])),
    }
    facts = [f"{title(dataset, titles)}, test split, {images} image{'s' * (images != 1)}"]
    facts += [f"{role}: seed{'s' * (len(s) > 1)} {', '.join(map(str, s))}" for role, s in seeds.items() if s]
    caption = "; ".join([*facts, budget] if budget else facts) + "."
    notes = []
    if len(blocks) > 1:
        notes.append("Blocks of rows: what makes objects of the affinities; the networks are the same.")
    if any(len(s) > 1 for s in seeds.values()):
        first = "Mean over images, then mean" if images > 1 else "Mean"
        notes.append(f"{first} ± sample standard deviation over seeds.")
    if len(seeds["students"]) == 1:
        notes.append("One seed: there is no standard deviation, and another seed may change the order.")
    if len(paired):
        notes += [
            f"Bold: best of each student{' in its block' * (len(blocks) > 1)}.",
            f"Δ {name}: difference to the student without distillation, paired by seed.",
            "Gap closed: (method − student) / (teacher − student).",
        ]
    if images == 1:
        notes.append("One image: there is no test over images, and another image may change the order.")
    if len(paired) and images > 1:
        notes.append(
            f"p: two-sided Wilcoxon signed-rank test of Δ {name} over the {images} images (averaged over seeds), not corrected "
            "for the number of comparisons; it speaks of these trained networks, not of other seeds."
            + (f" With {images} images it cannot be below {_p(2 / 2**images)}." if images < 6 else "")
        )
    if NO_GAP in (cell.text for group in groups for row in group for cell in row):
        why = "the teacher is not better than the plain student" if seeds["teacher"] else "there is no teacher"
        notes.append(f"{NO_GAP} Not defined: {why}.")
    return Table(dataset, caption, header, groups, notes, names=2)


def _baselines(
    runs: pd.DataFrame, trivial: pd.DataFrame, validation: pd.DataFrame, keys: Sequence[str], titles: Titles
) -> Table:
    """Lay out what needs no network beside what the teacher gives, on the validation and test splits of one dataset."""
    dataset, segmenters = runs["dataset"].iloc[0], runs["segmenter"].unique()
    names = {s: title(TEACHER, titles) + f", {title(s, titles)}" * (len(segmenters) > 1) for s in segmenters}
    teacher = pd.concat([validation.assign(split="val"), runs[runs["method"] == TEACHER].assign(split="test")])
    teacher = teacher.assign(row=teacher["segmenter"].map(names)).dropna(subset="row")
    trivial = trivial.assign(row=[title(name, titles) for name in trivial["baseline"]])
    columns = pd.MultiIndex.from_product([keys, ("val", "test")])
    both = pd.concat([trivial, teacher])
    means = both.pivot_table(index="row", columns=["metric", "split"], values="value").reindex(columns=columns)
    parts = trivial["row"].unique(), [name for name in names.values() if name in set(teacher["row"])]
    groups = [[[Cell(row)] for row in part] for part in parts if len(part)]
    for key, split in columns:
        column = means[key, split]
        digits = 1 if column.abs().max() >= 10 else 3
        for row in (row for group in groups for row in group):
            value = column[row[0].text]
            row.append(Cell(_number(value, digits=digits) if np.isfinite(value) else "–"))
    return Table(
        f"{dataset}-baselines",
        f"Trivial baselines and the teacher on {title(dataset, titles)}; means over images, of the teacher over seeds too.",
        ["segmented by", *(f"{metric_title(key)}\n{split}" for key, split in columns)],
        groups,
        ["Segmentation parameters were tuned on val, which flatters the teacher there."],
        names=1,
    )


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
        layout: `keys`, the metrics to show, `main`, the metric of differences, gap and p, and `budget`, a text about the
            training for the caption: each for all datasets or, as a mapping, for every one of them; `titles` of datasets,
            networks, methods, segmenters and baselines; `baselines` and `validation`, frames of `read_baselines` and
            `read_validation`, for a table that sets the teacher beside trivial baselines.
    """
    parts = []
    for heading, tables in result_tables(metrics, profiles, **layout):
        parts.append(f"## {_markdown(heading)}")
        for table in tables:
            lines = [[_markdown(text.replace("\n", " ")) for text in table.header]]
            lines.append(["---"] * table.names + ["---:"] * (len(table.header) - table.names))
            for row in (row for group in table.groups for row in group):
                cells = [f"**{_markdown(c.text)}**" if c.bold else _markdown(c.text) for c in row]
                lines.append(cells if len(row) > 1 else [f"*{cells[0]}*", *[""] * (len(table.header) - 1)])
            parts.append(_markdown(table.caption))
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            if table.notes:
                parts.append(_markdown(" ".join(table.notes)))
    return "\n\n".join(parts) + "\n"


def table_tex(metrics: pd.DataFrame, profiles: Profiles | None = None, **layout: Any) -> str:
    """Return the results as LaTeX tables (package `booktabs`); the arguments are those of `table_markdown`."""
    parts = [r"% Needs \usepackage{booktabs}; read it with \input."]
    for table in (table for _, tables in result_tables(metrics, profiles, **layout) for table in tables):
        left, width = table.names, len(table.header)
        body = [
            " \\\\\n".join(
                " & ".join(rf"\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in row)
                if len(row) > 1
                else rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_tex(row[0].text)}}}}}"
                for row in group
            )
            for group in table.groups
        ]
        parts.append("\n".join([
            r"\begin{table*}[t]", r"\centering", r"\footnotesize",
            rf"\caption{{{_tex(table.caption)}}}", rf"\label{{tab:{table.key}}}",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (width - left)}}}", r"\toprule",
            " & ".join(map(_tex_head, table.header)) + r" \\", r"\midrule",
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


def _tex_head(text: str) -> str:
    lines = [_tex(line) for line in text.split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack[r]{" + r" \\ ".join(lines) + "}"


def write(
    metrics: Iterable[Path | str],
    profiles: Iterable[Path | str],
    *,
    summary: Path | str,
    comparison: Path | str,
    markdown: Path | str,
    tex: Path | str,
    baselines: Iterable[Path | str] = (),
    weights: Iterable[Path | str] = (),
    **layout: Any,
) -> None:
    """Read what the pipeline wrote; write summary and comparison (CSV) and the tables.

    Args:
        metrics: files with the columns `io.METRIC_COLUMNS`.
        profiles: profile files.
        summary: where `summarise` goes.
        comparison: where `compare` goes.
        markdown: where the tables go in Markdown.
        tex: where the tables go in LaTeX.
        baselines: files with the columns `summary.BASELINE_COLUMNS`; leave them out for no table of baselines.
        weights: weights of the teachers, whose headers say what they reached on validation images.
        layout: as for `table_markdown`.
    """
    frame, costs = read_metrics(metrics), read_profiles(profiles)
    layout |= {"baselines": read_baselines(baselines), "validation": read_validation(weights)}
    for path, table in ((summary, summarise(frame)), (comparison, compare(frame))):
        rows = table.astype(object).where(table.notna(), "")  # an empty field where there is no number
        io.write_rows(path, table.columns, rows.itertuples(index=False))
    io.write_text(markdown, table_markdown(frame, costs, **layout))
    io.write_text(tex, table_tex(frame, costs, **layout))
