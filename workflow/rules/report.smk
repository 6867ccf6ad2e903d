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
KNOWN = files_of(["report/paper.toml"])
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


rule figure_tradeoff:
    input:
        metrics=lambda wildcards: metrics_of(PLAN.runs_on(wildcards.dataset)),
        profiles=lambda wildcards: profiles_of(wildcards.dataset),
        code=code_of("report"),
    output:
        figure("tradeoff", "accuracy and cost"),
    log:
        f"{LOGS}/figures/{{dataset}}/tradeoff.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/tradeoff.tsv"
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000),
        runtime=10,
    params:
        figure="tradeoff",
        metric=lambda wildcards: CFG.shown(wildcards.dataset).main_metric,
        titles=lambda wildcards: PLAN.titles(PLAN.networks_of(wildcards.dataset)),
        dpi=PLOT.dpi,
    message:
        "Draw tradeoff of {wildcards.dataset}"
    script:
        "../scripts/figures.py"


# What a rule takes from another does not include this.
localrules:
    figure_methods,
    figure_ablation,
    figure_curves,
    figure_panel,
    figure_embeddings,
    figure_neurons,


# What is not named in the rules below is as above; a parameter that a figure has no use for is set to None.
use rule figure_tradeoff as figure_methods with:
    input:
        metrics=lambda wildcards: metrics_of(PLAN.runs_on(wildcards.dataset)),
        code=code_of("report"),
    output:
        figure("methods", "every method"),
    log:
        f"{LOGS}/figures/{{dataset}}/methods.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/methods.tsv"
    params:
        figure="methods",
        metric=None,
        metrics=lambda wildcards: list(CFG.shown(wildcards.dataset).metrics),
    message:
        "Draw methods of {wildcards.dataset}"


use rule figure_tradeoff as figure_ablation with:
    input:
        metrics=lambda wildcards: metrics_of(PLAN.runs_on(wildcards.dataset)),
        code=code_of("report"),
    output:
        figure("ablation_{ablation}", "ablation of {ablation}"),
    log:
        f"{LOGS}/figures/{{dataset}}/ablation_{{ablation}}.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/ablation_{{ablation}}.tsv"
    wildcard_constraints:
        ablation="|".join(map(re.escape, ABLATIONS)),
    params:
        figure="ablation",
        metric=None,
        ablation=lambda wildcards: wildcards.ablation,
        base=lambda wildcards: ABLATIONS[wildcards.ablation]["method"],
        metrics=lambda wildcards: list(CFG.shown(wildcards.dataset).metrics),
        titles=lambda wildcards: PLAN.titles(PLAN.networks_of(wildcards.dataset))
        | SETTINGS,
    message:
        "Draw ablation {wildcards.ablation} of {wildcards.dataset}"


use rule figure_tradeoff as figure_curves with:
    input:
        histories=lambda wildcards: of_runs(
            "history.csv", PLAN.trained(PLAN.runs_on(wildcards.dataset))
        ),
        code=code_of("report"),
    output:
        figure("curves", "training"),
    log:
        f"{LOGS}/figures/{{dataset}}/curves.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/curves.tsv"
    params:
        figure="curves",
        runs=lambda wildcards: [
            list(run[1:]) for run in PLAN.trained(PLAN.runs_on(wildcards.dataset))
        ],
    message:
        "Draw curves of {wildcards.dataset}"


use rule figure_tradeoff as figure_panel with:
    input:
        data=f"{DATA}/test.h5",
        segmentations=lambda wildcards: of_runs(
            f"{CFG.datasets[wildcards.dataset].segmenters[0]}/segmentation.h5",
            PLAN.shown_on(wildcards.dataset),
        ),
        code=code_of("report"),
    output:
        figure("panel", "segmentations"),
    log:
        f"{LOGS}/figures/{{dataset}}/panel.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/panel.tsv"
    params:
        figure="panel",
        ndim=lambda wildcards: CFG.datasets[wildcards.dataset].ndim,
        methods=lambda wildcards: [run[2] for run in PLAN.shown_on(wildcards.dataset)],
        sample=PLOT.panel_sample,
        crop=PLOT.panel_crop,
    message:
        "Draw panel of {wildcards.dataset}"


use rule figure_tradeoff as figure_embeddings with:
    input:
        data=f"{DATA}/test.h5",
        predictions=lambda wildcards: of_runs(
            "predictions.h5", PLAN.shown_on(wildcards.dataset)
        ),
        code=code_of("report"),
    output:
        figure("embeddings", "embeddings"),
    log:
        f"{LOGS}/figures/{{dataset}}/embeddings.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/embeddings.tsv"
    params:
        figure="embeddings",
        metric=None,
        methods=lambda wildcards: [run[2] for run in PLAN.shown_on(wildcards.dataset)],
        sample=PLOT.panel_sample,
        crop=PLOT.panel_crop,
    message:
        "Draw embeddings of {wildcards.dataset}"


use rule figure_panel as figure_neurons with:
    output:
        figure("neurons", "neurons"),
    log:
        f"{LOGS}/figures/{{dataset}}/neurons.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/neurons.tsv"
    params:
        figure="neurons",
        methods=lambda wildcards: [run[2] for run in PLAN.shown_on(wildcards.dataset)],
        sample=PLOT.panel_sample,
    message:
        "Draw neurons of {wildcards.dataset}"
