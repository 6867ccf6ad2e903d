"""The teacher of a run: its maps, of a teacher that was asked before, or a network to be asked at
every step.
"""

from pathlib import Path

import torch
from torch import nn

from gdlib import io
from gdlib.config import RunSpec
from gdlib.data.maps import TeacherMaps
from gdlib.distill import Asked
from gdlib.models import build, folded, trained


def teacher_of(spec: RunSpec, source: TeacherMaps | Path | str | None) -> nn.Module:
    """A frozen teacher of the kind that the recipe says: one that was asked before, or one to be
    asked at every step.
    """
    if spec.recipe.teacher == "maps":
        if not isinstance(source, TeacherMaps):
            raise ValueError(
                f'method "{spec.method}" learns from the maps of a teacher: give them (`gdlib step '
                "ask` makes them), or its "
                "weights with `teacher: online` in the recipe"
            )
        return Asked(source.levels)
    if source is None or isinstance(source, TeacherMaps):
        raise ValueError(
            f'method "{spec.method}" learns from a teacher that is asked online: give its weights'
        )
    return _load_teacher(source, spec)


def check_maps(
    maps: TeacherMaps | None, more: TeacherMaps | None, unlabelled: Path | str | None
) -> None:
    """Raise unless one teacher has spoken of the unlabelled images too, if there are any."""
    if maps and unlabelled and not (more and {*maps.files} <= {*more.files}):
        raise ValueError(
            f"{unlabelled}: there are not all maps of the teacher for these images; give as many "
            "as "
            "for the training images"
        )
    if maps and more and maps.teacher != more.teacher:
        raise io.DataError(
            f"{unlabelled}: another teacher was asked about these images than about the training "
            "images; ask one of them again"
        )


def sides_of_maps(spec: RunSpec) -> dict[str, tuple[int, ...]]:
    """Sides of the feature maps that a student has of a patch.

    Found out without computing anything.
    """
    with torch.device("meta"), torch.no_grad():
        student = build(spec.model, spec.options).eval()
        sides = [n + 2 * m for n, m in zip(spec.patch, student.margin, strict=True)]
        features = student(torch.zeros(1, spec.channels, *sides)).features
    return {name: tuple(feature.shape[2:]) for name, feature in features.items()}


def _load_teacher(path: Path | str, spec: RunSpec) -> nn.Module:
    network, header = trained(path, "channels", "normalisation")
    mine = spec.model_dump(mode="json", include={"channels", "normalisation"})
    # What was learned from the images may differ: both see images as this run does, and those with
    # objects are the same.
    theirs = {"channels": header["channels"], "normalisation": header["normalisation"]}
    for one in (mine, theirs):
        one["normalisation"] = {key: one["normalisation"][key] for key in ("lower", "upper")}
    for key in mine:
        if theirs[key] != mine[key]:
            raise io.DataError(
                f"{path}: the teacher was trained with {key} {theirs[key]}, this run uses "
                f"{mine[key]}; make them equal"
            )
    return folded(network)
