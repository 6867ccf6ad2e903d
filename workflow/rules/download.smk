"""Raw data that are missing: `download=true` fetches them and goes on, the target `download` stops there.

Nothing is fetched unasked.
"""


rule download:
    input:
        expand(f"{RAW}/{{folder}}/{RECORD}", folder=FETCHED),
    localrule: True
    message:
        "All data of the study are there"


if FETCHED:

    rule fetch:
        output:
            f"{RAW}/{{folder}}/{RECORD}",
        log:
            "logs/download/{folder}.log",
        wildcard_constraints:
            folder="|".join(map(re.escape, FETCHED)),
        localrule: True
        conda:
            "../../envs/gdlib.yaml"
        threads: ALL_CORES  # one connection at a time
        resources:
            gpu=0,
            mem_mb=grow(500),
            runtime=grow(600),
        params:
            files=lambda wildcards: compact(
                [
                    file.model_dump(mode="json")
                    for file in CFG.datasets[FETCHED[wildcards.folder]].download
                ]
            ),
            folder=lambda wildcards: os.path.join(RAW, wildcards.folder),
        message:
            "Download {params.folder}"
        shell:
            "python -m gdlib step download --files {params.files:q} --folder {params.folder:q}"
            " | tee {log:q}"
