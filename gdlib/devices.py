"""Devices, precisions and threads, and one job per GPU: a command takes a GPU that no other command
has, or waits for one.

What can be told without torch is told without it: to import it takes more than a second, and not
everything needs it.

A GPU is taken by a lock on a file, which the system gives back when the process ends, however it
ends. Programs that use this package as a library choose their device themselves, and lock nothing.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# all users' jobs on a machine must find the same files, whatever their TMPDIR
FOLDER = Path("/tmp")
CPUINFO = Path("/proc/cpuinfo")  # of Linux
TOPOLOGY = Path("/sys/devices/system/cpu")  # of Linux
# Of Linux: drivers of GPUs that torch can use (NVIDIA, also on a Jetson, AMD, and any in Windows'
# Linux). Where there is none of these, torch finds none.
DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvmap", "/dev/kfd", "/dev/dxg")
LOOK_EVERY = 5.0  # seconds between two looks at GPUs that are all taken
# Is this process the command `gdlib`, and not a program that uses this package?
is_own = False
_held: list[int] = []  # descriptors, open until the process ends
_own = threading.local()  # of each thread: how many threads its computations have


def claim() -> None:
    """Make one GPU, which no other command has, the only one that this process sees.

    Without GPUs do nothing.

    To be called before CUDA is used. A single GPU in CUDA_VISIBLE_DEVICES was chosen by a scheduler
    or a person, and is taken without waiting; of several, one is chosen here.
    """
    if has_only_cpu():
        return
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
                f"waiting for a GPU: other gdlib jobs have all {len(names)}; `--device cuda:0` "
                "would share one",
                file=sys.stderr,
                flush=True,
            )
            told = True
        time.sleep(LOOK_EVERY)


def _lock(path: Path) -> bool:
    """Lock a file if nobody has."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        # that of another user can be locked, but not created again
        descriptor = os.open(path, os.O_RDONLY)
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


def has_only_cpu() -> bool:
    """Is it sure, without torch, that there is nothing but the processor to compute on?"""
    return sys.platform == "linux" and not any(map(os.path.exists, DRIVERS))


def has_nvidia() -> bool:
    """Is there a GPU for jobs of the workflow: one of NVIDIA that is not hidden from them?"""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return shutil.which("nvidia-smi") is not None and not hidden


def on_cpu(name: str) -> bool:
    """Is the device of this name the processor? For errors see `choose_device`."""
    if name == "cpu" or (name == "auto" and has_only_cpu()):
        return True
    return choose_device(name).type == "cpu"


def threads() -> int:
    """Return how many threads the computations of the calling thread have: those of torch, where it
    is there, else as many as it would take: one for each core, or fewer by OMP_NUM_THREADS.
    """
    if (torch := _torch()) is not None:
        return torch.get_num_threads()
    return getattr(_own, "threads", None) or _default_threads()


def use_threads(count: int) -> None:
    """Give the computations of the calling thread so many threads."""
    _own.threads = count
    if (torch := _torch()) is not None:
        torch.set_num_threads(count)


def _torch() -> Any:
    """Return torch if it is there already, and not just being imported."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "set_num_threads") else None


@functools.cache
def _default_threads() -> int:
    wanted = [
        os.environ.get(f"{name}_NUM_THREADS", "").partition(",")[0] for name in ("OMP", "MKL")
    ]
    return min([cores(whole=True), *(int(one) for one in wanted if one.isdigit() and int(one))])


def cores(*, whole: bool = False) -> int:
    """Return how many cores this process may use, as Snakemake counts them: a core that runs two
    threads is two. `whole` ones count once, where the system tells which they are.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS, Windows
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    if not whole:
        return len(allowed)
    different = set()
    for number in allowed:
        try:
            different.add((TOPOLOGY / f"cpu{number}/topology/thread_siblings_list").read_text())
        except OSError:
            different.add(str(number))
    return len(different)


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of this name; `auto` takes an accelerator if there is one."""
    import torch

    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # from one that is only a name nothing comes back
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f'device "{name}" cannot be used ({str(error).splitlines()[0]}); choose auto, cpu, or '
            "one that this machine has"
        ) from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type that networks compute in.

    `auto` takes bfloat16 where the hardware is faster in it, else float32, or float16 on a GPU.
    """
    import torch

    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name)
    if name != "auto":
        raise ValueError(
            f'there is no precision "{name}": choose auto, float32, bfloat16 or float16, or, to '
            "segment, int8 where `gdlib quantise` made it"
        )
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.bfloat16 if device.type == "cpu" and bfloat16_pays() else torch.float32


def bfloat16_pays() -> bool:
    """Is this processor faster in bfloat16 than in float32?

    With matrix units it is; with AVX512-BF16 alone only on an AMD, whose vector units then do twice
    as much in a cycle. On an Intel Xeon whose AMX a virtual machine hides, networks took 1.4 to 1.8
    times as long as in float32, but for volumes in torch alone; without any units it is slower.
    """
    units = bfloat16_units()
    return "AMX" in units or bool(units and _is_amd())


def _is_amd() -> bool:
    return "AuthenticAMD" in (_about_cpu() or platform.processor())


def bfloat16_units() -> list[str]:
    """Return the units of this processor that multiply in bfloat16, by the names of their
    makers.
    """
    return _units({"AMX": "amx_bf16", "AVX512-BF16": "avx512_bf16"})


def int8_pays() -> bool:
    """Is this processor faster in 8 bits than in float32?

    With AVX2 it is. ResUNet-tiny took 0.6 of the time on an AMD EPYC that has nothing more (Zen
    3), 0.36 to 0.39 with AVX512-VNNI. Other units for 8 bits come with AVX2;
    an Intel with AVX2 alone and AVX-512 without VNNI were not at hand.
    """
    return bool(_units({"AVX2": "avx2"}))


def _units(known: dict[str, str]) -> list[str]:
    """Return those of some units that this processor has, by name and by what Linux calls them."""
    if about := _about_cpu():
        flags = re.search(r"^flags\s*:(.*)$", about, re.MULTILINE)
        there = set(flags[1].split()) if flags else set()  # processors of other kinds have none
        return [name for name, flag in known.items() if flag in there]
    import torch

    # versions that cannot be asked know of none
    capable = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name, flag in known.items() if capable.get(flag)]


def cpu_name() -> str:
    """Return what the processor is called, or at least of which kind it is."""
    found = re.search(r"^model name\s*:\s*(.+?)\s*$", _about_cpu(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine() or "CPU"


def _about_cpu() -> str:
    """Return what Linux says of the first processor, nothing elsewhere."""
    try:
        with CPUINFO.open() as file:
            return file.read(10_000)
    except OSError:
        return ""


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from the CPU to a device, for which nothing waits: CUDA copies from pinned
    memory while the CPU goes on.
    """
    import torch

    kind = torch.device(device).type
    return (tensor.pin_memory() if kind == "cuda" else tensor).to(
        device, non_blocking=kind not in ("cpu", "mps")
    )
