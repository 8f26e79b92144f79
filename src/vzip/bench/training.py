"""What a training step costs with all visual tokens and with few, in turn: the step that ``train.py`` takes.

The conversations are synthetic, one image each: ``prompt_tokens`` of text, of which all but the first are learned, the
most there can be. Only the projector trains, as in the paper, with gradient checkpointing. Batches are ready before the
clock starts, so reading and preparing data is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vzip.bench import shapes, workload
from vzip.bench.device_memory import PeakMemory, refuse_if_too_large
from vzip.bench.memory.estimate import estimate_training
from vzip.bench.memory.measure import real_stepper
from vzip.bench.memory.workload import ModelShape, Workload, training_batch, visual_tokens
from vzip.bench.run import SCHEMA_VERSION, environment
from vzip.bench.settings import BenchSettings
from vzip.bench.shapes import BenchModel
from vzip.bench.timing import StageTimes, Stopwatch, Timing, run_interleaved
from vzip.compressors import Compressor, Identity, VisionZip
from vzip.errors import ConfigError
from vzip.models.families import FamilyOptions, adapter_class_for_config
from vzip.models.vlm import CompressedVlm
from vzip.train.settings import LaunchSettings, TrainSettings

NUM_SAMPLES = 66_500
"""The tenth of LLaVA-1.5's 665 298 conversations that the paper fine-tunes on."""

STAGES = {
    "step": "one optimizer step from a batch on the host to updated weights",
    "forward": "of it, until the loss is known",
}


@dataclass(frozen=True)
class TrainMethodResult:
    """What was measured of training one method.

    Attributes:
        stages: of ``STAGES``.
        num_visual_tokens: of each image.
        num_tokens: of each conversation, visual ones counted.
        loss: of the last step, in nats a token.
        samples_per_s: conversations a second, by the median step.
        projected_hours: of ``NUM_SAMPLES`` conversations on this one device.
        peak_memory_bytes, peak_memory_added_bytes, memory_kind: as in ``vzip.bench.run.MethodResult``, of a step.
        estimated_memory_bytes: the same peak by ``vzip.bench.memory``, weights included.
    """

    stages: dict[str, Timing]
    num_visual_tokens: int
    num_tokens: int
    loss: float
    samples_per_s: float
    projected_hours: float
    peak_memory_bytes: int
    peak_memory_added_bytes: int
    memory_kind: str
    estimated_memory_bytes: int


@dataclass(frozen=True)
class SideResult:
    """A measurement of training or of memory: as ``vzip.bench.run.BenchResult``.

    Attributes:
        kind: ``train`` or ``memory``.
        model, settings, resolved, environment, notes: as there.
        methods: results by name.
    """

    kind: str
    model: str
    settings: dict[str, Any]
    resolved: dict[str, Any]
    environment: dict[str, Any]
    methods: dict[str, Any]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for ``json.dump``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def train_settings(settings: BenchSettings) -> tuple[TrainSettings, LaunchSettings]:
    """As ``configs/train/projector.yaml`` has it, a step of one batch on one device."""
    train = TrainSettings(
        parts=("projector",),
        reset_projector=False,
        template="vicuna_v1",
        max_length=2048,
        learning_rate=2e-5,
        tower_learning_rate=None,
        weight_decay=0.0,
        warmup_fraction=0.03,
        num_epochs=1,
        num_steps=None,
        samples_per_step=settings.batch_size,
        max_grad_norm=1.0,
        precision="bfloat16" if settings.torch_dtype == torch.bfloat16 else "float32",
        save_every=100,
        keep_last=2,
        num_validation_samples=0,
        trackers=(),
        lora=None,
        loss_norm="tokens",
        tf32=False,
    )
    launch = LaunchSettings(
        num_threads=None,
        device=settings.torch_device.type,
        num_processes=1,
        num_machines=1,
        strategy="single",
        batch_size=settings.batch_size,
        gradient_checkpointing=True,
        num_workers=0,
    )
    return train, launch


