"""A network that is read and run by OpenVINO, without torch: in 8 bits (see `gdlib.predict.int8`),
or as it was converted when it was used first, which is kept in a folder of the user's cache.

It does what `gdlib.predict.predictor.Predictor` does, to the last bit. A command on one image takes
half the time without torch. Such a file is named by all that it depends on, and the newest `MOST`
are kept. The folder is `GDLIB_CACHE`, else `gdlib` in the user's cache; where that is empty or
cannot be written, nothing is kept.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gdlib import devices, io
from gdlib.blockwise import vino
from gdlib.blockwise.blocks import Blockwise, Source
from gdlib.boxes import Box, intersection, relative
from gdlib.types import Prediction

NAME = "int8"
PARTS = ("xml", "bin")  # of OpenVINO's own form, as bytes
BASIS = "basis"  # of vectors that it gives shortened (see `gdlib.models.shortened`)
FACTS = "network"  # of the header of such a file
KEPT = ".network.safetensors"  # ending of the names of what is kept
MOST = 16  # networks
# types that what is kept computes in
HINTS = {name: vino.PRECISIONS[name] for name in ("float32", "bfloat16")}


@dataclass(frozen=True)
class Facts:
    """What the file says of its network; tuples have one entry per axis (see `gdlib.models`).

    Attributes:
        held: bytes of tensors of float32 that are alive at once, per pixel that is read.
        length: of a pixel's vector.
    """

    ndim: int
    divisor: tuple[int, ...]
    remainder: tuple[int, ...]
    margin: tuple[int, ...]
    halo: tuple[int, ...]
    held: float
    length: int

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> "Facts | None":
        """Read the header of a file; those of earlier versions say nothing."""
        try:
            facts = {
                name: tuple(map(int, value)) if isinstance(value, list) else value
                for name, value in header[FACTS].items()
            }
            return cls(**facts)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


class Form(NamedTuple):
    """A network as OpenVINO has it.

    Attributes:
        model: of OpenVINO.
        header: of the file.
        basis: (D, R) float32, of vectors that it gives with R numbers; None if they have D.
    """

    model: Any
    header: dict[str, Any]
    basis: np.ndarray | None


def form(path: Path, weights: Path | str) -> Form:
    """Read a network in 8 bits, or one that is kept.

    Args:
        path: of the file.
        weights: that it is to be made of.

    Raises:
        DataError: it is damaged, or made of others.
    """
    arrays, header = io.load_arrays(path)
    if header.get(io.INT8_OF) != io.sha256(weights):
        raise io.DataError(f"{path}: it was made of other weights; `gdlib quantise` makes it anew")
    try:
        model = vino.core().read_model(*(arrays[part].tobytes() for part in PARTS))
    except Exception as error:  # of a parser there is no telling which
        raise io.DataError(
            f"{path}: OpenVINO cannot read it ({' '.join(str(error).split())[:200]}); "
            "`gdlib quantise` makes it anew"
        ) from error
    return Form(model, header, arrays.get(BASIS))


def lengthened(vectors: np.ndarray, basis: np.ndarray | None) -> np.ndarray:
    """Return vectors (R, *sides) in all their dimensions, (D, *sides)."""
    if basis is None:
        return vectors
    return np.tensordot(basis, vectors, 1)


def run_by(model: Any, at_once: int = 1) -> vino.Run:
    """Return what runs a network in 8 bits; what there is between its layers, in the type that is
    the fastest here.
    """
    return vino.compiled(model, "bf16" if devices.bfloat16_pays() else "f32", at_once)


def kept(weights: Path | str) -> Path | None:
    """Return where a network is kept as it was converted, None if nothing is to be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("GDLIB_CACHE", os.path.join(cache, "gdlib"))
    if not folder:
        return None
    try:
        about = f"{io.sha256(weights)} {version('openvino')} {io.code_sha256()}"
    except PackageNotFoundError:  # it came in another way than as a package of Python
        return None
    return Path(folder, f"{hashlib.sha256(about.encode()).hexdigest()[:16]}{KEPT}")


