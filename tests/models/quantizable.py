"""Models in sizes that bitsandbytes quantizes."""

from __future__ import annotations

from typing import Any

import torch

from vzip.models.weights import from_config as fresh


def blocks_of_64(model: torch.nn.Module) -> Any:
    """The model in bfloat16, its language model in sizes that bitsandbytes' blocks of 64 divide."""
    config = model.config
    config.text_config.hidden_size, config.text_config.intermediate_size = 64, 128
    config.text_config.head_dim = 16
    torch.manual_seed(0)
    return fresh.new_model(config).to(torch.bfloat16)
