"""What commands write: no file of somebody else is lost, and what cannot be written is told before
the work."""

# ruff: noqa: F811 (fixtures of another file)

import argparse
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from test_cli import ROOT, own_environment, refusal, run, segment_command, volume, volume_model  # noqa: F401

from benchmarks.bench import command
from gdlib import io
from gdlib.cli.main import _parser
from gdlib.io import outputs
from gdlib.volumes.grid import options

PRECIOUS = "the only copy"


def tiff(path, value=7, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, np.full((8, 8), value, np.uint8), **options)
    return path


@pytest.fixture
def folder(tmp_path, squares):
    """Return a folder with an image, and in another one its label made by hand."""
    tiff(tmp_path / "labels" / "a.tif")
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / "a.tif", squares(1)[0][0])
    return tmp_path


def test_labels_made_by_hand_are_not_replaced(folder, teacher, refusal):
    label = folder / "labels" / "a.tif"
    command = segment_command(teacher, folder / "labels", folder / "images")
    before = label.read_bytes()
    line = refusal(*command)
    assert f"{label} is there already" in line
    assert "another --out" in line
    assert "--overwrite" in line
    assert label.read_bytes() == before
    run(*command, "--overwrite")
    assert tifffile.imread(label).shape == (40, 44)
    run(*command)  # now it is ours


def test_an_image_that_is_given_twice_is_segmented_once(folder, teacher, capsys):
    image = folder / "images" / "a.tif"
    run(
        *segment_command(
            teacher,
            folder / "found",
            folder / "images",
            image,
            folder / "labels" / ".." / "images" / "a.tif",
        )
    )
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_labels_of_another_image_of_the_same_name_are_not_replaced(folder, teacher, refusal):
    out = folder / "found"
    run(*segment_command(teacher, out, folder / "images"))
    before = (out / "a.tif").read_bytes()
    shutil.copytree(folder / "images", folder / "others")
    assert "found/a.tif is there already" in refusal(
        *segment_command(teacher, out, folder / "others")
    )
    assert (out / "a.tif").read_bytes() == before
    assert [path.name for path in out.iterdir()] == ["a.tif"]


def test_two_images_of_one_name_are_both_named(folder, teacher, refusal):
    shutil.copytree(folder / "images", folder / "others")
    both = [folder / name / "a.tif" for name in ("images", "others")]
    line = refusal(*segment_command(teacher, folder / "found", *both))
    assert f'{both[0]} and {both[1]}: two images are called "a"' in line


def test_labels_of_this_command_are_no_images(folder, teacher, refusal, tmp_path, squares):
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["raw"] = squares(2)[0][0]
    run(*segment_command(teacher, folder / "found", folder / "images", tmp_path / "b.h5"))
    for label in (folder / "found" / "a.tif", folder / "found" / "b.h5"):
        line = refusal(*segment_command(teacher, folder / "again", label))
        assert f"{label}: this is no image, but labels that `gdlib segment` made" in line
    shutil.copy(folder / "images" / "a.tif", folder / "found" / "c.tif")
    run(*segment_command(teacher, folder / "again", folder / "found"), code=1)
    assert [path.name for path in (folder / "again").iterdir()] == ["c.tif"]


def test_what_appears_while_the_network_works_is_not_replaced(
    folder, teacher, refusal, monkeypatch
):
    from gdlib.segment import segmenters

    def slow(*args, **kwargs):
        tiff(folder / "found" / "a.tif")
        return np.ones((40, 44), np.uint32)

    monkeypatch.setattr(segmenters, "segment", slow)
    assert "found/a.tif is there already" in refusal(
        *segment_command(teacher, folder / "found", folder / "images")
    )
    assert tifffile.imread(folder / "found" / "a.tif").shape == (8, 8)


@pytest.fixture
def stacks(volume, tmp_path):
    """Return an HDF5 file with two images."""
    with h5py.File(tmp_path / "ab.h5", "w") as file:
        file["a/raw"], file["b/raw"] = volume[1], volume[1][::-1]
    return tmp_path / "ab.h5"


