"""The index of a LLaVA-format file: where each record lies and what sampling must know of it.

The file is read through a memory map, a few megabytes at a time, and the index is a memory-mapped table of 48 bytes a
record, so memory does not grow with the data. It is built once and kept in the cache folder under the file's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vzip.errors import ManifestError

from .llava_record import NUM_KEY_BYTES, RecordError, parse_record

logger = logging.getLogger(__name__)

# A change to the table or to the rules of a record needs a new version, or old indexes would be read.
INDEX_VERSION = 3
ROW = np.dtype(
    [
        ("start", "<i8"),  # the record's first byte in the file
        ("num_bytes", "<i4"),
        ("num_words", "<i4"),
        ("num_images", "<i4"),  # and videos
        ("source", "<i4"),  # number in the list of sources
        ("id_hash", "<u8"),  # to find repeated ids; 0 where there is none
        ("key", "u1", NUM_KEY_BYTES),
    ]
)
WINDOW_BYTES = 4 * 2**20
MAX_RECORD_BYTES = 64 * 2**20
_ROWS_PER_WRITE = 8192
_MAX_PROBLEMS_KEPT = 1000
_SPACE = b" \t\r\n"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Index:
    """Rows of the good records, in the file's order, and what was wrong with the others; ``folder`` holds them."""

    folder: Path
    rows: np.ndarray
    sources: list[str]
    num_problems: int
    problems: list[str]


def cache_folder() -> Path:
    """``$VZIP_CACHE``, by default ``~/.cache/vzip``."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vzip"
    return Path(os.environ.get("VZIP_CACHE") or default)


def load_index(path: Path, cache: Path | None = None) -> Index:
    """Returns the file's index, building it where the cache has none.

    Raises:
        ManifestError: no such file, or not JSON.
    """
    if not path.is_file():
        raise ManifestError(f"{path}: {'is a directory, not a file' if path.is_dir() else 'no such file'}.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = (cache or cache_folder()) / "llava_index" / f"{digest[:32]}-v{INDEX_VERSION}"
    if not (folder / "index.json").exists():
        _build_aside(path, folder)
    return open_index(folder)


def open_index(folder: Path) -> Index:
    """Opens a built index without looking at the file it was built from."""
    about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    shape = (about["num_records"],)
    rows = np.memmap(folder / "rows.bin", dtype=ROW, mode="r", shape=shape) if shape[0] else np.empty(0, ROW)
    return Index(folder, rows, about["sources"], about["num_problems"], about["problems"])


def _build_aside(path: Path, folder: Path) -> None:
    """Builds in a temporary folder and renames it, so that a killed or second process leaves nothing half done."""
    logger.info("indexing %s (%.1f MB), once", path, path.stat().st_size / 1e6)
    try:
        _build_and_rename(path, folder)
    except OSError as error:
        raise ManifestError(
            f"{folder}: the index of {path} cannot be written ({error}). Make room or give the rights, or set"
            " VZIP_CACHE to another folder."
        ) from error


def _build_and_rename(path: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        work = Path(temporary) / "index"
        work.mkdir()
        about = _build(path, work)
        (work / "index.json").write_text(json.dumps(about), encoding="utf-8")
        try:
            work.rename(folder)
        except OSError:
            if not (folder / "index.json").exists():  # a damaged index, not another process's
                shutil.rmtree(folder)
                work.rename(folder)


def _build(path: Path, work: Path) -> dict[str, Any]:
    """Writes ``rows.bin``; returns what goes into ``index.json``."""
    sources: dict[str, int] = {}
    problems: list[str] = []
    num_records = num_problems = 0
    with (work / "rows.bin").open("wb") as table:
        rows: list[tuple[Any, ...]] = []
        for number, (start, raw) in enumerate(read_records(path)):
            try:
                rows.append(_row(start, raw, sources))
                num_records += 1
            except RecordError as error:
                num_problems += 1
                if len(problems) < _MAX_PROBLEMS_KEPT:
                    problems.append(f"record {number} (byte {start}): {error}")
            if len(rows) == _ROWS_PER_WRITE:
                np.array(rows, dtype=ROW).tofile(table)
                rows.clear()
        np.array(rows, dtype=ROW).tofile(table)
    return {
        "num_records": num_records,
        "sources": list(sources),
        "num_problems": num_problems,
        "problems": problems,
    }


def _row(start: int, raw: bytes, sources: dict[str, int]) -> tuple[Any, ...]:
    try:
        record = parse_record(json.loads(raw))
    except UnicodeDecodeError as error:
        raise RecordError(f"is not UTF-8 ({error.reason} at byte {start + error.start})") from error
    id_hash = hashlib.blake2b((record.id or "").encode(), digest_size=8).digest()
    return (
        start,
        len(raw),
        record.num_words,
        len(record.files),
        sources.setdefault(record.source, len(sources)),
        int.from_bytes(id_hash, "little") if record.id is not None else 0,
        np.frombuffer(record.key, dtype=np.uint8),
    )


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (first byte, bytes) of every element of a JSON array, or of every object of a JSON-lines file.

    Memory stays at a few times the longest record.

    Raises:
        ManifestError: empty, cut off, or not JSON; with the byte and the line.
    """
    if path.stat().st_size == 0:
        raise ManifestError(f"{path}: the file is empty (0 bytes).")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scanner = _Scanner(path, data)
        yield from scanner.records()


