"""Where numbers come from: the code, what trained the networks, and for every cell of a table the
runs behind it.
"""

import csv
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import gdlib
from gdlib import io
from gdlib.config import TEACHER
from gdlib.devices import cpu_name
from gdlib.report.names import NONE, named_teacher

PACKAGE = Path(gdlib.__file__).parent
# What makes numbers, and what runs it.
PACKAGES = (
    *(
        "torch",
        "numpy",
        "scipy",
        "scikit-image",
        "h5py",
        "pandas",
        "bioimage-cpp",
        "numba",
        "waterz",
        "safetensors",
        "pydantic",
    ),
    *("matplotlib", "snakemake"),
)


def commit(folder: Path | str | None = None) -> str:
    """Return the commit of the code in words.

    `unknown` where there is no repository, no git, or the code is not part of it.

    It is asked when a table is written, not before: as a parameter of the job it would write every
    table again after every commit. What the numbers depend on has been made again since it was
    changed, so they are those of this commit.

    Args:
        folder: of the code, that of gdlib by default.
    """
    folder = Path(folder or PACKAGE)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    try:
        # An installed copy may lie in the repository of something else, which then does not know
        # its files.
        if not git("ls-files"):
            return "unknown"
        name = git("describe", "--always", "--dirty", "--abbrev=10")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name.removesuffix("-dirty") + " with later changes" * name.endswith("-dirty")


def trained_on(weights: Iterable[Path | str]) -> dict[str, str]:
    """Read from the headers of weights what trained them.

    Returns:
        Dataset to devices, precision and versions in words, the same for all its networks or
        separated by semicolons.
    """
    found: dict[str, dict[str, None]] = {}
    for path in weights:
        header = io.read_header(path)
        text = (
            f"{header['device']}, {header['precision']}, torch {header['torch']}, gdlib "
            f"{header['gdlib']}"
        )
        found.setdefault(header["run"]["dataset"], {})[text] = None
    return {dataset: "; ".join(texts) for dataset, texts in found.items()}


def record(
    summary: Path | str,
    metrics: Iterable[Path | str],
    profiles: Iterable[Path | str],
    *,
    study: str,
    configuration: str,
    benchmarks: Path | str,
    data: Mapping[str, Mapping[str, str]],
    teachers: Mapping[str, str],
    given: Mapping[str, str],
) -> dict[str, Any]:
    """Gather what every number of a study comes from, out of the files that lie beside its metrics.

    Where such a file is no longer there (weights and predictions are large), a null stands in its
    place: nothing is made again.

    Args:
        summary: rows of the tables, columns `summary.SUMMARY_COLUMNS`.
        metrics: `<run>/<segmenter>/metrics.csv` of all runs.
        profiles: profile files.
        study: its name.
        configuration: its part of the configuration, as text.
        benchmarks: folder of Snakemake's measurements.
        data: dataset to split to samples file.
        teachers: dataset to the network and seed, `network/method/seed0`, that its students learn
            from.
        given: network to weights that were given and not trained.

    Returns:
        Plain data: `runs`; `rows` of the tables, with the runs that their cells are means of;
        `data`, `costs`, `jobs` and how long they took, `code`, `software`, `machine`,
        `configuration`; and `problems`, in words.
    """
    runs: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for path in map(Path, metrics):
        with open(path, newline="") as file:
            first = next(csv.DictReader(file))
        key = f"{first['dataset']}/{first['network']}/{first['method']}/seed{first['seed']}"
        if key not in runs:
            teacher = (
                teachers.get(first["dataset"]) if first["method"] not in (TEACHER, NONE) else None
            )
            if teacher and (other := named_teacher(first["method"])):
                teacher = f"{other}/{teacher.partition('/')[2]}"
            runs[key] = _run(path.parents[1], first, given.get(first["network"]))
            runs[key]["teacher"] = f"{first['dataset']}/{teacher}" if teacher else None
        segmented = _attrs(path.with_name("segmentation.h5"))
        made_with, there = segmented.get("weights_sha256"), runs[key]["weights"]["sha256"]
        if made_with and there and made_with != there:
            problems.append(
                f"{path}: its segmentation was made with other weights than "
                f"{runs[key]['weights']['file']}"
            )
        runs[key]["segmenters"][first["segmenter"]] = {
            "parameters": segmented.get("parameters"),
            "weights_sha256": made_with,
            "metrics_sha256": io.sha256(path),
        }
    splits = {
        d: {split: _samples(Path(p)) for split, p in files.items()} for d, files in data.items()
    }
    for dataset, samples in splits.items():  # of all three, each split tells them
        found = next((one["warnings"] for one in samples.values() if one and "warnings" in one), [])
        problems += [f"{dataset}: {sentence}" for sentence in found]
    costs = {
        f"{p['dataset']}/{p['network']}": p
        for p in (json.loads(Path(path).read_text()) for path in profiles)
    }
    return {
        "study": study,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": {"commit": commit(), "sha256": io.code_sha256()},
        "software": {"python": platform.python_version(), **_versions()},
        "machine": {
            "system": platform.platform(),
            "processor": cpu_name(),
            "cores": os.cpu_count(),
        },
        "configuration": configuration,
        "data": splits,
        "runs": runs,
        "rows": _rows(summary, runs),
        "costs": costs,
        "jobs": _jobs(Path(benchmarks), runs, splits),
        "problems": problems,
    }


