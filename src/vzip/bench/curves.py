"""How cost grows with visual tokens, crops, frames and prompts at once: one axis at a time, its points in turns.

LLaVA-1.5's shapes; the frames are read by a Video-LLaVA of the same vision tower and language model with random
weights, whose positions suffice for them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import LlavaConfig, PreTrainedModel

from vzip.bench import operations, shapes, workload
from vzip.bench.device_memory import PeakMemory, release_unused
from vzip.bench.measurement import Measurement
from vzip.bench.run import environment, resolved_settings
from vzip.bench.settings import BenchSettings
from vzip.bench.shapes import BenchModel
from vzip.bench.stages import METHOD_CLASSES, Method, PassResult, run_pass
from vzip.bench.timing import StageTimes, Timing, run_interleaved
from vzip.bench.workload import around
from vzip.errors import ConfigError
from vzip.models.towers.structure import geometry_from_config
from vzip.models.weights.from_config import family_config

FRAME_BUDGET = "17tok"  # the paper's of a frame
MAX_CROPS = 16  # images in a prompt
FEWEST_TOKENS = 16
AXES = {
    "visual_tokens": "visual tokens of one image",
    "crops": "crops a prompt (images of one crop each)",
    "batch": "prompts at once",
    "frames": "frames of one video",
}
"""Axis -> what grows along it."""


@dataclass(frozen=True)
class Point:
    """What is measured at one place of an axis."""

    axis: str
    value: int
    method: str
    settings: BenchSettings

    @property
    def name(self) -> str:
        return f"{self.value} {self.method}"


@dataclass(frozen=True)
class PointResult:
    """What was measured there.

    Attributes:
        value: on the axis.
        method: ``vanilla`` or ``vzip``.
        stages: stage -> durations of the whole batch.
        num_visual_tokens, num_prompt_tokens: of each prompt.
        num_prompts: in the batch.
        num_crops: inputs of the vision tower in each prompt.
        kv_cache_bytes: allocated after the prompts, over the batch.
        peak_memory_added_bytes: of a pass, on top of what was in use before.
        flops: stage -> operations of the whole batch, counted and by formula.
    """

    value: int
    method: str
    stages: dict[str, Timing]
    num_visual_tokens: int
    num_prompt_tokens: int
    num_prompts: int
    num_crops: int
    kv_cache_bytes: int
    peak_memory_added_bytes: int
    flops: dict[str, operations.StageFlops]


@dataclass(frozen=True)
class CurvesResult(Measurement):
    """A measurement of curves; ``methods`` has the points of each axis in their order."""

    methods: dict[str, list[PointResult]]

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "axes": AXES, "kind": "curves"}


def doublings(first: int, last: int) -> list[int]:
    """``first``, twice that, ..., up to ``last``; the latter alone where it is smaller."""
    values = [min(first, last)]
    while values[-1] * 2 <= last:
        values.append(values[-1] * 2)
    return values


def points_of(settings: BenchSettings, model: BenchModel) -> dict[str, list[Point]]:
    """What is measured on each axis.

    Args:
        settings: the largest batch is ``batch_size``, the most frames ``num_crops``.
        model: LLaVA-1.5's shape.
    """
    budget, num_patches = model.default_budget, geometry_from_config(model.vision_config).num_patches
    one = replace(settings, batch_size=1, num_crops=1, budget=budget)

    def along(axis: str, values: Sequence[int], method: str, **changes: Callable[[int], Any]) -> list[Point]:
        made = {value: {key: change(value) for key, change in changes.items()} for value in values}
        return [Point(axis, value, method, replace(one, methods=(method,), **own)) for value, own in made.items()]

    tokens = along("visual_tokens", doublings(FEWEST_TOKENS, num_patches - 1), "vzip", budget=lambda n: f"{n}tok")
    crops = along("crops", doublings(1, min(MAX_CROPS, settings.num_crops)), "vzip", num_crops=int)
    frames = along(
        "frames",
        doublings(1, settings.num_crops),
        "vzip",
        num_crops=int,
        budget=lambda _: FRAME_BUDGET,
        weights=lambda _: "random",
    )
    batches = [
        point
        for method in ("vanilla", "vzip")
        for point in along("batch", doublings(1, settings.batch_size), method, batch_size=int)
    ]
    return {
        "visual_tokens": [*tokens, *along("visual_tokens", [num_patches], "vanilla")],
        "crops": crops,
        "batch": batches,
        "frames": frames,
    }


def of_videos(model: BenchModel, num_tokens: int) -> BenchModel:
    """A Video-LLaVA of a LLaVA's vision tower and language model that reads so many tokens."""
    config = copy.deepcopy(model.config)
    text = config.text_config
    text.max_position_embeddings = max(num_tokens, text.max_position_embeddings)
    # Any word that is not the image's placeholder: prompts are drawn without both.
    token = next(number for number in range(text.vocab_size - 1, 0, -1) if number != config.image_token_id)
    video = family_config(
        "video_llava",
        config.vision_config,
        text,
        config.image_token_id,
        config.vision_feature_layer,
        config.vision_feature_select_strategy,
        video_token_index=token,
    )
    return BenchModel(f"{model.name}, as Video-LLaVA", video, "", "random")


