"""The runs of a leaderboard as its folder of results holds them, and those that another folder brings."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vzip.errors import ManifestError
from vzip.json_files import read_json
from vzip.results.record import RECORD_NAME, Run, primary_scores, read_record

logger = logging.getLogger(__name__)

FILE_NAME = "leaderboard.json"
KIND, SCHEMA_VERSION = "leaderboard", 1
VANILLA = "vanilla"
# What makes two runs' models one, beside the weights; of the configuration, where it was kept.
_OF_MODEL = ("class", "dtype", "preprocess")
_OF_CONFIG = (
    *("projector_sha256", "adapter_sha256", "quantization"),
    *("num_frames", "drop_padding", "row_newline", "drop_cls", "fps", "min_frame_pixels", "max_frame_pixels"),
)
_OF_PROTOCOL = ("limit", "seed", "gen_kwargs", "system_prompt")


@dataclass(frozen=True)
class Entry:
    """One run of a leaderboard.

    Attributes:
        method, budget: as ``config.board.Cell`` names them.
        run: its record.
        cost: ``median_ms`` by stage and ``kv_cache_bytes``; None where it was not measured.
        machine: that its cost was measured on.
        text_aware: whether what it keeps depends on the question.
        origin: a name of the folder it was taken over from; empty for one's own.
    """

    method: str
    budget: str
    run: Run
    cost: Mapping[str, Any] | None
    machine: str
    text_aware: bool = False
    origin: str = ""

    @property
    def name(self) -> str:
        return f"{self.method} ({self.origin})" if self.origin else self.method

    @property
    def folder(self) -> str:
        """Of its record, within the folder of results."""
        own = f"{self.method}-{self.budget}".replace("/", "-")
        return f"runs/{own}" if not self.origin else f"runs/{self.origin}/{own}"


def read_folder(folder: Path) -> list[Entry]:
    """The entries of a folder of results.

    Raises:
        ManifestError: it holds none, or not what it should.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise ManifestError(f"{folder}: holds no {FILE_NAME}; it must be the folder that a leaderboard wrote.")
    try:
        table = read_json(path)
        if not isinstance(table, dict) or table.get("kind") != KIND or table.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"no leaderboard of schema_version {SCHEMA_VERSION}")
        entries = []
        for row in table["entries"]:
            place = (folder / row["run"] / RECORD_NAME).resolve()
            if not place.is_relative_to(folder.resolve()):
                raise ValueError(f"{row['run']} lies outside")
            run = Run(place, read_record(place))
            words = row["method"], row["budget"], row["machine"], row["origin"]
            if not all(isinstance(word, str) for word in words):
                raise ValueError(f"{words!r} are not all words")
            aware, origin = bool(row.get("text_aware")), Path(row["origin"]).name  # it becomes a folder's name
            entries.append(Entry(row["method"], row["budget"], run, row["cost"], row["machine"], aware, origin))
        if len({(e.method, e.budget, e.origin) for e in entries}) < len(entries):
            raise ValueError("a run stands in it twice")
        if lost := {"", *(e.origin for e in entries)} - {e.origin for e in entries if e.method == VANILLA}:
            raise ValueError(f"no vanilla run{' of ' + ', '.join(sorted(lost)) if any(lost) else ''}")
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path}: cannot be used ({error!r:.200}).") from error
    return entries


def merge(entries: Sequence[Entry], folders: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """One's own entries and those of other folders, of the same model and protocol; and what is to be said of them.

    Raises:
        ManifestError: naming everything in which a folder's runs differ.
    """
    found, said = list(entries), []
    vanilla = next(entry for entry in entries if entry.method == VANILLA)
    for folder in folders:
        theirs = mergeable(folder, vanilla.run.record)
        names = _names(found, theirs, folder.resolve().name)
        for entry in theirs:
            own = replace(entry, origin=names[entry.origin])
            if any((e.method, e.origin) == (VANILLA, own.origin) for e in found) and own.method == VANILLA:
                continue  # the very run
            same = [e for e in found if (e.method, e.budget) == (own.method, own.budget)]
            if same and own.method != VANILLA:
                equal = primary_scores(same[0].run.record) == primary_scores(own.run.record)
                said.append(
                    f"{own.method} at {own.budget} is in {folder} too, with {'the same' if equal else 'other'} scores:"
                    f" {same[0].origin or 'our own'} is shown"
                )
            else:
                found.append(own)
    for text in said:
        logger.warning("%s", text)
    return found, said


def mergeable(folder: Path, record: Mapping[str, Any]) -> list[Entry]:
    """The entries of a folder, all of the model and protocol of a record; raises as ``merge``."""
    theirs = read_folder(folder)
    apart: dict[str, list[str]] = {}
    for entry in theirs:
        for text in differences(record, entry.run.record):
            apart.setdefault(text, []).append(f"{entry.name} {entry.budget}")
    if apart:
        raise ManifestError(
            f"{folder}: cannot be merged, its runs are of another model, protocol or data:\n"
            + "\n".join(
                f"  {'all' if len(names) == len(theirs) else ', '.join(names)}: {text}" for text, names in apart.items()
            )
        )
    return theirs


def _names(found: Sequence[Entry], theirs: Sequence[Entry], folder: str) -> dict[str, str]:
    """A folder's origins by the names that they get here: the same for one vanilla run, no other twice."""
    names: dict[str, str] = {}
    for entry in (each for each in theirs if each.method == VANILLA):
        known = [e.origin for e in found if e.method == VANILLA and e.run.record == entry.run.record]
        wished = entry.origin or folder or "other"
        taken = {e.origin for e in found} | set(names.values())
        free = (name for n in itertools.count(1) if (name := wished if n == 1 else f"{wished}-{n}") not in taken)
        names[entry.origin] = known[0] if known else next(free)
    return names


def differences(record: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two runs' model, protocol and data differ, as sentences."""
    ours, theirs = record["model"], other["model"]
    weights: tuple[str, ...] = ("weights_sha256",)
    if not (ours.get("weights_sha256") and theirs.get("weights_sha256")):
        weights = ("name_or_path", "revision")
    pairs = [(f"model.{key}", ours.get(key), theirs.get(key)) for key in (*weights, *_OF_MODEL)]
    first, second = (((r.get("config") or {}).get("model") or {}) for r in (record, other))
    pairs += [(f"model.{key}", first.get(key), second.get(key)) for key in _OF_CONFIG]
    pairs += [(key, record.get(key), other.get(key)) for key in _OF_PROTOCOL]
    pairs.append(("tasks", sorted(record["tasks"]), sorted(other["tasks"])))
    for task in sorted(record["tasks"].keys() & other["tasks"].keys()):
        data, others = (r.get("data", {}).get(task, {}) for r in (record, other))
        for key in ("revision", "questions_sha256"):
            pairs.append((f"data of {task}: {key}", data.get(key), others.get(key)))
    return [f"{name} is {b!r:.80}, ours {a!r:.80}" for name, a, b in pairs if a != b]
