"""A study through a real SLURM, and what happens to studies on clusters.

In the end the files are those of a local run.

`make test-slurm` runs this, plain pytest does not. SLURM_LOCAL names a program that gives a cluster
for the time of the tests (`up`, `env`, `restart-ctld`, `down --purge`); without it, the cluster of
this machine is used as profiles/slurm describes it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
PARTS = ("Snakefile", "config", "config.yaml", "envs", "gdlib", "profiles", "workflow")
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
DATA, TEACHER, STUDENT = "nuclei_phantom_small", "resunet_w8", "resunet_tiny"
RUN = f"results/slurm/runs/{DATA}/{TEACHER}/teacher/seed0"
STATE = f"results/slurm/state/{DATA}/{TEACHER}/teacher/seed0/resume.pt"
STUDY = {
    "title": "Through SLURM",
    "datasets": [DATA],
    "teacher": TEACHER,
    "students": [STUDENT],
    "methods": ["none", "grd"],
    "seeds": [0],
    "teacher_recipe": {
        "steps": 200,
        "batch_size": 4,
        "patch": [64, 64],
        "validate_every": 100,
        "save_every": 10,
    },
    "student_recipe": {
        "steps": 20,
        "batch_size": 4,
        "patch": [64, 64],
        "validate_every": 10,
        "save_every": 10,
    },
}
NETWORK_RULES = ("train_teacher", "train_student", "ask_teacher", "predict", "profile")
# Sums of floats depend on the number of threads, and a SLURM job may get another one than a local
# job.
THREADS = ["--set-threads", *(f"{rule}=1" for rule in NETWORK_RULES)]
MINUTES = 60.0
PATIENCE = 20 * MINUTES  # a run that takes longer hangs


def output_of(*command, **options):
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=True, **options
    ).stdout


@pytest.fixture(scope="session")
def cluster():
    """Environment in which `sbatch` works."""
    program = os.environ.get("SLURM_LOCAL")
    if not program:
        if (
            shutil.which("sinfo") is None
            or subprocess.run(["sinfo"], capture_output=True).returncode
        ):
            pytest.skip("there is no SLURM here, and SLURM_LOCAL names no program that starts one")
        yield dict(os.environ)
        return
    # pytest's own folders are closed to other users, which munge does not like.
    folder = tempfile.mkdtemp(prefix="gdlib-slurm-")
    os.chmod(folder, 0o755)
    port = 20000 + os.getpid() % 10000 * 3
    own = {"SLURM_LOCAL_DIR": f"{folder}/slurm", "SLURM_LOCAL_PORT": str(port)}
    own |= {"SLURM_LOCAL_CPUS": "8", "SLURM_LOCAL_MEM_MB": "64000"}  # what it pretends to have
    environment = os.environ | own
    subprocess.run([program, "up"], env=environment, check=True)
    try:
        exports = output_of("bash", "-c", f'eval "$("{program}" env)"; env -0', env=environment)
        yield dict(line.split("=", 1) for line in exports.split("\0") if line)
    finally:
        subprocess.run([program, "down", "--purge"], env=environment, check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A copy, because jobs read the workflow while somebody may edit it.

    With the study above in its catalogue.
    """
    folder = tmp_path_factory.mktemp("repository")
    unneeded = lambda path, names: [n for n in names if Path(path) == ROOT and n not in PARTS]
    shutil.copytree(ROOT, folder, ignore=unneeded, dirs_exist_ok=True)
    catalogue = yaml.safe_load((folder / "config.yaml").read_text())
    catalogue["studies"]["slurm"] = STUDY
    (folder / "config.yaml").write_text(yaml.safe_dump(catalogue, sort_keys=False))
    return folder


