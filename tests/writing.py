"""What keeps a program from writing: a disk without room, a directory that somebody else writes."""

from __future__ import annotations

import fcntl
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def no_room() -> Iterator[None]:
    """Lets files be made and nothing be written into them, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Somebody else's directory for the block."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".owner").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
