"""Trained networks: those that come with the package, and one call to use any of them on arrays."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdlib import io
from gdlib.io.failures import DataError
from gdlib.registry import nearest

if TYPE_CHECKING:
    from gdlib.blockwise.blocks import Blockwise, Source
    from gdlib.types import Offsets, Prediction

FOLDER = Path(__file__).parent / "weights"
DEFAULT = "nuclei"


def names() -> list[str]:
    """Return the names of the networks that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors") if "." not in path.stem)


def find(model: Path | str) -> Path:
    """Return the weights file of a network: a file, or the name of one that comes with the package.

    Raises:
        DataError: there is neither.
    """
    path, known = Path(model), str(model) in names()
    if path.is_file() or path.suffix or path.name != str(model) or (path.exists() and not known):
        return path  # what is wrong with it is said where it is read
    if not known:
        raise DataError(
            f'there is no file and no built-in network "{model}": {nearest(str(model), names())}, '
            "or give a weights file"
        )
    return FOLDER / f"{model}.safetensors"


def fitting(ndim: int) -> str:
    """Return a hint which built-in networks take images of so many axes, or nothing."""
    found = [name for name in names() if len(io.read_header(find(name))["offsets"][0]) == ndim]
    kind = {2: "images", 3: "volumes"}[ndim]
    if not found:
        return ""
    *others, last = found
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"; of the built-in networks, {listed} take {kind}"


def bright_ground(is_inverted: bool, invert: str, leave: str) -> str:
    """Return a hint on an image whose ground is where objects were in the training.

    Args:
        is_inverted: is the image seen as its negative?
        invert: what to do to see it so.
        leave: what to do to see it as it is.
    """
    mend = f"bright here, {leave}" if is_inverted else f"dark on a bright ground here, {invert}"
    return f"most of the image is as bright as objects were in the training; if objects are {mend}"


class Model:
    """A trained network that segments arrays; made by `load`. Several threads may share one."""

    def __init__(self, path: Path, **kwargs: Any) -> None:
        """See `load`; the arguments are those of `predictor`."""
        self.path = path
        self._predictor = predictor(path, **kwargs)
        self._header = self._predictor.header  # with all offsets, whatever a call asks for
        self._lock = threading.Lock()  # an engine computes one image at a time

    @property
    def info(self) -> Mapping[str, Any]:
        """What the weights file says of itself: network, offsets, normalisation, segmenters,
        validation scores, training.
        """
        return self._header

    @property
    def ndim(self) -> int:
        """Axes that the network sees at once: 2 or 3."""
        return self._predictor.network.ndim

    def __repr__(self) -> str:
        header = self.info
        return (
            f"<{self.path.stem}: {header['model']}, {self.ndim}D, {header['channels']} channel(s)>"
        )

    def segment(
        self,
        image: np.ndarray,
        axes: str | None = None,
        *,
        pixel_size: float | Sequence[float] | None = None,
        diameter: float | None = None,
        segmenter: str | None = None,
        **parameters: float,
    ) -> np.ndarray:
        """Find the objects of an image.

        Args:
            image: intensities as recorded, of any real type. Without `axes`: (Y, X) or (Z, Y, X),
                as the network wants them, with the channels first if it wants several.
            axes: a letter per axis, of `TCZYX`, in any order, e.g. `"YXC"`. Along T, and along Z
                where the network is 2D, every frame is segmented on its own.
            pixel_size: of the image in microns, one number or one per axis of the network: the
                image is brought to the pixels of the training images, and the labels back. Only
                if `info["pixel_size"]` is there.
            diameter: the same by the diameter of a typical object in pixels, if
                `info["diameter"]` is there: percentiles 5, 50 and 95 of the training images. It is
                given instead of `pixel_size`, and not beside it.
            segmenter: what makes objects of affinities; the one that the weights were chosen with
                if left out.
            parameters: of the segmenter, instead of those that were tuned.

        Returns:
            uint32 labels, 0 = background; the axes of the image without C, in the order T, Z, Y, X.

        Raises:
            DataError: the image does not fit the network.
            ValueError: no such segmenter, parameter or value; or both `pixel_size` and `diameter`.
        """
        from gdlib.data.scale import factors
        from gdlib.segment.parameters import chosen
        from gdlib.segment.segmenters import stride, used

        if not (pixel_size is None or diameter is None):
            raise ValueError(
                "pixel_size and diameter both say how the image is to be scaled: leave one out"
            )
        segmenter, all_of_them = chosen(self.path, self.info, segmenter, parameters)
        offsets = used(segmenter, self.info["offsets"])
        by = factors(self.info, self.ndim, pixel_size, diameter)
        frames = self._frames(image, axes)
        labels = np.empty(frames.shape + frames.sides, np.uint32)
        first = self._predictor.source(np.asarray(frames[(0,) * len(frames.shape)]))
        if first.ground_is_elsewhere:
            ways = "load it with invert=True", "load the network without invert"
            warnings.warn(bright_ground(self._predictor.invert, *ways), stacklevel=2)

        def predict(frame: np.ndarray | Source) -> Prediction:
            return self._predict(frame, False, offsets, stride(segmenter, all_of_them))

        for index in np.ndindex(frames.shape):
            labels[index] = objects(
                predict,
                # its range is known already, where it is not scaled
                frames[index] if any(index) or by is not None else first,
                offsets,
                segmenter,
                all_of_them,
                by,
            )
        return labels

    def predict(self, image: np.ndarray, axes: str | None = None) -> Prediction:
        """Predict affinities, foreground and embedding of one image.

        For the arguments see `segment`.

        Returns:
            A `gdlib.types.Prediction`: `affinity` (K, [Z,] Y, X) uint8, 255 times the affinity to
            the neighbour at each of `info["offsets"]`; `foreground` ([Z,] Y, X) uint8, 255 times
            its probability; `embedding` (D, [Z,] Y, X) float32.
        """
        frames = self._frames(image, axes)
        if frames.shape:
            raise DataError(
                f"an image of shape {np.shape(image)} has several frames: predict them one by one"
            )
        return self._predict(frames[()], True, self.info["offsets"])

    def _predict(
        self, image: np.ndarray | Source, keep_embedding: bool, offsets: Offsets, stride: int = 1
    ) -> Prediction:
        with self._lock:
            self._predictor.ask_for(offsets, stride)
            return self._predictor(image, keep_embedding=keep_embedding)

    def _frames(self, image: np.ndarray, axes: str | None) -> Any:
        """Return an image as `gdlib.data.frames.Frames` of what the network wants."""
        from gdlib.data.frames import Frames

        image = np.asarray(image)
        channels, own = self.info["channels"], "ZYX"[-self.ndim :]
        if axes is None:
            axes = own if image.ndim == self.ndim and channels == 1 else f"C{own}"
        if 0 in image.shape:
            raise DataError(f"an image of shape {image.shape} has none; give at least one pixel")
        frames = Frames(image, axes, self.ndim)
        if frames.channels != channels:
            raise DataError(
                f"an image of shape {image.shape}, axes {axes.upper()}, has {frames.channels} "
                "channel(s), and the network "
                f"{self.path.stem} wants {channels}: choose which, as in image[0], or say which "
                "axis is which by `axes`"
            )
        return frames


