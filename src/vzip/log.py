"""One line a step and users' errors, to standard error; results go to standard output."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

USER_ERROR = 2  # the exit codes
INTERRUPTED = 130


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what standard error is at the time: a handler made while it is redirected would keep writing there."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Nothing to keep."""


def setup(level: int = logging.INFO) -> None:
    """Shows vzip's own messages; other libraries keep to warnings. Calling it again changes only the level."""
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


@contextlib.contextmanager
def keeping(what: Callable[[], str]) -> Iterator[None]:
    """Lets an interruption (ctrl-C) inside say what is kept of the work, for ``tell_interruption``.

    Args:
        what: called then; ``"8 of 80 answers are kept in DIR"``. What an inner context says stays.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise (error if error.args else KeyboardInterrupt(what())) from None


def tell_interruption(error: KeyboardInterrupt) -> int:
    """Prints one line, what is kept and how to go on, or nothing if who was started has said it; the exit code."""
    kept = error.args[0] if error.args else "nothing was begun that would have to be kept"
    if kept:
        print(f"interrupted: {kept}. The same command continues.", file=sys.stderr, flush=True)
    return INTERRUPTED
