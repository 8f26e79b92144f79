"""Where a step's time goes, and what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tests.train.kit import LAUNCH, SETTINGS, Samples, load_model
from torch import Tensor, nn

from vzip.data.collate import Batch, Collator
from vzip.data.conversations import find_template
from vzip.train import stepping
from vzip.train.objective import AnswerLoss, ModelView
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_for_a_gpu_wait_in_pinned_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loader's own thread, so that no step waits for a copy."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(stepping, "DataLoader", lambda _data, **settings: asked.update(settings) or [])
    unused: Any = None
    assert list(stepping.load_batches(unused, unused, [[0]], 0, torch.device(device))) == []
    assert asked["pin_memory"] is (device == "cuda")


def test_every_tensor_of_a_batch_is_pinned_and_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self + 1)
    ids, images = torch.zeros(1, 2, dtype=torch.int64), {"pixel_values": torch.zeros(1)}
    batch = Batch(["a"], [0], ids, ids, ids, images=images, videos={"pixel_values_videos": torch.zeros(1)})
    pinned = batch.pin_memory()
    tensors = [pinned.input_ids, pinned.attention_mask, pinned.labels, *pinned.images.values(), *pinned.videos.values()]
    assert len(tensors) == 5 and all(bool((tensor == 1).all()) for tensor in tensors)
    there = batch.to(torch.device("meta"))
    assert {t.device.type for t in (there.input_ids, there.labels, *there.images.values())} == {"meta"}
    assert (batch.ids, there.ids, batch.input_ids.device.type) == (["a"], ["a"], "cpu")


def test_processes_validate_in_as_many_batches() -> None:
    """Five samples, two at once: one process has three of them, the other two. ZeRO-3's would wait for each other."""
    vlm, data = load_model(), Samples()
    collator = Collator(
        vlm.processor, ModelView(vlm), find_template("vicuna_v1"), None, vlm.adapter.image_token_id, 200
    )
    numbers, launch = np.arange(1, 6), dataclasses.replace(LAUNCH, batch_size=2, num_workers=0)

    def validated(index: int, count: int, whole: bool) -> tuple[int, np.ndarray]:
        """How often the model ran, and what the process adds to the sums."""
        totals: list[Tensor] = []
        accelerator: Any = SimpleNamespace(
            process_index=index,
            num_processes=count,
            device=torch.device("cpu"),
            unwrap_model=lambda model: model,
            autocast=contextlib.nullcontext,
            reduce=lambda own, reduction: totals.append(own) or own,
        )
        model = AnswerLoss(vlm, always_whole=whole)
        ran: list[Batch] = []
        model.register_forward_pre_hook(lambda _, given: ran.append(given[0]))
        stepper = Stepper(accelerator, model, None, SETTINGS, launch, seed=0)
        stepper.validate(data, numbers, collator)
        return len(ran), totals[0].numpy()

    alone = validated(0, 1, False)
    for whole in (False, True):
        (runs, own), (other_runs, other) = (validated(index, 2, whole) for index in range(2))
        assert runs == other_runs == 2
        np.testing.assert_allclose(own + other, alone[1], rtol=1e-5)
