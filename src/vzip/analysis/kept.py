"""What a wrapper's compressor keeps of an image or a video, drawn over it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.base import CompressedTokens
from vzip.media.video import VideoSource
from vzip.models.families.base import VisualInputs
from vzip.models.vlm import CompressedVlm

from .kept_patches import Watched, patches_of_units
from .overlay import Crop, Sheet, Words, as_image, draw_overlay


def draw_kept(
    vlm: CompressedVlm,
    image: Image.Image | VideoSource | Mapping[str, Tensor],
    question: str | None = None,
    *,
    title: str | None = None,
    answer: str = "",
) -> Image.Image:
    """The image or video as the vision tower sees it, with what is kept of it and what merges (``draw_overlay``).

    Args:
        vlm: the wrapper.
        image: an image, or a video: a file, or its frames; or what ``preprocess_images`` (``_videos``) made of one.
        question: about it, for a text-aware method; written above.
        title: written above; None: the method's name.
        answer: likewise.

    Raises:
        ConfigError: the wrapper has no processor.
        PromptError: a text-aware method without a question.
        ImageError: an image that cannot be used; VideoError: a video.
    """
    sheets, tokens = kept_sheets(vlm, image, question)
    notes = []
    if vlm.pruner is not None:
        notes.append(f"{type(vlm.pruner).__name__} drops more inside the language model, which is not drawn.")
    words = Words(title or type(vlm.compressor).__name__, tokens, question or "", answer, notes)
    return as_image(draw_overlay(sheets, words))


@torch.inference_mode()
def kept_sheets(
    vlm: CompressedVlm, image: Image.Image | VideoSource | Mapping[str, Tensor], question: str | None = None
) -> tuple[list[Sheet], str]:
    """What to draw, and the tokens in words; see ``draw_kept``."""
    adapter, watched = vlm.adapter, Watched(vlm.compressor)
    if isinstance(image, Mapping):
        inputs = dict(image)
    else:
        inputs = vlm.preprocess_images([image]) if isinstance(image, Image.Image) else vlm.preprocess_videos([image])
    moved = {
        name: value.to(vlm.device, vlm.model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    visual = vlm.asked(adapter.read_inputs(**moved), None if question is None else [question])
    (shape,) = visual.shapes
    adapter.encode(visual, watched)
    (vision, made) = watched.kept[0]
    places = patches_of_units(vision, vlm.compressor, shape, adapter.whole_index(shape)).cpu().numpy()
    kept, group, targets = _marked(made, places, shape.num_crops, shape.num_patches)
    seen = adapter.shown(adapter.viewed(visual, vlm.compressor))
    processor = vlm.processor.image_processor  # type: ignore[union-attr]
    crops = [
        Crop(seen_image(pixels, processor, shape.grid), own.reshape(shape.grid), of.reshape(shape.grid), to)
        for pixels, own, of, to in zip(seen, kept, group, targets, strict=True)
    ]
    return _laid_out(crops, visual, vlm), _in_words(vlm, made, visual)


def kept_crop(vlm: CompressedVlm, image: Image.Image, question: str | None = None) -> Crop:
    """Of an image the crop that shows the whole of it, as numbers to draw anywhere; raises as ``draw_kept``."""
    return kept_sheets(vlm, image, question)[0][0].crops[0]


def _marked(
    made: CompressedTokens, places: np.ndarray, num_crops: int, num_patches: int
) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Of each crop which patches are kept, with which group each merges, and the groups' targets.

    Args:
        made: for each crop, or for the whole.
        places: ``[N, U]``, the patch that each unit is, crops counted through; -1: none.
        num_crops, num_patches: of the image.
    """
    kept = np.zeros(num_crops * num_patches, bool)
    group = np.full(num_crops * num_patches, -1)
    target_of: list[int] = []
    num_kept = made.source_index.shape[1]
    num_contextual = made.num_tokens - num_kept
    source, merged = made.source_index.cpu().numpy(), made.merge_index.cpu().numpy()
    of_tokens = None if made.place_index is None else made.place_index.cpu().numpy()
    for row, patch in enumerate(places):
        own = patch[source[row]]
        kept[own[own >= 0]] = True
        for slot in np.unique(merged[row][merged[row] >= 0]):
            members = patch[merged[row] == slot]
            token = num_kept + slot if num_contextual else slot
            target = -1 if of_tokens is None else int(patch[of_tokens[row, token]])
            members = members[members >= 0]
            group[members] = len(target_of)
            if target >= 0:
                group[target] = len(target_of)
            target_of.append(target)
    # Groups are numbered anew in each crop; one of a whole image may lie in several crops, its target in one.
    groups, targets = group.reshape(num_crops, num_patches), []
    for crop, own in enumerate(groups):
        numbers = np.unique(own[own >= 0])
        found = [target_of[number] for number in numbers]
        inside = [t // num_patches == crop if t >= 0 else False for t in found]
        targets.append([t % num_patches if here else -1 for t, here in zip(found, inside, strict=True)])
        groups[crop] = np.where(own >= 0, np.searchsorted(numbers, own), -1)
    return kept.reshape(num_crops, num_patches), groups, targets


def _laid_out(crops: Sequence[Crop], visual: VisualInputs, vlm: CompressedVlm) -> list[Sheet]:
    """The crop that shows the whole image, then its tiles as they lie; a video's frames in reading order."""
    (shape,) = visual.shapes
    if shape.kind == "video":
        return [Sheet(f"{len(crops)} frames", crops, 2 if len(crops) < 5 else 4)]
    if len(crops) == 1:
        return [Sheet("", crops)]
    whole = vlm.adapter.overview_index(shape)
    tiles = [crop for number, crop in enumerate(crops) if number != whole]
    columns = vlm.adapter.num_tile_columns(shape) or math.ceil(math.sqrt(len(tiles)))
    return [Sheet("whole image", crops[whole : whole + 1]), Sheet(f"{len(tiles)} tiles", tiles, columns)]


def _in_words(vlm: CompressedVlm, made: CompressedTokens, visual: VisualInputs) -> str:
    (shape,) = visual.shapes
    text = f"{vlm.compressor.num_visual_tokens(shape)} of {shape.num_vanilla} visual tokens"
    num_kept = made.source_index.shape[1]
    if num_contextual := made.num_tokens - num_kept:
        text += f": {num_kept} dominant + {num_contextual} contextual"
        if len(made.tokens) > 1:
            text += f" in each of {len(made.tokens)} {'frames' if shape.kind == 'video' else 'crops'}"
        if shape.num_added:
            text += f", {shape.num_added} newline{'s' * (shape.num_added > 1)}"
        if made.place_index is None:
            text += "; the method does not say what their targets are"
    return text


def seen_image(crop: Tensor, image_processor: Any, grid: tuple[int, int] | None = None) -> Image.Image:
    """``[3, h, w]``, as the image processor normalised it, back to 8-bit RGB; of a grid without the edge none sees."""
    given = ((image_processor.image_mean, 0.0), (image_processor.image_std, 1.0))  # None: it does not normalise
    mean, std = (torch.tensor([usual] * 3 if own is None else own).view(3, 1, 1) for own, usual in given)
    if grid is not None:
        height, width = (side // cells * cells for side, cells in zip(crop.shape[1:], grid, strict=True))
        crop = crop[:, :height, :width]
    pixels = (crop.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().permute(1, 2, 0).numpy().astype(np.uint8))
