"""Scores on validation images, to choose by: `snakemake validation --config study=tuning`. No test image is looked at."""


rule validation:
    input:
        weights=of_runs("weights.safetensors", PLAN.trained(PLAN.runs)),
        code=code_of("report"),
    output:
        csv=f"{RESULTS}/validation.csv",
        markdown=f"{RESULTS}/validation.md",
    log:
        f"{LOGS}/validation.log",
    benchmark:
        f"{BENCHMARKS}/validation.tsv"
    localrule: True
    conda:
        "../../envs/report.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000),
        runtime=10,
    params:
        main={d: CFG.shown(d).main_metric for d in STUDY.datasets},
        ablations=SETTINGS,
    message:
        "Collect the validation scores"
    script:
        "../scripts/validation.py"
