"""One job per GPU: a command takes a GPU that no other command has, or waits for one.

A GPU is taken by a lock on a file, which the system gives back when the process ends, however it ends. Programs that use this
package as a library choose their device themselves, and lock nothing.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path("/tmp")  # all users' jobs on a machine must find the same files, whatever their TMPDIR
PATIENCE = 5.0  # seconds between two looks at GPUs that are all taken
_held: list[int] = []  # descriptors, open until the process ends


def claim() -> None:
    """Make one GPU, which no other command has, the only one that this process sees; without GPUs do nothing.

    To be called before CUDA is used. A single GPU in CUDA_VISIBLE_DEVICES was chosen by a scheduler or a person, and is taken
    without waiting; of several, one is chosen here.
    """
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    names = (given.split(",") if given else [str(k) for k in range(count)])[:count]
    if names:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[take(names, wait=not given or len(names) > 1)]


def take(names: Sequence[str], folder: Path = FOLDER, *, wait: bool = True) -> int:
    """Lock the first of these devices that is free, until this process ends.

    Args:
        names: of the devices; inside a SLURM job they are the job's own.
        folder: of the lock files.
        wait: for a device while all are taken; else the first is shared.

    Returns:
        Position of the device.
    """
    told = False
    while True:
        for position, name in enumerate(names):
            own = f"{os.environ.get('SLURM_JOB_ID', '')}-{name}".strip("-").replace("/", "-")
            if _lock(folder / f"gdlib-gpu-{own}.lock"):
                return position
        if not wait:
            return 0
        if not told:
            print(
                f"waiting for a GPU: other gdlib jobs have all {len(names)}; `--device cuda:0` would share one",
                file=sys.stderr,
                flush=True,
            )
            told = True
        time.sleep(PATIENCE)


def _lock(path: Path) -> bool:
    """Lock a file if nobody has."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY)  # that of another user can be locked, but not created again
    except FileNotFoundError:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT)
        os.fchmod(descriptor, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    _held.append(descriptor)
    return True
