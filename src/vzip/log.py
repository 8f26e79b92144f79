"""One line a step and users' errors, to standard error; results go to standard output."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

USER_ERROR = 2  # the exit code


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what standard error is at the time: a handler made while it is redirected would keep writing there."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Nothing to keep."""


def setup(level: int = logging.INFO) -> None:
    """Shows vzip's own messages; other libraries keep to warnings. Calling it again changes only the level.

    What the terminal's encoding lacks is printed as an escape: no answer, name or message can end a command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("vzip")
    logger.setLevel(level)
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False


def tell_error(error: Exception) -> int:
    """Prints a user's error without a traceback; returns the exit code."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return USER_ERROR
