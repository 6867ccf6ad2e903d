"""Record of the study and its pages: the `snakemake` object becomes two calls."""

import sys

from gdlib.report.provenance import record, story

sys.stdout = sys.stderr = open(snakemake.log[0], "w", buffering=1)  # noqa: SIM115

found = record.record(
    snakemake.input.summary,
    snakemake.input.metrics,
    snakemake.input.profiles,
    **snakemake.params.known,
)
story.write(found, **dict(snakemake.output.items()), titles=snakemake.params.titles)
