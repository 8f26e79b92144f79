"""Pruning around a whole wrapper: against plain loops, batches against singles, nothing dropped against stock."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests import tiny, tiny_mini_gemini
from tests.pruners.methods import PRUNERS, PlainLoops
from tests.tiny import IMAGE_TOKEN
from transformers import Gemma2Config, MistralConfig

import vzip
from vzip.config.options import config_dir, option_values, options
from vzip.config.validate import build_pruner
from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.models.weights.from_config import family_config, new_model
from vzip.pruners import Cut, PromptState, Pruner
from vzip.pruners.context import PruningError, pruning

BUDGET = vzip.TokenBudget(num_dominant=12, num_contextual=4)
NUM_LAYERS = 5
KEEP_ALL = [
    vzip.FastV(2, 16),
    vzip.FastV(1, 1.0, pooled=True),
    vzip.PyramidDrop([1, 3], [1.0, 1.0]),
    vzip.DART(2, 16),
    vzip.SparseVLMPlus([0, 2], [16, 16]),
]
# Prompts with 0, 1 and 2 images, of different lengths.
PROMPTS = [[5, 6, 7], [8, IMAGE_TOKEN, 9, 10, 11, 12], [13, IMAGE_TOKEN, 14, 15, IMAGE_TOKEN, 16]]


def wrapper(pruner: Pruner | None = None, attention: str = "sdpa", **settings: Any) -> vzip.CompressedVlm:
    model = tiny.llava(num_text_layers=NUM_LAYERS)
    model.set_attn_implementation(attention)
    return vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), pruner=pruner, **settings)


def batch(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and the pixels of all images, for prompts that are padded on one side."""
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), 3), torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, where] = torch.tensor(prompt)
        mask[row, where] = 1
    num_images = sum(prompt.count(IMAGE_TOKEN) for prompt in prompts)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **({"pixel_values": tiny.pixels(num_images)} if num_images else {}),
    }


def singles(prompts: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """The same prompts one by one, each with its own images."""
    pixels, taken, found = tiny.pixels(sum(p.count(IMAGE_TOKEN) for p in prompts)), 0, []
    for prompt in prompts:
        count = prompt.count(IMAGE_TOKEN)
        own = {"pixel_values": pixels[taken : taken + count]} if count else {}
        found.append({"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt)).long(), **own})
        taken += count
    return found


@torch.no_grad()
def by_plain_loops(vlm: vzip.CompressedVlm, inputs: dict[str, torch.Tensor], num_new: int) -> tuple[torch.Tensor, Any]:
    """Logits ``[num_new, vocab]`` of one prompt's new tokens, and the loops that made them."""
    assert vlm.pruner is not None
    plain, new = PlainLoops(vlm, vlm.pruner), []
    prepared = vlm.prepare(**inputs, padding_side="left")
    embeds, owner = prepared.inputs_embeds[0], prepared.visual_index[0].tolist()
    for _ in range(num_new):
        logits = plain.logits(embeds, [*owner, *[-1] * len(new)], len(owner))
        new.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, vlm.adapter.embed_tokens(torch.tensor(new[-1:]))])
    return logits, plain


@pytest.mark.parametrize("pruner", PRUNERS, ids=str)
@pytest.mark.parametrize("prompt", PROMPTS[1:], ids=["one image", "two images"])
@pytest.mark.parametrize("compressor", [vzip.VisionZip(BUDGET), vzip.Identity()], ids=["16 tokens", "64 tokens"])
def test_equal_to_plain_loops(pruner, prompt, compressor):
    vlm = wrapper(pruner)
    vlm.compressor = compressor
    inputs = singles([prompt])[0]
    cuts: dict[int, Cut] = {}
    original = pruner.cut

    def spy(state: PromptState) -> Cut:
        return cuts.setdefault(state.layer, original(state))

    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    object.__setattr__(pruner, "cut", spy)
    try:
        logits = vlm.generate(**inputs, **settings).logits
    finally:
        object.__delattr__(pruner, "cut")
    expected, plain = by_plain_loops(vlm, inputs, 6)
    names: list[Any] = list(range(len(vlm.prepare(**inputs).inputs_embeds[0])))
    for layer, cut in cuts.items():
        owner = [] if cut.new_visual_index is None else cut.new_visual_index.tolist()
        merged = [(layer, image, owner[:number].count(image)) for number, image in enumerate(owner)]
        names = [names[place] if place >= 0 else merged[-1 - place] for place in cut.index.tolist()]
        assert names == plain.after[layer][: len(names)]
    assert set(cuts) == set(plain.after) == set(pruner.cuts)
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-4, rtol=0)
    vlm.pruner = None
    assert (vlm.generate(**inputs, **settings).logits[0][0] - expected[0]).abs().max() > 0.01  # not those of all tokens