def test_datasets_of_one_file_become_datasets_of_one_file(stacks, volume_model, tmp_path, capsys):
    for out, commands in (
        ("one", [["a/raw", "b/raw"]]),
        ("two", [["a/raw"], ["b/raw"], ["a/raw"]]),
    ):
        for names in commands:
            run(
                *segment_command(
                    volume_model, tmp_path / out, *(f"{stacks}:{name}" for name in names)
                )
            )
        with h5py.File(tmp_path / out / "ab.h5") as file:
            assert np.array_equal(file["a/raw"][()] > 0, file["b/raw"][()][::-1] > 0)
            assert file["a/raw"][()].any()
        assert [path.name for path in (tmp_path / out).iterdir()] == ["ab.h5"]


def test_a_label_is_added_to_what_an_hdf5_file_holds(stacks, volume_model, refusal, tmp_path):
    target = tmp_path / "out" / "ab.h5"
    target.parent.mkdir()
    with h5py.File(target, "w") as file:
        file["a/raw"] = np.arange(6)
        file["a/raw"].attrs["by"] = "hand"
        file["c/link"] = h5py.SoftLink("/a/raw")
        file["d"] = 5
        file.attrs["about"] = PRECIOUS
    run(*segment_command(volume_model, target.parent, f"{stacks}:b/raw"))
    with h5py.File(target) as file:
        assert file["b/raw"].shape == (10, 40, 44)
        assert file["a/raw"][()].tolist() == file["c/link"][()].tolist() == list(range(6))
        assert isinstance(file.get("c/link", getlink=True), h5py.SoftLink)
        assert (file["a/raw"].attrs["by"], file.attrs["about"], file["d"][()]) == (
            "hand",
            PRECIOUS,
            5,
        )
    before = target.read_bytes()
    assert f"{target}:a/raw is there already" in refusal(
        *segment_command(volume_model, target.parent, f"{stacks}:a/raw")
    )
    assert target.read_bytes() == before
    run(*segment_command(volume_model, target.parent, f"{stacks}:a/raw"), "--overwrite")
    with h5py.File(target) as file:
        assert file["a/raw"].shape == file["b/raw"].shape == (10, 40, 44)


def test_a_file_that_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "a.h5"

    def write():
        with outputs.added_h5(path) as file:
            file["mine"] = 1
            file.flush = lambda: path.write_bytes(b"theirs")

    with pytest.raises(io.DataError, match="another process has written"):
        write()
    assert path.read_bytes() == b"theirs"


@pytest.mark.parametrize("own", [False, True])
def test_evaluate_writes_over_its_own_tables_alone(own, refusal, tmp_path):
    label, found = tiff(tmp_path / "gt.tif"), tiff(tmp_path / "seg.tif")
    out = tmp_path / "notes.csv"
    if own:
        run("evaluate", label, found, "--out", out)
        run("evaluate", label, found, "--out", out)
    for inside in (label, found):
        line = refusal("evaluate", label, found, "--out", inside, "--overwrite")
        assert f"{inside}: it is an input of this command and would be written over" in line
        assert tifffile.imread(inside).shape == (8, 8)
    out.write_text(PRECIOUS)
    assert f"{out} is there already" in refusal("evaluate", label, found, "--out", out)
    assert out.read_text() == PRECIOUS
    assert f"{tmp_path}: there is a folder of this name" in refusal(
        "evaluate", label, found, "--out", tmp_path
    )
    run("evaluate", label, found, "--out", out, "--overwrite")
    assert out.read_text().startswith("sample,")


STEPS = {"prepare": ["train", "val", "test"], "train": ["weights", "last", "history"]}
STEPS |= {"join": ["weights"]}
STEPS |= {
    step: ["out"]
    for step in (
        *("label", "ask", "predict", "segment", "evaluate", "baselines", "profile"),
        *(
            "plan-volume",
            "predict-block",
            "segment-block",
            "match-block",
            "number-blocks",
            "relabel-block",
            "join-blocks",
        ),
    )
}


def parsers(parser):
    return parser._subparsers._group_actions[0].choices


def accepted(kind, text):
    try:
        return kind(text) is not None
    except argparse.ArgumentTypeError:
        return False


