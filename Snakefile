"""Images to tables and figures: prepare -> train -> predict -> segment -> evaluate -> summarize.

`config.yaml` says what exists and which study is run; `snakemake --cores all` is the default study.
"""

import sys
from pathlib import Path

from snakemake.utils import min_version

from gdlib.config import Config, ConfigError

min_version("9.20")


configfile: Path(workflow.basedir) / "config.yaml"


try:
    CFG = Config.parse(config)
    for dataset in CFG.selected.datasets:
        if not Path(f"data/{dataset}/test.h5").exists():
            CFG.raw_folder(dataset)
except ConfigError as error:
    sys.exit(f"{error}")


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/predict.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        rules.summarize.output,
        expand(
            f"{RESULTS}/figures/{{dataset}}/{{figure}}.{{format}}",
            dataset=STUDY.datasets,
            figure=["methods", "tradeoff", "curves", "panel", "embeddings"],
            format=PLOT.formats,
        ),
