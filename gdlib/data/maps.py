"""What a teacher says about every training image as a whole, in files of `gdlib.train.ask`, and how
patches are cut from it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import torch
from torch import Tensor

from gdlib import io
from gdlib.kernels.levels import first_centre


class TeacherMaps:
    """The maps of one teacher for the images of a split; a patch reads the blocks that it needs.

    Args:
        paths: files of `gdlib.train.ask.ask`, one per part of its output.
        samples: samples `.h5` that it was asked about.

    Attributes:
        levels: feature maps that the teacher has, in these files or not, by name: channels and
            stride.
        identity: says which teacher this is, and what it was asked.
        teacher: SHA-256 of its weights.

    Raises:
        gdlib.io.DataError: it was asked about other images, or the files are of several teachers.
    """

    def __init__(self, paths: Sequence[Path | str], samples: Path | str) -> None:
        self.files: dict[str, h5py.File] = {}
        asked = io.sha256(samples)
        found = []
        for path in paths:
            attrs = io.read_attrs(path)
            if not {"teacher", "samples", "parts", "levels"} <= set(attrs):
                raise io.DataError(
                    f"{path}: these are no maps of a teacher; make them with `gdlib step ask`"
                )
            if attrs["samples"] != asked:
                raise io.DataError(
                    f"{path}: the teacher was asked about other images than {samples}; ask it again"
                )
            if attrs["teacher"] != (found or [attrs])[0]["teacher"]:
                raise io.DataError(
                    f"{path}: another teacher than in {paths[0]} was asked; ask one of them again"
                )
            found.append(attrs)
            self.files |= dict.fromkeys(attrs["parts"], h5py.File(path, "r", rdcc_nbytes=2**26))
        self.levels = (
            {name: (c, tuple(stride)) for name, (c, stride) in found[0]["levels"].items()}
            if found
            else {}
        )
        self.teacher = found[0]["teacher"] if found else None
        self.identity = json.dumps(found, sort_keys=True)

    def cut(
        self, sample: str, pixels: Sequence[Tensor], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """Cut all maps where the label of a patch was cut.

        Args:
            sample: name of the image.
            pixels: for each axis (*patch) int64, the pixel of the image whose label each pixel of
                the patch has.
            shapes: for each feature map that is wanted the sides that the student's has of such a
                patch.

        Returns:
            By part its vectors (*sides, D) float16: those of the same pixels; of a feature map
            those of the voxels that hold the pixels which are the centres of the student's voxels
            (see `gdlib.kernels.levels.label_at`).
        """
        found = {}
        for part, file in self.files.items():
            if part in self.levels and part not in shapes:
                continue
            where = self.centres(part, pixels[0].shape, shapes)
            with io.readable(file):
                array = file[sample][part]
                corner, stride = array.attrs.get("corner"), self.levels.get(part, (0, None))[1]
                places = [place[where] for place in pixels]
                if corner is not None:
                    places = [
                        (p - int(c)) // s for p, c, s in zip(places, corner, stride, strict=True)
                    ]
                box = tuple(slice(int(place.min()), int(place.max()) + 1) for place in places)
                vectors = torch.from_numpy(array[box])
            found[part] = vectors[
                tuple(place - s.start for place, s in zip(places, box, strict=True))
            ]
        return found

    def centres(
        self, part: str, sides: Sequence[int], shapes: Mapping[str, Sequence[int]]
    ) -> tuple[Tensor | slice, ...]:
        """Return of which pixels of a patch there are vectors, as an index: all, or the centres of
        a feature map's voxels.

        For a voxel that is centred outside of the patch it is the nearest pixel; no loss looks at
        it.
        """
        if part not in self.levels:
            return (slice(None),) * len(sides)
        stride = self.levels[part][1]
        first = first_centre(sides, shapes[part], stride)
        steps = zip(first, shapes[part], stride, sides, strict=True)
        lines = [torch.arange(f, f + s * m, s).clamp(0, n - 1) for f, m, s, n in steps]
        return tuple(torch.meshgrid(*lines, indexing="ij"))
