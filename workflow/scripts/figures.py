"""One figure of one dataset: the `snakemake` object becomes one call."""

import sys

from gdlib.report.figures import make

sys.stdout = sys.stderr = open(snakemake.log[0], "w", buffering=1)  # noqa: SIM115

make.draw(
    snakemake.params.figure,
    dict(snakemake.input.items()),
    dict(snakemake.params.items()),
    list(snakemake.output),
)
