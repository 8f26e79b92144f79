"""Weight names: from the published checkpoints (MGM, OpenCLIP, CLIP) to ``MiniGeminiForConditionalGeneration``.

Sources: MGM 769820c ``mgm_arch.py`` and ``openclip_encoder.py`` for its modules, timm's ConvNeXt for the
high-resolution tower, and the key lists that users report (JIA-Lab-research/MGM issue 103).
"""

from __future__ import annotations

import re

_CONVNEXT = (
    (r"stem\.0\.", "embeddings.patch_embeddings."),
    (r"stem\.1\.", "embeddings.layernorm."),
    (r"(stages\.\d+)\.downsample\.", r"\1.downsampling_layer."),
    (r"(stages\.\d+)\.blocks\.(\d+)\.conv_dw\.", r"\1.layers.\2.dwconv."),
    (r"(stages\.\d+)\.blocks\.(\d+)\.norm\.", r"\1.layers.\2.layernorm."),
    (r"(stages\.\d+)\.blocks\.(\d+)\.mlp\.fc1\.", r"\1.layers.\2.pwconv1."),
    (r"(stages\.\d+)\.blocks\.(\d+)\.mlp\.fc2\.", r"\1.layers.\2.pwconv2."),
    (r"(stages\.\d+)\.blocks\.(\d+)\.gamma$", r"\1.layers.\2.layer_scale_parameter"),
)
_LANGUAGE = (
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(vlm_uni_(query|aux|val)_projector\.)", r"model.patch_info_mining.\1"),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"(lm_head\.)", r"\1"),
)
# Not weights: buffers that old transformers versions saved.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)")
# The rest of CLIP: its text side, and the heads after the towers.
_UNUSED_CLIP = re.compile(r"(text_model|text_projection|visual_projection|logit_scale)(\.|$)")
_UNUSED_OPENCLIP = re.compile(
    r"(visual\.(head|trunk\.(head|norm_pre))|text|transformer|token_embedding|positional_embedding|ln_final"
    r"|text_projection|logit_scale|attn_mask)(\.|$)"
)
HIGH_RES, LOW_RES = "model.high_res_tower.", "model.vision_tower."


class UnexpectedName(ValueError):
    """A tensor that no part of the model has a place for."""


def rename_checkpoint(name: str) -> str | None:
    """A name of MGM's own checkpoint, which may hold its towers too; None for what is not a weight."""
    if _BUFFERS.fullmatch(name):
        return None
    if rest := _after(name, "model.vision_tower_aux.vision_"):
        return HIGH_RES + _apply(_CONVNEXT, rest, name)
    if rest := _after(name, "model.vision_tower.vision_tower."):
        return LOW_RES + rest.removeprefix("vision_model.")
    return _apply(_LANGUAGE, name, name)


def rename_clip(name: str) -> str | None:
    """A name of a CLIP checkpoint in Hugging Face format; None for what Mini-Gemini does not use."""
    if _BUFFERS.fullmatch(name) or _UNUSED_CLIP.match(name):
        return None
    if rest := _after(name, "vision_model."):
        return LOW_RES + rest
    raise UnexpectedName(name)


def rename_openclip(name: str) -> str | None:
    """A name of an OpenCLIP checkpoint with a ConvNeXt of timm; None for what Mini-Gemini does not use."""
    if _UNUSED_OPENCLIP.match(name):
        return None
    if rest := _after(name, "visual.trunk."):
        return HIGH_RES + _apply(_CONVNEXT, rest, name)
    raise UnexpectedName(name)


def _after(name: str, prefix: str) -> str:
    """What follows the prefix; empty where the name does not begin with it."""
    return name[len(prefix) :] if name.startswith(prefix) else ""


def _apply(rules: tuple[tuple[str, str], ...], name: str, whole_name: str) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    raise UnexpectedName(whole_name)
