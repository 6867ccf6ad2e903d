"""InstanSeg (https://github.com/instanseg/instanseg) for `python -m benchmarks.references`.

    pip install "gdlib[references]"

`train` trains the network that its script `instanseg/scripts/train.py` trains by default, with its
loss, images normalised and augmented by its own code, tiles of 256 x 256 in batches of 3, Adam at
0.001: a U-Net (32 to 256 channels) of three input channels, which are all the one of the image, and
nuclei only. As there, the first 10 epochs of 1000 tiles have a loss of cross-entropy and Dice, the
others that of distances and Lovasz; the budget here ends long before. Where the script validates
after every epoch, this does after every `EPOCH` steps, on as many tiles for each one learned from,
the same each time, and keeps the weights of the best F1. Its thresholds are tuned on tiles of the
validation images by its own method, and the whole is written as TorchScript, as its export does.

    python -m benchmarks.instanseg TRAINED OUT IMAGE ...

segments TIFFs by its class `InstanSeg` with that TorchScript. Its own command is not used: it draws
every result, and gives an image of one channel to a network of three as it is.
"""

import argparse
import csv
import itertools
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from gdlib import io

OPTIONS: list[str] = []  # of its training script, besides the defaults
SAVE = 5  # steps between two states on the disk
EPOCH = 40  # steps between two validations
VALIDATION = 0.2  # tiles that it validates on, for each one learned from
TRIALS = 50  # of thresholds, its own default
FILE, WEIGHTS = "instanseg.pt", "best.pt"
INSTALL = 'install InstanSeg: pip install "gdlib[references]"'


def defaults() -> argparse.Namespace:
    """Return the options of InstanSeg's training script, as it completes them."""
    try:
        from instanseg.scripts.train import parser
    except ImportError as error:
        raise SystemExit(f"{error}; {INSTALL}") from error
    args = parser.parse_args(OPTIONS)
    args.layers = [int(width) for width in args.layers.strip("[]").split(",")]
    args.cells_and_nuclei, args.on_cluster = len(args.target_segmentation) == 2, True
    return args


def tiles(samples: Sequence[io.Sample], part: str, args: argparse.Namespace, count: int) -> Any:
    """Return a loader of `count` tiles of images, as its own `get_loaders` but in one process."""
    from instanseg.utils.AI_utils import Segmentation_Dataset, collate_fn
    from instanseg.utils.augmentation_config import get_augmentation_dict
    from torch.utils.data import DataLoader, RandomSampler

    augmentation = get_augmentation_dict(
        args.dim_in,
        nuclei_channel=None,
        amount=args.transform_intensity,
        pixel_size=args.requested_pixel_size,
        mean_diameter=args.mean_object_diameter,
        augmentation_type=args.augmentation_type,
    )
    dataset = Segmentation_Dataset(
        [s.image for s in samples],
        [s.label.astype(np.int32) for s in samples],
        metadata=[{"image_modality": "Fluorescence"} for _ in samples],
        size=(args.tile_size, args.tile_size),
        augmentation_dict=augmentation[part],
        dim_in=args.dim_in,
        cells_and_nuclei=args.cells_and_nuclei,
        target_segmentation=args.target_segmentation,
        channel_invariant=args.channel_invariant,
    )
    sampler = RandomSampler(dataset, num_samples=count)
    return DataLoader(dataset, args.batch_size, sampler=sampler, collate_fn=collate_fn)


def again(loader: Any) -> Iterator:
    """Return the batches of a loader, epoch after epoch."""
    while True:
        yield from loader


def seed_all(seed: int) -> None:
    """Seed every generator that its augmentation draws from."""
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that InstanSeg uses
    torch.manual_seed(seed)


