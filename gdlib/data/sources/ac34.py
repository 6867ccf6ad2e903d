"""AC3 and AC4, mouse cortex in serial-section EM: Kasthuri et al., Cell 162(3):648-661, 2015;
ODC-By v1.0, SNEMI3D.

Four HDF5 files, `AC3_inputs.h5`, `AC3_labels.h5`, `AC4_inputs.h5`, `AC4_labels.h5`, each with the
dataset `main` (z, y, x). Full size: AC3 256 x 1024 x 1024, AC4 100 x 1024 x 1024; crops in y and x
are read alike. Voxels of 30 x 6 x 6 nm, neurites as labels, 0 = membrane, myelin, extracellular
space, not labelled. To cite: Kasthuri et al., Saturated reconstruction of a volume of neocortex,
Cell 162(3):648-661, 2015; licence: Open Data Commons Attribution License (ODC-By) v1.0, as stated
for the SNEMI3D data.

Splits (the paper's): train is AC4, sections 0 to 79, val is AC4, sections 80 to 99, test is AC3,
    the first 100 sections (all, in a crop of fewer).
"""

from collections.abc import Iterator
from pathlib import Path

from gdlib.data.files import (
    Splits,
    check_label,
    check_sections,
    check_shapes,
    existing_folder,
    open_volume,
    split_components,
    voxel_size,
)
from gdlib.io import Sample

__all__ = ["ac34"]

VOXEL_SIZE_NM = [30.0, 6.0, 6.0]  # where the files do not say it
TEST_SECTIONS = 100


def ac34(root: Path | None, *, components: bool = True) -> Splits:
    """Read AC3 and AC4.

    Args:
        root: folder with the four files.
        components: number the 6-connected components of each neuron one by one. A crop cuts neurons
            into pieces that are connected only outside of it, and nothing inside tells that they
            belong together. PAPER: the original evaluates with the ids of the full volume.

    Returns:
        For each split one sample: image (1, Z, Y, X) uint8, label (Z, Y, X).
    """
    root = existing_folder(root)
    return {
        "train": _read(root, "AC4", 0, 80, components),
        "val": _read(root, "AC4", 80, 100, components),
        "test": _read(root, "AC3", 0, None, components),
    }


def _read(
    root: Path, name: str, start: int, stop: int | None, components: bool
) -> Iterator[Sample]:
    path = root / f"{name}_inputs.h5"
    with (
        open_volume(path, "main") as inputs,
        open_volume(root / f"{name}_labels.h5", "main") as labels,
    ):
        check_shapes(path, inputs.shape, labels.shape)
        stop = stop or min(TEST_SECTIONS, len(inputs))
        check_sections(path, start, stop, len(inputs))
        attrs = {"source": path.name, "voxel_size_nm": voxel_size(inputs, labels) or VOXEL_SIZE_NM}
        box = (slice(start, stop),)
        image, label = inputs[box], labels[box]
    check_label(root / f"{name}_labels.h5", label)
    if components:
        label = split_components(label)
    yield Sample(f"{name}_z{start:03d}-{stop - 1:03d}", image[None], label, attrs=attrs)