def _run(folder: Path, first: Mapping[str, str], given: str | None) -> dict[str, Any]:
    """What is known of a run: of its weights by their header, and how long its jobs took."""
    path = Path(given) if given else folder / "weights.safetensors"
    header = io.read_header(path) if path.exists() else {}
    spec = json.dumps(header.get("run"), sort_keys=True, separators=(",", ":"))
    return {
        **{column: first[column] for column in ("dataset", "network", "method")},
        "seed": int(first["seed"]),
        "weights": {
            "file": path.as_posix(),
            "sha256": io.sha256(path) if header else None,
            "given": given is not None,
        },
        "configuration_sha256": hashlib.sha256(spec.encode()).hexdigest() if header else None,
        **{name: header.get(name) for name in ("device", "precision", "torch", "gdlib", "step")},
        "segmenters": {},
    }


def _attrs(path: Path) -> dict[str, Any]:
    return io.read_attrs(path) if path.exists() else {}


def _samples(path: Path) -> dict[str, Any] | None:
    """What a samples file says of itself."""
    attrs = _attrs(path)
    keys = (
        "samples",
        "instances",
        "types",
        "source",
        "options",
        "provenance",
        "sha256",
        "warnings",
    )
    found = {key: attrs[key] for key in keys if key in attrs}
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in found.items()}
    return {"file": path.as_posix(), **plain} if attrs else None


def _jobs(
    benchmarks: Path, runs: Mapping[str, Any], data: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What Snakemake measured of the jobs behind a study, but for tables and figures.

    Left out where its file is not there.
    """
    files: list[tuple[str, str, str | None, Path]] = []
    for dataset, splits in data.items():
        there = [Path(one["file"]).with_name("benchmark.tsv") for one in splits.values() if one]
        files += [("prepare", dataset, None, path) for path in there[:1]]
        for step in ("maps", "profile", "baselines"):
            own = [
                *sorted((benchmarks / step / dataset).rglob("*.tsv")),
                benchmarks / step / f"{dataset}.tsv",
            ]
            files += [(step, dataset, None, path) for path in own]
    for key, run in runs.items():
        own = [
            ("teacher" if run["method"] == TEACHER else "train", f"train/{key}"),
            ("predict", f"predict/{key}"),
        ]
        own += [
            (step, f"{step}/{key}/{name}")
            for step in ("segment", "evaluate")
            for name in run["segmenters"]
        ]
        files += [(step, run["dataset"], key, benchmarks / f"{name}.tsv") for step, name in own]
    jobs = []
    for step, dataset, key, path in files:
        if path.exists():
            with open(path, newline="") as file:
                last = list(csv.DictReader(file, delimiter="\t"))[-1]
            # too short to be measured
            mib = float(last["max_rss"]) if last["max_rss"] not in ("NA", "-") else None
            jobs.append(
                {
                    "step": step,
                    "dataset": dataset,
                    "run": key,
                    "seconds": float(last["s"]),
                    "mib": mib,
                }
            )
    return jobs


def _rows(summary: Path | str, runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the tables: their numbers, the runs that these are means of, and those they are
    compared with.
    """
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    with open(summary, newline="") as file:
        for line in csv.DictReader(file):
            of = tuple(line[column] for column in ("dataset", "student", "method", "segmenter"))
            mean, std = (
                float(line[column]) if line[column] else None for column in ("mean", "std")
            )
            row = rows.setdefault(of, {"metrics": {}})
            row["metrics"][line["metric"]] = {"mean": mean, "std": std}

    def of_method(dataset: str, network: str, method: str, segmenter: str) -> list[str]:
        wanted = {"dataset": dataset, "network": network, "method": method}
        return [
            key
            for key, run in runs.items()
            if wanted.items() <= run.items() and segmenter in run["segmenters"]
        ]

    for (dataset, network, method, segmenter), row in rows.items():
        row |= {"dataset": dataset, "network": network, "method": method, "segmenter": segmenter}
        row["runs"] = of_method(dataset, network, method, segmenter)
        plain = method in (TEACHER, NONE)
        row["compared_with"] = [] if plain else of_method(dataset, network, NONE, segmenter)
    return list(rows.values())


def _versions() -> dict[str, str]:
    """Versions of what is installed where this is written.

    A job's own torch is in the header of its weights.
    """
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
