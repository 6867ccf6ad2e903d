"""One image of `gdlib segment`, and where its label goes."""

import contextlib
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from gdlib import io
from gdlib.io import outputs
from gdlib.volumes import zarr_labels


@dataclass(frozen=True)
class Job:
    """One image and where its label goes.

    Attributes:
        path: as it was given.
        file: without the name of a dataset.
        dataset: of an HDF5 file, None of another one.
        target: file of the label; a folder where the image is OME-Zarr.
        inner: what is named in a Zarr folder, None of an image that is none.
    """

    path: str
    file: Path
    dataset: str | None
    target: Path
    inner: str | None = None

    @classmethod
    def of(cls, path: str, folder: Path, name: str) -> "Job":
        """Find out where the label of an image goes; `name` is for labels in an OME-Zarr."""
        from gdlib.data.files import open_volume
        from gdlib.data.omezarr import split_zarr_path

        file, dataset = io.split_h5_path(path)[0], None
        if not io.is_hdf5(path) and (split := split_zarr_path(path)):
            return cls(path, split[0], None, zarr_labels.target(path, folder, name), split[1])
        if split_zarr_path(folder):
            raise io.DataError(
                f"{folder}: labels of {path}, which is no OME-Zarr, cannot be put into one; choose "
                "another --out"
            )
        if io.is_hdf5(path):
            with open_volume(path) as volume:
                dataset = volume.name.strip("/")
                about = str(volume.attrs.get(outputs.SOFTWARE, ""))
        else:
            about = _software(file)
        if outputs.is_mark(about):
            raise io.DataError(
                f"{path}: this is no image, but labels that `gdlib segment` made; give the image "
                "that they are of"
            )
        return cls(
            path, file, dataset, folder / f"{file.stem}{'.tif' if dataset is None else '.h5'}"
        )

    @property
    def mark(self) -> str:
        """What the label says of itself."""
        return outputs.mark(self.file, self.dataset or self.inner)

    @property
    def output(self) -> outputs.Output:
        """The label, for a check."""
        if self.inner is not None:
            return zarr_labels.output(self.target, self.mark)
        shown = f"{self.target}:{self.dataset}" if self.dataset else ""
        return outputs.Output(self.target, outputs.has_mark(self.mark, self.dataset), shown)

    @property
    def preview(self) -> Path:
        """The picture with outlines: beside the label, or beside the image that has it inside.

        One of a dataset that the user named has this name in its own, since others may be in the
        file.
        """
        beside, name = self.target, self.target.stem
        if self.dataset and io.split_h5_path(self.path)[1]:
            name = f"{name}.{self.dataset.replace('/', '_')}"
        if self.inner is not None and self.file in self.target.parents:
            beside, name = self.file, f"{self.file.stem}.{self.target.name}"
        return beside.with_name(f"{name}.preview.png")

    def hidden(self, ending: str) -> Path:
        """Return a hidden path beside the label, for what is not finished."""
        dataset = f".{urllib.parse.quote(self.dataset, safe='')}" if self.dataset else ""
        return io.beside(self.target.with_suffix(""), f"{dataset}.{ending}")


def _software(file: Path) -> str:
    """Return which program a TIFF file is of, as it says; nothing of any other file."""
    import tifffile

    from gdlib.data.tiff import reading

    if file.suffix.lower() not in (".tif", ".tiff"):
        return ""
    # what is wrong with the file is said where it is read
    with contextlib.suppress(io.DataError), reading(file), tifffile.TiffFile(file) as tiff:
        return str(tiff.pages.first.software)
    return ""