def required(parser, tmp_path):
    """Return something for every argument that a step needs."""

    def some(action):
        if action.type in (None, Path):
            return tmp_path / f"{action.dest}.x" if action.type else "waterz"
        return next(text for text in ("{}", "[1]", "[]", "1") if accepted(action.type, text))

    return {action.option_strings[0]: some(action) for action in parser._actions if action.required}


@pytest.mark.parametrize(
    ("step", "option"), [(step, option) for step, options in STEPS.items() for option in options]
)
def test_no_step_replaces_a_file_that_it_did_not_write(step, option, refusal, tmp_path):
    arguments = required(parsers(parsers(_parser())["step"])[step], tmp_path)
    out = arguments[f"--{option}"]
    for name, content in (("text", PRECIOUS), ("table", "a,b\n1,2\n"), ("JSON", "{}")):
        out.write_text(content)
        line = refusal("step", step, *(part for pair in arguments.items() for part in pair))
        assert f"{out} is there already" in line, name
        assert out.read_text() == content
    inputs = [
        flag
        for flag, value in arguments.items()
        if str(value).endswith(".x") and flag[2:] not in STEPS[step]
    ]
    for flag in inputs:
        line = refusal(
            "step", step, *(part for pair in (arguments | {flag: out}).items() for part in pair)
        )
        assert f"{out}: it is an input" in line, flag


def test_two_outputs_of_a_step_are_two_files(refusal, tmp_path):
    arguments = required(parsers(parsers(_parser())["step"])["train"], tmp_path) | {
        "--last": tmp_path / "weights.x"
    }
    line = refusal("step", "train", *(part for pair in arguments.items() for part in pair))
    assert f"{tmp_path / 'weights.x'}: two outputs would be written there" in line


def test_a_device_is_not_replaced(refusal, tmp_path):
    label = tiff(tmp_path / "gt.tif")
    line = refusal("evaluate", label, label, "--out", os.devnull, "--overwrite")
    assert f"{os.devnull}: there is a device of this name" in line


def test_every_command_that_writes_is_in_these_tests():
    commands = parsers(_parser())
    steps = parsers(commands["step"])
    assert set(steps) - {"download"} == set(STEPS)
    for name, parser in {**commands, **steps}.items():
        flags = {flag for action in parser._actions for flag in action.option_strings}
        writes = flags & {"--out", "--json", "--markdown", "--weights", "--val"} and name not in (
            "info",
            "models",
            "schema",
        )
        writes = (writes and name != "distill") or name == "quantise"  # beside what it is given
        assert ("--overwrite" in flags) == bool(writes), name


def test_own_files_of_steps_are_replaced(splits, volume_model, tmp_path):
    spec = json.dumps({"model": "resunet", "options": {"widths": [1, 1, 1, 1, 1]}})
    profile = [
        "step",
        "profile",
        "--data",
        splits["test"],
        "--spec",
        spec,
        "--out",
        tmp_path / "profile.json",
    ]
    baselines = [
        "step",
        "baselines",
        "--dataset",
        "d",
        "--val",
        splits["val"],
        "--test",
        splits["test"],
    ]
    for _ in range(2):
        run(*profile, "--device", "cpu", "--threads", 1)
        run(*baselines, "--out", tmp_path / "baselines.csv")
    made = {
        outputs.has_attributes("split"): splits["test"],
        outputs.is_weights: volume_model,
        outputs.has_columns("baseline"): tmp_path / "baselines.csv",
        outputs.has_keys("macs"): tmp_path / "profile.json",
    }
    for test in made:
        assert [path for path in made.values() if test(path)] == [made[test]]


def test_a_study_of_a_volume_does_not_replace_files(volume, volume_model, tmp_path):
    path = volume[0]
    config = {
        "input": f"{path}:volumes/raw",
        "model": str(volume_model),
        "out": str(tmp_path / "out"),
    }
    options(config)
    (tmp_path / "out").mkdir()
    for name in ("labels.h5", "plan.json"):
        (tmp_path / "out" / name).write_text(PRECIOUS)
        with pytest.raises(
            io.DataError, match=rf"{name} is there already.*choose another out, or " r"move it away"
        ):
            options(config)
        (tmp_path / "out" / name).unlink()
    shutil.move(path, tmp_path / "labels.h5")
    with pytest.raises(io.DataError, match=r"labels\.h5: it is an input"):
        options(config | {"input": f"{tmp_path}/labels.h5:volumes/raw", "out": str(tmp_path)})


