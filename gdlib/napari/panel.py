"""A panel beside the image: choose a layer and a network, and find the objects in a thread."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gdlib import io, trained
from gdlib.io.failures import sentences

OWN = "a file ..."  # choice of the network
LENGTHS = {"nanometer": 1e-3, "micrometer": 1.0, "micron": 1.0, "millimeter": 1e3, "meter": 1e6}


def panel() -> Any:
    """Return the panel of the viewer that is open, as magicgui and napari take it."""
    from napari import current_viewer

    return Panel(current_viewer()).widget


class Panel:
    """What the user chooses, what runs, and what comes of it.

    Args:
        viewer: of napari.

    Attributes:
        widget: all of it, to be shown.
        worker: what runs, None if nothing does.
    """

    def __init__(self, viewer: Any) -> None:
        from magicgui import widgets
        from napari.layers import Image

        self.viewer, self.worker, self._stop = viewer, None, threading.Event()
        self._models: dict[tuple[Path, bool], trained.Model] = {}
        self.image = widgets.create_widget(annotation=Image, label="image")
        self.network = widgets.ComboBox(
            label="network", choices=[*trained.names(), OWN], value=trained.DEFAULT
        )
        self.file = widgets.FileEdit(label="weights", filter="*.safetensors")
        self.pixel_size = widgets.LineEdit(label="pixel size (microns)")
        self.pixel_size.native.setPlaceholderText("one number, or ZxYxX; empty: as it is")
        self.diameter = widgets.FloatSpinBox(label="diameter (pixels)", value=0, max=1e6, step=1)
        self.diameter.native.setSpecialValueText("as it is")
        self.invert = widgets.CheckBox(text="objects are dark on a bright ground")
        self.about, self.message = widgets.Label(label=""), widgets.Label(label="")
        for one in (self.about, self.message):
            one.native.setWordWrap(True)
        self.run = widgets.PushButton(text="Find objects")
        self.cancel = widgets.PushButton(text="Cancel", enabled=False)
        self.progress = widgets.ProgressBar(label="", max=100)
        buttons = widgets.Container(
            widgets=[self.run, self.cancel], layout="horizontal", labels=False
        )
        about = [self.about, self.pixel_size, self.diameter, self.invert]
        parts = [self.image, self.network, self.file, *about, buttons, self.progress, self.message]
        self.widget = widgets.Container(widgets=parts)
        self.widget.panel = self  # lives as long as it is shown
        self.image.changed.connect(self._measure)
        self.network.changed.connect(self._chosen)
        self.file.changed.connect(self._chosen)
        self.run.changed.connect(self.start)
        self.cancel.changed.connect(self.stop)
        viewer.layers.events.inserted.connect(self.image.reset_choices)
        viewer.layers.events.removed.connect(self.image.reset_choices)
        self._chosen()

    def start(self) -> None:
        """Find the objects of the layer that is chosen, in a thread; labels become a layer."""
        from napari.qt.threading import create_worker

        layer = self.image.value
        if layer is None:
            self._say("open an image first")
            return
        self._stop.clear()
        self.worker = create_worker(
            self._work, layer, self.pixel_size.value, self.diameter.value or None
        )
        self.worker.yielded.connect(self._advance)
        self.worker.returned.connect(lambda found: self._done(layer, found))
        self.worker.finished.connect(self._idle)
        self.run.enabled, self.cancel.enabled = False, True
        self.progress.value = 0
        self._say("the network is being made ready")
        self.worker.start()

    def stop(self) -> None:
        """End what runs as soon as the network is done with the part it is at."""
        self._stop.set()
        self.cancel.enabled = False
        self._say("it ends after this part")

    def _work(
        self, layer: Any, pixel_size: str, diameter: float | None
    ) -> Iterator[tuple[int, int]]:
        """Yield how many frames are done of how many; return labels, a sentence, or None if it was
        stopped.
        """
        try:
            size = None if diameter else _pixel(pixel_size)
            model = self._model()
            frames, image = _frames(layer, model)
            label = np.zeros(image.shape[: len(frames) + model.ndim], np.uint32)
            yield 0, max(1, int(np.prod(frames)))
            for done, index in enumerate(np.ndindex(*frames), start=1):
                one = np.asarray(image[index])
                label[index] = model.segment(
                    np.moveaxis(one, -1, 0) if layer.rgb and one.ndim > model.ndim else one,
                    pixel_size=size,
                    diameter=diameter,
                )
                if self._stop.is_set():
                    return None
                yield done, max(1, int(np.prod(frames)))
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            return sentences(error)[0]
        return label

    def _model(self) -> trained.Model:
        key = self._path(), self.invert.value
        if key not in self._models:
            self._models = {key: trained.load(key[0], invert=key[1])}
        return self._models[key]

    def _path(self) -> Path:
        own = self.network.value == OWN
        return Path(self.file.value) if own else trained.find(self.network.value)

    def _chosen(self) -> None:
        """Say what a network is for, and ask for what it can use."""
        self.file.visible = self.network.value == OWN
        header: dict[str, Any] = {}
        try:
            if self._path().is_file():
                header = io.read_header(self._path())
            self.about.value = header.get("purpose", "")
        except ValueError as error:
            self.about.value = str(error)
        self._ndim = len(header["offsets"][0]) if "pixel_size" in header else 0
        self.pixel_size.visible, self.diameter.visible = self._ndim > 0, "diameter" in header
        self._measure()

    def _measure(self) -> None:
        """Take the size of a pixel from the layer where it has a unit."""
        layer = self.image.value
        if layer is None or not self._ndim or layer.ndim < self._ndim:
            return
        axes = slice(-self._ndim, None)
        units = [LENGTHS.get(str(unit)) for unit in layer.units[axes]]
        sides = [side * (unit or 0) for side, unit in zip(layer.scale[axes], units, strict=True)]
        self.pixel_size.value = "x".join(f"{side:.6g}" for side in sides) if all(units) else ""

    def _advance(self, part: tuple[int, int]) -> None:
        done, count = part
        self.progress.value = round(100 * done / count)
        self._say(f"{done} of {count} images" if count > 1 else "the objects are being found")

    def _done(self, layer: Any, found: Any) -> None:
        if isinstance(found, str):
            self._say(found)
        elif found is None:
            self._say("stopped; nothing was added")
        else:
            axes = slice(-found.ndim, None)
            self.viewer.add_labels(
                found,
                name=f"{layer.name} {self._path().stem}",
                scale=layer.scale[axes],
                translate=layer.translate[axes],
                units=layer.units[axes],
                metadata={"gdlib": self._path().stem},
            )
            frames = found.reshape(-1, *found.shape[-self._model().ndim :])
            self._say(f"{sum(int(frame.max()) for frame in frames)} objects")

    def _idle(self) -> None:
        self.worker = None
        self.run.enabled, self.cancel.enabled = True, False

    def _say(self, text: str) -> None:
        self.message.value = text


def _pixel(text: str) -> tuple[float, ...] | float | None:
    """Read the size of a pixel, None where there is none.

    >>> _pixel("0.03x0.006x0.006"), _pixel("0.5"), _pixel("")
    ((0.03, 0.006, 0.006), 0.5, None)
    """
    try:
        sides = tuple(float(side) for side in text.split("x")) if text.strip() else ()
    except ValueError:
        sides = (0.0,)
    if any(not 0 < side < float("inf") for side in sides):
        raise io.DataError(f'"{text}" is no size of a pixel: give microns, one number or ZxYxX')
    return None if not sides else sides[0] if len(sides) == 1 else sides


def _frames(layer: Any, model: trained.Model) -> tuple[tuple[int, ...], Any]:
    """Return how many frames there are along which leading axes of a layer, and its array.

    Raises:
        DataError: the network does not fit it.
    """
    image = layer.data[0] if layer.multiscale else layer.data
    channels = model.info["channels"]
    ndim = image.ndim - layer.rgb
    if ndim < model.ndim:
        raise io.DataError(
            f"{layer.name} has {ndim} axes, and this network wants {model.ndim}"
            f"{trained.fitting(ndim)}"
        )
    if layer.rgb and channels == 1:
        grey = np.asarray(image[..., :3])
        if (grey != grey[..., :1]).any():
            raise io.DataError(
                f"{layer.name} is a colour image, and this network wants one channel: split it "
                "(Split RGB in the menu of the layer) and choose the channel with the objects"
            )
        image = grey[..., 0]
    elif (image.shape[-1] if layer.rgb else 1) != channels:
        raise io.DataError(f"{layer.name} does not have the {channels} channels of this network")
    return tuple(image.shape[: ndim - model.ndim]), image
