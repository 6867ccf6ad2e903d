"""One teacher, many students: patches that are drawn once, and what a teacher says about each, in files.

A study is a grid: the same seed gives every method the same patches, and a teacher says the same about them. So both are
computed once; a student then trains at its own speed. The first pass through a file is what training without it would see, up
to half precision; later passes show its patches in another order, mirrored and turned, and the teacher's output with them. A
network is not exactly equivariant to that, which is the price of showing a patch more than once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import Tensor

from gdlib import io, ops
from gdlib.config import RunSpec
from gdlib.data.patches import PatchSampler, largest_id
from gdlib.distill import Batch, see
from gdlib.inference import choose_device, choose_precision
from gdlib.models import Embedding, build, folded, trained
from gdlib.progress import Progress


def draw(
    drawing: Mapping[str, Any],
    train: Path | str,
    out: Path | str,
    batches: int,
    *,
    margin: Sequence[int],
    networks: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Draw the patches of all students of one dataset and seed.

    Args:
        drawing: of their runs; see `RunSpec`.
        train: samples `.h5`.
        out: `.h5` with `image` (N, C, [Z,] Y, X) float32, `label` (N, [Z,] Y, X) int32 and, where some labels are not known,
            `ignore` (N, [Z,] Y, X) bool; what was learned of the `normalisation` is an attribute.
        batches: how many steps of training they are for.
        margin: the largest of the students and teachers.
        networks: `model` and `options` of those that must be built to know it.
    """
    with torch.device("meta"):
        margins = [margin, *(build(network["model"], network["options"]).margin for network in networks)]
    margin = [max(sides) for sides in zip(*margins, strict=True)]
    sampler, size = PatchSampler(train, **drawing, margin=margin), drawing["batch_size"]
    about = {"drawing": drawing, "train": io.sha256(train), "batches": batches, "margin": margin}
    with io.create_h5(out, **about, normalisation=sampler.normalisation) as file:
        for step in Progress(range(batches), unit="batch", desc="draw"):
            batch = sampler.batch(step)
            parts = {"image": batch.image, "label": batch.label.int(), "ignore": batch.ignore}
            for name, part in parts.items():
                if part is not None:
                    _rows(file, name, part, batches * size)[step * size : (step + 1) * size] = part.numpy()


def teach(
    teacher: Path | str,
    patches: Path | str,
    out: Path | str,
    *,
    level: str | None = None,
    batch_size: int = 8,
    precision: str = "auto",
    device: str = "auto",
) -> None:
    """Ask a teacher about every patch of a file, once.

    Args:
        teacher: its weights.
        patches: file of `draw`.
        out: `.h5` with, in half precision, `embedding` (N, D, [Z,] Y, X) and `foreground` (N, 1, [Z,] Y, X), or a feature map.
        level: name of the feature map; of a teacher that does not have it nothing is written.
        batch_size: patches per pass.
        precision: of the students' recipe.
        device: name, or `auto`.

    Raises:
        gdlib.io.DataError: a value of the teacher is too large for half precision.
    """
    target = choose_device(device)
    dtype = choose_precision(precision, target)
    network, _ = trained(teacher)
    names = ["embedding", "foreground"] if level is None else [level] if level in network.levels else []
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[network.ndim]
    network = folded(network).to(target, memory_format=layout)
    _check_drawn(patches, io.read_attrs(patches))
    with io.open_h5(patches) as file, io.create_h5(out, teacher=io.sha256(teacher)) as taught:
        count = len(file["image"]) if names else 0
        for first in Progress(range(0, count, batch_size), unit="batch", desc="ask"):
            rows = slice(first, min(count, first + batch_size))
            image, label = (torch.from_numpy(file[name][rows]).to(target) for name in ("image", "label"))
            with torch.inference_mode(), torch.autocast(target.type, dtype, enabled=dtype != torch.float32):
                output = see(network, Batch(image.contiguous(memory_format=layout), label, label))
            parts = output.features | {"embedding": output.embedding, "foreground": output.foreground}
            for name in names:
                part = parts[name].half().contiguous().cpu()
                if not torch.isfinite(part).all():
                    raise io.DataError(
                        f"{teacher}: a value of its {name} is too large for half precision: do not cache it"
                    )
                _rows(taught, name, part, count)[rows] = part.numpy()


def _rows(file: h5py.File, name: str, part: Tensor, count: int) -> h5py.Dataset:
    """Return the dataset with `count` rows like those of `part`, made on first use; it will be read row by row."""
    if name not in file:
        dtype = str(part.dtype).removeprefix("torch.")
        shape = (count, *part.shape[1:])
        file.create_dataset(name, shape, dtype, chunks=(1, *shape[1:]), fletcher32=True, track_times=False)
    return file[name]


def _check_drawn(path: Path | str, attrs: Mapping[str, Any]) -> None:
    if not {"drawing", "train", "batches", "margin"} <= set(attrs):
        raise io.DataError(f"{path}: this is no file of drawn patches; make one with `gdlib step draw`")


