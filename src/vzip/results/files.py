"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vzip.errors import RunWriteError, VzipError
from vzip.json_files import to_json

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes through a neighbour and renames it; RunWriteError if that cannot be."""
    replace_file(path, to_json(value, indent=2) + b"\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The same, one line a row."""
    replace_file(path, b"".join(to_json(row) + b"\n" for row in rows))


def replace_file(path: Path, content: str | bytes) -> None:
    """The same, of any content; text is written as UTF-8."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


@contextmanager
def written_aside(path: Path, sync: bool = True) -> Iterator[Path]:
    """A neighbour to write to, of the same ending, which takes the file's place if the block ends well.

    Args:
        path: of the file.
        sync: have it on the disk before; without that a crash of the machine may leave a file of other content.

    Raises:
        RunWriteError: it cannot be written; what was there before is untouched.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.tmp{path.suffix}")
    with naming_the_file(path):
        try:
            yield aside
            if sync:
                with aside.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raises RunWriteError where a folder, or what is there of the way to it, cannot be written; leaves nothing."""
    with naming_the_file(folder):
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        # Tried, since rights do not tell: root has them in /proc too, and on a disk that is mounted to be read only.
        with tempfile.TemporaryFile(dir=there):
            pass


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it; RunWriteError if that cannot be."""
    with naming_the_file(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Turns what the system says of a full disk, a lost mount or missing rights into a RunWriteError."""
    try:
        yield
    except VzipError:
        raise  # some are OSErrors too
    except OSError as error:
        raise _write_error(path, error) from error


@contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Turns a full disk, met in the block by whoever writes, into a RunWriteError; ``path`` if no file is told."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _write_error(Path(error.filename or path), error) from error


def _write_error(path: Path, error: OSError) -> RunWriteError:
    return RunWriteError(
        f"{path}: cannot be written ({error.strerror or error}). Answers written before are kept: make room or give"
        " the rights, then start the same command again, and it goes on from there."
    )
