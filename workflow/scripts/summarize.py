"""Tables of the study: the `snakemake` object becomes one call."""

import sys

from gdlib.report.tables import results

sys.stdout = sys.stderr = open(snakemake.log[0], "w", buffering=1)  # noqa: SIM115

results.write(
    snakemake.input.metrics,
    snakemake.input.profiles,
    **dict(snakemake.output.items()),
    keys=snakemake.params.metrics,
    main=snakemake.params.main,
    titles=snakemake.params.titles,
    budget=snakemake.params.budget,
    ablations=snakemake.params.ablations,
    baselines=snakemake.input.baselines,
    weights=snakemake.input.weights,
    images={
        dataset: (*snakemake.input.images[2 * number : 2 * number + 2], methods)
        for number, (dataset, methods) in enumerate(snakemake.params.unlabelled.items())
    },
)
