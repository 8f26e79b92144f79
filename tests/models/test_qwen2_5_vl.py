"""Qwen2.5-VL: the authors' own file, stock Hugging Face bit for bit, batches of many sizes, positions, dialogues."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from scripts import make_random_model
from tests import methods, tiny_qwen
from tests.isolation.snapshot import changed, snapshot
from tests.tiny_qwen import GRIDS, batch, golden, images, num_units, prompt, recorded_maps, stock
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vzip
from vzip.compressors import FractionBudget, Selection, Signal
from vzip.errors import ConfigError, ImageError, PromptError, UnsupportedModelError
from vzip.models.families.qwen2_5_vl.tower import window_order
from vzip.models.freeze import train_projector_only
from vzip.ops.attention import CPU_BLOCK_ELEMENTS

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
CASES = [f"{grid}.{share}+05" for grid in GRIDS for share in (65, 45, 15)]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return tiny_qwen.build()


def encoded(vlm, inputs):
    return vlm.adapter.encode(vlm.adapter.read_inputs(**inputs), vlm.compressor)


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_signals_equal_the_authors(model, grid):
    vlm, expected, inputs = vzip.CompressedVlm(model, vzip.Identity()), golden("expected_w2"), images(grid)
    reads = frozenset({Signal("attention"), Signal("keys")})
    ((_, vision),) = vlm.adapter.image_outputs(vlm.adapter.read_inputs(**inputs), reads)
    num_queries = len(inputs["pixel_values"])  # theirs is the sum over queries, ours the mean
    torch.testing.assert_close(vision.attention[0] * num_queries, expected[f"{grid}.scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(vision.keys[0], expected[f"{grid}.keys"], rtol=0, atol=1e-5)
    torch.testing.assert_close(vision.hidden[0], expected[f"{grid}.visual_embeds"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_visionzip_equals_the_authors(model, case):
    """Indices, position ids and greedy tokens exactly, embeddings and logits closely."""
    grid, _, share = case.partition(".")
    method = vzip.VisionZip(FractionBudget(int(share[:2]) / 100, 0.05))
    vlm, inputs = vzip.CompressedVlm(model, method), images(grid)
    ids = {name: golden("inputs")[f"{grid}.{name}"].long() for name in ("input_ids", "attention_mask")}
    expected = {name[len(case) + 1 :]: v for name, v in golden("expected_w2").items() if name.startswith(f"{case}.")}
    ((_, vision),) = vlm.adapter.image_outputs(vlm.adapter.read_inputs(**inputs), method.reads())
    made = method(vision)
    assert made.source_index[0].tolist() == sorted(expected["dominant"].tolist())
    assert made.place_index[0, made.source_index.shape[1] :].tolist() == expected["targets"].tolist()
    if "merge_source" in expected:
        target_of = expected["targets"][made.merge_index[0, expected["merge_source"].long()]]
        assert torch.equal(target_of, expected["merge_target"])
    (tokens,) = encoded(vlm, inputs)
    assert tokens.place_index.tolist() == expected["keep"].tolist()
    prepared = vlm.prepare(**ids, **inputs)
    assert torch.equal(prepared.position_ids, expected["position_ids"].long())
    torch.testing.assert_close(prepared.inputs_embeds, expected["inputs_embeds"], rtol=0, atol=1e-5)
    torch.testing.assert_close(vlm.forward(**ids, **inputs).logits, expected["logits"], rtol=0, atol=1e-4)
    output = vlm.generate(**ids, **inputs, **GREEDY)
    assert output.sequences[0].tolist() == expected["tokens"].tolist()
    torch.testing.assert_close(torch.cat(output.logits), expected["step_logits"], rtol=0, atol=1e-4)


BATCHES = {
    "one": ([prompt(5, "6x10", 7, 8)], ["6x10"]),
    "two sizes": ([prompt(5, "6x10", 7, "4x8", 8)], ["6x10", "4x8"]),
    "nothing between": ([prompt("4x8", "4x8", 8, 9)], ["4x8", "8x8"][:1] * 2),
    "ragged": ([prompt(5, "6x10", 7, "4x8", 8), prompt(9, "4x4", 3)], ["6x10", "4x8", "4x4"]),
    "with text alone": ([prompt(5, 6, 7), prompt(5, "8x8", 7)], ["8x8"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_identity_equals_stock_bit_for_bit(name, side, dtype):
    rows, grids = BATCHES[name]
    model, inputs, ids = tiny_qwen.build().to(dtype), images(*grids), batch(*rows, side=side)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    before = snapshot(model)
    theirs = model(**stock(model, ids, **inputs))
    model.model.rope_deltas = None  # what stock leaves behind
    prepared, ours = vlm.prepare(**ids, **inputs), vlm.forward(**ids, **inputs)
    valid = ids["attention_mask"].bool()
    positions = model.model.get_rope_index(
        ids["input_ids"],
        (ids["input_ids"] == tiny_qwen.IMAGE).int(),
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
        beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
        theirs = model.generate(**stock(model, ids, **inputs), **beams)[:, ids["input_ids"].shape[1] :]
        assert torch.equal(vlm.generate(**ids, **inputs, **beams), theirs)


@torch.no_grad()
def test_text_alone_equals_stock(model):
    vlm, ids = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), batch(prompt(5, 6, 7, 8))
    assert torch.equal(vlm.forward(**ids).logits, model(**ids).logits)


SERVED = [name for name in methods.METHODS if methods.build(name, BUDGET).tower_use == "whole"]


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_a_batch_equals_singles_and_counts_are_known_before(model, name):
    settings = {"local_layer": 2, "window": 3} if name == "vscan" else {}
    vlm = vzip.CompressedVlm(model, methods.build(name, BUDGET, **settings), methods.Words())
    asked = list(methods.QUESTIONS)  # of each prompt; methods that read no text look at none
    rows = [prompt(5, "6x10", 7, "4x8", 8), prompt(9, "4x4", 3), prompt(4, "6x10", 6)]
    grids = ["6x10", "4x8", "4x4", "6x10"]
    ids, inputs = batch(*rows), images(*grids)
    expected = vlm.expected_num_visual_tokens(**inputs)
    together = vlm.prepare(**ids, **inputs, questions=asked)
    logits = vlm.forward(**ids, **inputs, questions=asked).logits
    assert together.num_visual_tokens == expected
    assert expected == [min(9, num_units(grid)) if name != "none" else num_units(grid) for grid in grids]
    for number, own in enumerate((grids[:2], grids[2:3], grids[3:])):
        question = asked[number : number + 1]
        alone = vlm.prepare(**batch(rows[number]), **images(*own), questions=question)
        length = alone.attention_mask.shape[1]
        torch.testing.assert_close(together.inputs_embeds[number, -length:], alone.inputs_embeds[0], rtol=0, atol=1e-5)
        assert torch.equal(together.position_ids[:, number, -length:], alone.position_ids[:, 0])
        assert torch.equal(together.visual_index[number, -length:] >= 0, alone.visual_index[0] >= 0)
        single = vlm.forward(**batch(rows[number]), **images(*own), questions=question).logits
        torch.testing.assert_close(logits[number, -length:], single[0], rtol=0, atol=1e-4)
    short = batch(
        *(prompt(*items, expanded=False) for items in ((5, "6x10", 7, "4x8", 8), (9, "4x4", 3), (4, "6x10", 6)))
    )
    assert torch.equal(vlm.forward(**short, **inputs, questions=asked).logits, logits)


@torch.no_grad()
def test_what_is_dropped_might_as_well_be_masked(model):
    """The unmodified model on the whole prompt, the dropped tokens masked, each token at its own position."""
    vlm, inputs = vzip.CompressedVlm(model, methods.build("dominant_only", BUDGET)), images("8x8", "6x10")
    ids = batch(prompt(5, "8x8", 7, "6x10", 8, 9))
    prepared = vlm.prepare(**ids, **inputs)
    starts = [2, 2 + 16 + 3]  # the images' first tokens in the whole prompt
    kept = torch.ones_like(ids["attention_mask"])
    for start, grid, tokens in zip(starts, ("8x8", "6x10"), encoded(vlm, inputs), strict=True):
        kept[0, start : start + num_units(grid)] = 0
        kept[0, start + tokens.place_index] = 1
    assert int(kept.sum()) == prepared.attention_mask.shape[1]
    arguments = stock(model, ids, **inputs)
    positions = model.model.get_rope_index(
        ids["input_ids"], arguments["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )[0]
    theirs = model(**{**arguments, "attention_mask": kept}, position_ids=positions).logits[:, kept[0].bool()]
    torch.testing.assert_close(vlm.forward(**ids, **inputs).logits, theirs, rtol=0, atol=1e-4)


@torch.no_grad()
def test_decoding_equals_one_pass_over_everything(model):
    """With the cache, greedily: each new token one position further on each axis."""
    vlm, inputs = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), images("6x10", "4x4")
    ids = batch(prompt(5, "6x10", 7, 8), prompt(9, "4x4", 3))
    new = vlm.generate(**ids, **inputs, max_new_tokens=6, do_sample=False)
    prepared = vlm.prepare(**ids, **inputs)
    embeds, mask, positions = prepared.inputs_embeds, prepared.attention_mask, prepared.position_ids
    for step in range(6):
        logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits
        assert torch.equal(logits[:, -1].argmax(-1), new[:, step])
        embeds = torch.cat([embeds, model.get_input_embeddings()(new[:, step : step + 1])], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=2)


@torch.no_grad()
def test_scores_by_an_attention_function_that_records_its_maps(model):
    """A second way, in float64: the maps of the last full block, averaged over heads, queries and merge units."""
    inputs, grids = images("6x10", "8x8"), [(1, 6, 10), (1, 8, 8)]
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    groups = vlm.adapter.image_outputs(vlm.adapter.read_inputs(**inputs), frozenset({Signal("attention")}))
    maps = recorded_maps(model.model.visual, inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    back = window_order(grids, 2, 2).argsort()
    received = torch.cat([weights.mean(dim=(0, 1, 2)) for weights in maps[-2:]])  # block 3: one map an image
    units = received.view(-1, 4).mean(dim=1)[back].split([15, 16])
    for (_, vision), expected in zip(groups, units, strict=True):
        torch.testing.assert_close(vision.attention[0].double(), expected, rtol=0, atol=1e-7)


@torch.no_grad()
def test_scoring_a_large_image_makes_no_map(model):
    class Largest(TorchDispatchMode):
        num_elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.num_elements = max([self.num_elements, *made])
            return result

    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    with Largest() as largest:
        vlm.encode_images(torch.ones(4096, 96), image_grid_thw=torch.tensor([[1, 64, 64]]))
    assert largest.num_elements <= CPU_BLOCK_ELEMENTS == 4096 * 256


def test_window_order_is_the_models(model):
    visual = model.model.visual
    for grids in ([(1, 4, 4)], [(1, 6, 10), (1, 14, 22)], [(3, 8, 6), (1, 2, 2)], [(1, 10, 4), (2, 4, 12)]):
        if hasattr(visual, "get_window_index"):
            theirs = visual.get_window_index(torch.tensor(grids))[0]
        else:
            from transformers.vision_utils import get_vision_window_index

            theirs = get_vision_window_index(torch.tensor(grids), 2, 16, 4)[0]
        assert torch.equal(window_order(grids, 2, 2), torch.as_tensor(theirs))


@torch.no_grad()
def test_contextual_tokens_by_a_plain_loop(model):
    """Every token that is not kept joins the target whose key is most alike; target plus the mean of what joined it."""
    method = vzip.VisionZip(BUDGET)
    vlm, inputs = vzip.CompressedVlm(model, method), images("8x8")
    ((_, vision),) = vlm.adapter.image_outputs(vlm.adapter.read_inputs(**inputs), method.reads())
    rows, keys, score = vision.hidden[0].double(), vision.keys[0].double(), vision.attention[0]
    dominant = sorted(sorted(range(16), key=lambda i: (-float(score[i]), i))[:6])
    rest = [i for i in range(16) if i not in dominant]
    targets = [rest[number * (len(rest) // 3)] for number in range(3)]
    groups = {target: [] for target in targets}
    for unit in rest:
        if unit not in targets:
            groups[max(targets, key=lambda t: float(functional.cosine_similarity(keys[unit], keys[t], 0)))].append(unit)
    merged = {t: rows[t] + (rows[own].mean(0) if own else 0) for t, own in groups.items()}
    tokens = {**{i: rows[i] for i in dominant}, **merged}
    (ours,) = encoded(vlm, inputs)
    assert ours.place_index.tolist() == sorted(tokens)
    torch.testing.assert_close(ours.rows.double(), torch.stack([tokens[i] for i in sorted(tokens)]), rtol=0, atol=1e-5)


def test_gradients_reach_the_merger(model):
    trained = tiny_qwen.build()
    train_projector_only(trained)
    vlm, ids = vzip.CompressedVlm(trained, vzip.VisionZip(BUDGET)), batch(prompt(5, "6x10", 7, 8))
    labels = torch.where(ids["input_ids"] == 8, 8, -100)
    vlm.forward(**ids, labels=labels, **images("6x10")).loss.backward()
    with_gradient = {name for name, p in trained.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient and all(name.startswith("model.visual.merger.") for name in with_gradient)


class Everything(vzip.Compressor):
    """Keeps all, by its own way, of images of any size."""

    def num_tokens(self, shape):
        return shape.num_units

    def select(self, vision):
        return Selection(torch.arange(vision.num_rows).expand(len(vision.hidden), -1))


@torch.no_grad()
def test_a_small_image_keeps_all_it_has(model):
    inputs, ids = images("4x4", "6x10"), batch(prompt(5, "4x4", 7, "6x10", 8))
    few = vzip.CompressedVlm(model, vzip.VisionZip(vzip.TokenBudget(54, 10)))
    assert few.expected_num_visual_tokens(**inputs) == [4, 15]
    stock_logits = vzip.CompressedVlm(model, vzip.Identity()).forward(**ids, **inputs).logits
    assert torch.equal(few.forward(**ids, **inputs).logits, stock_logits)
    assert torch.equal(vzip.CompressedVlm(model, Everything()).forward(**ids, **inputs).logits, stock_logits)


def test_fractions_are_exact():
    shape = vzip.compressors.VisionShape("image", 1, (10, 18), False, 180, fixed=False)
    assert FractionBudget(0.35, 0.05).of(shape) == vzip.TokenBudget(63, 9)  # in binary 0.35 * 180 is 62.99...
    assert FractionBudget(0.65, 0.05).of(vzip.compressors.VisionShape("image", 1, (2, 2), False, 4, fixed=False)) == (
        vzip.TokenBudget(2, 1)
    )


def test_the_tower_cache_changes_nothing(model):
    from vzip.models.towers.cache import TowerCache

    vlm, inputs = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), images("6x10", "8x8", "6x10")
    with torch.no_grad():
        plain = vlm.encode_images(**inputs)
        vlm.adapter.tower_cache = TowerCache(1.0)
        for _ in range(2):
            assert all(map(torch.equal, vlm.encode_images(**inputs), plain))
        assert vlm.adapter.tower_cache.counts == {"num_hits": 3, "num_misses": 3}  # images, not patches


@torch.no_grad()
@pytest.mark.parametrize("parked", ["all", "vision", "text"])
def test_parked_weights_give_the_same_numbers(model, parked, tmp_path):
    ids, inputs = batch(prompt(5, "6x10", 7, "4x8", 8)), images("6x10", "4x8")
    whole = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    if parked == "all":
        away = cpu_offload(tiny_qwen.build(), execution_device="cpu")
    else:
        parts = {"vision": ("model.visual",), "text": ("model.language_model", "lm_head")}[parked]
        names = ("model.visual", "model.language_model", "lm_head")
        there = {name: "disk" if name in parts else "cpu" for name in names}
        away = dispatch_model(tiny_qwen.build(), there, main_device="cpu", offload_dir=tmp_path)
    vlm = vzip.CompressedVlm(away, vzip.VisionZip(BUDGET))
    assert torch.equal(vlm.forward(**ids, **inputs).logits, whole.forward(**ids, **inputs).logits)
    new = [each.generate(**ids, **inputs, max_new_tokens=4, do_sample=False) for each in (vlm, whole)]
    assert torch.equal(*new)


REFUSED = [
    ({"image_grid_thw": None}, "image_grid_thw is missing"),
    ({"image_grid_thw": torch.tensor([[1, 5, 10]])}, r"\(1, 5, 10\).*multiples of 2"),
    ({"image_grid_thw": torch.tensor([[2, 6, 10]])}, "1 temporal step"),
    ({"image_grid_thw": torch.tensor([[1, 6, 12]])}, "image_grid_thw counts 72 patches"),
    ({"image_grid_thw": torch.tensor([6, 10])}, "must be integers"),
    ({"pixel_values": torch.zeros(1, 3, 28, 28)}, "must be \\[patches"),
    ({"pixel_values": torch.zeros(60, 100)}, r"shape \(60, 100\).*here \[60, 96\]"),
    ({"image_sizes": torch.tensor([[24, 40]])}, "image_sizes: no input of Qwen2_5_VL"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_wrong_inputs_are_refused(model, change, message):
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    with pytest.raises(PromptError, match=message):
        vlm.prepare(**batch(prompt(5, "6x10", 7)), **{**images("6x10"), **change})


def test_an_image_without_its_placeholder_is_told_the_id(model):
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    with pytest.raises(PromptError, match=rf"0 <image> placeholders .*one placeholder \(id {tiny_qwen.IMAGE}\)"):
        vlm.prepare(torch.tensor([[5, 7]]), **images("4x8"))


def test_what_is_not_served_is_refused_by_name(model):
    vlm, inputs = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET)), images("4x8", "4x8")
    touching = torch.tensor([[5, *[tiny_qwen.IMAGE] * 16, 7]])
    with pytest.raises(PromptError, match="Two images touch"):
        vlm.prepare(touching, **inputs)
    ends = torch.tensor([[5, *[tiny_qwen.IMAGE] * 8]])
    with pytest.raises(PromptError, match="ends in an image"):
        vlm.generate(ends, **images("4x8"), max_new_tokens=1)
    with pytest.raises(UnsupportedModelError, match=r"score_layer=1.*attends within windows.*2, 4"):
        vzip.CompressedVlm(model, vzip.VisionZip(BUDGET, score_layer=1))
    with pytest.raises(ConfigError, match=r"score_layer=9.*4 layers"):
        vzip.CompressedVlm(model, vzip.VisionZip(BUDGET, score_layer=9))
    with pytest.raises(ConfigError, match=r"preprocess='llava'.*one of hf"):
        vzip.CompressedVlm(model, vzip.Identity(), preprocess="llava")


@pytest.fixture(scope="module")
def with_processor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen") / "model"
    make_random_model.save("qwen2_5_vl", directory)
    return vzip.load_vlm(directory, compressor=vzip.VisionZip(BUDGET))


def drawn(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    from PIL import Image

    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


@torch.no_grad()
def test_the_processor_and_a_dialogue(with_processor):
    """A second turn with another image equals one cold pass over everything."""
    vlm = with_processor
    first, second = drawn(112, 168, 0), drawn(196, 84, 1)
    assert [tuple(grid) for grid in vlm.preprocess_images([first, second])["image_grid_thw"].tolist()] == [
        (1, 12, 8),
        (1, 6, 14),
    ]
    chat = vlm.chat()
    answers = [chat.ask("What is it?", images=[first], max_new_tokens=5)]
    answers.append(chat.ask("And this?", images=[second], max_new_tokens=5))
    cold = vlm.chat()
    cold.messages, cold.visuals = chat.messages[:2], chat.visuals[:1]
    assert cold.ask("And this?", images=[second], max_new_tokens=5) == answers[1]
    text = vlm.processor.apply_chat_template(chat.messages[:1], add_generation_prompt=True, tokenize=False)
    inputs = vlm.build_inputs([text], [[first]])
    new = vlm.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert vlm.processor.tokenizer.decode(new[0], skip_special_tokens=True).strip() == answers[0]


def test_an_image_that_is_too_oblong(with_processor):
    with pytest.raises(ImageError, match="more oblong than 200:1"):
        with_processor.preprocess_images([drawn(1000, 5, 0)])


@pytest.mark.parametrize("written", ["<image>", ""])
def test_a_prompt_that_writes_images_as_llava_does_is_told_how_to(with_processor, written):
    with pytest.raises(PromptError, match=r"write <\|vision_start\|><\|image_pad\|><\|vision_end\|> once for each"):
        with_processor.build_inputs([f"{written} What is it?"], [[drawn(56, 56, 0)]])


def test_operations_of_the_tower_are_those_that_run(model):
    """Counted by torch's counter with eager attention, whose products it sees."""
    from torch.utils.flop_counter import FlopCounterMode

    visual = vzip.CompressedVlm(model, vzip.Identity()).adapter.tower
    config, usual = visual.module.config, visual.module.config._attn_implementation
    inputs = images("8x8", "12x16")  # whole windows
    config._attn_implementation = "eager"
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            visual.module(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    finally:
        config._attn_implementation = usual
    assert visual.num_operations(inputs["image_grid_thw"].tolist()) == counter.get_total_flops()
