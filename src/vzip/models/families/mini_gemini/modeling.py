"""Mini-Gemini as a Hugging Face model: LLaVA with a second tower, mined before the projector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .config import MiniGeminiConfig
from .high_res_tower import HighResTower
from .mining import PatchInfoMining


class MiniGeminiModel(LlavaModel):
    """Both towers, mining, projector and language model, without the head."""

    config_class = MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig) -> None:
        super().__init__(config)
        self.high_res_tower = HighResTower(config.high_res_config)
        num_channels = sum(config.high_res_config.hidden_sizes)
        self.patch_info_mining = PatchInfoMining(config.vision_config.hidden_size, num_channels)
        self.post_init()

    def low_res(self, pixel_values: Tensor) -> Tensor:
        """The image at the low-resolution tower's size, ``[B, 3, h, w]``: bilinear, as MGM's evaluation scripts."""
        side = self.config.vision_config.image_size
        weight = next(self.vision_tower.parameters())
        if weight.device.type != "meta":  # scaled where the tower is: another device would round differently
            pixel_values = pixel_values.to(weight.device)
        wide = pixel_values if pixel_values.dtype == torch.float64 else pixel_values.float()
        return functional.interpolate(wide, size=(side, side), mode="bilinear", align_corners=False)

    def mine(self, patches: Tensor, highres: Tensor) -> Tensor:
        """Patch tokens ``[B, P, D]`` with what they find in the features ``[B, c, H, W]`` of the other tower added."""
        return patches + self.patch_info_mining(patches, highres.to(patches.device, patches.dtype))

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Visual tokens of the uncompressed model.

        Args:
            pixel_values: ``[images, 3, high_res_image_size, high_res_image_size]``.
            **kwargs: LLaVA's overrides of the checkpoint's settings; those given must be None.

        Returns:
            ``pooler_output``: for each image ``[P, d_text]``.

        Raises:
            ValueError: an override is given.
        """
        given = [name for name, value in kwargs.items() if value is not None and name != "return_dict"]
        if given:
            raise ValueError(f"Mini-Gemini has no {', '.join(given)} beside its configuration's.")
        output = self.vision_tower(self.low_res(pixel_values), output_hidden_states=True)
        patches = output.hidden_states[self.config.vision_feature_layer][:, 1:]  # CLS owns no window
        features = self.multi_modal_projector(self.mine(patches, self.high_res_tower(pixel_values)))
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state, pooler_output=list(features), hidden_states=output.hidden_states
        )


class MiniGeminiForConditionalGeneration(LlavaForConditionalGeneration):
    """Mini-Gemini with its language head; takes ``pixel_values`` or ``inputs_embeds`` as LLaVA's class does."""

    config_class = MiniGeminiConfig
    _no_split_modules: ClassVar = ["PatchInfoMining"]  # it reads its projections' weights directly

    def __init__(self, config: MiniGeminiConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)  # LLaVA's own would build LlavaModel first
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoModelForImageTextToText.register(MiniGeminiConfig, MiniGeminiForConditionalGeneration, exist_ok=True)
