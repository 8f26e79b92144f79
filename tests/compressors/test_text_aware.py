"""MMTok and CDPruner beside plain loops and cases worked out by hand, and where they part from the published code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import vzip
from vzip.compressors import Signal, VisionOutput
from vzip.compressors.vision import of_tower
from vzip.errors import ConfigError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rivals"
ALIGNED = Signal("aligned", -2)


def budget(num_tokens):
    return vzip.TokenBudget(num_tokens, 0)


def vision_output(grid=(5, 7), num_crops=2, seed=0, num_text=3, has_cls=True):
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape):
        return torch.randn(num_crops, *shape, generator=generator, dtype=torch.float64)

    length = math.prod(grid) + has_cls
    signals = {Signal("text"): rows(num_text, 5), ALIGNED: rows(length, 5)}
    return VisionOutput(rows(length, 5), has_cls, grid, signals=signals, project=lambda x: x.flip(-1) + 0.3)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.dist(a, [0] * len(a)) / math.dist(b, [0] * len(b))


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def greatest(scores, kept):
    return max((number for number in range(len(scores)) if number not in kept), key=lambda n: (scores[n], -n))


def mmtok_by_loops(text, rows, projected, num_tokens, alpha, of_text, of_image):
    covers = [[p / len(text) for p in softmax([cosine(word, row) / of_text for row in projected])] for word in text]
    for row in rows:
        covers.append([alpha * p / len(rows) for p in softmax([cosine(row, other) / of_image for other in rows])])
    best, kept = [0.0] * len(covers), []
    for _ in range(num_tokens):
        gains = [sum(max(0, own[n] - b) for own, b in zip(covers, best, strict=True)) for n in range(len(rows))]
        kept.append(greatest(gains, kept))
        best = [max(b, own[kept[-1]]) for own, b in zip(covers, best, strict=True)]
    return sorted(kept)


def cdpruner_by_loops(relevance, projected, num_tokens):
    """By determinants of the kernel itself: no factor, no updates."""
    kernel = [
        [a * cosine(x, y) * b for b, y in zip(relevance, projected, strict=True)]
        for a, x in zip(relevance, projected, strict=True)
    ]
    kept = []
    for _ in range(num_tokens):
        scores = [
            float(torch.tensor([[kernel[i][j] for j in [*kept, n]] for i in [*kept, n]], dtype=torch.float64).det())
            for n in range(len(projected))
        ]
        kept.append(greatest(scores, kept))
    return sorted(kept)


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 9, 35])
def test_mmtok_equals_plain_loops(num_tokens, has_cls):
    vision = vision_output(has_cls=has_cls)
    settings = {"alpha": 0.7, "text_temperature": 0.05, "image_temperature": 0.3}
    result = vzip.MMTok(budget(num_tokens), **settings)(vision)
    for crop in range(2):
        text, rows = vision.signals[Signal("text")][crop].tolist(), vision.hidden[crop, int(has_cls) :]
        projected = (rows.flip(-1) + 0.3).tolist()
        wanted = mmtok_by_loops(text, rows.tolist(), projected, num_tokens, 0.7, 0.05, 0.3)
        assert (result.source_index[crop] - int(has_cls)).tolist() == wanted


@pytest.mark.parametrize("text_encoder", ["any", None])
@pytest.mark.parametrize("relevance", ["negated", "positive"])
@pytest.mark.parametrize("num_tokens", [1, 4])  # no more than the rows' rank, 5
def test_cdpruner_equals_plain_loops(num_tokens, relevance, text_encoder):
    vision = vision_output()
    result = vzip.CDPruner(budget(num_tokens), text_encoder=text_encoder, relevance=relevance)(vision)
    for crop in range(2):
        text = vision.signals[Signal("text")][crop].tolist()
        projected = (vision.hidden[crop, 1:].flip(-1) + 0.3).tolist()
        aligned = projected if text_encoder is None else vision.signals[ALIGNED][crop, 1:].tolist()
        if text_encoder is None:
            text = [[sum(column) / len(text) for column in zip(*text, strict=True)]]
        found = [sum(cosine(part, row) for part in text) / len(text) for row in aligned]
        found = [-value for value in found] if relevance == "negated" else found
        scaled = [(value - min(found) + 1e-6) / (max(found) - min(found)) for value in found]
        assert (result.source_index[crop] - 1).tolist() == cdpruner_by_loops(scaled, projected, num_tokens)


def of_angles(*degrees):
    radians = torch.tensor([degrees], dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


def test_mmtok_six_patches_by_hand():
    """Two words, both at 0 degrees, and patches alike in pairs.

    Cosines with the words: 1, .5, .5, 0, 0, -.5. At temperature .5 the softmax over patches is e^2, e, e, 1, 1, 1/e
    over 16.19: .456, .168, .168, .062, .062, .023 (each word at weight 1/2, so summed the same). So patch 0 is first
    while the image weighs nothing, and then no other adds cover to the words: the lowest index. With alpha 100 the
    image decides: rows of three pairs (0, 1), (2, 3), (4, 5), temperature .1, so a pair covers itself by about 1/2 each
    and nothing else: one of each pair, the lower.
    """
    angles = of_angles(0, 60, 60, 90, 90, 120)
    hidden = torch.eye(3, dtype=torch.float64).repeat_interleave(2, dim=0)[None]
    words = of_angles(0, 0)
    vision = VisionOutput(hidden, False, (2, 3), signals={Signal("text"): words}, project=lambda _: angles)
    plain = vzip.MMTok(budget(1), alpha=0, text_temperature=0.5)
    assert plain(vision).source_index.tolist() == [[0]]
    assert replace(plain, budget=budget(3))(vision).source_index.tolist() == [[0, 1, 2]]
    of_image = vzip.MMTok(budget(3), alpha=100, text_temperature=0.5, image_temperature=0.1)
    assert of_image(vision).source_index.tolist() == [[0, 2, 4]]
    # Patch 5 is padding: it covers nothing, and is kept only when nothing else is left.
    padded = replace(vision, valid=torch.tensor([[True] * 5 + [False]]))
    assert replace(of_image, budget=budget(5))(padded).source_index.tolist() == [[0, 1, 2, 3, 4]]
    assert replace(of_image, budget=budget(6))(padded).source_index.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_cdpruner_six_patches_by_hand():
    """Relevance (positive) 1, .8, .6, .4, .2, 0 after scaling; patches 0 and 1 alike, 2 orthogonal, 3 like 2.

    The kernel's diagonal is the relevance squared: patch 0. Then of 1 nothing is left, of 2 all, .36: patch 2. Rank 2
    is spanned: 1, then 3, by relevance. Negated, relevance is 0, .2, .. 1: patch 5 (like 2 and 3), then the best of
    the other direction: 4 at .8.
    """
    cosines = torch.tensor([1, 0.9, 0.8, 0.7, 0.6, 0.5], dtype=torch.float64)
    aligned = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=-1)[None]
    projected = of_angles(0, 0, 90, 90, 0, 90)
    signals = {Signal("text"): of_angles(0), ALIGNED: aligned}
    vision = VisionOutput(torch.zeros(1, 6, 2), False, (2, 3), signals=signals, project=lambda _: projected)
    positive = vzip.CDPruner(budget(2), text_encoder="any", relevance="positive")
    assert positive(vision).source_index.tolist() == [[0, 2]]
    assert replace(positive, budget=budget(4))(vision).source_index.tolist() == [[0, 1, 2, 3]]
    assert vzip.CDPruner(budget(2), text_encoder="any")(vision).source_index.tolist() == [[4, 5]]
    padded = replace(vision, valid=torch.tensor([[False] + [True] * 5]))
    assert positive(padded).source_index.tolist() == [[1, 2]]


def test_cdpruner_scales_over_the_crops_of_an_image_and_no_further():
    """Crop 0 alone spreads .5 to .6 over all of 0..1; beside a crop that reaches from -1 to 1 it is flat.

    Patches of crop 0: 0 at 0 degrees, .6; 1 at 10 degrees, .59; 2 at 90 degrees, .5. Scaled alone: 1, .9, 1e-5, so 0
    then 1 (sin^2 10 * .81 = .024 left). Beside the other: about .8, .795, .75, so 0 then 2 (.56 left).
    """

    def unit(cosines):
        cosines = torch.tensor(cosines, dtype=torch.float64)
        return torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=-1)

    signals = {
        Signal("text"): torch.cat([of_angles(0)] * 2),
        ALIGNED: torch.stack([unit([0.6, 0.59, 0.5]), unit([1, 0, -1])]),
    }
    projected = torch.cat([of_angles(0, 10, 90)] * 2)
    vision = VisionOutput(torch.zeros(2, 3, 2), False, (1, 3), signals=signals, project=lambda _: projected)
    method = vzip.CDPruner(budget(2), text_encoder="any", relevance="positive")
    assert method(vision).source_index[0].tolist() == [0, 1]
    assert method(replace(vision, num_crops=(1, 1))).source_index[0].tolist() == [0, 1]
    assert method(replace(vision, num_crops=(2,))).source_index[0].tolist() == [0, 2]


def test_cdpruner_beyond_the_rank_fills_by_relevance():
    """Theirs divides by zero there and repeats what it has: 108 patches of 192."""
    name = "cdpruner_rank_exhausted_p576_s0_k192"
    given, wanted = (
        load_file(GOLDEN / "inputs" / "p576_s0.safetensors"),
        load_file(GOLDEN / "cases" / f"{name}.safetensors"),
    )
    projected, aligned = (
        functional.pad(given[key].float()[None], (0, 0, 1, 0)) for key in ("projected", "image_embeds")
    )
    signals = {Signal("text"): given["text_embeds"].float()[None], ALIGNED: aligned}
    vision = VisionOutput(given["hidden"].float()[None], True, (24, 24), signals=signals, project=lambda _: projected)
    method = vzip.CDPruner(budget(192), text_encoder="any")
    spanning = wanted["kept_index"][:96].tolist()  # as many as the rows are wide, in their order
    for count in (1, 7, 95, 96):
        assert (replace(method, budget=budget(count))(vision).source_index[0] - 1).tolist() == sorted(spanning[:count])
    kept = (method(vision).source_index[0] - 1).tolist()
    relevance = -(
        functional.normalize(aligned[0, 1:], dim=1) @ functional.normalize(given["text_embeds"].float(), dim=1).T
    )[:, 0]
    others = [patch for patch in relevance.argsort(descending=True).tolist() if patch not in spanning]
    assert kept == sorted([*spanning, *others[:96]])


@pytest.mark.parametrize(
    "method", [vzip.MMTok(budget(1)), vzip.CDPruner(budget(1), text_encoder="any"), vzip.CDPruner(budget(1))], ids=repr
)
def test_edges(method):
    """All patches, equal patches, a constant relevance, half precision."""
    vision = vision_output()
    assert replace(method, budget=budget(35))(vision).source_index.tolist() == [list(range(1, 36))] * 2
    alike = replace(
        vision,
        hidden=vision.hidden[:, :1].expand(-1, 36, -1),
        signals={**vision.signals, ALIGNED: vision.signals[ALIGNED][:, :1].expand(-1, 36, -1)},
    )
    for count in (1, 6, 35):
        assert replace(method, budget=budget(count))(alike).source_index.tolist() == [list(range(1, count + 1))] * 2
    method = replace(method, budget=budget(9))
    for dtype in (torch.float16, torch.bfloat16):
        signals = {signal: value.to(dtype) for signal, value in vision.signals.items()}
        half = replace(vision, hidden=vision.hidden.to(dtype), signals=signals, project=lambda x: x)
        wide = {signal: value.float() for signal, value in signals.items()}
        single = replace(half, hidden=half.hidden.float(), signals=wide)
        assert torch.equal(method(half).source_index, method(single).source_index)
    longer = {**vision.signals, Signal("text"): functional.pad(vision.signals[Signal("text")], (0, 0, 0, 4))}
    assert torch.equal(method(replace(vision, signals=longer)).source_index, method(vision).source_index)


def test_what_is_read_of_a_question():
    cases = [json.loads(line) for line in (GOLDEN / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
    (case,) = (case for case in cases if case["case"] == "mmtok_p49_s0_k12")
    method = vzip.MMTok(budget(1))
    assert method.text(case["options"]["question"]) == " ".join(case["options"]["words_used"])
    assert method.text("What is it?\nAnswer the question using a single word or phrase.") == "What is it?"
    only = "Answer the question using a single word or phrase."
    assert method.text(only) == "using single word phrase", "a question that says nothing else is read as it is"
    assert vzip.MMTok(budget(1), stop_words=False).text("What is it?") == "Question: What is it?"
    choices = "Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly."
    assert vzip.CDPruner(budget(1)).text(choices) == "Which?\nA. one\nB. two"


def test_what_the_tower_records_for_them():
    assert of_tower(vzip.MMTok(budget(1)).reads()) == of_tower(vzip.CDPruner(budget(1)).reads()) == frozenset()
    assert of_tower(vzip.MMTok(budget(1), layer=1).reads()) == {Signal("hidden", 1)}
    assert of_tower(vzip.CDPruner(budget(1), text_encoder="any").reads()) == {Signal("hidden", -2)}
    assert vzip.MMTok(budget(1)).reads_text and not vzip.VisionZip(budget(1)).reads_text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1}, r"compressor\.alpha=-1: must be a number, 0 or more"),
        ({"text_temperature": 0}, r"compressor\.text_temperature=0: must be a number above 0"),
        ({"image_temperature": "0.2"}, r"compressor\.image_temperature='0.2'"),
        ({"stop_words": "no"}, r"compressor\.stop_words='no': must be true or false"),
        ({"layer": 1.5}, r"layer 1\.5 of signal hidden"),
        ({"relevance": "negativ"}, r"compressor\.relevance='negativ': must be one of negated, positive"),
        ({"text_encoder": 3}, r"compressor\.text_encoder=3: must be a CLIP checkpoint"),
    ],
)
def test_settings_are_checked(settings, message):
    method = vzip.CDPruner if {"relevance", "text_encoder"} & settings.keys() else vzip.MMTok
    with pytest.raises(ConfigError, match=message):
        method(budget(1), **settings)
    with pytest.raises(ConfigError, match="layer 3 of signal text: the question is no layer"):
        Signal("text", 3)


def test_a_question_of_another_space_is_refused():
    vision = vision_output()
    signals = {**vision.signals, Signal("text"): torch.ones(2, 3, 4)}
    with pytest.raises(ValueError, match="rows are 4 and 5 wide: they must be of one space"):
        vzip.MMTok(budget(1))(replace(vision, signals=signals))