class _Scanner:
    """Finds the records in a memory-mapped file.

    The window is decoded as Latin-1, in which a character is a byte: JSON's own signs are ASCII, so positions in the
    text are positions in the file, whatever the strings hold.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data = path, data
        self.base, self.text = 0, ""

    def records(self) -> Iterator[tuple[int, bytes]]:
        position = self._skip_space(3 if self.data[:3] == b"\xef\xbb\xbf" else 0)
        is_array = self.data[position : position + 1] == b"["
        if is_array:
            position = self._skip_space(position + 1)
            if self.data[position : position + 1] == b"]":
                return self._expect_end(position + 1)
        while True:
            end = self._object_end(position)
            yield position, self.data[position:end]
            position = self._skip_space(end)
            if is_array:
                sign = self.data[position : position + 1]
                if sign == b"]":
                    return self._expect_end(position + 1)
                if sign != b",":
                    raise self._error(position, "expected ',' or ']' after a record")
                position = self._skip_space(position + 1)
            elif position == len(self.data):
                return None

    def _object_end(self, position: int) -> int:
        """The byte after the object that begins at ``position``."""
        if self.data[position : position + 1] != b"{":
            raise self._error(position, "expected a record, an object that begins with '{'")
        width = WINDOW_BYTES
        if not self.base <= position < self.base + len(self.text):
            self._load(position, width)
        while True:
            try:
                return self.base + _DECODER.raw_decode(self.text, position - self.base)[1]
            except json.JSONDecodeError as error:
                whole = self.base + len(self.text) == len(self.data) or width > MAX_RECORD_BYTES
                if whole:
                    raise self._error(self.base + error.pos, error.msg) from error
            except RecursionError as error:
                raise self._error(position, "a record nested too deeply") from error
            # The record may only be cut off by the window: begin the window with it, and widen that if need be.
            width *= 2 if self.base == position else 1
            self._load(position, width)

    def _load(self, position: int, width: int) -> None:
        self.base, self.text = position, self.data[position : position + width].decode("latin-1")

    def _skip_space(self, position: int) -> int:
        while position < len(self.data) and self.data[position] in _SPACE:
            position += 1
        return position

    def _expect_end(self, position: int) -> None:
        position = self._skip_space(position)
        if position < len(self.data):
            raise self._error(position, "nothing may follow the closing ']'")

    def _error(self, position: int, reason: str) -> ManifestError:
        line, at = 1, self.data.find(b"\n", 0, position)
        while at != -1:
            line, at = line + 1, self.data.find(b"\n", at + 1, position)
        what = "the file ends too early" if position >= len(self.data) else reason
        return ManifestError(
            f"{self.path}: not readable as JSON at byte {position} of {len(self.data)}, line {line}: {what}. It must be"
            " a JSON array of LLaVA-format records (or one record a line); a file that ends early was cut off while it"
            " was written or downloaded."
        )
