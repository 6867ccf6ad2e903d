"""Where files live, what rules pass on, and what jobs may use. No rules here.

A rule passes exactly its own slice of the configuration to its job, as text that does not depend on the order of keys.
Snakemake re-runs a job when this text changes: an edit re-runs what depends on it and nothing else.
"""

import json
import os
import re
import shlex
import shutil
import sys

import yaml

from gdlib import registry
from gdlib.config import SEGMENTERS, TEACHER

RESULTS = f"results/{CFG.study}"
LOGS = f"logs/{CFG.study}"
BENCHMARKS = f"{RESULTS}/benchmarks"
DATA = "data/{dataset}"  # made once, shared by all studies
ID = "{dataset}/{network}/{method}/seed{seed}"  # of a run
RUN = f"{RESULTS}/runs/{ID}"
NAME = ID.replace("{", "{wildcards.")  # the same in messages
SEGMENTED = f"{RUN}/{{segmenter}}"  # a run's instances, by one way to find them
PATCHES = f"{RESULTS}/cache/{{dataset}}/seed{{seed}}.h5"
TAUGHT = f"{RESULTS}/cache/{{dataset}}/{{network}}/{{part}}/seed{{seed}}.h5"
PROFILE = f"{RESULTS}/profile/{{dataset}}/{{network}}.json"

STUDY = CFG.selected
PLOT = CFG.plot
VOLUMES = [dataset for dataset in STUDY.datasets if CFG.datasets[dataset].ndim == 3]
# Of the study on all its datasets, in the order of the configuration.
METHODS = list(dict.fromkeys(m for d in STUDY.datasets for m in CFG.methods_of(d)))
ABLATIONS = {
    name: {
        "title": CFG.ablations[name].title or name,
        "method": CFG.ablations[name].method,
        "values": list(CFG.ablations[name].values),
        "methods": CFG.ablated(name),
    }
    for name in STUDY.ablations
}
KEPT = 4  # test images whose embeddings are kept; a plot option would predict again
if PLOT.panel_sample >= KEPT:
    sys.exit(
        f"config: plot.panel_sample: it must be below {KEPT} (got {PLOT.panel_sample})"
    )

# A network's job asks for a GPU where there is one. Where there is none it asks for nothing but its threads, and students
# train side by side on the cores. On the head node of a cluster: --set-resources train_student:gpu=1 and so on.
GPU = int(
    shutil.which("nvidia-smi") is not None
    and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
)
# Such a job counts as one core and goes first: were it to wait for several cores to be free at once, a queue of jobs without
# a GPU would leave the GPU idle.
THREADS = 1 if GPU else 8

try:
    ALL_CORES = workflow.cores
except WorkflowError:  # nobody says how many: --report, or a cluster
    ALL_CORES = 8

# Jobs are `python -m gdlib step ...` with this interpreter and this copy of gdlib, whether or not the environment is
# activated. With --use-conda a rule's own environment goes before this PATH; PYTHONPATH it removes, hence the prefix.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), *os.get_exec_path()])
)
# Weights may name a network from outside gdlib only if the configuration does, too.
OWN = {
    network.model.partition(":")[0]
    for network in (CFG.teachers | CFG.students).values()
    if ":" in network.model
}
os.environ.update(
    GDLIB_PLUGINS=",".join(
        sorted(OWN | set(filter(None, os.getenv("GDLIB_PLUGINS", "").split(","))))
    )
)
shell.prefix(
    f"set -euo pipefail; export PYTHONPATH={shlex.quote(ROOT)}${{{{PYTHONPATH:+:$PYTHONPATH}}}}; "
    # A cluster kills jobs at their time limit, so they stop before it and save; on this machine they have all the time.
    + ("export CLUSTER_JOB=1; " if workflow.remote_exec else "")
)


wildcard_constraints:
    dataset="|".join(map(re.escape, CFG.datasets)),
    network="|".join(map(re.escape, CFG.teachers | CFG.students)),
    method="|".join(map(re.escape, [TEACHER, *METHODS])),
    seed=r"\d+",
    segmenter="|".join(SEGMENTERS),
    part=r"[a-z]\w*",


