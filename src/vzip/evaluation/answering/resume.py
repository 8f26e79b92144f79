"""Answers kept while a run is under way, so that an interrupted run goes on where it stopped.

Each process writes a file of its own, one line a batch. At the next start the first process reads them all, whatever
their number, and hands the answers to the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.json_files import to_json
from vzip.results import provenance
from vzip.results.files import naming_the_file, replace_file

from .answers import SampleLog
from .processes import Processes
from .questions import Key, Question

if TYPE_CHECKING:
    from vzip.models.vlm import CompressedVlm

logger = logging.getLogger(__name__)

PARTIAL_NAME = "answers.partial.jsonl"
_PARTIAL_FILES = "answers.partial*.jsonl"
# Parts of a configuration that say where and how a run is carried out, not what is asked.
_NOT_ASKED = ("launcher", "paths", "overwrite", "dry_run")
_NOT_ASKED_OF_EVAL = ("batch_size", "num_workers", "on_problem", "tower_cache_gib", "visual_cache_gib", "trackers")


def settings_of(vlm: CompressedVlm, config: Mapping[str, Any] | None, **settings: Any) -> dict[str, str]:
    """Digests of everything that decides the answers beside the questions themselves, by name.

    Args:
        vlm: the wrapper that is asked.
        config: the resolved configuration, or None.
        settings: what else decides them.
    """
    model = vlm.model
    # A pruner that there is none of is no setting: runs from before there were any go on.
    left_out = _NOT_ASKED if vlm.pruner is not None else (*_NOT_ASKED, "pruner")
    asked = {key: value for key, value in (config or {}).items() if key not in left_out}
    if "eval" in asked:
        asked["eval"] = {key: value for key, value in asked["eval"].items() if key not in _NOT_ASKED_OF_EVAL}
    deciding = {
        "model": [vlm.name_or_path, type(model).__name__, str(model.dtype), model.num_parameters()],
        "weights": provenance.weights_sha256(vlm.name_or_path),
        "chat_template": getattr(vlm.processor, "chat_template", None),
        "config": asked,
        "compressor": repr(vlm.compressor),
        "preprocess": vlm.preprocess,
        "positions": vlm.positions,
        "code": provenance.source_sha256(),
        "versions": provenance.versions(),
        **({} if vlm.pruner is None else {"pruner": repr(vlm.pruner)}),
        **({"compile": vlm.compiled_parts} if vlm.compiled_parts else {}),
        **settings,
    }
    return {name: _digest(value) for name, value in deciding.items()}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class KeptAnswers:
    """What an interrupted run left.

    Attributes:
        answers: by question: the question's digest and what happened to it.
        sizes: how often how many questions were generated at once.
        chunk_size: to which the batches had been halved, or None.
        num_damaged: lines that are not what was written.
    """

    answers: dict[Key, tuple[str, SampleLog]] = field(default_factory=dict)
    sizes: Counter[int] = field(default_factory=Counter)
    chunk_size: int | None = None
    num_damaged: int = 0


class AnswerStore:
    """The answers of a run under way.

    A line holds a batch and a checksum. A last line that the interruption cut off is ignored; any other line that is
    not what was written is named and its questions are asked again. Answers of other settings are discarded, and the
    settings named.

    Args:
        run_dir: where the files are.
        settings: see ``settings_of``.
        processes: of this run. All must construct their store at the same time.

    Raises:
        RunWriteError: the file cannot be written.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, str], processes: Processes) -> None:
        self.run_dir = run_dir
        name = PARTIAL_NAME if processes.is_first else f"answers.partial.rank{processes.rank}.jsonl"
        self.path = run_dir / name
        head = json.dumps({"settings": settings})
        # What lies under these names is gone before another process writes there: it waits for the broadcast.
        self.kept = processes.broadcast(self._collect(head) if processes.is_first else KeptAnswers())
        if not processes.is_first:
            replace_file(self.path, head + "\n")
        with naming_the_file(self.path):
            self._file = self.path.open("ab", buffering=0)

    def _collect(self, head: str) -> KeptAnswers:
        """Reads all files and puts what is of use into the first process's."""
        kept, lines = KeptAnswers(), [head]
        old = sorted(self.run_dir.glob(_PARTIAL_FILES))
        for path in old:
            lines += _read(path, head, kept)
        replace_file(self.path, "".join(line + "\n" for line in lines))
        for path in old:
            if path != self.path:
                path.unlink()
        return kept

    def find(self, question: Question) -> SampleLog | None:
        """The answer to a question if it was asked in these very words."""
        digest, log = self.kept.answers.get(question.key, ("", None))
        return log if digest == question.digest else None

    def add(
        self, batch: Sequence[tuple[Question, SampleLog]], sizes: Sequence[int], chunk_size: int | None = None
    ) -> None:
        """Keeps one more batch, at once on disk: all of it or nothing.

        Args:
            batch: questions and what happened to them.
            sizes: how many of them were generated at once each time.
            chunk_size: to which batches have been halved, or None.

        Raises:
            RunWriteError: it cannot be written.
        """
        answers = [{"key": question.key, "digest": question.digest, **vars(log)} for question, log in batch]
        content = to_json({"answers": answers, "sizes": list(sizes), "chunk_size": chunk_size})
        left = memoryview(b'{"crc32": %d, "batch": %b}\n' % (zlib.crc32(content), content))
        with naming_the_file(self.path):
            while left:  # a disk that is almost full takes a part first
                left = left[self._file.write(left) :]

    def close(self) -> None:
        """Ends the store; the files stay."""
        self._file.close()

    def delete(self) -> None:
        """Removes the files of all processes, once the run's record holds the answers."""
        delete_answers(self.run_dir)


