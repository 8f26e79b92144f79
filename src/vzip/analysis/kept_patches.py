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
        kept: of each call what it was given, and what came of it.
    """

    kept: list[tuple[VisionOutput, CompressedTokens]] = field(default_factory=list)

    def select(self, vision: VisionOutput) -> Selection:
        return self.of.select(vision)

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        result = self.of.compress(vision)
        self.kept.append((vision, result))
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
    for vision, made in watched.kept:
        places = patches_of_units(vision, compressor, shape, adapter.whole_index(shape))
        kept |= set(places.to(made.source_index.device).gather(1, made.source_index).flatten().tolist())
    return kept - {-1}, num_patches


def patches_of_units(
    vision: VisionOutput, compressor: Compressor, shape: VisionShape, packing: Tensor | None
) -> Tensor:
    """Which patch each unit is that a method was given: int64 ``[N, U]`` on the CPU, crops counted through.

    CLS and newlines are none: -1.

    Args:
        vision: what the method was given: crops, or the whole as the unmodified model packs it.
        compressor: the method.
        shape: of the image (or video).
        packing: ``Adapter.whole_index(shape)``.
    """
    num_patches = shape.num_patches
    if compressor.scope == "crop" and not compressor.joins(shape):
        crop, unit = torch.arange(len(vision.hidden))[:, None], torch.arange(vision.num_rows) - int(vision.has_cls)
        return (crop * num_patches + unit).where(unit >= 0, -1)
    row = torch.arange(vision.num_rows) if packing is None else packing
    num_all = len(row) if packing is None else int(packing.max()) + 1
    has_cls = max(0, num_all // shape.num_crops - num_patches)  # where the unmodified model passes it on
    width = num_patches + has_cls
    patch = row % width - has_cls
    return (row // width * num_patches + patch).where((row >= 0) & (patch >= 0), -1)[None]
