"""LanguageBind's video tower: CLIP whose layers first let each patch attend to itself in the other frames.

Shapes: B clips, T = ``CLIP_FRAMES`` frames of each, N rows of a frame (CLS and patches), D the width. Source:
PKU-YuanGroup/Video-LLaVA 984e65b, ``languagebind/video/modeling_video.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

CLIP_FRAMES = 8  # a longer video is several clips that know nothing of each other


class TemporalAttention(nn.Module):
    """Attention over frames, ``[B N, T, D] -> [B N, T, D]``, without a mask."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        heads = [
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        attended = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        output: Tensor = self.out_proj(attended)
        return output


class TemporalEncoderLayer(CLIPEncoderLayer):
    """CLIP's layer after a temporal step. Frames of a clip are neighbours: ``[B T, N, D] -> [B T, N, D]``."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.temporal_embedding = nn.Parameter(torch.randn(1, CLIP_FRAMES, config.hidden_size) * 0.02)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_attn = TemporalAttention(config)

    def before_attention(self, hidden_states: Tensor) -> Tensor:
        """The temporal step, after which it is CLIP's layer."""
        num_rows = hidden_states.shape[1]
        by_row = hidden_states.unflatten(0, (-1, CLIP_FRAMES)).transpose(1, 2).flatten(0, 1)
        by_row = by_row + self.temporal_embedding
        by_row = by_row + self.temporal_attn(self.temporal_layer_norm1(by_row))
        return by_row.unflatten(0, (-1, num_rows)).transpose(1, 2).flatten(0, 1)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(self.before_attention(hidden_states), attention_mask, **kwargs)
        return output


class LanguageBindVideoTower(CLIPVisionModel):
    """The tower; takes ``[B T, 3, h, w]``."""

    _no_split_modules: ClassVar = ["CLIPVisionEmbeddings", "TemporalEncoderLayer"]

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.encoder.layers = nn.ModuleList([TemporalEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()
