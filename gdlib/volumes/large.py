"""One image that memory does not hold, in one process: the steps of `gdlib.volumes.jobs`, one
block after the other.

Finished blocks wait as files in a folder beside the result, so that what was stopped goes on there.
A block is segmented as soon as those around it are predicted, while the network is at work on the
next one; predictions that no block needs any more are deleted.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from gdlib import io
from gdlib.blockwise.blocks import Blockwise, Source
from gdlib.predict.files import lock, made_with
from gdlib.progress import Progress
from gdlib.volumes import jobs
from gdlib.volumes.footprint import Choice, gib
from gdlib.volumes.grid import Grid


def segment_in_blocks(
    choice: Choice,
    source: Source,
    image: str,
    folder: Path,
    write: Callable[[dict[str, Any], Path], None],
    *,
    identity: str,
    weights_sha256: str,
    segmenter: str,
    parameters: Mapping[str, Any],
) -> int:
    """Segment an image block by block, and return how many objects there are.

    Args:
        choice: how it is cut; see `gdlib.volumes.footprint`.
        source: the image.
        image: its path, with the dataset of an HDF5 file.
        folder: of finished blocks; it is deleted in the end. One of other images, weights or
            versions is begun anew.
        write: takes the plan and the folder of relabelled blocks, and writes the result.
        identity: says which file the image is.
        weights_sha256: of the network.
        segmenter: a key of `SEGMENTERS`.
        parameters: of it.

    Raises:
        DataError: the image has NaN or infinite pixels, the disk is too small, or another process
            works in the folder.
    """
    predictor, grid = choice.predictor, choice.grid
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+b") as file:
        lock(file)
        plan = {
            "image": image,
            "identity": identity,
            "weights_sha256": weights_sha256,
            "made_with": made_with(predictor),
        }
        plan |= jobs.planned(predictor, source, grid.block, segmenter)
        settings = {"overlap": list(grid.overlap), "parameters": dict(parameters)}
        _begin(folder, plan, settings)
        _check_space(folder, choice, len(plan["offsets"]) + 1, image)
        # all rows: those of a stride begin where a block with its overlap does
        predictor.ask_for(plan["offsets"])
        _segments(predictor, source, plan, settings, grid, folder)
        segments, matches, numbers, labels = (
            folder / name for name in ("segments", "matches", "numbers.h5", "labels")
        )
        for name in grid.names:
            if not (matches / f"{name}.h5").exists():
                jobs.match(plan, name, segments, matches / f"{name}.h5", grid.overlap)
        count = jobs.number(plan, segments, matches, numbers, parameters["min_size"])
        for name in grid.names:
            jobs.relabel(plan, name, segments, numbers, labels / f"{name}.h5", grid.overlap)
        write(plan, labels)
    shutil.rmtree(folder)
    return count


def block_before(folder: Path) -> list[int] | None:
    """Return the largest sides of a block of a run that was stopped, None if there is none."""
    try:
        return json.loads((folder / "plan.json").read_text())["block"]
    except (OSError, ValueError, KeyError):
        return None


def _begin(folder: Path, plan: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Delete what was made for another plan, or with other settings."""
    made = {"plan.json": plan, "settings.json": settings}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in made.items()}
    same = {
        name: (folder / name).exists() and (folder / name).read_text() == text
        for name, text in texts.items()
    }
    stale = (
        ["segments", "matches", "labels"]
        if same["plan.json"]
        else ["predictions", "segments", "matches", "labels"]
    )
    if not all(same.values()):
        for name in stale:
            shutil.rmtree(folder / name, ignore_errors=True)
        for name, text in texts.items():
            io.write_text(folder / name, text)


def _check_space(folder: Path, choice: Choice, maps: int, image: str) -> None:
    """Raise `DataError` if the disk is too small for what waits there: two layers of predicted
    blocks, and labels.

    Predictions become less than half as large when they are compressed, labels less than a byte per
    pixel.
    """
    shape, sides = choice.grid.shape, choice.grid.sides
    held = min(shape[0], 2 * sides[0]) * math.prod(shape[1:])
    needed = maps * held // 2 + math.prod(shape)
    there = sum(path.stat().st_size for path in folder.rglob("*.h5"))
    if needed > (free := shutil.disk_usage(folder).free + there):
        raise io.DataError(
            f"{image}: in blocks it needs about {gib(needed)} GiB of disk in {folder.parent} until "
            f"it is done, and {gib(free)} are free there; free some, or choose another folder for "
            "--out"
        )


def _segments(
    predictor: Blockwise, source: Source, plan: dict, settings: dict, grid: Grid, folder: Path
) -> None:
    """Predict and segment all blocks that are not there."""
    predictions, segments = folder / "predictions", folder / "segments"
    waiting = [name for name in grid.names if not (segments / f"{name}.h5").exists()]
    wanted = {other for name in waiting for other in grid.touching(name)}
    done = set(grid.names) - set(waiting)

    def finish(name: str) -> None:
        jobs.segment(plan, name, predictions, segments / f"{name}.h5", settings)
        done.add(name)
        bar.update()
        for other in grid.touching(name):
            if done.issuperset(grid.touching(other)):
                (predictions / f"{other}.h5").unlink(missing_ok=True)

    title = folder.stem.lstrip(".")
    with (
        Progress(
            total=len(grid.names), initial=len(done), unit="block", desc=title, leave=False
        ) as bar,
        ThreadPoolExecutor(1) as other,
    ):
        finishing: Future | None = None
        predicted = set()
        for name in grid.names:
            out = predictions / f"{name}.h5"
            if name in wanted and not out.exists():
                try:
                    jobs.predict_with(predictor, source, plan, name, out)
                except io.DataError:
                    if finishing is not None:
                        wait([finishing])  # it would write into the folder once more
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
            predicted.add(name)
            while waiting and predicted.issuperset(grid.touching(waiting[0])):
                if finishing is not None:
                    finishing.result()
                finishing = other.submit(finish, waiting.pop(0))
        if finishing is not None:
            finishing.result()