@pytest.fixture(scope="session")
def local(repository, tmp_path_factory):
    """Folder of the study, made on this machine without a cluster."""
    folder = tmp_path_factory.mktemp("local")
    command = [
        SNAKEMAKE,
        "--directory",
        folder,
        "--cores",
        "all",
        *THREADS,
        "--config",
        "study=slurm",
    ]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Study:
    """The study in a folder of its own, through SLURM."""

    def __init__(self, folder, repository, environment, local):
        self.folder, self.repository, self.environment = folder, repository, environment
        self.processes = []
        # what is not to be made here is there
        for name in ("data", "logs/prepare", ".snakemake/metadata"):
            shutil.copytree(local / name, folder / name)
        self.profile = yaml.safe_load(
            (repository / "profiles" / "slurm" / "config.yaml").read_text()
        )
        self.profile |= {"slurm-init-seconds-before-status-checks": 5, "latency-wait": 20}
        if subprocess.run(["sacct"], env=environment, capture_output=True).returncode:
            self.profile["slurm-status-command"] = "squeue"

    def ask(self, rule, **resources):
        """Change what the jobs of a rule ask for."""
        rules = self.profile["set-resources"]
        rules[rule] = rules.get(rule, {}) | resources

    def start(self, *arguments):
        """Start Snakemake; return the process, whose output goes on in the file `output` of its own
        number."""
        own = self.folder / "profile"
        own.mkdir(exist_ok=True)
        (own / "config.yaml").write_text(yaml.safe_dump(self.profile))
        command = [
            SNAKEMAKE,
            "--workflow-profile",
            own,
            "--directory",
            self.folder,
            *THREADS,
            "--config",
            "study=slurm",
            "--",
        ]
        out = self.folder / f"{len(self.processes)}.out"
        with open(out, "w") as file:
            process = subprocess.Popen(
                [*command[:-1], *arguments] if "--unlock" in arguments else [*command, *arguments],
                cwd=self.repository, env=self.environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        process.output = out
        self.processes.append(process)
        return process

    def finish(self, process, code=0):
        """Wait for Snakemake; return what it said."""
        end = time.monotonic() + PATIENCE
        while process.poll() is None:
            assert time.monotonic() < end, f"it hangs\n{self._seen(process)}"
            try:
                process.wait(MINUTES)
            except subprocess.TimeoutExpired:
                self._look_after()
        said = process.output.read_text()
        assert process.returncode == code, said
        return said

    def _look_after(self):
        """Do what an administrator does when nothing runs while jobs wait: a controller that was
        restarted as jobs began may have miscounted the GPUs, or may hold a job whose start failed.
        """
        states = [state for _, state in self.jobs("state")]
        if "SLURM_LOCAL" not in os.environ or "RUNNING" in states or "PENDING" not in states:
            return
        print(f"nothing runs, jobs wait: the controller is told to look again\n{self._cluster()}")
        subprocess.run(["scontrol", "reconfigure"], env=self.environment, check=False)
        for _, number, reason in self.jobs("jobid", "reason"):
            if "Held" in reason:
                subprocess.run(["scontrol", "release", number], env=self.environment, check=False)

    def _seen(self, process):
        return f"{process.output.read_text()}\n{self._cluster()}"

    def _cluster(self):
        """What SLURM says of jobs and nodes, for the one who reads why a test failed."""
        jobs = self.jobs("jobid", "state", "reason", "tres-per-job")
        node = output_of("scontrol", "show", "node", "-d", env=self.environment)
        return "\n".join([*(" ".join(job) for job in jobs), node])

    def jobs(self, *fields):
        """One line for every SLURM job of this study: name of the rule with its wildcards, then
        these fields of squeue."""
        names = set(
            re.findall(
                r"SLURM run ID: (\S+)", "".join(p.output.read_text() for p in self.processes)
            )
        )
        if not names:
            return []
        form = ",".join(f"{field}:200|" for field in ("comment", *fields))
        command = [
            "squeue",
            "--noheader",
            "--states=all",
            "--sort=i",
            "--name",
            ",".join(names),
            "-O",
            form,
        ]
        lines = output_of(*command, env=self.environment).splitlines()
        return [[part.strip() for part in line.split("|")[:-1]] for line in lines]

    def clear(self):
        """End what is left of a failed test."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
        for _, number in self.jobs("jobid"):
            subprocess.run(["scancel", number], env=self.environment, check=False)


@pytest.fixture
def study(tmp_path, repository, cluster, local):
    study = Study(tmp_path, repository, cluster, local)
    yield study
    study.clear()


def wait_for(what, condition, process):
    """Return the first true value of a condition, while Snakemake runs."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert process.poll() is None, (
            f"{what}: Snakemake ended before\n{process.output.read_text()}"
        )
        assert time.monotonic() < end, f"{what}: not in time\n{process.output.read_text()}"
        time.sleep(0.1)
    return found


def assert_equal(folder, local, pattern):
    """Metrics are equal as files, weights as tensors."""
    files = sorted(path.relative_to(local) for path in local.glob(f"results/slurm/runs/{pattern}"))
    assert files
    for file in files:
        if file.suffix == ".safetensors":
            mine, theirs = load_file(folder / file), load_file(local / file)
            assert mine.keys() == theirs.keys()
            assert all((mine[name] == theirs[name]).all() for name in mine), file
        else:
            assert (folder / file).read_bytes() == (local / file).read_bytes(), file


