"""Writes a tiny LLaVA as LLaVA's own code does: its names, shards, and its CLIP as a repository of its own."""

from __future__ import annotations

import json

import torch
from tests.mgm_layout import VOCABULARY, save_shards, save_tokenizer
from tests.tiny import IMAGE_SIZE
from transformers import CLIPConfig, CLIPImageProcessor

CLIP = "openai/clip-tiny"
OURS = (
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("model.language_model.", "model."),
)


def parts_of(model):
    """(LLaVA's own tensors, its tower's by CLIP's names)."""
    own, tower = {}, {}
    for name, value in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            tower[f"vision_model.{name.removeprefix('model.vision_tower.')}"] = value
            continue
        for ours, theirs in OURS:
            name = name.replace(ours, theirs)
        own[name] = value
    return own, tower


def config_of(model, **changes):
    """``config.json`` with the fields of LLaVA's training script."""
    text = model.config.text_config
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    return (
        {key: getattr(text, key) for key in (*keys, "vocab_size", "max_position_embeddings", "rms_norm_eps")}
        | {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_act": "silu"}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32", "rope_theta": 10000.0}
        | {"mm_vision_tower": CLIP, "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu"}
        | {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "image_aspect_ratio": "pad"}
        | {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "mm_resampler_type": None}
        | changes
    )


def save_tower(directory, tower, vision_config):
    directory.mkdir(parents=True)
    rest = {"text_model.final_layer_norm.weight": torch.zeros(2), "logit_scale": torch.tensor(1.0)}
    torch.save(tower | rest, directory / "pytorch_model.bin")
    CLIPConfig(vision_config=vision_config.to_dict()).save_pretrained(directory)
    sides = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    CLIPImageProcessor(**sides).save_pretrained(directory)


def save_all(model, root, suffix="bin", tower_inside=False, **changes):
    """root/checkpoints/llava beside root/openai; returns the first."""
    directory = root / "checkpoints" / "llava"
    directory.mkdir(parents=True)
    own, tower = parts_of(model)
    assert own["model.embed_tokens.weight"].shape[0] == VOCABULARY
    save_tower(root / CLIP, tower, model.config.vision_config)
    if tower_inside:
        own |= {f"model.vision_tower.vision_tower.{name}": value + 1 for name, value in tower.items()}
    own["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_shards(own, directory, suffix)
    save_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(config_of(model, **changes)))
    return directory
