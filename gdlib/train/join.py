"""Make one teacher of several: an ensemble of trained networks, each seen several ways.

Nothing is trained. What is found out on images is in which directions the vectors of all members
lie (`gdlib.models.ensemble`), on those that they have learned from, and the parameters of the
segmenters, on validation images.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gdlib import __version__, io
from gdlib.config import RunSpec
from gdlib.devices import choose_device, choose_precision
from gdlib.models import build, trained
from gdlib.predict.predictor import Predictor
from gdlib.spread import spread
from gdlib.train.validator import Validator

IMAGES = 16  # in which directions are looked for
SIDES = {2: (256, 256), 3: (16, 128, 128)}  # pixels of each, at most


def join(
    spec: RunSpec,
    members: Sequence[Path | str],
    *,
    train: Path | str,
    val: Path | str,
    weights: Path | str,
    device: str = "auto",
) -> dict[str, float]:
    """Write the weights of an ensemble.

    Args:
        spec: its run; `model` and `options` are those of `gdlib.models.ensemble.Ensemble`.
        members: weights of each, in the order of the options.
        train: samples `.h5` that they have learned from.
        val: samples `.h5` to choose parameters on.
        weights: what is written, as `gdlib.train.fit` does.
        device: name, or `auto`.

    Returns:
        Mean validation metrics, with the first segmenter.

    Raises:
        gdlib.io.DataError: a file cannot be used, or the members do not go together.
    """
    target = choose_device(device)
    validator = Validator(spec, val, target)
    network = build(spec.model, spec.options)
    header = _gather(network, spec, members)
    network.projection.copy_(
        principal(spec, network, header, train, len(network.projection), device)
    )
    validator.normalisation = header["normalisation"]
    print(f"choosing segmentation parameters on {len(validator.samples)} validation images")
    parameters, scores = validator.tune(network.to(target).eval())
    about = {
        "run": spec.model_dump(mode="json"),
        "members": [io.sha256(path) for path in members],
        "gdlib": __version__,
        "torch": torch.__version__,
        "precision": str(choose_precision(spec.recipe.precision, target)).removeprefix("torch."),
        "segmentation": parameters,
        "validation": scores,
    }
    state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    io.save_weights(weights, state, header | about)
    return scores[spec.segmenters[0]]


def principal(
    spec: RunSpec,
    network: nn.Module,
    header: dict,
    samples: Path | str,
    count: int,
    device: str = "auto",
) -> Tensor:
    """Return those directions that keep most of the inner products of all members' vectors.

    Of all projections to so many directions, that on the first eigenvectors of the sum of v vᵀ
    changes the inner products of the vectors v least, in least squares.

    Args:
        spec: see `join`.
        network: the ensemble.
        header: channels, offsets and normalisation.
        samples: `.h5` of images; pieces of some, spread over the file, are looked at.
        count: K.
        device: name, or `auto`.

    Returns:
        (K, total length of the vectors) float32, rows orthonormal.
    """
    whole = build(spec.model, {**spec.options, "embedding_dim": None})
    whole.members.load_state_dict(network.members.state_dict())
    predictor = Predictor(whole, header, device=device, precision=spec.recipe.precision)
    total = len(whole.projection)
    products = torch.zeros(total, total, dtype=torch.float64)
    generator = np.random.default_rng(0)
    with io.open_h5(samples) as file:
        for name in spread(io.sample_ids(samples), IMAGES):
            source = predictor.source(file[name]["image"])
            sides = [min(pair) for pair in zip(source.shape, SIDES[whole.ndim], strict=True)]
            starts = [
                int(generator.integers(n - side + 1))
                for n, side in zip(source.shape, sides, strict=True)
            ]
            box = tuple(slice(a, a + side) for a, side in zip(starts, sides, strict=True))
            vectors = predictor.embed(source, box)[0].flatten(1).cpu()
            products += (vectors @ vectors.T).double()
    values, directions = torch.linalg.eigh(products)
    kept = float(values[-count:].sum() / values.sum())
    print(f"{count} of {total} directions keep {100 * kept:.1f} % of the vectors' squared length")
    return directions[:, -count:].flip(1).T.float().contiguous()


def _gather(network: nn.Module, spec: RunSpec, members: Sequence[Path | str]) -> dict:
    """Fill an ensemble with its members' weights; return what its header has of them."""
    if len(members) != len(network.members):
        raise ValueError(f"{len(network.members)} members have {len(members)} weights files")
    headers = []
    for path, member in zip(members, network.members, strict=True):
        one, header = trained(path, "model", "options", *io.HEADER)
        try:
            member.load_state_dict(one.state_dict())
        except RuntimeError as error:
            raise io.DataError(
                f"{path}: these are weights of {header['model']} {header['options']}, which the "
                "ensemble does not have at this place; give the weights in the order of its members"
            ) from error
        headers.append(header)
        for key in ("channels", "offsets", "normalisation"):
            if header[key] != headers[0][key]:
                raise io.DataError(
                    f"{path}: {key} {header[key]} differs from {headers[0][key]} of {members[0]}; "
                    "members must have been trained on the same dataset"
                )
    keys = (
        "channels",
        "offsets",
        "normalisation",
        *(headers[0].keys() & {"diameter", "pixel_size"}),
    )
    common = {key: headers[0][key] for key in keys}
    return {"model": spec.model, "options": spec.options, **common}
