"""Shared fixtures. One thread: tests are small, and results must not depend on the machine's core count."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(1)
# Where an image forbids compiled modules, each of the processes that tests start would compile all of vzip anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# What a shell starts in the background ignores ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# With it the golden images agree to 2e-6; 12.3 resizes up to 0.128 apart after normalisation.
GOLDEN_PILLOW = "13.0.0"


def pytest_collection_finish() -> None:
    """What importing all tests has made stays, so the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


class SilentServer:
    """Takes requests on this machine and never says anything.

    Attributes:
        asked: the first line of each request.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._taken: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                self._taken.append(self._socket.accept()[0])
                threading.Thread(target=self._read, args=(self._taken[-1],), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.asked.append(connection.recv(4096).decode().partition("\r\n")[0])

    def close(self) -> None:
        for taken in (*self._taken, self._socket):
            taken.close()


@pytest.fixture
def silent_server() -> Iterator[SilentServer]:
    server = SilentServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def names_pillow() -> Callable[[str], str]:
    """For ``assert_close(msg=)`` on golden images: which Pillow they hold for, and which is installed."""
    return lambda message: f"golden images hold for Pillow {GOLDEN_PILLOW}, installed is {PIL.__version__}: {message}"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; see tests/golden/README.md."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Lets a test choose a precision of its own: accelerate keeps the process's first one."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
