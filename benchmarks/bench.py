"""What the benchmarks share, each a part of gdlib beside a plain implementation of the same.

How a call is timed, how its memory is measured, and how two results are compared before either is
timed. The cases and the plain implementations are in the files beside this one.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from gdlib import __version__, io
from gdlib.cli.main import main
from gdlib.io import outputs
from gdlib.limits import Threads, argument, place

FOLDER = Path(__file__).resolve().parent
GROUPS = (
    "losses",
    "targets",
    "data",
    "train",
    "inference",
    "segmentation",
    "metrics",
    "workflow",
    "scale",
)
# Seconds that a case is repeated for, after the fewest rounds that it needs, and these.
SIZES = {"full": (2.0, 3), "small": (0.5, 3), "tiny": (0.0, 1)}
MOST = 30  # rounds
LIBRARIES = (
    "torch",
    "numpy",
    "scipy",
    "scikit-image",
    "bioimage-cpp",
    "numba",
    "h5py",
    "onnxruntime",
    "openvino",
    "snakemake",
)

Call = Callable[[], Any]


class Bench:
    """Measures cases and collects what was found.

    Attributes:
        group: name of the group at work, a key of every result.
        size: a key of `SIZES`.
        device: a torch device.
        precision: that networks compute in, the name of a torch type.
        results: one dict for each case: `name`, `ms` and `reference_ms` (medians), their quartiles
            `ms_spread` and `reference_ms_spread`, `ratio` = reference_ms / ms, `peak_mib` and
            `reference_peak_mib` (memory on top of what was held before the call), `rounds`,
            `difference` of both results, `about` (what is compared); None where there is none.
        targets: one dict for each: `text`, `value`, `limit`, `at_least`, `met`, `floor` (what stops
            it, or None).
        extra: what else goes into the JSON file.
    """

    def __init__(self, size: str = "full", device: str = "cpu", precision: str = "auto") -> None:
        from gdlib.devices import choose_device, choose_precision

        self.group = ""
        self.size = size
        self.device = choose_device(device)
        self.precision = str(choose_precision(precision, self.device)).removeprefix("torch.")
        self.results: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}

    def pick(self, full: Any, small: Any, tiny: Any) -> Any:
        """Return the one of three values that belongs to this size."""
        return {"full": full, "small": small, "tiny": tiny}[self.size]

    def compare(
        self,
        name: str,
        ours: Call,
        reference: Call | None = None,
        *,
        about: str = "",
        prepare: Call | None = None,
        differ: Callable[[Any, Any], float] | None = None,
        tolerance: float = 0.0,
        least: int | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Time two calls in turns, so that what slows the machine slows both.

        Each is called once before, not timed: to warm up, to measure its memory and to compare the
        results.

        Args:
            name: of the case.
            ours: what is measured.
            reference: what it is measured against, with the same result.
            about: what the reference is, in half a sentence.
            prepare: called before every call, not timed.
            differ: from both results to how much they differ.
            tolerance: largest difference.
            least: fewest rounds.
            more: other keys of the result.

        Raises:
            ValueError: the results differ by more than the tolerance: then neither time means
                anything.
        """
        prepare = prepare or (lambda: None)
        calls = [ours] if reference is None else [ours, reference]
        peaks, outputs = [], []
        for call in calls:
            prepare()
            output, peak = with_peak(call, self.device)
            outputs.append(output)
            peaks.append(peak)
            del output
        difference = None
        if differ is not None:
            difference = float(differ(*outputs))
            if not difference <= tolerance:
                raise ValueError(
                    f'benchmark "{name}": the results differ by {difference:.3g}, more than '
                    f"{tolerance:.3g}"
                )
        outputs.clear()
        times: list[list[float]] = [[] for _ in calls]
        seconds, fewest = SIZES[self.size]
        fewest = min(fewest, least or fewest)
        start = time.perf_counter()
        rounds = 0
        while rounds < fewest or (rounds < MOST and time.perf_counter() - start < seconds):
            rounds += 1
            for call, found in zip(calls, times, strict=True):
                prepare()
                found.append(self._time(call))
        mine, theirs = times[0], times[1] if len(times) > 1 else None
        return self.add(
            name,
            mine,
            theirs,
            peak_mib=peaks[0],
            reference_peak_mib=peaks[1] if theirs else None,
            difference=difference,
            about=about,
            **more,
        )

    def add(
        self,
        name: str,
        times: Sequence[float],
        reference: Sequence[float] | None = None,
        **more: Any,
    ) -> dict:
        """Add a case of which the times, in milliseconds, are known."""
        ms = statistics.median(times)
        reference_ms = statistics.median(reference) if reference else None
        result = {
            "group": self.group,
            "name": name,
            "reference_ms": reference_ms,
            "ms": ms,
            "ratio": reference_ms / ms if reference else None,
            "peak_mib": None,
            "reference_peak_mib": None,
            "ms_spread": _quartiles(times),
            "reference_ms_spread": _quartiles(reference) if reference else None,
            "rounds": len(times),
            "difference": None,
            "about": "",
            **more,
        }
        self.results.append(result)
        against = (
            f", reference {reference_ms:.4g} ms, ratio {result['ratio']:.3g}" if reference else ""
        )
        print(f"{self.group}: {name}: {ms:.4g} ms{against}", file=sys.stderr, flush=True)
        return result

    def target(
        self,
        text: str,
        value: float,
        limit: float,
        *,
        at_least: bool = False,
        floor: str | None = None,
        unit: str = "",
    ) -> None:
        """Say whether a target is met; `floor` says what stops it where it is not."""
        met = value >= limit if at_least else value <= limit
        target = {"group": self.group, "text": text, "value": value, "limit": limit, "unit": unit}
        self.targets.append({**target, "at_least": at_least, "met": bool(met), "floor": floor})
        print(
            f"{self.group}: {'met' if met else 'NOT MET'}: {text}: {value:.4g}{unit}",
            file=sys.stderr,
            flush=True,
        )

    def _time(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        synchronise(self.device)
        return 1e3 * (time.perf_counter() - start)

    def summary(self) -> dict[str, Any]:
        """Return everything about this machine, as it goes into the JSON file."""
        import torch

        from gdlib.devices import bfloat16_units, cpu_name

        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()
        return {
            "gdlib": __version__,
            "size": self.size,
            "device": self.device.type,
            "device_name": name,
            "cpu": cpu_name(),
            "bfloat16_units": bfloat16_units(),  # of the CPU, whether they are used or not
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "libraries": _versions(),
            **self.extra,
            "results": self.results,
            "targets": self.targets,
        }


def _quartiles(times: Sequence[float]) -> list[float]:
    if len(times) == 1:
        return [times[0], times[0]]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return [low, high]


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def synchronise(device: Any) -> None:
    """Wait until a device has done all that it was told."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def with_peak(call: Call, device: Any) -> tuple[Any, float | None]:
    """Return the result of a call and the most memory it took on top of what was held before, in
    MiB.

    On a GPU that of torch's allocator, on a CPU the resident set of the process, which Linux tells;
    else None.
    """
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = call()
        synchronise(device)
        return output, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with contextlib.suppress(OSError, AttributeError):
        # what was freed is given back, so that it is not taken for held
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # from here on a new peak is recorded
        before = _memory("VmRSS")
    except (OSError, StopIteration):
        return call(), None
    output = call()
    return output, max(0, _memory("VmHWM") - before) / 2**10


def _memory(key: str) -> int:
    """Return a size of this process, in KiB."""
    with open("/proc/self/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith(key)))


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Return the exponent p of the power law `time ~ size ** p` that fits best.

    >>> round(slope([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    x, y = ([math.log(v) for v in values] for values in (sizes, times))
    return statistics.linear_regression(x, y).slope


def parser() -> argparse.ArgumentParser:
    """Return what `python -m benchmarks` understands."""
    bench = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time every part of gdlib beside a plain implementation of the same, and "
        "check that both agree. The JSON file keeps what other machines measured, and this one in "
        "another precision; groups that were measured before are replaced. `page` measures "
        "nothing: it writes docs/performance.md and its figure from a JSON file, with columns for "
        "every machine in it.",
    )
    bench.add_argument("group", choices=(*GROUPS, "all", "page"), help="what to measure")
    bench.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1 (default: cpu)")
    bench.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of networks; float32 is what processors without units for bfloat16 compute in "
        "(default: auto)",
    )
    bench.add_argument(
        "--size", default="full", choices=tuple(SIZES), help="of the cases (default: full)"
    )
    bench.add_argument(
        "--threads", type=argument(Threads), metavar="N", help="CPU threads (default: all)"
    )
    bench.add_argument(
        "--json", type=place, required=True, metavar="FILE", help="where results are kept"
    )
    bench.add_argument(
        "--markdown", type=place, metavar="FILE", help="also write a page, e.g. docs/performance.md"
    )
    bench.add_argument("--overwrite", action="store_true", help=outputs.HELP)
    bench.set_defaults(function=_bench)
    return bench


def command(argv: list[str] | None = None) -> int:
    """Run `python -m benchmarks`; mistakes are told as those of `gdlib` are."""
    return main(argv, parser())


def _bench(arguments: argparse.Namespace) -> None:
    page = load("page")
    is_page, is_own = arguments.group == "page", outputs.has_keys("machines")
    target = arguments.markdown or (FOLDER.parent / "docs/performance.md" if is_page else None)
    # Before anything is measured: a file that cannot be used must not cost an hour.
    written = [] if is_page else [outputs.Output(arguments.json, is_own)]
    written += (
        [outputs.Output(path, lambda path: page.is_page(target)) for path in page.files(target)]
        if target
        else []
    )
    inputs = [arguments.json] if is_page else []
    outputs.check(written, inputs, overwrite=arguments.overwrite, option="--json or --markdown")
    machines = read(arguments.json) if is_page or is_own(arguments.json) else []
    if not is_page:
        if other := {one["size"] for one in machines} - {arguments.size}:
            raise io.DataError(
                f"{arguments.json}: its cases are of size {other.pop()}, which do not stand beside "
                "others; take another file"
            )
        groups = GROUPS if arguments.group == "all" else (arguments.group,)
        found = measure(groups, arguments.size, arguments.device, arguments.precision)
        machines = merged(machines, found)
        io.write_text(arguments.json, json.dumps({"machines": machines}, indent=1) + "\n")
    if target:
        page.write(machines, target)


SAME = (
    "device_name",
    "cpu",
    "device",
    "precision",
    "threads",
    "size",
)  # what makes two measurements those of one machine


def read(path: Path) -> list[dict[str, Any]]:
    """Read what machines have measured.

    Raises:
        gdlib.io.DataError: it is no file of `python -m benchmarks`.
    """
    io.check_file(path)
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise io.DataError(
            f"{path}: not a JSON file ({error}); make it with `python -m benchmarks all`"
        ) from None
    machines = content.get("machines") if isinstance(content, dict) else None
    if not machines or not all(
        {*SAME, "loads", "results", "targets"} <= set(one) for one in machines
    ):
        raise io.DataError(
            f"{path}: there are no results of machines in it; make it with "
            "`python -m benchmarks all`"
        )
    return machines


def merged(machines: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """Put what was measured in its place: groups of the same machine and precision are replaced,
    others stay.
    """
    out, found = list(machines), dict(found)
    at = next(
        (k for k, one in enumerate(out) if all(one[key] == found[key] for key in SAME)), len(out)
    )
    before = out[at] if at < len(out) else {"loads": {}, "results": [], "targets": []}
    for key in ("results", "targets"):
        kept = [one for one in before[key] if one["group"] not in found["loads"]]
        # stable
        found[key] = sorted([*kept, *found[key]], key=lambda one: GROUPS.index(one["group"]))
    found["loads"] = before["loads"] | found["loads"]
    out[at:] = [before | found, *out[at + 1 :]]
    return out


def measure(
    groups: Sequence[str], size: str, device: str, precision: str = "auto"
) -> dict[str, Any]:
    """Run groups of benchmarks and return what this machine adds to the JSON file."""
    modules = {group: load(group) for group in groups}
    bench = Bench(size, device, precision)
    start = time.perf_counter()
    # 0 on a machine that does nothing else
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    bench.extra["loads"] = dict.fromkeys(groups, load_before)
    for bench.group in groups:
        modules[bench.group].run(bench)
    bench.extra["seconds"] = time.perf_counter() - start
    return bench.summary()


def load(name: str) -> ModuleType:
    """Import a module of the folder `benchmarks`."""
    return importlib.import_module(f"benchmarks.{name}")
