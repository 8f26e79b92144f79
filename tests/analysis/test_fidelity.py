"""Divergence and agreement along an answer, against hand-known values and a plain loop over generate's own steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from PIL import Image

import vzip
from vzip.analysis.fidelity import AnswerFidelity, answer_logits, compare_answers, divergences, image_means
from vzip.compressors.controls import Identity, RandomTokens
from vzip.config.options import config_dir
from vzip.models.vlm import CompressedVlm

SCENE = config_dir().parent / "docs" / "scene.png"
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}


@pytest.fixture(scope="module")
def vlm() -> CompressedVlm:
    return vzip.load_vlm("vzip/tiny", dtype="float32")


def ask(vlm: CompressedVlm, question: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = vlm.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    with Image.open(SCENE) as image:
        return vlm.build_inputs([prompt], [[image]])


def test_divergences_by_hand() -> None:
    vanilla = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]).log()
    other = torch.tensor([[0.25, 0.25, 0.5], [0.25, 0.5, 0.25]]).log()
    assert divergences(vanilla, other).tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)
    assert divergences(other, vanilla)[0] == math.inf, "vanilla has what the other rules out: not symmetric"
    assert torch.equal(divergences(vanilla, vanilla + 3.0) < 1e-12, torch.tensor([True, True])), "a shift is none"


def test_answers_and_their_means_by_hand() -> None:
    vanilla, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = compare_answers(vanilla, other, [0, 1], [0, 0])
    assert found.agrees.tolist() == [True, False] and not found.identical
    assert compare_answers(vanilla, vanilla, [0, 1], [0, 1]).identical
    shorter = AnswerFidelity(torch.tensor([6.0]), torch.tensor([True]), True)
    longer = AnswerFidelity(torch.tensor([0.0, 3.0]), torch.tensor([True, False]), False)
    means = image_means([shorter, longer])
    assert means == {"kl": 3.0, "agreement": pytest.approx(2 / 3), "identical": 0.5}, "over tokens, not answers"


def test_one_pass_gives_what_generate_saw_step_by_step(vlm: CompressedVlm) -> None:
    """Float64 KL of each step of a plain loop, which gives the compressed model vanilla's answer token by token."""
    vlm.compressor = Identity()
    inputs = ask(vlm, "What word is written on the sign?")
    told = vlm.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    answer = told.sequences[0]
    assert len(answer) == 5
    vanilla = answer_logits(vlm, inputs, answer)
    torch.testing.assert_close(vanilla, torch.cat(told.logits), rtol=1e-4, atol=1e-4)

    vlm.compressor = RandomTokens(vzip.TokenBudget(5, 1), 0)
    found = divergences(vanilla, answer_logits(vlm, inputs, answer))
    for step, p_logits in enumerate(told.logits):
        so_far = answer[None, :step]
        grown = {
            "input_ids": torch.cat([inputs["input_ids"], so_far], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(so_far)], dim=1),
        }
        one = vlm.generate(
            **{**inputs, **grown}, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        p, q = (logits[0].double().softmax(dim=0).tolist() for logits in (p_logits, one.logits[0]))
        expected = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)
        assert found[step].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found.sum() > 0.01
