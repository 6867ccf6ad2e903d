"""Tables of the study and figures of each dataset. Nothing here is expensive: an edit of `plot` or of a title ends here."""

import tomllib


report: "../report/workflow.rst"


FIGURES = [
    f"{RESULTS}/figures/{dataset}/{name}.{ending}"
    for dataset in STUDY.datasets
    for name in ["methods", "tradeoff", "curves", "panel", "embeddings"]
    + ["neurons"] * (CFG.datasets[dataset].ndim == 3)
    + [f"ablation_{ablation}" for ablation in ABLATIONS]
    for ending in PLOT.formats
]
# What readers call the ablations; their methods are named after them.
SETTINGS = {name: ABLATIONS[name]["title"] for name in sorted(ABLATIONS)}
KNOWN = files_of(["report/tables/paper.toml"])
with open(KNOWN[0], "rb") as file:
    in_paper = {
        name for one in tomllib.load(file)["dataset"].values() for name in one["ours"]
    }
IN_PAPER = [dataset for dataset in STUDY.datasets if dataset in in_paper]
PAPER = [f"{RESULTS}/paper.{ending}" for ending in ("md", "tex", "html") if IN_PAPER]


rule summarize:
    input:
        metrics=metrics_of(PLAN.runs),
        profiles=profiles_of(*STUDY.datasets),
        baselines=expand(f"{RESULTS}/baselines/{{dataset}}.csv", dataset=PLAN.volumes),
        weights=[file for dataset in PLAN.volumes for file in teacher_files(dataset)],
        images=[
            f"{DATA}/{split}.h5".format(dataset=dataset)
            for dataset in PLAN.unlabelled
            for split in ("train", "unlabelled")
        ],
        code=code_of("report"),
    output:
        summary=f"{RESULTS}/summary.csv",
        comparison=f"{RESULTS}/comparison.csv",
        markdown=f"{RESULTS}/table.md",
        tex=f"{RESULTS}/table.tex",
        html=report(
            f"{RESULTS}/table.html",
            caption="../report/table.rst",
            category="2. Tables",
            labels={"table": "results"},
        ),
    log:
        f"{LOGS}/summarize.log",
    benchmark:
        f"{BENCHMARKS}/summarize.tsv"
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000),
        runtime=10,
    params:
        metrics={d: list(CFG.shown(d).table_metrics) for d in STUDY.datasets},
        main={d: CFG.shown(d).main_metric for d in STUDY.datasets},
        titles=PLAN.titles(STUDY.datasets, *map(PLAN.networks_of, STUDY.datasets))
        | SETTINGS,
        budget={dataset: PLAN.budget(dataset) for dataset in STUDY.datasets},
        ablations={name: ABLATIONS[name]["method"] for name in sorted(ABLATIONS)},
        unlabelled=PLAN.unlabelled,
    message:
        "Summarize the study"
    script:
        "../scripts/summarize.py"


# Nothing that is expensive is its input: what lies beside the metrics is read if it is there, and never made again for it.
rule provenance:
    input:
        summary=rules.summarize.output.summary,
        metrics=metrics_of(PLAN.runs),
        profiles=profiles_of(*STUDY.datasets),
        code=code_of("report"),
    output:
        record=f"{RESULTS}/provenance.json",
        configuration=page("configuration", "1. Study", "configuration"),
        data=page("data", "1. Study", "data"),
        time=page("time", "4. Provenance", "where the time went"),
        provenance=page("provenance", "4. Provenance", "code, software, runs"),
    log:
        f"{LOGS}/provenance.log",
    benchmark:
        f"{BENCHMARKS}/provenance.tsv"
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000),
        runtime=30,
    params:
        known=known_of_study(),
        titles=PLAN.titles(STUDY.datasets, *map(PLAN.networks_of, STUDY.datasets)),
    message:
        "Record where every number comes from"
    script:
        "../scripts/provenance.py"


