"""How good a run is on the test images, and what its network costs."""


rule evaluate:
    input:
        data=f"{DATA}/test.h5",
        segmentation=f"{SEGMENTED}/segmentation.h5",
        code=code_of("evaluate"),
    output:
        f"{SEGMENTED}/metrics.csv",
    log:
        f"{LOGS}/evaluate/{ID}/{{segmenter}}.log",
    benchmark:
        f"{BENCHMARKS}/evaluate/{ID}/{{segmenter}}.tsv"
    conda:
        "../../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(2000),
        runtime=grow(30),
    params:
        run=lambda wildcards: compact(
            {
                "dataset": wildcards.dataset,
                "network": wildcards.network,
                "method": wildcards.method,
                "seed": int(wildcards.seed),
            }
        ),
    message:
        f"Evaluate {NAME} by {{wildcards.segmenter}}"
    shell:
        "python -m gdlib step evaluate --data {input.data} --segmentation {input.segmentation} --out {output}"
        " --run {params.run:q} --segmenter {wildcards.segmenter} > {log} 2>&1"


rule baselines:
    input:
        val=f"{DATA}/val.h5",
        test=f"{DATA}/test.h5",
        code=code_of("baselines"),
    output:
        f"{RESULTS}/baselines/{{dataset}}.csv",
    log:
        f"{LOGS}/baselines/{{dataset}}.log",
    benchmark:
        f"{BENCHMARKS}/baselines/{{dataset}}.tsv"
    conda:
        "../../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(4000),
        runtime=grow(60),
    message:
        "Evaluate trivial segmentations of {wildcards.dataset}"
    shell:
        "python -m gdlib step baselines --dataset {wildcards.dataset} --val {input.val} --test {input.test}"
        " --out {output} > {log} 2>&1"


rule profile:
    input:
        data=f"{DATA}/test.h5",
        code=network_code("profile"),
    output:
        PROFILE,
    log:
        f"{LOGS}/profile/{{dataset}}/{{network}}.log",
    benchmark:
        f"{BENCHMARKS}/profile/{{dataset}}/{{network}}.tsv"
    conda:
        "../../envs/gdlib.yaml"
    threads: ALL_CORES  # so that nothing beside it disturbs the measured time
    resources:
        gpu=GPU,
        mem_mb=grow(6000),
        runtime=grow(30),
    params:
        spec=lambda wildcards: compact(
            {
                "dataset": wildcards.dataset,
                "network": wildcards.network,
                "model": CFG.network(wildcards.network).model,
                "options": CFG.network(wildcards.network).options
                | {"in_channels": CFG.datasets[wildcards.dataset].channels},
            }
        ),
    message:
        "Profile {wildcards.dataset}/{wildcards.network}"
    shell:
        "python -m gdlib step profile --spec {params.spec:q} --data {input.data} --out {output}"
        " --threads {threads} > {log} 2>&1"
