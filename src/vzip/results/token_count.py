"""No silent vanilla: what reached the language model is measured and held against the budget."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vzip.models.vlm import CompressedVlm


class TokenCountError(RuntimeError):
    """An image entered the language model with another number of visual tokens than it should have."""


def check_token_counts(
    vlm: CompressedVlm, inputs: Mapping[str, Any], num_images: list[int], num_videos: list[int]
) -> list[list[int]]:
    """The measured visual tokens, one list a question: a number an image, then a number a video.

    Args:
        vlm: the wrapper that has just generated.
        inputs: what it was given.
        num_images, num_videos: how many each question has, in order.

    Raises:
        TokenCountError: the counts are not those of the compressor's budget.
    """
    measured = list(vlm.last_num_visual_tokens)
    if len(measured) != sum(num_images) + sum(num_videos):
        raise TokenCountError(
            f"{sum(num_images)} images and {sum(num_videos)} videos were asked about, {len(measured)} entered the"
            f" language model: {measured}"
        )
    expected = vlm.expected_num_visual_tokens(**inputs)
    if measured != expected:
        raise TokenCountError(
            f"{type(vlm.compressor).__name__} should pass {expected} visual tokens to the language model, one number an"
            f" image or video; measured {measured}. The answers are not those of this budget: the run ends."
        )
    of_images, of_videos = iter(measured[: sum(num_images)]), iter(measured[sum(num_images) :])
    return [
        [*islice(of_images, images), *islice(of_videos, videos)]
        for images, videos in zip(num_images, num_videos, strict=True)
    ]
