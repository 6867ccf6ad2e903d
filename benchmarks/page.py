"""`docs/performance.md` and its figure, from the JSON file of `gdlib bench`."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from gdlib import io
from gdlib.report.style import PAGE, SPARE, STYLE, new_figure, save

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

Made by `gdlib bench page --json docs/{source}` from what `gdlib bench {command} --json docs/{source}` measured. Every case
runs beside a plain implementation of the same (`benchmarks/`): loops over instances, whole matrices of pairs, one call of another
library. The two take turns in one process, and neither is timed unless their results agree. Times are medians, with quartiles in
brackets; memory is what a call takes on top of what was held before it. Ratios carry over to other machines better than times.
"""


def write(found: dict[str, Any], target: Path) -> None:
    """Write the page, and its figure into `figures/` beside it.

    Args:
        found: content of the JSON file.
        target: where the page goes, e.g. `docs/performance.md`.
    """
    picture = draw(found["results"], files(target)[1].with_suffix(""))
    parts = [introduction(found, target), f"![Ratios and growth of cost](figures/{picture.name})\n", targets(found)]
    for group in dict.fromkeys(result["group"] for result in found["results"]):
        chosen = [result for result in found["results"] if result["group"] == group]
        parts.append(f"## {TITLES[group]}\n\n" + (growth(chosen) if group == "scale" else cases(chosen)))
    io.write_text(target, "\n".join(parts))


def files(target: Path) -> tuple[Path, Path]:
    """Return what is written for a page: it, and its figure."""
    return target, target.parent / "figures" / f"{target.stem}.png"


def is_page(target: Path) -> bool:
    """Was this page made here?"""
    return target.is_file() and "\nMade by `gdlib bench page" in target.read_text(errors="replace")


