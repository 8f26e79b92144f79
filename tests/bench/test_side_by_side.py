"""Costs of many methods on one loaded model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests import tiny_qwen3
from transformers import Qwen2VLImageProcessor

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


def test_qwen3_vl_with_its_planes_and_a_text_aware_method(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, seen = vzip.CompressedVlm(tiny_qwen3.build(), vzip.Identity()), []
    own: Any = SimpleNamespace(image_processor=Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2))
    vlm.processor = own
    context = vlm.adapter.language_context

    def watched(visual_index: Any, planes: Any) -> Any:
        seen.append(len(planes))
        return context(visual_index, planes)

    monkeypatch.setattr(vlm.adapter, "language_context", watched)
    methods = {"vanilla": (Identity(), None), "mmtok": (vzip.MMTok(TokenBudget(6, 3)), None)}
    costs = measure(vlm, methods, repeats=1, warmup=0)
    assert set(seen[:2]) == {1024} and set(seen[2:4]) == {9}, "each visual token enters with its planes"
    token_bytes = costs["vanilla"].kv_cache_bytes / (1024 + 60)  # type: ignore[union-attr]
    assert costs["mmtok"].kv_cache_bytes == token_bytes * (9 + 60)  # type: ignore[union-attr]
