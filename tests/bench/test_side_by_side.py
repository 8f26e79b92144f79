"""Costs of many methods on one loaded model."""

from __future__ import annotations

import vzip
from vzip.bench.side_by_side import STAGES, measure
from vzip.compressors import Identity, RandomTokens, TokenBudget


def test_methods_take_turns_and_the_cache_holds_what_they_leave() -> None:
    vlm = vzip.load_vlm("vzip/tiny")
    cache = vlm.adapter.tower_cache
    methods = {
        "vanilla": (Identity(), None),
        "random": (RandomTokens(TokenBudget(54, 10)), None),
        "fastv": (Identity(), vzip.FastV(1, budget=192)),
    }
    costs = measure(vlm, methods, repeats=1, warmup=0)
    assert list(costs) == ["vanilla", "random", "fastv"] and vlm.adapter.tower_cache is cache
    token_bytes = costs["vanilla"].kv_cache_bytes / (576 + 60)  # type: ignore[union-attr]
    assert costs["random"].kv_cache_bytes == token_bytes * (64 + 60)  # type: ignore[union-attr]
    assert costs["fastv"].kv_cache_bytes == token_bytes * (192 + 60)  # type: ignore[union-attr]
    assert set(costs["random"].median_ms) == set(STAGES)  # type: ignore[union-attr]
