"""Images as `gdlib segment` is given them: opened with what is said of their axes and channels."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gdlib import io, trained


@contextlib.contextmanager
def open_image(
    path: Path | str,
    ndim: int,
    channels: int,
    scratch: Path,
    axes: str | None = None,
    channel: str | None = None,
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open an image for a network.

    Args:
        path: of the image.
        ndim: axes that the network sees at once.
        channels: that it wants.
        scratch: folder for a copy of what is large and compressed.
        axes: a letter per axis; what the file says if left out.
        channel: number or name of the only channel that is wanted.

    Yields:
        `gdlib.data.frames.Frames` where there are several frames, or where `axes` or `channel` are
        given; else the array of an image file, a map of a large one, or an open dataset of HDF5 or
        Zarr, which are read piece by piece. And what the file says of how large its pixels are and
        where; of a Zarr, `zarr` is all that it says.
    """
    from gdlib.data.files import open_volume
    from gdlib.data.omezarr import open_zarr, split_zarr_path

    if io.is_hdf5(path):
        with open_volume(path) as volume:
            attributes = {
                key: value
                for key, value in volume.attrs.items()
                if key in ("resolution", "offset", "element_size_um")
            }
            many = sum(n > 1 for n in volume.shape) > ndim and ndim == 2 and channels == 1
            seen = volume
            if axes or channel or many:
                seen = _frames(path, volume, "", ndim, axes, channel)
            yield seen, attributes
        return
    if split_zarr_path(path):
        stored = open_zarr(path)
        yield _seen(path, stored, ndim, channels, axes, channel), _about(stored)
        return
    from gdlib.data.calibration import calibration
    from gdlib.data.files import arranged, read_raw

    array, letters, alpha = read_raw(path, scratch=scratch)
    # several axes may have the same letter, as Q where the file names none
    deep = {axis for axis, n in zip(letters, array.shape, strict=False) if n > 1} - set("SCYX")
    if axes or channel or "T" in deep or (deep and ndim == 2 and channels == 1):
        if alpha and not axes and (channel is None or not channel.isdecimal()):
            where = letters.index("S")
            array = array[(slice(None),) * where + (slice(-1),)]
        image: Any = _frames(path, array, letters, ndim, axes, channel)
    else:
        image = arranged(path, array, letters, alpha, channels)
    yield image, calibration(Path(path))


def _seen(
    path: Path | str, image: Any, ndim: int, channels: int, axes: str | None, channel: str | None
) -> Any:
    """Return an image of a Zarr, whose axes are known in most cases."""
    many = ndim == 2 and channels == 1 and sum(n > 1 for n in image.shape) > ndim
    if not (image.letters or axes or channel or many):
        return image
    if ndim == 3 and not axes and image.letters and "Z" not in image.letters:
        raise io.DataError(
            f"{path}: an image with the axes {image.letters} has no depth, which this network "
            f"wants{trained.fitting(2)}"
        )
    frames = _frames(path, image, image.letters, ndim, axes, channel)
    image.letters = axes.upper() if axes else image.letters
    return frames


def _about(image: Any) -> dict[str, Any]:
    found = {"zarr": image}
    return found | ({"element_size_um": image.microns} if image.microns else {})


def _frames(
    path: Path | str, array: Any, letters: str, ndim: int, axes: str | None, channel: str | None
) -> Any:
    from gdlib.data.axes import View
    from gdlib.data.frames import Frames, channel_names, channel_number, named

    names = getattr(array, "channels", None)
    try:
        if axes is None:
            if channel is not None and not letters and array.ndim == ndim + 1:
                letters = f"C{'ZYX'[-ndim:]}"
            if not letters and array.ndim == 3:
                letters = "ZYX"
            kept, axes = named(array.shape, letters, ndim)
            if len(kept) < array.ndim:
                array = _kept(array, kept, View)
        frames = Frames(array, axes, ndim)
        if channel is None:
            return frames
        if names is None:
            names = [] if io.is_hdf5(path) else channel_names(Path(path))
        return Frames(array, axes, ndim, channel_number(channel, names, frames.channels))
    except io.DataError as error:
        raise io.DataError(f"{path}: {error}") from None


def _kept(array: Any, kept: list[int], view: Any) -> Any:
    import numpy as np

    if isinstance(array, np.ndarray):
        return array.reshape([array.shape[axis] for axis in kept])
    return view(array, kept)
