"""``budget.scope=video``: one budget for all temporal steps (frames) of a video."""

from __future__ import annotations

import pytest
import torch
from tests import methods, tiny, tiny_qwen, tiny_qwen3
from tests.tiny_qwen import batch, images, prompt, video, videos

import vzip
from vzip.compressors import FractionBudget, Signal
from vzip.compressors.vision import VisionOutput, of_tower
from vzip.errors import ConfigError

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3, scope="video")
FAMILIES = {"qwen2_5_vl": tiny_qwen, "qwen3_vl": tiny_qwen3}
GRIDS = ("3x6x10", "2x4x8")


# A scorer, some that merge, one of a whole image, one that projects by itself, a text-aware one, one with its own view.
SERVED = ["fastervlm", "visionzip", "merge_dropped", "prumerge", "divprune", "zooprune", "cdpruner", "zero_image"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param].build(), request.param == "qwen3_vl"


def mixed(in_runs):
    rows = [[5, *video("3x6x10", in_runs), 7, *prompt("4x8"), 8], [9, *video("2x4x8", in_runs), 3]]
    return batch(*rows), {**images("4x8"), **videos(*GRIDS)}


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_the_tokens_are_those_of_all_units_in_a_row(family, name):
    """The method on the steps' rows laid side by side, which is all the scope is meant to be."""
    model, in_runs = family
    method = methods.build(name, BUDGET)
    vlm = vzip.CompressedVlm(model, method, methods.Words())
    ids, inputs = mixed(in_runs)
    asked = list(methods.QUESTIONS[:2])
    prepared = vlm.prepare(**ids, **inputs, questions=asked)
    assert prepared.num_visual_tokens == vlm.expected_num_visual_tokens(**inputs) == [8, 9, 9]
    counts = prepared.visual_index[prepared.visual_index >= 0].bincount().tolist()
    assert counts == [8, 9, 9]

    visual = vlm.asked(vlm.adapter.read_inputs(**inputs), [asked[0], asked[0], asked[1]])
    tokens = vlm.adapter.encode(visual, method)[1:]
    reads = of_tower(method.reads())
    shown = vlm.adapter.viewed(visual, method)
    for number, (_, vision) in enumerate(vlm.adapter.video_outputs(shown, reads)):
        row = {signal: vision.read(signal).flatten(0, 1)[None] for signal in reads}
        own = VisionOutput(vision.hidden.flatten(0, 1)[None], False, (1, vision.hidden.shape[:2].numel()), signals=row)
        own = vlm.adapter.beside(own, method, visual.texts[1 + number : 2 + number], [1])
        selection = method.select(own)
        places, order = selection.place_index[0].sort(stable=True)
        assert torch.equal(tokens[number].place_index, places)
        torch.testing.assert_close(tokens[number].rows, method.combine(own.hidden, selection)[0, order])
        if in_runs:
            planes = method.combine(vision.planes.flatten(0, 1)[None], selection)[0, order]
            torch.testing.assert_close(tokens[number].planes, planes)


