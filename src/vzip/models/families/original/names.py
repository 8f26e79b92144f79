"""Weight names of LLaVA's code and of CLIP repositories, and what they are in Hugging Face's classes."""

from __future__ import annotations

import re
from collections.abc import Sequence

Rules = Sequence[tuple[str, str]]

TOWER = "model.vision_tower."
LANGUAGE: Rules = (
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"(lm_head\.)", r"\1"),
)
# Not weights: buffers that old transformers versions saved.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)")
# The rest of CLIP: its text side, and the heads after the towers.
_UNUSED_CLIP = re.compile(r"(text_model|text_projection|visual_projection|logit_scale)(\.|$)")


class UnexpectedName(ValueError):
    """A tensor that no part of the model has a place for."""


def is_buffer(name: str) -> bool:
    """Whether a tensor of a checkpoint is none of its weights."""
    return _BUFFERS.fullmatch(name) is not None


def after(name: str, prefix: str) -> str:
    """What follows the prefix; empty where the name does not begin with it."""
    return name[len(prefix) :] if name.startswith(prefix) else ""


def apply(rules: Rules, name: str, whole_name: str) -> str:
    """The name with the first rule that its beginning fits; UnexpectedName(whole_name) where none does."""
    for pattern, replacement in rules:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    raise UnexpectedName(whole_name)


def rename_clip(name: str, to: str = TOWER) -> str | None:
    """A name of a CLIP checkpoint in Hugging Face format; None for what is not of its vision tower."""
    if is_buffer(name) or _UNUSED_CLIP.match(name):
        return None
    if rest := after(name, "vision_model."):
        return to + rest
    raise UnexpectedName(name)


def rename_llava(name: str) -> str | None:
    """A name of LLaVA's own checkpoint, which may hold its tower too; None for what is not a weight."""
    if is_buffer(name):
        return None
    if rest := after(name, "model.vision_tower.vision_tower."):
        return TOWER + rest.removeprefix("vision_model.")
    return name if name == "model.image_newline" else apply(LANGUAGE, name, name)
