"""A tiny InternVL3 of random weights: tiles of 8 x 8 patches, so of 16 visual tokens, and prompts for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tests import tiny
from transformers import InternVLConfig, Qwen2Config

from vzip.models.weights import from_config as fresh

SIDE, UNITS = 112, 16
IMAGE, START, END = tiny.IMAGE_TOKEN, 60, 61
VISION = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 14,
    "attention_bias": True,
}


def build(**vision: Any) -> Any:
    """The model in eval mode, float32; settings of the vision tower as ``use_qk_norm=True``."""
    text = Qwen2Config(**{name: value for name, value in tiny.text_config(64).to_dict().items() if name in _OF_TEXT})
    settings = {"vision_config": {**VISION, **vision}, "text_config": text, "image_token_id": IMAGE}
    torch.manual_seed(7)
    model = fresh.new_model(InternVLConfig(**settings, image_seq_length=UNITS, tie_word_embeddings=False))
    with torch.no_grad():  # as published ones, which are trained: nothing is zero
        for name, parameter in model.named_parameters():
            if "cls_token" in name or "position_embeddings" in name:
                parameter.normal_(std=0.5)
            elif "lambda" in name:
                parameter.fill_(0.7)
    return tiny.finish(model, "clip")


_OF_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@cache
def shared() -> Any:
    """One for tests that change nothing."""
    return build()


def images(*counts: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What ``preprocess_images`` returns for images of so many tiles."""
    return {"pixel_values": tiny.pixels(sum(counts), seed), "num_patches": torch.tensor(counts)}


def prompt(*items: int | str, expanded: bool = True) -> list[int]:
    """Ids: whole numbers are text, ``"5"`` stands for an image of five tiles."""
    ids: list[int] = []
    for item in items:
        ids += [START, *[IMAGE] * (int(item) * UNITS if expanded else 1), END] if isinstance(item, str) else [item]
    return ids
