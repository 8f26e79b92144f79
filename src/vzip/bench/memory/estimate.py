"""The peak of a training or an inference from shapes alone: the real code on tensors without content."""

from __future__ import annotations

import torch

from vzip.train.settings import LaunchSettings, TrainSettings

from .ledger import Ledger, Peak
from .meta_device import fill, pretending
from .partition import model_size, shared_out
from .steps import prepare_training, watch_inference, watch_training
from .workload import ModelShape, Workload, prompts, training_batch


def estimate_training(
    shape: ModelShape,
    train: TrainSettings,
    launch: LaunchSettings,
    load: Workload,
    num_processes: int = 1,
    on_cuda: bool = False,
) -> Peak:
    """The peak of a training step on each device.

    Args:
        shape: the model.
        train, launch: the run's settings.
        load: the batch that is on a device at once.
        num_processes: over all machines.
        on_cuda: whether the devices are GPUs.

    Raises:
        ConfigError: settings that contradict one another, or a length that leaves no room for text.
        UnsupportedModelError: a model that cannot be served or trained so.
    """
    dtype = getattr(torch, train.precision)
    accumulates = launch.accumulation(train.samples_per_step, num_processes) > 1
    ledger = Ledger()
    vlm = shape.on_paper(dtype)
    prepare_training(vlm, train, launch)
    batch = training_batch(vlm, load)
    with pretending():
        fill(vlm.model)
        watch_training(vlm, train, launch, batch, accumulates, on_cuda, ledger)
    return shared_out(ledger, model_size(vlm), launch.strategy, num_processes)


def estimate_inference(shape: ModelShape, dtype: torch.dtype, load: Workload) -> Peak:
    """The peak of generating answers on one device; raises as ``estimate_training``."""
    ledger = Ledger()
    vlm = shape.on_paper(dtype)
    inputs = prompts(vlm, load)
    with pretending():
        fill(vlm.model)
        watch_inference(vlm, inputs, load.num_new_tokens, ledger)
    return ledger.peak()
