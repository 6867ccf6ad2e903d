"""Where files live, and how rules ask the plan of the study. No rules here.

A rule passes exactly its own slice of the configuration to its job, as text that does not depend on the order of keys.
Snakemake re-runs a job when this text changes: an edit re-runs what depends on it and nothing else.
"""

import re

import yaml

from gdlib import registry
from gdlib.config import SEGMENTERS, TEACHER, plan

PLAN = plan.Plan(CFG)
STUDY = CFG.selected
PLOT = CFG.plot
ABLATIONS = PLAN.ablations

RESULTS = f"results/{CFG.study}"
LOGS = f"logs/{CFG.study}"
BENCHMARKS = f"{RESULTS}/benchmarks"
DATA = "data/{dataset}"  # made once, shared by all studies
ID = "{dataset}/{network}/{method}/seed{seed}"  # of a run
RUN = f"{RESULTS}/runs/{ID}"
NAME = ID.replace("{", "{wildcards.")  # the same in messages
SEGMENTED = f"{RUN}/{{segmenter}}"  # a run's instances, by one way to find them
MAPS = f"{RESULTS}/maps/{{dataset}}/{{network}}/{{part}}.h5"
FOUND = f"{RESULTS}/unlabelled/{{dataset}}/{{network}}.h5"  # by a teacher
MAPS_OF_FOUND = f"{RESULTS}/unlabelled/{{dataset}}/{{network}}/{{part}}.h5"
PROFILE = f"{RESULTS}/profile/{{dataset}}/{{network}}.json"

# Beside this workflow in a clone; an installed package has the workflow in it.
PACKAGE = os.path.join(ROOT, "gdlib")
if not os.path.isdir(PACKAGE):
    PACKAGE = str(registry.PACKAGE)

KEPT = 4  # test images whose embeddings are kept; a plot option would predict again
if PLOT.panel_sample >= KEPT:
    sys.exit(
        f"config: plot.panel_sample: it must be below {KEPT} (got {PLOT.panel_sample})"
    )

try:
    ALL_CORES = workflow.cores
except WorkflowError:  # nobody says how many: --report, or a cluster
    ALL_CORES = 8


def one_of(names):
    """What a wildcard may be: one of these names."""
    return "|".join(map(re.escape, names)) or "(?!)"  # else nothing


