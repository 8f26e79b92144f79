"""A LLaVA of Hugging Face taken apart as vLLM's own class has it: one projection for queries, keys and values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """What vLLM's ``MMEncoderAttention`` is called with: queries, keys and values ``[N, L, H * d]``, split already."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (query, key, value)]
        return functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """vLLM's ``CLIPAttention``, of one process that has the heads ``start:stop``."""

    def __init__(self, own: Any, num_heads: int, part: slice, num_parts: int) -> None:
        super().__init__()
        width = own.q_proj.out_features // num_heads
        rows = slice(part.start * width, part.stop * width)
        projections = (own.q_proj, own.k_proj, own.v_proj)
        self.weight = torch.cat([each.weight[rows] for each in projections])
        self.bias = torch.cat([each.bias[rows] for each in projections])
        self.out_weight, self.out_bias = own.out_proj.weight[:, rows], own.out_proj.bias
        self.attn, self.scale, self.tp_size = Attention(part.stop - part.start), width**-0.5, num_parts

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        queries, keys, values = functional.linear(hidden_states, self.weight, self.bias).chunk(3, dim=-1)
        return functional.linear(self.attn(queries, keys, values), self.out_weight), None


class Layer(nn.Module):
    """vLLM's ``CLIPEncoderLayer``, or ``SiglipEncoderLayer``, which returns a pair.

    The parts of several processes are in one, so that their sum needs no network.
    """

    def __init__(self, own: Any, num_heads: int, num_parts: int) -> None:
        super().__init__()
        size = num_heads // num_parts
        parts = [slice(number * size, (number + 1) * size) for number in range(num_parts)]
        self.parts = nn.ModuleList([SelfAttention(own.self_attn, num_heads, part, num_parts) for part in parts])
        self.self_attn = self.parts[0]
        self.own = (own,)

    def forward(self, hidden_states: Tensor) -> Any:
        own, normed = self.own[0], self.own[0].layer_norm1(hidden_states)
        # The process whose attention is tapped is the last, when the others' heads can be gathered.
        outputs = [part(normed)[0] for part in reversed(self.parts)]
        hidden_states = hidden_states + sum(outputs) + self.self_attn.out_bias
        hidden_states = hidden_states + own.mlp(own.layer_norm2(hidden_states))
        return (hidden_states, None) if "Siglip" in type(own).__name__ else hidden_states


def like_vllm(model: Any, num_layers: int, num_parts: int = 1) -> SimpleNamespace:
    """The parts by vLLM's names, the tower of so many layers."""
    tower, config = model.model.vision_tower, model.config
    inner = getattr(tower, "vision_model", tower)
    transformer = nn.Module()
    transformer.embeddings = inner.embeddings
    if hasattr(inner, "pre_layrnorm"):
        transformer.pre_layrnorm = inner.pre_layrnorm
    transformer.encoder = nn.Module()
    layers = [
        Layer(own, config.vision_config.num_attention_heads, num_parts) for own in inner.encoder.layers[:num_layers]
    ]
    transformer.encoder.layers = nn.ModuleList(layers)
    parts = nn.Module()
    parts.vision_model = transformer
    return SimpleNamespace(
        config=config,
        vision_tower=parts,
        multi_modal_projector=model.model.multi_modal_projector,
        image_newline=getattr(model.model, "image_newline", None),
    )
