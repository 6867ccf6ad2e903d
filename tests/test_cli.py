"""The command line: the same results as the Python calls, one line for a mistake, and a whole study without Snakemake."""

import csv
import io as text_io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from gdlib import io
from gdlib.cli import main
from gdlib.config import TEACHER, Config
from gdlib.metrics import METRICS, evaluate

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("prepare", "train", "predict", "segment", "evaluate", "profile")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """`--threads` sets an environment variable for the process; it must not outlive the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GDLIB_TRACEBACK", raising=False)


def run(*arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code


def process(*arguments, **kwargs):
    command = [sys.executable, "-m", "gdlib", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.fixture
def refusal(capsys):
    """Return `refusal(*arguments)` -> the one line on stderr of a command that must fail."""

    def check(*arguments):
        capsys.readouterr()
        run(*arguments, code=1)
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if "image/s" not in line and line.strip()]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("gdlib: error: ")
        assert len(lines[0]) > len("gdlib: error: ") + 10
        return lines[0]

    return check


@pytest.fixture
def images(tmp_path, squares):
    """Return a folder with a PNG, a 16-bit TIFF and a file that is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(squares(50)[0][0]).save(folder / "first.png")
    tifffile.imwrite(folder / "second.tif", squares(51, (33, 70))[0][0].astype(np.uint16) * 100)
    (folder / "notes.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def by_hand(teacher):
    """Return `by_hand(image, **parameters)` -> label, by the Python calls behind the command."""
    from gdlib.inference import Predictor
    from gdlib.segmentation import segment

    predictor = Predictor.load(teacher, device="cpu", precision="float32")

    def make(image, **parameters):
        prediction = predictor(image)
        parameters = predictor.header["segmentation"] | parameters
        return segment(prediction.affinity, prediction.foreground, predictor.header["offsets"], **parameters)

    return make


def segment_command(teacher, out, *images, **options):
    options = {"precision": "float32", "device": "cpu", **options}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
    return ["segment", *images, "--model", teacher, "--out", out, *flags]


def test_segment_writes_labels_that_equal_the_python_calls(teacher, images, by_hand, squares, tmp_path, capsys):
    out = tmp_path / "new" / "labels"
    run(*segment_command(teacher, out, images))
    assert sorted(path.name for path in out.iterdir()) == ["first.tif", "second.tif"]
    first, second = (tifffile.imread(out / name) for name in ("first.tif", "second.tif"))
    assert first.dtype == second.dtype == np.uint32
    assert np.array_equal(first, by_hand(squares(50)[0]))
    assert np.array_equal(second, by_hand(squares(51, (33, 70))[0].astype(np.uint16) * 100))
    assert evaluate(squares(50)[1], first)["aji"] > 0.9
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{images / 'first.png'}: {first.max()} objects",
        f"{images / 'second.tif'}: {second.max()} objects",
    ]


def test_segment_takes_files_one_by_one_and_writes_what_viewers_open(teacher, images, by_hand, squares, tmp_path):
    out = tmp_path / "labels"
    run(*segment_command(teacher, out, images / "second.tif", images / "first.png", threads=1))
    with tifffile.TiffFile(out / "first.tif") as file:
        page = file.pages[0]
        assert len(file.pages) == 1
        assert page.shape == (40, 44)
        assert page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
        assert np.array_equal(page.asarray(), by_hand(squares(50)[0]))
    assert not [path for path in out.iterdir() if path.suffix != ".tif"]


def test_segment_in_small_blocks_is_nearly_the_same(teacher, images, by_hand, squares, tmp_path, monkeypatch):
    from gdlib.inference import Predictor

    sizes, pieces = [], Predictor._pieces
    monkeypatch.setattr(Predictor, "_pieces", lambda self, n: sizes.append(self.block) or pieces(self, n))
    run(*segment_command(teacher, tmp_path, images / "second.tif", block=32))
    assert set(sizes) == {32}
    image = squares(51, (33, 70))[0]
    assert evaluate(by_hand(image), tifffile.imread(tmp_path / "second.tif"))["aji"] > 0.97


def test_segment_parameters_of_ones_own(teacher, images, by_hand, squares, tmp_path):
    run(*segment_command(teacher, tmp_path / "a", images / "first.png", min_size=75, foreground_threshold=0.9))
    result = tifffile.imread(tmp_path / "a" / "first.tif")
    image = squares(50)[0]
    assert np.array_equal(result, by_hand(image, min_size=75, foreground_threshold=0.9))
    assert not np.array_equal(result, by_hand(image))
    run(*segment_command(teacher, tmp_path / "b", images / "first.png", min_size=0))
    assert np.array_equal(tifffile.imread(tmp_path / "b" / "first.tif"), by_hand(image, min_size=0))


