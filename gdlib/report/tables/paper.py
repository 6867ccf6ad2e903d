"""The tables of the paper, with our numbers and beside them what is known of the paper's own
(`paper.toml`).
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gdlib import io
from gdlib.config import TEACHER
from gdlib.evaluate.metrics import METRICS
from gdlib.report import markup
from gdlib.report.markup import Cell, Table
from gdlib.report.names import NONE, Titles, ablation_of, metric_title, named_teacher, title
from gdlib.report.provenance.record import commit, trained_on
from gdlib.report.tables.results import (
    Profiles,
    description,
    digits_of,
    false_tables,
    gap_cell,
    gap_notes,
    metric_cells,
    notes_on,
    p_cells,
    tests_of,
)
from gdlib.report.tables.summary import (
    compare,
    measured_on,
    one_metric,
    read_metrics,
    read_profiles,
    require,
    summarise,
)

OF_ANY = "²"  # the paper's number, where its source does not name the segmenter
Paper = Mapping[str, Any]


def read_paper() -> Paper:
    """Read what the paper says; the file explains itself."""
    return tomllib.loads(Path(__file__).with_name("paper.toml").read_text())


def paper_tables(
    metrics: pd.DataFrame,
    *,
    main: Mapping[str, str],
    budget: Mapping[str, str],
    titles: Titles = None,
    trained: Mapping[str, str] | None = None,
    profiles: Profiles | None = None,
    code: str = "unknown",
    paper: Paper | None = None,
) -> list[tuple[str, list[Table]]]:
    """Lay out one table for every dataset that the paper has too, in the paper's order of datasets.

    Args:
        metrics: columns `io.METRIC_COLUMNS`.
        main: dataset to the metric of gap and tests.
        budget: dataset to a text about the training.
        titles: of datasets, networks, methods and segmenters.
        trained: dataset to what trained its networks.
        profiles: (dataset, network) to profile, for what their costs were measured on.
        code: the commit.
        paper: as `read_paper` returns it.

    Returns:
        For every dataset its title and its table, and one of images without objects if there are
        any. Rows: the teacher, then for every student what the paper has (empty where we have not
        run it) and our other methods but for ablations. Another teacher has rows of its own below.
    """
    paper = paper or read_paper()
    out = []
    for known, dataset in (
        (known, ours) for known, layout in paper["dataset"].items() for ours in layout["ours"]
    ):
        layout, runs = paper["dataset"][known], metrics[metrics["dataset"] == dataset]
        if len(runs) == 0:
            continue
        require(runs, [*layout["metrics"], main[dataset]])
        runs = runs[~runs["method"].map(ablation_of).astype(bool)]
        facts = [description(runs, titles, budget[dataset])]
        facts += [f"trained on {trained[dataset]}"] if dataset in (trained or {}) else []
        costs = [p for (data, _), p in (profiles or {}).items() if data == dataset]
        facts += [f"costs measured on {measured_on(costs)}"] if costs else []
        table = _table(runs, main[dataset], known, titles, paper)
        table = table._replace(caption="; ".join([*facts, f"code: {code}."]))
        out.append((title(dataset, titles), [table, *false_tables(runs, titles)]))
    return out


def _table(runs: pd.DataFrame, main: str, known: str, titles: Titles, paper: Paper) -> Table:
    """Lay out the table of one dataset, which the paper's file calls `known`.

    The caption is left to the caller.
    """
    layout = paper["dataset"][known]
    keys = layout["metrics"]
    said = {
        (v["student"], v["method"], v["metric"], v["quantity"], v.get("segmenter")): v["value"]
        for v in paper.get("value", ())
        if v["dataset"] == known
    }
    rows, tests, name = summarise(runs), tests_of(runs), METRICS[main].title
    paired = compare(one_metric(runs, main)).set_index(["segmenter", "student", "method"])
    digits = digits_of(rows, keys)
    header = ["network", "method", *(text for key in keys for text in (metric_title(key), "paper"))]
    header += [f"gap in {name} closed", "paper", *(f"p ({test})" for test in tests), "seeds"]
    counts = rows.set_index(["segmenter", "student", "method"])["n"].groupby(level=[0, 1, 2]).max()
    groups: list[list[list[Cell]]] = []
    used = runs["segmenter"].unique()
    segmenters = [s for s in layout.get("segmenters", ()) if s in used]
    segmenters += [s for s in used if s not in segmenters]
    for segmenter in segmenters:
        heading = [[Cell(title(segmenter, titles))]] if len(segmenters) > 1 else []
        for student, methods in _blocks(runs, paper["methods"]):
            part = rows[(rows["segmenter"] == segmenter) & (rows["student"] == student)]
            ours = metric_cells(part, methods, keys, digits)
            group: list[list[Cell]] = []
            for method in methods:
                own = method.partition("@")[0] == paper["methods"][-1]
                plus = "+ " * (method not in (TEACHER, NONE)) + "ours: " * own
                cells = [
                    Cell("" if group else title(student, titles)),
                    Cell(plus + title(method, titles)),
                ]
                for key, cell in zip(keys, ours.get(method, [Cell("")] * len(keys)), strict=True):
                    cells += [
                        cell,
                        _said(said, (student, method, key, "mean"), segmenter, digits[key]),
                    ]
                at, share = (segmenter, student, method), (student, method, main, "gap_closed")
                pair = paired.loc[at] if at in paired.index else None
                cells += [
                    Cell("") if pair is None else gap_cell(pair),
                    _said(said, share, segmenter),
                ]
                cells += [Cell("")] * len(tests) if pair is None else p_cells(pair, tests)
                group.append([*cells, Cell(str(counts[at]) if at in counts.index else "")])
            groups.append(heading + group)
            heading = []
    cells = [cell.text for group in groups for row in group for cell in row]
    notes = [
        "Empty: not run here or, in the columns of the paper, not known to us.",
        "Bold: best of each block of rows.",
    ]
    if len(paired):
        notes.append(
            f"Gap in {name} closed: Δ {name} / (teacher − student), with the teacher above."
        )
    notes += notes_on(
        runs, f"Δ {name}: difference to the student without distillation" * (len(paired) > 0)
    )
    notes += gap_notes(runs, main, groups)
    notes += [f"{OF_ANY} Our source does not say with which segmenter."] * any(
        OF_ANY in text for text in cells
    )
    return Table(
        f"{runs['dataset'].iloc[0]}-paper",
        "",
        header,
        groups,
        [*notes, *_statements(known, titles, paper)],
        names=2,
    )


def _blocks(runs: pd.DataFrame, known: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return networks and their methods, one block of rows each: every teacher, followed by the
    students that learn from it.
    """
    teachers = list(runs[runs["method"] == TEACHER]["network"].unique())
    students = runs[runs["method"] != TEACHER]
    out = []
    for number, teacher in enumerate(teachers or [""]):
        out += [(teacher, [TEACHER])] * bool(teacher)
        for student, of_student in students.groupby("network", sort=False):
            present = list(of_student["method"].unique())
            end = f"@{teacher}" if number else ""
            listed = [f"{method}{end}" for method in known]
            others = [
                m for m in present if named_teacher(m) == end[1:] and m not in (NONE, *listed)
            ]
            if not number or any(named_teacher(m) == teacher for m in present):
                out.append((student, [NONE, *listed, *others]))
    return out


