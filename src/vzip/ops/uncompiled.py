"""Where compiled modules must run as they are written, since a graph would go on without their hooks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_LOCK = threading.Lock()
_STANCE = ExitStack()
_inside = 0


@contextmanager
def uncompiled() -> Iterator[None]:
    """Nothing runs from a compiled graph, in any thread, while one of these contexts is open.

    The stance is the whole process's, and torch gives back the one that it found: of two threads that overlap, the
    later to leave would give back the earlier one's, and nothing would ever be compiled again.
    """
    global _inside
    with _LOCK:
        if _inside == 0:
            _STANCE.enter_context(torch.compiler.set_stance("force_eager"))
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                _STANCE.close()
