"""Other programs on the images of ours: how well they segment, and how fast.

    python -m benchmarks.references train TRAINED --kind stardist --data DATA/bbbc039 DATA/dsb2018
    python -m benchmarks.references images TEST --data DATA/bbbc039 DATA/dsb2018
    python -m benchmarks.references segment TRAINED TEST LABELS
    python -m benchmarks.references score LABELS --data DATA/bbbc039 DATA/dsb2018
    python -m benchmarks.references curve TRAINED --data DATA/bbbc039 DATA/dsb2018
    python -m benchmarks.references speed TRAINED TEST

DATA are prepared datasets (`gdlib step prepare`): `train.h5`, `val.h5` and `test.h5`, 2D, one
channel. StarDist (https://github.com/stardist/stardist), InstanSeg and what they train with are the
extra `references`.

`train` trains InstanSeg's default network (`--kind instanseg`, see `benchmarks/instanseg.py`), or
StarDist's as its example does: images normalised from
percentile 1 to 99.8, patches of 256 x 256 in batches of 4, flips, quarter turns, another brightness
and noise, Adam at 0.0003. It stops when its process has taken `--seconds` of processor time, keeps
the weights of the lowest validation loss, and tunes its two thresholds on the validation images by
its own method. Started again, it goes on where it stopped. `images` writes the test images as TIFF,
`segment` label images of them by StarDist's own command, by InstanSeg's class, by a network in ONNX
that finds the foreground (TRAINED is its file), or by `gdlib segment` (TRAINED is a name or a file
of ours). `score` prints the means over images with objects, `curve` the validation AJI after every
epoch of StarDist (what InstanSeg records of its own is in `history.csv`),
`speed` images per second, from a folder of TIFFs to a folder of label TIFFs in a new process, in
turns with ours, and the time of the networks alone.
"""

import argparse
import csv
import functools
import inspect
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.feature import peak_local_max
from skimage.segmentation import watershed

from benchmarks import instanseg
from gdlib import io
from gdlib.devices import cpu_name
from gdlib.evaluate import scores

PERCENTILES = (1, 99.8)  # StarDist's own
DIVISOR = 16  # of the sides of an image that its network takes
SAVE = 25  # steps between two states on the disk
INSTALL = 'install StarDist: pip install "gdlib[references]"'
PART, HALO = 512, 32  # pixels, of the networks in ONNX
METRICS = ("aji", "dice", "f1_50", "pq")
DEFAULTS = {
    "seconds": 1800.0,
    "threads": 2,
    "seed": 0,
    "rounds": 3,
    "ours": "nuclei",
    "kind": "stardist",
}


def samples(data: Sequence[Path], part: str) -> dict[str, list[io.Sample]]:
    """Return the samples of a part (train, val, test) of every dataset, by the dataset's name."""
    found = {folder.name: list(io.read_samples(folder / f"{part}.h5")) for folder in data}
    for name, some in found.items():
        if some[0].image.ndim != 3 or some[0].image.shape[0] != 1:
            raise SystemExit(f"{name}: these programs are measured on 2D images of one channel")
    return found


def few_threads(count: int) -> None:
    """Give TensorFlow so many threads; before it is used."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise SystemExit(f"{error}; {INSTALL}") from error
    tf.config.threading.set_intra_op_parallelism_threads(count)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def scaled(samples: Sequence[io.Sample]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return images (Y, X) float32 and labels (Y, X) as StarDist's example prepares them."""
    from csbdeep.utils import normalize
    from stardist import fill_label_holes

    images = [normalize(s.image[0], *PERCENTILES).astype(np.float32) for s in samples]
    return images, [fill_label_holes(s.label.astype(np.int32)) for s in samples]


