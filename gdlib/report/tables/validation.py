"""Scores on validation images, out of the headers of weights: what weights of losses are chosen by,
far from any test image.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from gdlib import io
from gdlib.evaluate.metrics import METRICS, is_better
from gdlib.evaluate.scores import worth


def write(
    weights: Sequence[Path | str],
    csv: Path | str,
    markdown: Path | str,
    main: Mapping[str, str],
    ablations: Mapping[str, str],
) -> None:
    """Collect the validation scores of trained networks, and say which value of each ablation is
    the best.

    Args:
        weights: of all runs of a study.
        csv: every score, in long form.
        markdown: one row per dataset, network and ablation, one column per value.
        main: metric that decides, by dataset.
        ablations: their titles, by name.
    """
    rows, seen = [], {}
    for path in weights:
        header = io.read_header(path)
        run = header["run"]
        key = run["dataset"], run["network"], run["method"]
        for segmenter, scores in header["validation"].items():
            rows += [
                (*key, run["seed"], segmenter, metric, value) for metric, value in scores.items()
            ]
        first = header["validation"][run["segmenters"][0]]
        seen.setdefault(key, []).append(worth(first, main[run["dataset"]]))
    io.write_rows(
        csv, ("dataset", "network", "method", "seed", "segmenter", "metric", "value"), rows
    )

    means = {key: fmean(values) for key, values in seen.items()}
    lines = [
        "Scores on the validation split, less what was found in images without objects, means "
        "over seeds; in bold the best of each row.",
        "",
    ]
    for dataset, network in dict.fromkeys(key[:2] for key in means):
        own = {
            method: value for (d, n, method), value in means.items() if (d, n) == (dataset, network)
        }
        metric = main[dataset]
        title = f"{METRICS[metric].title} of {network} on {dataset}"
        groups = {
            name: {m: v for m, v in own.items() if m.startswith(f"{name}=")} for name in ablations
        }
        varied = {method for group in groups.values() for method in group}
        lines += [f"| {title} | |", "|---|---|"]
        lines += [
            f"| {method} | {value:.3f} |" for method, value in own.items() if method not in varied
        ]
        for name, group in groups.items():
            best = None
            for method, value in group.items():
                best = method if best is None or is_better(metric, value, group[best]) else best
            cells = [
                f"{m.partition('=')[2]}: " + ("**{:.3f}**" if m == best else "{:.3f}").format(v)
                for m, v in group.items()
            ]
            if cells:
                lines.append(f"| {ablations[name]} | {', '.join(cells)} |")
        lines.append("")
    io.write_text(markdown, "\n".join(lines))
