"""Generation settings and the parts of the adapter that need no model."""

from __future__ import annotations

import pytest
from PIL import Image

from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.evaluation.answering.generation import cut_at, settings_for
from vzip.evaluation.answering.messages import read_messages


def kwargs_of(of_task, overrides=None):
    return dict(settings_for("t", of_task, overrides or {}).kwargs)


@pytest.mark.parametrize(
    ("of_task", "expected"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 128}),
        ({"temperature": 0, "do_sample": True, "top_p": 1.0}, {"do_sample": False, "max_new_tokens": 128}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7, "max_new_tokens": 128}),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False, "max_new_tokens": 128}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "top_k": 5, "max_new_tokens": 128}),
        ({"max_gen_toks": 7, "image_aspect_ratio": "original"}, {"do_sample": False, "max_new_tokens": 7}),
        ({"max_new_tokens": None, "num_beams": 3}, {"do_sample": False, "max_new_tokens": 128, "num_beams": 3}),
    ],
)
def test_settings(of_task, expected):
    assert kwargs_of(of_task) == expected


def test_overrides_win_and_can_turn_sampling_on():
    assert kwargs_of({"temperature": 0}, {"temperature": 0.5}) == {
        "do_sample": True,
        "temperature": 0.5,
        "max_new_tokens": 128,
    }


def test_an_unknown_setting_of_a_task_is_an_error():
    with pytest.raises(ConfigError, match=r"task t: generation_kwargs.num_beam=2 .*did you mean 'num_beams'"):
        settings_for("t", {"num_beam": 2}, {})


@pytest.mark.parametrize(
    ("until", "text", "cut"),
    [
        (["."], "yes. no", "yes"),
        (["x", "s."], "yes. no", "ye"),
        ("\n\n", " a\nb\n\nc", "a\nb"),
        ([], " a ", "a"),
        (["", "q"], "abc", "abc"),
        (["a"], "abc", ""),
    ],
)
def test_until(until, text, cut):
    assert cut_at(text, settings_for("t", {"until": until}, {}).until) == cut


def test_images_keep_their_order():
    first, second = Image.new("RGB", (1, 1)), Image.new("RGB", (2, 2))
    content = [
        {"type": "image", "url": first},
        {"type": "text", "text": "and"},
        {"type": "image", "url": second},
    ]
    images, videos, turns = read_messages([{"role": "user", "content": content}], "t", 0, {"image": "<image>"})
    assert images == [first, second] and videos == []
    assert [part["type"] for part in turns[0]["content"]] == ["image", "text", "image"]


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ({"type": "video", "url": "a.mp4"}, UnsupportedModelError, "task t, question 3: holds video"),
        ({"type": "image", "url": 5}, PromptError, "returned a int"),
        ({"type": "text", "text": "an <image>"}, PromptError, "contains '<image>'"),
    ],
)
def test_what_cannot_be_asked(part, error, message):
    with pytest.raises(error, match=message):
        read_messages([{"role": "user", "content": [part]}], "t", 3, {"image": "<image>"})


def test_videos_where_the_model_takes_them():
    content = [{"type": "video", "url": "b.mp4"}, {"type": "text", "text": "and"}, {"type": "video", "url": "a.mp4"}]
    placeholders = {"image": "<image>", "video": "<video>"}
    images, videos, turns = read_messages([{"role": "user", "content": content}], "t", 0, placeholders)
    assert images == [] and videos == ["b.mp4", "a.mp4"]
    assert [part["type"] for part in turns[0]["content"]] == ["video", "text", "video"]
    with pytest.raises(PromptError, match="contains '<video>', which marks where a video goes"):
        read_messages([{"role": "user", "content": [{"type": "text", "text": "<video>"}]}], "t", 3, placeholders)
    clip = {"url": "a.mp4", "video_start": 1}
    with pytest.raises(PromptError, match=r"returned a video as dict.*cut it out beforehand"):
        read_messages([{"role": "user", "content": [{"type": "video", "url": clip}]}], "t", 3, placeholders)
    with pytest.raises(UnsupportedModelError, match="holds audio; with this model vzip evaluates text, images and"):
        read_messages([{"role": "user", "content": [{"type": "audio", "url": "a"}]}], "t", 3, placeholders)
