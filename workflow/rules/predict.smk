"""Test images to affinities (a GPU helps) to instances (it does not); a changed threshold repeats the second alone."""


rule predict:
    input:
        weights=weights,
        data=f"{DATA}/test.h5",
        code=network_code("predict"),
    output:
        f"{RUN}/predictions.h5",
    log:
        f"{LOGS}/predict/{ID}.log",
    benchmark:
        f"{BENCHMARKS}/predict/{ID}.tsv"
    priority: 1
    conda:
        "../../envs/gdlib.yaml"
    threads: share(2)
    resources:
        gpu=GPU,
        mem_mb=grow(6000),
        runtime=grow(60),
    params:
        kept=KEPT,
    message:
        f"Predict {NAME}"
    shell:
        "python -m gdlib step predict --weights {input.weights:q} --data {input.data} --out {output}"
        " --keep-embeddings {params.kept} --threads {threads} > {log} 2>&1"


rule segment:
    input:
        predictions=f"{RUN}/predictions.h5",
        truth=true_foreground,
        code=code_of("segment"),
    output:
        f"{SEGMENTED}/segmentation.h5",
    log:
        f"{LOGS}/segment/{ID}/{{segmenter}}.log",
    benchmark:
        f"{BENCHMARKS}/segment/{ID}/{{segmenter}}.tsv"
    conda:
        "../../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(4000),
        runtime=grow(60),
    params:
        override=lambda wildcards: compact(
            CFG.datasets[wildcards.dataset].segmentation.get(wildcards.segmenter, {})
        ),
        truth=lambda wildcards, input: option("--data", input.truth),
    message:
        f"Segment {NAME} by {{wildcards.segmenter}}"
    shell:
        "python -m gdlib step segment --predictions {input.predictions} --out {output}"
        " --segmenter {wildcards.segmenter} --override {params.override:q} {params.truth:q} --threads {threads} > {log} 2>&1"
