"""Images and labels of a dataset to one HDF5 file per split; nothing here depends on the study."""


rule prepare:
    input:
        raw=raw_files,
        code=lambda wildcards: files_of(PLAN.prepare_code(wildcards.dataset)),
    output:
        train=f"{DATA}/train.h5",
        val=f"{DATA}/val.h5",
        test=f"{DATA}/test.h5",
    log:
        "logs/prepare/{dataset}.log",
    benchmark:
        f"{DATA}/benchmark.tsv"
    wildcard_constraints:
        dataset=one_of(d for d in CFG.datasets if not CFG.datasets[d].unlabelled),
    conda:
        "../../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(4000),
        runtime=grow(60),
    params:
        dataset=lambda wildcards: compact(
            CFG.datasets[wildcards.dataset].model_dump(
                mode="json",
                include={"source", "options", "channels", "patch", "unlabelled"},
            )
        ),
        unlabelled=[],
        root=lambda wildcards: option("--root", raw_root(wildcards.dataset)),
    message:
        "Prepare {wildcards.dataset}"
    shell:
        "python -m gdlib step prepare --dataset {params.dataset:q} {params.root:q}"
        " --train {output.train} --val {output.val} --test {output.test} {params.unlabelled}"
        " > {log} 2>&1;"
        " sed -n 's/^warning: /{wildcards.dataset}: &/p' {log} >&2"


# What is not named here is as above: input, command, and the parameters `dataset` and `root`.
use rule prepare as prepare_with_unlabelled with:
    output:
        train=f"{DATA}/train.h5",
        val=f"{DATA}/val.h5",
        test=f"{DATA}/test.h5",
        unlabelled=f"{DATA}/unlabelled.h5",
    wildcard_constraints:
        dataset=one_of(d for d in CFG.datasets if CFG.datasets[d].unlabelled),
    params:
        unlabelled=lambda wildcards, output: option("--unlabelled", output.unlabelled),
