"""Values outside of their range: one sentence that names range and value, wherever they were
written, before anything runs."""

import argparse
import json
import math
from typing import Any

import numpy as np
import pytest
import yaml
from test_config import SMALL

from gdlib import io, limits
from gdlib.cli.main import _parser, main
from gdlib.config import Config, ConfigError
from gdlib.registry import NETWORKS, SOURCES, TERMS, UnknownName
from gdlib.segment import mutex, parameters, segmenters
from gdlib.volumes import grid

OFFSETS = [[-1, 0], [0, -1], [-9, 0], [0, -9]]
AFFINITY, FOREGROUND = np.full((4, 12, 13), 200, np.uint8), np.full((12, 13), 255, np.uint8)
NUMBERS = (
    "a number from 0 to 1",
    "a number above 0",
    "a whole number of at least 0",
    ("a whole number from 1 to 1024"),
)
SHARE, POSITIVE, WHOLE, STRIDE = NUMBERS

# Segmenter, parameter, its range in words, values outside of it.
PARAMETERS = [
    ("mutex_watershed", "stride", STRIDE, [0, -1, 2.5, math.nan, 2**64]),
    ("mutex_watershed", "exponent", POSITIVE, [0, -1, math.nan, math.inf]),
    ("mutex_watershed", "foreground_threshold", SHARE, [2, -0.1, math.nan]),
    ("mutex_watershed", "min_size", WHOLE, [-5, 1.5, math.inf]),
    ("mutex_watershed", "min_fragment", WHOLE, [-1]),
    ("waterz", "foreground_threshold", SHARE, [1.1]),
    ("waterz", "threshold", SHARE, [-0.1, 2, math.nan]),
    ("multicut", "beta", "a number above 0 and below 1", [0, 1, -1, 1.5, math.nan]),
    ("mutex_watershed_masked", "stride", STRIDE, [0]),
]
VALUES = [
    (segmenter, name, words, value)
    for segmenter, name, words, values in PARAMETERS
    for value in values
]


def sentence(error, *words):
    """Is this one line with all these words?"""
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text.strip()
    assert all(str(word) in text for word in words), text
    return text


