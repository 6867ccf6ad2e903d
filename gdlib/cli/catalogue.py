"""`gdlib check` and `gdlib download`: what a catalogue says, and the data that it names."""

import argparse
from typing import Any

from gdlib.cli.models import catalogue
from gdlib.io import failures
from gdlib.limits import place


def add_check(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib check` to the command line."""
    check = commands.add_parser(
        "check",
        help="look for mistakes in a configuration",
        description="Read a catalogue, and files that change it as `snakemake --configfile` takes "
        "them, and tell the first mistake: what is no YAML, a key that is written "
        "twice, wrong names, values out of their range.",
    )
    check.add_argument(
        "files", nargs="*", type=place, metavar="FILE", help="your own, e.g. mycells.yaml"
    )
    check.add_argument(
        "--config",
        type=place,
        help="catalogue (default: config.yaml, with the folder config, here or else of gdlib)",
    )
    check.set_defaults(function=_check)


def add_download(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib download` to the command line."""
    download = commands.add_parser(
        "download",
        help="fetch public data sets",
        description="Fetch data sets of a catalogue from their official addresses, each into a "
        "folder of its own that is complete or does not exist. What has come whole is "
        "not fetched again when the same command is given again. For data that "
        "cannot be downloaded freely, say how to get them.",
    )
    download.add_argument("names", nargs="+", metavar="NAME", help="dataset of the catalogue")
    download.add_argument(
        "--to",
        type=place,
        metavar="DIR",
        help="where the folders of the datasets go (default: the first of raw_folders)",
    )
    download.add_argument(
        "--config",
        type=place,
        help="catalogue (default: config.yaml, with the folder config, here or else of gdlib)",
    )
    download.set_defaults(function=_download)


def _check(arguments: argparse.Namespace) -> None:
    from gdlib.text import read_yaml

    config = catalogue(arguments.config, *arguments.files)
    # those of the files that are given, where they name any; else the one that would be run
    given = [read_yaml(file) for file in arguments.files]
    own = [config.study] if any("study" in one for one in given) else []
    own += [name for one in given for name in one.get("studies") or ()]
    studies = [
        config if name == config.study else config.model_copy(update={"study": name, "only": ()})
        for name in dict.fromkeys(own or [config.study])
    ]
    said = "; ".join(
        f"study {one.study}: {len(one.runs())} trainings on {', '.join(one.selected.datasets)}"
        for one in studies
    )
    print(f"nothing is wrong; {said}")


def _download(arguments: argparse.Namespace) -> None:
    from gdlib.registry import nearest

    config = catalogue(arguments.config)
    if arguments.to:
        config = config.model_copy(update={"raw_folders": (str(arguments.to),)})
    for name in arguments.names:
        if name not in config.datasets:
            raise ValueError(
                f'{arguments.config or "config.yaml"}: there is no dataset "{name}": '
                f"{nearest(name, list(config.datasets))}"
            )
    failed = failures.Failures()
    for name in arguments.names:
        with failed.noted(ValueError):
            _download_one(config, name)
    failed.tell(len(arguments.names), "data sets could not be fetched")


def _download_one(config: Any, name: str) -> None:
    from gdlib.config import ConfigError
    from gdlib.data.download import download

    files = config.datasets[name].download
    try:
        folder = config.raw_folder(name)
    except ConfigError:
        if not files:  # then it says how to get them
            raise
        folder = config.new_folder(name)
    if files:
        download(files, folder)
    else:
        print(
            f"{folder}: is already there"
            if folder
            else f"{name}: is made here, there is nothing to download"
        )