def compressors(settings: BenchSettings, model: BenchModel) -> dict[str, Compressor]:
    """Each method's.

    Raises:
        ConfigError: a vision tower alone, or a budget that does not fit it.
        UnsupportedModelError: a model that cannot be served.
    """
    if model.tower_only:
        raise ConfigError(
            f"model={model.name} is a vision tower alone, which neither trains nor answers; choose a whole model"
            f" ({shapes.TINY}, {', '.join(name for name in shapes.SHAPES if name != model.name)})"
        )
    found: dict[str, Compressor] = {"vanilla": Identity(), "vzip": VisionZip(settings.token_budget(model)[1])}
    for name in settings.methods:
        adapter_class_for_config(model.config).check_settings(model.config, found[name], FamilyOptions())
    return {name: found[name] for name in settings.methods}


def load_of(settings: BenchSettings, shape: ModelShape, num_new_tokens: int = 0) -> Workload:
    """The batch of a method.

    Raises:
        ConfigError: a conversation longer than the language model's positions.
    """
    load = Workload(settings.batch_size, 1, 0)
    num_visual = visual_tokens(shape, load)
    length = num_visual + settings.prompt_tokens
    allowed = shape.config.text_config.max_position_embeddings
    if length + num_new_tokens > allowed:
        raise ConfigError(
            f"{num_visual} visual, {settings.prompt_tokens} text and {num_new_tokens} new tokens are"
            f" {length + num_new_tokens}, and the language model has {allowed} positions; lower prompt_tokens or"
            " num_new_tokens, or leave vanilla out of methods"
        )
    return Workload(settings.batch_size, 1, length, num_new_tokens)


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
    methods = compressors(settings, model)
    log("estimating the memory of a step")
    loads, estimates = {}, {}
    for name, compressor in methods.items():
        shape = ModelShape(model.config, compressor)
        loads[name] = load_of(settings, shape)
        estimates[name] = estimate_training(shape, train, launch, loads[name], 1, device.type == "cuda").total
    refuse_if_too_large(max(estimates.values()), device, f"training model={model.name}")

    log(f"building {model.name} on {device} in {train.precision}")
    vlm = CompressedVlm(workload.build_model(settings, model)[0], next(iter(methods.values())))
    num_parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    stepper, _ = real_stepper(vlm, train, launch)
    batches = {}
    for name, compressor in methods.items():
        vlm.compressor = compressor
        batches[name] = training_batch(vlm, loads[name])
    num_steps = len(methods) * (settings.warmup + settings.repeats + 1)
    done = 0
    losses: dict[str, float] = {}

    def step_once(name: str) -> StageTimes:
        nonlocal done
        vlm.compressor = methods[name]
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
        results[name] = TrainMethodResult(
            stages=timings[name],
            num_visual_tokens=batches[name].num_visual_tokens[0],
            num_tokens=loads[name].length,
            loss=losses[name],
            samples_per_s=samples_per_s,
            projected_hours=NUM_SAMPLES / samples_per_s / 3600,
            peak_memory_bytes=peak.peak_bytes,
            peak_memory_added_bytes=peak.peak_bytes - peak.start_bytes,
            memory_kind=peak.kind,
            estimated_memory_bytes=estimates[name],
        )
    return SideResult(
        kind="train",
        model=model.name,
        settings=asdict(settings),
        resolved=resolved(settings, model, num_parameters),
        environment=environment(device),
        methods=results,
        notes=[
            f"hours are for {NUM_SAMPLES} conversations of this length on one device; data is ready before each step"
        ],
    )


def resolved(settings: BenchSettings, model: BenchModel, num_parameters: int) -> dict[str, Any]:
    """What ``auto`` came to."""
    name, budget = settings.token_budget(model)
    return {
        "device": str(settings.torch_device),
        "dtype": str(settings.torch_dtype).removeprefix("torch."),
        "budget": name,
        "num_dominant": budget.num_dominant,
        "num_contextual": budget.num_contextual,
        "weights": settings.weights_of(model),
        "num_parameters": num_parameters,
        "trained": "projector",
        "gradient_checkpointing": True,
        "samples_per_step": settings.batch_size,
        "text_tokens": settings.prompt_tokens,
    }
