"""Memory and time of block-wise prediction against the size of the volume: memory should not depend
on it.

    python benchmarks/memory_inference.py --shapes 64x512x512 128x512x1024 256x1024x1024

Each volume is predicted in a process of its own, from an HDF5 file into an HDF5 file. The network
is one convolution, so that what is measured is the way of the data; a real one adds its feature
maps of one block.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = ["64x512x512", "128x512x1024", "256x1024x1024"]
OFFSETS = [[-1, 0, 0], [0, -1, 0], [0, 0, -1], [-2, 0, 0], [0, -9, 0], [0, 0, -9]]


def main() -> None:
    """Print one line for each volume."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="Z x Y x X voxels")
    parser.add_argument("--block", default="32x256x256", help="voxels")
    parser.add_argument(
        "--folder", type=Path, help="where the volumes go for a while (default: the system's)"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.block, arguments.folder)))
        return
    print(
        f"{'volume':>15} {'image MiB':>10} {'prediction MiB':>15} {'seconds':>8} {'peak MiB':>9} "
        f"{'growth MiB':>11}"
    )
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            command = [
                sys.executable,
                __file__,
                "--child",
                shape,
                "--block",
                arguments.block,
                "--folder",
                folder,
            ]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        print(
            f"{shape:>15} {row['image']:10.0f} {row['prediction']:15.0f} {row['seconds']:8.0f} "
            f"{row['peak']:9.0f} {row['growth']:11.0f}",
            flush=True,
        )


def measure(shape: str, block: str, folder: Path) -> dict[str, float]:
    """Predict a synthetic volume; return MiB and seconds.

    Peaks are of the resident set, growth is since the imports.
    """
    import h5py
    import numpy as np
    from torch import nn

    from gdlib.limits import sides
    from gdlib.predict.files import predict_split
    from gdlib.predict.predictor import Predictor
    from gdlib.types import Embedding

    class Network(nn.Module):
        """One 3x3x3 convolution."""

        ndim = 3
        divisor = halo = (1, 1, 1)
        remainder = margin = (0, 0, 0)

        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv3d(1, 5, 3, padding=1)

        def forward(self, image):
            output = self.convolution(image)
            return Embedding(output[:, :4], output[:, 4:], {})

    volume = sides(shape)
    with h5py.File(folder / "volume.h5", "w") as file:
        image = file.create_dataset("volume/image", (1, *volume), np.uint8, chunks=(1, 16, 64, 64))
        for z in range(0, volume[0], 16):
            layer = np.random.default_rng(z).integers(
                0, 255, (min(16, volume[0] - z), *volume[1:]), np.uint8
            )
            image[0, z : z + 16] = layer
    header = {
        "channels": 1,
        "offsets": OFFSETS,
        "normalisation": {"lower": 1.0, "upper": 99.0},
        "segmentation": {},
    }
    tool = Predictor(Network(), header, device="cpu", precision="float32", block=sides(block))
    before, start = peak(), time.perf_counter()
    predict_split(tool, folder / "volume.h5", folder / "prediction.h5", weights_sha256="")
    return {
        "image": image_size(volume),
        "prediction": image_size(volume) * (len(OFFSETS) + 1),
        "seconds": time.perf_counter() - start,
        "peak": peak(),
        "growth": peak() - before,
    }


def image_size(volume: tuple[int, ...]) -> float:
    """MiB of one byte per voxel."""
    z, y, x = volume
    return z * y * x / 2**20


def peak() -> float:
    """Largest resident set of this process so far, in MiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**20 if sys.platform == "darwin" else size / 2**10


if __name__ == "__main__":
    main()
