"""Where a step's time goes, and what it leaves behind."""

from __future__ import annotations

import time
import weakref

import pytest
import torch
from accelerate import Accelerator
from tests.train.kit import LAUNCH, SETTINGS
from torch import Tensor, nn

from vzip.data.collate import Batch
from vzip.train.stepping import Stepper, StepTimer


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


class Remembering(nn.Module):
    """Says of each call whether the last one's result was gone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.last: weakref.ref[Tensor] | None = None
        self.gone: list[bool] = []

    def forward(self, batch: Batch) -> Tensor:
        self.gone.append(self.last is None or self.last() is None)
        nats = 2.0 * self.weight
        self.last = weakref.ref(nats)
        return nats


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_batchs_graph_is_gone_before_the_next_batch() -> None:
    """Or what 8-bit layers keep in it would be there twice."""
    model, ids = Remembering(), torch.ones(1, 2, dtype=torch.int64)
    stepper = Stepper(
        Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.1), SETTINGS, LAUNCH, seed=0
    )
    batches = [Batch([name], [0], ids, ids, ids) for name in "abc"]
    loss, _ = stepper._backward(batches, 3.0, StepTimer(torch.device("cpu")))
    assert model.gone == [True] * 3 and loss == 2.0
