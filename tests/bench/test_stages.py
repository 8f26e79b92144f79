"""What the timed passes compute: the right tokens, the right counts, nothing left behind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tests.bench.conftest import bench_model, build

from vzip.bench.memory import kv_cache_formula_bytes, storage_bytes
from vzip.bench.shapes import BenchModel
from vzip.bench.stages import METHOD_CLASSES, STAGES, preprocess, run_pass
from vzip.bench.workload import make_pictures
from vzip.models.compressed_vlm import CompressedVlm

ALL = ("vanilla", "vzip", "eager_maps")


@pytest.mark.parametrize(("tower", "strategy"), [("clip", "default"), ("clip", "full"), ("siglip", "full")])
def test_vanilla_decodes_what_hugging_face_decodes(tower: str, strategy: str) -> None:
    """Against stock `generate` with the processor's expanded placeholders: an independent path through the model."""
    w = build(bench_model(tower, strategy), num_crops=2, batch_size=2)
    passed = run_pass(METHOD_CLASSES["vanilla"](w))
    assert w.input_ids is not None and passed.token_ids is not None
    per_picture = w.adapter.expanded_lengths(1, None)[0]  # type: ignore[union-attr]
    text, placeholder = w.input_ids, w.adapter.image_token_id  # type: ignore[union-attr]
    expanded = torch.cat([text[:, :1], torch.full((2, 2 * per_picture), placeholder), text[:, 3:]], dim=1)
    stock = w.model.generate(
        input_ids=expanded,
        attention_mask=torch.ones_like(expanded),
        pixel_values=preprocess(w),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(stock[:, expanded.shape[1] :], passed.token_ids)
    assert passed.num_visual_tokens == 2 * per_picture and passed.num_prompt_tokens == expanded.shape[1]


@pytest.mark.parametrize("method", ["vzip", "eager_maps"])
def test_compressed_methods_decode_what_the_wrapper_decodes(method: str) -> None:
    w = build(bench_model(), num_crops=2, batch_size=2)
    passed = run_pass(METHOD_CLASSES[method](w))
    vlm = CompressedVlm(w.model, w.compressor)
    assert w.input_ids is not None
    generated = vlm.generate(
        w.input_ids,
        pixel_values=preprocess(w),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(generated, passed.token_ids)
    assert passed.num_visual_tokens * 2 == sum(vlm.last_num_visual_tokens) == 2 * 2 * 16


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_bytes_equal_the_formula(method: str, dtype: str) -> None:
    w = build(bench_model(), num_crops=3, batch_size=2, dtype=dtype)
    passed = run_pass(METHOD_CLASSES[method](w))
    num_tokens = 7 + 3 * (64 if method == "vanilla" else 16)
    assert passed.num_prompt_tokens == num_tokens
    text = w.model.config.text_config
    assert text.num_key_value_heads < text.num_attention_heads  # or grouped heads would go unnoticed
    head_dim = text.hidden_size // text.num_attention_heads
    element_bytes = {"float32": 4, "bfloat16": 2}[dtype]
    by_hand = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * num_tokens * 2 * element_bytes
    assert passed.kv_cache_bytes == by_hand
    formula = kv_cache_formula_bytes(
        num_layers=text.num_hidden_layers,
        num_kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        num_tokens=num_tokens,
        batch_size=2,
        element_bytes=w.dtype.itemsize,
    )
    assert formula == by_hand


def test_storage_bytes_sees_what_a_view_keeps_alive() -> None:
    whole = torch.zeros(100, 10)
    assert storage_bytes([whole[:1], whole[1:2]]) == 4000
    assert storage_bytes([whole[:1].clone(), whole[1:2].clone()]) == 80


@pytest.mark.parametrize("method", ALL)
def test_every_stage_is_timed(method: str) -> None:
    passed = run_pass(METHOD_CLASSES[method](build(bench_model())))
    left_out = {"vanilla": {"scoring", "selection"}, "vzip": set(), "eager_maps": {"scoring"}}[method]
    assert set(passed.times_ms) == set(STAGES) - left_out
    assert all(value > 0 for value in passed.times_ms.values())


@pytest.mark.parametrize("method", ALL)
def test_bare_tower(method: str, clip_tower: BenchModel) -> None:
    passed = run_pass(METHOD_CLASSES[method](build(clip_tower, num_crops=3)))
    assert passed.num_visual_tokens == 3 * (64 if method == "vanilla" else 16)
    assert passed.token_ids is None and passed.kv_cache_bytes == 0
    assert set(passed.times_ms) <= {"preprocess", "tower", "scoring", "selection"}


def test_how_many_layers_each_method_runs() -> None:
    w = build(bench_model())
    ran: Counter[str] = Counter()
    last = w.tower.layers[-1]
    last.register_forward_hook(lambda *_: ran.update(["last"]))
    run_pass(METHOD_CLASSES["vzip"](w))
    assert ran["last"] == 0  # stops after the select layer
    run_pass(METHOD_CLASSES["vanilla"](w))
    assert ran["last"] == 2  # the staged pass and the uninterrupted one, as Hugging Face runs the tower


def test_model_is_the_same_afterwards() -> None:
    w = build(bench_model())

    def snapshot() -> list[object]:
        return [
            (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), m.training)
            for name, m in w.model.named_modules()
        ]

    before = snapshot()
    weights = {name: p.clone() for name, p in w.model.named_parameters()}
    for method in ALL:
        run_pass(METHOD_CLASSES[method](w))
    assert snapshot() == before
    assert all(torch.equal(p, weights[name]) for name, p in w.model.named_parameters())


def test_pictures_come_from_the_seed() -> None:
    first, again, other = make_pictures(2, 0), make_pictures(2, 0), make_pictures(2, 1)
    assert first[0].tobytes() == again[0].tobytes() != other[0].tobytes()
    assert first[0].tobytes() != first[1].tobytes()


def test_prompts_hold_one_placeholder_a_picture() -> None:
    w = build(bench_model(), num_crops=3, batch_size=4)
    assert w.input_ids is not None and w.input_ids.shape == (4, 10)
    assert ((w.input_ids == 4).sum(dim=1) == 3).all()