def introduction(found: dict[str, Any], target: Path) -> str:
    """Say what was measured where."""
    groups = list(dict.fromkeys(result["group"] for result in found["results"]))
    command = "all" if set(groups) == set(TITLES) else " and ".join(groups)
    command += "" if found["size"] == "full" else f" --size {found['size']}"
    command += "" if found["device"] == "cpu" else f" --device {found['device']}"
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    load = f", load of the machine before {found['load']:.1f}" if found.get("load") is not None else ""
    smaller = "" if found["size"] == "full" else "Cases are smaller than those that the targets were set for.\n"
    where = f"Measured on {found['device_name']}"
    where += f" beside {found['cpu']}" if found["device"] != "cpu" else ""
    where += f", threads: {found['threads']}{load}"
    return (
        INTRODUCTION.format(source=f"{target.stem}.json", command=command)
        + f"\n{where}. gdlib {found['gdlib']}, Python {found['python']}, {libraries}.\n{smaller}"
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


def targets(found: dict[str, Any]) -> str:
    """Return the table of targets."""
    rows = [
        (
            target["text"],
            f"{'≥' if target['at_least'] else '≤'} {number(target['limit'], target['unit'])}",
            number(target["value"], target["unit"]),
            "met" if target["met"] else "**not met**",
            target["floor"] or "",
        )
        for target in found["targets"]
    ]
    met = sum(target["met"] for target in found["targets"])
    text = f"## Targets\n\n{met} of {len(rows)} are met. A floor is what no implementation on this machine can be below.\n\n"
    return text + table(("target", "limit", "measured", "", "floor"), "lrrll", rows)


def cases(results: Sequence[dict[str, Any]]) -> str:
    """Return the table of one group."""

    def time(ms: float | None, spread: Sequence[float] | None) -> str:
        return "" if ms is None else f"{number(ms)} [{number(spread[0])}, {number(spread[1])}]"

    rows = [
        (
            result["name"],
            time(result["ms"], result["ms_spread"]),
            time(result["reference_ms"], result["reference_ms_spread"]),
            number(result["ratio"]),
            number(result["peak_mib"]),
            number(result["reference_peak_mib"]),
        )
        for result in results
    ]
    head = ("case", "ms", "reference, ms", "ratio", "MiB", "reference, MiB")
    about = dict.fromkeys(result["about"] for result in results if result["reference_ms"] is not None)
    note = f"\nReference: {'; '.join(about)}.\n" if about else ""
    accuracy = [
        f"{result['name']} {result['aji']:.3f} (reference {result['reference_aji']:.3f})"
        for result in results
        if "aji" in result
    ]
    speeds = [
        f"{r['name']} {number(r['gflop_per_s'])} ({r.get('engine', 'torch')}, {r['precision']})"
        for r in results
        if "gflop_per_s" in r
    ]
    note += f"\n10^9 operations per second: {', '.join(speeds)}.\n" if speeds else ""
    heavy = [result["name"].removeprefix("step ") for result in results if result.get("imports_torch")]
    note += f"\nImport torch: {', '.join(heavy)}.\n" if heavy else ""
    note += f"\nMean AJI: {', '.join(accuracy)}.\n" if accuracy else ""
    return table(head, "lrrrrr", rows) + note


def growth(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of exponents and of what fits into memory."""
    slopes = [
        (
            result["name"],
            " → ".join(" x ".join(map(str, size)) for size in result["sizes"]),
            " → ".join(number(ms) for ms in result["ms_by_size"]),
            f"{result['slope']:.2f}",
            f"{result['expected']:g}",
        )
        for result in results
        if "slope" in result
    ]
    fits = [
        (
            result["name"],
            number(result["mib_per_unit"]),
            result["unit"],
            number(result["most_in_24_gib"]),
            result["about"],
        )
        for result in results
        if "most_in_24_gib" in result
    ]
    text = "Exponent p of cost ~ size^p, fitted on a doubly logarithmic scale; below the order, fixed costs still show.\n\n"
    text += table(("cost", "sizes", "ms", "p", "order"), "lllrr", slopes)
    if fits:
        text += "\nMemory, and how much of it 24 GiB hold, by the line through two measured sizes:\n\n"
        text += table(("what", "MiB per unit", "unit", "units in 24 GiB", "of what"), "lrlrl", fits)
    return text


def draw(results: Sequence[dict[str, Any]], stem: Path) -> Path:
    """Draw ratios as bars, and growth as lines.

    Args:
        results: of the JSON file.
        stem: path of the figure without its ending.
    """
    bars = [result for result in results if result["ratio"] and result["group"] not in ("workflow", "train")]
    lines = [result for result in results if "slope" in result]
    with mpl.rc_context(STYLE):
        figure = new_figure(PAGE, max(2.4, 0.17 * len(bars) + 0.6))
        axes = figure.subplots(1, 1 + bool(lines), squeeze=False, width_ratios=[3, 2][: 1 + bool(lines)])[0]
        colours = dict(zip(TITLES, (*SPARE, "#7a7a7a", "#0072B2", "#D55E00"), strict=True))
        axes[0].barh(
            range(len(bars)), [b["ratio"] for b in bars], color=[colours[b["group"]] for b in bars], height=0.7
        )
        axes[0].set_yticks(range(len(bars)), [f"{b['group']}: {b['name']}" for b in bars], fontsize=5.5)
        for k, bar in enumerate(bars):
            axes[0].text(bar["ratio"], k, f" {number(bar['ratio'])}", va="center", fontsize=5.5)
        axes[0].set_xscale("log")
        axes[0].invert_yaxis()
        axes[0].axvline(1, color="black", linewidth=0.6)
        axes[0].margins(x=0.12)
        axes[0].set_xlabel("times faster than the reference")
        for k, line in enumerate(lines):
            amount = [math.prod(size) for size in line["sizes"]]
            axes[1].loglog(
                [a / amount[0] for a in amount], [ms / line["ms_by_size"][0] for ms in line["ms_by_size"]], "o-", markersize=2.5,
                color=f"C{k}", label=f"{line['name']}: {line['slope']:.2f} ({line['expected']:g})",
            )  # fmt: skip
        if lines:
            axes[1].set(xlabel="size against the smallest", ylabel="time against the smallest")
            low, high = axes[1].get_ylim()
            axes[1].set_ylim(low, high * (high / low) ** 0.6)  # room for the legend
            axes[1].legend(loc="upper left", fontsize=5, title="measured exponent (expected)", title_fontsize=5.5)
    return save(figure, stem, ("png",))[0]
