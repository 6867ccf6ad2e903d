"""Files as people write them: encodings, YAML that would lose something, places, names."""

import codecs
import os
import shutil
from pathlib import Path

import pytest
import yaml
from test_config import SMALL
from test_workflow import snakemake

from gdlib import text
from gdlib.cli.main import main
from gdlib.config import Config, ConfigError
from gdlib.text import expanded, read_text, read_yaml

ROOT = Path(__file__).resolve().parents[1]
README = (
    "datasets:\n  mycells: {source: folder, folder: mycells, offsets: nuclei, patch: [128, 128]}\n"
)


@pytest.mark.parametrize("loader", [text.LOADER, yaml.SafeLoader])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: {b: 1, c: 2}\nd: 3\na: 4\n", ['the key "a" is written in line 1 and again in line 3']),
        ("a:\n  b: 1\n  c: {x: 1, y: 2, x: 3}\n", ['the key "a.c.x" is written twice in line 3']),
        (
            "a:\n- {b: 1}\n- {b: 1,\n   b: 1}\n",
            ['the key "a.1.b" is written in line 3 and again in line 4'],
        ),
        (
            "a: &x {b: 1}\nc:\n  <<: *x\n  <<: *x\n",
            ['the key "c.<<" is written in line 3 and again in line 4'],
        ),
        ('{"a": 1,\n "a": 2}\n', ['the key "a" is written in line 1 and again in line 2']),
        (
            "a: *nuclei_offsets\n",
            ["line 1", '"*nuclei_offsets"', '"&nuclei_offsets"', "other files", "offsets"],
        ),
        ("a:\n\tb: 1\n", ["line 2", "a tab"]),
        ("a: b: c\n", ["line 1", "not YAML"]),
        ("a: 1\n---\nb: 2\n", ["line 2", "another document"]),
        ("a: !!python/object/apply:os.system [echo]\n", ["line 1", "not YAML"]),
        ("a: \x01\n", ["not YAML", "special characters"]),
        ("a: 2024-13-01\n", ["month must be in 1..12"]),
    ],
)
def test_yaml_that_nobody_means_is_one_sentence_with_its_line(
    content, words, loader, tmp_path, monkeypatch
):
    monkeypatch.setattr(text, "LOADER", loader)
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"own\.yaml") as error:
        read_yaml(tmp_path / "own.yaml")
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("loader", [text.LOADER, yaml.SafeLoader])
def test_yaml_that_is_fine_is_what_other_programs_read(loader, monkeypatch, tmp_path):
    monkeypatch.setattr(text, "LOADER", loader)
    content = (ROOT / "config.yaml").read_text()
    assert read_yaml(ROOT / "config.yaml") == yaml.safe_load(content)
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_files_are_merged_as_snakemake_does(tmp_path):
    from snakemake.utils import update_config

    first, second = (
        {"a": {"b": 1, "c": {"d": 2}}, "e": [1, 2]},
        {"a": {"c": {"f": 3}, "b": {"g": 1}}, "e": [3], "h": None},
    )
    for name, content in (("1", first), ("2", second)):
        (tmp_path / name).write_text(yaml.safe_dump(content))
    found = read_yaml(tmp_path / "1", tmp_path / "2")
    update_config(first, second)
    assert found == first


TEXT = "Zähler\nβ\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
)
def test_text_with_a_mark_is_read(content, tmp_path):
    (tmp_path / "list.txt").write_bytes(content)
    assert read_text(tmp_path / "list.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nZähler\n".encode("latin-1"), ["line 2", "UTF-8"]),
        ("abc\n".encode("utf-16-le"), ["code 0", "UTF-8"]),
        (TEXT.encode("utf-16")[:-1], ["UTF-16"]),
    ],
)
def test_text_of_other_encodings_is_one_sentence(content, words, tmp_path):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"list\.txt") as error:
        read_text(tmp_path / "list.txt")
    assert [word for word in words if word not in str(error.value)] == []