def test_benchmarks_do_not_replace_files(capsys, tmp_path):
    def refused(*arguments):
        assert command([str(argument) for argument in arguments]) == 1
        return capsys.readouterr().err

    out = tmp_path / "out.json"
    out.write_text(PRECIOUS)
    for arguments in (
        ["losses", "--json", out],
        ["losses", "--json", tmp_path / "new.json", "--markdown", out],
    ):
        assert f"{out} is there already" in refused(*arguments)
    assert f"{out}: it is an input" in refused(
        "page", "--json", out, "--markdown", out, "--overwrite"
    )
    figure = tmp_path / "figures" / "page.png"
    figure.parent.mkdir()
    figure.write_text(PRECIOUS)
    page = ["page", "--json", out, "--markdown", tmp_path / "page.md"]
    assert f"{figure} is there already" in refused(*page)
    assert "make its folder writable" in refused("losses", "--json", "/sys/kernel/new/a.json")
    assert {out.read_text(), figure.read_text()} == {PRECIOUS}


def test_what_is_where_a_download_waits_is_not_deleted(tmp_path):
    from gdlib.data.download import download

    (tmp_path / ".cells.download").mkdir()
    (tmp_path / ".cells.download" / "notes.txt").write_text(PRECIOUS)
    assert download([], tmp_path / "cells")
    assert (tmp_path / ".cells.download" / "notes.txt").read_text() == PRECIOUS


@pytest.mark.parametrize("long", ["x" * 240, "ü" * 120, "x" * 251])
def test_long_names(long, teacher, squares, tmp_path):
    (tmp_path / "images").mkdir()
    tifffile.imwrite(tmp_path / "images" / f"{long}.tif", squares(1)[0][0])
    run(*segment_command(teacher, tmp_path / "out", tmp_path / "images", block=16))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{long}.tif"]


def test_where_nothing_can_be_written_is_told_before_the_work(
    teacher, folder, refusal, monkeypatch
):
    from gdlib.predict.predictor import Predictor

    monkeypatch.setattr(Predictor, "load", None)  # any work would be an error
    image, label = folder / "images" / "a.tif", folder / "labels" / "a.tif"
    for out, cause in (
        (image, "a file stands where a folder is wanted"),
        (image / "deeper", "a file stands where a folder is wanted"),
        (folder / ("x" * 300), "choose a shorter name"),
        ("/sys/kernel", "make its folder writable"),
        ("/sys/kernel/new/newer", "make its folder writable"),
    ):
        assert cause in refusal(*segment_command(teacher, out, image, block=16))
        assert cause in refusal("evaluate", label, label, "--out", f"{out}/scores.csv")
    assert sorted(path.name for path in folder.iterdir()) == ["images", "labels"]


def test_the_commands_of_the_readme_lose_nothing(teacher, squares, tmp_path, monkeypatch):
    """Where somebody who has just read it would run them: beside the images and labels of a
    dataset."""
    lines = re.findall(
        r"^gdlib (?:segment images/|evaluate) .*$",
        (ROOT / "README.md").read_text(),
        flags=re.MULTILINE,
    )
    assert [line.split()[1] for line in lines] == ["segment", "segment", "evaluate"]
    image, label = squares(1)
    for name, array in (("images", image[0]), ("labels", label), ("ground_truth", label)):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "a.tif", array)
    shutil.copy(teacher, tmp_path / "weights.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    monkeypatch.chdir(tmp_path)
    for line in lines:
        run(*shlex.split(line, comments=True)[1:])
    assert before == {path: path.read_bytes() for path in before}
    assert {path.name for path in tmp_path.rglob("*.*")} - {path.name for path in before} == {
        "a.preview.png",
        "scores.csv",
    }
