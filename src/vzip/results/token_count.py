"""No silent vanilla: what reached the language model is measured and held against the budget."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from vzip.compressors import Compressor, TokenBudget
    from vzip.models.vlm import CompressedVlm


class TokenCountError(RuntimeError):
    """A picture entered the language model with another number of visual tokens than it should have."""


def budget_of(compressor: Compressor) -> TokenBudget | None:
    """The compressor's ``budget`` field, or None for a method without one (no compression)."""
    from vzip.compressors import TokenBudget

    if not dataclasses.is_dataclass(compressor):
        return None
    values = [getattr(compressor, field.name) for field in dataclasses.fields(compressor)]
    budgets = [value for value in values if isinstance(value, TokenBudget)]
    return budgets[0] if budgets else None


def crops_per_image(pixel_values: Tensor) -> list[int]:
    """Crops each picture really has: 1 for ``[images, 3, h, w]``, else those that are not zero padding."""
    if pixel_values.dim() == 4:
        return [1] * pixel_values.shape[0]
    return pixel_values.flatten(2).ne(0).any(dim=2).sum(dim=1).tolist()


def expected_token_counts(
    vlm: CompressedVlm, pixel_values: Tensor, image_sizes: Tensor | None = None, tile_grids: Tensor | None = None
) -> list[int]:
    """Visual tokens that each picture must have, by the compressor's budget and the packing; nothing is encoded.

    Without compression as many as the unmodified model gives it (several crops: unpadding and newlines included); with
    a budget, its tokens for each crop and the newline tokens of the packing.
    """
    budget = budget_of(vlm.compressor)
    num_crops = crops_per_image(pixel_values)
    if budget is None:
        return vlm.adapter.expanded_lengths(len(num_crops), image_sizes, tile_grids)
    expected = [budget.num_tokens * crops for crops in num_crops]
    if pixel_values.dim() == 4:
        return expected
    added = vlm.adapter.num_added_tokens(num_crops, image_sizes, tile_grids)  # families with tiles may add newlines
    return [count + more for count, more in zip(expected, added, strict=True)]


def expected_video_counts(vlm: CompressedVlm, pixel_values_videos: Tensor) -> list[int]:
    """Visual tokens that each video must have: the budget's for each frame, or the unmodified model's."""
    budget = budget_of(vlm.compressor)
    if budget is None:
        return vlm.adapter.video_lengths(pixel_values_videos)
    num_videos, num_frames = pixel_values_videos.shape[:2]
    return [budget.num_tokens * num_frames] * num_videos


def check_token_counts(
    vlm: CompressedVlm,
    pixel_values: Tensor | None,
    num_images: list[int],
    image_sizes: Tensor | None = None,
    tile_grids: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    num_videos: list[int] | None = None,
) -> list[list[int]]:
    """The measured visual tokens, one list a question: a number a picture, then a number a video.

    Args:
        vlm: the wrapper that has just generated.
        pixel_values: what it was given; None for questions without a picture.
        num_images: pictures a question, in order.
        image_sizes, tile_grids: what else it was given, where the family needs it.
        pixel_values_videos, num_videos: the same for videos; None for questions without a video.

    Raises:
        TokenCountError: the counts are not those of the compressor's budget.
    """
    measured = list(vlm.last_num_visual_tokens)
    num_videos = [0] * len(num_images) if num_videos is None else num_videos
    if len(measured) != sum(num_images) + sum(num_videos):
        raise TokenCountError(
            f"{sum(num_images)} pictures and {sum(num_videos)} videos were asked about, {len(measured)} entered the"
            f" language model: {measured}"
        )
    expected: list[int] = []
    if pixel_values is not None:
        expected += expected_token_counts(vlm, pixel_values, image_sizes, tile_grids)
    if pixel_values_videos is not None:
        expected += expected_video_counts(vlm, pixel_values_videos)
    if measured != expected:
        raise TokenCountError(
            f"{type(vlm.compressor).__name__} should pass {expected} visual tokens to the language model, one number a"
            f" picture or video; measured {measured}. The answers are not those of this budget: the run ends."
        )
    of_images, of_videos = iter(measured[: sum(num_images)]), iter(measured[sum(num_images) :])
    return [
        [*islice(of_images, pictures), *islice(of_videos, videos)]
        for pictures, videos in zip(num_images, num_videos, strict=True)
    ]
