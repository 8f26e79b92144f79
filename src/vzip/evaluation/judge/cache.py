"""Replies of judge models kept on disk, so that no question is paid for twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vzip.errors import ManifestError
from vzip.json_files import from_json

_TABLE = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL) WITHOUT ROWID"

_DAMAGED = "not a sound cache of judge replies ({}). Remove it, or name another with --cache FILE."


class ReplyCache:
    """Replies by the content of what was asked. Each is on disk as soon as it is put; processes may share a file.

    Args:
        path: the file; made if absent.

    Raises:
        ManifestError: the file is something else, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=60, check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(_TABLE)
        except (sqlite3.DatabaseError, OSError) as error:
            raise ManifestError(f"{path}: {_DAMAGED.format(error)}") from error

    @staticmethod
    def key(request: Mapping[str, Any]) -> str:
        """A digest of everything that decides a reply."""
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put under ``key``; None where nothing was, or what is there is damaged.

        Raises:
            ManifestError: the file is damaged.
        """
        try:
            with self._lock:
                row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        except sqlite3.DatabaseError as error:
            raise ManifestError(f"{self.path}: {_DAMAGED.format(error)}") from error
        return None if row is None else _entry(row[0])

    def put(self, key: str, reply: Mapping[str, Any]) -> None:
        """Keeps a reply, in place of an earlier one.

        Raises:
            ManifestError: it cannot be written; the disk may be full.
        """
        try:
            with self._lock:
                self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, json.dumps(reply)))
        except sqlite3.DatabaseError as error:
            raise ManifestError(f"{self.path}: a reply cannot be kept ({error}). Free some room and go on.") from error

    def close(self) -> None:
        """Ends the use of the file."""
        self._database.close()


def _entry(content: object) -> dict[str, Any] | None:
    """A reply as it was put; None for anything else."""
    try:
        entry = from_json(content) if isinstance(content, str | bytes) else None
    except ValueError:
        return None
    sound = isinstance(entry, dict) and isinstance(entry.get("text"), str) and "served_model" in entry
    return entry if sound else None
