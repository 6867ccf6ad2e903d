"""How a study came about, for a colleague who was not there: its configuration, data, time and
provenance as pages.
"""

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from gdlib import io
from gdlib.report import markup
from gdlib.report.markup import Cell, Table
from gdlib.report.names import Titles, title


def write(
    found: Mapping[str, Any],
    *,
    record: Path | str,
    configuration: Path | str,
    data: Path | str,
    time: Path | str,
    provenance: Path | str,
    titles: Titles,
) -> None:
    """Write the record of a study, and the pages that show it.

    Args:
        found: from `gdlib.report.provenance.record.record`.
        record: where it goes, as JSON.
        configuration: page of what was to be done.
        data: page of what it was done with.
        time: page of where the time went.
        provenance: page of code, software and every run.
        titles: of datasets and networks.
    """
    pages = {
        configuration: ("Configuration", configuration_page(found)),
        data: ("Data", data_page(found, titles)),
        time: ("Where the time went", time_page(found, titles)),
        provenance: ("Provenance", provenance_page(found, titles)),
    }
    for path, (heading, body) in pages.items():
        io.write_text(path, markup.page(heading, body))
    io.write_text(record, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def configuration_page(found: Mapping[str, Any]) -> str:
    """Return what the study was told to do, with every default written out."""
    return (
        "<h2>Configuration of "
        f"{escape(found['study'])}</h2><pre>{escape(found['configuration'])}</pre>"
    )


def data_page(found: Mapping[str, Any], titles: Titles) -> str:
    """Return the images and objects of every split, and where they come from."""
    sections = []
    for dataset, splits in found["data"].items():
        about = next(filter(None, splits.values()), {})
        options = ", ".join(f"{key} {value}" for key, value in about.get("options", {}).items())
        shown = ("samples", "instances", "types")
        rows = [
            [
                Cell(split),
                *(Cell(str(one[key]) if one else "no longer there") for key in shown),
                Cell(one["sha256"] if one else ""),
            ]
            for split, one in splits.items()
        ]
        caption = (
            f"{about.get('provenance', '')} Source "
            f"{about.get('source', 'unknown')}{f' ({options})' * bool(options)}."
        )
        header = ["split", "images", "objects", "types", "SHA-256 of the content"]
        notes = [f"Warning: {sentence}." for sentence in about.get("warnings", [])]
        sections.append(
            (title(dataset, titles), [Table(dataset, caption, header, [rows], notes, names=1)])
        )
    return markup.html(sections)


STEPS = {
    "prepare": "prepare the data",
    "teacher": "train teachers",
    "maps": "ask teachers about the training images",
    "train": "train students",
    "predict": "predict test images",
    "segment": "find objects",
    "evaluate": "evaluate",
    "baselines": "segment without a network",
    "profile": "measure the networks",
}


def time_page(found: Mapping[str, Any], titles: Titles) -> str:
    """Return a table with the jobs of every step, by dataset: how many, how long, and how much
    memory.
    """
    jobs = found["jobs"]
    total = sum(job["seconds"] for job in jobs)
    sections = []
    for dataset in dict.fromkeys(job["dataset"] for job in jobs):
        of_dataset = [job for job in jobs if job["dataset"] == dataset]
        rows = []
        for step, words in STEPS.items():
            if own := [job for job in of_dataset if job["step"] == step]:
                seconds = [job["seconds"] for job in own]
                share, most = sum(seconds) / (total or 1), max(job["mib"] or 0 for job in own)
                bar = f"{'█' * round(30 * share)} {100 * share:.0f} %"
                texts = [words, bar, str(len(own)), duration(sum(seconds)), duration(max(seconds))]
                rows.append([Cell(text) for text in (*texts, f"{most:.0f}" if most else "–")])
        header = ["step", "share of all time", "jobs", "time", "longest job", "memory (MiB)"]
        caption = f"{duration(sum(job['seconds'] for job in of_dataset))} in jobs."
        sections.append(
            (title(dataset, titles), [Table(dataset, caption, header, [rows], [], names=2)])
        )
    note = (
        f"<p>{duration(total)} in {len(jobs)} jobs, added up; jobs that ran side by side took less "
        "time together. Of a job that was stopped and went on, the last part is counted. Tables "
        "and figures are left out: they take seconds.</p>"
    )
    return note + markup.html(sections)


def duration(seconds: float) -> str:
    """Write a time as it is read.

    >>> duration(7.26), duration(90), duration(7300)
    ('7.3 s', '1 min 30 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def provenance_page(found: Mapping[str, Any], titles: Titles) -> str:
    """Return code, software and machine, and one row for every run."""
    code, machine = found["code"], found["machine"]
    facts = {
        "written": found["written"],
        "code": f"commit {code['commit']}; SHA-256 of gdlib {code['sha256']}",
        "software of the tables": ", ".join(
            f"{name} {version}" for name, version in found["software"].items()
        ),
        "machine of the tables": f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['system']}",
    }
    table = Table(
        "facts",
        "",
        ["", ""],
        [[[Cell(key), Cell(value)] for key, value in facts.items()]],
        [],
        names=2,
    )
    sections = [("Code, software, machine", [table])]
    for dataset in found["data"]:
        rows = [
            [
                Cell(title(run["network"], titles)),
                Cell(title(run["method"], titles)),
                Cell(str(run["seed"])),
                Cell("given" if run["weights"]["given"] else str(run["step"] or "–")),
                Cell(", ".join(filter(None, (run["device"], run["precision"]))) or "–"),
                Cell(
                    ", ".join(f"{name} {run[name]}" for name in ("torch", "gdlib") if run[name])
                    or "–"
                ),
                Cell((run["configuration_sha256"] or "–")[:12]),
                Cell((run["weights"]["sha256"] or "no longer there")[:15]),
            ]
            for run in found["runs"].values()
            if run["dataset"] == dataset
        ]
        header = [
            "network",
            "method",
            "seed",
            "best step",
            "trained on",
            "versions",
            "configuration",
            "weights",
        ]
        sections.append(
            (f"Runs on {title(dataset, titles)}", [Table(dataset, "", header, [rows], [], names=8)])
        )
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in found["problems"])
    note = (
        "Configuration, weights: the beginning of the SHA-256; all of it is in provenance.json, "
        "which also names the runs behind every row of the tables. The configuration of a run is "
        "in the header of its weights: gdlib info --json."
    )
    return (
        (f"<h2>Problems</h2><ul>{problems}</ul>" if problems else "")
        + markup.html(sections)
        + f'<p class="note">{note}</p>'
    )
