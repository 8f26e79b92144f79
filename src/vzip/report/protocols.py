"""Numbers that other methods' papers print, ``tables/protocols/NAME.json``: one file a source, since no two are alike.

Each source asked other benchmarks in another way and averaged otherwise, so its numbers stand beside each other and,
marked as such, beside our own scores, and never beside another source's or the paper's tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vzip.errors import ConfigError, ManifestError, nearest
from vzip.json_files import read_json
from vzip.methods import find_method, method_names
from vzip.results.layout import Layout, Piece
from vzip.results.record import Run, score_of, unit_factor

from .paper_tables import Column
from .table_files import FOLDER, read_columns

PROTOCOLS_FOLDER = FOLDER / "protocols"
# What these sources print and the paper's tables do not; the first two no evaluation here measures.
_OWN = {
    "average": Column("average", "Avg %", "percent"),
    "accuracy": Column("accuracy", "accuracy", "percent"),
    "mme_perception": Column("mme_perception", "MME-P", "points", "mme", "mme_perception_score"),
    "refcoco": Column("refcoco", "RefCOCO val", "percent", "refcoco_bbox_rec_val", "refcoco_ACC@0.5"),
    "ocrbench": Column("ocrbench", "OCRBench", "percent", "ocrbench_mean", "ocrbench_accuracy"),
}
_KEYS = frozenset(("name", "title", "source", "arxiv", "second_hand", "copied", "protocol", "notes", "tables"))
_ASKED = ("prompt", "ocr_candidates", "mme", "benchmarks", "average")
# Options of configs/compressor and configs/pruner by the names that sources print; at another setting than the file's
# (as DivPrune + Cen) a method has no entry.
OPTIONS: Mapping[str, str] = {
    "CDPruner": "cdpruner",
    "DART": "dart",
    "DivPrune": "divprune",
    "FasterVLM": "fastervlm",
    "FlowCut": "flowcut",
    "HoloV": "holov",
    "MMTok": "mmtok",
    "PruMerge": "prumerge",
    "PruMerge+": "prumerge_plus",
    "PruneSID": "prunesid",
    "SCOPE": "scope",
    "VisPruner": "vispruner",
    "VisionZip": "visionzip",
    "ZOO-Prune": "zooprune",
}


@dataclass(frozen=True)
class PublishedRow:
    """A method at a budget.

    Attributes:
        tokens: visual tokens an image, or the budget as printed where it is no number of them ("20 %").
        method: as printed.
        values: by column; what the source does not give is absent.
    """

    tokens: int | str
    method: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class PublishedTable:
    """Rows of one model.

    Attributes:
        model: as printed; what is particular about the benchmarks follows it.
        option: the option of configs/model that it is; None: none here, or other benchmarks than its runs have.
        of: visual tokens of the full model, None where they vary.
        crops: in how many crops an image is shown, each with its part of the tokens.
        columns: what the rows give.
        full: the full model's numbers by column, where the source gives them.
        rows: the methods.
    """

    model: str
    option: str | None
    of: int | None
    crops: int
    columns: tuple[Column, ...]
    full: Mapping[str, float]
    rows: tuple[PublishedRow, ...]


@dataclass(frozen=True)
class Protocol:
    """A source of numbers.

    Attributes:
        name, title, source: what it is called here, and where it is printed.
        arxiv: number of the paper, None where it is not known.
        second_hand: whether it was read elsewhere than in its paper.
        copied: methods whose rows the source took over from another paper.
        asked: how it asked and scored: prompt, OCR candidates, which sum of MME, benchmarks, average.
        notes: what else a reader must know.
        tables: the numbers.
    """

    name: str
    title: str
    source: str
    arxiv: str | None
    second_hand: bool
    copied: frozenset[str]
    asked: Mapping[str, str]
    notes: tuple[str, ...]
    tables: tuple[PublishedTable, ...]

    def is_second_hand(self, method: str) -> bool:
        return self.second_hand or method in self.copied


def protocol_names() -> list[str]:
    """Names of the sources, those with a letter first."""
    return sorted((path.stem for path in PROTOCOLS_FOLDER.glob("*.json")), key=lambda name: (len(name) > 1, name))


@cache
def read_protocol(name: str) -> Protocol:
    """Reads a source's numbers.

    Raises:
        ConfigError: there is no such source.
        ManifestError: the file is not one; the message names file, table and row.
    """
    known = protocol_names()
    if name not in known:
        raise ConfigError(f"--protocol {name}: no such protocol{nearest(name, known)}; there are {', '.join(known)}.")
    path = PROTOCOLS_FOLDER / f"{name}.json"
    try:
        return parse_protocol(path, read_json(path))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ManifestError(f"{path} is no protocol: {type(error).__name__} {error}; see A.json beside it.") from error


def parse_protocol(path: Path, content: Mapping[str, Any]) -> Protocol:
    """A source from the content of its file; errors as of ``read_protocol``."""
    wrong = sorted(_KEYS ^ content.keys())
    if wrong or sorted(content["protocol"]) != sorted(_ASKED):
        raise ManifestError(
            f"{path}: {', '.join(wrong) or 'protocol'}: a file must have {', '.join(sorted(_KEYS))}, and its protocol"
            f" {', '.join(_ASKED)}."
        )
    if content["name"] != path.stem:
        raise ManifestError(f"{path}: name is {content['name']!r}, must be the file's, {path.stem!r}.")
    tables = tuple(_table(path, table) for table in content["tables"])
    methods = {row.method for table in tables for row in table.rows}
    for method in sorted(set(content["copied"]) - methods):
        raise ManifestError(f"{path}: copied names {method!r}, of which there is no row{nearest(method, methods)}.")
    return Protocol(
        content["name"],
        content["title"],
        content["source"],
        content["arxiv"],
        content["second_hand"],
        frozenset(content["copied"]),
        content["protocol"],
        tuple(content["notes"]),
        tables,
    )


def _table(path: Path, table: Mapping[str, Any]) -> PublishedTable:
    known = {**read_columns(), **_OWN}
    where = f"{path}, table of {table['model']}"
    for key in table["columns"]:
        if key not in known:
            raise ManifestError(f"{where}: column {key!r} is not known{nearest(key, known)}.")
    rows = tuple(
        PublishedRow(
            row["tokens"], row["method"], _values(f"{where}, {row['method']}", table["columns"], row["values"])
        )
        for row in table["rows"]
    )
    labels = [(row.tokens, row.method) for row in rows]
    for tokens, method in sorted({label for label in labels if labels.count(label) > 1}, key=str):
        raise ManifestError(f"{where}: row {tokens}, {method} stands there twice.")
    full = _values(f"{where}, full", table["columns"], table["full"]) if "full" in table else {}
    columns = tuple(known[key] for key in table["columns"])
    return PublishedTable(table["model"], table["option"], table["of"], table.get("crops", 1), columns, full, rows)


def _values(where: str, keys: Sequence[str], numbers: Sequence[float | None]) -> dict[str, float]:
    if len(numbers) != len(keys):
        raise ManifestError(f"{where}: {len(numbers)} numbers for {len(keys)} columns.")
    for key, number in zip(keys, numbers, strict=True):
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise ManifestError(f"{where}: {key} is {number!r}, must be a number or null.")
    return {key: number for key, number in zip(keys, numbers, strict=True) if number is not None}


def lay_out_published(protocol: Protocol, runs: Iterable[Run]) -> list[Layout]:
    """A source's tables, below each row our own scores where there is a run of that model, method and budget."""
    found = list(runs)
    layouts = [_lay_out(protocol, table, found) for table in protocol.tables]
    arxiv = f" (arXiv {protocol.arxiv})" if protocol.arxiv else ""
    remarks = [f"source: {protocol.source}{arxiv}{'; read second-hand' if protocol.second_hand else ''}"]
    remarks += [f"{key.replace('_', ' ')}: {protocol.asked[key]}" for key in _ASKED]
    remarks += protocol.notes
    if protocol.copied:
        remarks.append("second-hand: the source took these rows over from another paper")
    if any(line[3].text == "ours" for layout in layouts for block in layout.blocks for line in block):
        remarks.append("ours: our own runs, asked by the paper's protocol (python -m vzip table 1), not by this one")
    last = layouts[-1]
    return [*layouts[:-1], Layout(last.title, last.head, last.blocks, tuple(remarks), last.left)]


