"""What a wrapper's compressor keeps of a video, drawn over its middle frame."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.vision import of_tower
from vzip.errors import UnsupportedModelError
from vzip.models.families.llava_base import LlavaBase
from vzip.models.vlm import CompressedVlm

from .kept import as_image
from .overlay import draw_overlay


@torch.inference_mode()
def draw_kept_frame(vlm: CompressedVlm, inputs: Mapping[str, Tensor], question: str | None = None) -> Image.Image:
    """The middle frame of a video as the vision tower sees it, kept patches and merge groups drawn (``draw_overlay``).

    Args:
        vlm: the wrapper.
        inputs: of one video, as ``preprocess_videos`` returns them, on the model's device.
        question: about it, for a text-aware method.

    Raises:
        UnsupportedModelError: a family whose frames the tower does not see one by one.
        PromptError: a text-aware method without a question.
    """
    adapter, compressor = vlm.adapter, vlm.compressor
    if not isinstance(adapter, LlavaBase):
        raise UnsupportedModelError(f"{type(vlm.model).__name__} joins frames of a video: there is none to draw over.")
    visual = vlm.asked(adapter.read_inputs(**inputs), None if question is None else [question])
    visual = adapter.viewed(visual, compressor)
    (shape,) = visual.videos
    frames, middle = adapter.video_pixels(visual), shape.num_crops // 2
    seen = as_image(frames[middle], vlm.processor.image_processor)  # type: ignore[union-attr]
    if compressor.scope == "image" or compressor.joins(shape):
        return seen
    _, vision = adapter.video_outputs(visual, of_tower(compressor.reads()), adapter.run_for(compressor))[0]
    vision = adapter.beside(vision, compressor, visual.texts, [shape.num_crops])
    return draw_overlay(seen, compressor(vision), middle, vision.grid, vision.has_cls)
