"""Several datasets as one: their prepared images together, split by split.

An image is then called `<dataset>-<name>`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gdlib import io
from gdlib.data.files import SPLITS, Splits, existing_folder
from gdlib.io import Sample
from gdlib.io.failures import DataError

__all__ = ["joined"]


def joined(
    root: Path | None,
    *,
    datasets: Sequence[str] = (),
    only: Mapping[Literal["train", "val", "test"], Sequence[str]] | None = None,
) -> Splits:
    """Read datasets that are prepared already.

    Args:
        root: folder with `<dataset>/{train,val,test}.h5`, in the workflow `data`.
        datasets: their names in the catalogue, two or more, with equally many channels and axes.
        only: split -> those of them that it has; a split that is left out has all.

    Returns:
        For each split the samples of all.
    """
    if len(set(datasets)) < 2 or len(set(datasets)) < len(datasets):
        raise DataError(f"joined: {list(datasets)} are not several datasets; name each once")
    only = only or {}
    for split, name in ((one, name) for one in only for name in only[one]):
        if name not in datasets:
            raise DataError(f'joined: "{name}", only of split {split}, is none of {list(datasets)}')
    folder = existing_folder(root)
    return {split: _read(folder, only.get(split, datasets), split) for split in SPLITS}


def _read(folder: Path, datasets: Sequence[str], split: str) -> Iterator[Sample]:
    for name in datasets:
        for sample in io.read_samples(folder / name / f"{split}.h5"):
            yield replace(sample, id=f"{name}-{sample.id}", attrs={**sample.attrs, "dataset": name})
