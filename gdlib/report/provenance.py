"""Where numbers come from: the code, and what trained the networks."""

import subprocess
from collections.abc import Iterable
from pathlib import Path

from gdlib import io


def commit(folder: Path | str | None = None) -> str:
    """Return the commit of the code in words; `unknown` where there is no repository, no git, or the code is not part of it.

    It is asked when a table is written, not before: as a parameter of the job it would write every table again after every
    commit. What the numbers depend on has been made again since it was changed, so they are those of this commit.

    Args:
        folder: of the code, that of gdlib by default.
    """
    folder = Path(folder or Path(io.__file__).parent)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        # An installed copy may lie in the repository of something else, which then does not know its files.
        if not git("ls-files"):
            return "unknown"
        name = git("describe", "--always", "--dirty", "--abbrev=10")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return name.removesuffix("-dirty") + " with later changes" * name.endswith("-dirty")


def trained_on(weights: Iterable[Path | str]) -> dict[str, str]:
    """Read from the headers of weights what trained them.

    Returns:
        Dataset to devices, precision and versions in words, the same for all its networks or separated by semicolons.
    """
    found: dict[str, dict[str, None]] = {}
    for path in weights:
        header = io.read_header(path)
        text = f"{header['device']}, {header['precision']}, torch {header['torch']}, gdlib {header['gdlib']}"
        found.setdefault(header["run"]["dataset"], {})[text] = None
    return {dataset: "; ".join(texts) for dataset, texts in found.items()}
