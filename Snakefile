"""From images to tables and figures: config.yaml says which study is run, config/ what there is to run."""

import sys
from pathlib import Path

from snakemake.utils import min_version

from gdlib.config import ConfigError, load

min_version("9.20")


ROOT = str(workflow.current_basedir)  # of this file, whoever includes it

# The catalogue, config.yaml, and what --configfile and --config say: each changes what was before it. Snakemake's own reading
# of config.yaml, below, would forget the first of two equal keys.
try:
    CFG = load(ROOT, *workflow.configfiles, changes=workflow.config_settings.config)
except (ValueError, OSError) as error:
    sys.exit(f"{error}")


configfile: Path(ROOT) / "config.yaml"


# For workflow/report/workflow.rst.
config.update(study=CFG.study, only=list(CFG.only))
config["studies"] = {CFG.study: CFG.selected.model_dump(mode="json")}


include: "workflow/rules/environment.smk"
include: "workflow/rules/common.smk"
include: "workflow/rules/raw.smk"
include: "workflow/rules/download.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/predict.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/tuning.smk"
include: "workflow/rules/progress.smk"


rule all:
    default_target: True
    input:
        rules.summarize.output,
        rules.provenance.output,
        PAPER,
        FIGURES,


onstart:
    start_watching()


onsuccess:
    stop_watching()
    print_warnings()
    print_results()


onerror:
    stop_watching()
    print_warnings()