rule paper:
    input:
        metrics=[
            file for dataset in IN_PAPER for file in metrics_of(PLAN.runs_on(dataset))
        ],
        profiles=profiles_of(*IN_PAPER),
        weights=[
            file
            for dataset in IN_PAPER
            for file in of_runs(
                "weights.safetensors", PLAN.trained(PLAN.runs_on(dataset))
            )
        ],
        known=KNOWN,
        code=code_of("report"),
    output:
        markdown=f"{RESULTS}/paper.md",
        tex=f"{RESULTS}/paper.tex",
        html=report(
            f"{RESULTS}/paper.html",
            caption="../report/paper.rst",
            category="2. Tables",
            labels={"table": "as in the paper"},
        ),
    log:
        f"{LOGS}/paper.log",
    benchmark:
        f"{BENCHMARKS}/paper.tsv"
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000),
        runtime=10,
    params:
        main={dataset: CFG.shown(dataset).main_metric for dataset in IN_PAPER},
        titles=PLAN.titles(IN_PAPER, *map(PLAN.networks_of, IN_PAPER)),
        budget={dataset: PLAN.budget(dataset) for dataset in IN_PAPER},
    message:
        "Lay out the tables of the paper"
    script:
        "../scripts/paper.py"


METRICS = of_dataset(lambda dataset: metrics_of(PLAN.runs_on(dataset)))
PLOTTED = of_dataset(lambda dataset: list(CFG.shown(dataset).metrics))
MAIN = of_dataset(lambda dataset: CFG.shown(dataset).main_metric)
TITLES = of_dataset(lambda dataset: PLAN.titles(PLAN.networks_of(dataset)))
SHOWN = of_dataset(lambda dataset: [run[2] for run in PLAN.shown_on(dataset)])
IMAGES = {
    "data": f"{DATA}/test.h5",
    "segmentations": of_dataset(
        lambda dataset: of_runs(
            f"{CFG.datasets[dataset].segmenters[0]}/segmentation.h5",
            PLAN.shown_on(dataset),
        )
    ),
}
# Of each figure: what readers call it, the files that it is made of, and what it is told besides titles and resolution.
DRAWN = {
    "methods": ("every method", {"metrics": METRICS}, {"metrics": PLOTTED}),
    "ablation_{ablation}": (
        "ablation of {ablation}",
        {"metrics": METRICS},
        {
            "metrics": PLOTTED,
            "ablation": lambda wildcards: wildcards.ablation,
            "base": lambda wildcards: ABLATIONS[wildcards.ablation]["method"],
            "titles": lambda wildcards: TITLES(wildcards) | SETTINGS,
        },
    ),
    "tradeoff": (
        "accuracy and cost",
        {"metrics": METRICS, "profiles": of_dataset(profiles_of)},
        {"metric": MAIN},
    ),
    "curves": (
        "training",
        {
            "histories": of_dataset(
                lambda dataset: of_runs(
                    "history.csv", PLAN.trained(PLAN.runs_on(dataset))
                )
            )
        },
        {
            "metric": MAIN,
            "runs": of_dataset(
                lambda dataset: [
                    list(run[1:]) for run in PLAN.trained(PLAN.runs_on(dataset))
                ]
            ),
        },
    ),
    "panel": (
        "segmentations",
        IMAGES,
        {
            "metric": MAIN,
            "ndim": of_dataset(lambda dataset: CFG.datasets[dataset].ndim),
            "methods": SHOWN,
            "sample": PLOT.panel_sample,
            "crop": PLOT.panel_crop,
        },
    ),
    "embeddings": (
        "embeddings",
        {
            "data": f"{DATA}/test.h5",
            "predictions": of_dataset(
                lambda dataset: of_runs("predictions.h5", PLAN.shown_on(dataset))
            ),
        },
        {"methods": SHOWN, "sample": PLOT.panel_sample, "crop": PLOT.panel_crop},
    ),
    "neurons": (
        "neurons",
        IMAGES,
        {"methods": SHOWN, "sample": PLOT.panel_sample},
    ),
}


wildcard_constraints:
    ablation="|".join(map(re.escape, ABLATIONS)) or "none",


for NAME_OF, (TITLE, FILES, TOLD) in DRAWN.items():
    KIND = NAME_OF.partition("_")[0]

    rule:
        name:
            f"figure_{KIND}"
        input:
            **FILES,
            code=code_of("report"),
        output:
            figure(NAME_OF, TITLE),
        log:
            f"{LOGS}/figures/{{dataset}}/{NAME_OF}.log",
        benchmark:
            f"{BENCHMARKS}/figures/{{dataset}}/{NAME_OF}.tsv"
        localrule: True
        conda:
            "../../envs/report.yaml"
        threads: 1
        resources:
            gpu=0,
            mem_mb=grow(1000),
            runtime=10,
        params:
            **{"figure": KIND, "titles": TITLES, "dpi": PLOT.dpi, **TOLD},
        message:
            f"Draw {NAME_OF.replace('_{', ' {wildcards.')} of {{wildcards.dataset}}"
        script:
            "../scripts/figures.py"
