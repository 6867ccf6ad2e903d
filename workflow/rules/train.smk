"""Teachers and students. A teacher is a run without distillation terms: one command trains both.

Where a study says `teacher_cache`, patches are drawn and shown to the teacher once; else every student draws its own and asks at
every step.
"""


rule train_teacher:
    input:
        train=f"{DATA}/train.h5",
        val=f"{DATA}/val.h5",
        code=train_code,
    output:
        weights=f"{RUN}/weights.safetensors",
        last=f"{RUN}/last.safetensors",
        history=f"{RUN}/history.csv",
    log:
        f"{LOGS}/train/{ID}.log",
    benchmark:
        f"{BENCHMARKS}/train/{ID}.tsv"
    wildcard_constraints:
        method=TEACHER,
    priority: 1
    conda:
        "../../envs/gdlib.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
        mem_mb=grow(8000),
        runtime=grow(480),
    params:
        spec=lambda wildcards: compact(PLAN.train_spec(run_of(wildcards))),
        cached=[],
        # Nobody's output, so that a run that was stopped or killed goes on from there when it is started again.
        state=f"{RESULTS}/state/{ID}",
    message:
        f"Train {NAME}"
    # `exec`: else Snakemake waits for a shell that ends at once at SIGTERM, and not for the training that saves itself.
    shell:
        "exec python -m gdlib step train --spec {params.spec:q} --train {input.train} --val {input.val} {params.cached:q}"
        " --weights {output.weights} --last {output.last} --history {output.history} --state {params.state}"
        " --threads {threads} ${{CLUSTER_JOB:+--max-seconds $(({resources.runtime} * 54))}} > {log} 2>&1"


rule draw_patches:
    input:
        train=f"{DATA}/train.h5",
        code=code_of("draw"),
    output:
        PATCHES,
    log:
        f"{LOGS}/cache/{{dataset}}/seed{{seed}}.log",
    benchmark:
        f"{BENCHMARKS}/cache/{{dataset}}/seed{{seed}}.tsv"
    conda:
        "../../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(4000),
        runtime=grow(120),
    params:
        drawing=lambda wildcards: compact(
            PLAN.draws(wildcards.dataset, int(wildcards.seed)).drawing
        ),
        margin=lambda wildcards: compact(PLAN.margins_of(wildcards.dataset)[0]),
        networks=lambda wildcards: compact(PLAN.margins_of(wildcards.dataset)[1]),
        batches=STUDY.teacher_cache,
    message:
        "Draw patches of {wildcards.dataset} for seed {wildcards.seed}"
    shell:
        "python -m gdlib step draw --drawing {params.drawing:q} --margin {params.margin:q} --networks {params.networks:q} --train {input.train}"
        " --out {output} --batches {params.batches} > {log} 2>&1"


rule ask_teacher:
    input:
        teacher=lambda wildcards: weights_of(wildcards.dataset, wildcards.network)[0],
        patches=PATCHES,
        code=network_code("ask"),
    output:
        TAUGHT,
    log:
        f"{LOGS}/cache/{{dataset}}/{{network}}/{{part}}/seed{{seed}}.log",
    benchmark:
        f"{BENCHMARKS}/cache/{{dataset}}/{{network}}/{{part}}/seed{{seed}}.tsv"
    priority: 1
    conda:
        "../../envs/gdlib.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
        mem_mb=grow(6000),
        runtime=grow(120),
    params:
        level=lambda wildcards: option(
            "--level", wildcards.part if wildcards.part != "embedding" else None
        ),
        precision=lambda wildcards: PLAN.draws(
            wildcards.dataset, int(wildcards.seed)
        ).recipe.precision,
    message:
        "Ask {wildcards.network} for the {wildcards.part} of patches of {wildcards.dataset} for seed {wildcards.seed}"
    shell:
        "python -m gdlib step teach --teacher {input.teacher:q} --patches {input.patches} --out {output}"
        " {params.level} --precision {params.precision} --threads {threads} > {log} 2>&1"


# What is not named here is the teacher's: outputs, command, and the parameters `spec` and `state`.
use rule train_teacher as train_student with:
    input:
        unpack(cached),
        train=f"{DATA}/train.h5",
        val=f"{DATA}/val.h5",
        code=train_code,
        teacher=teacher_weights,
    wildcard_constraints:
        method="|".join(map(re.escape, PLAN.methods)),
    # A student is too small to share: on a CPU, one thread each and many runs at once finish first.
    threads: 1
    resources:
        gpu=GPU,
        mem_mb=grow(6000),
        runtime=grow(240),
    params:
        batches=STUDY.teacher_cache,  # for Snakemake to compare; the file knows
        cached=lambda wildcards, input: option("--teacher", input.teacher)
        + option("--patches", input.get("patches"))
        + ["--taught"] * bool(input.get("taught"))
        + list(input.get("taught", [])),
