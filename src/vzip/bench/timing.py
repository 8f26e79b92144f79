"""Timing that can be trusted: synchronised stages, interleaved repeats, medians with quartiles.

A GPU runs behind the Python program, so a clock that is read without waiting for it times the launch and not the work.
Every stage here starts and ends with a synchronisation. Methods take turns (A B C A B C ...) so that a machine that
slows down or speeds up during the measurement treats all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

StageTimes = dict[str, float]
"""Stage name -> milliseconds of one pass."""


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all the work handed to it; does nothing for the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Collects the durations of named stages of one pass.

    Args:
        device: the device the stages run on; the clock waits for it before and after each stage.

    Attributes:
        times_ms: of the stages that have ended.
        running: the stage that has not, or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times_ms: StageTimes = {}
        self.running: str | None = None

    @contextmanager
    def stage(self, name: str, divide_by: int = 1) -> Iterator[None]:
        """Times the body of the ``with`` statement.

        Args:
            name: name of the stage; a name that occurs twice in a pass adds up.
            divide_by: number of equal steps in the body; the time of one of them is recorded.
        """
        synchronize(self.device)
        self.running = name
        start = time.perf_counter_ns()
        yield
        synchronize(self.device)
        self.running = None
        elapsed_ms = (time.perf_counter_ns() - start) / 1e6 / divide_by
        self.times_ms[name] = self.times_ms.get(name, 0.0) + elapsed_ms


class Untimed:
    """Stands in for a ``Stopwatch`` where the work must not be stopped for the clock."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Does nothing around the body of the ``with`` statement."""
        yield


@dataclass(frozen=True)
class Timing:
    """Durations of one stage over all repeats, in milliseconds.

    Attributes:
        median_ms: middle value, robust against a single interruption.
        q1_ms: lower quartile.
        q3_ms: upper quartile.
        samples_ms: every measured value, in order.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    samples_ms: tuple[float, ...]

    @classmethod
    def of(cls, samples_ms: list[float]) -> Timing:
        """Summarises samples; the quartiles are interpolated as numpy does by default ("inclusive")."""
        if not samples_ms:
            raise ValueError("no samples to summarise")
        if len(samples_ms) == 1:
            return cls(samples_ms[0], samples_ms[0], samples_ms[0], (samples_ms[0],))
        q1, median, q3 = statistics.quantiles(samples_ms, n=4, method="inclusive")
        return cls(median, q1, q3, tuple(samples_ms))


def run_interleaved(
    passes: Mapping[str, Callable[[], StageTimes]],
    *,
    repeats: int,
    warmup: int,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Timing]]:
    """Runs all methods in turn and summarises every stage.

    Args:
        passes: method name -> a function that runs it once and returns its stage times.
        repeats: measured rounds; one round runs every method once.
        warmup: rounds before them, whose times are thrown away.
        on_step: called after each single pass, for a progress bar.

    Returns:
        Method name -> stage name -> summary over the ``repeats`` measured rounds.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in passes}
    for round_index in range(warmup + repeats):
        for name, run_once in passes.items():
            times_ms = run_once()
            on_step()
            if round_index < warmup:
                continue
            for stage, value in times_ms.items():
                samples[name].setdefault(stage, []).append(value)
    return {name: {stage: Timing.of(values) for stage, values in stages.items()} for name, stages in samples.items()}