@torch.no_grad()
def test_the_best_of_all_steps_are_kept_at_their_own_positions_and_empty_steps_keep_their_times(family):
    model, in_runs = family
    vlm = vzip.CompressedVlm(model, methods.build("dominant_only", vzip.TokenBudget(2, 1, scope="video")))
    ids, inputs = batch([5, *video("3x6x10", in_runs), 7, 8]), videos("3x6x10")
    prepared = vlm.prepare(**ids, **inputs)
    vision = vlm.adapter.video_outputs(vlm.adapter.read_inputs(**inputs), frozenset({Signal("attention")}))[0][1]
    scores = [(score, number) for number, score in enumerate(vision.attention.flatten().tolist())]
    best = sorted(number for _, number in sorted(scores, key=lambda one: (-one[0], one[1]))[:3])
    kept = [i for i, token in enumerate(ids["input_ids"][0].tolist()) if token != tiny_qwen.VIDEO]
    columns = (ids["input_ids"][0] == tiny_qwen.VIDEO).nonzero()[:, 0]
    kept = sorted([*kept, *columns[best].tolist()])
    arguments = tiny_qwen.stock(model, ids, **inputs)
    expected = model.model.get_rope_index(
        ids["input_ids"], arguments["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )[0][:, 0, kept]
    assert torch.equal(prepared.position_ids[:, 0], expected)
    if in_runs:  # at most three steps' worth of text, whatever is kept of each
        assert len({number // 15 for number in best}) <= 3
        assert prepared.text_ids.tolist() == [i for i in ids["input_ids"][0].tolist() if i != tiny_qwen.VIDEO]
    masked = torch.zeros_like(ids["input_ids"])
    masked[0, kept] = 1
    positions = model.model.get_rope_index(
        ids["input_ids"], arguments["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )[0]
    theirs = model(**{**arguments, "attention_mask": masked}, position_ids=positions).logits[:, kept]
    torch.testing.assert_close(vlm.forward(**ids, **inputs).logits, theirs, rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_step_without_tokens(family):
    """One token of three steps: the other two are text alone, and a batch still equals singles."""
    model, in_runs = family
    vlm = vzip.CompressedVlm(model, methods.build("random", vzip.TokenBudget(1, 0, scope="video")))
    rows = [[5, *video("3x6x10", in_runs), 7], [9, 4, *video("2x4x8", in_runs), 3]]
    inputs = videos(*GRIDS)
    together = vlm.forward(**batch(*rows), **inputs).logits
    assert vlm.last_num_visual_tokens == [1, 1]
    first = {"pixel_values_videos": inputs["pixel_values_videos"][:180], "video_grid_thw": inputs["video_grid_thw"][:1]}
    alone = vlm.forward(**batch(rows[0]), **first).logits
    assert alone.shape[1] == sum(i != tiny_qwen.VIDEO for i in rows[0]) + 1
    torch.testing.assert_close(together[0, -alone.shape[1] :], alone[0], rtol=0, atol=1e-3)


@torch.no_grad()
def test_fractions_are_of_the_whole_video(family):
    model, in_runs = family
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(FractionBudget(0.5, 0.1, scope="video")))
    ids, inputs = mixed(in_runs)
    assert vlm.prepare(**ids, **inputs).num_visual_tokens == [4 + 1, 22 + 4, 8 + 1]


@pytest.mark.parametrize("name", ["visionzip", "divprune", "zooprune"])
@torch.no_grad()
def test_frames_of_video_llava_share_a_budget_with_their_cls_tokens(name):
    model = tiny.video_llava()
    vlm = vzip.CompressedVlm(model, methods.build(name, vzip.TokenBudget(4, 2, scope="video")))
    pixels = torch.randn(2, 3, 3, *[vlm.adapter.image_side] * 2, generator=torch.Generator().manual_seed(0))
    tokens = vlm.encode_videos(pixels)
    assert [len(rows) for rows in tokens] == [6, 6]
    (alone,) = vlm.encode_videos(pixels[1:])
    torch.testing.assert_close(tokens[1], alone)
    if name == "visionzip":
        vision = vlm.adapter.video_output(
            vlm.adapter.read_inputs(pixel_values_videos=pixels[1:]), vlm.compressor.reads()
        )
        row = {signal: vision.read(signal).flatten(0, 1)[None] for signal in vlm.compressor.reads()}
        own = VisionOutput(vision.hidden.flatten(0, 1)[None], False, (1, vision.hidden.shape[:2].numel()), signals=row)
        expected = vlm.adapter.projector(vlm.compressor.combine(own.hidden, vlm.compressor.select(own)))[0]
        torch.testing.assert_close(alone, expected)


REFUSED = [("pooled", "rows and columns"), ("vscan", "rows and columns"), ("flowcut", "sees each frame by itself")]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_methods_that_need_each_frame_by_itself_are_refused(name, message):
    with pytest.raises(ConfigError, match=f"budget.scope=video.*{message}"):
        vzip.CompressedVlm(tiny.video_llava(), methods.build(name, BUDGET))


def test_a_model_without_videos_and_an_unknown_scope_are_refused():
    with pytest.raises(ConfigError, match=r"budget.scope=video.*takes images only.*Set budget.scope=crop"):
        vzip.load_vlm("vzip/tiny", compressor=vzip.VisionZip(BUDGET))
    with pytest.raises(ConfigError, match=r"budget.scope='vidoe': must be one of crop, video.*video"):
        vzip.TokenBudget(6, 3, scope="vidoe")
    assert repr(vzip.TokenBudget(6, 3)) == "TokenBudget(num_dominant=6, num_contextual=3)"
    assert repr(BUDGET) == "TokenBudget(num_dominant=6, num_contextual=3, scope='video')"
