"""How far a long work is, on standard error: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

EVERY_S = 30.0  # a plain line after this time at the latest
EVERY_PERCENT = 5  # or after this much more is done,
LEAST_S = 1.0  # but not faster than one can read
_MIB = 1024**2
T = TypeVar("T")


class Progress:
    """Counts work that is done, to be used as a context.

    Args:
        what: the work, as ``"answering"``.
        unit: what is counted, in the plural: ``"questions"``, ``"steps"``; ``"bytes"`` are told in MiB.
        total: how many there are; None where that is not known yet.
        done: how many of them were done before, by an interrupted run.
        show: False for silence, as in every process but the first.
        console: where to; standard error as it is now by default, which stays so where it is redirected later.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        *,
        done: int = 0,
        show: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.unit, self.total, self.done = what, unit, total, done
        self.console = console or Console(file=sys.stderr)
        self.note = ""
        self._clock, self._show = clock, show
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._first = self._last = done
        self._started = self._told = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Progress:
        self._started = self._told = self._clock()
        if not self._show:
            return self
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, *times, console=self.console, transient=True)
            scale = _MIB if self.unit == "bytes" else 1
            total = None if self.total is None else self.total // scale
            self._task = self._bar.add_task(self.what, total=total, completed=self.done // scale)
            self._bar.start()
        else:
            # A step may take longer than the time between two lines.
            threading.Thread(target=self._keep_telling, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        elif self._show and kind is None and self.done != self._last:
            self._tell()

    def advance(self, number: int = 1, note: str = "") -> None:
        """So many more are done; ``note`` is told beside the count, as ``"loss 1.234"``."""
        self.update(self.done + number, note=note)

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """So many are done in all."""
        self.done, self.total, self.note = done, self.total if total is None else total, note or self.note
        if not self._show:
            return
        if self._bar is not None:
            scale = _MIB if self.unit == "bytes" else 1
            total = None if self.total is None else self.total // scale
            text = f"{self.what}, {self.note}" if self.note else self.what
            self._bar.update(self._task, completed=self.done // scale, total=total, description=text)
            return
        waited = self._clock() - self._told
        is_much = bool(self.total) and 100 * (done - self._last) >= EVERY_PERCENT * (self.total or 0)
        is_end = done == self.total and done != self._last
        if is_end or waited >= EVERY_S or (is_much and waited >= LEAST_S):
            self._tell()

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each counted when the next is asked for."""
        for item in items:
            yield item
            self.advance()

    def line(self) -> str:
        """The count, the rate of this run and the time that is left."""
        number = (lambda n: f"{n / _MIB:.0f}") if self.unit == "bytes" else (lambda n: f"{n:,}")
        unit = "MiB" if self.unit == "bytes" else self.unit
        of = "" if self.total is None else f" of {number(self.total)}"
        parts = [f"{self.what}: {number(self.done)}{of} {unit}"]
        if self.total:
            parts[0] += f" ({100 * self.done // self.total} %)"
        if self.note:
            parts.append(self.note)
        elapsed = self._clock() - self._started
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        if rate > 0:
            shown = rate / _MIB if self.unit == "bytes" else rate
            parts.append(f"{shown:.3g} {unit}/s" if shown >= 0.1 else f"{1 / shown:.3g} s each")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def _tell(self) -> None:
        with self._lock:
            self._told, self._last = self._clock(), self.done
            # Not through the console, which would break the line at 80 columns.
            print(f"{time.strftime('%H:%M:%S')} {self.line()}", file=self.console.file, flush=True)

    def _keep_telling(self) -> None:
        while not self._ended.wait(1.0):
            if self._clock() - self._told >= EVERY_S:
                self._tell()


def duration(seconds: float) -> str:
    """In the two largest units: ``"2 h 05 min"``, ``"3 min 20 s"``, ``"40 s"``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
