"""Which patches of an image a compressor keeps, and which it merges into which, as numbers to draw anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.base import CompressedTokens, Compressor
from vzip.compressors.vision import VisionOutput, VisionShape
from vzip.models.vlm import CompressedVlm

from .kept import as_image
from .kept_patches import Watched


@dataclass(frozen=True)
class KeptMap:
    """What became of the patches of the crop that shows a whole image.

    Attributes:
        image: that crop, as the vision tower saw it.
        kept: bool ``[rows, cols]``, patches that are tokens of their own.
        group: int64 ``[rows, cols]``, the group with which each patch merges, its target among them; -1: none.
        targets: of each group the patch that the others join, row by row; -1: none of this crop.
    """

    image: Image.Image
    kept: np.ndarray
    group: np.ndarray
    targets: list[int]


@dataclass(frozen=True)
class _Seen(Watched):
    """Remembers the tokens too."""

    made: list[tuple[VisionOutput, CompressedTokens]] = field(default_factory=list)

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        result = super().compress(vision)
        self.made.append((vision, result))
        return result


@torch.inference_mode()
def kept_map(vlm: CompressedVlm, image: Image.Image, question: str | None = None) -> KeptMap:
    """What the wrapper's compressor keeps and merges of an image, in the crop that shows the whole of it.

    Args:
        vlm: the wrapper.
        image: any.
        question: about it, for a text-aware method.

    Raises:
        ConfigError: the wrapper has no processor.
        PromptError: a text-aware method without a question.
        ImageError: an image that cannot be used.
    """
    adapter, watched = vlm.adapter, _Seen(vlm.compressor)
    inputs = {name: value.to(vlm.device) for name, value in vlm.preprocess_images([image]).items()}
    visual = vlm.asked(adapter.read_inputs(**inputs), None if question is None else [question])
    (shape,) = visual.images
    adapter.encode(visual, watched)
    num_patches = shape.num_patches
    kept = np.zeros(shape.num_crops * num_patches, bool)
    group = np.full(shape.num_crops * num_patches, -1)
    targets: list[int] = []
    for vision, tokens in watched.made:
        patches = _patches_of_units(vision, vlm.compressor, shape, adapter.whole_index(shape))
        for row, patch in enumerate(patches):
            source = patch[tokens.source_index[row].cpu().numpy()]
            kept[source[source >= 0]] = True
            targets += _mark_groups(tokens, row, patch, group, len(targets))
    first = adapter.overview_index(shape) * num_patches
    own = group[first : first + num_patches]
    numbers = np.unique(own[own >= 0])
    inside = [targets[number] - first if 0 <= targets[number] - first < num_patches else -1 for number in numbers]
    seen = as_image(adapter.shown(adapter.viewed(visual, vlm.compressor)), vlm.processor.image_processor)  # type: ignore[union-attr]
    numbered = np.where(own >= 0, np.searchsorted(numbers, own), -1)
    return KeptMap(seen, kept[first : first + num_patches].reshape(shape.grid), numbered.reshape(shape.grid), inside)


def _mark_groups(tokens: CompressedTokens, row: int, patch: np.ndarray, group: np.ndarray, first: int) -> list[int]:
    """Writes the groups of a crop into ``group``, numbered from ``first``; returns the patch of each one's target."""
    merged = tokens.merge_index[row].cpu().numpy()
    num_kept = tokens.source_index.shape[1]
    # A slot counts contextual tokens where there are any, else the kept ones.
    start = num_kept if tokens.num_tokens > num_kept else 0
    targets: list[int] = []
    for slot in np.unique(merged[merged >= 0]):
        members = patch[merged == slot]
        group[members[members >= 0]] = first + len(targets)
        places = tokens.place_index
        targets.append(-1 if places is None else int(patch[int(places[row, start + slot])]))
    return targets


def _patches_of_units(
    vision: VisionOutput, compressor: Compressor, shape: VisionShape, packing: Tensor | None
) -> np.ndarray:
    """``[N, U]``: of each unit that a method was given its patch, crops counted through; -1 of CLS and newlines."""
    if compressor.scope == "crop":
        crop, unit = np.arange(len(vision.hidden))[:, None], np.arange(vision.num_rows) - int(vision.has_cls)
        return np.where(unit >= 0, crop * shape.num_patches + unit, -1)
    row = np.arange(vision.num_rows) if packing is None else packing.cpu().numpy()
    num_all = len(row) if packing is None else int(row.max()) + 1
    has_cls = max(0, num_all // shape.num_crops - shape.num_patches)  # where the unmodified model passes it on
    width = shape.num_patches + has_cls
    patch = row % width - has_cls
    return np.where((row >= 0) & (patch >= 0), row // width * shape.num_patches + patch, -1)[None]
