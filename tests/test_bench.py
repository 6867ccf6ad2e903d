"""`python -m benchmarks` at its smallest: every plain implementation agrees with ours.

The JSON file and the page say what was found.
"""

import json
import math
import sys

import numpy as np
import pytest

from benchmarks import bench
from benchmarks.bench import GROUPS, Bench, command, measure, merged, slope, with_peak

KEYS = {
    "group",
    "name",
    "reference_ms",
    "ms",
    "ratio",
    "peak_mib",
    "ms_spread",
    "difference",
    "about",
}
# Cases in which a plain implementation must give the same; of the others one part is missing, or
# only time is compared.
AGREE = {
    "losses": {f"{part}, {axes}": 1e-3 for part in (
        "affinities (supervised and AGD)", "AGD between images", "IGD within images", "IGD between images", "all terms"
    ) for axes in ("2D", "3D")},
    "targets": {f"{part}, {axes}": 1e-5 for part in (
        "affinity targets", "targets, masks and class weights") for axes in ("2D", "3D")},
    "data": {"a batch of patches, 2D": 1e-3},
    "inference": {f"{role}, {axes}": 0.02 for axes in ("2D", "3D") for role in (
        "student", "student for processors", "teacher")},
    "segmentation": {f"mutex watershed, {what}": 0.01 for what in ("many images", "one image", "one volume")},
    "metrics": {f"all metrics, {what}": 1e-6 for what in (
        "a volume of neurons", "an image of nuclei", "an image of nuclei, loops")},
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    """What all groups but `workflow`, which starts twenty processes, find at the tiny size."""
    return measure([group for group in GROUPS if group != "workflow"], "tiny", "cpu")


@pytest.mark.long
def test_every_result_keeps_the_contract(found):
    assert {result["group"] for result in found["results"]} == set(GROUPS) - {"workflow"}
    names = [(result["group"], result["name"]) for result in found["results"]]
    assert len(set(names)) == len(names)
    for result in found["results"]:
        assert set(result) >= KEYS
        low, high = result["ms_spread"]
        assert 0 < low <= result["ms"] <= high
        if result["reference_ms"] is None:
            assert result["ratio"] is None
        else:
            assert result["ratio"] == pytest.approx(result["reference_ms"] / result["ms"])
        assert result["peak_mib"] is None or result["peak_mib"] >= 0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("group", AGREE)
@pytest.mark.long
def test_the_plain_implementation_gives_the_same(found, group):
    compared = {
        r["name"]: r["difference"]
        for r in found["results"]
        if r["group"] == group and r["difference"] is not None
    }
    assert set(compared) == set(AGREE[group])
    for name, tolerance in AGREE[group].items():
        assert compared[name] <= tolerance, name


@pytest.mark.long
def test_the_ratio_of_all_terms_is_that_of_its_case(found):
    for key, axes in (("ratio_all_terms", "2D"), ("ratio_all_terms_3d", "3D")):
        (case,) = (r for r in found["results"] if r["name"] == f"all terms, {axes}")
        assert found[key] == case["ratio"] == case["ratio_all_terms"]


@pytest.mark.long
def test_it_says_where_it_was_measured(found):
    assert found["device"] == "cpu"
    assert found["size"] == "tiny"
    assert {"torch", "numpy", "scikit-image"} <= set(found["libraries"])
    assert found["threads"] >= 1
    assert found["cpu"]


@pytest.mark.long
def test_targets_say_whether_they_are_met(found):
    texts = [target["text"] for target in found["targets"]]
    for part in (
        "all terms against the plain",
        "affinity targets",
        "a step of training",
        "time of the student",
        "metrics",
    ):
        assert any(part in text for text in texts), part
    for target in found["targets"]:
        over = target["value"] >= target["limit"]
        assert target["met"] == (over if target["at_least"] else target["value"] <= target["limit"])


@pytest.mark.long
def test_growth_has_an_exponent(found):
    grown = [result for result in found["results"] if "slope" in result]
    assert {"image area", "instances", "images in memory", "batch", "volume"} == {
        result["axis"] for result in grown
    }
    for result in grown:
        amounts = [math.prod(size) for size in result["sizes"]]
        assert result["slope"] == pytest.approx(
            np.polyfit(np.log(amounts), np.log(result["ms_by_size"]), 1)[0]
        )


@pytest.mark.long
def test_the_page_tells_it_all(found, tmp_path, capsys):
    """From the file alone, by the command, and again with the same bytes."""
    source = tmp_path / "performance.json"
    source.write_text(json.dumps({"machines": [found]}))
    arguments = [
        "page",
        "--json",
        str(source),
        "--markdown",
        str(tmp_path / "performance.md"),
    ]
    assert command(arguments) == 0
    page = (tmp_path / "performance.md").read_text()
    for result in found["results"]:
        assert f"| {result['name']} |" in page
    for target in found["targets"]:
        assert f"| {target['text']} |" in page
    assert page.count("not met") == sum(not target["met"] for target in found["targets"])
    assert "](figures/performance.png)" in page
    picture = (tmp_path / "figures" / "performance.png").read_bytes()
    assert command(arguments) == 0
    assert (tmp_path / "performance.md").read_text() == page
    assert (tmp_path / "figures" / "performance.png").read_bytes() == picture


def test_one_group_by_the_command(tmp_path, capsys):
    path = tmp_path / "targets.json"
    assert command(["targets", "--size", "tiny", "--json", str(path)]) == 0
    (machine,) = json.loads(path.read_text())["machines"]
    assert (
        {result["group"] for result in machine["results"]} == set(machine["loads"]) == {"targets"}
    )


def test_networks_run_in_the_precision_that_was_asked_for():
    for precision in ("float32", "bfloat16"):
        found = measure(["train"], "tiny", "cpu", precision)
        assert found["precision"] == precision
        assert {result["precision"] for result in found["results"] if "precision" in result} == {
            precision
        }


def machine(name="A CPU", value=1.0, groups=("losses", "metrics"), **about):
    """What one machine says of some groups, one case and one target each."""
    at_work = Bench("tiny", precision=about.pop("precision", "float32"))
    for at_work.group in groups:
        at_work.add(f"case of {at_work.group}", [value, value, 2 * value], [10 * value])
        at_work.target(
            f"target of {at_work.group}", value, 5.0, floor="a floor" if value > 5 else None
        )
    at_work.extra["loads"] = dict.fromkeys(groups, value)
    return at_work.summary() | {"device_name": name, "cpu": name, "threads": 2} | about


def test_the_file_keeps_what_other_machines_measured():
    first, other = machine(), machine("B CPU", 7.0)
    machines = merged(merged([], first), other)
    assert machines == [first, other]
    assert merged(machines, first) == machines
    again = machine(value=3.0, groups=("metrics",))
    mine, theirs = merged(machines, again)
    assert theirs == other
    assert [(r["group"], r["ms"]) for r in mine["results"]] == [
        ("losses", 1.0),
        ("metrics", 3.0),
    ], "in the order of groups"
    assert [(t["group"], t["value"]) for t in mine["targets"]] == [
        ("losses", 1.0),
        ("metrics", 3.0),
    ]
    assert mine["loads"] == {"losses": 1.0, "metrics": 3.0}
    for change in ({"precision": "bfloat16"}, {"threads": 1}, {"cpu": "C"}, {"device": "cuda"}):
        assert len(merged(machines, machine() | change)) == 3, "not the same"


def test_the_page_has_columns_for_every_machine(tmp_path):
    several = [
        machine("Fast(R) CPU @ 3 GHz", 1.0, bfloat16_units=["AMX"]),
        machine("Slow Processor", 7.0, groups=("metrics",)),
        machine(
            "Slow Processor", 6.0, ("losses",), threads=4, loads={"losses": None}, bfloat16_units=[]
        ),
    ]
    names = ["Fast, float32", "Slow, float32, 2 threads", "Slow, float32, 4 threads"]
    bench.load("page").write(several, tmp_path / "performance.md")
    page = (tmp_path / "performance.md").read_text()
    assert "| Fast, float32 | Fast(R) CPU @ 3 GHz | AMX | float32 | 2 | 1.0 | gdlib" in page
    assert "| Slow, float32, 4 threads | Slow Processor | none | float32 | 4 | not known |" in page
    columns = [f"{name}: {what}" for name in names for what in ("ms", "reference, ms", "ratio")]
    assert f"| case | {' | '.join(columns)} | MiB | reference, MiB |" in page
    quick, slow, slower = (
        "1 [1, 1.5] | 10 [10, 10] | 10",
        "7 [7, 10.5] | 70 [70, 70] | 10",
        "6 [6, 9] | 60 [60, 60] | 10",
    )
    absent = "not measured yet |  | "
    assert f"| case of losses | {quick} | {absent} | {slower} |  |  |" in page
    assert f"| case of metrics | {quick} | {slow} | {absent} |  |  |" in page
    assert "| target of losses | ≤ 5 | 1 | not measured yet | **6, not met** |" in page
    assert (
        "2 of 2 are met by Fast, float32; 0 of 1 are met by Slow, float32, 2 threads; 0 of 1"
        in page
    )
    assert "* target of losses, on Slow, float32, 4 threads: a floor." in page


def test_the_page_of_the_documentation_is_that_of_its_file(tmp_path):
    docs = bench.FOLDER.parent / "docs"
    bench.load("page").write(bench.read(docs / "performance.json"), tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == (docs / "performance.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is there already"),
        ('{"results": []}', "is there already"),
        (None, "of size small"),
    ],
)
def test_nothing_is_measured_for_a_file_that_cannot_take_it(
    content, message, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "results.json"
    content = content or json.dumps({"machines": [machine(size="small")]})
    path.write_text(content)
    capsys.readouterr()
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it was measured"))
    assert command(["targets", "--size", "tiny", "--json", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"gdlib: error: {path}")
    assert error.count("\n") == 1
    assert message in error
    assert path.read_text() == content


def test_every_step_of_the_workflow_is_started():
    workflow = bench.load("workflow")
    modules = workflow.imports()
    steps = {
        "download",
        "prepare",
        "ask",
        "train",
        "predict",
        "segment",
        "evaluate",
        "baselines",
    }
    assert steps <= set(modules)
    assert "gdlib.train.loop" in modules["train"]
    assert "gdlib.evaluate.scores" in modules["evaluate"]
    assert workflow.start("print('torch' in __import__('sys').modules)")() == "False\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "no results"), ("{", "not a JSON file"), (None, "the file is missing")],
)
def test_a_file_that_is_none(tmp_path, capsys, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert command(["page", "--json", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gdlib: error:")
    assert error.count("\n") == 1
    assert message in error
    assert str(path) in error


def test_results_that_differ_are_not_timed():
    at_work = Bench("tiny")
    with pytest.raises(ValueError, match="differ by 1"):
        at_work.compare(
            "wrong", lambda: 2, lambda: 3, differ=lambda a, b: abs(a - b), tolerance=0.5
        )
    with pytest.raises(ValueError, match="differ by nan"):
        at_work.compare("wrong", lambda: 2, lambda: 3, differ=lambda a, b: math.nan, tolerance=0.5)
    assert not at_work.results


def test_both_calls_take_turns_after_a_first_that_does_not_count():
    at_work, order = Bench("small"), []
    result = at_work.compare(
        "turns",
        lambda: order.append("ours"),
        lambda: order.append("plain"),
        prepare=lambda: order.append("prepare"),
    )
    assert order == ["prepare", "ours", "prepare", "plain"] * (result["rounds"] + 1)
    assert result["rounds"] >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_peak_memory_is_that_of_the_call():
    device = Bench("tiny").device
    held = np.ones(64 * 2**20, np.uint8)
    for size in (32, 128):
        output, peak = with_peak(lambda size=size: np.ones(size * 2**20, np.uint8).sum(), device)
        assert output == size * 2**20
        assert size * 0.9 < peak < size * 1.5
    assert held.sum() == 64 * 2**20


def test_exponents():
    assert slope([1, 2, 4, 8], [5, 10, 20, 40]) == pytest.approx(1)
    assert slope([1, 2, 4], [3, 3, 3]) == pytest.approx(0)