def test_segment_refuses_with_one_line(teacher, images, refusal, tmp_path, squares):
    out = tmp_path / "labels"
    good = images / "first.png"
    assert "missing.png" in refusal(*segment_command(teacher, out, images / "missing.png"))
    assert "notes.txt" in refusal(*segment_command(teacher, out, images / "notes.txt"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(*segment_command(teacher, out, tmp_path / "empty"))
    for model in (tmp_path / "missing.safetensors", good, tmp_path):
        assert str(model) in refusal(*segment_command(model, out, good))
    (images / "broken.png").write_bytes(good.read_bytes()[:100])
    assert "broken.png" in refusal(*segment_command(teacher, out, images / "broken.png"))
    Image.fromarray(np.repeat(squares(50)[0][0][..., None], 3, 2)).save(images / "colour.png")
    line = refusal(*segment_command(teacher, out, images / "colour.png"))
    assert "colour.png" in line
    assert "1 channel" in line
    (tmp_path / "other").mkdir()
    Image.fromarray(squares(50)[0][0]).save(tmp_path / "other" / "first.tif")
    assert '"first"' in refusal(*segment_command(teacher, out, good, tmp_path / "other" / "first.tif"))
    assert '"nonsense"' in refusal(*segment_command(teacher, out, good, device="nonsense"))
    assert '"int7"' in refusal(*segment_command(teacher, out, good, precision="int7"))
    assert not out.exists() or not list(out.iterdir())
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refusal(*segment_command(teacher, tmp_path / "file", good))


@pytest.fixture
def pairs(tmp_path):
    """Return folders of two labels and their segmentations, one perfect and one not."""
    label = np.zeros((20, 30), np.uint8)
    label[2:10, 2:10], label[2:10, 15:25] = 1, 2
    worse = label.astype(np.uint16)
    worse[2:10, 15:19] = 900
    for folder in ("labels", "found"):
        (tmp_path / folder).mkdir()
    Image.fromarray(label).save(tmp_path / "labels" / "a.png")
    tifffile.imwrite(tmp_path / "labels" / "b.tif", label)
    tifffile.imwrite(tmp_path / "found" / "a.tif", label.astype(np.uint32))
    tifffile.imwrite(tmp_path / "found" / "b.tif", worse)
    return tmp_path / "labels", tmp_path / "found", evaluate(label, label), evaluate(label, worse)


def check_table(text, expected):
    rows = list(csv.DictReader(text_io.StringIO(text)))
    assert [row.pop("sample") for row in rows] == list(expected)
    for row, scores in zip(rows, expected.values(), strict=True):
        assert list(row) == list(METRICS)
        assert {key: float(value) for key, value in row.items()} == pytest.approx(scores, rel=1e-5)


def test_evaluate_prints_every_metric_and_the_mean(pairs, capsys, tmp_path):
    labels, found, good, bad = pairs
    assert good["aji"] == 1 > bad["aji"]
    expected = {"a": good, "b": bad, "mean": {key: (good[key] + bad[key]) / 2 for key in METRICS}}
    run("evaluate", labels, found)
    check_table(capsys.readouterr().out, expected)
    run("evaluate", labels, found, "--out", tmp_path / "scores" / "a.csv")
    assert capsys.readouterr().out == ""
    check_table((tmp_path / "scores" / "a.csv").read_text(), expected)
    # Superfluous segmentations do no harm; single files may have any names.
    tifffile.imwrite(found / "c.tif", np.zeros((3, 3), np.uint8))
    run("evaluate", labels, found)
    check_table(capsys.readouterr().out, expected)
    run("evaluate", labels / "a.png", found / "b.tif")
    check_table(capsys.readouterr().out, {"a": bad, "mean": bad})


def test_evaluate_refuses_with_one_line(pairs, refusal, tmp_path):
    labels, found, *_ = pairs
    out = ["--out", tmp_path / "scores.csv"]
    tifffile.imwrite(labels / "only.tif", np.ones((4, 4), np.uint8))
    line = refusal("evaluate", labels, found, *out)
    assert all(part in line for part in ('"only"', str(labels / "only.tif"), str(found)))
    tifffile.imwrite(found / "only.tif", np.ones((4, 5), np.uint8))
    line = refusal("evaluate", labels, found, *out)
    assert all(part in line for part in (str(found / "only.tif"), "(4, 4)", "(4, 5)"))
    tifffile.imwrite(found / "only.tif", np.full((4, 4), 0.5, np.float32))
    assert "integer" in refusal("evaluate", labels, found, *out)
    (labels / "only.tif").write_bytes(b"broken")
    line = refusal("evaluate", labels, found, *out)
    assert str(labels / "only.tif") in line
    assert str(found) not in line  # not the fault of the segmentation
    assert "missing" in refusal("evaluate", tmp_path / "missing", found, *out)
    assert "missing" in refusal("evaluate", labels, tmp_path / "missing", *out)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(labels / "a.png")
    assert "a.png" in refusal("evaluate", labels / "a.png", found / "a.tif", *out)
    assert not (tmp_path / "scores.csv").exists()


def test_info(teacher, capsys, refusal, tmp_path):
    run("info", teacher)
    text = capsys.readouterr().out
    header = io.read_header(teacher)
    for part in ("resunet_4", "squares", "40 steps", "32x32", "seed 0", f"step {header['step']}", "gdlib"):
        assert part in text
    assert f"aji {header['validation']['aji']:.4f}" in text
    run("info", teacher, "--json")
    assert json.loads(capsys.readouterr().out) == header
    (tmp_path / "text.safetensors").write_text("nothing")
    for wrong in (tmp_path / "missing.safetensors", tmp_path / "text.safetensors"):
        assert str(wrong) in refusal("info", wrong)


def test_models(capsys, catalogue, refusal, tmp_path):
    run("models", "--config", ROOT / "config.yaml")
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert set(table) == set(catalogue["teachers"]) | set(catalogue["students"])
    assert table["resunet_tiny"][0] == "student"
    assert table["resunet"][0] == "teacher"
    small, large = (int(table[name][1].replace(",", "")) for name in ("resunet_tiny", "resunet"))
    assert 100 * small < large
    macs = float(table["resunet"][3])
    run("models", "--config", ROOT / "config.yaml", "--shape", 272, 272)
    quarter = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert float(quarter["resunet"][3]) == pytest.approx(macs / 4, rel=1e-3)
    assert "missing.yaml" in refusal("models", "--config", tmp_path / "missing.yaml")
    assert "2 axes" in refusal("models", "--config", ROOT / "config.yaml", "--shape", 64)
    (tmp_path / "bad.yaml").write_text("a: [1\nb: }")
    assert "bad.yaml" in refusal("models", "--config", tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(catalogue | {"stdy": "quick"}))
    assert 'did you mean "study"?' in refusal("models", "--config", tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "command",
    [[], ["segment"], ["evaluate"], ["info"], ["models"], ["step"], *(["step", step] for step in STEPS)],
    ids=" ".join,
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: gdlib" in text
    assert len(text) > 200
    if command == ["evaluate"]:
        assert all(f"  {key}" in text for key in METRICS)
    if not command:
        assert all(name in text for name in ("segment", "evaluate", "info", "models", "step"))
    if command == ["step"]:
        assert all(name in text for name in STEPS)


def test_every_option_has_its_help():
    from gdlib.cli import _parser

    for parser in (_parser()._subparsers._group_actions[0].choices[name] for name in ("segment", "evaluate", "models")):
        for action in parser._actions:
            assert action.help, (parser.prog, action.dest)


def test_version(capsys):
    from gdlib import __version__

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == ["gdlib", __version__]


def test_a_traceback_can_be_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("GDLIB_TRACEBACK", "1")
    with pytest.raises(io.DataError):
        main(["info", str(tmp_path / "missing.safetensors")])


def test_as_a_program(teacher, images, by_hand, squares, tmp_path):
    done = process(*segment_command(teacher, tmp_path / "out", images / "first.png"))
    assert done.returncode == 0, done.stderr
    assert "objects" in done.stdout
    assert np.array_equal(tifffile.imread(tmp_path / "out" / "first.tif"), by_hand(squares(50)[0]))
    done = process("info", tmp_path / "missing.safetensors")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("gdlib: error: ")
    assert done.stderr.count("\n") == 1
    done = process()
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_a_closed_pipe_is_no_error(monkeypatch, capsys):
    class Closed(text_io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        run("models", "--config", ROOT / "config.yaml", "--shape", 16, 16)
    assert capsys.readouterr().err == ""


def test_threads_are_set_before_torch_reads_them(splits, tmp_path):
    spec = {"model": "resunet", "options": {"widths": [1, 1, 1, 1, 1]}}
    out = tmp_path / "profile.json"
    command = ["step", "profile", "--spec", json.dumps(spec), "--data", splits["test"], "--out", out, "--threads", 2]
    done = process(*command, "--device", "cpu", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["threads"] == 2


@pytest.fixture
def tiny(raw):
    """Return a study of a minute in seconds: six images of 64 x 64 pixels, a teacher and a student of few channels."""
    raw["datasets"]["tiny"] = {
        "source": "nuclei_phantom",
        "options": {
            "size": [64, 64],
            "images": {"train": 3, "val": 2, "test": 2},
            "radius": [5.0, 7.0],
            "count": [100, 160],
        },
        "offsets": [[-1, 0], [0, -1], [-3, 0], [0, -3], [-9, 0], [0, -9]],
        "patch": [48, 48],
        "segmentation": {"min_size": 12},
    }
    raw["teachers"]["big"] = {"model": "resunet", "options": {"widths": [4, 4, 8, 8, 8], "embedding_dim": 8}}
    raw["students"]["small"] = {"model": "resunet", "options": {"widths": [2, 2, 4, 4, 4], "embedding_dim": 8}}
    recipe = {
        "steps": 12,
        "batch_size": 2,
        "warmup": 1,
        "validate_every": 6,
        "save_every": 5,
        "optimizer": {"lr": 0.02},
    }
    raw["studies"]["tiny"] = {
        "datasets": ["tiny"],
        "teacher": "big",
        "students": ["small"],
        "methods": ["none", "grd"],
        "seeds": [0],
        "teacher_recipe": recipe,
        "student_recipe": recipe,
    }
    return Config.parse(raw | {"study": "tiny"})


def arrays(path, sample):
    with io.open_h5(path) as file:
        return set(file[sample])


def dump(section, **kwargs):
    return json.dumps(section.model_dump(mode="json", **kwargs))


def train_command(spec, data, folder, **kwargs):
    command = ["step", "train", "--spec", dump(spec), "--train", data["train"], "--val", data["val"], "--device", "cpu"]
    command += [f"--weights={folder}/weights.safetensors", f"--last={folder}/last.safetensors"]
    command += [f"--history={folder}/history.csv", f"--state={folder}/state"]
    return command + [part for key, value in kwargs.items() for part in (f"--{key.replace('_', '-')}", value)]


def test_a_whole_study_without_snakemake(tiny, tmp_path, capsys):
    data = {split: tmp_path / "data" / f"{split}.h5" for split in ("train", "val", "test")}
    dataset = dump(tiny.datasets["tiny"], include={"source", "options", "channels", "patch"})
    run("step", "prepare", "--dataset", dataset, *(f"--{split}={path}" for split, path in data.items()))
    assert [len(io.sample_ids(path)) for path in data.values()] == [3, 2, 2]

    weights = None
    for name, network, method, seed in tiny.runs():
        spec = tiny.run(name, network, method, seed)
        folder = tmp_path / network / method
        given = {"teacher": weights} if method == "grd" else {}
        capsys.readouterr()
        run(*train_command(spec, data, folder, **given))
        assert "validation: aji" in capsys.readouterr().out
        header = io.read_header(folder / "weights.safetensors")
        assert header["run"]["method"] == method
        if method == TEACHER:
            weights = folder / "weights.safetensors"

        predictions, segmentation, metrics = (
            folder / "predictions.h5",
            folder / "segmentation.h5",
            folder / "metrics.csv",
        )
        common = ["--weights", folder / "weights.safetensors", "--data", data["test"], "--device", "cpu"]
        run("step", "predict", *common, "--out", predictions, "--keep-embeddings", 1)
        override = dump(tiny.datasets[name].segmentation, exclude_none=True)
        run(
            "step",
            "segment",
            "--predictions",
            predictions,
            "--out",
            segmentation,
            "--override",
            override,
            "--threads",
            2,
        )
        identity = {"dataset": name, "network": network, "method": method, "seed": seed}
        evaluation = ["--data", data["test"], "--segmentation", segmentation, "--run", json.dumps(identity)]
        run("step", "evaluate", *evaluation, "--out", metrics)

        kept = [sample for sample in io.sample_ids(data["test"]) if "embedding" in arrays(predictions, sample)]
        assert kept == io.sample_ids(data["test"])[:1]
        attrs = io.read_attrs(segmentation)
        assert attrs["parameters"] == header["segmentation"] | {"min_size": 12}
        assert attrs["weights_sha256"] == io.sha256(folder / "weights.safetensors")
        with metrics.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == io.METRIC_COLUMNS
        truth = {sample.id: sample.label for sample in io.read_samples(data["test"])}
        assert len(rows) == len(truth) * len(METRICS)
        for row in rows:
            assert {key: row[key] for key in identity} == {key: str(value) for key, value in identity.items()}
            found = io.read_array(segmentation, row["sample"], "label")
            assert found.dtype == np.uint32
            assert float(row["value"]) == pytest.approx(evaluate(truth[row["sample"]], found)[row["metric"]], rel=1e-8)

        spec = {"dataset": name, "network": network, "model": spec.model, "options": spec.options}
        out = tmp_path / f"{network}.json"
        run("step", "profile", "--spec", json.dumps(spec), "--data", data["test"], "--out", out, "--device", "cpu")
        profile = json.loads(out.read_text())
        assert profile["network"] == network
        assert profile["image_shape"] == [64, 64]
        assert all(profile[key] > 0 for key in ("parameters", "macs", "latency_ms", "latency_ms_p90"))
    assert json.loads((tmp_path / "big.json").read_text())["macs"] > profile["macs"]


def test_segmenting_again_gives_the_same_bytes_with_any_number_of_threads(teacher, splits, tmp_path):
    run(
        "step", "predict", "--weights", teacher, "--data", splits["test"], "--out", tmp_path / "p.h5", "--device", "cpu"
    )
    run(
        "step", "predict", "--weights", teacher, "--data", splits["test"], "--out", tmp_path / "q.h5", "--device", "cpu"
    )
    assert io.sha256(tmp_path / "p.h5") == io.sha256(tmp_path / "q.h5")
    for name, threads in (("a", 1), ("b", 3)):
        out = tmp_path / f"{name}.h5"
        run("step", "segment", "--predictions", tmp_path / "p.h5", "--out", out, "--threads", threads)
    assert io.sha256(tmp_path / "a.h5") == io.sha256(tmp_path / "b.h5")


def test_an_interrupted_step_exits_with_75_and_goes_on(tiny, splits, tmp_path, capsys):
    spec = tiny.run("tiny", "small", "none", 0)
    spec = spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"steps": 3, "patch": (32, 32)})})
    command = [str(part) for part in train_command(spec, splits, tmp_path, max_seconds=0)]
    for step in (1, 2, 3):
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 75
        assert f"stopped after step {step} of 3" in capsys.readouterr().out
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["resume.pt"]
    run(*command)
    assert (tmp_path / "weights.safetensors").exists()


def test_steps_refuse_with_one_line(tiny, teacher, splits, refusal, tmp_path):
    out = tmp_path / "out.h5"
    missing = tmp_path / "missing.h5"
    large = tiny.run("tiny", "small", "grd", 0)
    spec = large.model_copy(update={"recipe": large.recipe.model_copy(update={"patch": (32, 32)})})
    folder = tmp_path / "run"
    assert '"grd"' in refusal(*train_command(spec, splits, folder))
    assert str(missing) in refusal(*train_command(spec, splits | {"val": missing}, folder, teacher=teacher))
    assert "smaller than the patch" in refusal(*train_command(large, splits, folder, teacher=teacher))
    broken = train_command(spec, splits, folder)
    broken[broken.index("--spec") + 1] = '{"dataset": "tiny"}'
    assert "network" in refusal(*broken)
    predict = ["step", "predict", "--weights", teacher, "--out", out, "--device", "cpu", "--data"]
    assert str(missing) in refusal(*predict, missing)
    run = json.dumps({"dataset": "d", "network": "n", "method": "m", "seed": 0})
    evaluation = ["step", "evaluate", "--data", splits["test"], "--run", run, "--out", out]
    assert str(splits["val"]) in refusal(*evaluation, "--segmentation", splits["val"])
    dataset = json.dumps({"source": "nucle_phantom", "options": {}, "channels": 1, "patch": [8, 8]})
    files = [f"--{split}={tmp_path / split}.h5" for split in ("train", "val", "test")]
    assert "nuclei_phantom" in refusal("step", "prepare", "--dataset", dataset, *files)
    assert not list(tmp_path.iterdir())
