"""Small CLIP and SigLIP towers as checkpoints of their own; one has a sink whose attention is known by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch
from tests.tiny import IMAGE_SIZE, NUM_PATCHES, sharpen, vision_config
from transformers import CLIPImageProcessor, CLIPVisionModel, SiglipImageProcessor, SiglipVisionModel

SINK = 3 * 8 + 5  # row 3, column 5 of 8 x 8
SINK_SHARE = 0.9  # of all rows, CLS among them


def tower(kind: Literal["clip", "siglip"], num_layers: int = 4, eager: bool = False) -> torch.nn.Module:
    """Random, of 64 patches, with peaked attention."""
    torch.manual_seed(5)
    config = vision_config(kind, num_layers)
    config._attn_implementation = "eager" if eager else "sdpa"
    model = (CLIPVisionModel if kind == "clip" else SiglipVisionModel)(config).eval()
    sharpen(model, kind)
    return model


@torch.no_grad()
def with_sink(first_layer: int, num_layers: int = 5) -> CLIPVisionModel:
    """A random CLIP tower all of whose tokens attend evenly in the layers before ``first_layer`` (1 is the first one).

    From it on ``SINK`` has ``SINK_SHARE`` of every token's attention and the 64 others have the same each.

    How: channel 0 of the residual stream is 0 everywhere but at the sink, whose position embedding is that channel
    alone and so large that the image does not matter there. Every row's mean is 0 over channels, so that LayerNorm
    keeps the 0. A layer's queries are constant, its keys read channel 0, and it writes nothing back.
    """
    model = tower("clip", num_layers)
    embeddings, width = model.embeddings, model.config.hidden_size
    for weight in (embeddings.class_embedding, embeddings.patch_embedding.weight):
        weight.mul_(20)
        rows = weight if weight.ndim == 1 else weight.flatten(1)
        rows[0] = 0
        rows[1:] -= rows[1:].mean(dim=0)
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1 + SINK, 0] = 1e6
    for number, layer in enumerate(model.encoder.layers):
        attention = layer.self_attn
        for part in (attention.q_proj, attention.k_proj, attention.out_proj, layer.mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
        if number + 1 >= first_layer:
            # A row of one large channel, standardised: (1 - 1/D) / sqrt(1/D - 1/D^2) = sqrt(D - 1).
            logit = math.log(SINK_SHARE / (1 - SINK_SHARE) * NUM_PATCHES)
            head = width // attention.num_heads
            attention.q_proj.bias[::head] = 1.0
            attention.k_proj.weight[::head, 0] = logit / (math.sqrt(width - 1) * attention.scale)
    return model


def save(model: torch.nn.Module, folder: Path) -> Path:
    """With an image processor of its size."""
    model.save_pretrained(folder)
    if isinstance(model, CLIPVisionModel):
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    else:
        processor = SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    processor.save_pretrained(folder)
    return folder