class Lite(Blockwise):
    """A network without torch.

    Args:
        network: what is known of it.
        header: of its weights file.
        run: what runs it.
        precision: type that it computes in, by torch's name.
        itemsize: bytes of a number of this type.
        basis: of its vectors, see `Form`.
        at_once: threads that may use it at the same time.
        options: of `Blockwise`.
    """

    engine = "openvino"

    def __init__(
        self,
        network: Facts,
        header: dict[str, Any],
        run: vino.Run,
        *,
        precision: str,
        itemsize: int,
        basis: np.ndarray | None = None,
        at_once: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(network, header, **options)
        self.basis = basis
        self.run, self.precision, self.itemsize, self.at_once = run, precision, itemsize, at_once

    def alive(self, shape: Sequence[int]) -> tuple[float, int]:
        """Return what is known of the network; see `Blockwise.alive`."""
        return self.network.held, self.network.length

    def predict(self, source: Source, box: Box, kept: Box | None = None) -> Prediction:
        """Predict one part of an image; see `Blockwise.predict`."""
        from gdlib.blockwise import stored  # which is imported beside what runs the network

        reach = self.reach(source, box)
        image, frame = self.read(source, reach)
        inner, within = relative(box, frame), relative(reach, frame)
        wanted = None
        with self.run.lent(image[None]) as ((embedding,), (logit,)):
            if kept is not None:
                part = relative(intersection(box, kept), frame)
                wanted = lengthened(embedding[(slice(None), *part)].copy(), self.basis)
            affinity = stored.affinities(
                embedding, self.header["offsets"], inner, within, self.rows(box)
            )
            return Prediction(affinity, stored.foreground(logit[(0, *inner)]), wanted)


class _Loops(threading.Thread):
    """Gets what is compiled ready, which takes half a second, while OpenVINO reads a network."""

    def __init__(self) -> None:
        super().__init__(name="gdlib loops")
        self._imported = threading.Event()
        self._are_compiled = False

    def run(self) -> None:
        try:
            from gdlib import jit

            if devices.is_own:
                jit.without_blas()
            self._are_compiled = jit.ENABLED
        finally:
            self._imported.set()
        if self._are_compiled:
            from gdlib.blockwise import stored

            stored.warm_up()

    def are_compiled(self) -> bool:
        """Wait until it is known whether they are."""
        self._imported.wait()
        return self._are_compiled


def load(
    weights: Path | str,
    *,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    augment: bool = False,
    at_once: int = 1,
    **options: Any,
) -> Lite | None:
    """Return what predicts with a weights file; None where that is not wanted so, or where
    `gdlib.predict.predictor.Predictor` is to do it, or to say why it cannot.

    Args:
        weights: of the network itself.
        device: name, or `auto`.
        precision: of the arithmetic; `auto` takes 8 bits where there are such and that is faster.
        engine: `openvino` or `auto`.
        augment: not done here.
        at_once: see `vino.compiled`.
        options: of `Blockwise`.
    """
    if (
        not (device == "cpu" or (device == "auto" and devices.has_only_cpu()))
        or engine not in ("openvino", "auto")
        or augment
        or not (vino.is_installed() and Path(weights).is_file())
    ):
        return None
    path, pays = io.int8_beside(weights), devices.int8_pays()
    if precision == NAME or (precision == "auto" and pays and path.is_file()):
        hint, itemsize, precision = "", 1, NAME
        path = path if pays else None
    else:
        if precision == "auto":
            precision = "bfloat16" if devices.bfloat16_pays() else "float32"
        hint, itemsize = HINTS.get(precision, ("", 0))
        path = kept(weights) if hint else None
    if path is None or not path.is_file():
        return None
    header = io.read_header(weights)
    io.check_trusted(weights, header)
    io.check_header(weights, header)
    loops = _Loops()
    loops.start()
    try:
        model, about, basis = form(path, weights)
    except io.DataError:
        if hint:  # it is made anew
            with contextlib.suppress(OSError):
                path.unlink()
        return None
    network = Facts.of(about)
    if network is None or not loops.are_compiled():
        return None
    run = vino.compiled(model, hint, at_once) if hint else run_by(model, at_once)
    kind = {"precision": f"torch.{precision}", "itemsize": itemsize, "at_once": at_once}
    return Lite(network, header, run, basis=basis, **kind, **options)