def augment(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a flipped and turned copy of other brightness, with noise: StarDist's example."""
    turns = np.random.randint(4)  # noqa: NPY002 - the generator that StarDist seeds
    image, label = np.rot90(image, turns), np.rot90(label, turns)
    if np.random.rand() < 0.5:  # noqa: NPY002
        image, label = np.flip(image, 0), np.flip(label, 0)
    image = image * np.random.uniform(0.6, 2) + np.random.uniform(-0.2, 0.2)  # noqa: NPY002
    noise = 0.02 * np.random.uniform(0, 1)  # noqa: NPY002
    return image + noise * np.random.normal(0, 1, image.shape), label  # noqa: NPY002


def train(
    folder: Path, data: Sequence[Path], kind: str, seconds: float, threads: int, seed: int
) -> None:
    """Train the default network of StarDist or InstanSeg (`--kind`) into a folder, or go on with
    it, and tune its thresholds.
    """
    trainings = {"stardist": train_stardist, "instanseg": instanseg.train}
    if kind not in trainings:
        raise SystemExit(f"{kind}: there are {', '.join(trainings)}")
    parts = {
        part: [*itertools.chain.from_iterable(samples(data, part).values())]
        for part in ("train", "val")
    }
    trainings[kind](folder, parts, seconds, threads, seed)


def train_stardist(
    folder: Path, parts: dict[str, list[io.Sample]], seconds: float, threads: int, seed: int
) -> None:
    """Train StarDist's default network."""
    few_threads(threads)
    import keras
    from stardist.models import Config2D, StarDist2D

    prepared = {part: scaled(some) for part, some in parts.items()}
    config = Config2D(
        n_rays=32, grid=(2, 2), n_channel_in=1, train_tensorboard=False, train_checkpoint=None
    )
    # without checkpoints of StarDist's own, which know nothing of a training that goes on
    config.train_checkpoint_last = config.train_checkpoint_epoch = None
    model = StarDist2D(config, name=folder.name, basedir=str(folder.parent))
    model.prepare_for_training()
    state, history = folder / "state.npz", folder / "history.csv"
    network, optimizer = model.keras_model, model.keras_model.optimizer
    optimizer.build(network.trainable_variables)
    variables = [*network.variables, *optimizer.variables]
    done, spent = 0, 0.0
    if state.exists():
        with np.load(state) as saved:
            done, spent = int(saved["steps"]), float(saved["seconds"])
            for number, variable in enumerate(variables):
                variable.assign(saved[f"v{number}"])
    start = time.process_time()

    class Progress(keras.callbacks.Callback):
        """Keeps the state, the weights of every epoch and its losses; stops in time."""

        steps = done

        def used(self) -> float:
            return spent + time.process_time() - start

        def keep(self) -> None:
            arrays = {f"v{n}": np.asarray(variable) for n, variable in enumerate(variables)}
            with io.atomic(state) as temporary, temporary.open("wb") as file:
                np.savez(file, steps=self.steps, seconds=self.used(), **arrays)

        def on_train_batch_end(self, batch, logs=None):
            self.steps += 1
            if self.steps % SAVE == 0:
                self.keep()
            if self.used() > seconds:
                self.model.stop_training = True

        def on_epoch_end(self, epoch, logs=None):
            self.keep()
            network.save_weights(str(folder / f"epoch_{self.steps:06d}.h5"))
            row = {"step": self.steps, "seconds": round(self.used(), 1)} | {
                name: round(float(logs[name]), 5) for name in ("loss", "val_loss")
            }
            new = not history.exists()
            with history.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)

    recorded = 0
    if history.exists():
        with history.open(newline="") as file:
            recorded = max(int(row["step"]) for row in csv.DictReader(file))
    if spent < seconds or recorded < done:  # what was killed within an epoch has no loss yet
        model.callbacks.append(Progress())
        images, labels = prepared["train"]
        model.train(
            images, labels, validation_data=prepared["val"], augmenter=augment, seed=seed + done
        )
    with history.open(newline="") as file:
        best = min(csv.DictReader(file), key=lambda row: float(row["val_loss"]))
    shutil.copy(folder / f"epoch_{int(best['step']):06d}.h5", folder / "weights_best.h5")
    model.load_weights("weights_best.h5")
    model.optimize_thresholds(*prepared["val"])
    print(f"weights of step {best['step']}, thresholds {model.thresholds}")


def images(folder: Path, data: Sequence[Path]) -> None:
    """Write the test images of every dataset as TIFF, one folder for each."""
    for name, some in samples(data, "test").items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for sample in some:
            tifffile.imwrite(folder / name / f"{sample.id}.tif", sample.image[0])


def environment(threads: int) -> dict[str, str]:
    """Return the variables that limit the threads of a process."""
    names = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return os.environ | dict.fromkeys(names, str(threads)) | {"TF_CPP_MIN_LOG_LEVEL": "2"}


def command(program: str, files: Sequence[Path], out: Path, threads: int) -> list[str]:
    """Return the command that segments TIFFs: InstanSeg where `program` is a folder with its
    network, StarDist's own where it is another folder, else ours, of which it is the `--model`,
    perhaps with a precision, as in `nuclei:int8`.
    """
    if (Path(program) / instanseg.FILE).exists():
        start = [sys.executable, "-m", "benchmarks.instanseg", "--threads", str(threads)]
        return [*start, program, str(out), *map(str, files)]
    if Path(program).is_dir():
        start = Path(sys.executable).with_name("stardist-predict2d")
        if not start.exists():
            raise SystemExit(f"{start} is missing; {INSTALL}")
        return [
            str(start),
            "-m",
            program,
            "-o",
            str(out),
            "-i",
            *map(str, files),
        ]
    model, precision = precise(program)
    start = [sys.executable, "-m", "gdlib", "segment", "--model", model, "--out", str(out)]
    return [*start, "--precision", precision, "--threads", str(threads), *map(str, files)]


