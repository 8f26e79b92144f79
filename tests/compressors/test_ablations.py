"""VisionZip's other scores, targets and treatment of CLS against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import reference

import vzip
from vzip.compressors import Signal, VisionOutput
from vzip.errors import ConfigError
from vzip.ops.select import random_indices

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
NUM_PATCHES = 40


def vision_output(has_cls: bool) -> VisionOutput:
    generator = torch.Generator().manual_seed(5)
    length = NUM_PATCHES + has_cls
    hidden, keys = (torch.randn(2, length, width, generator=generator, dtype=torch.float64) for width in (5, 4))
    attention, received, norms = (torch.rand(2, NUM_PATCHES, generator=generator) for _ in range(3))
    signals = {Signal("received_attention"): received, Signal("key_norms"): norms}
    return VisionOutput(hidden, has_cls, (5, 8), attention, keys, signals=signals)


@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no_cls"])
@pytest.mark.parametrize(
    "options",
    [
        {"score": "received_attention"},
        {"score": "key_norms"},
        {"targets": "random", "seed": 4},
        {"keep_cls": False},
        {"keep_cls": False, "score": "key_norms", "targets": "random", "merge_rule": "mean"},
    ],
    ids=str,
)
def test_options_equal_plain_loops(has_cls: bool, options: dict[str, Any]) -> None:
    vision, compressor = vision_output(has_cls), vzip.VisionZip(BUDGET, **options)
    result = compressor(vision)
    first = int(has_cls and not compressor.keep_cls)  # CLS takes no part
    num_rest = vision.num_rows - first - BUDGET.num_dominant
    positions = None
    if compressor.targets == "random":
        positions = random_indices(3, num_rest, compressor.seed, torch.device("cpu")).tolist()
    for crop in range(2):
        tokens, kept, merged = reference.visionzip(
            vision.hidden[crop, first:].tolist(),
            vision.read_patches(Signal(compressor.score))[crop].tolist(),
            vision.keys[crop, first:].tolist(),
            BUDGET.num_dominant,
            BUDGET.num_contextual,
            has_cls and not first,
            compressor.merge_rule,
            positions,
        )
        torch.testing.assert_close(result.tokens[crop], torch.tensor(tokens, dtype=torch.float64), rtol=0, atol=1e-6)
        assert result.source_index[crop].tolist() == [row + first for row in kept]
        assert result.merge_index[crop].tolist() == [-1] * first + merged
    usual = vzip.VisionZip(BUDGET)(vision)
    same = options == {"keep_cls": False} and not has_cls
    assert torch.equal(result.tokens, usual.tokens) == same, "the option decides"


def test_only_what_the_score_needs_is_read() -> None:
    assert vzip.VisionZip(BUDGET).reads() == {Signal("attention"), Signal("keys")}
    early = vzip.VisionZip(BUDGET, score="key_norms", score_layer=3)
    assert early.reads() == {Signal("key_norms", 3), Signal("keys", 3)}
    with pytest.raises(ValueError, match=r"received_attention.* was not recorded"):
        bare = VisionOutput(torch.zeros(1, 41, 5), True, (5, 8), torch.zeros(1, 40), torch.zeros(1, 41, 4))
        vzip.VisionZip(BUDGET, score="received_attention")(bare)


def test_without_cls_every_token_may_be_contextual_and_one_token_less_fits() -> None:
    all_merged = vzip.VisionZip(vzip.TokenBudget(0, 4), keep_cls=False)(vision_output(True))
    assert all_merged.source_index.shape == (2, 0) and all_merged.num_tokens == 4
    whole = vzip.TokenBudget(NUM_PATCHES, 1)
    shape = vision_output(True).shape
    assert vzip.VisionZip(whole).num_tokens(shape) == NUM_PATCHES + 1
    with pytest.raises(ConfigError, match="has 40 to choose from"):
        vzip.VisionZip(whole, keep_cls=False).num_tokens(shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "key_norm"}, r"compressor.score='key_norm'.*did you mean 'key_norms'"),
        ({"targets": "grid"}, r"compressor.targets='grid': must be one of uniform, random"),
        ({"keep_cls": 1}, r"compressor.keep_cls=1: must be true or false"),
        ({"score_layer": 1.5}, r"compressor.score_layer=1.5: must be a whole number"),
        ({"seed": -1}, r"compressor.seed=-1: must be a whole number"),
    ],
)
def test_values_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vzip.VisionZip(BUDGET, **options)


def test_the_name_of_the_method_tells_what_is_not_usual() -> None:
    assert repr(vzip.VisionZip(BUDGET)) == f"VisionZip(budget={BUDGET!r}, merge_rule='sum')"
    assert repr(vzip.VisionZip(BUDGET, keep_cls=False)).endswith("merge_rule='sum', keep_cls=False)")
