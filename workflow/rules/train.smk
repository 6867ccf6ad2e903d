"""Teachers and students. A teacher is a run without distillation terms: one command trains both."""


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
    conda:
        "../../envs/gdlib.yaml"
    threads: 8
    resources:
        gpu=GPU,
        mem_mb=grow(8000),
        runtime=grow(480),
    params:
        spec=train_spec,
        teacher=[],
        # Nobody's output, so that a run that was stopped or killed goes on from there when it is started again.
        state=f"{RESULTS}/state/{ID}",
    message:
        f"Train {NAME}"
    shell:
        "python -m gdlib step train --spec {params.spec:q} --train {input.train} --val {input.val} {params.teacher:q}"
        " --weights {output.weights} --last {output.last} --history {output.history} --state {params.state}"
        " --threads {threads} ${{CLUSTER_JOB:+--max-seconds $(({resources.runtime} * 54))}} > {log} 2>&1"


# What is not named here is the teacher's: outputs, command, and the parameters `spec` and `state`.
use rule train_teacher as train_student with:
    input:
        train=f"{DATA}/train.h5",
        val=f"{DATA}/val.h5",
        code=train_code,
        teacher=teacher_weights,
    wildcard_constraints:
        method="|".join(CFG.methods),
    # A student is too small to share: on a CPU, one thread each and many runs at once finish first.
    threads: 4 if GPU else 1
    resources:
        gpu=GPU,
        mem_mb=grow(6000),
        runtime=grow(240),
    params:
        teacher=lambda wildcards, input: option("--teacher", input.teacher),
