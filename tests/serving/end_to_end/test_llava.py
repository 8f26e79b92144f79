"""The built-in model in vLLM at 64 tokens: every answer is ``CompressedVlm``'s, in float32."""

from __future__ import annotations

import pytest
from tests.serving.end_to_end import engines
from tests.serving.end_to_end.engines import Asked, ask, check, scene_questions

from vzip.errors import ConfigError

pytestmark = pytest.mark.serve


def test_20_of_20_answers_in_a_batch(tiny_engine, tiny_vlm):
    outputs = check(tiny_engine, tiny_vlm, scene_questions(20))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 5, "the answers depend on the images"


def test_one_by_one(tiny_engine, tiny_vlm):
    for asked in scene_questions(3, first=20):
        check(tiny_engine, tiny_vlm, [asked])


def test_two_images_in_a_prompt_and_none(tiny_engine, tiny_vlm):
    questions = scene_questions(4, first=30)
    pairs = [Asked([*a.images, *b.images], b.text) for a, b in zip(questions[::2], questions[1::2], strict=True)]
    check(tiny_engine, tiny_vlm, [*pairs, questions[0]])
    assert ask(tiny_engine, [Asked([], "What is a circle?")])[0].outputs[0].token_ids


def test_the_prefix_cache_knows_images_and_budgets_apart(tiny_engine, tiny_vlm):
    first, second = (Asked(each.images, "What is written on the sign?") for each in scene_questions(2, first=40))
    tiny_engine.reset_prefix_cache()
    once, again, other = (check(tiny_engine, tiny_vlm, [each])[0] for each in (first, first, second))
    assert once.num_cached_tokens == 0
    assert again.num_cached_tokens >= 64, "the image's tokens come from the cache"
    assert other.num_cached_tokens < 32, "of another image nothing but the text before it"
    fewer = Asked(first.images, first.text, {"num_dominant": 50, "num_contextual": 14})
    assert check(tiny_engine, tiny_vlm, [fewer])[0].num_cached_tokens < 32


def test_four_budgets_in_a_batch_of_one_image(tiny_engine, tiny_vlm):
    (asked,) = scene_questions(1, first=50)
    budgets = [{"num_dominant": d, "num_contextual": c} for d, c in ((54, 10), (27, 5), (14, 2), (8, 0))]
    batch = [Asked(asked.images, asked.text, budget) for budget in budgets]
    for _ in range(2):  # the second time with caches that hold them all
        outputs = check(tiny_engine, tiny_vlm, [*batch, asked])
        lengths = [len(output.prompt_token_ids) for output in outputs]
        assert [length - lengths[3] for length in lengths] == [56, 24, 8, 0, 56]


@pytest.mark.parametrize(
    ("budget", "message"),
    [({"num_dominant": 65}, "this server keeps 64 at most"), ({"tokens": 8}, "must be counts")],
)
def test_a_wrong_budget_of_a_request_is_refused_and_others_go_on(tiny_engine, tiny_vlm, budget, message):
    (asked,) = scene_questions(1, first=51)
    with pytest.raises(ConfigError, match=message):
        ask(tiny_engine, [Asked(asked.images, asked.text, budget)])
    check(tiny_engine, tiny_vlm, [asked])


def test_chunked_prefill_that_cuts_an_image_in_the_middle(tiny_path, tiny_vlm):
    """Forty tokens a step: an image's 64 are never read in one."""
    engine = engines.start(tiny_path, max_num_batched_tokens=40, enable_prefix_caching=False, max_num_seqs=4)
    questions = scene_questions(8, first=60)
    pairs = [Asked([*questions[0].images, *questions[1].images], questions[1].text)]
    check(engine, tiny_vlm, [*questions, *pairs])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": {"num_dominant": 600}}, "600 visual tokens per crop: the vision tower has 577 to choose from"),
        ({"compressor": "mmtok"}, "mmtok is text-aware.*python -m vzip embed"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_at_start_up(tiny_path, values, message):
    with pytest.raises(ConfigError, match=message):
        engines.start(tiny_path, **values)
