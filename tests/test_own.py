"""Images of one's own by one command: what it measures, chooses and writes, and what it says of
mistakes."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile

from gdlib import devices, io
from gdlib.cli import distill
from gdlib.cli.main import main
from gdlib.config import load, own, parts, plan

ROOT = Path(__file__).parents[1]
NUCLEI = own.Measured(60, 6000, 1, (520, 696), (520, 696), 28.7, 47)


@pytest.fixture
def folders(tmp_path, squares, monkeypatch):
    """Nine images and labels of squares of 9 pixels, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    for part in ("images", "labels"):
        Path(part).mkdir()
    for seed in range(9):
        image, label = squares(seed, shape=(70, 90))
        tifffile.imwrite(f"images/{seed}.tif", image[0])
        tifffile.imwrite(f"labels/{seed}.tif", label.astype(np.uint16))
    return tmp_path


def test_sizes_of_the_catalogue_give_what_the_catalogue_has():
    """Nuclei, worms and leaves, by the sizes of their objects."""
    assert own.choose(NUCLEI).patch == (128, 128)
    steps = [-y for y, x in own.choose(NUCLEI).offsets if y]
    assert steps == [1, 3, 5, 10, 29]
    worms = own.Measured(40, 600, 1, (520, 696), (520, 696), 33, 110)
    assert own.choose(worms).patch == (192, 192)
    leaves = own.Measured(100, 1500, 3, (500, 530), (500, 530), 50, 150)
    assert own.choose(leaves).patch == (256, 256)


@pytest.mark.parametrize(
    ("width", "side", "depth", "channels"),
    [(1, 32, None, 1), (12, 100, None, 3), (300, 2000, None, 1), (3, 33, 2, 1), (40, 300, 64, 1)],
)
def test_what_is_written_is_right_and_can_be_planned(width, side, depth, channels, tmp_path):
    sides = (side, side + 3) if depth is None else (depth, side, side + 3)
    found = own.Measured(9, 90, channels, sides, sides, width, 2 * width, depth or 1)
    text = own.written(found, own.choose(found), title='µ: "cells" #1', regions=True)
    (tmp_path / "config.yaml").write_text(text)
    config = load(parts.home(), tmp_path / "config.yaml")
    runs = plan.Plan(config).runs
    assert len(runs) == 3
    data = config.datasets[own.NAME]
    assert data.title == 'µ: "cells" #1'
    assert data.channels == channels
    assert all(n % own.STEP == 0 for n in data.patch[-2:])
    for run in runs:
        assert plan.Plan(config).train_spec(run)["offsets"]


def test_a_teacher_is_used_and_not_trained(tmp_path):
    given = {"weights": "/there/a b.safetensors", "model": ("resunet", {"widths": [2, 2, 4, 4, 4]})}
    (tmp_path / "config.yaml").write_text(
        own.written(NUCLEI, own.choose(NUCLEI), title="cells", **given)
    )
    one = plan.Plan(load(parts.home(), tmp_path / "config.yaml"))
    assert {run[1] for run in one.trained(one.runs)} == {"resunet_tiny"}
    assert one.config.network("given").weights == "/there/a b.safetensors"