def _lay_out(protocol: Protocol, table: PublishedTable, runs: Sequence[Run]) -> Layout:
    of = "" if table.of is None else f", {table.of} visual tokens"
    blocks: list[list[tuple[Piece, ...]]] = []
    if table.full:
        blocks.append([(Piece("full"), Piece(), Piece(), Piece("published"), *_pieces(table, table.full))])
    for tokens in dict.fromkeys(row.tokens for row in table.rows):
        lines = []
        for row in (row for row in table.rows if row.tokens == tokens):
            mark = "second-hand" if protocol.is_second_hand(row.method) else ""
            published = (Piece(str(tokens)), Piece(row.method), Piece(mark), Piece("published"))
            lines.append((*published, *_pieces(table, row.values)))
            if ours := our_scores(table, row, runs):
                lines.append((Piece(), Piece(), Piece(), Piece("ours"), *_pieces(table, ours)))
        blocks.append(lines)
    head = ("tokens", "method", "", f"protocol {protocol.name}", *(column.title for column in table.columns))
    return Layout(f"{protocol.title}: {table.model}{of}", head, tuple(map(tuple, blocks)), (), frozenset({1, 2, 3}))


def _pieces(table: PublishedTable, values: Mapping[str, float]) -> list[Piece]:
    texts = {key: f"{value:.1f}" if round(value, 1) == value else f"{value:g}" for key, value in values.items()}
    texts |= {c.key: f"{values[c.key]:g}" for c in table.columns if c.unit == "points" and c.key in values}
    return [Piece(texts.get(column.key, "")) for column in table.columns]


def our_scores(table: PublishedTable, row: PublishedRow, runs: Iterable[Run]) -> dict[str, float]:
    """Scores of our newest runs of a row's model, method and budget, by column and in its unit."""
    scores: dict[str, float] = {}
    for run in sorted(runs, key=lambda run: str(run.record.get("created"))):
        if not _is_of(table, row, run.record):
            continue
        for column in table.columns:
            score = score_of(run.record, column.task, column.metric) if column.task and column.metric else None
            if score is not None and column.task is not None:
                factor = unit_factor(run.record["tasks"][column.task]["unit"], column.unit, str(run.path))
                scores[column.key] = round(score.value * factor, 1)
    return scores


def _is_of(table: PublishedTable, row: PublishedRow, record: Mapping[str, Any]) -> bool:
    config = record.get("config") or {}
    model, budget = config.get("model") or {}, config.get("budget") or {}
    compressor, pruner = (config.get(group) or {} for group in ("compressor", "pruner"))
    option = OPTIONS.get(row.method, "")
    if table.option is None or model.get("name") != table.option or model.get("projector") or record.get("provisional"):
        return False
    dominant, contextual = budget.get("num_dominant"), budget.get("num_contextual")
    if dominant is None or contextual is None or "_target_" in pruner or option not in method_names():
        return False
    usual = {key: value for key, value in find_method(option).settings.items() if key != "seed"}
    as_usual = all(compressor.get(key) == value for key, value in usual.items())
    return compressor.get("name") == option and as_usual and (dominant + contextual) * table.crops == row.tokens
