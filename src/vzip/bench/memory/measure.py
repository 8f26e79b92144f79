"""The peak of a real step or a real answer, to hold the estimate against."""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vzip.bench.device_memory import storage_bytes
from vzip.models.vlm import CompressedVlm
from vzip.train.distributed import build_accelerator
from vzip.train.objective import AnswerLoss
from vzip.train.settings import LaunchSettings, TrainSettings
from vzip.train.stepping import Stepper
from vzip.train.trainable import parameter_groups

from .steps import prepare_training
from .workload import Workload, prompts, tensors_of, training_batch


def measure_training(vlm: CompressedVlm, train: TrainSettings, launch: LaunchSettings, load: Workload) -> int:
    """Bytes at the worst moment of the second of two real steps, which change the model's weights.

    Args:
        vlm: a model with weights, not yet prepared for training.
        train, launch: as for ``estimate_training``; one process.
        load: the batch.

    Raises:
        ConfigError: as the training itself.
    """
    stepper, adamw = real_stepper(vlm, train, launch)
    batch = training_batch(vlm, load)
    batches = itertools.repeat(batch)
    stepper.step(0, 2, batches)
    before = [*_kept(vlm, adamw), *tensors_of(batch)]
    return _peak(lambda: stepper.step(1, 2, batches), stepper.accelerator.device, before)


def real_stepper(
    vlm: CompressedVlm, train: TrainSettings, launch: LaunchSettings
) -> tuple[Stepper, torch.optim.Optimizer]:
    """What takes the steps, put together as ``vzip.train.loop.train`` does for one process; and the bare optimizer."""
    accelerator = build_accelerator(train, launch, 1)
    prepare_training(vlm, train, launch)
    adamw = torch.optim.AdamW(parameter_groups(vlm, train), lr=train.learning_rate, weight_decay=train.weight_decay)
    model, optimizer = accelerator.prepare(AnswerLoss(vlm), adamw)
    return Stepper(accelerator, model, optimizer, train, launch, seed=0), adamw


def measure_inference(vlm: CompressedVlm, load: Workload) -> int:
    """Bytes at the worst moment of generating real answers, none of which ends early."""
    inputs = {name: tensor.to(vlm.device) for name, tensor in prompts(vlm, load).items()}
    count = load.num_new_tokens

    def answer() -> None:
        vlm.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)

    return _peak(answer, vlm.device, [*_kept(vlm, None), *inputs.values()])


def _kept(vlm: CompressedVlm, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """What is there before the step: weights, and the optimizer's states."""
    states = [] if optimizer is None else [v for state in optimizer.state.values() for v in state.values()]
    tensors = [*vlm.model.parameters(), *vlm.model.buffers(), *states]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


def _peak(work: Callable[[], Any], device: torch.device, before: Iterable[Tensor]) -> int:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    return storage_bytes(before) + _most_allocated(recorded)


def _most_allocated(recorded: Any) -> int:
    """The running sum's maximum over torch's record of every allocation and its end on the CPU."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    return max(itertools.accumulate(num_bytes for _, num_bytes in sorted(changes, key=lambda change: change[0])))