def compact(value):
    """JSON that is equal for equal content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def option(name, value):
    """A part of a command that is only there if there is a value."""
    return [name, str(value)] if value else []


def code(*paths):
    """Modules of gdlib that a rule depends on; relative, so that a moved project re-runs nothing."""
    files = [os.path.join(ROOT, "gdlib", path) for path in paths]
    for file in files:
        # Without its inputs, Snakemake takes a result as given and never makes it again.
        if not os.path.exists(file):
            raise WorkflowError(f"{file} is listed in common.smk, but does not exist")
    return [os.path.relpath(file) for file in files]


PREPARE_CODE = code(
    *(
        f"data/{name}.py"
        for name in (
            "prepare",
            "sense",
            "files",
            "tiff",
            "decoders",
            "axes",
            "intensity",
        )
    )
)
# Code that only judges (inference, segmentation, metrics) is left to the rules that use it on the test images.
TRAIN_CODE = code("training.py", "cache.py")
TRAIN_CODE += code("data/patches.py", "data/intensity.py", "data/augment.py")
TRAIN_CODE += code("ops.py", "compiled.py", "native.py", "native.cpp", "parallel.py")
TRAIN_CODE += code("models/__init__.py", "distill/__init__.py")
MEMORY_CODE = code("distill/bank.py")
PREDICT_CODE = code("inference.py", "streaming.py", "models/__init__.py", "ops.py")
PREDICT_CODE += code("engine.py", "data/axes.py", "data/intensity.py")
REPORT_CODE = code(*sorted((registry.NETWORKS.folder.parent / "report").glob("*.py")))


def plugin(kind, name):
    """The file of a network, loss term or data source, and those of its kind that it builds on.

    A plug-in that lives elsewhere is not tracked.
    """
    if ":" in name:
        return []
    file = kind.folder / f"{name}.py"
    basis = re.findall(rf"^from {kind.package}\.(\w+) import", file.read_text(), re.M)
    return code(file, *(kind.folder / f"{other}.py" for other in basis))


def grow(amount):
    """More of a resource at every attempt (see --retries)."""
    return lambda wildcards, attempt: amount * attempt


def prepare_code(wildcards):
    """What reads a dataset, and the published lists of its splits."""
    source = CFG.datasets[wildcards.dataset].source
    lists = (registry.SOURCES.folder.parent / "splits" / source).rglob("*.txt")
    return PREPARE_CODE + plugin(registry.SOURCES, source) + code(*sorted(lists))


def print_warnings():
    """Say again what is probably not meant in the data of this study: hours may lie between, or another machine."""
    for log in (f"logs/prepare/{dataset}.log" for dataset in STUDY.datasets):
        lines = open(log).readlines() if os.path.exists(log) else []
        for line in (line for line in lines if line.startswith("warning: ")):
            print(f"{log}: {line}", end="", file=sys.stderr)


def spec_of(wildcards):
    """The run that these wildcards name."""
    return CFG.run(
        wildcards.dataset, wildcards.network, wildcards.method, int(wildcards.seed)
    )


def train_spec(wildcards):
    """What a training depends on; the memory bank only where a term compares with it."""
    spec = spec_of(wildcards).model_dump(mode="json")
    if not any(term["memory"] for term in spec["terms"]):
        del spec["recipe"]["bank"]
    return compact(spec)


def train_code(wildcards):
    """What trains: the loop, the network and the terms of this run, but no other network and no other term."""
    spec = spec_of(wildcards)
    files = TRAIN_CODE + plugin(registry.NETWORKS, spec.model)
    if any(term.memory for term in spec.terms):
        files += MEMORY_CODE
    for name in sorted({term.term for term in spec.all_terms}):
        files += plugin(registry.TERMS, name)
    return files


def predict_code(wildcards):
    """What computes the output of a network."""
    model = CFG.network(wildcards.network).model
    return PREDICT_CODE + plugin(registry.NETWORKS, model)


def weights(wildcards):
    """The weights of a run: trained here, or given in the catalogue."""
    return CFG.network(wildcards.network).weights or f"{RUN}/weights.safetensors"


def teacher_weights(wildcards):
    """What a student learns from; nothing if its method does not ask the teacher, so that it need not wait."""
    if not CFG.method(wildcards.method).terms:
        return []
    return weights_of(
        wildcards.dataset, CFG.teacher_of(wildcards.dataset, wildcards.method)
    )[0]


def weights_of(dataset, teacher):
    """The weights of a teacher, of all its seeds: trained here, or given in the catalogue."""
    given = CFG.network(teacher).weights
    runs = [(dataset, teacher, TEACHER, seed) for seed in STUDY.teacher_seeds]
    return [given] if given else of_runs("weights.safetensors", runs)


def teacher_files(dataset):
    """The weights of all teachers of a dataset."""
    return [
        file for name in CFG.teachers_of(dataset) for file in weights_of(dataset, name)
    ]


def draws(dataset, seed):
    """The run that stands for all students of a seed where their patches are drawn; None if all draw their own."""
    if STUDY.teacher_cache is None:
        return None
    return CFG.run(dataset, CFG.students_of(dataset)[0], STUDY.methods[0], int(seed))


def margins_of(dataset):
    """The largest margin of the dataset's networks, and those networks that must be built to know theirs.

    Not simply all networks: for one more student the same patches need not be drawn again.
    """
    networks = [CFG.network(name) for name in networks_of(dataset)]
    known = [registry.margin(network.model) for network in networks]
    largest = [0] * CFG.datasets[dataset].ndim
    for margin in filter(None, known):
        largest = [max(pair) for pair in zip(largest, margin, strict=True)]
    unknown = [n for n, margin in zip(networks, known, strict=True) if margin is None]
    return largest, [{"model": n.model, "options": n.options} for n in unknown]


def parts_of(method):
    """What its terms compare of a teacher's output: the embedding, with the foreground, and feature maps."""
    found = set()
    for term in CFG.method(method).terms:
        own = {} if ":" in term.term else registry.TERMS.parameters(term.term)
        found |= {*((own | term.options).get("levels") or ())}
        found |= (
            {*term.level}
            if isinstance(term.level, tuple)
            else {term.level or "embedding"}
        )
    return sorted(found)


