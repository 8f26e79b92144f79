"""A tiny InternVL3 of random weights: tiles of 16 x 16 patches, so of 64 visual tokens, and prompts for it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tests import tiny
from transformers import InternVLConfig

from vzip.models.weights import from_config as fresh

UNITS = 64
IMAGE, START, END = tiny.IMAGE_TOKEN, 60, 61


def build(
    tower: str = "clip", strategy: str = "default", select_layer: int = -1, vocab_size: int = 64, **vision: Any
) -> Any:
    """The model in eval mode, float32; settings of the vision tower as ``use_qk_norm=True``."""
    assert (tower, strategy) == ("clip", "default")  # its tower has a CLS token
    of_tower = {
        **{"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"image_size": tiny.IMAGE_SIZE, "patch_size": 7, "attention_bias": True},
    }
    text = tiny.text_config(vocab_size).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    config = fresh.internvl_config({name: text[name] for name in names}, {**of_tower, **vision}, IMAGE)
    config.vision_feature_layer = select_layer
    torch.manual_seed(7)
    model = fresh.new_model(config)
    with torch.no_grad():  # Hugging Face begins with zeros
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_token", "position_embeddings")):
                parameter.normal_(std=0.5)
            elif "lambda" in name:
                parameter.fill_(0.7)
    return tiny.finish(model, "clip")


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


def inputs(num_images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images of one tile, whose tensors can be cut image by image."""
    return images(*[1] * num_images, seed=seed)


class _Family(tiny.Family):
    def stock(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pixel_values": inputs["pixel_values"]}


FAMILY = _Family(
    name="internvl_tiny",
    build=build,
    inputs=inputs,
    kinds=(("clip", "default"),),
    crops=(1,),
    config_class=InternVLConfig,
)
