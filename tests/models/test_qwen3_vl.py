"""Qwen3-VL: stock Hugging Face bit for bit, DeepStack planes, batches of many sizes, positions, dialogues."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from scripts import make_random_model
from tests import methods, tiny_qwen3
from tests.bench.memory.conftest import both
from tests.isolation.snapshot import changed, snapshot
from tests.tiny_qwen import IMAGE, batch, images, num_units, prompt, recorded_maps, stock
from torch.nn import functional

import vzip
from vzip.analysis.fidelity import answer_logits, divergences
from vzip.bench.memory.model_shape import ModelShape
from vzip.bench.memory.workload import Workload
from vzip.bench.shapes import SHAPES, build_meta
from vzip.compressors import FractionBudget, Signal
from vzip.errors import ConfigError, PromptError
from vzip.models.towers.cache import TowerCache

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
SERVED = [name for name in methods.METHODS if methods.build(name, BUDGET).tower_use == "whole"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
BATCHES = {
    "one": ([prompt(5, "6x10", 7, 8)], ["6x10"]),
    "two sizes": ([prompt(5, "6x10", 7, "4x8", 8)], ["6x10", "4x8"]),
    "nothing between": ([prompt("4x8", "4x8", 8, 9)], ["4x8", "4x8"]),
    "ragged": ([prompt(5, "6x10", 7, "4x8", 8), prompt(9, "4x4", 3)], ["6x10", "4x8", "4x4"]),
    "with text alone": ([prompt(5, 6, 7), prompt(5, "8x8", 7)], ["8x8"]),
}


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3.build()


def encoded(vlm, inputs):
    return vlm.adapter.encode(vlm.adapter.read_inputs(**inputs), vlm.compressor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_identity_equals_stock_bit_for_bit(name, side, dtype):
    rows, grids = BATCHES[name]
    model, inputs, ids = tiny_qwen3.build().to(dtype), images(*grids), batch(*rows, side=side)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    before = snapshot(model)
    theirs = model(**stock(model, ids, **inputs))
    model.model.rope_deltas = None  # what stock leaves behind
    prepared, ours = vlm.prepare(**ids, **inputs), vlm.forward(**ids, **inputs)
    valid = ids["attention_mask"].bool()
    positions = model.model.get_rope_index(
        ids["input_ids"],
        (ids["input_ids"] == IMAGE).int(),
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=ids["attention_mask"],
    )[0]
    assert torch.equal(prepared.position_ids, positions)
    assert torch.equal(ours.logits[valid], theirs.logits[valid])
    assert vlm.last_num_visual_tokens == [num_units(grid) for grid in grids]
    assert changed(before, snapshot(model)) == []
    if side == "left":
        theirs = model.generate(**stock(model, ids, **inputs), **GREEDY)
        model.model.rope_deltas = None
        ours = vlm.generate(**ids, **inputs, **GREEDY)
        assert torch.equal(ours.sequences, theirs.sequences[:, ids["input_ids"].shape[1] :])
        assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
        beams = {**GREEDY, "num_beams": 3, "output_scores": True}
        theirs, ours = model.generate(**stock(model, ids, **inputs), **beams), vlm.generate(**ids, **inputs, **beams)
        assert torch.equal(ours.sequences, theirs.sequences[:, ids["input_ids"].shape[1] :])
        assert torch.equal(ours.sequences_scores, theirs.sequences_scores)


@torch.no_grad()
def test_text_alone_equals_stock(model):
    vlm, ids = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), batch(prompt(5, 6, 7, 8))
    assert torch.equal(vlm.forward(**ids).logits, model(**ids).logits)


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_a_batch_equals_singles_and_counts_are_known_before(model, name):
    settings = {"local_layer": 2, "window": 3} if name == "vscan" else {}
    vlm = vzip.CompressedVlm(model, methods.build(name, BUDGET, **settings), methods.Words())
    rows = [prompt(5, "6x10", 7, "4x8", 8), prompt(9, "4x4", 3), prompt(4, "6x10", 6)]
    asked = list(methods.QUESTIONS)  # methods that read no text look at none
    grids = ["6x10", "4x8", "4x4", "6x10"]
    ids, inputs = batch(*rows), images(*grids)
    expected = vlm.expected_num_visual_tokens(**inputs)
    together = vlm.prepare(**ids, **inputs, questions=asked)
    logits = vlm.forward(**ids, **inputs, questions=asked).logits
    assert together.num_visual_tokens == expected
    assert expected == [min(9, num_units(grid)) if name != "none" else num_units(grid) for grid in grids]
    first = 0
    for number, own in enumerate((grids[:2], grids[2:3], grids[3:])):
        alone = vlm.prepare(**batch(rows[number]), **images(*own), questions=asked[number : number + 1])
        length, num_visual = alone.attention_mask.shape[1], sum(alone.num_visual_tokens)
        torch.testing.assert_close(together.inputs_embeds[number, -length:], alone.inputs_embeds[0], rtol=0, atol=1e-4)
        planes = together.planes[first : first + num_visual]
        torch.testing.assert_close(planes, alone.planes, rtol=0, atol=1e-4)
        assert torch.equal(together.position_ids[:, number, -length:], alone.position_ids[:, 0])
        assert torch.equal(together.visual_index[number, -length:] >= 0, alone.visual_index[0] >= 0)
        single = vlm.forward(**batch(rows[number]), **images(*own), questions=asked[number : number + 1]).logits
        torch.testing.assert_close(logits[number, -length:], single[0], rtol=0, atol=1e-3)
        first += num_visual
    short = batch(
        *(prompt(*items, expanded=False) for items in ((5, "6x10", 7, "4x8", 8), (9, "4x4", 3), (4, "6x10", 6)))
    )
    assert torch.equal(vlm.forward(**short, **inputs, questions=asked).logits, logits)


@torch.no_grad()
def test_what_is_dropped_might_as_well_be_masked(model):
    """The unmodified model on the whole prompt, planes and all, the dropped tokens masked."""
    vlm, inputs = vzip.CompressedVlm(model, methods.build("dominant_only", BUDGET)), images("8x8", "6x10")
    ids = batch(prompt(5, "8x8", 7, "6x10", 8, 9))
    starts = [2, 2 + 16 + 3]  # the images' first tokens in the whole prompt
    kept = torch.ones_like(ids["attention_mask"])
    for start, grid, tokens in zip(starts, ("8x8", "6x10"), encoded(vlm, inputs), strict=True):
        kept[0, start : start + num_units(grid)] = 0
        kept[0, start + tokens.place_index] = 1
    arguments = stock(model, ids, **inputs)
    positions = model.model.get_rope_index(
        ids["input_ids"], arguments["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )[0]
    theirs = model(**{**arguments, "attention_mask": kept}, position_ids=positions).logits[:, kept[0].bool()]
    torch.testing.assert_close(vlm.forward(**ids, **inputs).logits, theirs, rtol=0, atol=1e-3)


@torch.no_grad()
def test_decoding_equals_one_pass_over_everything(model):
    """The language model called by itself, planes given as its own arguments, without a cache."""
    vlm, inputs = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), images("6x10", "4x4")
    ids = batch(prompt(5, "6x10", 7, 8), prompt(9, "4x4", 3))
    new = vlm.generate(**ids, **inputs, max_new_tokens=6, do_sample=False)
    prepared = vlm.prepare(**ids, **inputs)
    first, second = encoded(vlm, inputs)
    planes = list(torch.cat([first.planes, second.planes]).split(32, dim=1))
    assert len(planes) == 2
    embeds, mask, positions = prepared.inputs_embeds, prepared.attention_mask, prepared.position_ids
    shown = prepared.visual_index >= 0
    for step in range(6):
        hidden = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            visual_pos_masks=shown,
            deepstack_visual_embeds=planes,
        ).last_hidden_state
        assert torch.equal(model.lm_head(hidden[:, -1]).argmax(-1), new[:, step])
        embeds = torch.cat([embeds, model.get_input_embeddings()(new[:, step : step + 1])], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        shown = torch.cat([shown, shown.new_zeros(2, 1)], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=2)


@torch.no_grad()
def test_scores_by_an_attention_function_that_records_its_maps(model):
    """A second way, in float64: the maps of the last block, one an image, averaged over heads, queries and units."""
    inputs = images("6x10", "8x8")
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    reads = frozenset({Signal("attention"), Signal("attention", layer=2), Signal("hidden", layer=0)})
    groups = vlm.adapter.image_outputs(vlm.adapter.read_inputs(**inputs), reads)
    maps = recorded_maps(model.model.visual, inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    assert len(maps) == 10  # five blocks, an image each
    for signal, first in ((Signal("attention"), 8), (Signal("attention", layer=2), 2)):
        for (_, vision), weights in zip(groups, maps[first : first + 2], strict=True):
            expected = weights.mean(dim=(0, 1, 2)).view(-1, 4).mean(dim=1)
            torch.testing.assert_close(vision.read(signal)[0].double(), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_contextual_tokens_and_their_planes_by_a_plain_loop(model):
    """Every token that is not kept joins the target whose key is most alike, its planes likewise."""
    method = vzip.VisionZip(BUDGET)
    vlm, inputs = vzip.CompressedVlm(model, method), images("8x8")
    ((_, vision),) = vlm.adapter.image_outputs(vlm.adapter.read_inputs(**inputs), method.reads())
    output = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    keys, score = vision.keys[0].double(), vision.attention[0]
    dominant = sorted(sorted(range(16), key=lambda i: (-float(score[i]), i))[:6])
    rest = [i for i in range(16) if i not in dominant]
    targets = [rest[number * (len(rest) // 3)] for number in range(3)]
    groups = {target: [] for target in targets}
    for unit in rest:
        if unit not in targets:
            groups[max(targets, key=lambda t: float(functional.cosine_similarity(keys[unit], keys[t], 0)))].append(unit)
    (ours,) = encoded(vlm, inputs)
    assert ours.place_index.tolist() == sorted([*dominant, *targets])
    made = [ours.rows, *ours.planes.split(32, dim=1)]
    assert len(output.deepstack_features) == 2
    for rows, own in zip([output.pooler_output, *output.deepstack_features], made, strict=True):
        tokens = {i: rows[i] for i in dominant}
        tokens |= {t: rows[t] + (rows[joined].mean(0) if joined else 0) for t, joined in groups.items()}
        torch.testing.assert_close(own, torch.stack([tokens[i] for i in sorted(tokens)]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_planes_reach_the_model_and_leave_nothing(model):
    vlm, inputs = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), images("6x10")
    ids = batch(prompt(5, "6x10", 7, 8))
    before = snapshot(model)
    prepared = vlm.prepare(**ids, **inputs)
    arguments = {name: getattr(prepared, name) for name in ("inputs_embeds", "attention_mask", "position_ids")}
    forgotten = model(**arguments).logits
    assert (vlm.forward(**ids, **inputs).logits - forgotten).abs().max() > 0.1
    with pytest.raises(RuntimeError, match="on purpose"):

        def fail(*_arguments):
            raise RuntimeError("on purpose")

        vlm.generate(**ids, **inputs, max_new_tokens=4, do_sample=False, stopping_criteria=[fail])
    assert changed(before, snapshot(model)) == []
    assert torch.equal(model(**arguments).logits, forgotten)


@torch.no_grad()
def test_a_compiled_model_does_not_forget_the_planes():
    """A graph made before the hook was there would run without it, and say nothing."""
    compiled, inputs, ids = tiny_qwen3.build(), images("6x10"), batch(prompt(5, "6x10", 7, 8))
    vlm = vzip.CompressedVlm(compiled, vzip.VisionZip(BUDGET))
    expected = vlm.forward(**ids, **inputs).logits
    prepared = vlm.prepare(**ids, **inputs)
    compiled.model.compile(backend="eager")
    arguments = {name: getattr(prepared, name) for name in ("inputs_embeds", "attention_mask", "position_ids")}
    compiled(**arguments)
    assert torch.equal(vlm.forward(**ids, **inputs).logits, expected)


@torch.no_grad()
def test_a_small_image_keeps_all_it_has(model):
    inputs, ids = images("4x4", "6x10"), batch(prompt(5, "4x4", 7, "6x10", 8))
    few = vzip.CompressedVlm(model, vzip.VisionZip(vzip.TokenBudget(54, 10)))
    assert few.expected_num_visual_tokens(**inputs) == [4, 15]
    stock_logits = vzip.CompressedVlm(model, vzip.Identity()).forward(**ids, **inputs).logits
    assert torch.equal(few.forward(**ids, **inputs).logits, stock_logits)
    part = vzip.CompressedVlm(model, vzip.VisionZip(FractionBudget(0.5, 0.1)))
    assert part.expected_num_visual_tokens(**inputs) == [2 + 1, 7 + 1]
    part.forward(**ids, **inputs)
    assert part.last_num_visual_tokens == [3, 8]


@torch.no_grad()
def test_the_tower_cache_changes_nothing(model):
    vlm, inputs = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), images("6x10", "8x8", "6x10")
    ids = batch(prompt(5, "6x10", 7, "8x8", 8, "6x10", 9))
    plain = vlm.forward(**ids, **inputs).logits
    vlm.adapter.tower_cache = TowerCache(1.0)
    for _ in range(2):
        assert torch.equal(vlm.forward(**ids, **inputs).logits, plain)
    assert vlm.adapter.tower_cache.counts == {"num_hits": 3, "num_misses": 3}
    # Everything the cache holds is counted: rows of 32, two planes of as many, attention and keys of 16.
    assert vlm.adapter.tower_cache.num_bytes == 46 * 4 * (32 + 64 + 1 + 16)


@torch.no_grad()
def test_parked_weights_give_the_same_numbers(model):
    ids, inputs = batch(prompt(5, "6x10", 7, "4x8", 8)), images("6x10", "4x8")
    whole = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    away = vzip.CompressedVlm(cpu_offload(tiny_qwen3.build(), execution_device="cpu"), vzip.VisionZip(BUDGET))
    assert torch.equal(away.forward(**ids, **inputs).logits, whole.forward(**ids, **inputs).logits)
    new = [each.generate(**ids, **inputs, max_new_tokens=4, do_sample=False) for each in (away, whole)]
    assert torch.equal(*new)


def test_gradients_reach_what_makes_the_planes():
    trained = tiny_qwen3.build().requires_grad_(False)
    trained.model.visual.deepstack_merger_list.requires_grad_(True)
    vlm, ids = vzip.CompressedVlm(trained, vzip.VisionZip(BUDGET)), batch(prompt(5, "6x10", 7, 8))
    labels = torch.where(ids["input_ids"] == 8, 8, -100)
    vlm.forward(**ids, labels=labels, **images("6x10")).loss.backward()
    weights = [p for name, p in trained.named_parameters() if "deepstack" in name and name.endswith("fc2.weight")]
    assert len(weights) == 2 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)


def test_what_is_not_served_is_refused_by_name(model):
    vlm, inputs = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), images("4x8", "4x8")
    touching = torch.tensor([[5, *[IMAGE] * 16, 7]])
    with pytest.raises(PromptError, match=r"Two images touch in a prompt: Qwen3-VL"):
        vlm.prepare(touching, **inputs)
    with pytest.raises(PromptError, match=r"image_grid_thw is missing: Qwen3-VL's processor"):
        vlm.prepare(touching, pixel_values=inputs["pixel_values"])
    with pytest.raises(PromptError, match="ends in an image"):
        vlm.generate(torch.tensor([[5, *[IMAGE] * 8]]), **images("4x8"), max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"score_layer=9.*5 layers"):
        vzip.CompressedVlm(model, vzip.VisionZip(BUDGET, score_layer=9))
    vzip.CompressedVlm(model, vzip.VisionZip(BUDGET, score_layer=1))  # every layer sees the whole image


def test_a_method_that_forgets_the_planes_is_told(model):
    class Forgetful(vzip.VisionZip):
        def compress(self, vision):
            from dataclasses import replace

            return replace(super().compress(vision), planes=None)

    vlm = vzip.CompressedVlm(model, Forgetful(BUDGET))
    with pytest.raises(ValueError, match="apply its selection to the planes"):
        vlm.prepare(**batch(prompt(5, "6x10", 7)), **images("6x10"))


def drawn(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


@torch.no_grad()
def test_the_processor_and_a_dialogue(tmp_path):
    """A second turn with another image equals one cold pass over everything, and ``generate``."""
    make_random_model.save("qwen3_vl", tmp_path / "model")
    vlm = vzip.load_vlm(tmp_path / "model", compressor=vzip.VisionZip(BUDGET))
    assert type(vlm.model).__name__ == "Qwen3VLForConditionalGeneration"
    with torch.no_grad():  # its usual weights are small: wider ones say different words to different images
        for name, parameter in vlm.model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5 * 1.5)
    first, second = drawn(320, 288, 0), drawn(448, 256, 1)
    grids = vlm.preprocess_images([first, second])["image_grid_thw"].tolist()
    assert grids == [[1, 18, 20], [1, 16, 28]]
    chat = vlm.chat()
    answers = [chat.ask("What is it?", images=[first], max_new_tokens=5)]
    answers.append(chat.ask("And this?", images=[second], max_new_tokens=5))
    cold = vlm.chat()
    cold.messages, cold.visuals = chat.messages[:2], chat.visuals[:1]
    assert cold.ask("And this?", images=[second], max_new_tokens=5) == answers[1]
    for warm, whole in zip(chat._cache.layers, cold._cache.layers, strict=True):
        torch.testing.assert_close(warm.keys, whole.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(warm.values, whole.values, rtol=0, atol=1e-4)
    for turns, shown, answer in ((chat.messages[:1], [first], answers[0]), (chat.messages[:3], [first, second], None)):
        text = vlm.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        new = vlm.generate(**vlm.build_inputs([text], [shown]), max_new_tokens=5, do_sample=False)
        answer = answers[1] if answer is None else answer
        assert vlm.processor.tokenizer.decode(new[0], skip_special_tokens=True).strip() == answer


# As the checkpoints' index files count them: parameters, an output layer that is the text embedding counted once.
PUBLISHED = {"qwen3_vl_2b": 2_127_532_032, "qwen3_vl_4b": 4_437_815_808, "qwen3_vl_8b": 8_767_123_696}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    meta = build_meta(SHAPES[name](), torch.bfloat16)
    assert sum(p.numel() for p in meta.parameters()) == PUBLISHED[name]


def test_operations_of_the_tower_are_those_that_run(model):
    from torch.utils.flop_counter import FlopCounterMode

    visual = vzip.CompressedVlm(model, vzip.Identity()).adapter.tower
    config, usual = visual.module.config, visual.module.config._attn_implementation
    inputs = images("8x8", "6x10")
    config._attn_implementation = "eager"
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            visual.module(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    finally:
        config._attn_implementation = usual
    assert visual.num_operations(inputs["image_grid_thw"].tolist()) == counter.get_total_flops()


@torch.no_grad()
def test_fidelity_reads_the_planes(model):
    """Vanilla against itself diverges by 0, and one pass over an answer is ``forward`` on prompt and answer."""
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    inputs = {**batch(prompt(5, "6x10", 7, 8)), **images("6x10")}
    told = vlm.generate(**inputs, max_new_tokens=5, output_logits=True, do_sample=False, return_dict_in_generate=True)
    answer = told.sequences[0]
    vanilla = answer_logits(vlm, inputs, answer)
    torch.testing.assert_close(vanilla, torch.cat(told.logits), atol=1e-4, rtol=1e-4)
    assert divergences(vanilla, answer_logits(vlm, inputs, answer)).max() == 0
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], answer[None]], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    torch.testing.assert_close(vanilla, vlm.forward(**whole).logits[0, -6:-1], atol=1e-4, rtol=1e-4)
    vlm.compressor = vzip.VisionZip(BUDGET)
    assert divergences(vanilla, answer_logits(vlm, inputs, answer)).min() > 0


@pytest.mark.parametrize("compressor", [vzip.Identity(), vzip.VisionZip(BUDGET)], ids=["none", "visionzip"])
def test_memory_is_estimated_as_it_is_measured(model, compressor):
    estimated, measured = both(
        ModelShape(model.config, compressor), Workload(1, 1, 1100, num_new_tokens=4), trains=False
    )
    assert estimated.total() == pytest.approx(measured, rel=0.05)