def measure_curves(
    settings: BenchSettings,
    log: Callable[[str], None] = lambda _line: None,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> CurvesResult:
    """Runs a measurement of curves; arguments and errors as ``vzip.bench.run.measure``.

    Raises:
        ConfigError: another family than LLaVA-1.5; or as ``measure``, for any point, before the first is measured.
    """
    model = shapes.resolve(settings.model)
    if type(model.config) is not LlavaConfig:
        raise ConfigError(
            f"model={settings.model} with --curves: must be of LLaVA-1.5's family (tiny, llava15_7b, llava15_13b, a"
            " directory), whose prompts take any number of crops."
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    points = points_of(settings, model)
    longest = max(point.value for point in points["frames"]) * 17 + settings.prompt_tokens + settings.num_new_tokens
    models = {axis: of_videos(model, longest) if axis == "frames" else model for axis in points}
    for axis, own in points.items():
        for point in own:
            workload.check(point.settings, models[axis])
    rounds = settings.warmup + settings.repeats
    total, done = sum(map(len, points.values())) * (rounds + 1), 0

    def advance() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    found: dict[str, list[PointResult]] = {}
    built: PreTrainedModel | None = None
    resolved: dict[str, Any] = {}
    for axis, own in points.items():
        if built is None or axis == "frames":
            built = None  # before the other takes its place
            release_unused(settings.torch_device)
            log(f"building {models[axis].name} on {settings.torch_device}")
            built, image_processor = workload.build_model(own[0].settings, models[axis])
        log(f"measuring {len(own)} points along {AXES[axis]}")
        resolved = resolved or resolved_settings(settings, model, built)
        found[axis] = _measured(own, models[axis], built, image_processor, settings, advance)
    return CurvesResult(
        model=model.name,
        settings=asdict(settings),
        resolved=resolved,
        environment=environment(settings.torch_device),
        methods=found,
        notes=[*model.notes, "frames: random weights; a pass is of the whole batch"],
    )


def _measured(
    points: Sequence[Point],
    model: BenchModel,
    built: PreTrainedModel,
    image_processor: Any,
    settings: BenchSettings,
    advance: Callable[[], None],
) -> list[PointResult]:
    """The points of an axis, measured in turns on one model."""
    methods = {p.name: METHOD_CLASSES[p.method](around(p.settings, model, built, image_processor)) for p in points}
    last: dict[str, PassResult] = {}

    def run_once(name: str, method: Method) -> StageTimes:
        last[name] = run_pass(method)
        return last[name].times_ms

    peaks: dict[str, int] = {}
    for name, method in methods.items():  # also what is thrown away: the first pass of each
        with PeakMemory(settings.torch_device) as peak:
            run_once(name, method)
        peaks[name] = peak.peak_bytes - peak.start_bytes
        advance()
    timings = run_interleaved(
        {name: (lambda name=name, method=method: run_once(name, method)) for name, method in methods.items()},  # type: ignore[misc]
        repeats=settings.repeats,
        warmup=settings.warmup,
        on_step=advance,
    )
    results = []
    for point in points:
        passed, w = last[point.name], methods[point.name].workload
        results.append(
            PointResult(
                value=point.value,
                method=point.method,
                stages=timings[point.name],
                num_visual_tokens=passed.num_visual_tokens,
                num_prompt_tokens=passed.num_prompt_tokens,
                num_prompts=w.settings.batch_size,
                num_crops=w.visuals.num_crops,
                kv_cache_bytes=passed.kv_cache_bytes,
                peak_memory_added_bytes=peaks[point.name],
                flops=operations.count_method(w, model, point.method, passed.num_visual_tokens, passed.cached_tokens),
            )
        )
    return results
