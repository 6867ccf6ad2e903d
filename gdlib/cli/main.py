"""The command line: `gdlib segment`, `distill`, `evaluate`, `export`, `quantise`, `info`, `models`
for people, `gdlib step ...` for the workflow.
"""

import argparse
import importlib
import os
import sys
from typing import NamedTuple

from gdlib import __version__, devices

EXAMPLES = """examples:
  gdlib segment images/ --model nuclei --out found/
  gdlib distill images/ labels/ --out mycells --time 30m
  gdlib segment volume.h5:volumes/raw --model weights.safetensors --out found/
  gdlib evaluate ground_truth/ found/ --out scores.csv
  gdlib info weights.safetensors
  gdlib export nuclei --to onnx --out nuclei.onnx
  gdlib quantise weights.safetensors images/
  gdlib models
  gdlib download bbbc039
"""


class Command(NamedTuple):
    """What a command does, in a few words, and which module adds it by `add_<its name>`."""

    help: str
    module: str


COMMANDS = {
    "segment": Command("find the objects in images", "gdlib.cli.segment"),
    "distill": Command("train a network of your own from images and labels", "gdlib.cli.distill"),
    "evaluate": Command("compare segmentations with the ground truth", "gdlib.cli.evaluate"),
    "export": Command("write a trained network for other programs", "gdlib.cli.export"),
    "quantise": Command("make a trained network compute in 8 bits", "gdlib.cli.quantise"),
    "info": Command("say what a weights file is", "gdlib.cli.info"),
    "models": Command("list the networks", "gdlib.cli.models"),
    "check": Command("look for mistakes in a configuration", "gdlib.cli.catalogue"),
    "download": Command("fetch public data sets", "gdlib.cli.catalogue"),
    "schema": Command("say what can be written in the configuration", "gdlib.config.page"),
    "step": Command("one step of a study, as the workflow calls it", "gdlib.cli.steps"),
}


def main(argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> int:
    """Run one command; a mistake of the user is one line on stderr and exit status 1.

    Args:
        argv: what is given to it, by default that of this process.
        parser: of another program than `gdlib`, whose `function` gets the arguments.
    """
    try:
        words = sys.argv[1:] if argv is None else argv
        devices.is_own = argv is None
        arguments = (parser or _parser(*words[:1])).parse_args(words)
        if getattr(arguments, "threads", None):
            # Before torch and BLAS are imported, which read them once; of two, the special one
            # would win.
            os.environ |= dict.fromkeys(
                ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads)
            )
        if getattr(arguments, "device", None) == "auto":
            devices.claim()
        arguments.function(arguments)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print(
            "gdlib: stopped by Ctrl-C; the same command starts again, or goes on from what is "
            "saved",
            file=sys.stderr,
        )
        return 130
    except (
        ValueError,
        FloatingPointError,
        OSError,
        MemoryError,
        RuntimeError,
        ExceptionGroup,
    ) as error:
        from gdlib.io import failures

        ours = not isinstance(error, RuntimeError) or failures.is_lack_of_memory(error)
        if os.environ.get("GDLIB_TRACEBACK") or not ours:
            raise
        for line in failures.sentences(error):
            print("gdlib: error:", line, file=sys.stderr)
        return 1
    return 0


def _parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands, or of one that is chosen.

    Of the others nothing is imported then: a job of the workflow begins in half the time.
    """
    parser = argparse.ArgumentParser(
        prog="gdlib",
        description="Small, fast networks for biomedical instance segmentation, distilled from "
        "large ones.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gdlib {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        if chosen is None or chosen == name:
            add = "add_steps" if name == "step" else f"add_{name}"
            getattr(importlib.import_module(command.module), add)(commands)
        else:
            commands.add_parser(name, help=command.help)
    return parser
