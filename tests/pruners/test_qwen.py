"""Pruners inside Qwen2.5-VL and Qwen3-VL: positions of three axes, planes, images of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny_qwen, tiny_qwen3
from tests.pruners.methods import PRUNERS, PlainLoops
from tests.tiny_qwen import batch, images, prompt

import vzip
from vzip.errors import ConfigError
from vzip.pruners import Cut, PromptState, Pruner
from vzip.pruners.context import PruningError

BUDGET = vzip.TokenBudget(num_dominant=8, num_contextual=4)
ONE, TWO = prompt(5, "6x10", 7, 9, 11, 13, 17), prompt(8, "8x8", 3, "12x16", 6, 7, 18, 10)
SETTINGS = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
LAYERS = 5


def lengthened(build: Any) -> Any:
    """The tiny model with layers enough for every pruner."""
    small = build()
    config = type(small.config).from_dict(small.config.to_dict())
    config.text_config.num_hidden_layers = LAYERS
    config.text_config.layer_types = ["full_attention"] * LAYERS
    torch.manual_seed(1)
    model = type(small)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5 * 1.5)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


@pytest.fixture(scope="module", params=[tiny_qwen, tiny_qwen3], ids=["qwen2_5_vl", "qwen3_vl"])
def model(request: Any) -> Any:
    return lengthened(request.param.build)


def fits(model: Any, pruner: Pruner) -> bool:
    """Whether the family serves it: no new rows where planes are added later."""
    planes = getattr(model.config.vision_config, "deepstack_visual_indexes", ())
    return not (pruner.makes_rows and pruner.cuts[0] < len(planes))


@torch.no_grad()
@pytest.mark.parametrize(
    ("pruner", "compressor"),
    [(vzip.FastV(1, 0.25), vzip.Identity())]
    + [(pruner, vzip.VisionZip(BUDGET)) for pruner in (*PRUNERS, vzip.SparseVLM([1, 3], [5, 3]))],
    ids=str,
)
def test_equal_to_plain_loops(model: Any, pruner: Pruner, compressor: Any) -> None:
    """Two images of different sizes: what goes on at every cut, and every logit."""
    if not fits(model, pruner):
        with pytest.raises(ConfigError, match=r"Cut at layer 2 or later"):
            vzip.CompressedVlm(model, compressor, pruner=pruner)
        return
    vlm = vzip.CompressedVlm(model, compressor, pruner=pruner)
    inputs = {**batch(TWO), **images("8x8", "12x16")}
    logits = torch.cat(vlm.generate(**inputs, **SETTINGS).logits)
    prepared = vlm.prepare(**inputs)
    embeds, owner = prepared.inputs_embeds[0], prepared.visual_index[0].tolist()
    planes: Any = ()
    if prepared.planes is not None:
        rows = torch.zeros(len(owner), prepared.planes.shape[1])
        rows[prepared.visual_index[0] >= 0] = prepared.planes
        planes = rows.split(embeds.shape[1], dim=1)
    plain, new = PlainLoops(vlm, pruner, prepared.position_ids[:, 0], planes), list[int]()
    for _ in range(SETTINGS["max_new_tokens"]):  # type: ignore[arg-type]
        expected = plain.logits(embeds, [*owner, *[-1] * len(new)], len(owner))
        new.append(int(expected[-1].argmax()))
        embeds = torch.cat([embeds, vlm.adapter.embed_tokens(torch.tensor(new[-1:]))])
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
    vlm.pruner = None
    assert (vlm.generate(**inputs, **SETTINGS).logits[0][0] - expected[0]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("pruner", [vzip.FastV(1, 5), vzip.PyramidDrop([2, 3], [9, 4]), vzip.SparseVLM([1, 3], [5, 3])])
def test_a_batch_equals_its_singles_with_and_without_a_cache(model: Any, pruner: Pruner) -> None:
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), pruner=pruner)
    rows: list[tuple[list[int], dict[str, torch.Tensor]]] = [([4, 5, 6], {}), (ONE, images("6x10"))]
    rows.append((TWO, images("8x8", "12x16")))
    together = {**batch(*(ids for ids, _ in rows)), **images("6x10", "8x8", "12x16")}
    new = vlm.generate(**together, max_new_tokens=4, do_sample=False)
    schedule = vlm.last_pruned.visual_schedule  # type: ignore[union-attr]
    logits = [vlm.forward(**together, use_cache=use).logits for use in (True, False)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    seen = []
    for row, (ids, shown) in enumerate(rows):
        own = {**batch(ids), **shown}
        alone = vlm.forward(**own).logits[0]
        torch.testing.assert_close(logits[0][row, -len(alone) :], alone, atol=1e-3, rtol=1e-4)
        assert vlm.generate(**own, max_new_tokens=4, do_sample=False)[0].tolist() == new[row].tolist()
        seen += [] if vlm.last_pruned is None else vlm.last_pruned.visual_schedule
    assert seen == schedule and len(seen) == 3


@torch.no_grad()
@pytest.mark.parametrize("pruner", [vzip.FastV(1, 1.0), vzip.PyramidDrop([1, 2], [1.0, 1.0])], ids=str)
def test_keeping_everything_is_the_unpruned_model(model: Any, pruner: Pruner) -> None:
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    inputs = {**batch(ONE, TWO), **images("6x10", "8x8", "12x16")}
    expected, told = vlm.forward(**inputs).logits, vlm.generate(**inputs, max_new_tokens=3, do_sample=False)
    vlm.pruner = pruner
    assert torch.equal(vlm.forward(**inputs).logits, expected)
    assert torch.equal(vlm.generate(**inputs, max_new_tokens=3, do_sample=False), told)


@torch.no_grad()
def test_attention_rows_are_those_of_eager_attention(model: Any) -> None:
    """Before any cut, and of the layer that is cut, whose planes are there already."""
    seen: dict[int, torch.Tensor] = {}

    class Reads(vzip.FastV):
        def cut(self, state: PromptState) -> Cut:
            for layer in (state.layer - 1, state.layer):
                seen[layer] = state.attention_rows(layer, [-1, 0, 7])
            return Cut(torch.arange(len(state.hidden)))

    vlm = vzip.CompressedVlm(model, vzip.Identity(), pruner=Reads(1, 1.0))
    inputs = {**batch(ONE), **images("6x10")}
    for use_cache in (True, False):
        vlm.pruner = Reads(1, 1.0)
        vlm.forward(**inputs, use_cache=use_cache)
        vlm.pruner = None
        model.set_attn_implementation("eager")
        attentions = vlm.forward(**inputs, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        for layer in (0, 1):
            torch.testing.assert_close(seen[layer], attentions[layer][0, :, [-1, 0, 7]], atol=1e-5, rtol=0)


def test_new_rows_below_the_planes_are_an_error_of_the_method() -> None:
    class Makes(vzip.FastV):
        def cut(self, state: PromptState) -> Cut:
            index = torch.cat([state.text[:1], torch.tensor([-1]), state.text[1:]])
            return Cut(index, state.hidden[:1], state.visual_index[state.images[0][:1]], "repacked")

    vlm = vzip.CompressedVlm(lengthened(tiny_qwen3.build), vzip.Identity(), pruner=Makes(1, 1))
    with pytest.raises(PruningError, match="has new rows"):
        vlm.forward(**batch(ONE), **images("6x10"))


def test_a_budget_as_an_average_is_refused_since_images_vary(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"vary in their visual tokens. Set budget=full"):
        vzip.CompressedVlm(model, vzip.Identity(), pruner=vzip.FastV(budget=64))
