"""A network in 8 bits (see `gdlib.predict.int8`) that is read and run without torch.

It does what `gdlib.predict.predictor.Predictor` does with the same file. A command on one image
takes half the time without torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gdlib import devices, io, jit
from gdlib.blockwise import stored, vino
from gdlib.blockwise.blocks import Blockwise, Source
from gdlib.boxes import Box, intersection, relative
from gdlib.types import Prediction

NAME = "int8"
PARTS = ("xml", "bin")  # of OpenVINO's own form, as bytes
FACTS = "network"  # of the header of such a file
MEASURED = "AVX512-VNNI"  # AMX comes with it; others are taken by who asks for 8 bits alone


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
    levels: Mapping[str, Any] = field(default_factory=dict, init=False)

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


def form(path: Path, weights: Path | str) -> tuple[Any, dict[str, Any]]:
    """Read a network in 8 bits: OpenVINO's model and the header of the file.

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
        return vino.core().read_model(*(arrays[part].tobytes() for part in PARTS)), header
    except Exception as error:  # of a parser there is no telling which
        raise io.DataError(
            f"{path}: OpenVINO cannot read it ({' '.join(str(error).split())[:200]}); "
            "`gdlib quantise` makes it anew"
        ) from error


def run_by(model: Any, at_once: int = 1) -> vino.Run:
    """Return what runs a network in 8 bits; what there is between its layers, in the type that is
    the fastest here.
    """
    return vino.compiled(model, "bf16" if devices.bfloat16_pays() else "f32", at_once)


class Lite(Blockwise):
    """A network in 8 bits. For the arguments see `Blockwise`, `run` is what runs it."""

    engine = "openvino"
    precision = "torch.int8"
    itemsize = 1

    def __init__(
        self,
        network: Facts,
        header: dict[str, Any],
        run: vino.Run,
        block: int | Sequence[int] | None = None,
        invert: bool = False,
    ) -> None:
        super().__init__(network, header, block, invert)
        self.run = run

    def predict(self, source: Source, box: Box, kept: Box | None = None) -> Prediction:
        """Predict one part of an image; see `Blockwise.predict`."""
        reach = self.reach(source, box)
        image, frame = self.read(source, reach)
        inner, within = relative(box, frame), relative(reach, frame)
        embedding, logit = (part[0] for part in self.run(image[None]))
        wanted = None
        if kept is not None:
            part = relative(intersection(box, kept), frame)
            wanted = embedding[(slice(None), *part)]
        return Prediction(
            stored.affinities(embedding, self.header["offsets"], inner, within),
            stored.foreground(logit[(0, *inner)]),
            wanted,
        )


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
    """Return what predicts with a weights file in 8 bits; None where that is not wanted, or where
    `gdlib.predict.predictor.Predictor` is to do it, or to say why it cannot.

    Args:
        weights: of the network itself.
        device: name, or `auto`.
        precision: `int8`, or `auto`, which takes it where it was measured to be faster.
        engine: `openvino` or `auto`.
        augment: not done here.
        at_once: see `vino.compiled`.
        options: of `Blockwise`.
    """
    path = io.int8_beside(weights)
    units = devices.int8_units() if devices.has_only_cpu() or device == "cpu" else []
    if (
        precision not in (NAME, "auto")
        or not (MEASURED in units or (precision == NAME and units))
        or device not in ("cpu", "auto")
        or engine not in ("openvino", "auto")
        or augment
        or not (jit.ENABLED and vino.is_installed() and path.is_file())
        or (network := Facts.of(io.read_header(path))) is None
    ):
        return None
    header = io.read_header(weights)
    io.check_trusted(weights, header)
    io.check_header(weights, header)
    stored.warm_up()
    try:
        model, _ = form(path, weights)
    except io.DataError:
        return None
    predictor = Lite(network, header, run_by(model, at_once), **options)
    predictor.at_once = at_once
    return predictor
