"""Teachers and students. A teacher is a run without distillation terms: one command trains both. One that is several is joined.

Students learn from a teacher's maps of the whole training images, made once, or ask it at every step (`teacher: online`).
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
        network=one_of(SINGLE),
    priority: 1
    conda:
        "../../envs/gdlib.yaml"
    threads: share(TEACHERS)
    resources:
        gpu=GPU,
        mem_mb=grow(8000),
        runtime=grow(480),
    params:
        spec=lambda wildcards: compact(PLAN.train_spec(run_of(wildcards))),
        beside_labels=[],
        # Nobody's output, so that a run that was stopped or killed goes on from there when it is started again.
        state=f"{RESULTS}/state/{ID}",
    message:
        f"Train {NAME}"
    # `exec`: else Snakemake waits for a shell that ends at once at SIGTERM, and not for the training that saves itself.
    shell:
        "exec python -m gdlib step train --spec {params.spec:q} --train {input.train} --val {input.val} {params.beside_labels:q}"
        " --weights {output.weights} --last {output.last} --history {output.history} --state {params.state}"
        " --threads {threads} ${{CLUSTER_JOB:+--max-seconds $(({resources.runtime} * 54))}} > {log} 2>&1"


rule join_teachers:
    input:
        train=f"{DATA}/train.h5",
        val=f"{DATA}/val.h5",
        members=lambda wildcards: member_files(wildcards.dataset, wildcards.network),
        code=network_code("join"),
    output:
        weights=f"{RUN}/weights.safetensors",
    log:
        f"{LOGS}/join/{ID}.log",
    benchmark:
        f"{BENCHMARKS}/join/{ID}.tsv"
    wildcard_constraints:
        method=TEACHER,
        network=one_of(SEVERAL),
    priority: 1
    conda:
        "../../envs/gdlib.yaml"
    threads: share(2)
    resources:
        gpu=GPU,
        mem_mb=grow(8000),
        runtime=grow(120),
    params:
        spec=lambda wildcards: compact(PLAN.train_spec(run_of(wildcards))),
    message:
        f"Join the members of {NAME}"
    shell:
        "python -m gdlib step join --spec {params.spec:q} --members {input.members:q} --train {input.train} --val {input.val}"
        " --weights {output.weights} --threads {threads} > {log} 2>&1"


# No temporary file: Snakemake would make it again for one more method, and then train every student again.
rule ask_teacher:
    input:
        teacher=lambda wildcards: weights_of(wildcards.dataset, wildcards.network)[0],
        samples=f"{DATA}/train.h5",
        code=network_code("ask"),
    output:
        MAPS,
    log:
        f"{LOGS}/maps/{{dataset}}/{{network}}/{{part}}.log",
    benchmark:
        f"{BENCHMARKS}/maps/{{dataset}}/{{network}}/{{part}}.tsv"
    priority: 1
    conda:
        "../../envs/gdlib.yaml"
    threads: share(2)
    resources:
        gpu=GPU,
        mem_mb=grow(6000),
        runtime=grow(120),
    params:
        level=lambda wildcards: option(
            "--level", wildcards.part if wildcards.part != "embedding" else None
        ),
        precision=lambda wildcards: CFG.recipe(
            CFG.study, wildcards.dataset, "student"
        ).precision,
    message:
        "Ask {wildcards.network} for the {wildcards.part} of the training images of {wildcards.dataset}"
    shell:
        "python -m gdlib step ask --teacher {input.teacher:q} --samples {input.samples} --out {output}"
        " {params.level} --precision {params.precision} --threads {threads} > {log} 2>&1"


rule label_unlabelled:
    input:
        teacher=lambda wildcards: weights_of(wildcards.dataset, wildcards.network)[0],
        samples=f"{DATA}/unlabelled.h5",
        code=network_code("label"),
    output:
        FOUND,
    log:
        f"{LOGS}/unlabelled/{{dataset}}/{{network}}.log",
    benchmark:
        f"{BENCHMARKS}/unlabelled/{{dataset}}/{{network}}.tsv"
    priority: 1
    conda:
        "../../envs/gdlib.yaml"
    threads: share(2)
    resources:
        gpu=GPU,
        mem_mb=grow(6000),
        runtime=grow(120),
    params:
        told=lambda wildcards: [
            word
            for key, value in PLAN.labelling(wildcards.dataset).items()
            for word in option(
                f"--{key}", compact(value) if isinstance(value, dict) else value
            )
        ],
    message:
        "Let {wildcards.network} label the unlabelled images of {wildcards.dataset}"
    shell:
        "python -m gdlib step label --teacher {input.teacher:q} --samples {input.samples} --out {output}"
        " {params.told:q} --threads {threads} > {log} 2>&1"


# What is not named here is as above: the code, the command and its parameters.
use rule ask_teacher as ask_of_unlabelled with:
    input:
        teacher=lambda wildcards: weights_of(wildcards.dataset, wildcards.network)[0],
        samples=FOUND,
        code=network_code("ask"),
    output:
        MAPS_OF_FOUND,
    log:
        f"{LOGS}/unlabelled/{{dataset}}/{{network}}/{{part}}.log",
    benchmark:
        f"{BENCHMARKS}/unlabelled/{{dataset}}/{{network}}/{{part}}.tsv"
    message:
        "Ask {wildcards.network} for the {wildcards.part} of the unlabelled images of {wildcards.dataset}"


# What is not named here is the teacher's: outputs, command, and the parameters `spec` and `state`.
use rule train_teacher as train_student with:
    input:
        unpack(beside_labels),
        train=f"{DATA}/train.h5",
        val=f"{DATA}/val.h5",
        code=train_code,
    wildcard_constraints:
        method="|".join(map(re.escape, PLAN.methods)),
    # A student is too small to share: on a CPU, one thread each and many runs at once finish first.
    threads: 1
    resources:
        gpu=GPU,
        mem_mb=grow(6000),
        runtime=grow(240),
    params:
        beside_labels=lambda wildcards, input: [
            word
            for name in ("teacher", "maps", "unlabelled", "unlabelled_maps")
            if (files := input.get(name))
            for word in (
                f"--{name.replace('_', '-')}",
                *([files] if isinstance(files, str) else files),
            )
        ],