def kept_answers(run_dir: Path, num_questions: int | None = None) -> str:
    """What an interrupted run has kept, in words."""
    of = "" if num_questions is None else f" of {num_questions:,}"
    return f"{num_kept_answers(run_dir):,}{of} answers are kept in {run_dir}"


def num_kept_answers(run_dir: Path) -> int:
    """How many answers an interrupted run has kept, whatever its settings were."""
    kept = KeptAnswers()
    for path in run_dir.glob(_PARTIAL_FILES):
        _read(path, path.open(encoding="utf-8", errors="replace").readline().rstrip("\n"), kept)
    return len(kept.answers)


def delete_answers(run_dir: Path) -> None:
    """Removes what an interrupted run left."""
    for path in run_dir.glob(_PARTIAL_FILES):
        path.unlink(missing_ok=True)


def _read(path: Path, head: str, kept: KeptAnswers) -> list[str]:
    """Adds a file's answers to ``kept`` and returns its good lines."""
    first, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if first != head:
        logger.warning("%s: not used, %s", path, _why_not(first, head))
        return []
    good, damaged = [], []
    for number, line in enumerate(lines[:-1], 2):  # behind the last line's end there is nothing, or a piece of a line
        batch = _batch_of(line)
        if batch is None:
            damaged.append(number)
            continue
        good.append(line)
        for answer in batch["answers"]:
            task, doc_id, copy = answer["key"]
            log = SampleLog(answer["prompt"], answer["answer"], answer["num_visual_tokens"], answer.get("layers"))
            kept.answers[task, doc_id, copy] = (answer["digest"], log)
        kept.sizes.update(batch["sizes"])
        if (chunk_size := batch.get("chunk_size")) is not None:
            kept.chunk_size = min(chunk_size, kept.chunk_size or chunk_size)
    if damaged:
        kept.num_damaged += len(damaged)
        shown = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
        logger.warning("%s: %d damaged lines (%s): their questions are asked again", path, len(damaged), shown)
    return good


def _batch_of(line: str) -> dict[str, Any] | None:
    """What a line holds, or None if it is not what was written."""
    start, marker, rest = line.partition(', "batch": ')
    content = rest[:-1]
    if not marker or start != f'{{"crc32": {zlib.crc32(content.encode())}' or rest[-1:] != "}":
        return None
    batch: dict[str, Any] = json.loads(content)
    return batch


def _why_not(first: str, head: str) -> str:
    try:
        theirs = json.loads(first)["settings"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return "its first line is damaged"
    ours = json.loads(head)["settings"]
    changed = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return f"its answers are of other settings ({', '.join(changed)})"
