"""Tables as text, for the terminal, Markdown and LaTeX."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDEST = 1000  # characters; no table comes near
_LATEX = str.maketrans({c: f"\\{c}" for c in "&%#_$"} | {"‡": r"$^\ddagger$", "~": r"$\sim$", "→": r"$\to$"})


@dataclass(frozen=True)
class Piece:
    """A cell's text."""

    text: str = ""
    bold: bool = False


@dataclass(frozen=True)
class Layout:
    """A table as text: a head, blocks of lines that belong together, and remarks below.

    Attributes:
        left: numbers of the columns that are words; the others are numbers, and stand to the right.
    """

    title: str
    head: tuple[str, ...]
    blocks: tuple[tuple[tuple[Piece, ...], ...], ...]
    remarks: tuple[str, ...]
    left: frozenset[int] = frozenset()


def print_layout(layout: Layout, console: Console) -> None:
    """Prints to the terminal; a narrower one than the table needs wraps its lines rather than squeezing every cell."""
    shown = Table(title=layout.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(layout.head):
        shown.add_column(name, justify="left" if number in layout.left else "right", no_wrap=True)
    for block in layout.blocks:
        for number, line in enumerate(block):
            texts = [Text(piece.text, style="bold" if piece.bold else "") for piece in line]
            shown.add_row(*texts, end_section=number == len(block) - 1)
    needed = Measurement.get(console, console.options.update(width=WIDEST), shown).maximum
    given, console.width = console.width, max(console.width, needed)
    console.print(shown)
    console.width = given
    for remark in layout.remarks:
        # A path or a command stays whole, so that it can be copied.
        lines = textwrap.wrap(remark, given, break_long_words=False, break_on_hyphens=False)
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def to_markdown(layout: Layout) -> str:
    """GitHub Markdown; an empty title is left out."""
    sides = ["---" if number in layout.left else "---:" for number in range(len(layout.head))]
    lines = [list(layout.head), sides]
    lines += [[f"**{p.text}**" if p.bold else p.text for p in line] for block in layout.blocks for line in block]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    title = f"**{layout.title}**" if layout.title else ""
    return "\n\n".join(filter(None, (title, body, "\n".join(f"- {remark}" for remark in layout.remarks)))) + "\n"


def to_latex(layout: Layout) -> str:
    """A ``table`` with booktabs rules; needs ``\\usepackage{booktabs}``."""
    sides = "".join("l" if number in layout.left else "r" for number in range(len(layout.head)))
    blocks = ("".join(_latex_line(line) for line in block) for block in layout.blocks)
    remarks = "".join(f"  {remark.translate(_LATEX)}\\par\n" for remark in layout.remarks)
    return (
        "\\begin{table}\n"
        f"  \\caption{{{layout.title.translate(_LATEX)}}}\n"
        f"  \\begin{{tabular}}{{{sides}}}\n  \\toprule\n"
        + _latex_line([Piece(name) for name in layout.head])
        + "  \\midrule\n"
        + "  \\midrule\n".join(blocks)
        + f"  \\bottomrule\n  \\end{{tabular}}\n  \\footnotesize\n{remarks}\\end{{table}}\n"
    )


def _latex_line(line: Sequence[Piece]) -> str:
    texts = (piece.text.translate(_LATEX) for piece in line)
    return "  " + " & ".join(f"\\textbf{{{t}}}" if p.bold else t for p, t in zip(line, texts, strict=True)) + " \\\\\n"
