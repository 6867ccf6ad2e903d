"""`gdlib models`: networks that come trained with the package, and those of a catalogue."""

import argparse
from pathlib import Path
from typing import Any

from gdlib import io, trained
from gdlib.limits import Count, argument, place


def add_models(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib models` to the command line."""
    models = commands.add_parser(
        "models",
        help="list the networks",
        description="List the trained networks that come with the package; and every network that "
        "a catalogue can train, with its parameters and multiply-accumulates.",
    )
    models.add_argument(
        "--config",
        type=place,
        help="catalogue (default: config.yaml, with the folder config, here or else of gdlib)",
    )
    models.add_argument(
        "--shape",
        type=argument(Count),
        nargs="+",
        help="image size (default: 544 544, or 32 256 256 for networks of volumes)",
    )
    models.add_argument(
        "--markdown",
        action="store_true",
        help="print a page with context and levels too, docs/networks.md",
    )
    models.set_defaults(function=_models)


def catalogue(chosen: Path | None, *own: Path) -> Any:
    """Read a catalogue: the one that is named, else that of this folder, else gdlib's."""
    from gdlib.config import load, parts

    if chosen is None:
        here = Path("config.yaml")
        chosen = here if here.is_file() else parts.home() / "config.yaml"
    if not chosen.is_file():
        raise io.DataError(
            f"{chosen}: there is no such file; name a catalogue with --config, or leave it out for "
            "that of gdlib"
        )
    return load(chosen, *own)


def _trained_models() -> None:
    """Print the networks that come with the package, and how good each was on test images."""
    width = max(map(len, trained.names()), default=0)
    for name in trained.names():
        path = trained.find(name)
        header = io.read_header(path)
        test = header.get("test", {})
        scores = ", ".join(f"{key} {test[key]:.3f}" for key in ("aji", "pq", "voi") if key in test)
        judged = f"; {scores} on {test['images']} test image(s)" if scores else ""
        size = f"{path.stat().st_size / 1e6:.1f} MB"
        how = (
            f"method {header['run']['method']}"
            + ", also in 8 bits" * io.int8_beside(path).is_file()
        )
        print(f"{name:{width}}  {size}  {header.get('purpose', '')}; {how}{judged}")
    if trained.names():
        print("use one with `gdlib segment images/ --model NAME --out labels/`\n")


def _models(arguments: argparse.Namespace) -> None:
    from gdlib import registry
    from gdlib.models import build
    from gdlib.predict.cost import count_macs, count_parameters, network_table

    if not (arguments.config or arguments.markdown or arguments.shape):
        _trained_models()
    config = catalogue(arguments.config)
    networks = [
        (
            role,
            name,
            network,
            registry.axes(network.model) or build(network.model, network.options).ndim,
        )
        for role, group in (("teacher", config.teachers), ("student", config.students))
        for name, network in ((name, config.network(name)) for name in group)
    ]
    if arguments.markdown:
        print(
            network_table(
                (name, n.title, role, n.model, n.options) for role, name, n, _ in networks
            )
        )
        return
    shapes = {2: (544, 544), 3: (32, 256, 256)}
    if arguments.shape:
        shapes = {len(arguments.shape): tuple(arguments.shape)}
    known = sorted({ndim for *_, ndim in networks})
    if not set(shapes) & set(known):
        raise ValueError(
            f"{arguments.config}: networks take images with {' or '.join(map(str, known))} axes, "
            f"not {arguments.shape}"
        )
    print(f"{'name':16} {'role':8} {'parameters':>12} {'of them head':>12} {'GMACs':>10} at")
    for role, name, network, ndim in networks:
        if shape := shapes.get(ndim):
            count = count_parameters(network.model, network.options)
            macs = count_macs(network.model, network.options, shape)
            size = "x".join(map(str, shape))
            print(
                f"{name:16} {role:8} {count['total']:12,d} {count['foreground']:12,d} "
                f"{macs / 1e9:10.2f} {size}"
            )
