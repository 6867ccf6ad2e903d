"""One job per GPU, and the profiles: what they say fits the rules, and no GPU waits for cores."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gdlib import devices

ROOT = Path(__file__).parents[1]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
DEFAULT, SLURM = (
    yaml.safe_load((ROOT / "profiles" / name / "config.yaml").read_text())
    for name in ("default", "slurm")
)
RULES = "\n".join(path.read_text() for path in sorted((ROOT / "workflow").rglob("*.smk")))
HOLD = """
import sys, time
from pathlib import Path
from gdlib import devices
devices.LOOK_EVERY = 0.05
print(devices.take(sys.argv[2:], Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Return `start(*names, **environment)`: a process that takes one of these devices and keeps
    it."""
    processes = []

    def start(*names, **environment):
        command = [sys.executable, "-c", HOLD, str(tmp_path), *names]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            bufsize=1,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_no_two_jobs_take_one_gpu(holder, tmp_path):
    first = holder("0", "1")
    assert first.stdout.readline() == "0\n"
    assert holder("0", "1").stdout.readline() == "1\n"
    third = holder("0", "1")
    assert third.stderr.readline().startswith("waiting for a GPU")
    assert devices.take(["1"], tmp_path, wait=False) == 0  # somebody's choice, shared
    first.kill()  # even then its GPU is given back
    assert third.stdout.readline() == "0\n"


def test_the_gpus_of_slurm_jobs_are_their_own(holder):
    """Where every job sees its GPUs as 0, 1, ... equal numbers are different GPUs."""
    assert {holder("0", SLURM_JOB_ID=job).stdout.readline() for job in ("7", "8")} == {"0\n"}
    assert holder("0", SLURM_JOB_ID="8").stderr.readline().startswith("waiting for a GPU")


@pytest.mark.parametrize(
    ("given", "count", "left"),
    [(None, 0, None), (None, 2, "0"), ("3", 1, "3"), ("1,GPU-ab/2", 2, "1"), ("", 0, "")],
)
def test_a_command_sees_the_gpu_it_took(given, count, left, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path),))  # of a GPU, so that torch is asked
    monkeypatch.setattr(devices.take, "__defaults__", (tmp_path,))
    monkeypatch.setattr(devices, "_held", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    devices.claim()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left
    assert len(devices._held) == bool(count)


def test_without_a_driver_torch_is_not_asked_for_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path / "nothing"),))
    monkeypatch.setattr("torch.cuda.device_count", lambda: pytest.fail("asked"))
    monkeypatch.setattr(devices.sys, "platform", "linux")
    assert devices.has_only_cpu()
    devices.claim()
    monkeypatch.setattr(devices, "DRIVERS", (str(tmp_path / "nothing"), str(tmp_path)))
    assert not devices.has_only_cpu()
    monkeypatch.setattr(devices, "DRIVERS", ())
    monkeypatch.setattr(devices.sys, "platform", "darwin")  # where there is Metal
    assert not devices.has_only_cpu()


def test_cores_are_counted_on_any_system(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4}, raising=False)
    for number, siblings in enumerate(("0-1", "0-1")):
        (tmp_path / f"cpu{number}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}/topology/thread_siblings_list").write_text(siblings)
    assert (devices.cores(), devices.cores(whole=True)) == (3, 2)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (devices.cores(), devices.cores(whole=True)) == (6, 6)


@pytest.mark.parametrize(
    ("program", "given", "there"),
    [(False, None, False), (True, None, True), (True, "0", True), (True, "", False)],
)
def test_a_gpu_for_jobs_is_one_that_is_not_hidden(program, given, there, monkeypatch):
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if program else None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.has_nvidia() is there


def resources(rule):
    """Return what a rule says of itself from its name to its command."""
    return re.search(
        rf"^ *(?:use rule \w+ as|rule) {rule}\b(.*?)(?=^(?:use )?rule |\Z)", RULES, re.M | re.S
    )[1]


def test_the_slurm_profile_gives_a_gpu_to_every_job_that_can_use_one():
    named = re.findall(r"^ *(?:use rule \w+ as|rule) (\w+)", RULES, re.M)
    asking = {rule for rule in named if "gpu=GPU" in resources(rule)}
    # A rule that is another but for what it says has the other's resources, not its entry here.
    others = re.findall(r"^ *use rule (\w+) as (\w+)", RULES, re.M)
    asking |= {rule for other, rule in others if other in asking}
    assert asking == set(SLURM["set-resources"])
    assert {asked["gpu"] for asked in SLURM["set-resources"].values()} == {1}
    assert set(SLURM["set-threads"]) | set(SLURM["groups"]) <= set(named)
    assert max(SLURM["set-threads"].values()) <= SLURM["cores"]


def test_the_slurm_profile_repeats_what_is_true_everywhere():
    assert {key: SLURM.get(key) for key in DEFAULT if key != "resources"} == {
        key: value for key, value in DEFAULT.items() if key != "resources"
    }


def test_jobs_are_tried_again_by_the_profile_alone():
    """`retries` of a rule would repeat a job inside its allocation, with the old limits.

    Arrays delete results.
    """
    assert SLURM["retries"] > 0
    assert not re.search(r"^\s+retries:", RULES, re.M)
    assert not any("array" in key for key in SLURM)


@pytest.mark.skipif(
    importlib.util.find_spec("snakemake_executor_plugin_slurm") is None, reason='no extra "slurm"'
)
def test_a_study_can_be_planned_for_slurm(tmp_path):
    command = [
        SNAKEMAKE,
        "--profile",
        "profiles/slurm",
        "--directory",
        tmp_path,
        "--dry-run",
        "--config",
        "study=smoke",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_gpu_waits_for_one_core_only(tmp_path):
    """Were its jobs to ask for several, a queue of jobs with one core each would keep it idle."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = [
        SNAKEMAKE,
        "--directory",
        tmp_path,
        "--cores",
        "8",
        "--dry-run",
        "-p",
        "--config",
        "study=smoke",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    threads = re.findall(r"gdlib step (\w+) .*?--threads (\d+)", done.stdout + done.stderr)
    asked = {(step, number) for step, number in threads if step in ("train", "ask", "predict")}
    assert asked == {("train", "1"), ("ask", "1"), ("predict", "1")}
    for rule in ("train_teacher", "ask_teacher", "predict"):
        assert "priority: 1" in resources(rule)
