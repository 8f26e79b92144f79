"""One process at a time writes a run directory."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vzip.errors import RunExistsError
from vzip.json_files import from_json

from .files import make_folder, naming_the_file

logger = logging.getLogger(__name__)

OWNER_NAME = ".owner"
_NOT_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_POLL_SECONDS = 0.2
_held: dict[Path, tuple[int, int]] = {}  # directories that this process owns: the thread that took it, its open file


class RunInUseError(RunExistsError):
    """A run directory that another process writes at this moment."""


@contextlib.contextmanager
def owning(directory: Path, key: str = "paths.run_dir=DIR", *, wait: bool = False) -> Iterator[None]:
    """Makes a directory this process's own for the block; the block may own it again.

    The system keeps the lock (``flock``, which NFS passes on to its server) and takes it back from a process that dies
    however it dies. A file system without locks is warned of. A directory that was made for this and holds nothing at
    the end goes again. Of the processes of one run the first owns the directory for all.

    Args:
        directory: which; made if absent.
        key: the setting that names another one, for the message.
        wait: until it is free, instead of refusing.

    Raises:
        RunInUseError: another process, or another thread of this one, owns it.
        RunWriteError: it cannot be made.
    """
    place = directory.resolve()
    if os.environ.get("RANK", "0") != "0" or (place in _held and _held[place][0] == threading.get_ident()):
        yield
        return
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    handle = _take(place, key, wait)
    _held[place] = threading.get_ident(), handle
    try:
        yield
    finally:
        if place in _held:  # else a forked process ends the block
            del _held[place]
            (place / OWNER_NAME).unlink(missing_ok=True)  # before it is let go: the next owner makes one of its own
            os.close(handle)
            for folder in made:
                with contextlib.suppress(OSError):  # something was written there
                    folder.rmdir()


def _let_go() -> None:
    """In a forked process, a reader of data say, which must not keep what its parent owned."""
    for _, handle in _held.values():
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def check_free(directory: Path, key: str = "paths.run_dir=DIR") -> None:
    """Refuses a directory that another process owns at this moment; makes nothing. Raises as ``owning``."""
    if (directory / OWNER_NAME).exists():
        with owning(directory, key):
            pass


def _take(place: Path, key: str, wait: bool) -> int:
    """The open and locked file of the owner."""
    path, is_told = place / OWNER_NAME, False
    while True:
        make_folder(place)
        with naming_the_file(path):
            try:
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # its last owner took the empty directory away
                continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, handle):
                return _sign(place, handle)
            os.close(handle)  # its last owner removed it meanwhile
        except BlockingIOError:
            owner = _told(handle)
            os.close(handle)
            if not wait:
                raise RunInUseError(
                    f"{place}: {owner} writes there at this moment. A directory has one writer at a time: wait until it"
                    f" ends, or name another with {key}."
                ) from None
            if not is_told:
                logger.info("%s: waiting for %s", place, owner)
                is_told = True
            time.sleep(_POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                os.close(handle)
                raise
            logger.warning(
                "%s: this file system has no locks (%s), so nothing keeps a second process from writing there too.",
                place,
                error.strerror,
            )
            return _sign(place, handle)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _sign(place: Path, handle: int) -> int:
    """Says in the file whose it is."""
    left = _content(handle)
    if left and left.get("host") != socket.gethostname():
        logger.warning("%s: left by %s, which did not end by itself; is it still running?", place, _told(handle))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now})
    with contextlib.suppress(OSError):  # a full disk; the lock holds without it
        os.ftruncate(handle, 0)
        os.pwrite(handle, mine.encode() + b"\n", 0)
    return handle


def _told(handle: int) -> str:
    content = _content(handle)
    if not content:
        return "another process"
    return f"process {content.get('pid')} on {content.get('host')} (since {content.get('since')})"


def _content(handle: int) -> dict[str, object]:
    try:
        content = from_json(os.pread(handle, 4096, 0))
    except (ValueError, OSError):
        return {}
    return content if isinstance(content, dict) else {}
