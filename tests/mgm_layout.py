"""Writes a tiny Mini-Gemini as MGM publishes it: its names, shards, and the towers as their own repositories."""

from __future__ import annotations

import json

import sentencepiece
import torch
from safetensors.torch import save_file
from tests import tiny_mini_gemini
from transformers import CLIPConfig, CLIPImageProcessor

VOCABULARY = 320
CLIP = "model_zoo/OpenAI/clip-vit-large-patch14-336"
CONVNEXT = "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup"
TO_TIMM = [
    ("embeddings.patch_embeddings", "stem.0"),
    ("embeddings.layernorm", "stem.1"),
    ("downsampling_layer", "downsample"),
    (".layers.", ".blocks."),
    ("dwconv", "conv_dw"),
    ("layernorm", "norm"),
    ("pwconv1", "mlp.fc1"),
    ("pwconv2", "mlp.fc2"),
    ("layer_scale_parameter", "gamma"),
]


def timm_name(name):
    for ours, theirs in TO_TIMM:
        name = name.replace(ours, theirs)
    return name


def parts_of(model):
    """(MGM's own tensors, CLIP's, the ConvNeXt's), the towers by the names they have in their own repositories."""
    own, clip, convnext = {}, {}, {}
    for name, value in model.state_dict().items():
        if name.startswith("model.high_res_tower."):
            convnext[timm_name(name.removeprefix("model.high_res_tower."))] = value
        elif name.startswith("model.vision_tower."):
            clip[name.removeprefix("model.vision_tower.")] = value
        else:
            for ours, theirs in (
                ("multi_modal_projector.linear_1", "mm_projector.0"),
                ("multi_modal_projector.linear_2", "mm_projector.2"),
                ("patch_info_mining.", ""),
                ("language_model.", ""),
            ):
                name = name.replace(ours, theirs)
            own[name] = value
    return own, clip, convnext


def save_shards(tensors, directory, suffix, num_shards=3):
    names = sorted(tensors)
    stem, save = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    files = {}
    for number in range(num_shards):
        file = f"{stem}-{number + 1:05}-of-{num_shards:05}.{suffix}"
        own = {name: tensors[name].contiguous().clone() for name in names[number::num_shards]}
        save(own, directory / file)
        files |= dict.fromkeys(own, file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def save_towers(zoo, clip, convnext, config):
    """As on the hub: all of CLIP in one .bin; OpenCLIP's .bin with its text side and heads."""
    low, high = zoo / CLIP, zoo / CONVNEXT
    low.mkdir(parents=True)
    high.mkdir(parents=True)
    state = {f"vision_model.{name}": value for name, value in clip.items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(65)[None]
    state |= {name: torch.zeros(2, 2) for name in ("text_model.final_layer_norm.weight", "visual_projection.weight")}
    torch.save(state | {"logit_scale": torch.tensor(1.0)}, low / "pytorch_model.bin")
    CLIPConfig(vision_config=config.vision_config.to_dict()).save_pretrained(low)
    CLIPImageProcessor(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}).save_pretrained(low)
    state = {f"visual.trunk.{name}": value for name, value in convnext.items()}
    unused = ("positional_embedding", "transformer.resblocks.0.ln_1.weight", "visual.trunk.head.norm.weight")
    state |= {name: torch.zeros(3) for name in (*unused, "visual.head.mlp.fc1.weight", "ln_final.bias", "logit_scale")}
    torch.save(state, high / "open_clip_pytorch_model.bin")


def save_tokenizer(directory):
    """A SentencePiece model in Vicuna's settings."""
    text = ["what is in the image? the answer is a dog.", "USER: is there a cat on the left? ASSISTANT: no"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=-1,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, "padding_side": "right"}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | special))


def published_config(model, **changes):
    """``config.json`` with the fields that MGM's training script writes."""
    text = model.config.text_config
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    llama = {key: getattr(text, key) for key in (*keys, "vocab_size", "max_position_embeddings", "rms_norm_eps")}
    return (
        llama
        | {"architectures": ["MGMLlamaForCausalLM"], "model_type": "mgm", "hidden_act": "silu", "rope_scaling": None}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float32", "rope_theta": 10000.0}
        | {"mm_vision_tower": CLIP, "mm_vision_tower_aux": CONVNEXT, "mm_hidden_size": 32, "mm_hidden_size_aux": 60}
        | {"image_size_aux": tiny_mini_gemini.SIDE, "image_grid": 1, "image_global": False, "image_aspect_ratio": "pad"}
        | {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
        | {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "optimize_vision_tower": False}
        | {"tokenizer_model_max_length": 2048, "transformers_version": "4.38.0", "use_mm_proj": True}
        | changes
    )


def save_all(model, root, suffix="safetensors"):
    """root/work_dirs/MGM/tiny beside root/model_zoo, as MGM's README lays them out; returns the first."""
    directory = root / "work_dirs" / "MGM" / "tiny"
    directory.mkdir(parents=True)
    own, clip, convnext = parts_of(model)
    save_shards(own, directory, suffix)
    save_towers(root, clip, convnext, model.config)
    save_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(published_config(model)))
    return directory
