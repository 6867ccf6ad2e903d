"""The tables of a study: results of every method, ablations, trivial baselines, and costs of the
networks.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gdlib import io
from gdlib.config import TEACHER
from gdlib.evaluate.metrics import METRICS
from gdlib.evaluate.scores import FALSE
from gdlib.report import markup
from gdlib.report.markup import Cell, Table, number, p_value, significant
from gdlib.report.names import NONE, Titles, ablation_of, metric_title, named_teacher, title
from gdlib.report.tables.summary import (
    NOISE,
    compare,
    images_of,
    is_empty,
    least_gap,
    meant,
    measured_on,
    one_metric,
    read_baselines,
    read_metrics,
    read_profiles,
    read_validation,
    require,
    summarise,
)

NO_GAP = "¹"
SIGNIFICANT = 0.05
Profiles = Mapping[tuple[str, str], Mapping[str, Any]]


def result_tables(
    metrics: pd.DataFrame,
    profiles: Profiles | None = None,
    *,
    keys: Sequence[str] | Mapping[str, Sequence[str]],
    main: str | Mapping[str, str],
    titles: Titles = None,
    budget: str | Mapping[str, str] = "",
    ablations: Mapping[str, str] | None = None,
    baselines: pd.DataFrame | None = None,
    validation: pd.DataFrame | None = None,
    images: Mapping[str, Mapping[str, str]] | None = None,
) -> list[tuple[str, list[Table]]]:
    """Lay out the tables of all datasets.

    `table_markdown` and `table_tex` say what the arguments are.

    Returns:
        For every dataset its title and its tables: results, what was found in images without
        objects where there are any, ablations, trivial baselines where there are any, and costs of
        the networks where there are profiles.
    """
    out = []
    for dataset, runs in metrics.groupby("dataset", sort=False):
        shown, chief, training = (
            v[dataset] if isinstance(v, Mapping) else v for v in (keys, main, budget)
        )
        require(runs, (*shown, chief))
        tables = [
            _results(
                runs, chief, shown, titles, training, ablations or {}, (images or {}).get(dataset)
            ),
            *false_tables(runs, titles),
        ]
        for name in dict.fromkeys(filter(None, map(ablation_of, runs["method"].unique()))):
            if base := (ablations or {}).get(name):
                tables.append(_ablation(runs, name, base, chief, shown, titles))
        trivial = baselines[baselines["dataset"] == dataset] if baselines is not None else ()
        if len(trivial):
            known = (
                validation[validation["dataset"] == dataset] if validation is not None else runs[:0]
            )
            tables.append(_baselines(runs, trivial, known, shown, titles))
        costs = {
            network: profile
            for (data, network), profile in (profiles or {}).items()
            if data == dataset
        }
        if costs:
            teachers = runs[runs["method"] == TEACHER]["network"]
            tables.append(_costs(dataset, costs, next(iter(teachers), None), titles))
        out.append((title(dataset, titles), tables))
    return out


def metric_cells(
    rows: pd.DataFrame, methods: Iterable[str], keys: Sequence[str], digits: Mapping[str, int]
) -> dict[str, list[Cell]]:
    """Return for every method the cells of its metrics; of several methods the best are bold.

    Args:
        rows: columns `summary.SUMMARY_COLUMNS`, of one network and segmenter.
        methods: those that are compared.
        keys: metrics.
        digits: of every metric, after the point.
    """
    mean, std = (
        rows.pivot(index="method", columns="metric", values=value) for value in ("mean", "std")
    )
    shown = [method for method in methods if method in mean.index]
    out: dict[str, list[Cell]] = {method: [] for method in shown}
    for key in keys:
        values = mean.loc[shown, key]
        best = values.max() if METRICS[key].better == "higher" else values.min()
        for method, value in values.items():
            d = digits[key]
            # what reads the same is as good
            top = len(shown) > 1 and f"{value:.{d}f}" == f"{best:.{d}f}"
            out[method].append(Cell(number(value, std.loc[method, key], d), top))
    return out


def gap_cell(pair: pd.Series) -> Cell:
    """Return the share of the gap that a method closes; `pair` is a row of `summary.compare`."""
    share, spread = 100 * pair["gap_closed"], 100 * pair["gap_closed_std"]
    return Cell(f"{number(share, spread, 0)} %" if np.isfinite(share) else NO_GAP)


def gap_notes(runs: pd.DataFrame, main: str, groups: Iterable[list[list[Cell]]]) -> list[str]:
    """Explain why a share of the gap is left out, if it is in one of the rows."""
    if NO_GAP not in (cell.text for group in groups for row in group for cell in row):
        return []
    several = runs.groupby("method")["seed"].nunique().max() > 1
    noise = f" and {NOISE} standard deviations over seeds" * bool(several)
    why = (
        f"no teacher is better than the plain student by at least {least_gap(main):g} "
        f"{METRICS[main].title}{noise}"
    )
    return [f"{NO_GAP} Not defined: {why}."]


def p_cells(pair: pd.Series, tests: Iterable[str]) -> list[Cell]:
    """Return p of some of the tests `images` and `seeds`, with a star for what stays significant
    after correction.
    """
    return [
        Cell(p_value(pair[f"p_{test}"]) + "*" * bool(pair[f"p_{test}_holm"] < SIGNIFICANT))
        for test in tests
    ]


def tests_of(runs: pd.DataFrame) -> list[str]:
    """Return which tests the runs allow: over `images`, over `seeds`, both or none."""
    students = runs[runs["method"] != TEACHER]
    return [
        test
        for test, n in (("images", images_of(students)[0]), ("seeds", students["seed"].nunique()))
        if n > 1
    ]


def digits_of(rows: pd.DataFrame, keys: Iterable[str]) -> dict[str, int]:
    """Return how many digits after the point the metrics of a summary have."""
    return {key: 3 if rows[rows["metric"] == key]["mean"].abs().max() < 10 else 1 for key in keys}


def description(runs: pd.DataFrame, titles: Titles, budget: str) -> str:
    """Say what runs on one dataset have in common: dataset, split, images, seeds, training."""
    dataset, (images, empty) = runs["dataset"].iloc[0], images_of(runs)
    facts = [f"{title(dataset, titles)}, test split, {images} image{'s' * (images != 1)}"]
    facts[0] += f" with objects and {empty} without" * bool(empty)
    for role, chosen in (
        ("students", runs["method"] != TEACHER),
        ("teacher", runs["method"] == TEACHER),
    ):
        if seeds := sorted(set(runs[chosen]["seed"])):
            role += "s" * (role == "teacher" and runs[chosen]["network"].nunique() > 1)
            facts.append(f"{role}: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    return "; ".join([*facts, budget] if budget else facts)


def notes_on(runs: pd.DataFrame, difference: str = "") -> list[str]:
    """Explain the numbers of a table of runs on one dataset and, if it has any, its differences and
    their tests.

    Args:
        runs: columns `io.METRIC_COLUMNS`.
        difference: its name and what it is, `Δ AJI: difference to ...`.
    """
    notes, tests = [], tests_of(runs) if difference else ()
    (images, empty), blocks = images_of(runs), runs["segmenter"].nunique()
    seeds = runs[runs["method"] != TEACHER]["seed"].nunique()
    if blocks > 1:
        notes.append(
            "Blocks of rows: what makes objects of the affinities; the networks are the same."
        )
    if max(seeds, runs[runs["method"] == TEACHER]["seed"].nunique()) > 1:
        first = "Mean over images, then mean" if images > 1 else "Mean"
        notes.append(f"{first} ± sample standard deviation over seeds.")
    if seeds == 1:
        notes.append(
            "One seed: there is no standard deviation, and another seed may change the order."
        )
    if images == 1:
        notes.append(
            "One image: there is no test over images, and another image may change the order."
        )
    if empty:
        notes.append(
            "Means and tests are over the images with objects; what was found in the others has a "
            "table of its own."
        )
    if difference:
        notes.append(f"{difference}, paired by seed.")
    name = difference.partition(":")[0]
    if "images" in tests:
        notes.append(
            f"p (images): two-sided Wilcoxon signed-rank test of {name} over the {images} images "
            "(averaged over seeds); it speaks of these trained networks, not of other seeds."
            + (
                f" With {images} images it cannot be below {p_value(2 / 2**images)}."
                if images < 6
                else ""
            )
        )
    if "seeds" in tests:
        notes.append(
            f"p (seeds): two-sided paired t test of {name} over the {seeds} seeds (averaged over "
            "images)"
            + ("; with so few, only large and steady differences show." if seeds < 6 else ".")
        )
    if tests:
        of_ablations = ", those of an ablation among themselves" * any(
            map(ablation_of, runs["method"].unique())
        )
        notes.append(
            f"*: below {SIGNIFICANT} also after Holm's correction for the number of methods that "
            f"are compared with one student{of_ablations}."
        )
    return notes


def _results(
    runs: pd.DataFrame,
    main: str,
    keys: Sequence[str],
    titles: Titles,
    budget: str,
    ablations: Mapping[str, str],
    images: Mapping[str, str] | None,
) -> Table:
    """Lay out the results on one dataset, one block of rows per segmenter.

    The values of an ablation are a block too. Which images each method has learned from stands
    there if some were unlabelled.
    """
    rows, name = summarise(runs), METRICS[main].title
    paired = compare(one_metric(runs, main)).set_index(["segmenter", "student", "method"])
    digits, tests = digits_of(rows, (*keys, main)), tests_of(runs)
    header = [
        "network",
        "method",
        *["images"] * bool(images),
        *map(metric_title, keys),
        f"Δ {name}",
        "gap closed",
        *(f"p ({t})" for t in tests),
    ]
    groups: list[list[list[Cell]]] = []
    blocks = rows.groupby("segmenter", sort=False)
    for segmenter, block in blocks:
        heading = [[Cell(title(segmenter, titles))]] if len(blocks) > 1 else []
        roles = block[block["method"] == TEACHER], block[block["method"] != TEACHER]
        for student, of_student in (
            item for role in roles for item in role.groupby("student", sort=False)
        ):
            for ablation, part in of_student.groupby(
                of_student["method"].map(ablation_of), sort=False
            ):
                group = []
                if ablation:
                    base = (
                        f" of {title(ablations[ablation], titles)}" if ablation in ablations else ""
                    )
                    heading = [*heading, [Cell(f"ablation{base}: {title(ablation, titles)}")]]
                # Stable: the plain student first, the others as they came.
                methods = sorted(part["method"].unique(), key=lambda method: method != NONE)
                for method, cells in metric_cells(part, methods, keys, digits).items():
                    extra = [Cell("")] * (2 + len(tests))
                    if (segmenter, student, method) in paired.index:
                        pair = paired.loc[(segmenter, student, method)]
                        difference = number(
                            pair["difference"], pair["difference_std"], digits[main], "+"
                        )
                        extra = [Cell(difference), gap_cell(pair), *p_cells(pair, tests)]
                    names = (
                        Cell("" if group else title(student, titles)),
                        Cell(title(method, titles)),
                        *([Cell(images.get(method, "–"))] if images else []),
                    )
                    group.append([*names, *cells, *extra])
                groups.append(heading + group)
                heading = []

    notes = notes_on(
        runs, f"Δ {name}: difference to the student without distillation" * (len(paired) > 0)
    )
    if len(paired):
        several = any(len(row) == 1 for group in groups for row in group)
        notes.insert(0, f"Bold: best of each student{' in its block' * several}.")
        notes.append(
            "Gap closed: (method − student) / (teacher − student)" + _own_teacher(runs) + "."
        )
    notes += gap_notes(runs, main, groups)
    if images:
        notes.append("Images: labelled ones, and unlabelled ones, that the network learned from.")
    return Table(
        runs["dataset"].iloc[0],
        f"{description(runs, titles, budget)}.",
        header,
        groups,
        notes,
        names=2,
    )


def false_tables(runs: pd.DataFrame, titles: Titles) -> list[Table]:
    """Lay out what every network found in the test images of one dataset that have no objects.

    No table if all have some.
    """
    dataset, (_, empty) = runs["dataset"].iloc[0], images_of(runs)
    if not empty:
        return []
    rows = summarise(runs)
    rows = rows[rows["metric"].isin(FALSE)]
    pixels = runs[is_empty(runs) & (runs["metric"] == "pixels")]["value"].mean()
    groups = []
    blocks = rows.groupby("segmenter", sort=False)
    for segmenter, block in blocks:
        heading = [[Cell(title(segmenter, titles))]] if len(blocks) > 1 else []
        for student, part in block.groupby("student", sort=False):
            group: list[list[Cell]] = []
            for method, found in part.groupby("method", sort=False):
                (count, spread), (area, wide) = (
                    found.set_index("metric").loc[[*FALSE], ["mean", "std"]].to_numpy()
                )
                share = f" ({100 * area / pixels:.1f} %)"
                names = "" if group else title(student, titles), title(method, titles)
                texts = *names, number(count, spread, 1), number(area, wide, 0) + share
                group.append([Cell(text) for text in texts])
            groups.append(heading + group)
            heading = []
    images = f"the {empty} test images" if empty > 1 else "the test image"
    caption = f"What was found in {images} of {title(dataset, titles)} without objects"
    caption += "; means over these images" * (empty > 1)
    caption += (
        ", then mean ± sample standard deviation over seeds" * bool(rows["n"].max() > 1) + "."
    )
    header = ["network", "method", "objects ↓", "their pixels ↓"]
    return [Table(f"{dataset}-empty", caption, header, groups, [], names=2)]


def _own_teacher(runs: pd.DataFrame) -> str:
    return ", with the teacher that the method learned from" * any(
        map(named_teacher, runs["method"].unique())
    )


def _ablation(
    runs: pd.DataFrame, ablation: str, base: str, main: str, keys: Sequence[str], titles: Titles
) -> Table:
    """Lay out one ablation on one dataset: every value of a setting of the method `base`, compared
    with that method.
    """
    values = [method for method in runs["method"].unique() if ablation_of(method) == ablation]
    runs = runs[runs["method"].isin([NONE, base, *values])]
    rows, name, tests = summarise(runs), METRICS[main].title, tests_of(runs)
    paired = compare(one_metric(runs, main)[lambda rows: rows["method"] != NONE], base)
    paired = paired.set_index(["segmenter", "student", "method"])
    digits = digits_of(rows, (*keys, main))
    groups = []
    blocks = rows.groupby("segmenter", sort=False)
    for segmenter, block in blocks:
        heading = [[Cell(title(segmenter, titles))]] if len(blocks) > 1 else []
        for student, part in block.groupby("student", sort=False):
            group: list[list[Cell]] = []
            for method, cells in metric_cells(part, [NONE, base, *values], keys, digits).items():
                extra = [Cell("")] * (1 + len(tests))
                if (segmenter, student, method) in paired.index:
                    pair = paired.loc[(segmenter, student, method)]
                    difference = number(
                        pair["difference"], pair["difference_std"], digits[main], "+"
                    )
                    extra = [Cell(difference), *p_cells(pair, tests)]
                setting = method.partition("=")[2] if method in values else title(method, titles)
                group.append(
                    [Cell("" if group else title(student, titles)), Cell(setting), *cells, *extra]
                )
            groups.append(heading + group)
            heading = []
    notes = notes_on(runs, f"Δ {name}: difference to {title(base, titles)}" * (len(paired) > 0))
    header = [
        "network",
        title(ablation, titles),
        *map(metric_title, keys),
        f"Δ {name}",
        *(f"p ({t})" for t in tests),
    ]
    dataset = runs["dataset"].iloc[0]
    caption = (
        f"Ablation of {title(base, titles)} on {title(dataset, titles)}: {title(ablation, titles)}."
    )
    return Table(f"{dataset}-{ablation}", caption, header, groups, notes, names=2)


def _baselines(
    runs: pd.DataFrame,
    trivial: pd.DataFrame,
    validation: pd.DataFrame,
    keys: Sequence[str],
    titles: Titles,
) -> Table:
    """Lay out what needs no network beside what the teachers give, on the validation and test
    splits of one dataset.
    """
    runs, trivial = meant(runs), meant(trivial)
    dataset, segmenters = runs["dataset"].iloc[0], runs["segmenter"].unique()
    networks = runs[runs["method"] == TEACHER]["network"].unique()
    teacher = pd.concat(
        [validation.assign(split="val"), runs[runs["method"] == TEACHER].assign(split="test")]
    )
    names = {
        (network, segmenter): title(TEACHER, titles)
        + f" {title(network, titles)}" * (len(networks) > 1)
        + f", {title(segmenter, titles)}" * (len(segmenters) > 1)
        for network in networks
        for segmenter in segmenters
    }
    if len(networks) == 1:  # given weights know another name of it
        teacher = teacher.assign(network=networks[0])
    of = zip(teacher["network"], teacher["segmenter"], strict=True)
    teacher = teacher.assign(row=[names.get(one) for one in of]).dropna(subset="row")
    trivial = trivial.assign(row=[title(name, titles) for name in trivial["baseline"]])
    columns = pd.MultiIndex.from_product([keys, ("val", "test")])
    both = pd.concat([trivial, teacher])
    means = both.pivot_table(index="row", columns=["metric", "split"], values="value").reindex(
        columns=columns
    )
    parts = (
        trivial["row"].unique(),
        [name for name in names.values() if name in set(teacher["row"])],
    )
    groups = [[[Cell(row)] for row in part] for part in parts if len(part)]
    for key, split in columns:
        column = means[key, split]
        digits = 1 if column.abs().max() >= 10 else 3
        for row in (row for group in groups for row in group):
            value = column[row[0].text]
            row.append(Cell(number(value, digits=digits) if np.isfinite(value) else "–"))
    return Table(
        f"{dataset}-baselines",
        f"Trivial baselines and the teacher on {title(dataset, titles)}; means over images, of the "
        "teacher over seeds too.",
        ["segmented by", *(f"{metric_title(key)}\n{split}" for key, split in columns)],
        groups,
        ["Segmentation parameters were tuned on val, which flatters the teacher there."],
        names=1,
    )


def _costs(
    dataset: str, costs: Mapping[str, Mapping[str, Any]], teacher: str | None, titles: Titles
) -> Table:
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
            text = "–" if value is None else significant(value * factor)
            share = (
                f" ({_percent(100 * value / whole)} %)"
                if key in shares and value and whole and network != teacher
                else ""
            )
            cells.append(text + share)
        group.append([Cell(cell) for cell in cells])
    caption = (
        f"Cost of the networks on one image of {title(dataset, titles)}: "
        f"{measured_on(costs.values())}."
    ) + (" In parentheses: share of the teacher's." if teacher in costs else "")
    return Table(f"{dataset}-cost", caption, ["network", *columns], [group], [], names=1)


def _percent(share: float) -> str:
    return f"{share:.2g}" if share < 99.5 else f"{share:.0f}"


def _images_of(
    labelled: Path | str, unlabelled: Path | str, methods: Mapping[str, bool]
) -> dict[str, str]:
    """Return from how many images each method has learned, `5 + 20` where some were unlabelled."""
    own, more = (io.read_attrs(path)["samples"] for path in (labelled, unlabelled))
    return {name: f"{own} + {more}" if both else f"{own}" for name, both in methods.items()}


def table_markdown(metrics: pd.DataFrame, profiles: Profiles | None = None, **layout: Any) -> str:
    """Return the results as Markdown.

    Args:
        metrics: columns `io.METRIC_COLUMNS`.
        profiles: (dataset, network) to profile; leave it out for no table of costs.
        layout: `keys`, the metrics to show, `main`, the metric of differences, gap and p, and
            `budget`, a text about the training for the caption: each for all datasets or, as a
            mapping, for every one of them; `titles` of datasets, networks, methods, segmenters,
            baselines and ablations; `ablations`, name to the method that is changed; `baselines`
            and `validation`, frames of `read_baselines` and `read_validation`, for a table that
            sets the teacher beside trivial baselines; `images`, by dataset and method from how many
            images it has learned, for datasets with unlabelled ones.
    """
    return markup.markdown(result_tables(metrics, profiles, **layout))


def table_tex(metrics: pd.DataFrame, profiles: Profiles | None = None, **layout: Any) -> str:
    """Return the results as LaTeX tables (package `booktabs`).

    The arguments are those of `table_markdown`.
    """
    return markup.tex(result_tables(metrics, profiles, **layout))


def write(
    metrics: Iterable[Path | str],
    profiles: Iterable[Path | str],
    *,
    summary: Path | str,
    comparison: Path | str,
    markdown: Path | str,
    tex: Path | str,
    html: Path | str | None = None,
    baselines: Iterable[Path | str] = (),
    weights: Iterable[Path | str] = (),
    images: Mapping[str, tuple[Path | str, Path | str, Mapping[str, bool]]] | None = None,
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
        html: where they go as a page.
        baselines: files with the columns `summary.BASELINE_COLUMNS`; leave them out for no table of
            baselines.
        weights: weights of the teachers, whose headers say what they reached on validation images.
        images: of datasets with unlabelled images the samples files of these and of the labelled
            ones, labelled ones first, and for every method whether it has seen both.
        layout: as for `table_markdown`.
    """
    frame, costs = read_metrics(metrics), read_profiles(profiles)
    layout |= {"baselines": read_baselines(baselines), "validation": read_validation(weights)}
    layout["images"] = {name: _images_of(*about) for name, about in (images or {}).items()}
    for path, table in ((summary, summarise(frame)), (comparison, compare(frame))):
        # an empty field where there is no number
        rows = table.astype(object).where(table.notna(), "")
        io.write_rows(path, table.columns, rows.itertuples(index=False))
    found = result_tables(frame, costs, **layout)
    io.write_text(markdown, markup.markdown(found))
    io.write_text(tex, markup.tex(found))
    if html:
        io.write_text(html, markup.page("Results", markup.html(found)))
