"""One look for all figures: sizes, letters, lines, and how they are written."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gdlib import io

COLUMN, PAGE = 3.5, 7.2  # widths of a journal, in inches
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.1,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
    "pdf.fonttype": 42,  # embedded TrueType, as journals ask for
    "svg.hashsalt": "gdlib",
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches; no global state of pyplot is touched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(
    figure: Figure, stem: Path | str, formats: Iterable[str] = ("png", "pdf"), dpi: int = 200
) -> list[Path]:
    """Write a figure to `stem.format` for every format, atomically and without time stamps.

    Args:
        figure: what to write.
        stem: path without the ending.
        formats: `png`, `pdf` or `svg`.
        dpi: dots per inch of what is not drawn as vectors.

    Returns:
        The written paths.
    """
    unstamped: dict[str, dict] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
        "svg": {"Date": None, "Creator": None},
    }
    paths = []
    for form in formats:
        path = Path(f"{stem}.{form}")
        with mpl.rc_context(STYLE), io.atomic(path) as temporary:
            figure.savefig(temporary, format=form, dpi=dpi, metadata=unstamped[form])
        paths.append(path)
    return paths