def share(jobs):
    """Threads of each of so many jobs, side by side: that uses cores better than one after the other with all of them."""
    return 1 if GPU else max(1, min(8, ALL_CORES // max(1, jobs)))


TEACHERS = len([run for run in PLAN.trained(PLAN.runs) if run[2] == TEACHER])
SEVERAL = [name for name in CFG.teachers if CFG.members(name)]  # networks in one
SINGLE = [name for name in CFG.teachers if name not in SEVERAL]

# Weights may name a network from outside gdlib only if the configuration does, too.
ALLOWED = PLAN.plugins.union(filter(None, os.getenv("GDLIB_PLUGINS", "").split(",")))
os.environ.update(GDLIB_PLUGINS=",".join(sorted(ALLOWED)))


wildcard_constraints:
    dataset="|".join(map(re.escape, CFG.datasets)),
    network="|".join(map(re.escape, CFG.teachers | CFG.students)),
    method="|".join(map(re.escape, [TEACHER, *PLAN.methods])),
    seed=r"\d+",
    segmenter="|".join(SEGMENTERS),
    part=r"[a-z]\w*",


def run_of(wildcards):
    """The run that these wildcards name."""
    return (
        wildcards.dataset,
        wildcards.network,
        wildcards.method,
        int(wildcards.seed),
    )


def of_dataset(asked):
    """An answer for the dataset of the wildcards."""
    return lambda wildcards: asked(wildcards.dataset)


def files_of(code):
    """Files of the package where they are; relative, so that a moved project re-runs nothing."""
    return [os.path.relpath(os.path.join(PACKAGE, path)) for path in code]


def code_of(step):
    """What a step depends on, whatever its network."""
    return files_of(plan.code(step))


def network_code(step):
    """What a step depends on for the network of these wildcards."""
    return lambda wildcards: files_of(PLAN.network_code(step, wildcards.network))


def train_code(wildcards):
    """What trains this run."""
    return files_of(PLAN.train_code(run_of(wildcards)))


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


def profiles_of(*datasets):
    """What the networks of these datasets cost."""
    return [
        PROFILE.format(dataset=dataset, network=network)
        for dataset in datasets
        for network in PLAN.networks_of(dataset)
    ]


def given(network):
    """Weights that are not trained here: a file, or a network that comes with the package, by its name.

    `gdlib.trained.find` does the same, but would import h5py for every job.
    """
    weights = CFG.network(network).weights
    built_in = f"{PACKAGE}/weights/{weights}.safetensors"
    return (
        built_in
        if os.path.isfile(built_in) and not os.path.isfile(weights)
        else weights
    )


def weights(wildcards):
    """The weights of a run: trained here, or given in the catalogue."""
    return given(wildcards.network) or f"{RUN}/weights.safetensors"


def weights_of(dataset, teacher):
    """The weights of a teacher, of all its seeds: trained here, or given in the catalogue."""
    file = given(teacher)
    runs = PLAN.teacher_runs(dataset, teacher)
    return [file] if file else of_runs("weights.safetensors", runs)


def member_files(dataset, teacher):
    """The weights of the members of a teacher that is several."""
    return [
        given(run[1]) or of_runs("weights.safetensors", [run])[0]
        for run in PLAN.members_of(dataset, teacher)
    ]


def teacher_files(dataset):
    """The weights of all teachers of a dataset."""
    return [
        file for name in CFG.teachers_of(dataset) for file in weights_of(dataset, name)
    ]


def beside_labels(wildcards):
    """What a student learns from beside labels: the maps of its teacher, the teacher itself, unlabelled images, or nothing;
    then it need not wait."""
    dataset, method = wildcards.dataset, wildcards.method
    run, teacher = run_of(wildcards), CFG.teacher_of(dataset, method)
    names = {"dataset": dataset, "network": teacher}
    found, whose = {}, PLAN.unlabelled_of(run)
    if whose:
        place = FOUND if whose == "teacher" else f"{DATA}/unlabelled.h5"
        found["unlabelled"] = place.format(**names)
    if not CFG.method(method).terms:
        return found
    if PLAN.spec_of(run).recipe.teacher == "online":
        return found | {"teacher": weights_of(dataset, teacher)[0]}
    parts = PLAN.parts_of(method)
    found["maps"] = [MAPS.format(part=part, **names) for part in parts]
    if whose:
        found["unlabelled_maps"] = [
            MAPS_OF_FOUND.format(part=part, **names) for part in parts
        ]
    return found


def true_foreground(wildcards):
    """The ground truth, where a segmenter is told what is foreground."""
    masked = wildcards.segmenter.endswith("_masked")
    return f"{DATA}/test.h5".format(dataset=wildcards.dataset) if masked else []


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


def known_of_study():
    """What the record of the study cannot know from its files: arguments of `gdlib.report.provenance.record.record`."""
    # Sorted below the first level, so that the order of keys in the configuration does not matter.
    text = {key: json.loads(compact(value)) for key, value in PLAN.record().items()}
    datasets = STUDY.datasets
    splits = {
        d: ["train", "val", "test"] + ["unlabelled"] * (d in PLAN.unlabelled)
        for d in datasets
    }
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
            d: {s: f"{DATA}/{s}.h5".format(dataset=d) for s in splits[d]}
            for d in datasets
        },
        "teachers": {
            d: f"{CFG.teacher_of(d)}/{TEACHER}/seed{STUDY.teacher_seeds[0]}"
            for d in datasets
        },
        "given": {name: given(name) for name in text["networks"] if given(name)},
    }


def print_warnings():
    """Say again what is probably not meant in the data of this study: hours may lie between, or another machine."""
    for log in (f"logs/prepare/{dataset}.log" for dataset in STUDY.datasets):
        lines = open(log).readlines() if os.path.exists(log) else []
        for line in (line for line in lines if line.startswith("warning: ")):
            print(f"{log}: {line}", end="", file=sys.stderr)
