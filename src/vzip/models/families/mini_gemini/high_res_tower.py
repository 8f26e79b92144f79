"""The high-resolution vision tower: a ConvNeXt whose four stages are joined at the first one's resolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ConvNextConfig, ConvNextPreTrainedModel
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextStage


class HighResTower(ConvNextPreTrainedModel):
    """ConvNeXt without its head, as MGM's ``OpenCLIPVisionTower``."""

    # It has no attention, so that every implementation chosen for the whole model is right for it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        widths = list(config.hidden_sizes)
        # Not transformers' encoder: it is a model of its own that refuses attention implementations.
        self.stages = nn.ModuleList(
            ConvNextStage(config, before, width, stride=1 if number == 0 else 2, depth=depth)
            for number, (before, width, depth) in enumerate(
                zip([widths[0], *widths], widths, config.depths, strict=False)
            )
        )
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features of all stages.

        Args:
            pixel_values: ``[B, 3, h, w]`` of any floating type, on any device.

        Returns:
            ``[B, c, h / 4, w / 4]``, c the sum of the stages' channels; later stages are enlarged bilinearly, in
            float32 as in the published code.
        """
        weight = self.embeddings.patch_embeddings.weight
        if weight.device.type != "meta":  # accelerate parks offloaded weights on meta and moves inputs itself
            pixel_values = pixel_values.to(weight.device)
        hidden = self.embeddings(pixel_values.to(weight.dtype))
        joined: list[Tensor] = []
        for stage in self.stages:
            hidden = stage(hidden)
            if not joined:
                joined.append(hidden)
                continue
            wide = hidden if hidden.dtype == torch.float64 else hidden.float()
            wide = functional.interpolate(wide, size=joined[0].shape[2:], mode="bilinear", align_corners=False)
            joined.append(wide.to(hidden.dtype))
        return torch.cat(joined, dim=1)
