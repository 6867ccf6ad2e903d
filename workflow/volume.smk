"""One volume that is too large for one machine, block by block: `docs/volumes.md` says how to use it.

snakemake --snakefile workflow/volume.smk --cores all --config input=volume.h5:raw model=weights.safetensors out=results/volume
"""

import math
import os
import sys

from snakemake.utils import min_version

min_version("9.20")

ROOT = os.path.dirname(workflow.basedir)
sys.path.insert(0, ROOT)

from gdlib.volumes.grid import options
from gdlib.text import read_yaml

try:
    read_yaml(*workflow.configfiles)
    CHOSEN = options(config)
except (ValueError, OSError) as error:
    sys.exit(f"{error}")


include: "rules/environment.smk"


GRID, OUT, WEIGHTS = CHOSEN["grid"], str(CHOSEN["out"]), str(CHOSEN["model"])
PLAN, NUMBERS = f"{OUT}/plan.json", f"{OUT}/numbers.h5"
PREDICTIONS, SEGMENTS = f"{OUT}/predictions", f"{OUT}/segments"
MATCHES, LABELS = f"{OUT}/matches", f"{OUT}/labels"
RESULT = f"{OUT}/{CHOSEN['labels']}"
SETTINGS = {"overlap": GRID.overlap, "parameters": CHOSEN["parameters"]}
MILLIONS = math.prod(GRID.sides) / 1e6  # pixels of a block
AROUND = math.prod(n + 2 * o for n, o in zip(GRID.sides, GRID.overlap)) / 1e6
PER_PIXEL = 350 if CHOSEN["segmenter"] == "mutex_watershed" else 150  # bytes


wildcard_constraints:
    block=r"\d+(-\d+)+",


rule all:
    default_target: True
    input:
        RESULT,


rule plan_volume:
    input:
        image=CHOSEN["file"],
        weights=WEIGHTS,
    output:
        PLAN,
    log:
        f"{OUT}/logs/plan.log",
    benchmark:
        f"{OUT}/benchmarks/plan.tsv"
    conda:
        "../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(3000),
        runtime=grow(600),
    params:
        image=CHOSEN["input"],
        block=compact(GRID.block),
        segmenter=CHOSEN["segmenter"],
    message:
        f"Plan {len(GRID.names)} blocks of {'x'.join(map(str, GRID.sides))} pixels"
    shell:
        "python -m gdlib step plan-volume --image {params.image:q} --weights {input.weights:q} --out {output:q}"
        " --block {params.block:q} --segmenter {params.segmenter} > {log:q} 2>&1"


rule predict_block:
    input:
        plan=PLAN,
        weights=WEIGHTS,
    output:
        temp(f"{PREDICTIONS}/{{block}}.h5"),
    log:
        f"{OUT}/logs/predict/{{block}}.log",
    benchmark:
        f"{OUT}/benchmarks/predict/{{block}}.tsv"
    conda:
        "../envs/gdlib.yaml"
    threads: THREADS
    resources:
        gpu=GPU,
        mem_mb=grow(6000 + 30 * MILLIONS),
        runtime=grow(60),
    message:
        "Predict block {wildcards.block}"
    shell:
        "python -m gdlib step predict-block --plan {input.plan:q} --name {wildcards.block} --weights {input.weights:q}"
        " --out {output:q} --threads {threads} > {log:q} 2>&1"


rule segment_block:
    input:
        plan=PLAN,
        predictions=lambda wildcards: of_blocks(
            PREDICTIONS, GRID.touching(wildcards.block)
        ),
    output:
        temp(f"{SEGMENTS}/{{block}}.h5"),
    log:
        f"{OUT}/logs/segment/{{block}}.log",
    benchmark:
        f"{OUT}/benchmarks/segment/{{block}}.tsv"
    priority: 1  # before more is predicted, so that less of it waits
    conda:
        "../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000 + PER_PIXEL * AROUND),
        runtime=grow(60),
    params:
        folder=lambda wildcards: PREDICTIONS,
        settings=compact(SETTINGS),
    message:
        "Segment block {wildcards.block}"
    shell:
        "python -m gdlib step segment-block --plan {input.plan:q} --name {wildcards.block}"
        " --predictions {params.folder:q} --out {output:q} --settings {params.settings:q} > {log:q} 2>&1"


