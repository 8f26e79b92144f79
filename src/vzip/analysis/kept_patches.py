"""Which patches of an image a compressor keeps, as sets that can be compared between methods."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.base import CompressedTokens, Compressor, Selection
from vzip.compressors.vision import VisionOutput, VisionShape
from vzip.compressors.wrappers import Wrapper
from vzip.models.vlm import CompressedVlm


@dataclass(frozen=True)
class Watched(Wrapper):
    """A compressor that remembers what it kept; everything else is that of the one inside.

    Attributes:
        kept: of each call what it was given, and the units kept.
    """

    kept: list[tuple[VisionOutput, Tensor]] = field(default_factory=list)

    def select(self, vision: VisionOutput) -> Selection:
        return self.of.select(vision)

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        result = self.of.compress(vision)
        self.kept.append((vision, result.source_index))
        return result


@torch.inference_mode()
def kept_patches(
    vlm: CompressedVlm, image: Image.Image, compressor: Compressor, question: str | None = None
) -> tuple[set[int], int]:
    """The patches that a method keeps of an image, numbered crop by crop, and how many the image has.

    Kept are those that are tokens of their own: not CLS, newlines, and contextual tokens. Only a text-aware method
    looks at the question.

    Raises:
        ConfigError: the wrapper has no processor.
        PromptError: a text-aware method without a question.
        ImageError: an image that cannot be used.
    """
    adapter, watched = vlm.adapter, Watched(compressor)
    inputs = {name: value.to(vlm.device) for name, value in vlm.preprocess_images([image]).items()}
    visual = adapter.read_inputs(**inputs)
    visual = adapter.asked(visual, compressor, None if question is None else [question], vlm.processor)
    (shape,) = visual.images
    num_patches = shape.num_crops * shape.num_patches
    adapter.encode(visual, watched)
    kept: set[int] = set()
    for vision, index in watched.kept:
        if compressor.scope == "image":
            kept |= _of_whole(index[0].cpu(), adapter.whole_index(shape), vision.num_rows, shape)
        else:
            for crop, own in enumerate(index.tolist()):
                kept |= {crop * shape.num_patches + unit - vision.has_cls for unit in own if unit >= vision.has_cls}
    return kept, num_patches


def _of_whole(index: Tensor, packing: Tensor | None, num_rows: int, shape: VisionShape) -> set[int]:
    """Units of a packed image as patches of its crops."""
    rows = index if packing is None else packing[index]
    num_all = num_rows if packing is None else int(packing.max()) + 1
    has_cls = max(0, num_all // shape.num_crops - shape.num_patches)  # where the unmodified model passes it on
    width = shape.num_patches + has_cls
    return {
        row // width * shape.num_patches + row % width - has_cls
        for row in rows.tolist()
        if row % width >= has_cls <= row
    }
