"""The memory that training and answering take at their worst moment, estimated and measured on this machine.

The same two functions as ``python -m vzip memory --measure``, from the bench's settings, which need no Hydra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from vzip.bench import shapes
from vzip.bench.device_memory import refuse_if_too_large, release_unused
from vzip.bench.memory.estimate import estimate_inference, estimate_training
from vzip.bench.memory.measure import measure_inference, measure_training
from vzip.bench.settings import BenchSettings
from vzip.bench.training import SideResult, WorkResult, load_of, method_shapes, side_result, train_settings


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
    works = []
    for name, shape in method_shapes(settings, model).items():
        log(f"estimating {name}")
        load, num_visual = load_of(settings, shape)
        prompts, _ = load_of(settings, shape, settings.num_new_tokens)
        step = partial(measure_training, train=train, launch=launch, load=load)
        estimated = estimate_training(shape, train, launch, load)
        answering = partial(measure_inference, load=prompts), estimate_inference(shape, dtype, prompts)
        for work, measure, peak in (("inference", *answering), ("training", step, estimated)):
            refuse_if_too_large(peak.total(), device, f"model={model.name}")
            works.append((name, work, shape, measure, peak, num_visual, load.length))
    results: dict[str, dict[str, WorkResult]] = {name: {} for name in settings.methods}
    for done, (name, work, shape, measure, peak, num_visual, length) in enumerate(works):
        log(f"measuring {name}, {work}")
        measured = measure(shape.with_random_weights(device, dtype))
        release_unused(device)  # the model that it was measured on
        results[name][work] = WorkResult(num_visual, length, dict(peak), measured)
        on_step(done + 1, len(works))
    note = f"{settings.batch_size} conversations or prompts at once"
    return side_result("memory", replace(settings, weights="random"), model, results, note)