@pytest.mark.parametrize("pruner", PRUNERS, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_equals_its_singles(pruner, side):
    vlm = wrapper(pruner)
    together = batch(PROMPTS, side)
    new = vlm.generate(**together, max_new_tokens=5)
    lengths, schedule = vlm.last_pruned.cache_lengths, vlm.last_pruned.visual_schedule
    logits = vlm.forward(**together).logits
    seen = 0
    for row, inputs in enumerate(singles(PROMPTS)):
        assert vlm.generate(**inputs, max_new_tokens=5)[0].tolist() == new[row].tolist()
        alone = vlm.forward(**inputs).logits[0]
        count = len(alone)
        got = logits[row, :count] if side == "right" else logits[row, -count:]
        torch.testing.assert_close(got, alone, atol=2e-5, rtol=0)
        if vlm.last_pruned is None:  # no image, nothing to drop
            assert row == 0 and lengths[0] == [3] * NUM_LAYERS and count == 3
            continue
        assert vlm.last_pruned.cache_lengths == [lengths[row]] and lengths[row][-1] == count < lengths[row][0]
        images = len(vlm.last_pruned.visual_schedule)
        assert vlm.last_pruned.visual_schedule == schedule[seen : seen + images]
        seen += images
    assert seen == len(schedule) == 3


@pytest.mark.parametrize("pruner", KEEP_ALL, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_keeping_everything_is_the_unpruned_model_bit_for_bit(pruner, attention, dtype):
    vlm = wrapper(attention=attention)
    vlm.model.to(dtype)
    for inputs in (batch(PROMPTS), batch(PROMPTS, "right"), *singles(PROMPTS)[1:]):
        vlm.pruner = None
        expected = vlm.forward(**inputs, output_hidden_states=True)
        new = [vlm.generate(**inputs, max_new_tokens=4, cache_implementation=cache) for cache in (None, "static")]
        vlm.pruner = pruner
        got = vlm.forward(**inputs, output_hidden_states=True)
        assert torch.equal(got.logits, expected.logits)
        assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True))
        for cache, tokens in zip((None, "static"), new, strict=True):
            assert torch.equal(vlm.generate(**inputs, max_new_tokens=4, cache_implementation=cache), tokens)
        assert {count for image in vlm.last_pruned.visual_schedule for count in image} == {16}


