"""Ctrl-C while a program still imports what it needs: one line, and no import that has to bear an exception."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130  # the exit code
ANEW = "nothing new is kept, nothing old is lost. The same command begins anew."


def begin() -> None:
    """Called first by every program: until ``over``, ctrl-C ends the process at once."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def over() -> None:
    """From here on ctrl-C is a KeyboardInterrupt again, which tells what is kept."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
        os.write(2, f"interrupted: {ANEW}\n".encode())
    os._exit(INTERRUPTED)
