"""Paths as people type them: too long, with a NUL byte, of an unknown user's home, they are places where nothing is."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vzip.errors import ConfigError


def is_file(path: str | Path) -> bool:
    """Whether there is a file; also for a path that the system would not take."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Whether there is a directory; also for a path that the system would not take."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def expanded(path: str | Path) -> Path:
    """The path with ``~`` replaced by the home directory; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def shown(path: object) -> str:
    """A path in a message: without control characters, its middle left out where it is very long."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return text if len(text) <= 300 else f"{text[:150]}...{text[-100:]} ({len(text)} characters)"


@contextmanager
def naming_impossible_paths() -> Iterator[None]:
    """Turns what the system says of a path that no file can have into a ConfigError, wherever it is met."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise ConfigError(
            f"{shown(error.filename)}: longer than a path may be here (usually 255 bytes a name, 4096 in all). Shorten"
            " it, as paths.run_dir=DIR."
        ) from error
    except ValueError as error:
        if "embedded null" not in str(error):
            raise
        raise ConfigError("a path holds a NUL character, which no path can. Leave it out.") from error
