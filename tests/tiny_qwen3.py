"""A tiny random Qwen3-VL that takes the images and prompts of ``tests/tiny_qwen.py``."""

from __future__ import annotations

from typing import Any

import torch
from tests.tiny_qwen import END, IMAGE, START
from transformers import Qwen3VLForConditionalGeneration

from vzip.models.weights.from_config import qwen3_vl_config


def build() -> Any:
    """The model, float32: five blocks, planes after the second and fourth, three layers of language."""
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
    }
    vision = {
        "depth": 5,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [1, 3],
    }
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(qwen3_vl_config(text, vision, ids)).eval()
    with torch.no_grad():  # wider than the usual start, so that attention and planes differ clearly
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5 * 1.5)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model