def test_places_of_files(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("CELLS", "cells")
    assert [
        expanded(path) for path in ("~/a", "$HOME/a", "${CELLS}/b", "a~b", "price$", "/c d")
    ] == [*("/somewhere/a", "/somewhere/a", "cells/b", "a~b", "price$", "/c d")]
    raw = yaml.safe_load(SMALL)
    raw["raw_folders"] = ["~/raw", "$HOME/more"]
    raw["datasets"]["bbbc039"]["folder"] = "$CELLS"
    raw["teachers"]["resunet_w16"]["weights"] = "~/w.safetensors"
    config = Config.parse(raw)
    assert config.raw_folders == ("/somewhere/raw", "/somewhere/more")
    assert config.new_folder("bbbc039") == Path("/somewhere/raw/cells")
    assert config.teachers["resunet_w16"].weights == "/somewhere/w.safetensors"
    raw["datasets"]["bbbc039"]["folder"] = "${MISSING}/x"
    with pytest.raises(
        ConfigError,
        match=r"datasets\.bbbc039\.folder: .*there is no environment variable " r"\$\{MISSING\}",
    ):
        Config.parse(raw)


def test_offsets_have_names(tmp_path):
    raw = yaml.safe_load(SMALL)
    raw["offsets"] = {"near": [[-1, 0], [0, -1]]}
    raw["datasets"]["bbbc039"]["offsets"] = "near"
    assert Config.parse(raw).datasets["bbbc039"].offsets == ((-1, 0), (0, -1))
    raw["datasets"]["bbbc039"]["offsets"] = "neat"
    with pytest.raises(
        ConfigError,
        match=r'datasets\.bbbc039\.offsets: there is no "neat": did ' r'you mean "near"',
    ):
        Config.parse(raw)
    raw["datasets"]["bbbc039"]["offsets"] = "near"
    raw["offsets"]["near"] += [[0, 0]]
    with pytest.raises(ConfigError, match=r"offsets\.near: .*\[0, 0\]"):
        Config.parse(raw)


def test_a_configuration_is_looked_at(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = tmp_path / "own.yaml"
    study = "{datasets: [mycells], teacher: resunet_w8, students: [], methods: [none], seeds: [0]}"
    study = f"study: mine\nstudies:\n  mine: {study}\n"
    own.write_text(README + study)
    assert main(["check", str(own)]) == 0
    assert capsys.readouterr().out == "nothing is wrong; study mine: 1 trainings on mycells\n"
    own.write_text(README + study.removeprefix("study: mine\n"))  # which does not say what is run
    assert main(["check", str(own)]) == 0
    assert capsys.readouterr().out == "nothing is wrong; study mine: 1 trainings on mycells\n"
    own.write_text(README)
    assert main(["check", str(own)]) == 0
    assert "nothing is wrong; study quick: " in capsys.readouterr().out
    for content, words in (
        (
            README.replace("nuclei", "*nuclei_offsets") + study,
            'own.yaml, line 2: "*nuclei_offsets" stands for',
        ),
        (
            README + study + README,
            'own.yaml: the key "datasets" is written in line 1 and again in line 6',
        ),
        (
            README.replace("nuclei", "nuclej") + study,
            'there is no "nuclej": did you mean "nuclei"?',
        ),
        ((README + study).replace("[0]", "[0, 0]"), "studies.mine.seeds: "),
    ):
        own.write_text(content)
        assert main(["check", str(own)]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("where", ["catalogue", "own file"])
def test_a_key_written_twice_stops_snakemake(where, tmp_path):
    """What the README says to write, pasted at the end of a file of the catalogue, would take the
    place of all that is there."""
    for part in ("Snakefile", "config.yaml", "gdlib", "workflow"):
        os.symlink(ROOT / part, tmp_path / part)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    catalogue = (ROOT / "config" / "datasets.yaml").read_text()
    (tmp_path / "config" / "datasets.yaml").write_text(catalogue + README * (where == "catalogue"))
    (tmp_path / "own.yaml").write_text(README + README)
    result = snakemake(
        tmp_path,
        tmp_path / "work",
        "--dry-run",
        *["--configfile", tmp_path / "own.yaml"] * (where == "own file"),
    )
    assert result.returncode == 1
    last = catalogue.count("\n") + 1 if where == "catalogue" else 3
    name = "datasets.yaml" if where == "catalogue" else "own.yaml"
    line = next(
        line for line in (result.stdout + result.stderr).splitlines() if "is written" in line
    )
    assert f'{name}: the key "datasets" is written in line ' in line
    assert f"again in line {last};" in line
