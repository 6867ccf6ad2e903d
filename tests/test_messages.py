"""What goes wrong ends in one sentence: file, cause and a mend that fits, never a traceback, and
the rest is done."""
# ruff: noqa: F811 (fixtures of another file)

import csv
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
from test_cli import ROOT, own_environment, refusal, run, segment_command, volume, volume_model  # noqa: F401

from gdlib import io
from gdlib.cli.main import main
from gdlib.io.failures import sentences
from gdlib.predict.predictor import Predictor


@pytest.fixture
def six(tmp_path, squares):
    """Return a folder of six images, of which the third was cut."""
    (tmp_path / "six").mkdir()
    for number in range(1, 7):
        tifffile.imwrite(tmp_path / "six" / f"{number}.tif", squares(number)[0][0])
    content = (tmp_path / "six" / "3.tif").read_bytes()
    (tmp_path / "six" / "3.tif").write_bytes(content[: len(content) // 2])
    return tmp_path / "six"


def failed(capsys, *arguments):
    """Run a command that must fail for some of its inputs, and return its lines on stderr."""
    capsys.readouterr()
    run(*arguments, code=1)
    return [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("gdlib: error: ")
    ]


# --- One bad input of many ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 16])
def test_one_bad_image_does_not_end_a_folder(six, teacher, volume, tmp_path, capsys, block):
    (six / "7.tif").write_text("no image")
    inputs = [six, tmp_path / "8.tif", f"{volume[0]}:volumes/nothing"]
    blocks = {} if block is None else {"block": block}
    *lines, last = failed(capsys, *segment_command(teacher, tmp_path / "out", *inputs, **blocks))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "1.tif",
        "2.tif",
        "4.tif",
        "5.tif",
        "6.tif",
    ]
    assert last.endswith("4 of 9 images could not be segmented; all others are done")
    for name, cause in (
        ("3.tif", "cannot be read"),
        ("7.tif", "cannot be read"),
        ("8.tif", "the file is missing"),
        ("nothing", ""),
    ):
        assert sum(name in line and cause in line for line in lines) == 1
    assert len(lines) == 4


def test_a_link_to_itself_does_not_end_a_folder(six, teacher, tmp_path, capsys):
    (six / "3.tif").unlink()
    (six / "3.tif").symlink_to("3.tif")
    line, last = failed(capsys, *segment_command(teacher, tmp_path / "out", six))
    assert line.startswith(f"gdlib: error: {six / '3.tif'}: ")
    assert last.endswith("1 of 6 images could not be segmented; all others are done")
    assert len(list((tmp_path / "out").iterdir())) == 5
    assert len(failed(capsys, *segment_command(teacher, tmp_path / "out", six / "3.tif"))) == 1


def test_a_full_disk_ends_a_folder(six, teacher, tmp_path, refusal, monkeypatch):
    """Of all others the same would be said."""
    from gdlib.cli import labels

    def full(*args):
        raise io.WriteError(errno.ENOSPC, os.strerror(errno.ENOSPC), "labels")

    monkeypatch.setattr(labels, "write_label", full)
    assert "free some space" in refusal(*segment_command(teacher, tmp_path / "out", six))


def test_one_bad_label_does_not_end_an_evaluation(six, tmp_path, capsys):
    labels = tmp_path / "labels"
    labels.mkdir()
    for path in six.iterdir():
        tifffile.imwrite(labels / path.name, np.ones((40, 44), np.uint8))
    tifffile.imwrite(labels / "5.tif", np.ones((4, 4), np.uint8))
    tifffile.imwrite(labels / "6.tif", np.full((40, 44), -1, np.int8))
    tifffile.imwrite(labels / "7.tif", np.ones((40, 44), np.uint8))
    *lines, last = failed(capsys, "evaluate", labels, six, "--out", tmp_path / "scores.csv")
    assert "4 of 7 images could not be compared: their scores are left empty" in last
    causes = {
        "3": "cannot be read",
        "5": "(4, 4)",
        "6": "negative ids; set them to 0",
        "7": "no segmentation called",
    }
    for name, cause in ((f"{name}.tif", cause) for name, cause in causes.items()):
        assert sum(name in line and cause in line for line in lines) == 1
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = {row.pop("sample"): row for row in csv.DictReader(file)}
    assert list(rows) == list("1234567")  # and no mean
    assert [name for name, row in rows.items() if any(row.values())] == ["1", "2", "4"]
    for name in "124":
        (six / f"{name}.tif").write_text("no image")
    assert len(failed(capsys, "evaluate", labels, six, "--out", tmp_path / "none.csv")) == 8
    assert not (tmp_path / "none.csv").exists()


def test_one_bad_data_set_does_not_end_a_download(catalogue, tmp_path, capsys):
    by_hand = next(name for name, one in catalogue["datasets"].items() if one.get("by_hand"))
    made = next(name for name, one in catalogue["datasets"].items() if not one.get("folder"))
    command = ["download", by_hand, made, "--config", ROOT / "config.yaml", "--to", tmp_path]
    lines = failed(capsys, *command)
    assert by_hand in lines[0]
    assert lines[1:] == ["gdlib: error: 1 of 2 data sets could not be fetched"]
    main([str(part) for part in command])
    assert f"{made}: is made here" in capsys.readouterr().out


# --- No traceback ------------------------------------------------------------------------------------------------------


def spoilt(path, target, header=None, state=None):
    """Write weights with another header or other parameters, as somebody with Python could."""
    old_state, old_header = io.load_weights(path)
    change = header or (lambda header: header)
    io.save_weights(target, (state or (lambda state: state))(old_state), change(old_header))
    return target


def without(key):
    return lambda content: {name: value for name, value in content.items() if name != key}


SPOILT = {
    **{f"no {key}": ({"header": without(key)}, f'"{key}"') for key in (
        "model", "options", "channels", "offsets", "normalisation", "segmentation",
    )},
    "offsets of words": ({"header": lambda h: h | {"offsets": ["up", "left"]}}, "offsets"),
    "offsets of volumes": ({"header": lambda h: h | {"offsets": [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]}}, "3 numbers"),
    "offsets of all kinds": ({"header": lambda h: h | {"offsets": [[-1, 0], [0, -1, 0]]}}, "offsets"),
    "other widths": ({"header": lambda h: h | {"options": {**h["options"], "widths": [4, 4, 8, 8, 16]}}}, "size mismatch"),
    "other network": ({"header": lambda h: h | {"model": "enet", "options": {}}}, "Missing key"),
    "unknown network": ({"header": lambda h: h | {"model": "resnet"}}, "resunet"),
    "unknown option": ({"header": lambda h: h | {"options": {"wide": 3}}}, "wide"),
    "other channels": ({"header": lambda h: h | {"channels": 3}}, "takes 1 channel(s), and its " "header says 3"),
    "a tensor less": ({"state": lambda s: without("foreground.weight")(s)}, "Missing key"),
    "a tensor more": ({"state": lambda s: s | {"more": torch.zeros(1)}}, "Unexpected key"),
    "no tensor": ({"state": lambda s: {}}, "Missing key"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_weights_that_do_not_fit(kind, teacher, squares, refusal, tmp_path):
    changes, cause = SPOILT[kind]
    weights = spoilt(teacher, tmp_path / "w.safetensors", **changes)
    tifffile.imwrite(tmp_path / "a.tif", squares(1)[0][0])
    line = refusal(*segment_command(weights, tmp_path / "out", tmp_path / "a.tif"))
    assert str(weights) in line
    assert cause in line
    assert not (tmp_path / "out").exists()
    if "header" in changes:
        with pytest.raises(io.DataError, match=r"w\.safetensors"):
            Predictor.load(weights)


def test_weights_that_say_little_of_their_training(teacher, refusal, capsys, tmp_path):
    for key in ("run", "validation", "step"):
        weights = spoilt(teacher, tmp_path / "w.safetensors", header=without(key))
        line = refusal("info", weights)
        assert all(part in line for part in (str(weights), f"'{key}'", "--json"))
    run("info", weights, "--json")
    assert "offsets" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("device", ["meta", "cpu:x", "gpu", "-1", "", "cuda:77"])
def test_devices_that_compute_nothing(device, teacher, squares, refusal, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", squares(1)[0][0])
    line = refusal(
        *segment_command(teacher, tmp_path / "out", tmp_path / "a.tif"), f"--device={device}"
    )
    assert f'device "{device}" cannot be used' in line
    assert "choose auto, cpu" in line


def test_what_no_part_explains():
    """Raw errors of the system and of libraries, as the last resort puts them."""
    cases = {
        "there.yaml: no such file or directory; check": FileNotFoundError(
            errno.ENOENT, "No such file", "there.yaml"
        ),
        "a: is a directory; name a file in it": IsADirectoryError(
            errno.EISDIR, "Is a directory", "a"
        ),
        "a: permission denied; change who": PermissionError(errno.EACCES, "Permission denied", "a"),
        "too little memory (no more is known); give": MemoryError(),
        "too little memory (Unable to allocate 5 GiB); give": MemoryError(
            "Unable to\nallocate 5 GiB"
        ),
        "too little memory (can't allocate memory); give": RuntimeError("can't allocate memory"),
        "one sentence": OSError("one\nsentence"),
    }
    for part, error in cases.items():
        (line,) = sentences(error)
        assert part.replace("no such file or directory", "no such file") in line


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 9 GiB"), RuntimeError("std::bad_alloc")]
)
def test_too_little_memory(error, refusal, monkeypatch, tmp_path):
    def fail(path):
        raise error

    monkeypatch.setattr(io, "read_header", fail)
    line = refusal("info", tmp_path / "w.safetensors")
    assert "too little memory" in line
    assert "smaller images or blocks" in line


def test_an_error_of_the_program_is_not_hidden(monkeypatch, tmp_path):
    def fail(path):
        raise RuntimeError("who would have thought")

    monkeypatch.setattr(io, "read_header", fail)
    with pytest.raises(RuntimeError, match="who would"):
        main(["info", str(tmp_path)])


def test_ctrl_c_is_one_sentence():
    code = (
        "import sys, time; from gdlib.cli import info, main\n"
        "info._info = lambda arguments: (print('at work', flush=True), time.sleep(60))\n"
        "sys.exit(main.main(['info', 'x']))"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        assert "at work" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert text.startswith("gdlib: stopped by Ctrl-C")
    assert len(text.splitlines()) == 1


def test_a_tiff_without_a_page(teacher, refusal, tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0\0\0\0\0")
    line = refusal(*segment_command(teacher, tmp_path / "out", tmp_path / "a.tif"))
    assert "a.tif: " in line
    assert "in this file" in line or "cannot be read" in line


def test_a_folder_that_becomes_read_only(teacher, squares, tmp_path):
    """The file in which blocks wait is not made under the network's feet, but first."""
    from gdlib.predict.files import predict_blocks

    predictor = Predictor.load(teacher, device="cpu", block=16)
    with pytest.raises(io.WriteError, match="make its folder writable"):
        predict_blocks(
            predictor, {"a": predictor.source(squares(1)[0])}, Path("/sys/kernel/a.partial"), ""
        )


def test_models_outside_of_the_repository(tmp_path, monkeypatch, refusal, capsys):
    """The catalogue is then the one that came with the package."""
    monkeypatch.chdir(tmp_path)
    assert main(["models"]) == 0
    assert "resunet_tiny" in capsys.readouterr().out
    for command in ("models", "check"):
        line = refusal(command, "--config", "other.yaml")
        assert "other.yaml: there is no such file; name a catalogue with --config" in line


# --- Steps whose files or texts are of another kind --------------------------------------------------------------------


@pytest.mark.parametrize("step", ["evaluate", "baselines", "profile", "ask", "segment", "predict"])
def test_steps_told_of_a_file_of_another_kind(step, teacher, splits, refusal, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["a/x"] = np.zeros(3)
    name = json.dumps({"dataset": "d", "network": "n", "method": "m", "seed": 0})
    spec = json.dumps({"model": "resunet", "options": {"widths": [1, 1, 1, 1, 1]}})
    commands = {
        "evaluate": [
            "--data",
            other,
            "--segmentation",
            splits["test"],
            "--run",
            name,
            "--segmenter",
            "multicut",
        ],
        "baselines": ["--dataset", "d", "--val", other, "--test", other],
        "profile": ["--spec", spec, "--data", other, "--device", "cpu"],
        "ask": ["--teacher", teacher, "--samples", other, "--device", "cpu"],
        "segment": ["--predictions", other, "--segmenter", "multicut"],
        "predict": ["--weights", teacher, "--data", other, "--device", "cpu"],
    }
    line = refusal("step", step, *commands[step], "--out", tmp_path / "out")
    assert str(other) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"image": "a.h5"}'])
def test_a_plan_that_is_none(content, refusal, tmp_path):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    command = [
        "--plan",
        tmp_path / "plan.json",
        "--name",
        "0-0",
        "--predictions",
        tmp_path,
        "--settings",
        "{}",
    ]
    assert "plan.json" in refusal("step", "segment-block", *command, "--out", tmp_path / "a.h5")


# --- Mends that fit ----------------------------------------------------------------------------------------------------


def test_a_missing_file_is_not_taken_for_a_broken_one(teacher, squares, refusal, tmp_path):
    """Of any kind, read by any command: its name is what to look at, not its content."""
    there = tmp_path / "a.tif"
    tifffile.imwrite(there, squares(1)[0][0])
    lost = {name: tmp_path / f"lost.{name}" for name in ("tif", "png", "h5", "safetensors", "json")}
    commands = [
        segment_command(teacher, tmp_path / "out", lost[kind]) for kind in ("tif", "png", "h5")
    ]
    commands += [["evaluate", there, lost[kind]] for kind in ("tif", "png", "h5")]
    commands += [
        segment_command(lost["safetensors"], tmp_path / "out", there),
        ["info", lost["safetensors"]],
    ]
    commands += [
        [
            "step",
            "predict",
            "--weights",
            lost["safetensors"],
            "--data",
            lost["h5"],
            "--out",
            tmp_path / "out.h5",
        ]
    ]
    commands += [
        [
            "step",
            "predict",
            "--weights",
            teacher,
            "--data",
            lost["h5"],
            "--out",
            tmp_path / "out.h5",
        ]
    ]
    for command in commands:
        line = refusal(*command)
        assert "the file is missing; check its name and folder" in line, command
        assert not any(word in line for word in ("again", "split list", "readable")), command
    for path in lost.values():
        path.mkdir()
    for command in commands:
        # of folders
        if lost["png"] not in command and lost["h5"] not in command and lost["tif"] not in command:
            assert "is a directory; name a file in it" in refusal(*command)


def test_a_locked_hdf5_file_is_not_taken_for_a_broken_one(
    volume, volume_model, splits, teacher, refusal, tmp_path
):
    code = (
        "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print('open', flush=True); "
        "sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    samples = tmp_path / "samples.h5"
    samples.write_bytes(splits["test"].read_bytes())
    commands = {
        volume[0]: segment_command(volume_model, tmp_path / "out", f"{volume[0]}:volumes/raw"),
        samples: [
            "step",
            "predict",
            "--weights",
            teacher,
            "--data",
            samples,
            "--out",
            tmp_path / "p.h5",
        ],
    }
    for path, command in commands.items():
        with subprocess.Popen([sys.executable, "-c", code, path], **pipes) as other:
            assert other.stdout.readline() == "open\n"
            line = refusal(*command)
            other.stdin.close()
        assert f"{path}: another program has it open to write; close it there, or wait" in line
        assert "again" not in line


def test_labels_are_named_where_they_are_wrong(squares, refusal, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    for number in range(3):
        image, label = squares(number)
        tifffile.imwrite(tmp_path / "raw" / "images" / f"{number}.tif", image[0])
        tifffile.imwrite(tmp_path / "raw" / "labels" / f"{number}.tif", label.astype(np.int16))
    dataset = json.dumps({"source": "folder", "options": {}, "patch": [8, 8], "channels": 1})
    outs = [
        part
        for split in ("train", "val", "test")
        for part in (f"--{split}", tmp_path / f"{split}.h5")
    ]
    wrong = tmp_path / "raw" / "labels" / "1.tif"
    label = squares(1)[1]
    for spoil in (label.astype(np.int16) - 1, label + 0.5, label > 0):
        tifffile.imwrite(wrong, spoil)
        line = refusal("step", "prepare", "--dataset", dataset, "--root", tmp_path / "raw", *outs)
        assert f"{wrong}: the label" in line
        assert "images/" not in line


def test_split_lists_that_are_missing(squares, refusal, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "a.tif", squares(1)[name == "labels"])
    (tmp_path / "train.txt").write_text("a\n")
    dataset = json.dumps({"source": "folder", "options": {}, "patch": [8, 8], "channels": 1})
    outs = [
        part
        for split in ("train", "val", "test")
        for part in (f"--{split}", tmp_path / f"{split}.h5")
    ]
    line = refusal("step", "prepare", "--dataset", dataset, "--root", tmp_path, *outs)
    assert (
        f"{tmp_path / 'val.txt'}: the split list is missing; add it, one name per line, or "
        "remove the others"
    ) in line
    line = refusal("step", "prepare", "--dataset", dataset, *outs)
    assert "`folder` of the dataset, or --root" in line
