"""What a training step costs with all visual tokens and with few, in turn: the step that ``train.py`` takes.

The conversations are synthetic, one image each: ``prompt_tokens`` of text, of which all but the first are learned, the
most there can be. Only the projector trains, as in the paper, with gradient checkpointing. Batches are ready before the
clock starts, so reading and preparing data is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vzip.bench import shapes, workload
from vzip.bench.device_memory import PeakMemory, refuse_if_too_large
from vzip.bench.measurement import Measurement
from vzip.bench.memory.estimate import estimate_training
from vzip.bench.memory.measure import real_stepper
from vzip.bench.memory.model_shape import ModelShape
from vzip.bench.memory.workload import Workload, num_visual_tokens, training_batch
from vzip.bench.run import environment, resolved_settings
from vzip.bench.settings import BenchSettings
from vzip.bench.shapes import BenchModel
from vzip.bench.timing import StageTimes, Stopwatch, Timing, run_interleaved
from vzip.compressors import Compressor, Identity
from vzip.compressors.base import check_reads_no_text
from vzip.errors import ConfigError
from vzip.installed import checkout
from vzip.models.families import FamilyOptions, adapter_class_for_config
from vzip.models.generation import max_positions
from vzip.models.vlm import CompressedVlm
from vzip.option_files import option_values
from vzip.train.settings import LaunchSettings, TrainSettings

NUM_SAMPLES = 66_500
"""The tenth of LLaVA-1.5's 665 298 conversations that the paper fine-tunes on."""


@dataclass(frozen=True)
class WorkResult:
    """What was measured of one kind of work: an optimizer step, or answering.

    Attributes:
        num_visual_tokens: of each image.
        num_tokens: of each conversation or prompt, visual ones counted.
        estimated_bytes: the peak by ``vzip.bench.memory``, by what it is for.
        measured_bytes: the peak, weights included: what torch allocated at most (a step on a CPU: ``memory_kind``).
    """

    num_visual_tokens: int
    num_tokens: int
    estimated_bytes: dict[str, int]
    measured_bytes: int


@dataclass(frozen=True)
class StepResult(WorkResult):
    """What was measured of an optimizer step.

    Attributes:
        stages: ``step``, from a batch on the host to updated weights, and ``forward``, of it, until the loss is known.
        loss: of the last step, in nats a token.
        samples_per_s: conversations a second, by the median step.
        projected_hours: of ``NUM_SAMPLES`` conversations on this one device.
        added_bytes: of the measured ones, what came on top of what was in use before the step.
        memory_kind: how they were measured, as in ``vzip.bench.run.MethodResult``.
    """

    stages: dict[str, Timing]
    loss: float
    samples_per_s: float
    projected_hours: float
    added_bytes: int
    memory_kind: str


@dataclass(frozen=True)
class SideResult(Measurement):
    """A measurement of training or of memory.

    Attributes:
        kind: ``train``, whose methods have a ``StepResult`` each, or ``memory``: a ``WorkResult`` of ``training`` and
            one of ``inference``.
    """

    kind: str


def side_result(
    kind: str, settings: BenchSettings, model: BenchModel, methods: dict[str, Any], note: str
) -> SideResult:
    """What was measured, with what ``auto`` came to and where it was measured."""
    built = shapes.build_meta(model, settings.torch_dtype)
    return SideResult(
        kind=kind,
        model=model.name,
        settings=asdict(settings),
        resolved={
            **resolved_settings(settings, model, built),
            "trained": "projector",
            "gradient_checkpointing": True,
            "samples_per_step": settings.batch_size,
            "text_tokens": settings.prompt_tokens,
        },
        environment=environment(settings.torch_device),
        methods=methods,
        notes=[note],
    )


def train_settings(settings: BenchSettings) -> tuple[TrainSettings, LaunchSettings]:
    """``train=projector``, a step of one batch on one device."""
    configs = checkout() / "configs"
    projector = option_values(configs, "train", "projector")
    precision = "bfloat16" if settings.torch_dtype == torch.bfloat16 else "float32"
    train = TrainSettings.of_group({**projector, "precision": precision, "samples_per_step": settings.batch_size})
    inline = {key: value for key, value in option_values(configs, "launcher", "inline").items() if key != "name"}
    launch = LaunchSettings(**inline | {"device": settings.torch_device.type, "gradient_checkpointing": True})
    return train, replace(launch, batch_size=settings.batch_size)


