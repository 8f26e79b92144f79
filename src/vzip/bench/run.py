"""One measurement from start to end: check, build, compare, time, count, and a result that can be written down."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from vzip.bench import flops, limit, operations, shapes, workload
from vzip.bench.device_memory import PeakMemory, kv_cache_formula_bytes, release_unused
from vzip.bench.eager_maps import Agreement, check_agreement
from vzip.bench.hooks import Seen
from vzip.bench.measurement import Measurement
from vzip.bench.settings import COMPILED, BenchSettings
from vzip.bench.stages import (
    METHOD_CLASSES,
    STAGES,
    Compiled,
    EagerMapsMethod,
    Method,
    PassResult,
    Vzip,
    preprocess,
    run_pass,
)
from vzip.bench.timing import StageTimes, Stopwatch, Timing, run_interleaved
from vzip.bench.visuals import Images
from vzip.bench.workload import Workload
from vzip.results.provenance import code_state, hardware, source_sha256, versions

_BARE = "bare products"  # taking turns with the methods


@dataclass(frozen=True)
class MethodResult:
    """What was measured of one method.

    Attributes:
        stages: stage -> durations; the names are ``vzip.bench.stages.STAGES``.
        num_visual_tokens: of each prompt, counted on the tensors that entered the language model.
        num_prompt_tokens: length of the language model's input; 0 for a bare tower.
        cached_tokens: tokens of one prompt that each layer's cache held after prefill.
        kv_cache_bytes: allocated by the cache after prefill, over the batch.
        kv_cache_formula_bytes: what it should be.
        peak_memory_bytes: largest use during a pass, weights included; see ``memory_kind``.
        peak_memory_added_bytes: of that, what came on top of what was in use before the pass.
        memory_kind: how it was measured.
        flops: stage -> operations.
        attention_kernels: torch's fused attention that ran (the tower's and the language model's), by its names; empty
            where none was fused.
        limit_ms: stage -> what its operations would take at the rate of its matrix products alone, see ``limit``.
        limit_gflops: stage -> that rate, in 10^9 operations a second.
    """

    stages: dict[str, Timing]
    num_visual_tokens: int
    num_prompt_tokens: int
    cached_tokens: list[int]
    kv_cache_bytes: int
    kv_cache_formula_bytes: int
    peak_memory_bytes: int
    peak_memory_added_bytes: int
    memory_kind: str
    flops: dict[str, operations.StageFlops]
    attention_kernels: list[str]
    limit_ms: dict[str, float]
    limit_gflops: dict[str, float]

    def share_of_limit(self, stage: str) -> float | None:
        """How near a stage comes to its limit, 1 being there; the tower's with selection, which only adds time."""
        if stage not in self.limit_ms:
            return None
        return self.limit_ms[stage] / self.median_ms(*(("tower", "selection") if stage == "tower" else (stage,)))

    def median_ms(self, *stages: str) -> float:
        """Sum of the medians of stages; those this method does not have count nothing."""
        return sum(self.stages[stage].median_ms for stage in stages if stage in self.stages)


