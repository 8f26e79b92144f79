"""A filled table for reading, as a ``Layout``, and for programs (CSV, one line a cell).

Below each row of the paper stand, where there is a run, ours, the difference, retention against our own vanilla run (of
a cost: the factor saved), its 95 % interval, and how often both gave the same answer. Bold is only what is outside the
noise.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from vzip.evaluation.benchmarks.protocols import protocol_of
from vzip.results.layout import Layout, Piece
from vzip.results.paired import UNPAIRED

from .paper_tables import Mismatch, PaperTable
from .table_fill import FilledAverage, FilledCell, FilledRow

FORMATS = ("markdown", "latex", "csv")
DIFFERENCE = "difference: ours - paper, bold where it exceeds 1.96 of our standard errors and the paper's rounding"
RETENTION = (
    "retention: against our own vanilla run, bold where its 95 % interval leaves out 100 and McNemar's test, where"
    " answers are right or wrong, gives p < 0.05; each cell is judged for itself"
)
SAVED = "of a cost, retention is the factor saved against our own vanilla run on the same machine"
AGREEMENT = "same answers: share of questions to which our vanilla run gave the same answer, right or wrong, in percent"
PARTIAL = "Avg of n/m: over the n columns that ours has; its difference is to the paper's numbers over the same columns"
CSV_FIELDS = [
    "table",
    "tokens",
    "method",
    "benchmark",
    "unit",
    "paper",
    "paper_ratio",
    "ours",
    "standard_error",
    "difference",
    "difference_outside_noise",
    "ratio",
    "low",
    "high",
    "paired",
    "p_value",
    "num_lost",
    "num_gained",
    "agreement",
    "ratio_outside_noise",
    "provisional",
    "machine",
    "command",
    "reason",
    "mismatch",
    "record",
    "vanilla_record",
    "source",
]


def lay_out(table: PaperTable, rows: Sequence[FilledRow]) -> Layout:
    """The paper's layout with our lines below each row."""
    marks: list[Mismatch] = []
    head = ["tokens", "method", "", *(f"{c.column.title}{_unit(c)}" for c in rows[0].cells)]
    head += ["Avg %"] if table.average_over else []
    blocks = tuple(_block(row, marks) for row in rows)
    return Layout(
        f"{table.title} ({table.source})",
        tuple(head),
        blocks,
        tuple(_remarks(table, rows, marks)),
        left=frozenset({1, 2}),
    )


def _unit(cell: FilledCell) -> str:
    return f" ({cell.column.unit})" if cell.column.is_cost else ""


def _block(row: FilledRow, marks: list[Mismatch]) -> tuple[tuple[Piece, ...], ...]:
    average = [] if row.average is None else [row.average]
    lines = [("paper", [_paper(c, marks) for c in row.cells] + [_paper_average(a, marks) for a in average])]
    if row.row.run:
        lines += [
            ("ours", [_ours(c) for c in row.cells] + [_ours_average(a) for a in average]),
            ("difference", [_difference(c) for c in row.cells] + [_average_difference(a) for a in average]),
            ("retention", [_ratio(c) for c in row.cells] + [Piece() for _ in average]),
            ("95 %", [_interval(c) for c in row.cells] + [_average_interval(a) for a in average]),
            ("same answers", [_agreement(c) for c in row.cells] + [Piece() for _ in average]),
        ]
    # Blank lines say nothing, except that this row could be run.
    shown = [line for line in lines if line[0] == "ours" or any(piece.text for piece in line[1])]
    first = (Piece(str(row.row.tokens)), Piece(row.row.method))
    return tuple(
        (*(first if number == 0 else (Piece(), Piece())), Piece(name), *pieces)
        for number, (name, pieces) in enumerate(shown)
    )


def _number(value: float | None, cell: FilledCell) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 and cell.column.is_cost else f"{value:.1f}"


def _paper(cell: FilledCell, marks: list[Mismatch]) -> Piece:
    if cell.paper is None:
        return Piece()
    # As printed: percentages with one digit, everything else as it stands.
    text = f"{cell.paper:.1f}" if cell.column.unit == "percent" else f"{cell.paper:g}"
    return Piece(text + _mark(cell.mark, marks))


def _mark(mark: Mismatch | None, marks: list[Mismatch]) -> str:
    if mark is None:
        return ""
    marks.append(mark)
    return f" [{len(marks)}]"


def _ours(cell: FilledCell) -> Piece:
    return Piece(_number(cell.ours, cell) + ("*" if cell.provisional else ""))


def _difference(cell: FilledCell) -> Piece:
    text = "" if cell.difference is None else f"{cell.difference:+.1f}"
    return Piece(text, cell.difference_outside_noise)


def _ratio(cell: FilledCell) -> Piece:
    if cell.ratio is None:
        return Piece()
    text = f"{cell.ratio:.2f}x" if cell.column.is_cost else f"{100 * cell.ratio:.1f}"
    return Piece(text, cell.ratio_outside_noise)


