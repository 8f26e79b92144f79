"""One line a step and users' errors, to standard error; results go to standard output."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from vzip.starting import ANEW, INTERRUPTED

USER_ERROR = 2  # the exit code
_NEAREST = re.compile(r"\(did you mean ('.*?')\?\)")  # as vzip.errors.nearest writes it
_SHORT = 60  # characters behind a name that do not hide it
_LIBRARIES = r"(torch|transformers|accelerate|deepspeed|peft|datasets|lmms_eval|hydra|omegaconf)(\.|$)"


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
    _quiet()
    logger = logging.getLogger("vzip")
    logger.setLevel(level)
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False


def _quiet() -> None:
    """Keeps back what libraries say that nobody can act on, unless ``python -W`` or their own variable wants it."""
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_no_hint)
    if not sys.warnoptions:
        for kind in (FutureWarning, DeprecationWarning):  # of one library about another, both of our choice
            warnings.filterwarnings("ignore", category=kind, module=_LIBRARIES)
    if not sys.stderr.isatty():  # their bars write a line for each time they move
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _is_no_hint(record: logging.LogRecord) -> bool:
    """False for transformers' advice to install torchvision, which vzip does without."""
    return "requires torchvision" not in record.getMessage()


def tell_error(error: Exception) -> int:
    """Prints a user's error without a traceback; returns the exit code."""
    print(f"{type(error).__name__}: {nearest_last(str(error))}", file=sys.stderr)
    return USER_ERROR


def nearest_last(message: str) -> str:
    """The message with the nearest names once more at its end, where a long list has pushed them out of sight."""
    found = list(dict.fromkeys(_NEAREST.findall(message)))
    tail = message[message.rindex(found[-1]) :] if found else ""
    return f"{message}\nDid you mean {' and '.join(found)}?" if len(tail) > _SHORT else message


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
    """Prints one line, what is kept and how to go on, or nothing if another process has said it; the exit code."""
    kept = ANEW
    if error.args:
        kept = error.args[0] and f"{error.args[0]}. The same command continues."
    if kept and os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
        print(f"interrupted: {kept}", file=sys.stderr, flush=True)
    return INTERRUPTED


def output_failed(error: OSError) -> int:
    """The exit code where standard output takes no more: its reader has gone, as `head` does, or its disk is full.

    Any other error of a file is raised again.
    """
    full, ours = error.errno in (errno.ENOSPC, errno.EDQUOT), False
    if isinstance(error, BrokenPipeError):
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        ours = any(event & select.POLLERR for _, event in output.poll(0))
    elif full:
        try:  # another file's disk may be the full one
            os.write(sys.stdout.fileno(), b"\n")
        except OSError:
            ours = True
    if not ours:
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere
    if full:
        print(f"standard output: {error.strerror}; what was to be printed is not all there.", file=sys.stderr)
    return 1  # as rich's, which ends so itself where it prints