class CachedPatches:
    """Batches from files of `draw` and `teach`: like those of `PatchSampler` a pure function of (seed, step).

    Args:
        patches: file of `draw`.
        taught: files of `teach` for these patches; without any, batches come without the teacher's output.
        seed: of the run.
        flip: mirror patches that are shown again.
        rotate90: turn them.
        device: where batches are returned.
    """

    def __init__(
        self,
        patches: Path | str,
        taught: Sequence[Path | str] = (),
        *,
        seed: int,
        flip: bool = True,
        rotate90: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.attrs = io.read_attrs(patches)
        _check_drawn(patches, self.attrs)
        self.normalisation = self.attrs.get("normalisation")
        self.file = h5py.File(patches, "r")
        files = [h5py.File(path, "r") for path in taught]
        self.taught = {name: file[name] for file in files for name in file}
        self.margin = tuple(self.attrs["margin"])
        self.batches = int(self.attrs["batches"])
        self.batch_size = len(self.file["label"]) // self.batches
        self.seed, self.flip, self.rotate90 = seed, flip, rotate90
        self.device = torch.device(device)

    def batch(self, step: int) -> Batch:
        """Return the patches of one step."""
        turn, place = divmod(step, self.batches)
        rows = torch.arange(place * self.batch_size, (place + 1) * self.batch_size)
        moves: list[tuple[list[int], int]] = [([], 0)] * self.batch_size
        if turn:
            rows = torch.randperm(self.batches * self.batch_size, generator=self._generator(-turn))[rows]
            generator = self._generator(step)
            moves = [self._move(generator) for _ in range(self.batch_size)]

        def read(maps: h5py.Dataset) -> Tensor:
            with io.readable(maps.file):
                parts = [torch.from_numpy(maps[row]) for row in rows.tolist()]
            return torch.stack([_moved(part, *move) for part, move in zip(parts, moves, strict=True)])

        parts = {name: read(self.file[name]) for name in ("image", "label", "ignore") if name in self.file}
        parts |= {name: read(maps) for name, maps in self.taught.items()}
        parts["ids"] = rows  # a patch that is shown again does not meet itself
        largest = largest_id([parts["label"]], parts["label"][0].numel(), self.device)
        parts = {name: ops.send(part, self.device) for name, part in parts.items()}
        image, label, ids, ignore = (parts.pop(name, None) for name in ("image", "label", "ids", "ignore"))
        teacher = Embedding(parts.pop("embedding", None), parts.pop("foreground", None), parts) if self.taught else None
        return Batch(image, label.long(), ids, ignore, teacher, largest)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 2_654_435_761 + number) % 2**32)

    def _move(self, generator: torch.Generator) -> tuple[list[int], int]:
        """Draw which axes are mirrored, counted from the last, and how many quarter turns are made in the plane."""
        shapes = self.file["label"].shape, self.file["image"].shape
        coins = torch.randint(2, (len(self.margin),), generator=generator).tolist()
        turns = int(torch.randint(4, (1,), generator=generator))
        turns -= turns % 2 if any(shape[-1] != shape[-2] for shape in shapes) else 0
        axes = [-1 - axis for axis, coin in enumerate(coins) if coin]
        return axes if self.flip else [], turns if self.rotate90 else 0


def _moved(part: Tensor, axes: list[int], turns: int) -> Tensor:
    """Mirror a patch along its last axes and turn it; the vector of a pixel moves with it, unchanged."""
    part = part.flip(axes) if axes else part
    return torch.rot90(part, turns, (-2, -1)) if turns else part


def source_of_patches(
    spec: RunSpec,
    train: Path | str,
    margin: Sequence[int],
    device: torch.device,
    patches: Path | str | None = None,
    taught: Sequence[Path | str] = (),
    teacher: Path | str | None = None,
) -> PatchSampler | CachedPatches:
    """Return where the batches of a run come from.

    Args:
        spec: the run.
        train: samples `.h5`.
        margin: the largest of its networks.
        device: where batches are returned.
        patches: file of `draw`; without it patches are drawn as they are needed.
        taught: files of `teach`.
        teacher: the weights of the teacher that must have been asked.

    Raises:
        gdlib.io.DataError: the files were made for another run, or of another teacher.
    """
    if patches is None:
        return PatchSampler(train, **spec.drawing, margin=margin, device=device)
    for path in taught:
        if io.read_attrs(path).get("teacher") != io.sha256(teacher):
            raise io.DataError(f"{path}: another teacher than {teacher} was asked; make it again")
    geometry = spec.recipe.augment.geometry
    cached = CachedPatches(
        patches, taught, seed=spec.seed, flip=geometry.flip, rotate90=geometry.rotate90, device=device
    )
    drawn = {"train": cached.attrs["train"], "margin": list(cached.margin), **cached.attrs["drawing"]}
    enough = [max(pair) for pair in zip(margin, cached.margin, strict=True)]
    for key, mine in {"train": io.sha256(train), "margin": enough, **spec.drawing}.items():
        if mine != drawn[key]:
            raise io.DataError(f"{patches}: it was drawn with {key} {drawn[key]}, this run needs {mine}; make it again")
    return cached
