"""Validation scores of a study: the `snakemake` object becomes one call."""

import sys

from gdlib.report.tables import validation

sys.stdout = sys.stderr = open(snakemake.log[0], "w", buffering=1)  # noqa: SIM115

validation.write(
    snakemake.input.weights, **dict(snakemake.output.items()), **dict(snakemake.params.items())
)