def header(**segmentation):
    """Header of weights, tuned like this."""
    return {
        "offsets": OFFSETS,
        "channels": 1,
        "model": "nowhere",
        "options": {},
        "segmentation": segmentation,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with weights that cannot be loaded, of which the header alone is good, and
    nothing else."""
    folder = tmp_path_factory.mktemp("weights")
    io.save_weights(
        folder / "w.safetensors", {}, header(mutex_watershed={}, waterz={}, multicut={})
    )
    return folder


def test_every_parameter_of_every_segmenter_is_tried():
    tried = {name for _, name, *_ in PARAMETERS}
    assert tried == {
        name for segmenter in segmenters.SEGMENTERS for name in parameters.PARAMETERS[segmenter]
    }
    assert parameters.PARAMETERS.keys() == segmenters.SEGMENTERS.keys()
    for segmenter, table in parameters.PARAMETERS.items():
        for name, (_, values) in table.items():
            for default, tuned in values.values():
                for value in (default, *tuned):
                    assert parameters.checked(segmenter, {name: value}) == {name: value}


@pytest.mark.parametrize(("segmenter", "name", "words", "value"), VALUES)
def test_a_parameter_of_a_segmenter(segmenter, name, words, value, files, capsys):
    """Python, the configuration, weights, volumes block by block, the command line."""
    said = f"{name} of {segmenter} must be {words} (got {value!r})"
    foreground = FOREGROUND > 0 if parameters.is_masked(segmenter) else FOREGROUND
    with pytest.raises(ValueError, match="must be") as error:
        segmenters.segment(AFFINITY, foreground, OFFSETS, segmenter, **{name: value})
    sentence(error, said)
    raw = yaml.safe_load(SMALL)
    raw["datasets"]["bbbc039"]["segmentation"] = {segmenter: {name: value}}
    with pytest.raises(ConfigError) as error:
        Config.parse(raw)
    sentence(error, said, f"datasets.bbbc039: segmentation.{segmenter}")
    if parameters.is_masked(segmenter):
        return
    with pytest.raises(ValueError, match="must be") as error:
        parameters.chosen("w.safetensors", header(**{segmenter: {name: value}}), segmenter, {})
    sentence(error, said, "w.safetensors")
    with pytest.raises(ValueError, match="must be") as error:
        grid.chosen("w.safetensors", header(**{segmenter: {}}), segmenter, {name: value})
    sentence(error, said)
    ways = [["--set", f"{name}={value}"]]
    ways += [[f"--{name.replace('_', '-')}={value}"]] if name == "foreground_threshold" else []
    for way in ways:
        command = [
            "segment",
            "nowhere.png",
            "--out",
            files / "out",
            "--model",
            files / "w.safetensors",
            *way,
        ]
        assert main([*map(str, command), "--segmenter", segmenter]) == 1
        error = sentence(capsys.readouterr().err, f"{name} of {segmenter} must be {words}")
        assert error.startswith("gdlib: error: ")
    assert [path.name for path in files.iterdir()] == ["w.safetensors"]


def test_weights_with_a_bad_parameter_can_be_used_with_another():
    tuned = header(mutex_watershed={"stride": 0, "min_size": 7})
    segmenter, found = parameters.chosen("w", tuned, None, {"stride": 2.0})
    assert (segmenter, found["stride"], found["min_size"], type(found["stride"])) == (
        "mutex_watershed",
        2,
        7,
        int,
    )


def test_the_step_of_a_study(tmp_path, capsys):
    with io.create_h5(
        tmp_path / "p.h5", offsets=OFFSETS, segmentation={"mutex_watershed": {}}, weights_sha256=""
    ) as file:
        io.put(file.create_group("a"), "affinity", AFFINITY)
        io.put(file["a"], "foreground", FOREGROUND)
    step = ["step", "segment", "--predictions", tmp_path / "p.h5", "--out", tmp_path / "s.h5"]
    override = json.dumps({"stride": 0})
    assert main([*map(str, step), "--segmenter", "mutex_watershed", "--override", override]) == 1
    sentence(capsys.readouterr().err, f"stride of mutex_watershed must be {STRIDE} (got 0)")


@pytest.mark.parametrize("value", [1e-320, 5e-324, 1 - 1e-16])
def test_the_ends_of_a_range_are_no_traceback(value):
    for segmenter, name in (
        ("multicut", "beta"),
        ("mutex_watershed", "exponent"),
        ("waterz", "threshold"),
    ):
        if segmenter != "waterz" or pytest.importorskip("waterz"):
            found = segmenters.segment(AFFINITY, FOREGROUND, OFFSETS, segmenter, **{name: value})
            assert found.shape == FOREGROUND.shape


TWO = {"step predict-block": "--passes", "step predict": "--block", "segment": "--block"}
# Command, option, text, what is said of it.
ARGUMENTS = [
    (command, option, text, "whole numbers of at least 1")
    for command, option in TWO.items()
    for text in ("0", "4x0", "-1", "4.5", "4xa", "")
]
ARGUMENTS += [
    (command, "--threads", text, "a whole number from 1 to 1024")
    for command in (
        "segment",
        "step train",
        "step predict",
        "step segment",
        "step ask",
        "step profile",
    )
    for text in ("0", "-1", "2.5", "many")
]
ARGUMENTS += [
    ("models", "--shape", "0", "a whole number of at least 1 (got 0)"),
    ("segment", "--set", "stride=two", '"stride=two" is not NAME=NUMBER'),
    ("segment", "--pixel-size", "abc", "one length in microns, or one for each axis as in"),
    ("segment", "--pixel-size", "1x", "(got '1x')"),
    ("segment", "--min-size", "abc", "it must be a number (got 'abc')"),
    ("segment", "--foreground-threshold", "", "it must be a number (got '')"),
    ("segment", "--out", "", "it must be the name of a file or folder (got '')"),
    ("export", "--out", "", "it must be the name of a file or folder (got '')"),
    ("step train", "--max-seconds", "-1", "a number of at least 0"),
    ("step train", "--spec", "{", "must be JSON"),
    ("step train", "--spec", "[1]", "must be a valid dictionary"),
    ("step predict", "--keep-embeddings", "-1", "a whole number of at least 0"),
    ("step plan-volume", "--block", "[64, 0]", "it.1 must be a whole number of at least 1"),
    ("step match-block", "--overlap", "[-1, 8]", "it.0 must be a whole number of at least 0"),
    ("step number-blocks", "--min-size", "1.5", "a whole number of at least 0"),
]


@pytest.mark.parametrize(("command", "option", "text", "words"), ARGUMENTS)
def test_a_number_on_the_command_line(command, option, text, words, capsys):
    with pytest.raises(SystemExit) as error:
        main([*command.split(), f"{option}={text}"])
    assert error.value.code == 2
    sentence(
        capsys.readouterr().err.splitlines()[-1],
        f"gdlib {command}: error: argument {option}: ",
        words,
    )


def test_every_number_on_the_command_line_has_a_range():
    """No option reads a bare int, float or JSON."""

    def options(parser):
        for action in parser._actions:
            for inner in (
                (action.choices or {}).values()
                if isinstance(action, argparse._SubParsersAction)
                else ()
            ):
                yield from options(inner)
            yield parser.prog, action

    bare = [
        f"{prog} {action.dest}"
        for prog, action in options(_parser())
        if action.type in (int, float, json.loads)
    ]
    assert bare == []


def test_a_home_on_the_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for argument in (
        "segment a.tif --out b --model=~/w.safetensors",
        "info ~/w.safetensors",
        "check --config=~/c.yaml",
    ):
        assert main(argument.split()) == 1
        assert str(tmp_path) in capsys.readouterr().err


def test_a_plan_of_senseless_blocks(files, tmp_path, capsys):
    command = [
        "step",
        "plan-volume",
        "--image",
        "v.h5",
        "--weights",
        str(files / "w.safetensors"),
        "--out",
        str(tmp_path / "p"),
    ]
    for block, segmenter, words in (
        ("[64]", "multicut", "must have 2 or 3 axes"),
        ("[64, 64]", "multicu", "no segmenter"),
    ):
        assert main([*command, "--block", block, "--segmenter", segmenter]) == 1
        sentence(capsys.readouterr().err, words)


@pytest.mark.parametrize(
    ("shape", "block", "overlap", "words"),
    [
        ((64, 64), (0, 32), (8, 8), "block.0 must be"),
        ((64, 64), (32, 32), (8, -8), "overlap.1 must be a whole number of at least 0 (got -8)"),
        ((64, 0), (32, 32), (8, 8), "shape.1 must be"),
        ((64, 64), (32, 32, 32), (8, 8), "the same"),
        ((64,), (32,), (8,), "2 or 3 axes"),
    ],
)
def test_a_grid_of_blocks(shape, block, overlap, words):
    with pytest.raises(ValueError, match="must") as error:
        grid.Grid(shape, block, overlap)
    sentence(error, words)


MASK = FOREGROUND > 0
KERNEL = {
    "stride 0": ({"stride": 0}, "stride must be a whole number from 1 to 1024"),
    "stride -1": ({"stride": -1}, "stride must be"),
    "a stride that 64 bits do not hold": ({"stride": 2**64}, "stride must be"),
    "exponent nan": ({"exponent": math.nan}, "exponent must be a number above 0"),
    "offsets of another dimension": (
        {"offsets": [[0, *offset] for offset in OFFSETS]},
        "do not fit",
    ),
    "offsets of several dimensions": ({"offsets": [*OFFSETS[:3], [0, 0, -9]]}, "do not fit"),
    "too few affinities": ({"affinity": AFFINITY[:3]}, "do not fit"),
    "a larger mask": ({"mask": np.ones((12, 14), bool)}, "do not fit"),
}


@pytest.mark.parametrize("change", KERNEL)
@pytest.mark.parametrize("counted", [True, False])
def test_the_mutex_watershed_looks_at_what_it_gets(change, counted, monkeypatch):
    if not counted:
        monkeypatch.setattr(mutex, "MOST_PIXELS", 0)
    given = {"affinity": AFFINITY, "mask": MASK, "offsets": OFFSETS} | KERNEL[change][0]
    with pytest.raises(ValueError, match=KERNEL[change][1]) as error:
        mutex.mutex_watershed(**given)
    sentence(error)


WIDTHS = [4, 8, 16, 32]
ONE = "a whole number of at least 1"
# Kind of plug-in, name, options, what the sentence says of it.
PLUG_INS = [
    (SOURCES, "nuclei_phantom", {"size": [0, 256]}, f"size.0 must be {ONE} (got 0)"),
    (SOURCES, "nuclei_phantom", {"size": [64]}, "size"),
    (SOURCES, "nuclei_phantom", {"size": [8, 64, 64]}, "size"),
    (
        SOURCES,
        "nuclei_phantom",
        {"images": {"train": 0, "val": 1, "test": 1}},
        f"images.train must be {ONE} (got 0)",
    ),
    (SOURCES, "nuclei_phantom", {"images": {"train": 4, "val": 1}}, "images must have test"),
    (SOURCES, "nuclei_phantom", {"images": {"train": 4, "val": 1, "tset": 1}}, "tset"),
    (
        SOURCES,
        "nuclei_phantom",
        {"radius": [17, 9]},
        "radius must be the smaller number, then the larger one",
    ),
    (SOURCES, "nuclei_phantom", {"radius": [0, 9]}, "radius.0 must be a number above 0"),
    (
        SOURCES,
        "nuclei_phantom",
        {"seed": -1},
        "seed must be a whole number from 0 to 4294967295 (got -1)",
    ),
    (
        SOURCES,
        "nuclei_phantom",
        {"touching": 1.5},
        "touching must be a number from 0 to 1 (got 1.5)",
    ),
    (
        SOURCES,
        "nuclei_phantom",
        {"haze": "1e-3"},
        "haze must be a number of at least 0 (got '1e-3')",
    ),
    (SOURCES, "neurites_phantom", {"size": [256, 256]}, "size"),
    (SOURCES, "neurites_phantom", {"anisotropy": 0}, "anisotropy must be a number above 0"),
    (
        SOURCES,
        "worms_phantom",
        {"overlap": "frist"},
        "overlap must be 'ignore', 'first' or 'last' (got 'frist')",
    ),
    (SOURCES, "leaves_phantom", {"stalk": 1}, "stalk must be a number of at least 0 and below 1"),
    (
        SOURCES,
        "bbbc039",
        {"split": "held_out"},
        "split must be 'heldout' or 'official' (got 'held_out')",
    ),
    (SOURCES, "bbbc039", {"min_area": -1}, "min_area"),
    (SOURCES, "cremi", {"every_section": 0}, f"every_section must be {ONE}"),
    (
        SOURCES,
        "cremi",
        {"sections": {"train": [0, 9], "val": [9, 12], "test": [12]}},
        "sections.test",
    ),
    (SOURCES, "cremi", {"samples": "ABC"}, "samples"),
    (SOURCES, "ac34", {"components": "no"}, "components must be a valid boolean (got 'no')"),
    (SOURCES, "folder", {"val_fraction": 1}, "val_fraction must be a number above 0 and below 1"),
    (SOURCES, "folder", {"voxel_size_nm": [40, 0, 4]}, "voxel_size_nm.1 must be a number above 0"),
    (NETWORKS, "resunet", {"widths": [0, *WIDTHS]}, f"widths.0 must be {ONE} (got 0)"),
    (NETWORKS, "resunet", {"widths": [4.5, *WIDTHS]}, f"widths.0 must be {ONE} (got 4.5)"),
    (NETWORKS, "resunet", {"widths": WIDTHS}, "widths.4 is missing"),
    (NETWORKS, "resunet3d", {"widths": 16}, "widths must be a valid tuple (got 16)"),
    (NETWORKS, "nestedunet", {"widths": [*WIDTHS, 64, 128]}, "widths"),
    (NETWORKS, "mala", {"decoder": [8, 8]}, "decoder.2 is missing"),
    (NETWORKS, "enet", {"dropout": 1}, "dropout must be a number of at least 0 and below 1"),
    (NETWORKS, "segformer", {"heads": [0, 2, 5, 8]}, "heads.0 must be"),
    (NETWORKS, "mobilenetv2", {"embedding_dim": 0}, f"embedding_dim must be {ONE}"),
    (TERMS, "original", {"pool": 0}, f"pool must be {ONE} (got 0)"),
    (TERMS, "skd", {"pool": -2}, "pool"),
    (TERMS, "original", {"power": 3}, "power must be 1 or 2 (got 3)"),
    (TERMS, "igd", {"part": "node"}, "part must be 'nodes' or 'edges'"),
    (TERMS, "cwd", {"temperature": 0}, "temperature must be a number above 0"),
    (
        TERMS,
        "response",
        {"temperature": math.nan},
        "temperature must be a number above 0 (got nan)",
    ),
    (TERMS, "rkd", {"angle": -1}, "angle"),
    (TERMS, "rekd", {"middle": 0}, "middle"),
]


@pytest.mark.parametrize(("kind", "name", "options", "words"), PLUG_INS)
def test_an_option_of_a_plug_in(kind, name, options, words):
    with pytest.raises(ValueError, match=f'^{kind.kind} "{name}"') as error:
        kind.make(name, *[None] * (kind is SOURCES), **options)
    sentence(error, words)
    raw = yaml.safe_load(SMALL)
    if kind is SOURCES:
        place = "datasets.more"
        raw["datasets"]["more"] = raw["datasets"]["bbbc039"] | {"source": name, "options": options}
    elif kind is NETWORKS:
        place = "teachers.more"
        raw["teachers"]["more"] = {"model": name, "options": options}
    else:
        place = "methods.more"
        raw["methods"]["more"] = [{"term": name, "weight": 1, "options": options}]
    with pytest.raises(ConfigError) as error:
        Config.parse(raw)
    sentence(error, f"config: {place}: ", words)


def test_every_default_of_a_plug_in_is_in_its_range():
    for kind in (SOURCES, NETWORKS, TERMS):
        for name in kind.names():
            kind.check(
                name,
                {key: value for key, value in kind.parameters(name).items() if value is not None},
            )
            unchecked = [option for option, one in kind.kinds(name).items() if one is Any]
            assert not unchecked


def test_a_plug_in_that_lives_elsewhere_is_told_what_it_has_no_option_for():
    with pytest.raises(UnknownName, match=r"network.*unexpected keyword argument 'width'"):
        NETWORKS.make("gdlib.models.resunet:ResUNet", width=3)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (limits.Count, True, "x must be a whole number of at least 1 (got True)"),
        (limits.Count, "3", "x must be a whole number of at least 1 (got '3')"),
        (limits.FromTo, [3, 2], "x must be the smaller number, then the larger one (got [3, 2])"),
        (tuple[limits.Count, ...], [4, 0], "x.1 must be a whole number of at least 1 (got 0)"),
        (limits.PerSplit, {"train": 1, "val": 2}, "x must have test"),
        (limits.PerSplit, {"train": 1, "val": 0, "test": 1}, "x.val must be"),
    ],
)
def test_kinds(kind, value, words):
    with pytest.raises(ValueError, match="must") as error:
        limits.checked("x", kind, value)
    sentence(error, words)
