"""Tables as text: what a table is made of, and how it is written in Markdown, HTML and LaTeX."""

from collections.abc import Iterable
from html import escape
from typing import NamedTuple

import numpy as np


class Cell(NamedTuple):
    """Text of a table as it is read, before it is escaped."""

    text: str
    bold: bool = False


class Table(NamedTuple):
    """A table, ready to be written in any language. Rows are grouped by rules.

    A row of one cell is the title of a block.
    """

    key: str
    caption: str
    header: list[str]  # may have line breaks
    groups: list[list[list[Cell]]]
    notes: list[str]
    names: int  # columns that hold names; the others hold numbers


Sections = Iterable[tuple[str, list[Table]]]  # heading, tables


def number(mean: float, std: float = float("nan"), digits: int = 3, sign: str = "") -> str:
    """Write a number, with its standard deviation if there is one.

    >>> number(-0.25, 0.125), number(0.5, digits=1, sign="+")
    ('−0.250 ± 0.125', '+0.5')
    """
    text = f"{mean:{sign}.{digits}f}" + (f" ± {std:.{digits}f}" if np.isfinite(std) else "")
    return text.replace("-", "−")


def significant(value: float) -> str:
    """Write three digits, without an exponent.

    >>> significant(1234.5), significant(0.2957)
    ('1234', '0.296')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def p_value(value: float) -> str:
    """Write the p of a test; nothing where there was none."""
    return "" if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def markdown(sections: Sections) -> str:
    """Return sections of tables as Markdown; captions stand above their table, notes below it."""
    parts = []
    for heading, tables in sections:
        parts.append(f"## {_markdown(heading)}")
        for table in tables:
            lines = [[_markdown(text.replace("\n", " ")) for text in table.header]]
            lines.append(["---"] * table.names + ["---:"] * (len(table.header) - table.names))
            for row in (row for group in table.groups for row in group):
                cells = [f"**{_markdown(c.text)}**" if c.bold else _markdown(c.text) for c in row]
                lines.append(
                    cells if len(row) > 1 else [f"*{cells[0]}*", *[""] * (len(table.header) - 1)]
                )
            parts.append(_markdown(table.caption))
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            if table.notes:
                parts.append(_markdown(" ".join(table.notes)))
    return "\n\n".join(parts) + "\n"


STYLE = """
body {
  font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a;
  max-width: 75em; margin: 1.5em auto; padding: 0 1.5em
}
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .7em; text-align: left; vertical-align: top; white-space: nowrap }
td.number, th.number { text-align: right }
thead th { border-bottom: 2px solid #444; white-space: pre; vertical-align: bottom }
tbody { border-bottom: 1px solid #aaa }
.block { font-style: italic }
.note { font-size: 13px; color: #444; max-width: 60em }
.wide { overflow-x: auto }
pre { font: 13px/1.4 ui-monospace, monospace; overflow-x: auto }
"""


def html(sections: Sections) -> str:
    """Return sections of tables as the body of a page.

    Captions stand above their table, notes below it.
    """
    parts = []
    for heading, tables in sections:
        parts.append(f"<h2>{escape(heading)}</h2>")
        for table in tables:
            kinds = ["name"] * table.names + ["number"] * (len(table.header) - table.names)
            heads = "".join(
                f'<th class="{kind}">{escape(text)}</th>'
                for kind, text in zip(kinds, table.header, strict=True)
            )
            bodies = "".join(
                "<tbody>" + "\n".join(_html_row(row, kinds) for row in group) + "</tbody>"
                for group in table.groups
            )
            parts.append(f"<p>{escape(table.caption)}</p>")
            parts.append(
                f'<div class="wide"><table><thead><tr>{heads}</tr></thead>{bodies}</table></div>'
            )
            parts += [f'<p class="note">{escape(" ".join(table.notes))}</p>'] if table.notes else []
    return "\n".join(parts)


def _html_row(row: list[Cell], kinds: list[str]) -> str:
    if len(row) == 1 < len(kinds):
        return f'<tr><td class="block" colspan="{len(kinds)}">{escape(row[0].text)}</td></tr>'
    texts = [escape(cell.text) for cell in row]
    texts = [f"<b>{text}</b>" if cell.bold else text for text, cell in zip(texts, row, strict=True)]
    return (
        "<tr>"
        + "".join(f'<td class="{k}">{t}</td>' for k, t in zip(kinds, texts, strict=True))
        + "</tr>"
    )


def page(title: str, body: str) -> str:
    """Return a whole HTML page that needs no other file."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def tex(sections: Sections) -> str:
    """Return the tables of all sections in LaTeX (package `booktabs`)."""
    parts = [r"% Needs \usepackage{booktabs}; read it with \input."]
    for table in (table for _, tables in sections for table in tables):
        left, width = table.names, len(table.header)
        body = [
            " \\\\\n".join(
                " & ".join(rf"\textbf{{{_tex(c.text)}}}" if c.bold else _tex(c.text) for c in row)
                if len(row) > 1
                else rf"\multicolumn{{{width}}}{{l}}{{\textit{{{_tex(row[0].text)}}}}}"
                for row in group
            )
            for group in table.groups
        ]
        notes = " ".join(table.notes)
        parts.append("\n".join([
            r"\begin{table*}[t]", r"\centering", r"\footnotesize",
            rf"\caption{{{_tex(table.caption)}}}", rf"\label{{tab:{table.key}}}",
            rf"\begin{{tabular}}{{{'l' * left}{'r' * (width - left)}}}", r"\toprule",
            " & ".join(map(_tex_head, table.header)) + r" \\", r"\midrule",
            " \\\\\n\\midrule\n".join(body) + r" \\", r"\bottomrule", r"\end{tabular}",
            *([rf"\par\smallskip\raggedright {_tex(notes)}"] if notes else []),
            r"\end{table*}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


_MARKDOWN = str.maketrans({c: "\\" + c for c in "\\|*`"})
_TEX = str.maketrans({
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "|": "$|$", "<": "$<$", ">": "$>$", "±": r"$\pm$", "−": "$-$", "×": r"$\times$",
    "Δ": r"$\Delta$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "→": r"$\to$", "λ": r"$\lambda$", "¹": "$^1$", "²": "$^2$", "–": "--",
})  # fmt: skip


def _markdown(text: str) -> str:
    return text.translate(_MARKDOWN)


def _tex(text: str) -> str:
    return text.translate(_TEX)


def _tex_head(text: str) -> str:
    lines = [_tex(line) for line in text.split("\n")]
    return lines[0] if len(lines) == 1 else r"\shortstack[r]{" + r" \\ ".join(lines) + "}"
