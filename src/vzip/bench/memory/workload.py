"""What stands on a device at once: pictures and words without meaning, of the size that is asked about."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vzip.bench import shapes
from vzip.bench.shapes import BenchModel
from vzip.compressors import Compressor
from vzip.data.collate import Batch
from vzip.errors import ConfigError
from vzip.models.families import Adapter, FamilyOptions
from vzip.models.splice import IGNORED_LABEL
from vzip.models.vlm import CompressedVlm

from .quantized import quantize

LEAST_TEXT = 3  # tokens: one before the picture, one after it, one to learn


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        config: Hugging Face's.
        compressor: the method.
        options: of the family.
        quantization: of the language model's linear layers: None, ``8bit`` or ``4bit``.
        attn_implementation: as Hugging Face's.
    """

    config: Any
    compressor: Compressor
    options: FamilyOptions = field(default_factory=FamilyOptions)
    quantization: str | None = None
    attn_implementation: str = "sdpa"

    def on_paper(self, dtype: torch.dtype) -> CompressedVlm:
        """The model on torch's meta device, quantized if it is to be."""
        vlm = self._wrap(shapes.build_meta(BenchModel("", self.config, ""), dtype))
        if self.quantization is not None:
            quantize(vlm.model, vlm.adapter.language_model, self.quantization, dtype)
        return vlm

    def with_random_weights(self, device: torch.device, dtype: torch.dtype) -> CompressedVlm:
        """The model itself, unquantized."""
        return self._wrap(shapes.build_random(BenchModel("", self.config, ""), device, dtype))

    def _wrap(self, model: PreTrainedModel) -> CompressedVlm:
        if self.attn_implementation == "eager":  # flash attention takes what SDPA takes, and needs a GPU to be chosen
            model.set_attn_implementation("eager")
        options = self.options
        return CompressedVlm(
            model,
            self.compressor,
            drop_padding=options.drop_padding,
            row_newline=options.row_newline,
            drop_cls=options.drop_cls,
        )


@dataclass(frozen=True)
class Workload:
    """A batch.

    Attributes:
        num_pictures: pictures (or videos), each encoded once.
        num_dialogues: conversations about each of them, or prompts.
        length: tokens of each, visual tokens counted.
        num_new_tokens: that an inference generates after them.
        num_frames: of each video; None: pictures.
    """

    num_pictures: int
    num_dialogues: int
    length: int
    num_new_tokens: int = 0
    num_frames: int | None = None


def blank_pictures(adapter: Adapter, load: Workload) -> dict[str, Tensor]:
    """Pictures as the family's processor returns them, each of as many crops as it cuts at most."""
    count, side = load.num_pictures, adapter.image_side
    if load.num_frames is not None:
        return {"pixel_values_videos": torch.ones(count, load.num_frames, 3, side, side)}
    if not adapter.has_tiles:
        return {"pixel_values": torch.ones(count, 3, side, side)}
    height, width = max(adapter.model.config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    num_crops = 1 + (height // side) * (width // side)
    return {
        "pixel_values": torch.ones(count, num_crops, 3, side, side),
        "image_sizes": torch.tensor([[height, width]] * count),
    }


def num_visual_tokens(vlm: CompressedVlm, pictures: dict[str, Tensor]) -> int:
    """Visual tokens of one of the pictures (or videos)."""
    return vlm.expected_num_visual_tokens(**pictures)[0]


def visual_tokens(shape: ModelShape, load: Workload) -> int:
    """Visual tokens of one picture (or video), from the model's shape alone."""
    vlm = shape.on_paper(torch.float32)
    return num_visual_tokens(vlm, blank_pictures(vlm.adapter, replace(load, num_pictures=1)))


def check_length(length: int, num_visual: int) -> None:
    """Refuses a dialogue whose picture leaves no room for words.

    Raises:
        ConfigError: naming both numbers.
    """
    if length - num_visual < LEAST_TEXT:
        raise ConfigError(
            f"--length={length}: a picture of this model and budget has {num_visual} visual tokens, and at least"
            f" {LEAST_TEXT} of text are needed. Set --length (by default train.max_length) to"
            f" {num_visual + LEAST_TEXT} or more, or choose a smaller budget."
        )


def prompts(vlm: CompressedVlm, load: Workload) -> dict[str, Tensor]:
    """The arguments of ``prepare`` and ``generate``: each prompt is its placeholder and the rest text.

    Of several one is a token shorter: rows that are all as long need no attention mask, which real ones do.
    """
    pictures = blank_pictures(vlm.adapter, load)
    count, num_text = load.num_pictures * load.num_dialogues, load.length - num_visual_tokens(vlm, pictures)
    ids = torch.ones(count, num_text + 1, dtype=torch.int64)
    token_id = vlm.adapter.image_token_id if load.num_frames is None else vlm.adapter.video_token_id
    assert token_id is not None
    ids[:, 1] = token_id
    mask = torch.ones_like(ids)
    mask[1:2, -1] = 0
    return {"input_ids": ids, "attention_mask": mask, **pictures}


def training_batch(vlm: CompressedVlm, load: Workload) -> Batch:
    """A batch in which every word of text but the first is a target: the most there can be."""
    pictures = prompts(vlm, load)
    ids, mask = pictures.pop("input_ids"), pictures.pop("attention_mask")
    labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
    labels[:, :2] = IGNORED_LABEL
    owners = [number for number in range(load.num_pictures) for _ in range(load.num_dialogues)]
    names = [f"picture {number}" for number in range(load.num_pictures)]
    visual = [num_visual_tokens(vlm, pictures)] * load.num_pictures
    return Batch(names, owners, ids, mask, labels, pictures, owners, visual)


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    return [batch.input_ids, batch.attention_mask, batch.labels, *batch.pictures.values()]