def test_a_study_survives_the_controller_a_second_start_and_too_little_memory(study, local):
    shutil.rmtree(study.folder / "data")  # everything through SLURM
    study.ask("train_teacher", mem_mb="300 * attempt**2")  # two Snakemakes and torch take more
    first = study.start()
    wait_for("a job runs", lambda: "RUNNING" in str(study.jobs("state")), first)
    refused = study.finish(study.start(), code=1)
    assert "Directory cannot be locked" in refused
    assert "--unlock" in refused

    def at_once():
        queued = str(
            [rule for rule, state in study.jobs("state") if state in ("PENDING", "RUNNING")]
        )
        return "train_teacher" in queued and "train_student" in queued

    wait_for("two jobs with GPUs", at_once, first)
    if "SLURM_LOCAL" in os.environ:
        subprocess.run(
            [os.environ["SLURM_LOCAL"], "restart-ctld"], env=study.environment, check=True
        )
        # A controller that comes back while jobs begin may count its node's GPUs wrongly until it
        # is told to look again.
        subprocess.run(["scontrol", "reconfigure"], env=study.environment, check=True)
    study.finish(first)

    for pattern in ("**/metrics.csv", "**/*.safetensors"):
        assert_equal(study.folder, local, pattern)
    jobs = study.jobs("state", "partition", "tres-per-job", "minmemory")
    names = {job[0] for job in jobs}
    # what `squeue -O comment` says
    assert f"rule_train_student_wildcards_{DATA}_{STUDENT}_grd_0" in names
    asked = [job[-1] for job in jobs if "train_teacher" in job[0]]
    assert asked[0] == "300M"
    assert 1 < len(asked) == len(set(asked))
    for rule, _, partition, devices, _ in jobs:
        runs_network = any(name in rule for name in NETWORK_RULES)
        assert ("gpu" in devices, partition == "gpu") == (runs_network, runs_network), (
            rule,
            partition,
            devices,
        )
    # An attempt may fail, the teacher's for want of memory, any while the controller is away; the
    # next one does not.
    assert {rule: job[0] for rule, *job in jobs} == dict.fromkeys(names, "COMPLETED")
    # three pairs of small jobs, at most four together
    assert len([job for job in jobs if "judge" in job[0]]) < 3


def test_a_job_killed_at_its_time_limit_goes_on_from_its_checkpoint(study, local):
    study.ask("train_teacher", runtime="attempt")
    snakemake = study.start(f"{RUN}/weights.safetensors")
    state = study.folder / STATE
    wait_for("a checkpoint", state.exists, snakemake)
    commands = [
        line
        for line in output_of("ps", "-eww", "-o", "args").splitlines()
        if f"--state {Path(STATE).parent}" in line
    ]
    # it would stop by itself, a little before
    assert any("--max-seconds 54" in command for command in commands)
    (number,) = [number for _, number in study.jobs("jobid")]
    # It does nothing any more until SLURM wakes it up to end it.
    subprocess.run(["scancel", "--signal=STOP", number], env=study.environment, check=True)
    study.finish(snakemake)
    states = [state for _, state in study.jobs("state")]
    assert states[0] == "TIMEOUT"
    assert states[1:].count("COMPLETED") == 1  # with more time; on a slow machine not at once
    log = (study.folder / f"logs/slurm/train/{DATA}/{TEACHER}/teacher/seed0.log").read_text()
    assert int(re.search(r"resumed after step (\d+)", log)[1]) >= 10
    assert_equal(study.folder, local, f"{DATA}/{TEACHER}/teacher/seed0/*.safetensors")


def test_snakemake_is_killed_and_started_again(study, local):
    target = f"{RUN}/weights.safetensors"
    killed = study.start(target)
    wait_for("a checkpoint", (study.folder / STATE).exists, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    # the job is still there, perhaps Snakemake too
    assert "--unlock" in study.finish(study.start(target), code=1)
    study.finish(study.start("--unlock"))
    study.finish(study.start(target))
    assert_equal(study.folder, local, f"{DATA}/{TEACHER}/teacher/seed0/*.safetensors")
    said = study.finish(study.start(target))
    assert "Nothing to be done" in said