def predictor(weights: Path, **kwargs: Any) -> Blockwise:
    """Return what predicts with a weights file: without torch where that can be.

    For the arguments see `gdlib.predict.predictor.Predictor`.
    """
    from gdlib.blockwise import lite

    if not io.is_onnx(weights) and (found := lite.load(weights, **kwargs)) is not None:
        return found
    from gdlib.predict import int8
    from gdlib.predict.predictor import Predictor

    found = Predictor.load(weights, **kwargs)
    _ = found.run  # is made ready: only then it is sure which engine can
    if found.engine == "openvino" and found.precision.removeprefix("torch.") in lite.HINTS:
        int8.keep(weights, found.network, found.header["channels"], found.basis)
    return found


def objects(
    predict: Callable[[np.ndarray | Source], Prediction],
    image: np.ndarray | Source,
    offsets: Sequence[Sequence[int]],
    segmenter: str,
    parameters: Mapping[str, float],
    by: Sequence[float] | None = None,
) -> np.ndarray:
    """Find the objects of one image, of another scale if wanted.

    Args:
        predict: what makes a prediction of an image.
        image: (C, [Z,] Y, X), or, if it is not to be scaled, a `Source` of it.
        offsets: of the affinities.
        segmenter: what makes objects of them.
        parameters: of the segmenter.
        by: factor for each axis by which the network sees the image enlarged.

    Returns:
        ([Z,] Y, X) uint32 labels of the size of the image.
    """
    from gdlib.data import scale
    from gdlib.segment.segmenters import segment

    found = predict(image if by is None else scale.resized(image, by))
    label = segment(found.affinity, found.foreground, offsets, segmenter, **parameters)
    return label if by is None else scale.back(label, image.shape[1:])


def load(
    model: Path | str = DEFAULT,
    *,
    device: str = "auto",
    precision: str = "auto",
    engine: str = "auto",
    invert: bool = False,
    augment: bool = False,
) -> Model:
    """Load a trained network.

    Args:
        model: `names()` says which come with the package; or a weights file of your own, or
            what `gdlib export` made of one as ONNX.
        device: `auto`, `cpu`, `cuda`, `mps`, ...
        precision: of the arithmetic: `auto`, `float32`, `bfloat16`, `float16`, or `int8` where
            `gdlib quantise` made it possible.
        engine: what runs the network: `auto`, `torch` or `openvino`.
        invert: see images as their negatives: where objects are dark on a bright ground, and were
            bright in the training.
        augment: see every image turned and mirrored in eight ways, and take the means; takes eight
            times as long.

    Raises:
        DataError: there is no such file or name, or it is no weights file.
    """
    options = {"precision": precision, "engine": engine, "invert": invert, "augment": augment}
    return Model(find(model), device=device, **options)
