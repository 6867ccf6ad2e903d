"""How much memory this process has, and how much more it may take."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

GIB = 2**30
SHARE = 0.8  # of what is free; the rest is for others, and for what an estimate overlooks
UNLIMITED = 2**60  # version 1 of control groups has a large number where there is no limit


def resident() -> int:
    """Return the bytes of memory that this process has; 0 where the system does not tell."""
    if (found := _words(Path("/proc/self/statm"))) is not None:
        return int(found[1]) * os.sysconf("SC_PAGE_SIZE")
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process may take on top of what it has.

    That is the least of what the machine has free (of a machine that does not tell, half of what it
    has), what is left of the limits of all control groups that it is in, as SLURM and containers
    set them, and of the limit of addresses (`ulimit -v`).

    Args:
        root: of the files in which Linux tells.

    Returns:
        None where nothing is known.
    """
    found = list(_group_limits(root))
    free = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo") or "", re.MULTILINE)
    if free:
        found.append(int(free[1]) * 1024)
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    if resource is not None and (words := _words(root / "proc/self/statm")) is not None:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            found.append(limit - int(words[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found)) if found else None


def budget() -> int | None:
    """Return how many bytes this process should have at most, with what it has already.

    None where nothing is known.
    """
    free = available()
    return None if free is None else resident() + int(SHARE * free)


def _group_limits(root: Path) -> Iterator[int]:
    """Yield what is left of the limits of the control groups of this process, and of those around
    them.
    """
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # in a container, it may be that of the host: the outermost one is then its own
        place = Path(path.strip("/"))
        for group in (place, *place.parents):
            limit, used = (_text(root / mount / group / name) for name in names[:2])
            if (
                limit is None
                or used is None
                or not limit.strip().isdecimal()
                or int(limit) >= UNLIMITED
            ):
                continue
            # What was read from files and can be read again counts as used until somebody wants its
            # place.
            cached = re.search(
                rf"^{names[2]} (\d+)",
                _text(root / mount / group / "memory.stat") or "",
                re.MULTILINE,
            )
            yield int(limit) - int(used) + (int(cached[1]) if cached else 0)


def _words(path: Path) -> list[str] | None:
    text = _text(path)
    return None if text is None else text.split()


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