def precise(program: str) -> tuple[str, str]:
    """Return a model of ours, and its precision: float32, as StarDist computes, if it says none."""
    model, _, precision = program.partition(":")
    return model, precision or "float32"


def onnx_network(program: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return what runs an ONNX file of one input and one output."""
    session = io.onnx_session(program, threads)
    (name,) = (one.name for one in session.get_inputs())
    return lambda part: session.run(None, {name: part})[0]


def foreground(image: np.ndarray, run: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the foreground that a network sees in parts of 512 x 512 pixels.

    Args:
        image: (Y, X), any type.
        run: (1, 1, 512, 512) float32 of mean 0 and deviation 1 to logits of the same shape.

    Returns:
        (Y, X) float32, a probability.
    """
    image = image.astype(np.float32)
    image = (image - image.mean()) / (image.std() + 1e-6)
    inner = PART - 2 * HALO
    ends = [HALO + -side % inner for side in image.shape]
    padded = np.pad(image, [(HALO, end) for end in ends], mode="symmetric")
    out = np.empty([side + -side % inner for side in image.shape], np.float32)
    for y, x in itertools.product(*(range(0, side, inner) for side in out.shape)):
        logit = run(padded[None, None, y : y + PART, x : x + PART])[0, 0]
        out[y : y + inner, x : x + inner] = logit[HALO:-HALO, HALO:-HALO]
    return 1 / (1 + np.exp(-out[: image.shape[0], : image.shape[1]]))


def distance_watershed(foreground: np.ndarray) -> np.ndarray:
    """Return objects (Y, X) uint16: the foreground, cut where it is narrow; nothing is tuned."""
    inside = foreground > 0.5
    distance = gaussian_filter(distance_transform_edt(inside).astype(np.float32), 1)
    peaks = peak_local_max(distance, min_distance=5, labels=inside.astype(np.uint8))
    seeds = np.zeros(inside.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-distance, seeds, mask=inside).astype(np.uint16)


def segment(program: str, test: Path, labels: Path, threads: int) -> None:
    """Segment the TIFFs of every folder in `test` into a folder of the same name in `labels`."""
    for folder in sorted(path for path in test.iterdir() if path.is_dir()):
        out, files = labels / folder.name, sorted(folder.glob("*.tif"))
        if not io.is_onnx(program):
            subprocess.run(
                command(program, files, out, threads), env=environment(threads), check=True
            )
            for path in out.glob("*.stardist.tif"):  # to ask its command for other names fails
                path.rename(path.with_name(path.name.replace(".stardist.tif", ".tif")))
            continue
        out.mkdir(parents=True, exist_ok=True)
        run = onnx_network(program, threads)
        for path in files:
            found = distance_watershed(foreground(tifffile.imread(path), run))
            tifffile.imwrite(out / path.name, found)


def score(labels: Path, data: Sequence[Path]) -> None:
    """Print the means over the test images with objects of every dataset."""
    for name, some in samples(data, "test").items():
        rows = []
        for sample in some:
            path = labels / name / f"{sample.id}.tif"
            if not path.exists():
                raise SystemExit(f"{path} is missing; segment all test images first")
            rows.append(scores.of_image(sample.label, tifffile.imread(path), sample.ignore))
        means = scores.mean(rows)
        text = ", ".join(f"{key} {means[key]:.3f}" for key in METRICS)
        print(f"{name}: {sum(row['objects'] > 0 for row in rows)} images, {text}")


def curve(folder: Path, data: Sequence[Path], threads: int) -> None:
    """Print the losses of every epoch, and the validation AJI with StarDist's default thresholds,
    which favour no epoch.
    """
    few_threads(threads)
    from stardist.models import StarDist2D

    model = StarDist2D(None, name=folder.name, basedir=str(folder.parent))
    parts = {name: (some, scaled(some)[0]) for name, some in samples(data, "val").items()}
    with (folder / "history.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            model.load_weights(f"epoch_{int(row['step']):06d}.h5")
            for name, (some, pictures) in parts.items():
                found = [
                    model.predict_instances(picture, prob_thresh=0.5, nms_thresh=0.4)[0]
                    for picture in pictures
                ]
                pairs = zip(some, found, strict=True)
                means = scores.mean([scores.of_image(s.label, f, s.ignore) for s, f in pairs])
                row[f"AJI {name}"] = f"{means['aji']:.3f}"
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def network(program: str, path: Path, threads: int) -> None:
    """Print the parameters of a network, and the median time of it alone on one image, in ms."""
    image = tifffile.imread(path)
    if (Path(program) / instanseg.FILE).exists():
        import torch

        model = instanseg.load(Path(program), threads).instanseg
        count = sum(p.numel() for p in model.parameters())
        ready = instanseg.ready(image)
        run = functools.partial(torch.inference_mode()(model.fcn), ready)
    elif Path(program).is_dir():
        few_threads(threads)
        from csbdeep.utils import normalize
        from stardist.models import StarDist2D

        model = StarDist2D(None, name=program)
        count = model.keras_model.count_params()
        ready = normalize(image, *PERCENTILES).astype(np.float32)
        ready = np.pad(ready, [(0, -side % DIVISOR) for side in image.shape], mode="reflect")
        ready = ready[None, ..., None]
        # without what `predict` of Keras adds to every call
        run = functools.partial(model.keras_model.predict_on_batch, ready)
    else:
        import torch

        from gdlib.models import trained
        from gdlib.predict.predictor import Predictor
        from gdlib.trained import find

        torch.set_num_threads(threads)
        model, precision = precise(program)
        predictor = Predictor.load(find(model), precision=precision)
        count = sum(p.numel() for p in trained(find(model))[0].parameters())
        sides = zip(image.shape, predictor.network.divisor, strict=True)
        ready = np.pad(image.astype(np.float32), [(0, -n % d) for n, d in sides], mode="reflect")
        ready = torch.from_numpy(ready[None] / ready.max())
        run = functools.partial(predictor.forward, ready)
    times = []
    for _ in range(25):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    print(f"{count} parameters, network {statistics.median(times[5:]):.1f} ms")


def speed(program: str, images: Path, ours: str, rounds: int, threads: int) -> None:
    """Print the seconds from TIFFs to label TIFFs in a new process, of a program and of ours, one
    or several with commas between, in turns: of all images of a folder, and of one of them, which
    is mostly the start.
    """
    files, programs = sorted(images.glob("*.tif")), (program, *ours.split(","))
    print(f"{cpu_name()}, {threads} threads, {len(files)} images")
    found: dict[tuple[str, int], list[float]] = {}
    # the first round reads the programs from the disk, and compiles what is kept
    for number in range(rounds + 1):
        for name, count in itertools.product(programs, (1, len(files)) if number else (1,)):
            with TemporaryDirectory() as out:
                start = time.perf_counter()
                subprocess.run(
                    command(name, files[:count], Path(out), threads),
                    env=environment(threads),
                    check=True,
                    capture_output=True,
                )
                taken = time.perf_counter() - start
                if len(list(Path(out).glob("*.tif"))) != count:
                    raise SystemExit(f"{name}: not every image has labels")
            if number:
                found.setdefault((name, count), []).append(taken)
    for name in programs:
        one, all_ = (statistics.median(found[name, count]) for count in (1, len(files)))
        print(
            f"{name}: {all_:.1f} s ({', '.join(f'{t:.1f}' for t in found[name, len(files)])}), "
            f"one image {one:.1f} s; {len(files) / all_:.2f} images per second, "
            f"{(len(files) - 1) / (all_ - one):.2f} without the start"
        )
        words = ["-m", "benchmarks.references", "network", name, str(files[0])]
        subprocess.run(
            [sys.executable, *words, "--threads", str(threads)],
            env=environment(threads),
            check=True,
        )


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(required=True, dest="what", metavar="PART")

    def part(function: Callable[..., None], **own: Any) -> None:
        """Add a part, whose arguments are those of its function."""
        added = what.add_parser(function.__name__, help=function.__doc__.partition("\n")[0])
        for name, options in own.items():
            added.add_argument(name if "nargs" not in options else f"--{name}", **options)
        for name in DEFAULTS:
            if name in inspect.signature(function).parameters:
                default = DEFAULTS[name]
                added.add_argument(f"--{name}", type=type(default), default=default)

    path, data = {"type": Path}, {"nargs": "+", "type": Path, "required": True}
    part(train, folder=path, data=data)
    part(images, folder=path, data=data)
    part(segment, program={}, test=path, labels=path)
    part(score, labels=path, data=data)
    part(curve, folder=path, data=data)
    part(network, program={}, path=path)
    part(speed, program={}, images=path)
    arguments = vars(parser.parse_args())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    globals()[arguments.pop("what")](**arguments)


if __name__ == "__main__":
    main()