def _said(
    said: Mapping[tuple, float], what: tuple, segmenter: str, digits: int | None = None
) -> Cell:
    """Return the paper's number, a share as a percentage; nothing where it is not known."""
    for of, mark in ((segmenter, ""), (None, OF_ANY)):
        if (value := said.get((*what, of))) is not None:
            return Cell(
                (f"{100 * value:.1f} %" if digits is None else markup.number(value, digits=digits))
                + mark
            )
    return Cell("")


def _statements(known: str, titles: Titles, paper: Paper) -> list[str]:
    """Return what the paper says in words: its shares, with their networks, and remarks on the
    dataset.
    """
    shares = [
        f"The paper reports that ours closes {100 * v['value']:.1f} % of the gap in "
        f"{METRICS[v['metric']].title} for {title(v['student'], titles)} ({v['source']})."
        for v in paper.get("value", ())
        if v["dataset"] == known and v["quantity"] == "gap_closed"
    ]
    return [
        *shares,
        *paper["dataset"][known].get("remarks", ()),
        *paper.get("remarks", {}).values(),
    ]


def write(
    metrics: Iterable[Path | str],
    profiles: Iterable[Path | str],
    weights: Iterable[Path | str],
    *,
    markdown: Path | str,
    tex: Path | str,
    html: Path | str | None = None,
    **layout: Any,
) -> None:
    """Read what the pipeline wrote; write the paper's tables.

    Args:
        metrics: files with the columns `io.METRIC_COLUMNS`.
        profiles: profile files.
        weights: of all trained networks; their headers say what trained them.
        markdown: where the tables go in Markdown.
        tex: where they go in LaTeX.
        html: where they go as a page.
        layout: `main`, `budget` and `titles` of `paper_tables`.
    """
    paper, code = read_paper(), commit()
    found = paper_tables(
        read_metrics(metrics),
        profiles=read_profiles(profiles),
        trained=trained_on(weights),
        code=code,
        paper=paper,
        **layout,
    )
    heading = (
        f"# Tables of the paper\n\n{paper['title']}. Our numbers, and beside them what is known to "
        "us of the paper's."
    )
    io.write_text(markdown, f"{heading}\n\n{markup.markdown(found)}")
    io.write_text(tex, markup.tex(found))
    if html:
        io.write_text(html, markup.page("Tables of the paper", markup.html(found)))
