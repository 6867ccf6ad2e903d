"""The weights of methods: an ablation that scales them all, and the table of validation scores to
choose by."""

import csv
from pathlib import Path

import pytest

from gdlib import io
from gdlib.config import Config, ConfigError, parts
from gdlib.config.words import spelt_out
from gdlib.report.tables import validation

RAW = spelt_out(parts.read(Path(__file__).parents[1]))


def with_ablation(**changes):
    ablation = {"method": "grd", "keys": ["weight"], "values": [0.3, 1, 3]} | changes
    return RAW | {"ablations": RAW["ablations"] | {"all_weights": ablation}}


def test_a_factor_scales_every_weight_and_nothing_else():
    config = Config.parse(with_ablation())
    base = config.method("grd")
    assert config.method("all_weights=1") == base
    scaled = config.method("all_weights=3")
    assert [term.weight for term in scaled.terms] == pytest.approx(
        [3 * term.weight for term in base.terms]
    )
    plain = [term.model_copy(update={"weight": 1.0}) for term in base.terms]
    assert [term.model_copy(update={"weight": 1.0}) for term in scaled.terms] == plain
    # or the ratio of the weights would not be tested
    assert len({term.weight for term in base.terms}) > 1


def test_an_unknown_key_says_what_can_be_varied():
    with pytest.raises(ConfigError, match=r"write weight, recipe.*or terms"):
        Config.parse(with_ablation(keys=["weights"]))


def test_every_method_of_the_comparison_is_tuned_with_the_same_effort():
    config = Config.parse(RAW | {"study": "tuning"})
    tuned = {
        config.ablations[name].method: config.ablations[name] for name in config.selected.ablations
    }
    assert set(tuned) >= {m for m in config.studies["methods"].methods if config.methods[m].terms}
    assert {(one.keys, one.values) for one in tuned.values()} == {(("weight",), (0.3, 1, 3))}
    # The trial is the comparison at one seed of one student: nothing else differs.
    comparison = Config.parse(RAW | {"study": "methods"})
    assert config.recipe("tuning", "bbbc039", "student") == comparison.recipe(
        "methods", "bbbc039", "student"
    )


def weights_file(folder, method, seed, aji):
    run = {
        "dataset": "cells",
        "network": "tiny",
        "method": method,
        "seed": seed,
        "segmenters": ["b", "a"],
    }
    scores = {"a": {"aji": 0.99}, "b": {"aji": aji}}  # the first segmenter of the run decides
    path = folder / f"{method}{seed}.safetensors"
    io.save_weights(path, {}, {"run": run, "validation": scores})
    return path


@pytest.mark.parametrize(("metric", "best"), [("aji", "3"), ("voi", "0.3")])
def test_validation_scores_are_averaged_over_seeds_and_the_best_value_stands_out(
    tmp_path, metric, best
):
    scores = {
        "none": (0.5, 0.7),
        "tune=0.3": (0.2, 0.4),
        "tune=1": (0.5, 0.5),
        "tune=3": (0.9, 0.5),
    }
    files = [
        weights_file(tmp_path, m, seed, aji)
        for m, pair in scores.items()
        for seed, aji in enumerate(pair)
    ]
    for file in files:  # the same numbers under the name of the metric
        header = io.read_header(file)
        header["validation"] = {k: {metric: v["aji"]} for k, v in header["validation"].items()}
        io.save_weights(file, {}, header)
    validation.write(
        files, tmp_path / "v.csv", tmp_path / "v.md", {"cells": metric}, {"tune": "weights times"}
    )
    text = (tmp_path / "v.md").read_text()
    assert "| none | 0.600 |" in text
    values = {"0.3": "0.300", "1": "0.500", "3": "0.700"}
    row = ", ".join(f"{k}: " + (f"**{v}**" if k == best else v) for k, v in values.items())
    assert f"| weights times | {row} |" in text
    with open(tmp_path / "v.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(files)
    assert {row["segmenter"] for row in rows} == {"a", "b"}
