"""Pruners against what the methods' own code computes (tests/golden/rivals): positions exact, hidden states close."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaModel

import vzip
from vzip.models.families.decoder import LlamaDecoder
from vzip.pruners import Cut, PromptState, Pruner
from vzip.pruners.context import pruning

GOLDEN = Path(__file__).parents[1] / "golden" / "rivals"
NUM_SYSTEM, NUM_TEXT, NUM_LAYERS = 20, 44, 26


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(GOLDEN / "llm_weights.safetensors").items()}


@pytest.fixture(scope="module")
def model(weights: dict[str, torch.Tensor]) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
    )
    model = LlamaModel(config).eval()
    report = model.load_state_dict(weights, strict=False)
    assert report.missing_keys == ["embed_tokens.weight"] and report.unexpected_keys == ["decode_embed"]
    return model


def patches_of(case: str) -> int:
    return int(case.split("_p")[-1].split("_")[0])


@torch.no_grad()
def run(model: LlamaModel, pruner: Pruner, patches: int, decode: torch.Tensor):
    """Last hidden states of prompt and next token, the run, and what went on at each cut."""
    embeds = load_file(GOLDEN / f"llm_p{patches}_s0.safetensors")["inputs_embeds"].float()[None]
    visual_index = torch.full(embeds.shape[:2], -1)
    visual_index[0, NUM_SYSTEM : NUM_SYSTEM + patches] = 0
    cuts: dict[int, Cut] = {}
    original: Callable[[PromptState], Cut] = pruner.cut

    def spy(state: PromptState) -> Cut:
        cuts[state.layer] = original(state)
        return cuts[state.layer]

    object.__setattr__(pruner, "cut", spy)
    cache = DynamicCache()
    with pruning(pruner, LlamaDecoder(model), visual_index) as done:
        prompt = model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state
        position = torch.tensor([[embeds.shape[1]]])
        step = model(inputs_embeds=decode[None, None], past_key_values=cache, position_ids=position).last_hidden_state
    done.check_forwards(2)
    assert [cache.get_seq_length(i) for i in range(NUM_LAYERS)] == [n + 1 for n in done.cache_lengths[0]]
    return prompt[0, -1], step[0, -1], done, cuts


def assert_agrees(case: str, cuts: dict[int, Cut], last: torch.Tensor, step: torch.Tensor) -> None:
    """Kept tokens and new rows of every cut, in order, then the hidden states."""
    expected = load_file(GOLDEN / f"{case}.safetensors")
    torch.testing.assert_close(last, expected["last_token_hidden"], atol=1e-5, rtol=0)
    if "decode_hidden" in expected:
        torch.testing.assert_close(step, expected["decode_hidden"], atol=1e-5, rtol=0)
    patches = patches_of(case)
    text = 10**6
    names = torch.cat([torch.full((NUM_SYSTEM,), text), torch.arange(patches), torch.full((24,), text)])
    for stage, (layer, cut) in enumerate(cuts.items(), start=1):
        if f"kept_index_layer{layer}" not in expected:  # nothing was dropped
            assert cut.index.tolist() == list(range(len(names)))
            continue
        new = -(1000 * stage + torch.arange(0 if cut.new_rows is None else len(cut.new_rows)) + 1)
        names = torch.cat([names, new.flip(0)])[cut.index]  # -1 - j is new row j
        assert names[names < text].tolist() == expected[f"kept_index_layer{layer}"].tolist(), layer
        if cut.new_rows is not None:
            torch.testing.assert_close(cut.new_rows, expected[f"merged_layer{layer}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "K", "keep", "lengths"),
    [
        ("fastv_k2_p576_s0_k166", 2, 166, [620, 620, 210, 210]),
        ("fastv_k3_p576_s0_k82", 3, 82, [620, 620, 620, 126]),
        ("fastv_k2_p49_s0_k12", 2, 1 - 0.7551020408163265, [93, 93, 56, 56]),
    ],
)
def test_fastv(model, weights, case, K, keep, lengths):
    pruner = vzip.FastV(K, keep)
    last, step, done, cuts = run(model, pruner, patches_of(case), weights["decode_embed"])
    assert_agrees(case, cuts, last, step)
    expected = load_file(GOLDEN / f"{case}.safetensors")[f"positions_layer{K}"]
    assert cuts[K].index.tolist() == expected.tolist()
    assert done.cache_lengths[0][:4] == lengths
    assert done.visual_schedule[0] == [length - 44 for length in done.cache_lengths[0]]


@pytest.mark.parametrize(
    ("case", "pruner"),
    [
        ("pyramiddrop_2_8_p49_s0_k12", vzip.PyramidDrop([2, 8], [0.5, 0.25])),
        ("pyramiddrop_2_8_16_p576_s0_k192", vzip.PyramidDrop([2, 8, 16], [0.5606, 0.31427236, 0.17618])),
        ("vscan_stage2_p49_s0_k12", vzip.VScanStage2(16, 12)),
    ],
)
def test_steps_with_repacked_positions(model, weights, case, pruner):
    last, step, done, cuts = run(model, pruner, patches_of(case), weights["decode_embed"])
    assert_agrees(case, cuts, last, step)
    assert done.visual_schedule[0] == pruner.schedule(patches_of(case), NUM_LAYERS)


@pytest.mark.parametrize(
    ("case", "pruner"),
    [
        ("sparsevlm_v15_p49_s0_k64", vzip.SparseVLM(keep=[66, 30, 17])),
        ("sparsevlm_v15_p576_s0_k128", vzip.SparseVLM(keep=[303, 110, 36])),
        ("sparsevlm_v10_p49_s0_k64", vzip.SparseVLMByRank(scale=0.8)),
    ],
)
def test_tokens_that_are_rated_by_text_and_merged(model, weights, case, pruner):
    """With the noise that the authors' code drew, where ours is from a seed of our own."""
    drawn = {name: noise for name, noise in load_file(GOLDEN / f"{case}.safetensors").items() if "noise" in name}
    noise = iter([drawn[name] for name in sorted(drawn)])
    object.__setattr__(pruner, "noise", lambda number: next(noise) if number else torch.empty(0))
    last, step, done, cuts = run(model, pruner, patches_of(case), weights["decode_embed"])
    assert_agrees(case, cuts, last, step)
    assert next(noise, None) is None
    if isinstance(pruner, vzip.SparseVLM):
        assert done.visual_schedule[0] == pruner.schedule(patches_of(case), NUM_LAYERS)


@pytest.mark.parametrize(("case", "shared"), [("dart_p576_s0_k64", 64), ("dart_p49_s0_k12", 11)])
def test_dart_but_for_the_order_of_its_pivots(model, weights, case, shared):
    """Theirs is that of a Python set; in ours, of descending norm, a few claims fall to other tokens."""
    budget, order = int(case.split("_k")[1]), load_file(GOLDEN / f"{case}.safetensors")["pivot_order"].long()
    pruner = vzip.DART(2, budget)
    num_kept = pruner.schedule(patches_of(case), NUM_LAYERS)[-1]
    ours = set(run(model, pruner, patches_of(case), weights["decode_embed"])[3][2].index.tolist())
    pruner = vzip.DART(2, budget)

    def as_published(pivots: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        assert sorted(pivots.tolist()) == sorted(order.tolist())
        return order

    object.__setattr__(pruner, "in_turn", as_published)
    last, step, done, cuts = run(model, pruner, patches_of(case), weights["decode_embed"])
    assert_agrees(case, cuts, last, step)
    assert done.visual_schedule[0][2] == num_kept
    assert len(ours & set(cuts[2].index.tolist())) == NUM_TEXT + shared