def spoil(folder, what):
    """Make one mistake in the folders."""
    label, image = folder / "labels" / "3.tif", folder / "images" / "3.tif"
    if what == "no label":
        label.unlink()
    elif what == "one image":
        for path in [*folder.glob("images/[1-8].tif"), *folder.glob("labels/[1-8].tif")]:
            path.unlink()
    elif what == "other size":
        tifffile.imwrite(label, np.zeros((5, 5), np.uint16))
    elif what == "masks":
        for path in folder.glob("labels/*.tif"):
            tifffile.imwrite(path, (255 * (tifffile.imread(path) > 0)).astype(np.uint8))
    elif what == "small":
        tifffile.imwrite(image, tifffile.imread(image)[:20])
        tifffile.imwrite(label, tifffile.imread(label)[:20])
    elif what == "volume":
        tifffile.imwrite(
            folder / "labels" / "0.tif", np.ones((4, 70, 90), np.uint16), photometric="minisblack"
        )
    elif what == "as macOS writes it":  # in two characters
        for path in (image, label):
            path.with_name("0.tif").rename(path.with_name("0e\u0301.tif"))
    elif what == "broken":
        image.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("arguments", "what", "said"),
    [
        (["nowhere", "labels"], None, "nowhere: this is not there; give a folder"),
        (["images/0.tif", "labels"], None, "images/0.tif: this is a file; give a folder"),
        (["images", "images"], None, "images and labels are the same folder"),
        (["images", "labels", "--out", "images/new"], None, "inside the folder images"),
        (["images", "labels"], "no label", "3.tif: this image has no label"),
        (["images", "labels"], "one image", "there are 1 images, but train, val and test need"),
        (["images", "labels"], "other size", "3.tif: "),
        (["images", "labels"], "masks", "give --regions if each separate region is one object"),
        (["images", "labels"], "small", "images: the smallest image has 20 x 90 pixels"),
        (["images", "labels"], "volume", "give --3d if these are the sections of a volume"),
        (["images", "labels", "--3d"], None, "has 2 axes (70, 90), not 3; leave --3d out"),
        (["images", "labels", "--3d"], "as macOS writes it", "not 3; leave --3d out"),
        (["images", "labels"], "broken", "3.tif: "),
        (["images", "labels", "--teacher", "none"], None, 'no built-in network "none"'),
        (["images", "labels", "--teacher", "none.pt"], None, "none.pt: "),
        (["images", "labels", "--time", "5m"], None, "--dry-run makes none"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_configured(
    arguments, what, said, folders, capsys
):
    spoil(folders, what)
    out = [] if "--out" in arguments else ["--out", "new"]
    assert main(["distill", *arguments, *out, "--dry-run"]) == 1
    (line,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("gdlib: error:")
    ]
    assert said in line
    assert not list(folders.rglob("config.yaml"))


@pytest.mark.parametrize("time", ["30", "m", "0m", "-3m", "soon"])
def test_a_time_has_a_unit(time, folders, capsys):
    with pytest.raises(SystemExit):
        main(["distill", "images", "labels", "--out", "new", f"--time={time}"])
    assert "with s, m or h" in capsys.readouterr().err


def test_a_plan_is_written_and_kept_and_of_these_images(folders, capsys):
    assert main(["distill", "images", "labels", "--out", "new", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "9 images of 70 x 90 pixels (y, x), 1 channel;" in said
    assert "2 train_student" in said
    config = folders / "new" / "config.yaml"
    config.write_text(config.read_text().replace("[0]", "[0, 1]"))
    assert main(["distill", "images", "labels", "--out", "new", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "is used as it is" in said
    assert "4 train_student" in said
    (folders / "other").mkdir()
    assert main(["distill", "other", "labels", "--out", "new"]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_a_network_that_comes_with_the_package_is_a_teacher(folders, capsys):
    command = ["distill", "images", "labels", "--teacher", "nuclei", "--out", "new", "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "chosen: nuclei as the teacher, which is not trained" in said
    assert "2 train_student" in said
    assert "train_teacher" not in said
    config = load(parts.home(), Path("new/config.yaml"))
    assert str(config.teachers["given"].weights) == "nuclei"  # wherever the package is


def test_images_without_labels_are_linked_looked_at_and_planned_with(folders, squares, capsys):
    Path("more").mkdir()
    for seed in range(20, 23):
        tifffile.imwrite(f"more/{seed}.tif", squares(seed, shape=(60, 90))[0][0])
    command = ["distill", "images", "labels", "--unlabelled", "more", "--out", "new", "--dry-run"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "9 images of 60 x 90 to 70 x 90 pixels" in said
    assert "; 3 images without labels" in said
    for job in ("1 prepare_with_unlabelled", "1 label_unlabelled"):
        assert job in said
    assert "ask" not in said  # what is learned from the teacher are the objects that it finds
    config = load(parts.home(), Path("new/config.yaml"))
    assert config.datasets[own.NAME].unlabelled is True
    assert plan.Plan(config).unlabelled[own.NAME] == {
        "teacher": False,
        "none": False,
        "pseudo": True,
    }
    assert main([*command[:4], "images", *command[5:]]) == 1
    assert "these are the images that have labels" in capsys.readouterr().err


def test_the_time_of_steps_is_measured(splits, make_spec, tmp_path):
    from gdlib.train.pace import seconds_per_step

    files = {"train": splits["train"], "val": splits["val"], "folder": tmp_path}
    teacher = make_spec()
    assert 0 < seconds_per_step(teacher, **files) < 60
    students = (
        make_spec("grd", teacher="maps"),
        make_spec(unlabelled={"labels": "teacher"}),  # `pseudo`
    )
    for student in students:
        assert 0 < seconds_per_step(student, **files, teacher=teacher) < 60


@pytest.mark.parametrize(("gpu", "steps"), [(False, 1000), (True, 500)])
def test_the_steps_of_a_time_where_the_system_tells_no_cores(
    gpu, steps, folders, monkeypatch, capsys
):
    """As macOS and Windows do; on a GPU students are trained one by one."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(devices, "has_nvidia", lambda: gpu)
    monkeypatch.setattr("gdlib.train.pace.seconds_per_step", lambda *files, **options: 0.8)
    monkeypatch.setattr(distill.workflow, "run", lambda *words, **options: [])
    monkeypatch.setattr(distill, "_end", lambda *files: None)
    assert main(["distill", "images", "labels", "--out", "new", "--time", "30m"]) == 0
    assert f"1200 steps for the teacher, {steps} for the students" in capsys.readouterr().out


@pytest.mark.long
def test_what_is_compiled_is_not_in_the_time_of_a_step(splits, make_spec, tmp_path):
    """Where nothing has been compiled yet, as after an installation."""
    code = (
        "import sys, time; from gdlib.config import RunSpec; from gdlib.train.pace import seconds_per_step\n"
        "spec, teacher = map(RunSpec.model_validate_json, sys.argv[4:])\n"
        "files = dict(zip(('train', 'val', 'folder'), sys.argv[1:4]))\n"
        "for _ in range(2):\n"
        "    start = time.perf_counter()\n"
        "    print(seconds_per_step(spec, **files, teacher=teacher), time.perf_counter() - start)\n"
    )
    specs = [spec.model_dump_json() for spec in (make_spec("grd", teacher="maps"), make_spec())]
    done = subprocess.run(
        [sys.executable, "-c", code, splits["train"], splits["val"], tmp_path, *specs], cwd=ROOT,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "compiled")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (first, all_of_first), (second, all_of_second) = (
        map(float, line.split()) for line in done.stdout.splitlines()
    )
    assert all_of_first > all_of_second + 20 * first  # something was compiled
    assert first < 3 * second


def test_the_weights_that_are_named_are_the_best_on_validation_images(teacher, tmp_path):
    state, header = io.load_weights(teacher)
    (segmenter,) = header["run"]["segmenters"]

    def paths(metric, scores, shares):
        run = header["run"] | {"recipe": header["run"]["recipe"] | {"selection": metric}}
        found = [tmp_path / f"{number}.safetensors" for number in range(len(scores))]
        for path, value, share in zip(found, scores, shares, strict=True):
            said = {segmenter: {metric: value, "false_share": share}}
            io.save_weights(path, state, header | {"run": run, "validation": said})
        return found

    nothing, much = (0.0, 0.0), (0.5, 0.0)  # what is found in images without objects
    for metric, scores, shares, best in (
        ("aji", [0.6, 0.5], nothing, 0),
        ("aji", [0.5, 0.6], nothing, 1),
        ("aji", [0.6, 0.5], much, 1),
        ("voi", [0.6, 0.5], nothing, 1),
        ("voi", [0.5, 0.6], nothing, 0),
        ("voi", [0.5, 0.6], much, 1),
        ("aji", [0.5, 0.5], nothing, 1),
        ("aji", [0.5, float("nan")], nothing, 0),
    ):
        assert distill._best(found := paths(metric, scores, shares)) == found[best]


def test_the_wheel_carries_the_workflow(tmp_path):
    """Every file of it that git has, so that `gdlib distill` works where there is no clone."""
    copy = tmp_path / "copy"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("no clone")
    wanted = ("Snakefile", "config.yaml", "config/", "envs/", "profiles/", "workflow/")
    own_files = [file for file in listed.stdout.splitlines() if (ROOT / file).is_file()]
    for file in own_files:
        if file.startswith(
            (*wanted, "gdlib/", "setup.py", "pyproject", "README", "LICENSE", "MAN")
        ):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for file in own_files:
        if file.startswith(wanted):
            assert f"gdlib/_workflow/{file}" in names
        if file.startswith("gdlib/"):
            assert file in names


CHILD = """
import pathlib, sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)  # it saves itself
    pathlib.Path("saved").touch()
"""
PARENT = """
import pathlib, sys
from gdlib.cli import workflow
workflow.run([sys.executable, "-c", sys.argv[1]], pathlib.Path("."))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_stops_the_command_stops_the_workflow_too(number, tmp_path):
    """Whoever sends it to this process alone, as `kill` does."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)],
    )  # fmt: skip
    log = tmp_path / "logs" / "distill.log"
    while not (log.exists() and "ready" in log.read_text()):
        assert process.poll() is None
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert "stopping; what was trained so far is saved" in said
    assert process.returncode != 0
    assert (tmp_path / "saved").exists()