def build(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return its network, and its method: loss and postprocessing."""
    from instanseg.utils.loss.instanseg_loss import InstanSeg
    from instanseg.utils.model_loader import build_model_from_dict

    method = InstanSeg(
        binary_loss_fn_str=args.binary_loss_fn,
        seed_loss_fn=args.seed_loss_fn,
        device="cpu",
        n_sigma=args.n_sigma,
        cells_and_nuclei=args.cells_and_nuclei,
        window_size=args.window_size,
        dim_coords=args.dim_coords,
        dim_seeds=args.dim_seeds,
        feature_engineering_function=args.feature_engineering,
        bg_weight=args.bg_weight,
    )
    args.dim_out = method.dim_out
    network = build_model_from_dict(vars(args))
    return method.initialize_pixel_classifier(network, MLP_width=args.mlp_width), method


def train(
    folder: Path, parts: dict[str, list[io.Sample]], seconds: float, threads: int, seed: int
) -> None:
    """Train InstanSeg's default network into a folder, or go on with it, and tune its thresholds.

    Args:
        folder: where the state, the weights, `history.csv` and the TorchScript are written.
        parts: samples of `train` and `val`, 2D, one channel.
        seconds: of processor time of all processes that trained into the folder.
        threads: of torch.
        seed: of weights, tiles and augmentation.
    """
    args = defaults()
    import torch
    from instanseg.utils.AI_utils import optimize_hyperparameters, test_epoch, train_epoch

    warnings.filterwarnings("ignore", "Pixel size None")
    torch.set_num_threads(threads)
    seed_all(seed)
    network, method = build(args)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    state, history, best = folder / "state.pt", folder / "history.csv", folder / WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = {"steps": 0, "seconds": 0.0, "losses": [], "f1": -1.0}
    if state.exists():
        saved = torch.load(state, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        done = {key: saved[key] for key in done}
        seed_all(seed + done["steps"])
    spent, start = done["seconds"], time.process_time()

    def keep() -> None:
        """Write the state."""
        done["seconds"] = spent + time.process_time() - start
        both = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        with io.atomic(state) as temporary:
            torch.save(done | both, temporary)

    count = round(EPOCH * args.batch_size * VALIDATION)
    fixed = tiles(parts["val"], "test", args, count)

    def validate() -> None:
        """Record the loss and the F1 of validation tiles; keep the weights if it is the best."""
        generators = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        seed_all(seed)
        loss, f1, _ = test_epoch(
            network,
            "cpu",
            fixed,
            method.forward,
            args,
            method.postprocessing,
            method,
            np.linspace(0.5, 1.0, 10),
            best_f1=np.inf,  # it draws what is better
        )
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
        torch.set_rng_state(generators[2])
        f1 = float(np.nan_to_num(f1[0]))
        if f1 > done["f1"]:
            done["f1"] = f1
            with io.atomic(best) as temporary:
                torch.save(network.state_dict(), temporary)
        row = {
            "step": done["steps"],
            "seconds": round(spent + time.process_time() - start, 1),
            "loss": round(float(np.mean(done["losses"])), 5),
            "val_loss": round(float(loss), 5),
            "val_f1": round(f1, 5),
        }
        done["losses"] = []
        new = not history.exists()
        with history.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
        keep()

    batches = again(tiles(parts["train"], "train", args, args.length_of_epoch))
    hot = args.hotstart_training * args.length_of_epoch / args.batch_size  # steps
    while spent + time.process_time() - start < seconds:
        warm = done["steps"] >= hot
        method.update_seed_loss(args.seed_loss_fn if warm else "binary_xloss")
        method.update_binary_loss(args.binary_loss_fn if warm else "dice_loss")
        some = itertools.islice(batches, SAVE)
        loss, _ = train_epoch(network, "cpu", some, method.forward, optimizer, args)
        done["steps"] += SAVE
        done["losses"].append(float(loss))
        keep()
        if done["steps"] % EPOCH == 0:
            validate()
    if done["losses"]:
        validate()
    network.load_state_dict(torch.load(best, weights_only=True))
    seed_all(seed)
    thresholds = optimize_hyperparameters(
        network,
        method.postprocessing,
        data_loader=fixed,
        max_evals=TRIALS,
        show_progressbar=False,
        device="cpu",
    )
    thresholds = {key: float(value) for key, value in thresholds.items()}
    export(network, args, thresholds, folder / FILE)
    print(f"best F1 {done['f1']:.3f}, {done['steps']} steps, thresholds {thresholds}")


def export(
    network: Any, args: argparse.Namespace, thresholds: dict[str, float], path: Path
) -> None:
    """Write a network and its postprocessing as TorchScript, as `export_to_torchscript` does."""
    import torch
    from instanseg.utils.loss.instanseg_loss import InstanSeg_Torchscript

    whole = InstanSeg_Torchscript(
        network,
        cells_and_nuclei=args.cells_and_nuclei,
        pixel_size=0.0,
        n_sigma=args.n_sigma,
        dim_coords=args.dim_coords,
        dim_seeds=args.dim_seeds,
        backbone_dim_in=args.dim_in,
        feature_engineering_function=args.feature_engineering,
        params=thresholds,
    )
    with io.atomic(path) as temporary:
        torch.jit.save(torch.jit.script(whole), temporary)


def load(folder: Path, threads: int) -> Any:
    """Return InstanSeg's class with the network of a folder; it has `eval_small_image`."""
    try:
        from instanseg import InstanSeg
    except ImportError as error:
        raise SystemExit(f"{error}; {INSTALL}") from error
    import torch

    torch.set_num_threads(threads)
    script = torch.jit.load(folder / FILE, map_location="cpu")
    return InstanSeg(script, device="cpu", image_reader="skimage.io", verbosity=0)


def channels(image: np.ndarray, count: int = 3) -> np.ndarray:
    """Return an image (Y, X) as (count, Y, X) float32, as its own code repeats gray images."""
    return np.repeat(image[None].astype(np.float32), count, axis=0)


def ready(image: np.ndarray) -> Any:
    """Return an image (Y, X) as its network takes it: a tensor (1, 3, Y, X), scaled, padded."""
    import torch
    from instanseg.utils.tiling import _instanseg_padding
    from instanseg.utils.utils import percentile_normalize

    return _instanseg_padding(percentile_normalize(torch.from_numpy(channels(image)))[None])[0]


def segment(folder: Path, out: Path, files: Sequence[Path], threads: int) -> None:
    """Write label images (Y, X) int32 of TIFFs (Y, X) under their names."""
    model = load(folder, threads)
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        image = channels(tifffile.imread(path))
        labels = model.eval_small_image(image, return_image_tensor=False)
        tifffile.imwrite(out / path.name, labels.numpy().squeeze().astype(np.int32))


def main() -> None:
    """Segment what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    segment(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
