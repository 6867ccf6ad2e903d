"""`docs/performance.md` and its figure, from the JSON file of `python -m benchmarks`."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.patches import Patch

from gdlib import io
from gdlib.report.figures.style import PAGE, STYLE, new_figure, save
from gdlib.report.names import SPARE

TITLES = {
    "losses": "Loss terms, forward and backward",
    "targets": "What networks learn from a label",
    "data": "Augmented patches",
    "train": "A step of training",
    "inference": "Networks, and an image from file to file",
    "segmentation": "From affinities to instances",
    "metrics": "Metrics",
    "workflow": "Start of a job",
    "scale": "Scale",
}
INTRODUCTION = """\
# Performance

Made by `python -m benchmarks page --json docs/{source}` from what
`python -m benchmarks {command} --json docs/{source}` measured, on each of these machines:

{machines}

Every case runs beside a plain implementation of the same (`benchmarks/`): loops over instances,
whole matrices of pairs, one call of another library. The two take turns in one process, and neither
is timed unless their results agree. Times are medians, with quartiles in brackets; memory is what a
call takes on top of what was held before it. Ratios carry over to other machines better than times.
A processor without units for bfloat16 computes in float32; `--precision float32` measures that on
one that has them. gdlib 0.1.0 had its loops in C++, where they are compiled by Numba since.
{smaller}"""
MISSING = "not measured yet"
Machine = dict[str, Any]  # what `benchmarks.bench.measure` returns
Machines = Sequence[Machine]


def write(machines: Machines, target: Path) -> None:
    """Write the page, and its figure into `figures/` beside it.

    Args:
        machines: from the JSON file.
        target: where the page goes, e.g. `docs/performance.md`.
    """
    names = headings(machines)
    picture = draw(machines, names, files(target)[1].with_suffix(""))
    parts = [
        introduction(machines, names, target),
        f"![Ratios and growth of cost](figures/{picture.name})\n",
    ]
    parts.append(targets(machines, names))
    for group in TITLES:
        found = [{r["name"]: r for r in one["results"] if r["group"] == group} for one in machines]
        if any(found):
            parts.append(
                f"## {TITLES[group]}\n\n" + (growth if group == "scale" else cases)(found, names)
            )
    io.write_text(target, "\n".join(parts))


def headings(machines: Machines) -> list[str]:
    """Return a short name for each machine, all different."""
    names = []
    for one in machines:
        name = re.sub(r"\((R|TM)\)| Processor| CPU.*", "", one["device_name"]).strip()
        names.append(f"{name}, {one['precision']}")
    several = {name for name in names if names.count(name) > 1}
    return [
        f"{name}, {one['threads']} threads" * (name in several) or name
        for name, one in zip(names, machines, strict=True)
    ]


def introduction(machines: Machines, names: Sequence[str], target: Path) -> str:
    """Say what was measured where."""
    groups = [group for group in TITLES if any(group in one["loads"] for one in machines)]
    size = machines[0]["size"]
    command = (
        "all" if len(groups) == len(TITLES) else " and ".join(groups)
    ) + f" --size {size}" * (size != "full")
    rows = []
    for name, one in zip(names, machines, strict=True):
        device = one["device_name"] + f" beside {one['cpu']}" * (one["device"] != "cpu")
        loads = sorted(
            {f"{load:.1f}" for load in one["loads"].values() if load is not None}, key=float
        )
        versions = [f"gdlib {one['gdlib']}", f"Python {one['python']}"]
        versions += [f"{library} {version}" for library, version in one["libraries"].items()]
        units = ", ".join(one["bfloat16_units"]) or "none"
        load = (
            " to ".join(dict.fromkeys((loads[0], loads[-1])))
            if loads
            else "not known"
            if one["loads"]
            else MISSING
        )
        rows.append(
            (name, device, units, one["precision"], str(one["threads"]), load, ", ".join(versions))
        )
    head = (
        "machine",
        "processor",
        "units for bfloat16",
        "networks in",
        "threads",
        "load before",
        "software",
    )
    smaller = (
        "" if size == "full" else ("Cases are smaller than those that the targets were set for.\n")
    )
    return INTRODUCTION.format(
        source=f"{target.stem}.json",
        command=command,
        machines=table(head, "llllrrl", rows),
        smaller=smaller,
    )


def table(head: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; `align` has one `l` or `r` for each column."""
    lines = [head, [{"l": "---", "r": "---:"}[side] for side in align], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def number(value: float | None, unit: str = "") -> str:
    """Return a number of three digits.

    >>> number(1234.5), number(0.01234), number(None)
    ('1,234', '0.0123', '')
    """
    if value is None:
        return ""
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit


def union(found: Iterable[Iterable[str]]) -> list[str]:
    """Return all names of several lists, each once, in their order."""
    return list(dict.fromkeys(name for names in found for name in names))


def targets(machines: Machines, names: Sequence[str]) -> str:
    """Return the table of targets."""
    found = [{target["text"]: target for target in one["targets"]} for one in machines]
    rows: list[tuple[str, ...]] = []
    floors: dict[tuple[str, str], list[str]] = {}
    for text in union(found):
        known = [one.get(text) for one in found]
        first = next(filter(None, known))
        limit = f"{'≥' if first['at_least'] else '≤'} {number(first['limit'], first['unit'])}"
        values = []
        for name, one in zip(names, known, strict=True):
            value = number(one["value"], one["unit"]) if one else MISSING
            values.append(value if one is None or one["met"] else f"**{value}, not met**")
            if one and one["floor"]:
                floors.setdefault((name, one["floor"]), []).append(text)
        rows.append((text, limit, *values))
    met = [
        f"{sum(target['met'] for target in one.values())} of {len(one)} are met by {name}"
        if one
        else f"{name}: {MISSING}"
        for one, name in zip(found, names, strict=True)
    ]
    out = f"## Targets\n\n{'; '.join(met)}.\n\n" + table(
        ("target", "limit", *names), "lr" + "r" * len(names), rows
    )
    if floors:
        lines = [
            f"* {'; '.join(texts)}, on {name}: {floor}." for (name, floor), texts in floors.items()
        ]
        out += "\nWhat no implementation on the machine can be below:\n\n" + "\n".join(lines) + "\n"
    return out


Found = Sequence[dict[str, dict[str, Any]]]  # for each machine, results by name


def of_each(names: Sequence[str], *columns: str) -> list[str]:
    """Return the heads of columns that every machine has."""
    return [
        f"{name}: {column}" if len(names) > 1 else column for name in names for column in columns
    ]


def cases(found: Found, names: Sequence[str]) -> str:
    """Return the table of one group; memory is that of the first machine that has the case."""

    def time(ms: float | None, spread: Sequence[float] | None) -> str:
        return "" if ms is None else f"{number(ms)} [{number(spread[0])}, {number(spread[1])}]"

    rows = []
    for name in union(found):
        cells = []
        for one in (machine.get(name) for machine in found):
            mine = (
                (
                    time(one["ms"], one["ms_spread"]),
                    time(one["reference_ms"], one["reference_ms_spread"]),
                )
                if one
                else ()
            )
            cells += [*mine, number(one["ratio"])] if one else [MISSING, "", ""]
        first = next(machine[name] for machine in found if name in machine)
        rows.append((name, *cells, number(first["peak_mib"]), number(first["reference_peak_mib"])))
    head = ("case", *of_each(names, "ms", "reference, ms", "ratio"), "MiB", "reference, MiB")
    text = table(head, "l" + "rrr" * len(names) + "rr", rows)
    results = [result for machine in found for result in machine.values()]
    if about := dict.fromkeys(
        result["about"] for result in results if result["reference_ms"] is not None
    ):
        text += f"\nReference: {'; '.join(about)}.\n"
    notes = {
        "10^9 operations per second": lambda r: (
            f"{r['name']} {number(r['gflop_per_s'])} ({r.get('engine', 'torch')}, {r['precision']})"
            if "gflop_per_s" in r
            else ""
        ),
        "Import torch": lambda r: r["name"].removeprefix("step ") if r.get("imports_torch") else "",
        "Mean AJI": lambda r: (
            f"{r['name']} {r['aji']:.3f} (reference {r['reference_aji']:.3f})" if "aji" in r else ""
        ),
    }
    for title, note in notes.items():
        said = [", ".join(filter(None, map(note, machine.values()))) for machine in found]
        for name, one in zip(names, said, strict=True):
            if one and len(set(filter(None, said))) > 1:
                text += f"\n{title}, {name}: {one}.\n"
        if len(set(filter(None, said))) == 1:
            text += f"\n{title}: {next(filter(None, said))}.\n"
    return text


def growth(found: Found, names: Sequence[str]) -> str:
    """Return the tables of exponents and of what fits into memory."""
    slopes, fits = [], []
    for name in union(found):
        known = [machine.get(name) for machine in found]
        first = next(filter(None, known))
        if "slope" in first:
            sizes = " → ".join(" x ".join(map(str, size)) for size in first["sizes"])
            cells = [
                (" → ".join(map(number, one["ms_by_size"])), f"{one['slope']:.2f}")
                if one
                else (MISSING, "")
                for one in known
            ]
            slopes.append((name, sizes, f"{first['expected']:g}", *sum(cells, ())))
        if "most_in_24_gib" in first:
            cells = [
                (number(one["mib_per_unit"]), number(one["most_in_24_gib"]))
                if one
                else (MISSING, "")
                for one in known
            ]
            fits.append((name, first["unit"], *sum(cells, ()), first["about"]))
    text = (
        "Exponent p of cost ~ size^p, fitted on a doubly logarithmic scale; below the order, "
        "fixed costs still show.\n\n"
    )
    text += table(
        ("cost", "sizes", "order", *of_each(names, "ms", "p")), "llr" + "lr" * len(names), slopes
    )
    if fits:
        text += (
            "\nMemory, and how much of it 24 GiB hold, by the line through two measured sizes:\n\n"
        )
        head = ("what", "unit", *of_each(names, "MiB per unit", "units in 24 GiB"), "of what")
        text += table(head, "ll" + "rr" * len(names) + "l", fits)
    return text


def files(target: Path) -> tuple[Path, Path]:
    """Return what is written for a page: it, and its figure."""
    return target, target.parent / "figures" / f"{target.stem}.png"


def is_page(target: Path) -> bool:
    """Was this page made here?"""
    return target.is_file() and "\nMade by `python -m benchmarks page" in target.read_text(
        errors="replace"
    )


def draw(machines: Machines, names: Sequence[str], stem: Path) -> Path:
    """Draw ratios as bars, those of other machines than the first as marks, and growth as lines, of
    the first.

    Args:
        machines: from the JSON file.
        names: of the machines.
        stem: path of the figure without its ending.
    """
    first, *others = machines
    bars = [
        result
        for result in first["results"]
        if result["ratio"] and result["group"] not in ("workflow", "train")
    ]
    lines = [result for result in first["results"] if "slope" in result]
    with mpl.rc_context(STYLE):
        figure = new_figure(PAGE, max(2.4, 0.17 * len(bars) + 0.6))
        axes = figure.subplots(
            1, 1 + bool(lines), squeeze=False, width_ratios=[3, 2][: 1 + bool(lines)]
        )[0]
        colours = dict(zip(TITLES, (*SPARE, "#7a7a7a", "#0072B2", "#D55E00"), strict=True))
        axes[0].barh(
            range(len(bars)),
            [b["ratio"] for b in bars],
            color=[colours[b["group"]] for b in bars],
            height=0.7,
        )
        axes[0].set_yticks(
            range(len(bars)), [f"{b['group']}: {b['name']}" for b in bars], fontsize=5.5
        )
        for k, bar in enumerate(bars):
            axes[0].text(bar["ratio"], k, f" {number(bar['ratio'])}", va="center", fontsize=5.5)
        for one, name, marker in zip(others, names[1:], "DovsP", strict=False):
            ratios = {(r["group"], r["name"]): r["ratio"] for r in one["results"] if r["ratio"]}
            places = [
                (ratios[key], k)
                for k, bar in enumerate(bars)
                if (key := (bar["group"], bar["name"])) in ratios
            ]
            if places:
                axes[0].plot(
                    *zip(*places, strict=True),
                    marker,
                    color="black",
                    markersize=2.5,
                    linestyle="none",
                    label=name,
                )
        if others:
            handles = [
                Patch(color="#7a7a7a", label=names[0]),
                *axes[0].get_legend_handles_labels()[0],
            ]
            figure.legend(handles=handles, loc="outside upper center", ncols=len(names), fontsize=6)
        axes[0].set_xscale("log")
        axes[0].invert_yaxis()
        axes[0].axvline(1, color="black", linewidth=0.6)
        axes[0].margins(x=0.12)
        axes[0].set_xlabel("times faster than the reference")
        for k, line in enumerate(lines):
            amount = [math.prod(size) for size in line["sizes"]]
            axes[1].loglog(
                [a / amount[0] for a in amount],
                [ms / line["ms_by_size"][0] for ms in line["ms_by_size"]],
                "o-",
                markersize=2.5,
                color=f"C{k}",
                label=f"{line['name']}: {line['slope']:.2f} ({line['expected']:g})",
            )
        if lines:
            axes[1].set(xlabel="size against the smallest", ylabel="time against the smallest")
            low, high = axes[1].get_ylim()
            axes[1].set_ylim(low, high * (high / low) ** 0.6)  # room for the legend
            axes[1].legend(
                loc="upper left",
                fontsize=5,
                title="measured exponent (expected)",
                title_fontsize=5.5,
            )
    return save(figure, stem, ("png",))[0]
