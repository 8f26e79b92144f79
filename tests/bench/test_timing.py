"""Order and arithmetic of the timing; never the times themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vzip.bench import timing
from vzip.bench.device_memory import PeakMemory, available_bytes
from vzip.bench.timing import Stopwatch, Timing, run_interleaved


def test_rounds_are_interleaved_and_warmup_is_dropped() -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"stage": float(len(order))}

    result = run_interleaved({n: lambda n=n: run(n) for n in "ABC"}, repeats=2, warmup=1)  # type: ignore[misc]
    assert "".join(order) == "ABCABCABC"
    assert result["A"]["stage"].samples_ms == (4.0, 7.0)
    assert result["C"]["stage"].samples_ms == (6.0, 9.0)


@pytest.mark.parametrize("samples", [[3.0], [1.0, 2.0], [5.0, 1.0, 9.0], [2.0, 8.0, 4.0, 6.0, 100.0]])
def test_summary_equals_numpy(samples: list[float]) -> None:
    t = Timing.of(samples)
    np.testing.assert_allclose((t.q1_ms, t.median_ms, t.q3_ms), np.quantile(samples, (0.25, 0.5, 0.75)))
    assert t.samples_ms == tuple(samples)


def test_stopwatch_synchronises_around_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(timing, "synchronize", lambda _device: events.append("sync"))
    clock = iter([0, 6_000_000, 10_000_000, 11_000_000])
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: (events.append("clock"), next(clock))[1])
    watch = Stopwatch(torch.device("cpu"))
    with watch.stage("decode", divide_by=3):
        events.append("work")
    with watch.stage("decode"):
        events.append("work")
    assert events == ["sync", "clock", "work", "sync", "clock"] * 2
    assert watch.times_ms == {"decode": 2.0 + 1.0}


def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        large = torch.ones(64, 1024, 1024)  # 256 MiB
        del large
    assert peak.peak_bytes >= 256 * 1024**2
    if peak.kind == "rss_peak":
        assert 200 * 1024**2 < peak.peak_bytes - peak.start_bytes < 400 * 1024**2
        with PeakMemory(torch.device("cpu")) as later:
            pass
        assert later.peak_bytes < peak.peak_bytes - 128 * 1024**2  # one method's peak is not the next one's


def test_available_memory_is_plausible() -> None:
    available = available_bytes(torch.device("cpu"))
    assert available is None or 2**27 < available < 2**50
