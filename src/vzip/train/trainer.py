"""Conversations for transformers' ``Trainer``: samples in, the arguments of ``CompressedVlm.forward`` out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vzip.compressors.base import check_reads_no_text
from vzip.data.collate import Collator, TrainingSample
from vzip.data.conversations import find_template
from vzip.data.llava_record import IMAGE_PLACEHOLDER, Turn
from vzip.errors import ConfigError, PromptError
from vzip.media.images import load_image
from vzip.media.video import load_video
from vzip.models.vlm import CompressedVlm

from .objective import ModelView

logger = logging.getLogger(__name__)

_PARTS = {"image": IMAGE_PLACEHOLDER}


class TrainerCollator:
    """The ``data_collator`` of a ``Trainer`` whose model is a ``CompressedVlm``.

    A sample is a ``TrainingSample``, or an object as data sets on the hub have them: ``messages`` (a list of ``role``
    and ``content``, a text or a list of parts) and ``images``; these need
    ``TrainingArguments(remove_unused_columns=False)``, or ``Trainer`` takes them away.

    Args:
        vlm: the model, whose processor, preprocessing and budget are used.
        template: how conversations are written, as ``train.template``; None: the family's own.
        system_prompt: text before each conversation, or None.
        max_length: tokens of a conversation, visual ones counted; longer ones are cut, in no image.

    Raises:
        ConfigError: a model without a processor, a template that it cannot read, a text-aware method.
    """

    def __init__(
        self,
        vlm: CompressedVlm,
        template: str | None = None,
        system_prompt: str | None = None,
        max_length: int = 2048,
    ) -> None:
        if vlm.processor is None:
            raise ConfigError("TrainerCollator: the model has no processor. Load it with vzip.load_vlm.")
        check_reads_no_text(vlm.compressor, "a training's questions are not known apart from its conversations")
        self._view = ModelView(vlm)
        self._collator = Collator(
            vlm.processor,
            self._view,
            find_template(vlm.adapter.check_template(template)),
            system_prompt,
            vlm.adapter.image_token_id,
            max_length,
            video_token_id=vlm.adapter.video_token_id if vlm.adapter.learns_videos else None,
        )

    def __call__(self, samples: Sequence[TrainingSample | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tensors of a batch: ``input_ids``, ``attention_mask``, ``labels`` and the processor's outputs.

        Args:
            samples: one or more; each conversation of each is a row, with its images of its own.

        Raises:
            ImageError, VideoError, PromptError: naming the sample that cannot be used, or there is no sample.
        """
        if not len(samples):
            raise PromptError("TrainerCollator: a batch of no sample; each needs one or more. Is the data set empty?")
        whole = [s if isinstance(s, TrainingSample) else as_sample(s, number) for number, s in enumerate(samples)]
        rows = [replace(sample, dialogues=[turns]) for sample in whole for turns in sample.dialogues]
        batch = self._collator(rows)
        if batch.cut_off:
            nothing = "" if batch.num_targets else "; nothing is learned from this batch, whose loss is 0"
            logger.warning(
                "max_length=%d leaves no target of an answer: %s%s. Raise it, or use a smaller budget.",
                self._collator.max_length,
                ", ".join(batch.cut_off),
                nothing,
            )
        images, videos = batch.images, batch.videos
        # What max_length has cut off is in no row; it was needed to know how many tokens each image has.
        if len(batch.image_of) < len(batch.num_visual_tokens):
            every = [(image, len(row.images)) for row in rows for image in row.images]
            kept = [every[number] for number in batch.image_of]
            opened = [load_image(image) for image, _ in kept]
            images = self._view.preprocess_images(opened, [count for _, count in kept]) if kept else {}
        if len(batch.video_of) < len(batch.num_video_tokens):
            files = [video for row in rows for video in row.videos]
            decoded = [load_video(files[number], self._view.num_frames) for number in batch.video_of]
            videos = self._view.preprocess_videos(decoded) if decoded else {}
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
            **images,
            **videos,
        }


def as_sample(given: Mapping[str, Any], number: int = 0) -> TrainingSample:
    """A sample of ``messages`` and ``images``.

    Args:
        given: ``messages``; ``images`` (or ``image``): paths or PIL images in the order of their places; ``id``.
            Where no place is marked, images stand before the first words.
        number: its name in errors, where it has no ``id``.

    Raises:
        PromptError: it has no messages, or one that is not a user's or an assistant's text; none is an assistant's; its
            images are no list.
    """
    name = str(given.get("id", number))
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise PromptError(
            f"sample {name}: has no list of messages, but {', '.join(given) or 'nothing'}. Where the data set has them,"
            " set TrainingArguments(remove_unused_columns=False): Trainer takes away what forward does not name."
        )
    images = given.get("images") or ([given["image"]] if given.get("image") is not None else [])
    if not isinstance(images, list | tuple):
        raise PromptError(f"sample {name}: images={images!r:.60}; must be a list of paths or PIL images.")
    turns = [_turn(message, name) for message in messages]
    if all(turn.role != "assistant" for turn in turns):  # a step of these alone would divide by zero words
        raise PromptError(f"sample {name}: has no message of an assistant, so there is nothing to learn from it.")
    if images and not any(IMAGE_PLACEHOLDER in turn.text for turn in turns):
        turns[0] = replace(turns[0], text=f"{IMAGE_PLACEHOLDER}\n" * len(images) + turns[0].text)
    return TrainingSample(name, list(images), [turns])


def _turn(message: Any, name: str) -> Turn:
    said: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    role, content = said.get("role"), said.get("content")
    if role not in ("user", "assistant"):
        raise PromptError(
            f"sample {name}: a message of role {role!r}; must be user or assistant. A system prompt is given as"
            " TrainerCollator(system_prompt=...)."
        )
    if isinstance(content, str):
        return Turn(role, content)
    parts = []
    for part in content if isinstance(content, list) else [content]:
        given: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
        kind = given.get("type")
        text = given.get("text") if kind == "text" else _PARTS.get(str(kind))
        if not isinstance(text, str):
            raise PromptError(f"sample {name}: a part of a message is {part!r:.60}; must be a text or an image.")
        parts.append(text)
    return Turn(role, "\n".join(parts))
