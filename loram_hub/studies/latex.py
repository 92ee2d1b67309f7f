r"""Tables in LaTeX, for papers: booktabs, captions and labels; `\usepackage{booktabs}` is all that they need."""

from __future__ import annotations

from loram_hub.studies.aggregation import Spread
from loram_hub.studies.cells import Entry
from loram_hub.studies.tables import Table

_ESCAPES = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "\n": " ",
        "\r": " ",
    }
)


def latex_table(table: Table, *, study: str = "study") -> str:
    r"""Return a table as a `table` environment.

    Args:
        table: what to write.
        study: name of the study, the first part of the label: `\ref{tab:study-losses}`.
    """
    head = " & ".join(latex_text(column) for column in table.columns)
    body = "\n".join(f"    {' & '.join(_entry(entry) for entry in row)} \\\\" for row in table.rows)
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{latex_text(table.caption)}}}",
            rf"  \label{{tab:{study}-{table.name}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"    \toprule",
            rf"    {head} \\",
            r"    \midrule",
            body,
            r"    \bottomrule",
            r"  \end{tabular}",
            "",
            rf"  \footnotesize {latex_text(table.note)}",
            r"\end{table}",
        ]
    )


def latex_text(text: str) -> str:
    """Escape what LaTeX would take for commands; line breaks become spaces."""
    return text.translate(_ESCAPES)


def _entry(entry: Entry) -> str:
    if entry.value is None:
        return r"\textit{missing}"
    if isinstance(entry.value, str):
        return latex_text(entry.value)
    assert isinstance(entry.value, Spread)
    mean, deviation, seeds = entry.parts
    number = rf"\mathbf{{{mean}}}" if entry.bold else mean
    text = rf"${number} \pm {deviation}$" if deviation else f"${number}$"
    return f"{text} ({seeds} seeds)" if seeds else text
