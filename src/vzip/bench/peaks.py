"""The memory that training and answering take at their worst moment, estimated and measured on this machine.

The same two functions as ``python -m vzip memory --measure``, from the bench's words, which need no Hydra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from vzip.bench import shapes
from vzip.bench.device_memory import refuse_if_too_large, release_unused
from vzip.bench.memory.estimate import estimate_inference, estimate_training
from vzip.bench.memory.measure import measure_inference, measure_training
from vzip.bench.memory.workload import ModelShape, visual_tokens
from vzip.bench.run import environment
from vzip.bench.settings import BenchSettings
from vzip.bench.training import SideResult, compressors, load_of, resolved, train_settings


@dataclass(frozen=True)
class WorkPeak:
    """One kind of work.

    Attributes:
        num_tokens: of each conversation or prompt, visual ones counted.
        estimated_bytes: by what they are for.
        measured_bytes: on a GPU what torch allocated at most, on a CPU likewise, by its profiler.
    """

    num_tokens: int
    estimated_bytes: dict[str, int]
    measured_bytes: int

    @property
    def error(self) -> float:
        """How far the estimate is off, as a share of what was measured."""
        return sum(self.estimated_bytes.values()) / self.measured_bytes - 1


@dataclass(frozen=True)
class MemoryMethodResult:
    """What was measured of one method.

    Attributes:
        num_visual_tokens: of each image.
        training: an optimizer step that is not the first.
        inference: ``num_new_tokens`` after each prompt.
    """

    num_visual_tokens: int
    training: WorkPeak
    inference: WorkPeak


def measure_peaks(
    settings: BenchSettings,
    log: Callable[[str], None] = lambda _line: None,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> SideResult:
    """Runs a measurement of memory; arguments and errors as ``vzip.bench.run.measure``."""
    model = shapes.resolve(settings.model)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device, dtype, (train, launch) = settings.torch_device, settings.torch_dtype, train_settings(settings)
    plans = []
    for name, compressor in compressors(settings, model).items():
        log(f"estimating {name}")
        shape = ModelShape(model.config, compressor)
        loads = load_of(settings, shape), load_of(settings, shape, settings.num_new_tokens)
        training = estimate_training(shape, train, launch, loads[0], 1, device.type == "cuda")
        plans.append((name, shape, loads, training, estimate_inference(shape, dtype, loads[1])))
        refuse_if_too_large(max(training.total, plans[-1][-1].total), device, f"model={model.name}")
    results, done = {}, 0
    for name, shape, loads, training, answering in plans:
        log(f"measuring {name}")
        measured = []
        for work in (
            lambda shape=shape, load=loads[1]: measure_inference(shape.with_random_weights(device, dtype), load),
            lambda shape=shape, load=loads[0]: measure_training(
                shape.with_random_weights(device, dtype), train, launch, load
            ),
        ):
            measured.append(work())
            release_unused(device)  # the model that it was measured on
            done += 1
            on_step(done, 2 * len(plans))
        results[name] = MemoryMethodResult(
            num_visual_tokens=visual_tokens(shape, loads[0]),
            training=WorkPeak(loads[0].length, dict(training.num_bytes), measured[1]),
            inference=WorkPeak(loads[1].length, dict(answering.num_bytes), measured[0]),
        )
    num_parameters = sum(p.numel() for p in shapes.build_meta(model, dtype).parameters())
    return SideResult(
        kind="memory",
        model=model.name,
        settings=asdict(settings),
        resolved={**resolved(settings, model, num_parameters), "weights": "random"},
        environment=environment(device),
        methods=results,
        notes=[f"{settings.batch_size} conversations or prompts at once"],
    )
