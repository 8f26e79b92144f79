"""By what a directory's files are known to be those that were written: ``digests.json``."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vzip.errors import CheckpointError
from vzip.json_files import read_json, to_json

DIGESTS_NAME = "digests.json"


def write_digests(directory: Path) -> None:
    """Writes down the SHA-256 of every file of a directory and of the folders in it."""
    digests = {name: sha256(directory / name) for name in _files(directory)}
    (directory / DIGESTS_NAME).write_bytes(digests_file(digests))


def digests_file(digests: dict[str, str]) -> bytes:
    """What ``digests.json`` holds of files whose SHA-256 is given by their names."""
    return to_json({"sha256": digests, "of_these": _of_table(digests)}, indent=1) + b"\n"


def check_digests(directory: Path, mend: str) -> None:
    """Holds every file against its digest.

    Args:
        directory: that ``write_digests`` was called for.
        mend: what is to be done, ending the message.

    Raises:
        CheckpointError: naming the files that are missing, or not as they were written.
    """
    try:
        content = read_json(directory / DIGESTS_NAME)
        digests = content["sha256"]
        if not digests or content["of_these"] != _of_table(digests):
            raise ValueError("it is not as it was written itself")
        wrong = [f"{name} ({found})" for name in digests if (found := _problem(directory / name, digests[name]))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory}: damaged; its {DIGESTS_NAME}, which says what its files must be, cannot be read"
            f" ({type(error).__name__}: {error}). {mend}"
        ) from error
    if wrong:
        raise CheckpointError(f"{directory}: damaged; not as written: {', '.join(wrong)}. {mend}")


def _of_table(digests: dict[str, str]) -> str:
    return hashlib.sha256(to_json(sorted(digests.items()))).hexdigest()


def _problem(path: Path, digest: object) -> str | None:
    if not path.is_file():
        return "missing"
    return None if sha256(path) == digest else "another SHA-256"


def sha256(path: Path) -> str:
    """A file's digest; read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(directory: Path) -> list[str]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != DIGESTS_NAME)
    return sorted(path.relative_to(directory).as_posix() for path in files)
