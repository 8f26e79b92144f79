"""What each row of the demo's table costs: one prompt with one image, measured by the bench's own stages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vzip.bench import settings as bench_settings
from vzip.bench import shapes
from vzip.bench.stages import Method, Vanilla, Vzip, run_pass
from vzip.bench.workload import build
from vzip.demo.sweep import Setting
from vzip.progress import Progress

STAGES = ("tower", "selection", "prefill", "decode_per_token")


@dataclass(frozen=True)
class Cost:
    """Medians in milliseconds of the stages, and the bytes the KV cache holds after prefill."""

    milliseconds: dict[str, float]
    kv_cache_bytes: int


def measure(rows: Sequence[Setting], repeats: int = 7, warmup: int = 2) -> list[Cost]:
    """Runs the settings in turns, so that a busy moment of the machine hits all alike; batch 1, float32 on a CPU."""
    settings = bench_settings.parse(["model=tiny", "num_new_tokens=4", "prompt_tokens=20"])
    workload = build(settings, shapes.resolve(settings.model))
    methods: list[Method] = []
    for row in rows:
        own = replace(workload, compressor=row.compressor)
        methods.append(Vanilla(own) if row.method == "vanilla" else Vzip(own))
    with Progress("measuring", "passes", (warmup + repeats) * len(methods)) as progress:
        turns = [[run_pass(method) for method in progress.track(methods)] for _ in range(warmup + repeats)]
    passes = turns[warmup:]
    costs = []
    for column in zip(*passes, strict=True):
        times = {name: statistics.median(p.times_ms.get(name, 0.0) for p in column) for name in STAGES}
        costs.append(Cost(times, column[0].kv_cache_bytes))
    return costs