@pytest.mark.parametrize("pruner", PRUNERS, ids=str)
@torch.no_grad()
def test_every_cache_and_attention_gives_the_same(pruner):
    inputs = batch(PROMPTS)
    new = wrapper(pruner).generate(**inputs, max_new_tokens=5)
    for attention in ("sdpa", "eager"):
        vlm = wrapper(pruner, attention)
        assert torch.equal(vlm.generate(**inputs, max_new_tokens=5, cache_implementation="static"), new)
        assert torch.equal(vlm.generate(**inputs, max_new_tokens=5), new)
        with_cache, without = (vlm.forward(**inputs, use_cache=use).logits for use in (True, False))
        torch.testing.assert_close(with_cache, without, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_cache_holds_what_each_layer_saw():
    vlm = wrapper(vzip.FastV(2, 5))
    inputs = singles(PROMPTS)[1]
    output = vlm.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert vlm.last_pruned.visual_schedule == [[16, 16, 5, 5, 5]] == [vlm.pruner.schedule(16, NUM_LAYERS)]
    assert vlm.last_pruned.cache_lengths == [[21, 21, 10, 10, 10]]
    assert [output.past_key_values.get_seq_length(i) for i in range(NUM_LAYERS)] == [24, 24, 13, 13, 13]
    assert vlm.pruner.average(16, NUM_LAYERS) == (2 * 16 + 3 * 5) / 5


@torch.no_grad()
def test_budgets_are_of_each_image_unless_they_are_pooled():
    inputs = singles(PROMPTS)[2]
    vlm = wrapper(vzip.FastV(2, 5))
    vlm.generate(**inputs, max_new_tokens=1)
    assert [image[-1] for image in vlm.last_pruned.visual_schedule] == [5, 5]
    vlm.pruner = vzip.FastV(2, 5, pooled=True)
    vlm.generate(**inputs, max_new_tokens=1)
    counts = [image[-1] for image in vlm.last_pruned.visual_schedule]
    assert sum(counts) == 5 and counts != [5, 5]


@torch.no_grad()
def test_attention_rows_are_those_of_eager_attention():
    """Of the layer before the cut (its keys in the cache, or not) and of the cut's own."""
    seen: dict[int, torch.Tensor] = {}

    class Reads(vzip.FastV):
        def cut(self, state: PromptState) -> Cut:
            for layer in (state.layer - 1, state.layer):
                seen[layer] = state.attention_rows(layer, [-1, 0, 7])
            with pytest.raises(ValueError, match="can be read"):
                state.keys(state.layer - 2)
            return Cut(torch.arange(len(state.hidden)))

    inputs = singles(PROMPTS)[1]
    for use_cache in (True, False):
        wrapper(Reads(2, 16)).forward(**inputs, use_cache=use_cache)
        attentions = wrapper(attention="eager").forward(**inputs, output_attentions=True).attentions
        for layer in (1, 2):
            torch.testing.assert_close(seen[layer], attentions[layer][0, :, [-1, 0, 7]], atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_compiled_language_model_is_pruned_too():
    """Dynamo does not look at hooks: what is compiled already would run as if there were none."""
    inputs = singles(PROMPTS)[1]
    expected = wrapper(vzip.FastV(2, 5)).generate(**inputs, max_new_tokens=4)
    vlm = wrapper()
    vlm.model.model.language_model.compile(backend="eager")
    unpruned = vlm.generate(**inputs, max_new_tokens=4)
    vlm.pruner = vzip.FastV(2, 5)
    assert torch.equal(vlm.generate(**inputs, max_new_tokens=4), expected)
    assert not torch.equal(unpruned, expected)


@torch.no_grad()
def test_forwards_that_were_not_seen_are_an_error():
    vlm = wrapper(vzip.FastV(2, 5))
    prepared = vlm.prepare(**singles(PROMPTS)[1])
    with pruning(vlm.pruner, vlm.adapter.decoder, prepared.visual_index) as run:
        vlm.model(inputs_embeds=prepared.inputs_embeds, attention_mask=prepared.attention_mask)
        run.check_forwards(1)
        with pytest.raises(PruningError, match=r"2 forwards .* were expected, but its hooks saw 1"):
            run.check_forwards(2)
    with (
        pruning(vlm.pruner, vlm.adapter.decoder, prepared.visual_index),
        pytest.raises(PruningError, match=r"got \(1, 2\) tokens"),
    ):
        vlm.model(inputs_embeds=prepared.inputs_embeds[:, :2])


class Chooses(vzip.FastV):
    """Lets through what a test says."""

    def __init__(self, cut: Any) -> None:
        super().__init__(2, 5)
        object.__setattr__(self, "make", cut)

    def cut(self, state: PromptState) -> Cut:
        return self.make(len(state.hidden))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda n: Cut(torch.arange(n - 1)), "the last must stay last"),
        (lambda n: Cut(torch.tensor([], dtype=torch.int64)), "the last must stay last"),
        (lambda n: Cut(torch.tensor([n + 3, n - 1])), "the last must stay last"),
        (lambda n: Cut(torch.tensor([-1, n - 1])), "the last must stay last"),
        (
            lambda n: Cut(torch.arange(n), torch.zeros(1, 32), torch.zeros(1).long()),
            "need positions='repacked'",
        ),
        (lambda n: Cut(torch.arange(1, n)), "keeps 4 of 5 tokens of text; a pruner drops visual tokens alone"),
        (lambda n: Cut(torch.tensor([0, *range(4, n)])), r"attend to \[16, 16, 13, 13, 13\] visual tokens, promised"),
    ],
)
@torch.no_grad()
def test_a_pruner_that_breaks_its_promise_fails(cut, message):
    with pytest.raises(PruningError, match=message):
        wrapper(Chooses(cut)).forward(**singles(PROMPTS)[1])


@torch.no_grad()
def test_other_threads_on_the_same_model_are_not_pruned():
    vlm = wrapper(vzip.FastV(2, 5))
    plain = vzip.CompressedVlm(vlm.model, vlm.compressor)
    inputs = singles(PROMPTS)[1]
    expected = [w.generate(**inputs, max_new_tokens=6).tolist() for w in (vlm, plain)]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            running = [pool.submit(w.generate, **inputs, max_new_tokens=6) for w in (vlm, plain)]
            assert [done.result().tolist() for done in running] == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "offloaded"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generation_that_cannot_be_pruned_is_refused_by_name(settings):
    vlm = wrapper(vzip.FastV(2, 5))
    (name, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=rf"{name}={value}: must be .*set vlm.pruner=None"):
        vlm.generate(**singles(PROMPTS)[1], **settings, max_new_tokens=2)
    vlm.model.generation_config.update(**settings)
    with pytest.raises(ConfigError, match=name):
        vlm.generate(**singles(PROMPTS)[1], max_new_tokens=2)


