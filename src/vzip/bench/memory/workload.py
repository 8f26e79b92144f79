"""What stands on a device at once: images and text without meaning, of the size that is asked about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vzip.data.collate import Batch
from vzip.errors import ConfigError
from vzip.models.families import Adapter
from vzip.models.splice import IGNORED_LABEL
from vzip.models.vlm import CompressedVlm

LEAST_TEXT = 3  # tokens: one before the image, one after it, one to learn


@dataclass(frozen=True)
class Workload:
    """A batch.

    Attributes:
        num_images: images (or videos), each encoded once.
        num_dialogues: conversations about each of them, or prompts.
        length: tokens of each, visual tokens counted.
        num_new_tokens: that an inference generates after them.
        num_frames: of each video; None: images.
    """

    num_images: int
    num_dialogues: int
    length: int
    num_new_tokens: int = 0
    num_frames: int | None = None


def blank_images(adapter: Adapter, num_images: int = 1, num_frames: int | None = None) -> dict[str, Tensor]:
    """Images (or videos) as the family's processor returns them, each of as many crops as it cuts at most."""
    return adapter.blank_images(num_images) if num_frames is None else adapter.blank_videos(num_images, num_frames)


def num_visual_tokens(vlm: CompressedVlm, num_frames: int | None = None) -> int:
    """Visual tokens of one image (or video), from the model's shape alone."""
    return vlm.expected_num_visual_tokens(**blank_images(vlm.adapter, 1, num_frames))[0]


def check_length(length: int, num_visual: int) -> None:
    """Refuses a dialogue whose image leaves no room for text.

    Raises:
        ConfigError: naming both numbers.
    """
    if length - num_visual < LEAST_TEXT:
        raise ConfigError(
            f"--length={length}: an image of this model and budget has {num_visual} visual tokens, and at least"
            f" {LEAST_TEXT} of text are needed. Set --length (by default train.max_length) to"
            f" {num_visual + LEAST_TEXT} or more, or choose a smaller budget."
        )


def prompts(vlm: CompressedVlm, load: Workload) -> dict[str, Tensor]:
    """The arguments of ``prepare`` and ``generate``: each prompt is its placeholder (or one a run) and the rest text.

    Of several one is a token shorter: rows that are all as long need no attention mask, which real ones do.
    """
    num_text = load.length - num_visual_tokens(vlm, load.num_frames)
    images = blank_images(vlm.adapter, load.num_images, load.num_frames)
    num_runs = max(vlm.adapter.video_runs(vlm.adapter.read_inputs(**images)), default=1)
    if num_text < num_runs + 2:
        needed = load.length + num_runs + 2 - num_text
        raise ConfigError(
            f"--length={load.length}: leaves {num_text} tokens of text, and a video of {num_runs} temporal steps, each"
            f" written by itself, needs {num_runs + 2}. Set --length to {needed} or more."
        )
    ids = torch.ones(load.num_images * load.num_dialogues, num_text + num_runs, dtype=torch.int64)
    token_id = vlm.adapter.image_token_id if load.num_frames is None else vlm.adapter.video_token_id
    assert token_id is not None
    ids[:, 1 : 2 * num_runs : 2] = token_id
    mask = torch.ones_like(ids)
    mask[1:2, -1] = 0
    return {"input_ids": ids, "attention_mask": mask, **images}


def training_batch(vlm: CompressedVlm, load: Workload) -> Batch:
    """A batch in which all text but the first token is a target: the most there can be."""
    images = prompts(vlm, load)
    ids, mask = images.pop("input_ids"), images.pop("attention_mask")
    labels = ids.masked_fill(mask == 0, IGNORED_LABEL)
    labels[:, :2] = IGNORED_LABEL
    owners = [number for number in range(load.num_images) for _ in range(load.num_dialogues)]
    names = [f"image {number}" for number in range(load.num_images)]
    return Batch(names, owners, ids, mask, labels, images, owners, [num_visual_tokens(vlm)] * load.num_images)


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    return [batch.input_ids, batch.attention_mask, batch.labels, *batch.images.values()]