def method_shapes(settings: BenchSettings, model: BenchModel) -> dict[str, ModelShape]:
    """Each method's model, without weights.

    Raises:
        ConfigError: a vision tower alone, or a budget that does not fit it.
        UnsupportedModelError: a model that cannot be served.
    """
    if model.tower_only:
        raise ConfigError(
            f"model={model.name} is a vision tower alone, which neither trains nor answers; choose a whole model"
            f" ({shapes.TINY}, {', '.join(name for name in shapes.SHAPES if name != model.name)})"
        )
    known: dict[str, Compressor] = {"vanilla": Identity(), "vzip": settings.method(model)}
    check_reads_no_text(known["vzip"], "this is measured without one")
    for name in settings.methods:
        adapter_class_for_config(model.config).check_settings(model.config, known[name], FamilyOptions())
    return {name: ModelShape(model.config, known[name]) for name in settings.methods}


def load_of(settings: BenchSettings, shape: ModelShape, num_new_tokens: int = 0) -> tuple[Workload, int]:
    """The batch of a method, and the visual tokens of each image.

    Raises:
        ConfigError: a conversation longer than the language model's positions.
    """
    num_visual = num_visual_tokens(shape.on_meta_device(torch.float32))
    length = num_visual + settings.prompt_tokens
    allowed = max_positions(shape.config)
    if allowed is not None and length + num_new_tokens > allowed:
        raise ConfigError(
            f"{num_visual} visual, {settings.prompt_tokens} text and {num_new_tokens} new tokens are"
            f" {length + num_new_tokens}, and the language model has {allowed} positions; lower prompt_tokens or"
            " num_new_tokens, or leave vanilla out of methods"
        )
    return Workload(settings.batch_size, 1, length, num_new_tokens), num_visual


def measure_training_steps(
    settings: BenchSettings,
    log: Callable[[str], None] = lambda _line: None,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> SideResult:
    """Runs a measurement of training; arguments and errors as ``vzip.bench.run.measure``."""
    model = shapes.resolve(settings.model)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device, (train, launch) = settings.torch_device, train_settings(settings)
    log("estimating the memory of a step")
    methods, loads, estimates = method_shapes(settings, model), {}, {}
    for name, shape in methods.items():
        loads[name], _ = load_of(settings, shape)
        estimates[name] = estimate_training(shape, train, launch, loads[name])
    refuse_if_too_large(max(peak.total() for peak in estimates.values()), device, f"training model={model.name}")

    log(f"building {model.name} on {device} in {train.precision}")
    vlm = CompressedVlm(workload.build_model(settings, model)[0], next(iter(methods.values())).compressor)
    stepper = real_stepper(vlm, train, launch)
    batches = {}
    for name, shape in methods.items():
        vlm.compressor = shape.compressor
        batches[name] = training_batch(vlm, loads[name])
    num_steps = len(methods) * (settings.warmup + settings.repeats + 1)
    done = 0
    losses: dict[str, float] = {}

    def step_once(name: str) -> StageTimes:
        nonlocal done
        vlm.compressor = methods[name].compressor
        watch = Stopwatch(device)
        with watch.stage("step"):
            metrics = stepper.step(done, num_steps, iter([batches[name]]))
        done += 1
        on_step(done, num_steps)
        losses[name] = metrics["loss"]
        return {**watch.times_ms, "forward": metrics["forward_ms"]}

    log("measuring")
    timings = run_interleaved(
        {name: (lambda name=name: step_once(name)) for name in methods},  # type: ignore[misc]
        repeats=settings.repeats,
        warmup=settings.warmup,
    )
    results = {}
    for name in methods:
        with PeakMemory(device) as peak:
            step_once(name)
        samples_per_s = 1000 * settings.batch_size / timings[name]["step"].median_ms
        results[name] = StepResult(
            num_visual_tokens=batches[name].num_visual_tokens[0],
            num_tokens=loads[name].length,
            estimated_bytes=dict(estimates[name]),
            measured_bytes=peak.peak_bytes,
            stages=timings[name],
            loss=losses[name],
            samples_per_s=samples_per_s,
            projected_hours=NUM_SAMPLES / samples_per_s / 3600,
            added_bytes=peak.peak_bytes - peak.start_bytes,
            memory_kind=peak.kind,
        )
    note = f"hours are for {NUM_SAMPLES} conversations of this length on one device; data is ready before each step"
    return side_result("train", settings, model, results, note)