def _interval(cell: FilledCell) -> Piece:
    paired = cell.paired
    if paired is None or paired.low is None or paired.high is None:
        return Piece()
    return Piece(f"{100 * paired.low:.1f} to {100 * paired.high:.1f}" + ("" if paired.is_paired else " ~"))


def _agreement(cell: FilledCell) -> Piece:
    if cell.paired is None or cell.paired.agreement is None:
        return Piece()
    return Piece(f"{100 * cell.paired.agreement:.1f}")


def _paper_average(average: FilledAverage, marks: list[Mismatch]) -> Piece:
    if average.paper is None:
        return Piece()
    return Piece(f"{average.paper:.1f}" + _mark(average.mark, marks))


def _ours_average(average: FilledAverage) -> Piece:
    if average.ours is None:
        return Piece()
    of = "" if average.num == average.of else f" of {average.num}/{average.of}"
    return Piece(f"{average.ours:.1f}{of}", average.outside_noise)


def _average_difference(average: FilledAverage) -> Piece:
    if average.ours is None or average.paper_same is None:
        return Piece()
    return Piece(f"{average.ours - average.paper_same:+.1f}")


def _average_interval(average: FilledAverage) -> Piece:
    return Piece() if average.low is None else Piece(f"{average.low:.1f} to {average.high:.1f}")


def _remarks(table: PaperTable, rows: Sequence[FilledRow], marks: Sequence[Mismatch]) -> list[str]:
    cells = [cell for row in rows for cell in row.cells]
    remarks = [f"[{number}] {mark.note}" for number, mark in enumerate(marks, 1)]
    remarks += list(table.notes)
    reasons: dict[str, list[str]] = {}
    for column in (cell.column for cell in rows[0].cells):
        if column.none is not None:
            reasons.setdefault(column.none, []).append(column.title)
    remarks += [f"{', '.join(titles)}: {why}" for why, titles in reasons.items()]
    remarks += [text for cell in rows[0].cells if (text := _protocol(cell)) is not None]
    if any(cell.difference is not None for cell in cells):
        remarks.append(DIFFERENCE)
    if any(cell.ratio is not None and not cell.column.is_cost for cell in cells):
        remarks.append(RETENTION)
    if any(cell.ratio is not None and cell.column.is_cost for cell in cells):
        remarks.append(SAVED)
    machines: dict[str, list[str]] = {}
    for cell in cells:
        if cell.machine is not None and cell.column.title not in machines.setdefault(cell.machine, []):
            machines[cell.machine].append(cell.column.title)
    remarks += [f"{', '.join(titles)}: ours on {machine}" for machine, titles in machines.items()]
    if any(_agreement(cell).text for cell in cells):
        remarks.append(AGREEMENT)
    if any(cell.paired is not None and not cell.paired.is_paired for cell in cells):
        remarks.append(UNPAIRED)
    if any(row.average is not None and 0 < row.average.num < row.average.of for row in rows):
        remarks.append(PARTIAL)
    provisional = dict.fromkeys(reason for cell in cells for reason in cell.provisional)
    return remarks + [f"*: provisional: {reason}" for reason in provisional]


def _protocol(cell: FilledCell) -> str | None:
    """How ours is asked or scored in another way than the paper's; None where it is not."""
    protocol = None if cell.column.task is None else protocol_of(cell.column.task)
    # What is said of a protocol is said of its primary metric.
    if protocol is None or protocol.primary != cell.column.metric or protocol.paper is None or not protocol.difference:
        return None
    return f"{protocol.paper}; ours: {protocol.difference}"


def to_csv(table: PaperTable, rows: Sequence[FilledRow]) -> str:
    """One line a cell with everything known of it; ratios are shares of 1."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        for cell in row.cells:
            writer.writerow(_csv_line(table, row, cell))
    return out.getvalue()


def _csv_line(table: PaperTable, row: FilledRow, cell: FilledCell) -> dict[str, object]:
    paired = cell.paired
    line: dict[str, object] = {
        "table": table.name,
        "tokens": row.row.tokens,
        "method": row.row.method,
        "benchmark": cell.column.key,
        "unit": cell.column.unit,
        "paper": cell.paper,
        "paper_ratio": cell.paper_ratio,
        "ours": cell.ours,
        "standard_error": cell.standard_error,
        "difference": cell.difference,
        "ratio": cell.ratio,
        "provisional": "; ".join(cell.provisional),
        "command": " ".join(cell.command),
        "machine": cell.machine,
        "reason": cell.reason,
        "mismatch": None if cell.mark is None else cell.mark.note,
        "record": cell.run,
        "vanilla_record": cell.vanilla,
        "source": f'{table.source}, row "{row.row.label}"',
    }
    if cell.difference is not None:
        line["difference_outside_noise"] = cell.difference_outside_noise
    if paired is not None:
        names = ("low", "high", "p_value", "num_lost", "num_gained", "agreement")
        line |= {name: getattr(paired, name) for name in names}
        line |= {"paired": paired.is_paired, "ratio_outside_noise": paired.outside_noise}
    return line
