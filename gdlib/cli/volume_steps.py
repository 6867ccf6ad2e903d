"""The steps of one large volume, as `workflow/volume.smk` calls them.

See `gdlib.volumes.jobs`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdlib import io
from gdlib.io.outputs import has_attributes, has_keys
from gdlib.limits import Count, Threads, Whole, argument, sides

OF_A_BLOCK = has_attributes("made_for")


def add_volume_steps(add: Callable[..., None]) -> None:
    """Add them to `gdlib step`.

    Args:
        add: takes the name of a command, its function, help, its outputs, and its arguments by
            keyword.
    """
    file = {"type": Path, "required": True, "metavar": "FILE"}
    folder = {"type": Path, "required": True, "metavar": "DIR"}
    name = {"required": True, "metavar": "NAME", "help": "of the block, e.g. 0-3-12"}
    text = {"type": argument(dict[str, Any]), "required": True, "metavar": "JSON"}
    block = {**text, "type": argument(tuple[Count, ...])}
    overlap = {**text, "type": argument(tuple[Whole, ...])}
    plan = {**file, "help": "plan.json"}

    def command(
        step: str, function: str, help: str, /, own: Callable = OF_A_BLOCK, **arguments: dict
    ) -> None:
        def run(parsed: argparse.Namespace) -> None:
            from gdlib.volumes import jobs

            given = {key: getattr(parsed, key) for key in arguments if key != "threads"}
            if "plan" in given:
                given["plan"] = _read_plan(given["plan"])
            if (result := getattr(jobs, function)(**given)) is not None:
                print(f"{result} objects")

        add(step, run, help, {"out": own}, **arguments)

    command(
        "plan-volume",
        "plan",
        "Blocks: find what all blocks of a volume have in common.",
        has_keys("weights_sha256", "range"),
        image={"required": True, "metavar": "FILE"},
        weights=file,
        out=file,
        block=block,
        segmenter={"required": True, "metavar": "NAME"},
    )
    command(
        "predict-block",
        "predict",
        "Blocks: predict affinities and foreground of a block.",
        plan=plan,
        name=name,
        weights=file,
        out=file,
        device={"default": "auto"},
        threads={"type": argument(Threads), "metavar": "N"},
        passes={
            "type": sides,
            "metavar": "SIDES",
            "help": "largest part that goes through the network at once",
        },
    )
    command(
        "segment-block",
        "segment",
        "Blocks: segment a block with its overlap.",
        plan=plan,
        name=name,
        predictions=folder,
        out=file,
        settings=text,
    )
    command(
        "match-block",
        "match",
        "Blocks: find equal segments of a block and the next ones.",
        plan=plan,
        name=name,
        segments=folder,
        out=file,
        overlap=overlap,
    )
    command(
        "number-blocks",
        "number",
        "Blocks: number the objects of the whole volume.",
        plan=plan,
        segments=folder,
        matches=folder,
        out=file,
        min_size={"type": argument(Whole), "metavar": "N", "default": 0},
    )
    command(
        "relabel-block",
        "relabel",
        "Blocks: give a block the numbers of the whole volume.",
        plan=plan,
        name=name,
        segments=folder,
        numbers=file,
        out=file,
        overlap=overlap,
    )
    command(
        "join-blocks",
        "join",
        "Blocks: put all blocks into one file.",
        has_attributes("weights_sha256", "range"),
        plan=plan,
        labels=folder,
        out=file,
        about={**text, "required": False, "default": {}},
    )


def _read_plan(path: Path) -> dict[str, Any]:
    io.check_file(path)
    try:
        plan = json.loads(path.read_text())
    except ValueError as error:
        raise io.DataError(f"{path}: not a readable plan ({error}); make it again") from None
    if not isinstance(plan, dict) or not {
        "image",
        "shape",
        "block",
        "range",
        "offsets",
        "weights_sha256",
    } <= set(plan):
        raise io.DataError(f"{path}: this is no plan; make one with `gdlib step plan-volume`")
    return plan