def test_an_assistant_and_a_loss_are_refused():
    vlm = wrapper(vzip.FastV(2, 5))
    inputs = singles(PROMPTS)[1]
    with pytest.raises(ConfigError, match=r"assistant_model=.*must be left out"):
        vlm.generate(**inputs, assistant_model=vlm.model)
    with pytest.raises(PromptError, match=r"labels, which speak of every token.*leave labels out"):
        vlm.forward(**inputs, labels=inputs["input_ids"])
    vlm.train()
    with pytest.raises(PromptError, match="training mode"):
        vlm.forward(**inputs)
    vlm.pruner = None
    assert vlm.forward(**inputs, labels=inputs["input_ids"]).loss is not None


def other(text: Any) -> Any:
    """A LLaVA with another language model."""
    config = family_config("llava", tiny.vision_config("clip"), text, IMAGE_TOKEN)
    return new_model(config).eval()


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def test_language_models_that_cannot_be_pruned_are_refused():
    mistral = other(MistralConfig(num_hidden_layers=3, **SMALL))
    with pytest.raises(UnsupportedModelError, match="sliding_window=4096"):
        vzip.CompressedVlm(mistral, vzip.VisionZip(BUDGET), pruner=vzip.FastV())
    gemma = other(Gemma2Config(num_hidden_layers=3, head_dim=8, **SMALL))
    with pytest.raises(UnsupportedModelError, match="is a gemma2; tokens can be dropped inside llama, mistral, qwen2"):
        vzip.CompressedVlm(gemma, vzip.VisionZip(BUDGET), pruner=vzip.FastV())
    for K in (5, 9):
        with pytest.raises(ConfigError, match=rf"cuts at the input of layer {K}, .* layers 0 to 4"):
            wrapper(vzip.FastV(K))
    with pytest.raises(ConfigError, match=r"must be an instance of vzip.Pruner"):
        wrapper("fastv")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@torch.no_grad()
def test_other_language_models(kind):
    from transformers import Qwen2Config

    torch.manual_seed(3)
    text = {"mistral": MistralConfig, "qwen2": Qwen2Config}[kind](
        num_hidden_layers=NUM_LAYERS, sliding_window=None, **SMALL
    )
    model = tiny.finish(other(text), "clip")
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), pruner=vzip.FastV(2, 5))
    inputs = singles(PROMPTS)[2]
    expected = by_plain_loops(vlm, inputs, 6)[0].argmax(dim=-1)
    assert vlm.generate(**inputs, max_new_tokens=6)[0].tolist() == expected.tolist()


# What the options change for models of four layers.
SHORT = {
    "pyramiddrop": {"layers": [1, 2, 3]},
    "vscan_stage2": {"layers": [2], "keep": [6]},
    "dart": {"num_claimed": 8},
    "sparsevlm": {"layers": [0, 1, 2], "keep": [8, 5, 2]},
    "sparsevlm_v10": {"layers": [0, 1, 2]},
    "sparsevlm_v20": {"layers": [0, 1, 2], "keep": [8, 5, 2]},
}


@pytest.mark.parametrize("name", [name for name in options(config_dir(), "pruner") if name != "none"])
@pytest.mark.parametrize("compressor", [vzip.Identity(), vzip.VisionZip(BUDGET)], ids=["all", "visionzip"])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, tiny_mini_gemini.FAMILY], ids=str)
@torch.no_grad()
def test_every_pruner_of_the_configuration_in_every_family(family, compressor, name):
    pruner = build_pruner(option_values(config_dir(), "pruner", name) | SHORT.get(name, {}))
    vlm = vzip.CompressedVlm(family.build(num_text_layers=4), compressor, pruner=pruner)
    new = vlm.generate(torch.tensor([[5, family.token, 6, family.token, 7]]), **family.inputs(2), max_new_tokens=3)
    assert new.shape == (1, 3)
    for entered, layers in zip(vlm.last_num_visual_tokens, vlm.last_pruned.visual_schedule, strict=True):
        assert layers == (pruner.schedule(entered, 4) or layers) and layers[-1] < entered == layers[0]


def test_visual_index_says_where_each_image_is():
    vlm = wrapper()
    prepared = vlm.prepare(**batch(PROMPTS))
    two = [-1, *[1] * 16, -1, -1, *[2] * 16, -1]
    one = [-1, *[0] * 16, *[-1] * 4]
    assert prepared.visual_index.tolist() == [[-2] * (36 - len(row)) + row for row in ([-1] * 3, one, two)]
    assert torch.equal(prepared.visual_index != -2, prepared.attention_mask == 1)
