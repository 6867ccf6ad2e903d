"""The steps of a study, `gdlib step ...`: each reads and writes the files of `gdlib.io`, and needs no Snakemake."""

import argparse
import json
import math
from pathlib import Path

from gdlib import io


def add_steps(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib step` and its own commands to the command line."""
    step = commands.add_parser(
        "step",
        help="one step of a study, as the workflow calls it",
        description="One step of a study on its files (see gdlib/io.py). Everything a step depends on is in its arguments.",
    )
    steps = step.add_subparsers(required=True, metavar="STEP")

    def add(name: str, function, help: str, /, **arguments: dict) -> None:
        parser = steps.add_parser(name, help=help, description=help)
        for key, options in arguments.items():
            parser.add_argument(f"--{key.replace('_', '-')}", **options)
        parser.set_defaults(function=function)

    file = {"type": Path, "required": True, "metavar": "FILE"}
    text = {"required": True, "metavar": "JSON", "type": json.loads}
    threads = {"type": int, "metavar": "N", "help": "CPU threads"}
    device = {"default": "auto", "help": "auto, cpu, cuda, ..."}
    add(
        "prepare", _prepare, "Check the images of a dataset and write its train, val and test samples.",
        dataset=text, root={"type": Path, "metavar": "DIR"}, train=file, val=file, test=file,
    )  # fmt: skip
    add(
        "train", _train, "Train a teacher or a student.",
        spec=text, train=file, val=file, teacher={"type": Path, "metavar": "FILE"}, weights=file, last=file, history=file,
        state={"type": Path, "required": True, "metavar": "DIR"}, threads=threads, device=device,
        max_seconds={"type": float, "default": math.inf, "metavar": "S", "help": "stop, resumable, after this time"},
    )  # fmt: skip
    add(
        "predict", _predict, "Predict affinities and foreground of a split.",
        weights=file, data=file, out=file, keep_embeddings={"type": int, "default": 0}, threads=threads, device=device,
    )  # fmt: skip
    add(
        "segment", _segment, "Turn predictions into instances.",
        predictions=file, out=file, override={**text, "required": False, "default": {}}, threads=threads,
    )  # fmt: skip
    add("evaluate", _evaluate, "Compute every metric of a split.", data=file, segmentation=file, out=file, run=text)
    add(
        "profile", _profile, "Measure parameters, operations, latency and memory of a network.",
        spec=text, data=file, out=file, threads=threads, device=device,
    )  # fmt: skip


def _prepare(arguments: argparse.Namespace) -> None:
    from gdlib.data.prepare import prepare

    dataset = arguments.dataset
    outputs = {split: getattr(arguments, split) for split in ("train", "val", "test")}
    prepare(
        dataset["source"], dataset["options"], arguments.root, outputs, tuple(dataset["patch"]), dataset["channels"]
    )


def _train(arguments: argparse.Namespace) -> None:
    from gdlib.config import RunSpec
    from gdlib.training import fit

    scores = fit(
        RunSpec.model_validate(arguments.spec),
        train=arguments.train,
        val=arguments.val,
        teacher=arguments.teacher,
        weights=arguments.weights,
        last=arguments.last,
        history=arguments.history,
        state=arguments.state,
        device=arguments.device,
        max_seconds=arguments.max_seconds,
    )
    print("validation:", ", ".join(f"{key} {scores[key]:.4f}" for key in ("aji", "pq", "f1_50", "dice")))


def _predict(arguments: argparse.Namespace) -> None:
    from gdlib.inference import Predictor, predict_split

    predictor = Predictor.load(arguments.weights, device=arguments.device)
    predict_split(
        predictor,
        arguments.data,
        arguments.out,
        weights_sha256=io.sha256(arguments.weights),
        keep_embeddings=arguments.keep_embeddings,
    )


def _segment(arguments: argparse.Namespace) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from gdlib.segmentation import segment

    attrs = io.read_attrs(arguments.predictions)
    parameters = attrs["segmentation"] | arguments.override

    def work(sample: str):
        affinity = io.read_array(arguments.predictions, sample, "affinity")
        foreground = io.read_array(arguments.predictions, sample, "foreground")
        return sample, segment(affinity, foreground, attrs["offsets"], **parameters)

    samples = io.sample_ids(arguments.predictions)
    with (
        io.create_h5(arguments.out, parameters=parameters, weights_sha256=attrs["weights_sha256"]) as file,
        ThreadPoolExecutor(arguments.threads or 1) as pool,
    ):
        for sample, label in pool.map(work, samples):
            io.put(file.create_group(sample), "label", label)


def _evaluate(arguments: argparse.Namespace) -> None:
    from gdlib.metrics import evaluate

    run = arguments.run
    rows = []
    for sample in io.read_samples(arguments.data):
        scores = evaluate(sample.label, io.read_array(arguments.segmentation, sample.id, "label"))
        rows += [
            (run["dataset"], run["network"], run["method"], run["seed"], sample.id, key, value)
            for key, value in scores.items()
        ]
    io.write_rows(arguments.out, io.METRIC_COLUMNS, rows)


def _profile(arguments: argparse.Namespace) -> None:
    from gdlib.profile import profile

    spec = arguments.spec
    first = next(io.read_samples(arguments.data))
    result = profile(spec["model"], spec["options"], first.label.shape, device=arguments.device)
    io.write_text(arguments.out, json.dumps({**spec, **result}, indent=2, sort_keys=True) + "\n")
