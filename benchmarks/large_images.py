"""Memory and time of `gdlib segment` on large images, in one piece and in blocks.

    python benchmarks/large_images.py --sides 3000 6000 --memory 8 2

Each image is segmented in a process of its own, from a TIFF file into a TIFF file. The network sees
single pixels, and tells objects apart by their brightness, so that what is measured is the way of
the data and the segmentation; a real one adds its feature maps of one pass.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from gdlib.types import Embedding

STEP = 30  # pixels between the centres of two objects
RADIUS = 7
OFFSETS = [
    [-1, 0],
    [0, -1],
    [-3, 0],
    [0, -3],
    [-5, 0],
    [0, -5],
    [-9, 0],
    [0, -9],
    [-27, 0],
    [0, -27],
]


class Brightness(nn.Module):
    """Vectors whose angle is the brightness of a pixel; what is dark is background."""

    ndim = 2
    divisor = (1, 1)
    halo = remainder = margin = (0, 0)
    levels: dict = {}

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, image: torch.Tensor) -> Embedding:
        """Take (B, 1, Y, X), 0 to 1."""
        angle = self.scale * image
        return Embedding(torch.cat([angle.cos(), angle.sin()], 1), 100 * (image - 0.1), {})


def main() -> None:
    """Print one line for each size and limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", nargs="+", type=int, default=[3000, 6000], help="pixels")
    parser.add_argument("--memory", nargs="+", default=["16", "2"], help="GiB that may be used")
    parser.add_argument("--segmenter", default="mutex_watershed")
    parser.add_argument(
        "--folder", type=Path, help="where the images go for a while (default: the system's)"
    )
    arguments = parser.parse_args()
    print(f"{'pixels':>9} {'may use GiB':>12} {'seconds':>8} {'peak GiB':>9} {'objects':>9}  said")
    for side in arguments.sides:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            image = make(Path(folder), side)
            for memory in arguments.memory:
                row = measure(Path(folder), image, memory, arguments.segmenter)
                print(
                    f"{side:>8}² {memory:>12} {row['seconds']:8.0f} {row['peak']:9.2f} "
                    f"{row['objects']:>9}  {row['said']}",
                    flush=True,
                )


def make(folder: Path, side: int) -> Path:
    """Write the weights, and an image of discs of random brightness, a few rows at a time."""
    import numpy as np
    import tifffile

    from gdlib import io
    from gdlib.segment.mutex import mutex_watershed

    mutex_watershed(np.zeros((2, 8, 8), np.uint8), np.ones((8, 8), bool), OFFSETS[:2])  # compiled
    header = {
        "model": "large_images:Brightness", "options": {}, "channels": 1, "offsets": OFFSETS,
        "normalisation": {"lower": 1.0, "upper": 99.8}, "segmentation": {"mutex_watershed": {}},
    }  # fmt: skip
    io.save_weights(folder / "weights.safetensors", Brightness().state_dict(), header)
    y, x = np.indices((STEP, STEP)) - STEP // 2
    disc = np.hypot(y, x) <= RADIUS
    image = tifffile.memmap(
        folder / "image.tif",
        shape=(side, side),
        dtype=np.uint8,
        photometric="minisblack",
        bigtiff=True,
    )
    rng = np.random.default_rng(0)
    for start in range(0, side, STEP):
        rows = np.kron(
            rng.integers(60, 250, (1, side // STEP + 1), np.uint8), disc.astype(np.uint8)
        )
        image[start : start + STEP] = rows[: side - start, :side]
    image.flush()
    return folder / "image.tif"


def measure(folder: Path, image: Path, memory: str, segmenter: str) -> dict[str, str | float]:
    """Return GiB, seconds and what was printed; the peak is that of the resident set."""
    command = [
        sys.executable,
        "-m",
        "gdlib",
        "segment",
        image,
        "--model",
        folder / "weights.safetensors",
        "--device",
        "cpu",
    ]
    command += [
        "--precision",
        "float32",
        "--memory",
        memory,
        "--segmenter",
        segmenter,
        "--out",
        folder / f"out{memory}",
    ]
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "GDLIB_PLUGINS": "large_images"}
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    *_, objects, peak = done.stdout.splitlines()
    size = int(peak) * (1 if sys.platform == "darwin" else 1024)
    said = next((line for line in done.stderr.splitlines() if "GiB" in line), "").rpartition(
        "image.tif: "
    )[2]
    return {
        "seconds": time.perf_counter() - start,
        "peak": size / 2**30,
        "objects": objects.split()[-2],
        "said": said,
    }


if __name__ == "__main__":
    main()