rule match_block:
    input:
        plan=PLAN,
        segments=lambda wildcards: of_blocks(
            SEGMENTS, [wildcards.block, *GRID.following(wildcards.block).values()]
        ),
    output:
        temp(f"{MATCHES}/{{block}}.h5"),
    log:
        f"{OUT}/logs/match/{{block}}.log",
    benchmark:
        f"{OUT}/benchmarks/match/{{block}}.tsv"
    conda:
        "../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000 + 40 * AROUND),
        runtime=grow(30),
    params:
        folder=lambda wildcards: SEGMENTS,
        overlap=compact(GRID.overlap),
    message:
        "Match block {wildcards.block} with the next ones"
    shell:
        "python -m gdlib step match-block --plan {input.plan:q} --name {wildcards.block}"
        " --segments {params.folder:q} --out {output:q} --overlap {params.overlap:q} > {log:q} 2>&1"


rule number_blocks:
    input:
        plan=PLAN,
        segments=of_blocks(SEGMENTS, GRID.names),
        matches=of_blocks(MATCHES, GRID.names),
    output:
        temp(NUMBERS),
    log:
        f"{OUT}/logs/number.log",
    benchmark:
        f"{OUT}/benchmarks/number.tsv"
    conda:
        "../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(2000 + len(GRID.names)),
        runtime=grow(120),
    params:
        segments=lambda wildcards: SEGMENTS,
        matches=lambda wildcards: MATCHES,
        min_size=CHOSEN["parameters"]["min_size"],
    message:
        "Number the objects of all blocks"
    shell:
        "python -m gdlib step number-blocks --plan {input.plan:q} --segments {params.segments:q}"
        " --matches {params.matches:q} --out {output:q} --min-size {params.min_size} > {log:q} 2>&1"


rule relabel_block:
    input:
        plan=PLAN,
        segments=f"{SEGMENTS}/{{block}}.h5",
        numbers=NUMBERS,
    output:
        temp(f"{LABELS}/{{block}}.h5"),
    log:
        f"{OUT}/logs/relabel/{{block}}.log",
    benchmark:
        f"{OUT}/benchmarks/relabel/{{block}}.tsv"
    conda:
        "../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000 + 20 * MILLIONS),
        runtime=grow(30),
    params:
        folder=lambda wildcards: SEGMENTS,
        overlap=compact(GRID.overlap),
    message:
        "Relabel block {wildcards.block}"
    shell:
        "python -m gdlib step relabel-block --plan {input.plan:q} --name {wildcards.block} --segments {params.folder:q}"
        " --numbers {input.numbers:q} --out {output:q} --overlap {params.overlap:q} > {log:q} 2>&1"


rule join_blocks:
    input:
        plan=PLAN,
        labels=of_blocks(LABELS, GRID.names),
    output:
        directory(RESULT) if RESULT.endswith(".zarr") else RESULT,
    log:
        f"{OUT}/logs/join.log",
    benchmark:
        f"{OUT}/benchmarks/join.tsv"
    conda:
        "../envs/gdlib.yaml"
    threads: 1
    resources:
        gpu=0,
        mem_mb=grow(1000),
        runtime=grow(600),
    params:
        folder=lambda wildcards: LABELS,
        about=compact(SETTINGS),
    message:
        "Write {output}"
    shell:
        "python -m gdlib step join-blocks --plan {input.plan:q} --labels {params.folder:q} --out {output:q}"
        " --about {params.about:q} > {log:q} 2>&1"
