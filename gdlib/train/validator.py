"""Validation: how good a network is on images that it does not learn from, and how its output is
best made into objects.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gdlib import io
from gdlib.config import RunSpec
from gdlib.predict.predictor import Predictor
from gdlib.segment.parameters import defaults
from gdlib.segment.tune import score, tune
from gdlib.spread import spread


class Validator:
    """Scores a network on the validation split by the real metric, through the real inference and
    segmentation.
    """

    def __init__(self, spec: RunSpec, path: Path | str, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.normalisation: dict[str, Any] = spec.normalisation.model_dump(
            include={"lower", "upper"}
        )
        self.samples = list(io.read_samples(path))
        if not self.samples:
            raise io.DataError(f"{path}: there is no validation image; check the split lists")
        parts: dict[bool, list[io.Sample]] = {True: [], False: []}
        for sample in self.samples:
            parts[_has_objects(sample)].append(sample)
        if not parts[True]:
            raise io.DataError(
                f"{path}: no validation image has an object; move images with "
                "objects into this split"
            )
        count = min(spec.recipe.validate_images, len(self.samples))
        # their share, rounded up
        empty = min(-(-count * len(parts[False]) // len(self.samples)), count - 1)
        self.some = [*spread(parts[True], count - empty), *spread(parts[False], empty)]

    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Scores on some images together, with the default parameters of the first segmenter."""
        segmenter = self.spec.segmenters[0]
        parameters = defaults(segmenter, len(self.spec.patch))
        predictions = self._predict(network, self.some)
        labels, ignores = [s.label for s in self.some], [s.ignore for s in self.some]
        return score(
            predictions, labels, self.spec.offsets, parameters, segmenter=segmenter, ignores=ignores
        )

    def tune(
        self, network: nn.Module
    ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, float]]]:
        """Choose the parameters of every segmenter on the whole split.

        Returns:
            By segmenter the parameters, and the scores with them.
        """
        predictions = self._predict(network, self.samples)
        labels, ignores = [s.label for s in self.samples], [s.ignore for s in self.samples]
        chosen = {
            segmenter: tune(
                predictions,
                labels,
                self.spec.offsets,
                self.spec.recipe.selection,
                segmenter=segmenter,
                ignores=ignores,
            )
            for segmenter in self.spec.segmenters
        }
        return {name: c[0] for name, c in chosen.items()}, {
            name: c[1] for name, c in chosen.items()
        }

    def _predict(
        self, network: nn.Module, samples: list[io.Sample]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        header = self.spec.model_dump(mode="json", include={"channels", "offsets"})
        header["normalisation"] = self.normalisation
        predictor = Predictor(
            network, header, device=self.device, precision=self.spec.recipe.precision
        )
        out = []
        for sample in samples:
            prediction = predictor(sample.image)
            out.append((prediction.affinity, prediction.foreground))
        return out


def _has_objects(sample: io.Sample) -> bool:
    return bool((sample.label if sample.ignore is None else sample.label[~sample.ignore]).any())
