"""What was downloaded: size and SHA-256 of each file as it first arrived, in ``NAME.lock.json`` beside the data."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vzip.errors import ManifestError
from vzip.json_files import read_json

from .manifest import Manifest, ManifestFile


@dataclass(frozen=True)
class LockEntry:
    """A file as it first arrived. ``extracted`` counts the members unpacked from it, None before that."""

    url: str
    num_bytes: int
    sha256: str
    extracted: int | None = None


class Lock:
    """The lock file of one manifest in one data folder; every change is written at once, whole or not at all."""

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self.path = root / f"{manifest.name}.lock.json"
        self.entries: dict[str, LockEntry] = {}
        if self.path.exists():
            try:
                raw = read_json(self.path)
                self.entries = {path: LockEntry(**entry) for path, entry in raw.items()}
            except (ValueError, TypeError, AttributeError) as error:
                raise ManifestError(
                    f"{self.path}: not a lock file ({error}). Remove it: the files are then checked against the"
                    " manifest alone and recorded anew."
                ) from error

    def record(self, path: str, entry: LockEntry) -> None:
        """Adds or replaces an entry."""
        self.entries[path] = entry
        text = json.dumps({name: asdict(known) for name, known in sorted(self.entries.items())}, indent=2)
        aside = self.path.with_name(self.path.name + ".writing")
        aside.write_text(text + "\n", encoding="utf-8")
        os.replace(aside, self.path)

    def check(self, file: ManifestFile, at: Path) -> LockEntry:
        """Compares a file on disk with the manifest and with what was recorded, and records it if nothing was.

        Raises:
            ManifestError: size or checksum differ.
        """
        known = self.entries.get(file.path)
        num_bytes = at.stat().st_size
        for expected, whose in ((file.num_bytes, "the manifest"), (known and known.num_bytes, "the lock file")):
            if expected is not None and num_bytes != expected:
                raise ManifestError(
                    f"{at}: {num_bytes} bytes, {expected} by {whose}: cut off or another file. Remove it and"
                    " download again."
                )
        with at.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        right = file.sha256 or (known.sha256 if known else None)
        if right is not None and sha256 != right:
            by = f"the manifest ({file.checksum_source})" if file.sha256 else f"{self.path.name}, as it first arrived"
            raise ManifestError(
                f"{at}: SHA-256 {sha256}, expected {right} by {by}: damaged, or its origin changed it. Remove it and"
                " download again; if that does not help, the manifest's entry is out of date."
            )
        entry = LockEntry(file.url or "", num_bytes, sha256, known.extracted if known else None)
        if entry != known:
            self.record(file.path, entry)
        return entry
