"""Networks against the eager float32 network, the student against the teacher, and an image from
file to file.
"""

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tifffile
import torch

from benchmarks.bench import Bench, synchronise
from benchmarks.scenes import NETWORKS, OFFSETS, folder, roof, samples
from benchmarks.train import train
from gdlib import io, trained
from gdlib.cli import main
from gdlib.data.files import read_image
from gdlib.models import build
from gdlib.predict.cost import count_macs
from gdlib.predict.predictor import Predictor
from gdlib.segment.segmenters import segment


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """1 - mean cosine of the pixel vectors (D, *sides), which is what affinities are made of."""
    a, b = (x.float().cpu().flatten(1) for x in (ours, theirs))
    return float(1 - torch.cosine_similarity(a, b, dim=0).mean())


def networks(bench: Bench, ndim: int, shape: tuple[int, ...]) -> None:
    """Time student and teacher on one image."""
    axes = f"{ndim}D"
    found = {}
    for role, (model, options) in NETWORKS[ndim].items():
        torch.manual_seed(0)
        if bench.size != "full" and role == "teacher":
            options = {"widths": [2 * w for w in NETWORKS[ndim]["student"][1]["widths"]]}
        network = build(model, options).eval()
        eager = build(model, options).eval().to(bench.device)
        eager.load_state_dict(network.state_dict())
        header = {"channels": 1, "offsets": OFFSETS[ndim], "normalisation": {}}
        predictor = Predictor(network, header, device=bench.device, precision=bench.precision)
        image = torch.rand(1, *shape)

        @torch.inference_mode()
        def reference(eager=eager, image=image):
            output = eager(image[None].to(bench.device))
            return output.embedding[0], output.foreground[0, 0]

        found[role] = bench.compare(
            f"{role}, {axes}",
            lambda p=predictor, x=image: p.forward(x),
            reference,
            differ=lambda ours, theirs, p=predictor: differ(p.lengthened(ours[0]), theirs[0]),
            tolerance=0.02,
            least=2,
            about="the network as it was trained, eager, float32",
            shape=list(shape),
            precision=str(predictor.dtype).removeprefix("torch."),
        )
        found[role]["engine"] = predictor.engine
        found[role]["gflop_per_s"] = 2e-6 * count_macs(model, options, shape) / found[role]["ms"]
    shares = {
        role: 100 * one["ms"] / found["teacher"]["ms"]
        for role, one in found.items()
        if role != "teacher"
    }
    if ndim == 3:
        bench.extra["student_share_3d"] = shares["student"]
        return
    floor = "layers of 4 and 8 channels at full resolution are bound by memory"
    if bench.precision == "bfloat16":
        floor += " and leave units for bfloat16, from which the teacher gains most, without work"
    for role, share in shares.items():
        bench.target(
            f"time of the {role} against the teacher's in the same engine, 2D",
            share,
            1.5,
            unit=" %",
            floor=floor,
        )


def end_to_end(bench: Bench, shape: tuple[int, int], steps: int) -> None:
    """Time `gdlib segment` on one image, and each of its parts."""
    data = samples("nuclei_phantom", shape, 2)
    with TemporaryDirectory(dir=folder()) as name:
        out = Path(name)
        train(bench, steps, 2, bench.pick((128, 128), (64, 64), (32, 32)), 8, data, out)
        sample = next(iter(io.read_samples(data)))
        tifffile.imwrite(out / "image.tif", sample.image[0])
        weights = out / "weights.safetensors"
        predictor = Predictor.load(weights, device=bench.device, precision=bench.precision)
        parameters = predictor.header["segmentation"]["mutex_watershed"]
        predictor.stride = parameters["stride"]
        offsets = predictor.header["offsets"]
        command = [
            "segment",
            str(out / "image.tif"),
            "--model",
            str(weights),
            "--out",
            str(out / "labels"),
        ]
        command += ["--precision", bench.precision, "--device", str(bench.device)]

        def whole() -> None:
            with redirect_stdout(StringIO()):
                if main.main(command):
                    raise ValueError("gdlib segment failed")

        total = bench.compare(
            "an image from file to file",
            whole,
            about="gdlib segment in a running process",
            shape=list(shape),
        )
        image = read_image(out / "image.tif", 1)
        prediction = predictor(image)
        label = segment(
            prediction.affinity, prediction.foreground, offsets, "mutex_watershed", **parameters
        )
        sides = [-(-n // d) * d for n, d in zip(shape, predictor.network.divisor, strict=True)]
        ready = torch.rand(1, *sides)
        parts: dict[str, Callable] = {
            "load the weights": lambda: trained.predictor(
                weights, device=str(bench.device), precision=bench.precision
            ),
            "read": lambda: read_image(out / "image.tif", 1),
            "network": lambda: predictor.forward(ready),
            "predict (network and affinities)": lambda: predictor(image),
            "segment": lambda: segment(
                prediction.affinity, prediction.foreground, offsets, "mutex_watershed", **parameters
            ),
            "write": lambda: tifffile.imwrite(
                out / "label.tif",
                label,
                compression="zlib",
                compressionargs={"level": 1},
                photometric="minisblack",
            ),
        }
        ms = {}
        for title, call in parts.items():
            ms[title] = bench.compare(f"of it: {title}", call, about="a part of the case before")[
                "ms"
            ]
    others = max(
        ms["segment"],
        ms["predict (network and affinities)"] - ms["network"],
        ms["read"],
        ms["write"],
    )
    total["parts_ms"] = ms
    bench.target(
        "network against the largest other part, 520 x 696", ms["network"] / others, 1, unit=" x"
    )


def streams(bench: Bench, shape: tuple[int, int]) -> None:
    """Images per second of the student, one after the other."""
    header = {"channels": 1, "offsets": OFFSETS[2], "normalisation": {"lower": 1, "upper": 99.8}}
    predictor = Predictor(
        build(*NETWORKS[2]["student"]), header, device=bench.device, precision=bench.precision
    )
    images = [
        np.random.default_rng(k).integers(0, 4000, (1, *shape), np.uint16)
        for k in range(bench.pick(8, 4, 2))
    ]
    times = []
    for _ in range(bench.pick(4, 2, 2)):
        start = time.perf_counter()
        for image in images:
            predictor(image)
        synchronise(bench.device)
        times.append(1e3 * (time.perf_counter() - start) / len(images))
    bench.add(
        "predict one of many images",
        times[1:] or times,
        about="student, affinities included",
        shape=list(shape),
    )


def run(bench: Bench) -> None:
    """Networks in 2D and 3D, then images."""
    networks(bench, 2, bench.pick((544, 544), (256, 256), (64, 64)))
    networks(bench, 3, bench.pick((16, 128, 128), (8, 64, 64), (4, 32, 32)))
    roof(bench)
    end_to_end(bench, bench.pick((520, 696), (256, 256), (64, 80)), bench.pick(60, 10, 2))
    streams(bench, bench.pick((520, 696), (256, 256), (64, 80)))
