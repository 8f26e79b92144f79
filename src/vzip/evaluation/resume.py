"""Answers kept while a run is under way, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lmms import SampleLog


def fingerprint(settings: dict[str, Any]) -> str:
    """A digest of everything that decides the answers; equal settings give equal digests."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


class AnswerStore:
    """A file of answers, one JSON line each, headed by the fingerprint of the settings they belong to.

    Answers of other settings are discarded. A last line that was cut off by the interruption is ignored.

    Args:
        path: the file; made if absent.
        settings_digest: see ``fingerprint``.
    """

    def __init__(self, path: Path, settings_digest: str) -> None:
        self.path = path
        self._known: dict[tuple[str, int], SampleLog] = {}
        head = {"settings": settings_digest}
        kept = self._read(head)
        # Rewritten whole, so that a line cut off in the middle cannot spoil the one appended after it.
        with path.open("w") as file:
            for line in [head, *kept]:
                file.write(json.dumps(line) + "\n")
        self._file = path.open("a")
        self.num_resumed = len(kept)

    def _read(self, head: dict[str, str]) -> list[dict[str, Any]]:
        from .lmms import SampleLog

        if not self.path.exists():
            return []
        lines = [text for text in self.path.read_text().split("\n")[:-1] if text]  # the last piece has no line end
        if not lines or json.loads(lines[0]) != head:
            return []
        kept = [json.loads(text) for text in lines[1:]]
        for line in kept:
            key = (line["task"], line["doc_id"])
            self._known[key] = SampleLog(line["prompt"], line["answer"], line["num_visual_tokens"])
        return kept

    def find(self, key: tuple[str, int], prompt: str) -> SampleLog | None:
        """The answer to question ``key`` if it was asked with this very prompt."""
        log = self._known.get(key)
        return log if log is not None and log.prompt == prompt else None

    def add(self, key: tuple[str, int], log: SampleLog) -> None:
        """Keeps one more answer, at once on disk."""
        line = {"task": key[0], "doc_id": key[1], **vars(log)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self, *, delete: bool) -> None:
        """Ends the store; ``delete`` once the run's record holds the answers."""
        self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)
