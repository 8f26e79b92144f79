"""Videos of Qwen2.5-VL and Qwen3-VL, as their processors return them: one run of placeholders, or a run a step."""

from __future__ import annotations

import pytest
import torch
from tests import methods, tiny_qwen, tiny_qwen3
from tests.tiny_qwen import VIDEO, batch, images, prompt, recorded_maps, stock, video, videos

import vzip
from vzip.compressors import FractionBudget, Signal
from vzip.errors import PromptError

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
SERVED = [name for name in methods.METHODS if methods.build(name, BUDGET).tower_use == "whole"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
FAMILIES = {"qwen2_5_vl": tiny_qwen, "qwen3_vl": tiny_qwen3}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A model, and whether its videos are written in runs."""
    return FAMILIES[request.param].build(), request.param == "qwen3_vl"


def mixed(in_runs):
    """Two prompts: a video and an image, then an image and two videos."""
    rows = [
        [5, *video("3x6x10", in_runs), 7, *prompt("4x8"), 8],
        [*prompt("4x4", 9), *video("2x4x8", in_runs), 6, *video("1x6x10", in_runs), 3],
    ]
    return rows, images("4x8", "4x4"), videos("3x6x10", "2x4x8", "1x6x10")


def test_a_video_alone_and_with_images_equals_stock_bit_for_bit(family):
    _, in_runs = family
    rows, shown, clips = mixed(in_runs)
    alone = ([[5, *video("3x6x10", in_runs), 7]], {}, videos("3x6x10"))
    for dtype in (torch.float32, torch.bfloat16):
        model = FAMILIES["qwen3_vl" if in_runs else "qwen2_5_vl"].build().to(dtype)
        vlm = vzip.CompressedVlm(model, vzip.Identity())
        for prompts, own, moving in ((rows, shown, clips), alone):
            ids, inputs = batch(*prompts), {**own, **moving}
            with torch.no_grad():
                theirs = model.generate(**stock(model, ids, **inputs), **GREEDY)
                model.model.rope_deltas = None
                ours = vlm.generate(**ids, **inputs, **GREEDY)
                whole_logits = model(**stock(model, ids, **inputs)).logits
                model.model.rope_deltas = None
                own_logits = vlm.forward(**ids, **inputs).logits
            assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))
            valid = ids["attention_mask"].bool()
            assert torch.equal(own_logits[valid], whole_logits[valid])
    assert vlm.last_num_visual_tokens == [45]


@pytest.mark.parametrize("seconds", [None, 0.5, 1.5])
@torch.no_grad()
def test_positions_are_the_models(family, seconds):
    model, in_runs = family
    rows, shown, clips = mixed(in_runs)
    timed = {} if seconds is None or in_runs else {"second_per_grid_ts": torch.full((3,), seconds)}
    ids, inputs = batch(*rows), {**shown, **clips, **timed}
    arguments = stock(model, ids, **inputs)
    expected = model.model.get_rope_index(
        ids["input_ids"],
        arguments["mm_token_type_ids"],
        image_grid_thw=shown["image_grid_thw"],
        video_grid_thw=clips["video_grid_thw"],
        attention_mask=ids["attention_mask"],
        **timed,
    )[0]
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    assert torch.equal(vlm.prepare(**ids, **inputs).position_ids, expected)
    # Of a compressed prompt: those of the places that are left, step by step, text and its times whole.
    vlm.compressor = vzip.VisionZip(BUDGET)
    prepared = vlm.prepare(**ids, **inputs)
    tokens = vlm.adapter.encode(vlm.adapter.read_inputs(**inputs), vlm.compressor)
    for row, own in enumerate(((2, 0), (1, 3, 4))):
        left = iter([tokens[number].place_index.tolist() for number in own])
        columns, column, written = [], 0, ids["input_ids"][row].tolist()
        remaining, first = [], 0
        while column < len(written):
            if written[column] not in (tiny_qwen.IMAGE, VIDEO):
                columns += [column] if ids["attention_mask"][row, column] else []
                column += 1
                continue
            stop = column
            while written[stop] == written[column]:
                stop += 1
            if not remaining and first == 0:
                remaining = next(left)
            here = [place - first for place in remaining if place - first < stop - column]
            columns += [column + place for place in here]
            remaining = remaining[len(here) :]
            first = first + stop - column if remaining else 0
            column = stop
        length = len(columns)
        assert torch.equal(prepared.position_ids[:, row, -length:], expected[:, row, columns])
        assert int(prepared.attention_mask[row].sum()) == length


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_a_batch_equals_singles_and_a_budget_is_a_steps(family, name):
    model, in_runs = family
    settings = {"local_layer": 2, "window": 3} if name == "vscan" else {}
    vlm = vzip.CompressedVlm(model, methods.build(name, BUDGET, **settings), methods.Words())
    rows, shown, clips = mixed(in_runs)
    ids, inputs = batch(*rows), {**shown, **clips}
    expected = vlm.expected_num_visual_tokens(**inputs)
    assert expected == ([8, 4, 45, 16, 15] if name == "none" else [8, 4, 27, 16, 9])
    asked = list(methods.QUESTIONS[: len(rows)])  # methods that read no text look at none
    together = vlm.prepare(**ids, **inputs, questions=asked)
    logits = vlm.forward(**ids, **inputs, questions=asked).logits
    assert together.num_visual_tokens == expected
    numbers = together.visual_index[together.visual_index >= 0].bincount().tolist()
    assert numbers == expected
    # Images, patches of images, videos and patches of videos of each prompt.
    parts = [
        (slice(0, 1), slice(0, 32), slice(0, 1), slice(0, 180)),
        (slice(1, 2), slice(32, 48), slice(1, 3), slice(180, 304)),
    ]
    for number, (still, pixels, moving, patches) in enumerate(parts):
        alone = {
            "pixel_values": shown["pixel_values"][pixels],
            "image_grid_thw": shown["image_grid_thw"][still],
            "pixel_values_videos": clips["pixel_values_videos"][patches],
            "video_grid_thw": clips["video_grid_thw"][moving],
        }
        single = vlm.forward(**batch(rows[number]), **alone, questions=asked[number : number + 1]).logits
        torch.testing.assert_close(logits[number, -single.shape[1] :], single[0], rtol=0, atol=1e-3)


@torch.no_grad()
def test_what_is_dropped_might_as_well_be_masked(family):
    model, in_runs = family
    vlm = vzip.CompressedVlm(model, methods.build("dominant_only", FractionBudget(0.5, 0.0)))
    ids, inputs = batch([5, *video("3x6x10", in_runs), 7, 8]), videos("3x6x10")
    (tokens,) = vlm.adapter.encode(vlm.adapter.read_inputs(**inputs), vlm.compressor)
    assert (tokens.place_index // 15).bincount().tolist() == [7, 7, 7]
    kept = (ids["input_ids"][0] != VIDEO).int()
    kept[(ids["input_ids"][0] == VIDEO).nonzero()[:, 0][tokens.place_index]] = 1
    arguments = stock(model, ids, **inputs)
    positions = model.model.get_rope_index(
        ids["input_ids"], arguments["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )[0]
    theirs = model(**{**arguments, "attention_mask": kept[None]}, position_ids=positions).logits[:, kept.bool()]
    torch.testing.assert_close(vlm.forward(**ids, **inputs).logits, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["dominant_only", "cdpruner"])
@torch.no_grad()
def test_repacked_each_step_has_its_own_tokens_and_planes(family, name):
    """The unmodified model with what is dropped masked, and positions counted over what is left."""
    model, in_runs = family
    vlm = vzip.CompressedVlm(model, methods.build(name, BUDGET), methods.Words(), positions="repacked")
    kept_places = vzip.CompressedVlm(model, vlm.compressor, methods.Words())
    rows, shown, clips = mixed(in_runs)
    ids, inputs, asked = batch(*rows), {**shown, **clips}, list(methods.QUESTIONS[:2])
    of_visuals = [asked[0], asked[1], asked[0], asked[1], asked[1]]
    visual = kept_places.asked(kept_places.adapter.read_inputs(**inputs), of_visuals)
    tokens = kept_places.adapter.encode(visual, vlm.compressor)
    kept = ids["attention_mask"].clone()
    for row, token, own in ((0, VIDEO, [2]), (0, tiny_qwen.IMAGE, [0]), (1, tiny_qwen.IMAGE, [1]), (1, VIDEO, [3, 4])):
        written, first = (ids["input_ids"][row] == token).nonzero()[:, 0], 0
        kept[row, written] = 0
        for number in own:
            kept[row, written[first + tokens[number].place_index]] = 1
            first += visual.shapes[number].num_vanilla
    counted = ((kept.cumsum(dim=1) - 1) * kept).expand(3, -1, -1)
    arguments = {**stock(model, ids, **inputs), "attention_mask": kept, "position_ids": counted}
    theirs = model(**arguments).logits
    ours = vlm.forward(**ids, **inputs, questions=asked).logits
    for row in range(2):
        expected = theirs[row, kept[row].bool()]
        torch.testing.assert_close(ours[row, -len(expected) :], expected, rtol=0, atol=1e-3)
    answers = vlm.generate(**ids, **inputs, questions=asked, max_new_tokens=1, do_sample=False)
    assert answers[:, 0].tolist() == theirs[:, -1].argmax(dim=-1).tolist()
    vlm.compressor = vzip.Identity()
    everything = vlm.prepare(**ids, **inputs)
    assert everything.position_ids.shape[2] == ids["input_ids"].shape[1]


@torch.no_grad()
def test_scores_are_of_each_step_alone(family):
    model, in_runs = family
    inputs, vlm = videos("3x8x8"), vzip.CompressedVlm(model, vzip.Identity())
    reads = frozenset({Signal("attention")})
    ((members, vision),) = vlm.adapter.video_outputs(vlm.adapter.read_inputs(**inputs), reads)
    assert members == [0] and vision.attention.shape == (3, 16)
    maps = recorded_maps(model.model.visual, inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    received = torch.stack([weights.mean(dim=(0, 1, 2)) for weights in maps[-3:]])  # the last block: a map a step
    units = received.view(3, 16, 4).mean(dim=2)
    if not in_runs:  # in windows of 2 x 2 units
        units = units.view(3, 2, 2, 2, 2).transpose(2, 3).reshape(3, 16)
    torch.testing.assert_close(vision.attention.double(), units, rtol=0, atol=1e-6)


REFUSED = [
    ({"video_grid_thw": None}, "video_grid_thw is missing: .* the patches of all videos"),
    ({"video_grid_thw": torch.tensor([[0, 6, 10]])}, r"\(0, 6, 10\): a video has 1 temporal step or more"),
    ({"video_grid_thw": torch.tensor([[4, 6, 10]])}, "pixel_values_videos has shape .*counts 240 patches"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_wrong_inputs_are_refused(family, change, message):
    model, in_runs = family
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    with pytest.raises(PromptError, match=message):
        vlm.prepare(**batch([5, *video("3x6x10", in_runs), 7]), **{**videos("3x6x10"), **change})


def test_runs_that_do_not_fit_are_refused(family):
    model, in_runs = family
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    if not in_runs:
        with pytest.raises(PromptError, match=r"second_per_grid_ts has shape \(2,\)"):
            vlm.prepare(torch.tensor([[5]]), second_per_grid_ts=torch.ones(2), **videos("3x6x10"))
        return
    with pytest.raises(PromptError, match=r"1 <temporal step> placeholders .* 3 temporal steps were given"):
        vlm.prepare(torch.tensor([[5, tiny_qwen.START, VIDEO, tiny_qwen.END, 7]]), **videos("3x6x10"))
    with pytest.raises(PromptError, match="Video 0 begins in prompt 0 and goes on in prompt 1"):
        vlm.prepare(**batch([5, *video("2x6x10", True), 7], [5, *video("1x6x10", True), 7]), **videos("3x6x10"))
    with pytest.raises(PromptError, match="second_per_grid_ts: no input of Qwen3VL"):
        vlm.prepare(torch.tensor([[5]]), second_per_grid_ts=torch.ones(1), **videos("3x6x10"))
