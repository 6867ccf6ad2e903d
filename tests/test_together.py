"""Several images at the same time: what comes out is what one after the other gives, in their
order.
"""

import contextlib
import csv
import os
import sys
import threading
import time
from concurrent.futures import Future

import h5py
import numpy as np
import pytest
import tifffile
import torch

import gdlib
from gdlib import quiet
from gdlib.cli import work
from gdlib.cli.main import main
from gdlib.cli.together import Room, workers
from gdlib.cli.work import Work
from gdlib.predict.predictor import Predictor
from gdlib.volumes.footprint import Need

PATIENCE = 20  # seconds


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(tmp_path, squares):
    """Return a folder of images of several sizes; the third is the largest."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k, shape in enumerate([(40, 44), (33, 70), (96, 90), (44, 40), (50, 40), (38, 61)]):
        tifffile.imwrite(folder / f"{k}.tif", squares(50 + k, shape)[0][0])
    return folder


@pytest.fixture
def segment(teacher, tmp_path):
    def run(*arguments, engine="torch", code=0):
        command = ["segment", *arguments, "--model", teacher, "--out", tmp_path / "out"]
        command += ["--device", "cpu", "--precision", "float32", "--engine", engine]
        assert main([str(word) for word in command]) == code

    return run


def begin(function, *arguments):
    """Call a function in a thread that is nobody's concern if it never ends."""
    future = Future()
    threading.Thread(target=lambda: future.set_result(function(*arguments)), daemon=True).start()
    return future


def test_images_of_a_folder(teacher, images, segment, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(work, "LARGE", {2: 96 * 90 - 1})
    segment(images, "--table", tmp_path / "all.csv")
    captured = capsys.readouterr()
    model = gdlib.load(teacher, device="cpu", precision="float32", engine="torch")
    lines = []
    for path in sorted(images.iterdir()):
        label = tifffile.imread(tmp_path / "out" / path.name)
        assert np.array_equal(label, model.segment(tifffile.imread(path)))
        lines.append(f"{path}: {label.max()} objects")
    assert captured.out.splitlines() == lines
    assert "6 images" in captured.err
    with (tmp_path / "all.csv").open(newline="") as file:
        order = [row["image"] for row in csv.DictReader(file)]
    assert order == sorted(order)
    assert len(set(order)) == 6


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_several_at_a_time(engine, images, segment, monkeypatch, tmp_path):
    """Two threads meet in the network, each with an image and one thread of torch."""
    meeting, threads = threading.Barrier(2), []
    predict = Predictor.predict

    def met(self, *arguments):
        meeting.wait(PATIENCE)
        threads.append(torch.get_num_threads())
        return predict(self, *arguments)

    monkeypatch.setattr(Predictor, "predict", met)
    segment(images, engine=engine)
    assert threads == [1] * 6
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_a_large_image_is_alone_with_all_threads(images, segment, monkeypatch, tmp_path):
    monkeypatch.setattr(work, "LARGE", {2: 96 * 90 - 1})
    now, seen, lock = [0], {}, threading.Lock()
    predict = Predictor.predict

    def watched(self, source, *arguments):
        with lock:
            now[0] += 1
        time.sleep(0.2)
        seen[tuple(source.shape)] = now[0], torch.get_num_threads()
        try:
            return predict(self, source, *arguments)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(Predictor, "predict", watched)
    segment(images)
    assert len(seen) == 6
    assert seen.pop((96, 90)) == (1, 2)
    assert {threads for _, threads in seen.values()} == {1}
    assert max(count for count, _ in seen.values()) == 2


def test_frames_of_one_movie(teacher, squares, segment, monkeypatch, tmp_path):
    movie = np.stack([squares(50 + k)[0][0] for k in range(4)])
    tifffile.imwrite(tmp_path / "m.tif", movie, metadata={"axes": "TYX"}, photometric="minisblack")
    meeting, predict = threading.Barrier(2), Predictor.predict

    def met(self, *arguments):
        meeting.wait(PATIENCE)
        return predict(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", met)
        segment(tmp_path / "m.tif")
    model = gdlib.load(teacher, device="cpu", precision="float32", engine="torch")
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "m.tif"), model.segment(movie, "TYX"))


def test_datasets_of_one_file(squares, segment, tmp_path):
    with h5py.File(tmp_path / "all.h5", "w") as file:
        for k in range(12):
            file[f"g/{k}"] = squares(50 + k)[0][0]
    segment(*(f"{tmp_path / 'all.h5'}:g/{k}" for k in range(12)))
    with h5py.File(tmp_path / "out" / "all.h5") as file:
        assert sorted(file["g"]) == sorted(map(str, range(12)))
        assert all(file[f"g/{k}"][()].any() for k in range(12))