def cached(wildcards):
    """Patches drawn before, and the teacher's output on them, for the students that can use them.

    They are no temporary files: Snakemake would make them again for one more method, and then train every student again.
    """
    dataset, method, seed = wildcards.dataset, wildcards.method, wildcards.seed
    if draws(dataset, seed) is None or CFG.method(method).recipe.keys() - {"bank"}:
        return {}  # its own recipe means patches of its own
    network = CFG.teacher_of(dataset, method)
    return {
        "patches": PATCHES.format(dataset=dataset, seed=seed),
        "taught": [
            TAUGHT.format(dataset=dataset, network=network, part=part, seed=seed)
            for part in parts_of(method)
        ],
    }


def of_runs(name, runs):
    """This file of each of these runs."""
    keys = ("dataset", "network", "method", "seed")
    return [f"{RUN}/{name}".format(**dict(zip(keys, run))) for run in runs]


def metrics_of(runs):
    """The metrics of these runs, by every segmenter of their dataset, its main one first."""
    return [
        of_runs(f"{segmenter}/metrics.csv", [run])[0]
        for run in runs
        for segmenter in CFG.datasets[run[0]].segmenters
    ]


def true_foreground(wildcards):
    """The ground truth, where a segmenter is told what is foreground."""
    masked = wildcards.segmenter.endswith("_masked")
    return f"{DATA}/test.h5".format(dataset=wildcards.dataset) if masked else []


def networks_of(dataset):
    """The teachers and the students of a dataset."""
    return [*CFG.teachers_of(dataset), *CFG.students_of(dataset)]


def profiles_of(*datasets):
    """What the networks of these datasets cost."""
    return [
        PROFILE.format(dataset=dataset, network=network)
        for dataset in datasets
        for network in networks_of(dataset)
    ]


