"""Weight names: from the published checkpoints (MGM, OpenCLIP, CLIP) to ``MiniGeminiForConditionalGeneration``.

Sources: MGM 769820c ``mgm_arch.py`` and ``openclip_encoder.py`` for its modules, timm's ConvNeXt for the
high-resolution tower, and the key lists that users report (JIA-Lab-research/MGM issue 103).
"""

from __future__ import annotations

import re

from ..original.names import LANGUAGE, TOWER, UnexpectedName, after, apply, is_buffer

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
    *LANGUAGE,
    (r"model\.(vlm_uni_(query|aux|val)_projector\.)", r"model.patch_info_mining.\1"),
)
_UNUSED_OPENCLIP = re.compile(
    r"(visual\.(head|trunk\.(head|norm_pre))|text|transformer|token_embedding|positional_embedding|ln_final"
    r"|text_projection|logit_scale|attn_mask)(\.|$)"
)
HIGH_RES, LOW_RES = "model.high_res_tower.", TOWER


def rename_checkpoint(name: str) -> str | None:
    """A name of MGM's own checkpoint, which may hold its towers too; None for what is not a weight."""
    if is_buffer(name):
        return None
    if rest := after(name, "model.vision_tower_aux.vision_"):
        return HIGH_RES + apply(_CONVNEXT, rest, name)
    if rest := after(name, "model.vision_tower.vision_tower."):
        return LOW_RES + rest.removeprefix("vision_model.")
    return apply(_LANGUAGE, name, name)


def rename_openclip(name: str) -> str | None:
    """A name of an OpenCLIP checkpoint with a ConvNeXt of timm; None for what Mini-Gemini does not use."""
    if _UNUSED_OPENCLIP.match(name):
        return None
    if rest := after(name, "visual.trunk."):
        return HIGH_RES + apply(_CONVNEXT, rest, name)
    raise UnexpectedName(name)