@dataclass(frozen=True)
class BenchResult(Measurement):
    """A measurement of passes.

    Attributes:
        agreement: vzip against eager_maps before the measurement, or None where one of them is left out.
        selection_overlap: share of dominant tokens that both kept in the measured dtype, or None likewise.
        products: bare matrix products of the limited stages' shapes, timed in turn with the passes.
    """

    methods: dict[str, MethodResult]
    products: dict[str, Timing]
    agreement: Agreement | None
    selection_overlap: float | None

    def ratios(self) -> dict[str, float]:
        """The numbers the measurement is made for, from medians; only those its methods allow."""
        found: dict[str, float] = {}
        by_name = self.methods
        if "vzip" not in by_name:
            return found
        ours = by_name["vzip"]
        # Scoring is timed apart and inside `tower` as well: it belongs to what selection costs.
        if "scoring" in ours.stages:
            tower_ms = ours.median_ms("tower") - ours.median_ms("scoring")
            found["selection_share_of_tower"] = ours.median_ms("selection", "scoring") / tower_ms
        if COMPILED in by_name:
            for stage in ("prefill", "decode_per_token", "time_to_first_token"):
                found[f"{stage}_speedup_of_compiled"] = ours.median_ms(stage) / by_name[COMPILED].median_ms(stage)
        for name in ("vanilla", "eager_maps"):
            if name not in by_name:
                continue
            other = by_name[name]
            found[f"tower_and_selection_speedup_over_{name}"] = other.median_ms("tower", "selection") / ours.median_ms(
                "tower", "selection"
            )
            for stage in ("prefill", "decode_per_token", "time_to_first_token"):
                if stage in ours.stages:
                    found[f"{stage}_speedup_over_{name}"] = other.median_ms(stage) / ours.median_ms(stage)
            if ours.peak_memory_added_bytes > 0:
                added = other.peak_memory_added_bytes / ours.peak_memory_added_bytes
                found[f"memory_added_reduction_over_{name}"] = added
            if ours.kv_cache_bytes:
                found[f"kv_cache_reduction_over_{name}"] = other.kv_cache_bytes / ours.kv_cache_bytes
        for stage in limit.LIMITED:
            if (share := ours.share_of_limit(stage)) is not None:
                found[f"{stage}_share_of_limit"] = share
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for ``json.dump``."""
        return {
            **super().to_json(),
            "ratios": self.ratios(),
            "conventions": {"flops": flops.CONVENTION, "stages": STAGES, "times": "median and quartiles, milliseconds"},
        }


def measure(
    settings: BenchSettings,
    log: Callable[[str], None] = lambda _line: None,
    on_step: Callable[[int, int], None] = lambda _done, _total: None,
) -> BenchResult:
    """Runs a measurement.

    Args:
        settings: what to measure.
        log: called with a line at each act.
        on_step: called with passes done and passes in all.

    Raises:
        ConfigError, UnsupportedModelError, CheckpointError: as ``workload.check`` and ``workload.build``.
        NotEquivalentError: vzip and eager_maps do not compute the same tokens.
    """
    model = shapes.resolve(settings.model)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings = workload.fitting(settings, model)
    workload.check(settings, model)
    log(f"building {model.name} on {settings.torch_device} in {str(settings.torch_dtype).removeprefix('torch.')}")
    w = workload.build(settings, model)
    agreement = overlap = None
    if {"vzip", "eager_maps"} <= set(settings.methods):
        log("checking that vzip and eager_maps compute the same visual tokens")
        with torch.inference_mode():
            pixel_values = w.visuals.tower_inputs(preprocess(w))
        views = torch.cat([pixel_values, pixel_values.flip(-1), pixel_values.flip(-2)])  # one may hold a near tie
        agreement = check_agreement(w.visuals.tower_module, w.select_layer, w.compressor, views)
        overlap = selection_overlap(w, pixel_values[:1])
    methods = {name: METHOD_CLASSES[name](w) for name in settings.methods}

    total = (len(methods) + 1) * (settings.warmup + settings.repeats) + 2 * len(methods)
    done = 0
    last: dict[str, PassResult] = {}

    def advance() -> None:
        nonlocal done
        done += 1
        on_step(done, total)

    def run_once(method: Method) -> StageTimes:
        last[method.name] = result = run_pass(method)
        return result.times_ms

    log("measuring")
    seen = {}
    for name, method in methods.items():
        seen[name] = look(method)
        advance()
    bare = limit.BareProducts.of([one.products for one in seen.values()], w.device, w.dtype)
    timings = run_interleaved(
        {
            **{name: (lambda method=method: run_once(method)) for name, method in methods.items()},  # type: ignore[misc]
            _BARE: bare.run,
        },
        repeats=settings.repeats,
        warmup=settings.warmup,
        on_step=advance,
    )
    products = timings.pop(_BARE)
    del bare  # or its operands would be among the memory measured
    release_unused(w.device)
    results = {}
    for name, method in methods.items():
        with PeakMemory(w.device) as peak:
            run_pass(method)
        advance()
        passed = last[name]
        counted = operations.count_method(w, model, name, passed.num_visual_tokens, passed.cached_tokens)
        rates = limit.rates(seen[name].products, products)
        results[name] = MethodResult(
            stages=timings[name],
            num_visual_tokens=passed.num_visual_tokens,
            num_prompt_tokens=passed.num_prompt_tokens,
            cached_tokens=passed.cached_tokens,
            kv_cache_bytes=passed.kv_cache_bytes,
            kv_cache_formula_bytes=_expected_cache_bytes(w, method, passed),
            peak_memory_bytes=peak.peak_bytes,
            peak_memory_added_bytes=peak.peak_bytes - peak.start_bytes,
            memory_kind=peak.kind,
            flops=counted,
            attention_kernels=sorted(seen[name].attention),
            limit_ms={stage: 1e3 * counted[stage].counted / rate for stage, rate in rates.items()},
            limit_gflops={stage: rate / 1e9 for stage, rate in rates.items()},
        )
    return BenchResult(
        model=model.name,
        settings=asdict(settings),
        resolved={
            **resolved_settings(settings, model, w.model),
            "num_crops": w.visuals.num_crops,
            "prompt": w.visuals.describe(),
            "tower_only": model.tower_only,
        },
        environment=environment(w.device),
        agreement=agreement,
        selection_overlap=overlap,
        products=products,
        methods=results,
        notes=list(model.notes),
    )


@torch.inference_mode()
def selection_overlap(w: Workload, pixel_values: torch.Tensor) -> float:
    """Returns the share of dominant tokens that vzip and eager_maps both keep in the dtype measured."""
    kept = [
        set(w.compressor(method(w).run_tower(pixel_values)).source_index[0].tolist())
        for method in (Vzip, EagerMapsMethod)
    ]
    return len(kept[0] & kept[1]) / len(kept[0])


def look(method: Method) -> Seen:
    """What a pass calls: torch's fused attention (``_scaled_dot_product_flash_attention``), products by stage.

    Nothing of a compiled method: what a graph calls is not seen.
    """
    watch = Stopwatch(method.workload.device)
    seen = Seen(watch)
    if not isinstance(method, Compiled):
        with seen:
            run_pass(method, watch)
    return seen


def _expected_cache_bytes(w: Workload, method: Method, passed: PassResult) -> int:
    if w.adapter is None:
        return 0
    text, num_dropped = w.model.config.get_text_config(), 0
    if method.pruner is not None and isinstance(w.visuals, Images):
        num_images = w.visuals.num_placeholders
        own = passed.num_visual_tokens // num_images
        schedule = method.pruner.schedule(own, text.num_hidden_layers)
        if schedule is None:  # the data decide: what layers hold is all that is known
            num_dropped = sum(passed.num_prompt_tokens - length for length in passed.cached_tokens)
        else:
            num_dropped = num_images * sum(own - kept for kept in schedule)
    return kv_cache_formula_bytes(
        num_layers=1,
        num_kv_heads=text.num_key_value_heads,
        head_dim=flops.head_width(text),
        num_tokens=text.num_hidden_layers * passed.num_prompt_tokens - num_dropped,
        batch_size=w.settings.batch_size,
        element_bytes=w.dtype.itemsize,
    )


def resolved_settings(settings: BenchSettings, model: shapes.BenchModel, built: nn.Module) -> dict[str, Any]:
    """What ``auto`` came to, and the size of the model that was built."""
    name, budget = settings.token_budget(model)
    return {
        "device": str(settings.torch_device),
        "dtype": str(settings.torch_dtype).removeprefix("torch."),
        "budget": name,
        **{key: value for key, value in asdict(budget).items() if key != "scope"},
        "scope": budget.scope,
        "weights": settings.weights_of(model),
        "num_parameters": sum(p.numel() for p in built.parameters()),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader must know to make a number again: command, code, versions, hardware."""
    machine, packages = hardware(), versions()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "vzip", *sys.argv[1:]]),
        "code": {**code_state(), "source_sha256": source_sha256()},
        **{name: packages[name] for name in ("python", "transformers", "pillow")},
        "torch": torch.__version__,
        "versions": packages,
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else machine["cpu"],
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0],
        "hardware": machine,
    }
