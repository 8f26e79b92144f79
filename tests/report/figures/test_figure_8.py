"""Figure 8 on a small random model: answers are generate's own, costs those of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scripts.make_random_model import build

import vzip
from vzip.cli.video_figure import frames_at_equal_cost, prompt_inputs, scene_videos
from vzip.media.video import sample_indices
from vzip.report.figures.figure_8 import Arm, Asked, Clip, Cost, ask, draw, is_right, measure, share_right

FRAMES = [Image.new("RGB", (64, 48), (20 * n, 0, 0)) for n in range(12)]


def clip() -> Clip:
    def inputs(vlm: vzip.CompressedVlm, num_frames: int) -> dict[str, Any]:
        vlm.num_frames = num_frames
        return prompt_inputs(vlm, "what?", [{"type": "video"}], videos=[[FRAMES]])

    def frames(index: Sequence[int]) -> list[Image.Image]:
        return [FRAMES[n] for n in index]

    return Clip("clip", inputs, 12, lambda number: sample_indices(12, number), frames, "what?", None)


def test_answers_and_costs_are_of_as_many_frames() -> None:
    model, processor = build("video_llava")
    vlm = vzip.CompressedVlm(model, vzip.Identity(), processor)
    method = vzip.VisionZip(vzip.TokenBudget(14, 3))
    per_frame = vlm.adapter.read_inputs(**vlm.adapter.blank_videos(1, 1)).videos[0].num_vanilla
    many = frames_at_equal_cost(vlm, method, 2)
    assert many == 2 * per_frame // 17
    arms = [Arm("vanilla", vlm.compressor, 2), Arm("VisionZip", method, 6)]
    for arm, num_tokens in zip(arms, (2 * per_frame, 6 * 17), strict=True):
        told = ask(vlm, arm, clip(), 3)
        assert (told.num_visual_tokens, told.num_frames, told.video) == (num_tokens, arm.num_frames, "clip")
        vlm.compressor, vlm.num_frames = arm.compressor, arm.num_frames
        inputs = prompt_inputs(vlm, "what?", [{"type": "video"}], videos=[[FRAMES]])
        new = vlm.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert told.answer == processor.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        cost = measure(vlm, arm, clip(), 1)
        text = model.config.get_text_config()
        num_text = int((inputs["input_ids"] != model.config.video_token_id).sum())
        heads, width = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
        expected = 2 * text.num_hidden_layers * heads * width * 4 * (num_tokens + num_text)
        assert cost.kv_cache_bytes == expected and cost.num_visual_tokens == num_tokens and cost.first_token_ms > 0


def test_the_drawing_has_a_row_an_arm_and_what_it_costs() -> None:
    arms = [Arm("vanilla", vzip.Identity(), 1), Arm("VisionZip", vzip.Identity(), 6)]
    asked = [
        Asked(arm.name, arm.num_frames, video, "what?", "air", said, tokens)
        for video, answers in (("x", ("tea", "Air.")), ("y", ("$a$", "moon")))
        for arm, said, tokens in zip(arms, answers, (576, 384), strict=True)
    ]
    costs = [Cost(576, 4 * 2**20, 20.0), Cost(384, 3 * 2**20, 30.0)]
    drawing = draw(arms, clip(), asked, costs, "m", "two videos")
    first, second, tokens, cache, latency, right = drawing.figure.axes
    assert first.get_title(loc="left") == "vanilla, 1 frame x 576 = 576 tokens: tea (wrong)"
    assert second.get_title(loc="left") == "VisionZip, 6 frames x 64 = 384 tokens: Air. (right)"
    assert [len(axes.images) for axes in (first, second)] == [1, 6]
    reds = [int(np.asarray(image.get_array())[0, 0, 0]) for image in second.images]
    assert reds == [20 * n for n in sample_indices(12, 6)], "in their order"
    lefts = [image.get_extent()[0] for image in second.images]
    assert all(b - a >= 1 / 9 - 1e-9 for a, b in pairwise(lefts)), "none over another"
    heights = [[patch.get_height() for patch in axes.patches] for axes in (tokens, cache, latency, right)]
    assert heights == [[576, 384], [4, 3], [20, 30], [0, 50]]
    assert "VisionZip, 6 frames: 384 visual tokens, 3.00 MiB, 30 ms; right 50.0 %" in drawing.caption
    assert [is_right(one) for one in asked] == [False, True, False, False]
    assert share_right(asked, "vanilla") == (0, 0, 0)
    assert drawing.rows[1]["kv_cache_bytes"] == 3 * 2**20


def test_a_built_in_video_shows_its_sign_in_the_last_third_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vzip.demo import render as module

    rendered: dict[int, Any] = {}
    real = module.render

    def render(scene: Any) -> Image.Image:
        image = real(scene)
        rendered[id(image)] = scene
        return image

    monkeypatch.setattr(module, "render", render)
    first, second = scene_videos(2)
    scenes = [rendered[id(frame)] for frame in first.frames(range(9))]
    assert [scene.sign is not None for scene in scenes] == [False] * 6 + [True] * 3
    assert scenes[-1].sign.text.lower() == first.answer and first.question.startswith("What")
    assert len({scene.seed for scene in scenes}) == 3 and scenes[0].seed != rendered[id(second.frames([0])[0])].seed
    assert list(first.sample(1)) == [0] and list(first.sample(3)) == [0, 4, 8]
