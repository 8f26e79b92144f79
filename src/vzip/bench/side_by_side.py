"""What many methods cost on one loaded model: one prompt with one image, the methods in turns on one machine."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from vzip.bench.settings import BenchSettings
from vzip.bench.stages import Method, PassResult, Vanilla, run_pass
from vzip.bench.timing import StageTimes, run_interleaved
from vzip.bench.visuals import Images, visuals_of
from vzip.bench.workload import Workload, make_images, make_prompts
from vzip.compressors import Compressor
from vzip.errors import VzipError
from vzip.models.families import InternVlAdapter, LlavaNextAdapter, LlavaOnevisionAdapter, VideoLlavaAdapter
from vzip.models.families.internvl.processing import MAX_TILES
from vzip.models.families.llava_base import LlavaBase
from vzip.models.vlm import CompressedVlm
from vzip.progress import Progress
from vzip.pruners import Pruner

Key = TypeVar("Key")
STAGES = ("tower", "selection", "prefill", "time_to_first_token")
PROMPT_TOKENS, NUM_FRAMES = 60, 8


class Chosen(Vanilla):
    """Any compressor and pruner; what compresses runs the tower as an evaluation does, vanilla as Hugging Face does."""

    def __init__(self, workload: Workload, compressor: Compressor, pruner: Pruner | None) -> None:
        if not compressor.is_vanilla:
            visuals = copy.copy(workload.visuals)
            visuals.has_tower = False  # the family runs it, so that what a method does to the tower is in its time
            workload = replace(workload, visuals=visuals, compressor=compressor)
        super().__init__(workload)
        self._compressor, self._pruner = compressor, pruner

    @property
    def compressor(self) -> Compressor:
        return self._compressor

    @property
    def pruner(self) -> Pruner | None:
        return self._pruner


@dataclass(frozen=True)
class Cost:
    """What one method costs.

    Attributes:
        median_ms: by stage, see ``stages.STAGES``.
        first_token_quartiles_ms: of the time to the first token, lower and upper.
        kv_cache_bytes: allocated by the cache after the prompt.
        load_average: of the machine over the minute before the end, programs that want a core.
    """

    median_ms: Mapping[str, float]
    first_token_quartiles_ms: tuple[float, float]
    kv_cache_bytes: int
    load_average: float


def workload_of(vlm: CompressedVlm) -> Workload:
    """A fixed prompt for a model that is loaded: the usual image (crops, a video) of its family, some text."""
    settings = BenchSettings(prompt_tokens=PROMPT_TOKENS, num_new_tokens=1, device=str(vlm.model.device))
    adapter, processor = vlm.adapter, vlm.processor
    num_crops = NUM_FRAMES if isinstance(adapter, VideoLlavaAdapter) else 1
    if isinstance(adapter, LlavaNextAdapter):
        side = adapter.geometry.image_size
        counts = [height // side * (width // side) for height, width in adapter.pinpoints]
        most = adapter.max_tiles if isinstance(adapter, LlavaOnevisionAdapter) else max(counts)
        num_crops = 1 + max((count for count in counts if count <= most), default=min(counts))
    if isinstance(adapter, InternVlAdapter):
        num_crops = MAX_TILES + 1
    visuals: Images = visuals_of(adapter, num_crops)
    return Workload(
        settings=settings,
        device=vlm.model.device,
        dtype=vlm.model.dtype,
        model=vlm.model,
        adapter=adapter,
        visuals=visuals,
        select_layer=adapter.select_layer if isinstance(adapter, LlavaBase) else 0,
        compressor=vlm.compressor,
        image_processor=None if processor is None else processor.image_processor,
        images=make_images(visuals.num_files, settings.seed, visuals.image_size),
        input_ids=make_prompts(settings, visuals),
    )


def measure(
    vlm: CompressedVlm,
    methods: Mapping[Key, tuple[Compressor, Pruner | None]],
    repeats: int = 7,
    warmup: int = 2,
) -> dict[Key, Cost | str]:
    """Runs every method in turns; its costs, or why it cannot be measured by itself.

    Args:
        vlm: whose weights are used; it is left as it was.
        methods: by any key.
        repeats, warmup: rounds that count, and rounds before them that do not.
    """
    cache, vlm.adapter.tower_cache = vlm.adapter.tower_cache, None
    try:
        workload = workload_of(vlm)
        chosen: dict[Key, Method] = {key: Chosen(workload, *method) for key, method in methods.items()}
        found: dict[Key, Cost | str] = {}
        for key, method in chosen.items():
            try:
                run_pass(method)
            except VzipError as error:
                found[key] = str(error)
        last: dict[str, PassResult] = {}

        def run_once(name: str, method: Method) -> StageTimes:
            last[name] = run_pass(method)
            return last[name].times_ms

        names = {str(number): key for number, key in enumerate(chosen) if key not in found}
        with Progress("measuring", "passes", (warmup + repeats) * len(names)) as progress:
            times = run_interleaved(
                {name: (lambda name=name, key=key: run_once(name, chosen[key])) for name, key in names.items()},  # type: ignore[misc]
                repeats=repeats,
                warmup=warmup,
                on_step=lambda: progress.advance(1),
            )
    finally:
        vlm.adapter.tower_cache = cache
    load = os.getloadavg()[0]
    for name, key in names.items():
        whole = times[name]["time_to_first_token"]
        medians = {stage: times[name][stage].median_ms for stage in STAGES if stage in times[name]}
        found[key] = Cost(medians, (whole.q1_ms, whole.q3_ms), last[name].kv_cache_bytes, load)
    return found
