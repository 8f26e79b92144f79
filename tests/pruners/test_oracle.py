"""Pruners against what the methods' own code computes (tests/golden/rivals): positions exact, hidden states close."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.pruners.methods import Dart, PyramidDrop, SparseVlm
from transformers import DynamicCache, LlamaConfig, LlamaModel

import vzip
from vzip.models.families.decoder import LlamaDecoder
from vzip.pruners import Cut, PromptState, Pruner
from vzip.pruners.context import pruning

GOLDEN = Path(__file__).parents[1] / "golden" / "rivals"
NUM_SYSTEM, NUM_LAYERS = 20, 26


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
    torch.testing.assert_close(step, expected["decode_hidden"], atol=1e-5, rtol=0)
    patches = int(case.split("_p")[-1].split("_")[0])
    text = 10**6
    names = torch.cat([torch.full((NUM_SYSTEM,), text), torch.arange(patches), torch.full((24,), text)])
    for stage, (layer, cut) in enumerate(cuts.items(), start=1):
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
    last, step, done, cuts = run(model, pruner, int(case.split("_p")[1].split("_")[0]), weights["decode_embed"])
    assert_agrees(case, cuts, last, step)
    expected = load_file(GOLDEN / f"{case}.safetensors")[f"positions_layer{K}"]
    assert cuts[K].index.tolist() == expected.tolist()
    assert done.cache_lengths[0][:4] == lengths
    assert done.visual_schedule[0] == [length - 44 for length in done.cache_lengths[0]]


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        ("pyramiddrop_2_8_p49_s0_k12", {2: 24, 8: 12}),
        ("pyramiddrop_2_8_16_p576_s0_k192", {2: 322, 8: 181, 16: 101}),
    ],
)
def test_several_cuts_with_repacked_positions(model, weights, case, counts):
    last, step, done, cuts = run(
        model, PyramidDrop(counts), int(case.split("_p")[-1].split("_")[0]), weights["decode_embed"]
    )
    assert_agrees(case, cuts, last, step)
    assert [done.visual_schedule[0][layer] for layer in counts] == list(counts.values())


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        ("sparsevlm_v15_p49_s0_k64", {3: 66, 7: 30, 16: 17}),
        ("sparsevlm_v15_p576_s0_k128", {3: 303, 7: 110, 16: 36}),
    ],
)
def test_new_rows(model, weights, case, counts):
    expected = load_file(GOLDEN / f"{case}.safetensors")
    pruner = SparseVlm(counts, [expected[f"noise_{stage}"] for stage in range(3)])
    last, step, _, cuts = run(model, pruner, int(case.split("_p")[1].split("_")[0]), weights["decode_embed"])
    assert_agrees(case, cuts, last, step)


def test_keys_after_the_rotary_embedding_and_the_last_norm(model, weights):
    case = "dart_p576_s0_k64"
    order = load_file(GOLDEN / f"{case}.safetensors")["pivot_order"].tolist()
    pruner = Dart(64, order)
    last, step, _, cuts = run(model, pruner, 576, weights["decode_embed"])
    assert sorted(pruner.chosen[0] + pruner.chosen[1]) == sorted(order)
    assert_agrees(case, cuts, last, step)
