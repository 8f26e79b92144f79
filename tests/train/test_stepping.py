"""Where a step's time goes."""

from __future__ import annotations

import time

import pytest
import torch

from vzip.train.stepping import StepTimer


def test_a_lap_ends_when_the_gpu_has_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the backward pass, which is only handed to it, would be counted with what comes next."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.05))
    on_gpu, on_cpu = StepTimer(torch.device("cuda")), StepTimer(torch.device("cpu"))
    on_gpu.lap("backward_ms")
    assert on_gpu.ms["backward_ms"] >= 50
    on_cpu.lap("forward_ms")
    on_cpu.lap("backward_ms")
    on_cpu.lap("forward_ms")
    assert list(on_cpu.ms) == ["forward_ms", "backward_ms"] and on_cpu.ms["backward_ms"] < 50
