"""Fetching a manifest's files: continued, checked, recorded, unpacked; nothing half done ever looks done.

A file grows as ``NAME.part`` and takes its name when size and SHA-256 are right. What is unpacked is known by its size,
so a killed run goes on where it was.
"""

from __future__ import annotations

import errno
import lzma
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
from filelock import FileLock, Timeout
from rich.console import Console

from vzip.errors import ManifestError
from vzip.log import keeping
from vzip.progress import Progress

from .fetch import fetch, forget, new_client, remote_size
from .lock import Lock
from .manifest import Manifest, ManifestFile, is_inside

# The index and checkpoints need room too: a disk is not filled to the last byte.
SPARE_BYTES = 2**30
_ENCRYPTED = 1  # in the flags of an archive's entry


class Downloader:
    """Fetches files of one manifest into one folder.

    Args:
        manifest: what to fetch.
        root: the data folder; made if it is not there.
        num_attempts: for each file in one run; see ``fetch``.
        max_wait_s: longest pause between attempts.
        console: where progress is shown.
        client: to fetch with, by default ``new_client()``.
    """

    def __init__(
        self,
        manifest: Manifest,
        root: Path,
        *,
        num_attempts: int = 8,
        max_wait_s: float = 60.0,
        console: Console | None = None,
        client: httpx.Client | None = None,
    ) -> None:
        self.manifest, self.root = manifest, root
        self.num_attempts, self.max_wait_s = num_attempts, max_wait_s
        self.console = console or Console(stderr=True, markup=False)
        self.client = client or new_client()
        root.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(manifest, root)

    def run(self, files: Sequence[ManifestFile], *, extract: bool = True, delete_archives: bool = False) -> None:
        """Fetches, checks and unpacks the files that have an address.

        Args:
            files: which of the manifest's files.
            extract: unpack the archives.
            delete_archives: remove each archive once it is unpacked.

        Raises:
            ManifestError: too little room, an address that does not answer, a wrong size or checksum, a damaged
                archive, a full disk, another download into the same folder. What has arrived stays and is continued by
                the next run.
        """
        kept = keeping(lambda: f"what has arrived is kept in {self.root}")
        with kept, self._alone(), _full_disk_named(self.root):
            wanted = [file for file in files if file.url is not None and not self._is_done(file)]
            self._check_room(wanted, extract)
            for file in wanted:
                self._fetch(file)
                if extract and file.extract_to is not None:
                    self._unpack(file)
                    if delete_archives:
                        (self.root / file.path).unlink()

    def _is_done(self, file: ManifestFile) -> bool:
        """Whether the archive was unpacked and then removed."""
        entry = self.lock.entries.get(file.path)
        done = entry is not None and entry.extracted is not None and not (self.root / file.path).exists()
        if done:
            self.console.print(
                f"{file.path}: unpacked and removed before (to repeat it, remove it from {self.lock.path})"
            )
        return done

    def _check_room(self, files: Sequence[ManifestFile], extract: bool) -> None:
        needed = sum(self._bytes_needed(file, extract) for file in files)
        free = shutil.disk_usage(self.root).free
        if needed and needed + SPARE_BYTES > free:
            raise ManifestError(
                f"{self.root}: {needed / 1e9:.1f} GB are needed{' (archives and what is in them)' if extract else ''}"
                f" and {SPARE_BYTES / 1e9:.1f} GB to spare, {free / 1e9:.1f} GB are free. Name another --root, fetch"
                " part of it with --only, or free some room."
            )

    def _bytes_needed(self, file: ManifestFile, extract: bool) -> int:
        """Room for what is still to come of a file and of its unpacked content (images are compressed already)."""
        target, part = self._places(file)
        extract = extract and file.extract_to is not None
        if target.exists():
            return _bytes_to_unpack(target, self.root / str(file.extract_to)) if extract else 0
        size = file.num_bytes or remote_size(self.client, str(file.url))
        arrived = part.stat().st_size if part.exists() else 0
        return max(0, size - arrived) + (size if extract else 0)

    def _places(self, file: ManifestFile) -> tuple[Path, Path]:
        """Where the file lies in the end, and where it grows."""
        target = self.root / file.path
        return target, target.with_name(target.name + ".part")

    def _fetch(self, file: ManifestFile) -> None:
        target, part = self._places(file)
        if target.exists():
            self.lock.check(file, target)
            self.console.print(f"{file.path}: there, and as recorded")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        arrived = part.stat().st_size if part.exists() else 0
        with Progress(file.path, "bytes", file.num_bytes, done=arrived, console=self.console) as progress:
            fetch(
                self.client,
                str(file.url),
                part,
                num_attempts=self.num_attempts,
                max_wait_s=self.max_wait_s,
                on_progress=progress.update,
                on_failure=lambda reason: self.console.print(f"{file.path}: {reason}; trying again"),
            )
        try:
            entry = self.lock.check(file, part)
        except ManifestError:
            forget(part)  # a wrong file is not to be continued
            raise
        os.replace(part, target)
        forget(part)
        known = "as published" if file.sha256 else f"none published, recorded in {self.lock.path.name}"
        self.console.print(f"{file.path}: SHA-256 {entry.sha256} ({known})")

    def _unpack(self, file: ManifestFile) -> None:
        archive, folder = self.root / file.path, self.root / str(file.extract_to)
        with _archive(archive) as opened:
            members = _members(archive, opened)
            with Progress(f"unpacking {file.path}", "files", len(members), console=self.console) as progress:
                for member in progress.track(members):
                    if not _is_unpacked(member, folder):
                        opened.extract(member, folder)
        self.lock.record(file.path, replace(self.lock.entries[file.path], extracted=len(members)))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs must not write to the same ``.part``."""
        try:
            with FileLock(self.root / f".{self.manifest.name}.downloading", blocking=False):
                yield
        except Timeout as error:
            raise ManifestError(f"{self.root}: another run is downloading {self.manifest.name} here.") from error


def _bytes_to_unpack(archive: Path, folder: Path) -> int:
    with _archive(archive) as opened:
        return sum(member.file_size for member in _members(archive, opened) if not _is_unpacked(member, folder))


def _members(archive: Path, opened: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in an archive.

    Raises:
        ManifestError: one that is encrypted, a link, or has a name that is none or would leave the folder.
    """
    members = [member for member in opened.infolist() if not member.is_dir()]
    for member in members:
        mode = member.external_attr >> 16
        if member.flag_bits & _ENCRYPTED:
            problem = "is encrypted"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            problem = "is a link or a device, not a file"
        elif not is_inside(member.filename):
            problem = "has a name that is too long, or that would leave the folder"
        else:
            continue
        raise ManifestError(
            f"{archive}: {member.filename!r:.200} in it {problem}. Nothing was unpacked. It is not the archive that was"
            " published for this; remove it and look where it comes from, or unpack it by hand."
        )
    return members


def _is_unpacked(member: zipfile.ZipInfo, folder: Path) -> bool:
    at = folder / member.filename
    return at.is_file() and at.stat().st_size == member.file_size


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as opened:
            yield opened
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, struct.error, lzma.LZMAError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path}: not a sound zip archive ({error}). Remove it and download again.") from error
    except (NotImplementedError, RuntimeError) as error:
        raise ManifestError(f"{path}: cannot be unpacked here ({error}). Unpack it by hand.") from error


@contextmanager
def _full_disk_named(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ManifestError(
            f"{root}: the disk is full. What has arrived is kept: free some room and run the same command again."
        ) from error
