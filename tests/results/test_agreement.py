"""Answers beside vanilla's, and questions split by what a control gets wrong; hand-known shares."""

from __future__ import annotations

from typing import Any

import pytest
from tests.records import samples

from vzip.errors import ManifestError
from vzip.results.agreement import agreement, by_difficulty


def test_the_share_of_vanillas_answers_with_its_interval() -> None:
    ours, vanilla = samples([1, 1, 0, 0]), samples([1, 1, 1, 1])
    share = agreement(ours, vanilla[::-1], "gqa")
    assert share.point == 0.5 and share.low is not None and share.high is not None
    assert 0 <= share.low < 0.5 < share.high <= 1
    assert (one := agreement(vanilla, vanilla, "gqa")).point == one.low == one.high == 1
    with pytest.raises(ManifestError, match="questions stand in one run only"):
        agreement(ours, vanilla[:3], "gqa")


def test_questions_about_one_image_are_drawn_together() -> None:
    def of(scores: list[float]) -> list[dict[str, Any]]:
        return [row | {"cluster": row["doc_id"] // 10} for row in samples(scores)]

    ours, vanilla = [1.0] * 20 + [0.0] * 20, [1.0] * 40
    apart, together = agreement(samples(ours), samples(vanilla), "gqa"), agreement(of(ours), of(vanilla), "gqa")
    assert apart.point == together.point == 0.5
    assert apart.low is not None and together.low is not None and together.low < apart.low
    one_image = [row | {"cluster": 7} for row in samples(ours)]
    assert agreement(one_image, [row | {"cluster": 7} for row in samples(vanilla)], "gqa").low is None


def test_hard_are_the_questions_that_the_control_answers_wrongly() -> None:
    ours, control = samples([1, 1, 0, 0, 1]), samples([0, 0, 0, 1, 1])
    groups = by_difficulty(ours, control, "gqa", "exact_match")
    assert groups is not None
    hard, easy = groups
    assert (hard.num_questions, easy.num_questions) == (3, 2)
    assert hard.right is not None and hard.right.point == pytest.approx(2 / 3)
    assert easy.right is not None and easy.right.point == 0.5
    nothing_hard = by_difficulty(ours, samples([1] * 5), "gqa", "exact_match")
    assert nothing_hard is not None and nothing_hard[0].num_questions == 0 and nothing_hard[0].right is None
    assert by_difficulty(samples([0.3, 1]), samples([1, 0]), "gqa", "exact_match") is None, "neither right nor wrong"
