"""Times of a GPU that is not at hand: the formulas, by hand."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from vzip.bench.forecast import Assumptions, Gpu, ModelWork, gpus, question_seconds, sample_seconds

TEXT = LlamaConfig(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=10,
)
EXACT = Assumptions(utilisation=0.5, bandwidth_share=0.25, text_tokens=6, sample_text_tokens=16)


def work(weight_bytes: int = 0) -> ModelWork:
    return ModelWork(TEXT, vision_operations=1000, num_visual_tokens=4, weight_bytes=weight_bytes)


def decoder(new: int, past: int, logits: int) -> int:
    weights = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16  # q and o; k and v of one head; the MLP
    return 2 * (2 * new * weights + 4 * new * (new + past) * 8) + 2 * logits * 8 * 10


def test_matrix_products_decide_where_bandwidth_is_plenty() -> None:
    gpu = Gpu("", 1, tflops=1e-6, gb_per_s=1e9, source="")  # 10^6 operations a second, of which half
    prefill = 1000 + decoder(10, 0, 1)
    assert question_seconds(work(), gpu, EXACT, 1) == pytest.approx(prefill / 5e5)
    both = prefill + decoder(1, 11, 1)
    assert question_seconds(work(), gpu, EXACT, 2) == pytest.approx(both / 5e5)
    assert question_seconds(work(), gpu, EXACT, 2, batch_size=7) == pytest.approx(both / 5e5)
    assert sample_seconds(work(), gpu, EXACT, 3) == pytest.approx((1000 + 3 * decoder(20, 0, 20)) / 5e5)


def test_bytes_decide_where_products_are_fast_and_a_batch_shares_the_weights() -> None:
    gpu = Gpu("", 1, tflops=1e9, gb_per_s=1e-6, source="")  # 1000 bytes a second, of which a quarter
    cache = 2 * 2 * 1 * 4 * 2  # keys and values, layers, heads, width, bytes
    assert work().cache_bytes_per_token == cache
    assert question_seconds(work(500), gpu, EXACT, 2) == pytest.approx((500 + 500 + 11 * cache) / 250)
    assert question_seconds(work(500), gpu, EXACT, 2, batch_size=5) == pytest.approx((1000 + 5 * 11 * cache) / 250 / 5)


def test_every_gpu_says_where_its_numbers_are_from() -> None:
    assert {"3090", "a100_40", "a100_80", "h100"} <= set(gpus())
    for gpu in gpus().values():
        assert gpu.source and gpu.title and gpu.memory_gib >= 24 and gpu.tflops > 50 and gpu.gb_per_s > 500