def test_those_that_fail_leave_the_others(images, segment, tmp_path, capsys):
    tifffile.imwrite(images / "2.tif", np.full((40, 40), np.nan, np.float32))
    segment(tmp_path / "missing.tif", images, code=1)
    said = capsys.readouterr().err
    assert "2 of 7 images could not be segmented" in said
    assert "missing.tif" in said
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_an_image_that_needs_much_memory_is_alone(images, segment, monkeypatch, tmp_path):
    monkeypatch.setattr(Need, "__call__", lambda self, shape: 10**15 if shape[0] == 96 else 1)
    alone, segment_alone = [], Work.alone

    def noted(self, job):
        alone.append(job.file.stem)
        return segment_alone(self, job)

    monkeypatch.setattr(Work, "alone", noted)
    segment(images)
    assert alone == ["2"]
    assert len(list((tmp_path / "out").iterdir())) == 6


def test_large_files_are_not_read_twice(images, segment, monkeypatch):
    monkeypatch.setattr(work, "LARGE_FILE", (images / "2.tif").stat().st_size - 1)
    opened, open_image = [], work.open_image

    def noted(path, *arguments):
        opened.append(path)
        return open_image(path, *arguments)

    monkeypatch.setattr(work, "open_image", noted)
    segment(images)
    assert sorted(opened) == [str(path) for path in sorted(images.iterdir())]


def test_images_in_blocks_beside_each_other(teacher, images, segment, tmp_path):
    segment(images, "--block", "16")
    model = gdlib.load(teacher, device="cpu", precision="float32", engine="torch")
    for path in images.iterdir():
        wanted = model.segment(tifffile.imread(path))
        assert np.array_equal(tifffile.imread(tmp_path / "out" / path.name), wanted)


def test_nothing_is_lost_where_another_thread_is_silenced(images, segment, capfd):
    over = threading.Event()

    def silent():
        while not over.is_set():
            with quiet.silence():
                print("python")
                os.write(1, b"compiled code")
                over.wait(0.01)

    thread = begin(silent)
    segment(images)
    over.set()
    thread.result(PATIENCE)
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == sorted(map(str, images.iterdir()))


def test_all_is_segmented_where_nobody_reads_the_lines(images, segment, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head -1` does after a line
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        segment(images)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {path.name for path in images.iterdir()}


def test_images_of_another_scale(teacher, images, segment, tmp_path):
    segment(images, "--diameter", "20")
    model = gdlib.load(teacher, device="cpu", precision="float32", engine="torch")
    for path in images.iterdir():
        wanted = model.segment(tifffile.imread(path), diameter=20)
        assert np.array_equal(tifffile.imread(tmp_path / "out" / path.name), wanted)


def test_who_waits_for_memory_begins_nothing_when_stopped(images, segment, monkeypatch):
    predicted, entered, go_on = [], threading.Barrier(2), threading.Event()
    predict = Predictor.predict

    @contextlib.contextmanager
    def taken(self, need):
        entered.wait(PATIENCE)
        if need == 33:  # the first of the two images goes on at once, the other one has to wait
            go_on.wait(PATIENCE)
        yield

    def stop(self, job, counted):
        threading.Timer(1.5, go_on.set).start()
        raise KeyboardInterrupt

    def noted(self, *arguments):
        predicted.append(1)
        return predict(self, *arguments)

    monkeypatch.setattr(Need, "__call__", lambda self, shape: shape[0])
    monkeypatch.setattr(Room, "taken", taken)
    monkeypatch.setattr(Work, "_done", stop)
    monkeypatch.setattr(Predictor, "predict", noted)
    for name in "2345":
        (images / f"{name}.tif").unlink()
    segment(images, code=130)
    assert len(predicted) == 1


def test_what_is_not_begun_is_dropped_when_stopped(images, segment, monkeypatch):
    begun, stopped = [], threading.Event()
    alone = Work._segment

    def slow(self, job, *arguments, **options):
        begun.append(job)
        if not job.path.endswith("0.tif"):  # the first is done, and then it is stopped
            stopped.wait(PATIENCE)
        return alone(self, job, *arguments, **options)

    def stop(self, job, counted):
        threading.Timer(3, stopped.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(Work, "_segment", slow)
    monkeypatch.setattr(Work, "_done", stop)
    segment(images, code=130)
    assert len(begun) <= 3


def test_room():
    room, entered = Room(10), []

    def enter(need):
        with room.taken(need):
            entered.append(need)

    def alone():
        with room.alone():
            entered.append("alone")

    with room.taken(6):
        first, second = begin(enter, 3), begin(enter, 5)
        first.result(PATIENCE)
        time.sleep(0.1)
        assert entered == [3]  # there is none for 5
    second.result(PATIENCE)
    begin(enter, 11).result(PATIENCE)  # more than there is, but nobody else has any
    with room.alone():
        waiting = begin(enter, 1)
        time.sleep(0.1)
        assert entered == [3, 5, 11]
    waiting.result(PATIENCE)
    with room.taken(1):
        large = begin(alone)
        time.sleep(0.1)
        later = begin(enter, 2)  # does not overtake who waits to be alone
        time.sleep(0.1)
        assert entered == [3, 5, 11, 1]
    large.result(PATIENCE)
    later.result(PATIENCE)
    assert entered == [3, 5, 11, 1, "alone", 2]
    with Room(None).taken(10**15), pytest.raises(RuntimeError, match="mine"), workers(1, 1):
        raise RuntimeError("mine")
