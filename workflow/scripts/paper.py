"""Tables of the paper: the `snakemake` object becomes one call."""

import sys

from gdlib.report.tables import paper

sys.stdout = sys.stderr = open(snakemake.log[0], "w", buffering=1)  # noqa: SIM115

paper.write(
    snakemake.input.metrics,
    snakemake.input.profiles,
    snakemake.input.weights,
    **dict(snakemake.output.items()),
    **dict(snakemake.params.items()),
)
