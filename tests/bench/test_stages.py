"""What the timed passes compute: the right tokens, the right counts, nothing left behind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.bench.conftest import bench_model, build

from vzip.bench import shapes, workload
from vzip.bench.device_memory import kv_cache_formula_bytes, storage_bytes
from vzip.bench.operations import count_method
from vzip.bench.run import _expected_cache_bytes
from vzip.bench.settings import parse
from vzip.bench.shapes import BenchModel
from vzip.bench.stages import METHOD_CLASSES, STAGES, preprocess, run_pass
from vzip.bench.workload import make_images
from vzip.compressors import Identity
from vzip.errors import ConfigError
from vzip.models import compiled
from vzip.models.vlm import CompressedVlm
from vzip.pruners import FastV

ALL = ("vanilla", "vzip", "eager_maps")


# Family, tower, select strategy; crops of a prompt, their placeholders, vanilla's tokens: 64 patches a crop; of
# LLaVA-NeXT's tiles 16 (or 8) rows of 16 and a newline; of a frame its CLS too.
FAMILIES = [
    ("llava", "clip", "default", 2, 2, 2 * 64),
    ("llava", "clip", "full", 2, 2, 2 * 65),
    ("llava", "siglip", "full", 2, 2, 2 * 64),
    ("llava_next", "clip", "default", 5, 1, 64 + 16 * 17),
    ("llava_next", "clip", "default", 3, 1, 64 + 8 * 17),
    ("video_llava", "clip", "default", 3, 1, 3 * 65),
    ("mini_gemini", "clip", "default", 2, 2, 2 * 64),
]


@pytest.mark.parametrize(("family", "tower", "strategy", "num_crops", "placeholders", "num_visual"), FAMILIES)
def test_vanilla_decodes_what_hugging_face_decodes(
    family: str, tower: str, strategy: str, num_crops: int, placeholders: int, num_visual: int
) -> None:
    """Against stock `generate` with the processor's expanded placeholders: an independent path through the model."""
    w = build(bench_model(tower, strategy, family), num_crops=num_crops, batch_size=2)
    passed = run_pass(METHOD_CLASSES["vanilla"](w))
    text = w.input_ids
    assert text is not None and passed.token_ids is not None and text.shape == (2, 7 + placeholders)
    expanded = torch.cat([text[:, :1], text[:, 1:2].expand(2, num_visual), text[:, 1 + placeholders :]], dim=1)
    inputs = preprocess(w)
    inputs.pop("tile_grids", None)  # ours alone
    stock = w.model.generate(
        input_ids=expanded,
        attention_mask=torch.ones_like(expanded),
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(stock[:, expanded.shape[1] :], passed.token_ids)
    assert passed.num_visual_tokens == num_visual and passed.num_prompt_tokens == expanded.shape[1]


@pytest.mark.parametrize("method", ["vzip", "eager_maps"])
@pytest.mark.parametrize("family", FAMILIES[::2], ids=lambda family: f"{family[0]}-{family[1]}")
def test_compressed_methods_decode_what_the_wrapper_decodes(method: str, family: tuple[Any, ...]) -> None:
    name, tower, strategy, num_crops = family[:4]
    w = build(bench_model(tower, strategy, name), num_crops=num_crops, batch_size=2)
    passed = run_pass(METHOD_CLASSES[method](w))
    vlm = CompressedVlm(w.model, w.compressor)
    assert w.input_ids is not None
    generated = vlm.generate(
        w.input_ids,
        **preprocess(w),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(generated, passed.token_ids)
    assert passed.num_visual_tokens == num_crops * 16 and sum(vlm.last_num_visual_tokens) == 2 * num_crops * 16


def pruned_by(**settings: Any) -> dict[str, Any]:
    return {"pruner": "fastv", "methods": ("vanilla", "fastv"), "method_settings": {"pruner": settings}}


@pytest.mark.parametrize("family", [("llava", 2), ("llava_next", 3), ("video_llava", 3)], ids=str)
def test_fastv_decodes_what_the_wrapper_decodes_and_saves_what_its_schedule_says(family: tuple[str, int]) -> None:
    name, num_crops = family
    model = bench_model(family=name)
    w = build(model, num_crops=num_crops, batch_size=2, **pruned_by(K=1, keep=0.25))
    method = METHOD_CLASSES["fastv"](w)
    passed, whole = run_pass(method), run_pass(METHOD_CLASSES["vanilla"](w))
    vlm = CompressedVlm(w.model, Identity(), pruner=FastV(1, 0.25))
    assert w.input_ids is not None
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(vlm.generate(w.input_ids, **preprocess(w), **settings), passed.token_ids)
    assert (
        passed.cached_tokens == vlm.last_pruned.cache_lengths[0]
        and whole.cached_tokens == [whole.num_prompt_tokens] * 2
    )
    assert (
        passed.cached_tokens[0] - passed.cached_tokens[1] == sum(a - b for a, b in vlm.last_pruned.visual_schedule) // 2
    )
    assert _expected_cache_bytes(w, method, passed) == passed.kv_cache_bytes < whole.kv_cache_bytes
    ours, theirs = (count_method(w, model, m, passed.num_visual_tokens)["prefill"] for m in ("fastv", "vanilla"))
    assert ours.counted == ours.formula < theirs.counted


def test_a_pruner_whose_numbers_depend_on_the_data_is_counted_by_what_layers_held() -> None:
    model = bench_model(family="llava")
    settings = {"pruner": {"layers": [0], "scale": 1.0}}
    w = build(model, pruner="sparsevlm_v10", methods=("vanilla", "sparsevlm_v10"), method_settings=settings)
    method = METHOD_CLASSES["sparsevlm_v10"](w)
    passed = run_pass(method)
    assert 0 < passed.cached_tokens[1] < passed.cached_tokens[0] == passed.num_prompt_tokens
    assert _expected_cache_bytes(w, method, passed) == passed.kv_cache_bytes
    stages = count_method(w, model, "sparsevlm_v10", passed.num_visual_tokens, passed.cached_tokens)
    whole = count_method(w, model, "vanilla", passed.num_visual_tokens)
    for stage in ("prefill", "decode_per_token"):
        assert 0 < stages[stage].counted == stages[stage].formula < whole[stage].counted


def test_a_pruner_that_cannot_be_measured(clip_tower: BenchModel) -> None:
    with pytest.raises(ConfigError, match="cuts at the input of layer 2, but the language model has the layers 0 to 1"):
        build(bench_model(), **pruned_by())
    with pytest.raises(ConfigError, match="tower is a vision tower alone"):
        build(clip_tower, **pruned_by(K=1, keep=3))
    for wrong in ("pruner.keep=x", "pruner.K=0", "pruner.keep=1.5"):
        with pytest.raises(ConfigError, match=r"pruner\.\w+=.*: must"):
            parse(["pruner=fastv", wrong])


def test_an_image_in_a_number_of_crops_that_is_not_made() -> None:
    with pytest.raises(ConfigError, match=r"num_crops=2: .* 3, 4, 5 crops"):
        build(bench_model(family="llava_next"), num_crops=2)


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
@pytest.mark.parametrize("family", ["llava", "mini_gemini"])
def test_every_stage_is_timed(method: str, family: str) -> None:
    passed = run_pass(METHOD_CLASSES[method](build(bench_model(family=family))))
    left_out = {"vanilla": {"scoring", "selection"}, "vzip": set(), "eager_maps": {"scoring"}}[method]
    left_out |= {"text", "encode"} | ({"high_res_tower", "mining"} if family == "llava" else set())
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
    last = w.visuals.tower.layers[-1]
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


def test_images_come_from_the_seed() -> None:
    first, again, other = make_images(2, 0), make_images(2, 0), make_images(2, 1)
    assert first[0].tobytes() == again[0].tobytes() != other[0].tobytes()
    assert first[0].tobytes() != first[1].tobytes()


def test_prompts_hold_one_placeholder_an_image() -> None:
    w = build(bench_model(), num_crops=3, batch_size=4)
    assert w.input_ids is not None and w.input_ids.shape == (4, 10)
    assert ((w.input_ids == 4).sum(dim=1) == 3).all()


@pytest.mark.parametrize("parts", ["tower,prefill,decode", "decode"])
def test_the_compiled_way_decodes_the_same_tokens(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three prompts, so that the batch is filled up; graphs are captured and run uncompiled."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    w = build(bench_model(), batch_size=3, compile=tuple(parts.split(",")))
    plain, own = (run_pass(METHOD_CLASSES[name](w)) for name in ("vzip", "compiled"))
    assert own.token_ids is not None and plain.token_ids is not None
    assert torch.equal(own.token_ids, plain.token_ids) and own.num_prompt_tokens == plain.num_prompt_tokens
    whole = {"encode"} if "tower" in parts else {"tower", "selection", "projector", "scoring"}
    assert own.times_ms.keys() == {*whole, "preprocess", "splice", "prefill", "decode_per_token", "time_to_first_token"}
    assert own.kv_cache_bytes > plain.kv_cache_bytes, "of the fixed length"
    torch._dynamo.reset()


def test_what_cannot_be_compiled_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="is a vision tower alone, and a whole model's parts are compiled"):
        workload.check(
            parse(["model=clip_l_336", "compile=tower", "methods=vzip,compiled"]), shapes.resolve("clip_l_336")
        )
    with pytest.raises(ConfigError, match="deeper layers through hooks"):
        words = ["model=qwen3_vl_2b", "compile=decode", "methods=vzip,compiled"]
        workload.check(parse(words), shapes.resolve("qwen3_vl_2b"))
