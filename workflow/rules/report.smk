"""Tables of the study and figures of each dataset. Nothing here is expensive: an edit of `plot` or of a title ends here."""


report: "../report/workflow.rst"


FIGURES = expand(
    f"{RESULTS}/figures/{{dataset}}/{{figure}}.{{format}}",
    dataset=STUDY.datasets,
    figure=["methods", "tradeoff", "curves", "panel", "embeddings"],
    format=PLOT.formats,
)


rule summarize:
    input:
        metrics=of_runs("metrics.csv", CFG.runs()),
        profiles=expand(PROFILE, dataset=STUDY.datasets, network=NETWORKS),
        code=REPORT_CODE,
    output:
        summary=f"{RESULTS}/summary.csv",
        comparison=f"{RESULTS}/comparison.csv",
        markdown=report(
            f"{RESULTS}/table.md",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "results"},
        ),
        tex=f"{RESULTS}/table.tex",
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
        mem_mb=1000,
        runtime=10,
    params:
        metrics=list(PLOT.table_metrics),
        main=PLOT.main_metric,
        titles=titles(STUDY.datasets, NETWORKS),
        budget=budget(),
    message:
        "Summarize the study"
    script:
        "../scripts/summarize.py"


rule figure_tradeoff:
    input:
        metrics=lambda wildcards: of_runs("metrics.csv", runs_on(wildcards.dataset)),
        profiles=expand(PROFILE, network=NETWORKS, allow_missing=True),
        code=REPORT_CODE,
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
        mem_mb=1000,
        runtime=10,
    params:
        figure="tradeoff",
        metric=PLOT.main_metric,
        titles=titles(NETWORKS),
        dpi=PLOT.dpi,
    message:
        "Draw tradeoff of {wildcards.dataset}"
    script:
        "../scripts/figures.py"


# What is not named in the rules below is as above; a parameter that a figure has no use for is set to None.
use rule figure_tradeoff as figure_methods with:
    input:
        metrics=lambda wildcards: of_runs("metrics.csv", runs_on(wildcards.dataset)),
        code=REPORT_CODE,
    output:
        figure("methods", "every method"),
    log:
        f"{LOGS}/figures/{{dataset}}/methods.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/methods.tsv"
    params:
        figure="methods",
        metric=None,
        metrics=list(PLOT.metrics),
    message:
        "Draw methods of {wildcards.dataset}"


use rule figure_tradeoff as figure_curves with:
    input:
        histories=lambda wildcards: of_runs(
            "history.csv", trained(runs_on(wildcards.dataset))
        ),
        code=REPORT_CODE,
    output:
        figure("curves", "training"),
    log:
        f"{LOGS}/figures/{{dataset}}/curves.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/curves.tsv"
    params:
        figure="curves",
        runs=lambda wildcards: [
            list(run[1:]) for run in trained(runs_on(wildcards.dataset))
        ],
    message:
        "Draw curves of {wildcards.dataset}"


use rule figure_tradeoff as figure_panel with:
    input:
        data=f"{DATA}/test.h5",
        segmentations=lambda wildcards: of_runs(
            "segmentation.h5", shown_on(wildcards.dataset)
        ),
        code=REPORT_CODE,
    output:
        figure("panel", "segmentations"),
    log:
        f"{LOGS}/figures/{{dataset}}/panel.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/panel.tsv"
    params:
        figure="panel",
        methods=lambda wildcards: [run[2] for run in shown_on(wildcards.dataset)],
        sample=PLOT.panel_sample,
        crop=PLOT.panel_crop,
    message:
        "Draw panel of {wildcards.dataset}"


use rule figure_tradeoff as figure_embeddings with:
    input:
        data=f"{DATA}/test.h5",
        predictions=lambda wildcards: of_runs(
            "predictions.h5", shown_on(wildcards.dataset)
        ),
        code=REPORT_CODE,
    output:
        figure("embeddings", "embeddings"),
    log:
        f"{LOGS}/figures/{{dataset}}/embeddings.log",
    benchmark:
        f"{BENCHMARKS}/figures/{{dataset}}/embeddings.tsv"
    params:
        figure="embeddings",
        metric=None,
        methods=lambda wildcards: [run[2] for run in shown_on(wildcards.dataset)],
        sample=PLOT.panel_sample,
        crop=PLOT.panel_crop,
    message:
        "Draw embeddings of {wildcards.dataset}"
