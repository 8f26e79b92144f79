"""``train.loss_norm``: the loss and its gradient against a plain loop in float64, however a step is split."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.train.kit import LAUNCH, SETTINGS, Samples, load_in_float64, load_model
from tests.train.runs import curve, finish

from vzip.data.collate import Collator
from vzip.data.conversations import vicuna_v1
from vzip.data.order import split_step
from vzip.train.loop import train
from vzip.train.objective import AnswerLoss, ModelView
from vzip.train.stepping import Stepper, StepTimer

STEP = np.arange(8)  # sample 0 and 7 ask twice, 0 and 5 have no image, all have answers of other lengths


class OneOf:
    """What ``Stepper`` needs of accelerate, as one of several processes whose gradients are averaged."""

    device = torch.device("cpu")
    sync_gradients = False

    def __init__(self, process_index: int, num_processes: int, accumulation: int) -> None:
        self.process_index, self.num_processes, self.accumulation = process_index, num_processes, accumulation

    def accumulate(self, _model: Any) -> Any:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation / self.num_processes).backward()

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


@pytest.fixture
def vlm(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load_in_float64(monkeypatch)


def of_plain_loop(vlm: Any, loss_norm: str) -> tuple[float, list[torch.Tensor]]:
    """Hugging Face's own loss, a conversation at a time."""
    data, tokenizer, means, sums, counts = Samples(), vlm.processor.tokenizer, [], [], []
    for index in STEP:
        sample = data[int(index)]
        nats, count = [], 0
        for dialogue in sample.dialogues:
            prompt = f"USER: {dialogue[0].text} ASSISTANT:"
            ids = tokenizer(f"{prompt} {dialogue[1].text}</s>", return_tensors="pt").input_ids
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt).input_ids)] = -100
            pixels = vlm.preprocess_images(sample.images) if sample.images else {}
            pixels = {name: tensor.double() for name, tensor in pixels.items()}
            num = int((labels != -100).sum())
            nats.append(vlm(ids, labels=labels, **pixels).loss * num)
            count += num
        sums.append(torch.stack(nats).sum())
        means.append(sums[-1] / count)
        counts.append(count)
    assert len(set(counts)) > 4
    loss = torch.stack(means).mean() if loss_norm == "samples" else torch.stack(sums).sum() / sum(counts)
    return loss.item(), list(torch.autograd.grad(loss, list(vlm.adapter.projector.parameters())))


@pytest.mark.parametrize(("batch_size", "num_processes"), [(8, 1), (2, 1), (1, 1), (4, 2), (1, 2), (2, 4)])
@pytest.mark.parametrize("loss_norm", ["tokens", "samples"])
def test_loss_and_gradient(loss_norm: str, batch_size: int, num_processes: int, vlm: Any) -> None:
    expected, gradients = of_plain_loop(vlm, loss_norm)
    collate = Collator(vlm.processor, ModelView(vlm), vicuna_v1, None, tiny.IMAGE_TOKEN, 200)
    settings = dataclasses.replace(SETTINGS, loss_norm=loss_norm)
    launch = dataclasses.replace(LAUNCH, batch_size=batch_size, num_processes=num_processes)
    split = []
    for rank in range(num_processes):
        process: Any = OneOf(rank, num_processes, launch.accumulation(8, num_processes))
        stepper = Stepper(process, AnswerLoss(vlm), None, settings, launch, seed=0)
        batches = [
            collate([Samples()[int(i)] for i in numbers])
            for numbers in split_step(STEP, batch_size, rank, num_processes)
        ]
        for batch in batches:
            if "pixel_values" in batch.images:
                batch.images["pixel_values"] = batch.images["pixel_values"].double()
        split.append((stepper, batches))
    divisor = sum(stepper._count(batch) for stepper, batches in split for batch in batches)
    loss = sum(stepper._backward(batches, divisor, StepTimer(torch.device("cpu")))[0] for stepper, batches in split)
    assert loss == pytest.approx(expected, rel=1e-10)
    for parameter, gradient in zip(vlm.adapter.projector.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_sample_without_targets_does_not_count(plan: Any) -> None:
    """Its answer is cut off by ``max_length``, so it has nothing to say about the mean."""
    vlm = load_model()
    collate = Collator(vlm.processor, ModelView(vlm), vicuna_v1, None, tiny.IMAGE_TOKEN, 17)
    batch = collate([Samples()[1]])
    process: Any = OneOf(0, 1, 1)
    settings = dataclasses.replace(SETTINGS, loss_norm="samples", samples_per_step=4)
    stepper = Stepper(process, AnswerLoss(vlm), None, settings, LAUNCH, seed=0)
    assert batch.num_targets_by_sample == [0] and stepper._count(batch) == 0
    assert stepper._added(torch.zeros(1), batch).item() == 0.0


def test_the_choice_is_part_of_the_run_and_of_its_validation(plan: Any) -> None:
    runs = {}
    for loss_norm in ("tokens", "samples"):
        setup = plan(loss_norm, loss_norm=loss_norm, num_validation_samples=4, num_steps=2)
        train(setup)
        runs[loss_norm] = (setup.run_dir / "metrics.jsonl").read_text().splitlines()[-1]
        assert f'"loss_norm": "{loss_norm}"' in (setup.run_dir / "train.json").read_text()
    values = [json.loads(line)["validation_loss"] for line in runs.values()]
    assert values[0] != pytest.approx(values[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_processes_give_the_curve_of_one(strategy: str, plan: Any) -> None:
    train(plan("one", loss_norm="samples"))
    two: Path = plan("two").run_dir
    finish(two, 2, strategy=strategy, num_processes=2, batch_size=2, loss_norm="samples")
    for one, other in zip(curve(plan("one").run_dir), curve(two), strict=True):
        assert one == pytest.approx(other, rel=2e-3)