def runs_on(dataset):
    """The runs of the study on this dataset."""
    return [run for run in CFG.runs() if run[0] == dataset]


def trained(runs):
    """Those of these runs that are trained here."""
    return [run for run in runs if not CFG.network(run[1]).weights]


def shown_on(dataset):
    """The runs that stand for all in figures of images: the teacher and some methods of the first student."""
    methods = [method for method in PLOT.panel_methods if method in STUDY.methods]
    teacher = (dataset, CFG.teacher_of(dataset), TEACHER, STUDY.teacher_seeds[0])
    return [teacher] + [
        (dataset, CFG.students_of(dataset)[0], m, STUDY.seeds[0])
        for m in methods
        if CFG.students_of(dataset)
    ]


def titles(*groups):
    """How readers know these datasets and networks, in an order that does not depend on the configuration's."""
    catalogue = CFG.datasets | CFG.teachers | CFG.students
    names = sorted(name for group in groups for name in group)
    return {name: catalogue[name].title for name in names if catalogue[name].title}


def budget(dataset):
    """How long the networks were trained, and what the study lacks, in words for the caption of a table."""
    teacher, student = (
        CFG.recipe(CFG.study, dataset, role) for role in ("teacher", "student")
    )
    cache = STUDY.teacher_cache
    given = all(CFG.network(name).weights for name in CFG.teachers_of(dataset))
    return (
        "training: "
        + (
            "teacher given,"
            if given
            else f"teacher {teacher.steps} steps of {teacher.batch_size} patches,"
        )
        + f" students {student.steps} of {student.batch_size}"
        + " patches" * given
        + f", {cache} of them drawn, the others shown again"
        * bool(cache and cache < student.steps)
        + f"; left out of the study: {', '.join(CFG.left_out)}" * bool(CFG.left_out)
    )


def figure(name, title):
    """The files of a figure in all formats; the first goes into the report."""
    first, *others = [
        f"{RESULTS}/figures/{{dataset}}/{name}.{ending}" for ending in PLOT.formats
    ]
    shown = report(
        first,
        caption=f"../report/{name.partition('_')[0]}.rst",
        category="3. Figures",
        subcategory="{dataset}",
        labels={"figure": title},
    )
    return [shown, *others]


def page(name, category, title):
    """A page of the report."""
    return report(
        f"{RESULTS}/report/{name}.html",
        caption=f"../report/{name}.rst",
        category=category,
        labels={"page": title},
    )


def provenance_of_study():
    """What the record of the study cannot know from its files: arguments of `gdlib.report.provenance.record`."""
    datasets = STUDY.datasets
    networks = sorted({name for dataset in datasets for name in networks_of(dataset)})
    roles = ("teacher", "student")
    chosen = {
        "study": CFG.study,
        **STUDY.model_dump(mode="json"),
        "datasets": {d: CFG.datasets[d].model_dump(mode="json") for d in datasets},
        "networks": {n: CFG.network(n).model_dump(mode="json") for n in networks},
        "methods": {m: CFG.method(m).model_dump(mode="json") for m in METHODS},
        "recipes": {
            d: {r: CFG.recipe(CFG.study, d, r).model_dump(mode="json") for r in roles}
            for d in datasets
        },
    }
    # Sorted below the first level, so that the order of keys in config.yaml does not matter.
    text = {key: json.loads(compact(value)) for key, value in chosen.items()}
    splits = ("train", "val", "test")
    return {
        "study": CFG.study,
        "configuration": yaml.safe_dump(
            text,
            sort_keys=False,
            width=120,
            allow_unicode=True,
            default_flow_style=None,
        ),
        "benchmarks": BENCHMARKS,
        "data": {
            d: {s: f"{DATA}/{s}.h5".format(dataset=d) for s in splits} for d in datasets
        },
        "teachers": {
            d: f"{CFG.teacher_of(d)}/{TEACHER}/seed{STUDY.teacher_seeds[0]}"
            for d in datasets
        },
        "given": {
            n: CFG.network(n).weights for n in networks if CFG.network(n).weights
        },
    }
