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
from vzip.train.settings import LaunchSettings, TrainSettings
from vzip.train.stepping import Stepper
from vzip.train.trainable import prepare_training

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
    stepper = real_stepper(vlm, train, launch)
    batch = training_batch(vlm, load)
    batches = itertools.repeat(batch)
    stepper.step(0, 2, batches)
    states = [value for state in stepper.optimizer.state.values() for value in state.values()]
    before = [*_weights(vlm), *states, *tensors_of(batch)]
    return _peak(lambda: stepper.step(1, 2, batches), stepper.accelerator.device, before)


def real_stepper(vlm: CompressedVlm, train: TrainSettings, launch: LaunchSettings) -> Stepper:
    """What takes the steps of one process."""
    accelerator = build_accelerator(train, launch, 1)
    prepare_training(vlm, train, launch)
    return Stepper.of(accelerator, vlm, train, launch, seed=0)


def measure_inference(vlm: CompressedVlm, load: Workload) -> int:
    """Bytes at the worst moment of generating real answers, none of which ends early."""
    inputs = {name: tensor.to(vlm.device) for name, tensor in prompts(vlm, load).items()}
    count = load.num_new_tokens

    def answer() -> None:
        vlm.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)

    return _peak(answer, vlm.device, [*_weights(vlm), *inputs.values()])


def _weights(vlm: CompressedVlm) -> list[Tensor]:
    return [*vlm.model.parameters(), *vlm.model.buffers()]


def _peak(work: Callable[[], Any], device: torch.device, before: Iterable[Tensor]) -> int:
    """Bytes at the worst moment of ``work``, with the tensors that are there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    # Torch's record of every allocation and its end, of which the running sum's maximum is the peak.
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return storage_bytes(before) + max(itertools.accumulate(num_bytes for _, num_bytes in changes))
