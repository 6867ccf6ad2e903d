"""Ask a teacher once about every training image, as a whole, and keep what it says: its maps.

A study is a grid of students that learn from one teacher, at each step from small cuts of images,
enlarged, deformed, turned. The teacher is not asked about these: it sees each image once, as it is
and with all its context, by the code that predicts test images, and `gdlib.data.patches` cuts
image, label and maps at the same places. What changes a student's image alone, as brightness, blur
and noise, the teacher has not seen: it says what it says of the clean image.

A file has by sample, in float16 and with the vector last, so that the vectors of a patch lie
together,

| array | content |
|---|---|
| `embedding` | ([Z,] Y, X, D) raw vectors of all pixels, and |
| `foreground` | ([Z,] Y, X, 1) logits of all pixels; or |
| a level, e.g. `stride8` | ([z,] y, x, C), a feature map; its attribute `corner` is the pixel at |
| | which the first voxel begins |

and the attributes `teacher` and `samples`, SHA-256 of both files, `parts`, the arrays of each
sample, and `levels`, all that the teacher has: by name the channels and the stride.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from gdlib import io
from gdlib.blockwise.blocks import legal_shape
from gdlib.boxes import Box
from gdlib.models import trained
from gdlib.models.ensemble import Ensemble
from gdlib.predict.files import finish_blocks, images_of
from gdlib.predict.predictor import Predictor

# voxels that are stored together: a patch has several times as many
CHUNK = {2: (64, 64), 3: (8, 32, 32)}


def ask(
    teacher: Path | str,
    samples: Path | str,
    out: Path | str,
    *,
    level: str | None = None,
    block: int | Sequence[int] | None = None,
    precision: str = "auto",
    engine: str = "auto",
    device: str = "auto",
) -> None:
    """Write the maps of a teacher.

    An asking that was killed goes on where it was, as `gdlib.predict.files.predict_split` does.

    Args:
        teacher: its weights.
        samples: `.h5` of the images.
        out: `.h5`, see above.
        level: name of a feature map, in place of embedding and foreground; of a teacher that does
            not have it nothing is written.
        block: see `Predictor`; so are the others.
        precision: of the arithmetic.
        engine: what runs the network.
        device: name, or `auto`.

    Raises:
        gdlib.io.DataError: the disk has no room for it, or a value of the teacher is too large for
            half precision.
    """
    out, levels = Path(out), () if level is None else (level,)
    options = {"block": block, "precision": precision, "engine": engine, "device": device}
    network, header = trained(teacher, "channels", "normalisation")
    if level is not None and isinstance(network, Ensemble):
        network = network.members[0]  # whose feature maps they are; the others are not asked
    predictor = Predictor(network, header, levels=levels, **options)
    parts = ["embedding", "foreground"] if level is None else list(predictor.levels)
    known = {name: [channels, list(stride)] for name, (channels, stride) in network.levels.items()}
    about = {
        "teacher": io.sha256(teacher),
        "samples": io.sha256(samples),
        "parts": parts,
        "levels": known,
    }
    partial = out.with_name(f".{out.name}.partial")
    with io.open_h5(samples) as file:
        images = images_of(predictor, file) if parts else {}
        _say_size(predictor, [image.shape for image in images.values()], parts, out)

        def compute(name: str, box: Box) -> list[np.ndarray]:
            if level is None:
                embedding, foreground = predictor.embed(images[name], box)
                return [_half(embedding), _half(foreground[None])]
            ((feature, voxels, corner),) = predictor.features(images[name], box).values()
            return [_half(feature), np.array([[v.start, v.stop] for v in voxels]), np.array(corner)]

        blocks = finish_blocks(
            predictor, images, compute, partial, [about["teacher"], about["samples"], *parts]
        )
        with io.create_h5(out, **about) as maps:
            for name, box, arrays in blocks:
                group, shape, attrs = maps.require_group(name), images[name].shape, {}
                if level is not None:
                    *arrays, voxels, corner = arrays
                    box, attrs = tuple(slice(a, b) for a, b in voxels.tolist()), {"corner": corner}
                    sides = zip(shape, corner.tolist(), network.levels[level][1], strict=True)
                    shape = tuple(-(-(n - c) // s) for n, c, s in sides)
                for part, array in zip(parts, arrays, strict=True):
                    if part not in group:
                        _make(group, part, (*shape, array.shape[-1])).attrs.update(attrs)
                    group[part][box] = array
    partial.unlink()


def _make(group: h5py.Group, part: str, shape: Sequence[int]) -> h5py.Dataset:
    """Make room for vectors, (*sides, C).

    Not compressed, as patches are read at every step, but with checksums.
    """
    chunks = (*map(min, CHUNK[len(shape) - 1], shape), shape[-1])
    return group.create_dataset(
        part, shape, np.float16, chunks=chunks, fletcher32=True, track_times=False
    )


def _half(maps: Tensor) -> np.ndarray:
    """Maps (C, *sides) as they are stored, (*sides, C) float16."""
    half = maps.movedim(0, -1).half().contiguous().cpu()
    if not torch.isfinite(half).all():
        raise io.DataError(
            "the teacher says values that are too large for half precision; choose "
            "`teacher: online`"
        )
    return half.numpy()


def _say_size(
    predictor: Predictor, shapes: list[tuple[int, ...]], parts: list[str], out: Path
) -> None:
    """Say how much the maps take of the disk, and raise if it is not there."""
    network, size = predictor.network, 0
    if predictor.levels:
        channels, stride = network.levels[predictor.levels[0]]
        size = (
            2
            * channels
            * sum(
                math.prod(-(-n // s) for n, s in zip(shape, stride, strict=True))
                for shape in shapes
            )
        )
    elif parts:
        sides = [
            n + 2 * m
            for n, m in zip(legal_shape(network, [1] * network.ndim), network.margin, strict=True)
        ]
        embedding, _ = predictor.forward(torch.zeros(predictor.header["channels"], *sides))
        size = 2 * (len(predictor.lengthened(embedding)) + 1) * sum(map(math.prod, shapes))
    said = (
        f"{' and '.join(parts) or 'nothing'} of {len(shapes)} images: {size / 1e6:,.1f} MB, "
        "twice as much while it is made"
    )
    print(said, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < 2 * size:
        raise io.DataError(f"{out}: there is no room for {said}; free some")
