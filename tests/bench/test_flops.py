"""Counted operations equal closed formulas and figures known from elsewhere."""

from __future__ import annotations

import pytest
import torch
from tests.bench.conftest import bench_model, build
from transformers import LlamaConfig

from vzip.bench import flops, shapes
from vzip.bench.operations import count_method


def test_vit_l_336_is_381_9_gflops() -> None:
    model = shapes.resolve("clip_l_336")
    tower = shapes.build_meta(model, torch.float32)
    counted = flops.count(lambda: tower(torch.empty(1, 3, 336, 336, device="meta")))
    # By hand: 24 layers of 577 x (4 x 1024^2 + 2 x 1024 x 4096) + 2 x 577^2 x 1024 multiply-adds, and the patches.
    by_hand = 2 * (24 * (577 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 577**2 * 1024) + 576 * 588 * 1024)
    assert counted == by_hand == flops.tower_formula(model.config, num_layers=24, num_crops=1, has_cls=True)
    assert counted / 1e9 == pytest.approx(381.9, abs=0.05)


@pytest.mark.parametrize(("num_tokens", "teraflops"), [(636, 8.6166), (124, 1.6467)])
def test_llama_7b_prefill(num_tokens: int, teraflops: float) -> None:
    """The known figures count the vocabulary scores of every position."""
    model = shapes.resolve("llava15_7b")
    meta = shapes.build_meta(model, torch.bfloat16)

    def prefill() -> object:
        return meta(
            inputs_embeds=torch.empty(1, num_tokens, 4096, device="meta", dtype=torch.bfloat16),
            attention_mask=torch.zeros(1, 1, num_tokens, num_tokens, device="meta", dtype=torch.bfloat16),
            position_ids=torch.zeros(1, num_tokens, device="meta", dtype=torch.int64),
        )

    counted = flops.count(prefill)
    text = model.config.text_config
    assert counted == flops.decoder_formula(text, num_new=num_tokens, num_past=0, num_logits=num_tokens)
    assert counted / 1e12 == pytest.approx(teraflops, abs=5e-5)


def test_decoder_formula_counts_grouped_heads_and_the_cache() -> None:
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    per_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    attention = 2 * 3 * (3 + 10) * 32
    expected = 2 * (2 * (3 * per_layer + attention) + 1 * 32 * 64)
    assert flops.decoder_formula(text, num_new=3, num_past=10, num_logits=1) == expected
    assert flops.decoder_formula(text, num_new=3, num_past=10, num_logits=1, batch_size=5) == 5 * expected


def test_decoder_formula_is_silent_on_what_it_does_not_describe() -> None:
    text = bench_model().config.text_config
    other = type(text).from_dict(text.to_dict())
    other.model_type = "mixtral"
    assert flops.decoder_formula(other, num_new=1, num_past=0, num_logits=1) is None


def test_convnext_large_is_34_4_gmacs() -> None:
    """The known figure is of 224 pixels, and its head of 1.5 M multiply-adds does not show in it."""
    config = shapes.resolve("mini_gemini_7b").config.high_res_config
    assert flops.convnext_formula(config, image_size=224, num_images=1) / 2e9 == pytest.approx(34.4, abs=0.05)


def test_mining_by_hand() -> None:
    """576 queries and value projections at 1024 channels, keys' side at 2880, a window of 8 x 8."""
    counted = flops.mining_formula(num_patches=576, window=64, patch_dim=1024, num_channels=2880, num_images=3)
    assert counted == 3 * 2 * 576 * (1024 * 1024 + 1024 * 2880 + 64 * 2880 + 64 * 2880 + 2880 * 1024)


METHODS = ("vanilla", "vzip", "eager_maps")


@pytest.mark.parametrize(
    ("family", "tower", "method"),
    [
        *(("llava", tower, method) for tower in ("clip", "siglip") for method in METHODS),
        ("llava_next", "clip", "vzip"),
        ("video_llava", "clip", "vzip"),
        ("mini_gemini", "clip", "vanilla"),
        ("mini_gemini", "clip", "vzip"),
    ],
)
def test_every_stage_equals_its_formula(family: str, tower: str, method: str) -> None:
    model = bench_model(tower, family=family)
    w = build(model, batch_size=2, num_crops=3)
    num_visual = 3 * (16 if method != "vanilla" else 64 - int(tower == "siglip"))
    stages = count_method(w, model, method, num_visual)
    assert {"tower", "projector", "prefill", "decode_per_token"} <= set(stages)
    assert ({"high_res_tower", "mining"} <= set(stages)) == (family == "mini_gemini")
    for stage, operations in stages.items():
        if operations.formula is not None:
            assert operations.counted == operations.formula, stage
    # SigLIP's pooling head, which only the methods that run the whole tower pay for, has no formula here.
    whole_siglip = tower == "siglip" and method != "vzip"
    assert (stages["tower"].formula is None) == whole_siglip
    assert ("selection" in stages) == (method != "vanilla")


def test_vzip_tower_saves_the_last_layer() -> None:
    model = bench_model()
    w = build(model)
    whole = count_method(w, model, "vanilla", 64)["tower"].counted
    ours = count_method(w, model, "vzip", 16)["tower"].counted
    dim, mlp_dim = model.vision_config.hidden_size, model.vision_config.intermediate_size
    one_layer = 2 * (65 * (4 * dim**2 + 2 * dim * mlp_dim) + 2 * 65**2 * dim)
    assert whole - ours == one_layer - 2 * 65 * dim  # less the CLS query's scores
