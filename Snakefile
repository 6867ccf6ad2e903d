"""From images to tables and figures: config.yaml says what exists and which study is run."""

import sys
from pathlib import Path

from snakemake.utils import min_version

from gdlib.config import Config, ConfigError
from gdlib.text import read_yaml

min_version("9.20")


ROOT = str(workflow.current_basedir)  # of this file, whoever includes it


try:  # Snakemake takes the last of two equal keys and forgets the first
    read_yaml(Path(ROOT) / "config.yaml", *workflow.configfiles)
except (ValueError, OSError) as error:
    sys.exit(f"{error}")


configfile: Path(ROOT) / "config.yaml"


try:
    CFG = Config.parse(config)
except ConfigError as error:
    sys.exit(f"{error}")


include: "workflow/rules/common.smk"
include: "workflow/rules/raw.smk"
include: "workflow/rules/download.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/predict.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/tuning.smk"


rule all:
    default_target: True
    input:
        rules.summarize.output,
        rules.provenance.output,
        PAPER,
        FIGURES,


onsuccess:
    print_warnings()


onerror:
    print_warnings()
