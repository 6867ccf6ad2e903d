"""The steps of a study, `gdlib step ...`: each reads and writes the files of `gdlib.io`, and needs
no Snakemake.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdlib import io
from gdlib.cli import BLOCK_HELP, process
from gdlib.cli.volume_steps import add_volume_steps
from gdlib.io import outputs
from gdlib.io.outputs import has_attributes, has_columns, has_keys, is_weights
from gdlib.limits import NotNegative, Share, Threads, Whole, argument, sides
from gdlib.segment.parameters import checked, is_masked

BASELINE_COLUMNS = ("dataset", "split", "baseline", "sample", "metric", "value")
INTERRUPTED = 75  # exit status of a training that was told to stop and can be resumed (EX_TEMPFAIL)


def add_steps(commands: argparse._SubParsersAction) -> None:
    """Add `gdlib step` and its own commands to the command line."""
    step = commands.add_parser(
        "step",
        help="one step of a study, as the workflow calls it",
        description="One step of a study on its files (see gdlib/io/files.py). Everything a step "
        "depends on is in its arguments.",
    )
    steps = step.add_subparsers(required=True, metavar="STEP")

    def add(
        name: str, function, help: str, own: dict[str, Callable[[Path], bool]], /, **arguments: dict
    ) -> None:
        """Add a step; `own` has the arguments that are outputs, and whether a file that is there is
        one of this step.
        """

        def run(parsed: argparse.Namespace) -> None:
            values = [getattr(parsed, key) for key in arguments if key not in own]
            read = [
                one for value in values for one in (value if isinstance(value, list) else [value])
            ]
            made = {key: path for key in own if (path := getattr(parsed, key))}
            outputs.check(
                [outputs.Output(path, own[key]) for key, path in made.items()],
                [io.split_h5_path(one)[0] for one in read if isinstance(one, str | Path)],
                overwrite=parsed.overwrite,
                option=" or ".join(f"--{key}" for key in made),
            )
            function(parsed)

        parser = steps.add_parser(name, help=help, description=help)
        for key, options in arguments.items():
            parser.add_argument(f"--{key.replace('_', '-')}", **options)
        if own:
            parser.add_argument("--overwrite", action="store_true", help=outputs.HELP)
        parser.set_defaults(function=run if own else function)

    file = {"type": Path, "required": True, "metavar": "FILE"}
    text = {"required": True, "metavar": "JSON", "type": argument(dict[str, Any])}
    rows = {**text, "type": argument(list[dict[str, Any]])}
    maybe = {"type": Path, "metavar": "FILE"}
    many = {**maybe, "nargs": "*", "default": []}
    threads = {"type": argument(Threads), "metavar": "N", "help": "CPU threads"}
    device = {"default": "auto", "help": "auto, cpu, cuda, ..."}
    segmenter = {
        "required": True,
        "metavar": "NAME",
        "help": "mutex_watershed, waterz, multicut or mutex_watershed_masked",
    }
    add(
        "download",
        _download,
        "Download the files of a dataset, all or none.",
        {},
        files=rows,
        folder={"type": Path, "required": True, "metavar": "DIR"},
    )
    add(
        "prepare",
        _prepare,
        "Check the images of a dataset and write its train, val and test samples.",
        dict.fromkeys(("train", "val", "test", "unlabelled"), has_attributes("split", "sha256")),
        dataset=text,
        root={"type": Path, "metavar": "DIR"},
        train=file,
        val=file,
        test=file,
        unlabelled={**maybe, "help": "and those of unlabelled images, if the dataset says which"},
    )
    add(
        "label",
        _label,
        "Let a teacher find objects in images that nobody has labelled.",
        {"out": has_attributes("teacher", "sure")},
        teacher=file,
        samples=file,
        out=file,
        sure={
            "type": argument(Share),
            "required": True,
            "metavar": "P",
            "help": "where it gives less probability to what it found, that is ignored",
        },
        segmenter={**segmenter, "required": False},
        parameters={**text, "required": False, "default": {}},
        block={"type": sides, "metavar": "SIDES", "help": BLOCK_HELP},
        engine={"default": "auto", "help": "auto, torch, openvino"},
        threads=threads,
        device=device,
    )
    add(
        "ask",
        _ask,
        "Ask a teacher once about every training image, for all students.",
        {"out": has_attributes("teacher", "parts")},
        teacher=file,
        samples=file,
        out=file,
        level={"metavar": "NAME", "help": "a feature map, in place of embedding and foreground"},
        block={"type": sides, "metavar": "SIDES", "help": BLOCK_HELP},
        precision={"default": "auto"},
        engine={"default": "auto", "help": "auto, torch, openvino"},
        threads=threads,
        device=device,
    )
    add(
        "train",
        _train,
        "Train a teacher or a student.",
        {"weights": is_weights, "last": is_weights, "history": has_columns(*io.HISTORY_COLUMNS)},
        spec=text,
        train=file,
        val=file,
        teacher=maybe,
        maps=many,
        unlabelled=maybe,
        unlabelled_maps=many,
        weights=file,
        last=file,
        history=file,
        state={"type": Path, "required": True, "metavar": "DIR"},
        threads=threads,
        device=device,
        max_seconds={
            "type": argument(NotNegative),
            "default": math.inf,
            "metavar": "S",
            "help": "stop, resumable, after it",
        },
    )
    add(
        "join",
        _join,
        "Make one teacher of several networks.",
        {"weights": is_weights},
        spec=text,
        members={**many, "required": True, "nargs": "+", "help": "weights, in the spec's order"},
        train=file,
        val=file,
        weights=file,
        threads=threads,
        device=device,
    )
    add(
        "predict",
        _predict,
        "Predict affinities and foreground of a split.",
        {"out": has_attributes("weights_sha256", "kept")},
        weights=file,
        data=file,
        out=file,
        threads=threads,
        device=device,
        keep_embeddings={"type": argument(Whole), "metavar": "N", "default": 0},
        block={"type": sides, "metavar": "SIDES", "help": BLOCK_HELP},
        engine={"default": "auto", "help": "auto, torch, openvino"},
    )
    add(
        "segment",
        _segment,
        "Turn predictions into instances.",
        {"out": has_attributes("weights_sha256", "segmenter")},
        predictions=file,
        out=file,
        segmenter=segmenter,
        override={**text, "required": False, "default": {}},
        data={
            "type": Path,
            "metavar": "FILE",
            "help": "samples, for a segmenter that needs the true foreground",
        },
        threads=threads,
    )
    add(
        "evaluate",
        _evaluate,
        "Compute every metric of a split.",
        {"out": has_columns(*io.METRIC_COLUMNS)},
        data=file,
        segmentation=file,
        out=file,
        run=text,
        segmenter=segmenter,
    )
    add(
        "baselines",
        _baselines,
        "Compute every metric of segmentations that need no network.",
        {"out": has_columns(*BASELINE_COLUMNS)},
        dataset={"required": True, "metavar": "NAME"},
        val=file,
        test=file,
        out=file,
    )
    add(
        "profile",
        _profile,
        "Measure parameters, operations, latency and memory of a network.",
        {"out": has_keys("macs", "latency_ms")},
        spec=text,
        data=file,
        out=file,
        threads=threads,
        device=device,
    )
    add_volume_steps(add)


def _download(arguments: argparse.Namespace) -> None:
    from gdlib.config.sections import RemoteFile
    from gdlib.data.download import download

    download([RemoteFile.model_validate(file) for file in arguments.files], arguments.folder)


def _prepare(arguments: argparse.Namespace) -> None:
    from gdlib.data.prepare import prepare

    dataset = _complete("--dataset", arguments.dataset, "source", "options", "patch", "channels")
    splits = ("train", "val", "test", "unlabelled")
    outputs = {split: path for split in splits if (path := getattr(arguments, split))}
    prepare(
        dataset["source"],
        dataset["options"],
        arguments.root,
        outputs,
        tuple(dataset["patch"]),
        dataset["channels"],
        arguments.dataset.get("unlabelled", False),
    )


def _label(arguments: argparse.Namespace) -> None:
    from gdlib.train.label import label_images

    keys = ("sure", "segmenter", "parameters", "block", "engine", "device", "threads")
    options = {key: getattr(arguments, key) for key in keys}
    label_images(arguments.teacher, arguments.samples, arguments.out, **options)


def _ask(arguments: argparse.Namespace) -> None:
    from gdlib.train.ask import ask

    options = {
        key: getattr(arguments, key) for key in ("level", "block", "precision", "engine", "device")
    }
    ask(arguments.teacher, arguments.samples, arguments.out, **options)


def _train(arguments: argparse.Namespace) -> None:
    from gdlib.config import RunSpec
    from gdlib.config.mistakes import within
    from gdlib.train.loop import Interrupted, fit

    process.keep_memory()
    keys = (
        "train",
        "val",
        "teacher",
        "maps",
        "unlabelled",
        "unlabelled_maps",
        "weights",
        "last",
        "history",
        "state",
        "device",
        "max_seconds",
    )
    options = {key: getattr(arguments, key) for key in keys}
    with within("--spec"):
        spec = RunSpec.model_validate(arguments.spec)
    try:
        with process.stop_signal() as stop:
            scores = fit(spec, stop=stop, **options)
    except Interrupted:
        raise SystemExit(INTERRUPTED) from None
    if scores:  # of several processes, one validates
        _say_validation(scores)


def _join(arguments: argparse.Namespace) -> None:
    from gdlib.config import RunSpec
    from gdlib.config.mistakes import within
    from gdlib.train.join import join

    with within("--spec"):
        spec = RunSpec.model_validate(arguments.spec)
    options = {key: getattr(arguments, key) for key in ("train", "val", "weights", "device")}
    _say_validation(join(spec, arguments.members, **options))


def _say_validation(scores: dict[str, float]) -> None:
    from gdlib.evaluate.scores import in_empty

    keys = ("aji", "pq", "f1_50", "dice", "arand", "voi")
    print("validation:", ", ".join(f"{key} {scores[key]:.4f}" for key in keys) + in_empty(scores))


def _predict(arguments: argparse.Namespace) -> None:
    from gdlib.predict.files import predict_split
    from gdlib.predict.predictor import Predictor

    options = {key: getattr(arguments, key) for key in ("device", "engine", "block")}
    predictor = Predictor.load(arguments.weights, **options)
    predict_split(
        predictor,
        arguments.data,
        arguments.out,
        weights_sha256=io.sha256(arguments.weights),
        keep_embeddings=arguments.keep_embeddings,
    )


def _segment(arguments: argparse.Namespace) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from gdlib.segment.segmenters import segment

    truth = arguments.data if is_masked(arguments.segmenter) else None
    if is_masked(arguments.segmenter) and truth is None:
        raise ValueError(
            f"{arguments.segmenter} needs the foreground of the ground truth; give "
            "the samples as --data"
        )
    attrs = io.read_attrs(arguments.predictions)
    if not {"offsets", "segmentation", "weights_sha256"} <= set(attrs):
        raise io.DataError(
            f"{arguments.predictions}: this is no predictions file; make one with "
            "`gdlib step predict`"
        )
    tuned = attrs["segmentation"]
    if arguments.segmenter not in tuned and not arguments.override:
        raise io.DataError(
            f'{arguments.predictions}: the parameters of "{arguments.segmenter}" were not tuned '
            "with these weights, only those "
            f"of {', '.join(tuned)}; choose one of them, or give parameters"
        )
    parameters = checked(
        arguments.segmenter, tuned.get(arguments.segmenter, {}) | arguments.override
    )

    def work(sample: str):
        affinity = io.read_array(arguments.predictions, sample, "affinity")
        if truth is None:
            foreground = io.read_array(arguments.predictions, sample, "foreground")
        else:
            foreground = io.read_array(truth, sample, "label")
        return sample, segment(
            affinity, foreground, attrs["offsets"], arguments.segmenter, **parameters
        )

    samples = io.sample_ids(arguments.predictions)
    about = {
        "segmenter": arguments.segmenter,
        "parameters": parameters,
        "weights_sha256": attrs["weights_sha256"],
    }
    with (
        io.create_h5(arguments.out, **about) as file,
        ThreadPoolExecutor(arguments.threads or 1) as pool,
    ):
        for sample, label in pool.map(work, samples):
            io.put(file.create_group(sample), "label", label, io.BLOCK if label.ndim == 3 else None)


def _complete(option: str, given: dict[str, Any], *parts: str) -> dict[str, Any]:
    """Return these parts of what an option gives, or raise."""
    if missing := [part for part in parts if part not in given]:
        raise ValueError(
            f"{option}: {', '.join(missing)} missing; it is a JSON object with {', '.join(parts)}"
        )
    return {part: given[part] for part in parts}


def _evaluate(arguments: argparse.Namespace) -> None:
    from gdlib.evaluate.scores import of_image

    run = _complete("--run", arguments.run, "dataset", "network", "method", "seed")
    identity = (*run.values(), arguments.segmenter)
    rows = []
    with io.open_h5(arguments.data) as samples, io.open_h5(arguments.segmentation) as found:
        for name, sample in samples.items():
            if f"{name}/label" not in samples:
                raise io.DataError(
                    f'{arguments.data}: "{name}" has no label, so this is no samples file; give one'
                )
            if f"{name}/label" not in found:
                raise io.DataError(
                    f'{arguments.segmentation}: there is no segmentation of "{name}"; segment again'
                )
            try:  # as datasets: they are read piece by piece
                scores = of_image(sample["label"], found[name]["label"], sample.get("ignore"))
            except ValueError as error:
                raise io.DataError(
                    f'{arguments.segmentation}: sample "{name}": {error}; segment again'
                ) from None
            rows += [(*identity, name, key, value) for key, value in scores.items()]
    io.write_rows(arguments.out, io.METRIC_COLUMNS, rows)


def _baselines(arguments: argparse.Namespace) -> None:
    from gdlib.evaluate.trivial import evaluate_baselines

    rows = []
    for split in ("val", "test"):
        rows += [
            (arguments.dataset, split, *row)
            for row in evaluate_baselines(getattr(arguments, split))
        ]
    io.write_rows(arguments.out, BASELINE_COLUMNS, rows)


def _profile(arguments: argparse.Namespace) -> None:
    from gdlib.predict.cost import profile

    spec = arguments.spec
    _complete("--spec", spec, "model", "options")
    with io.open_h5(arguments.data) as file:
        label = next(
            (file[f"{name}/label"] for name in sorted(file) if f"{name}/label" in file), None
        )
        if label is None:
            raise io.DataError(
                f"{arguments.data}: there is no label in it, so this is no samples file; give one"
            )
        shape = label.shape
    result = profile(spec["model"], spec["options"], shape, device=arguments.device)
    io.write_text(arguments.out, json.dumps({**spec, **result}, indent=2, sort_keys=True) + "\n")
