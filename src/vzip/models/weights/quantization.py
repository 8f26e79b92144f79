"""Quantized language models through bitsandbytes; tower and projector stay in the compute dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from vzip.errors import ConfigError
from vzip.installed import check_quantization

QUANTIZATIONS = ("8bit", "4bit")


def quantization_config(
    quantization: str, compute_dtype: torch.dtype, unquantized: Sequence[str]
) -> BitsAndBytesConfig:
    """The bitsandbytes settings for ``8bit`` (LLM.int8) or ``4bit`` (NF4): linear layers of the language model only.

    Args:
        quantization: ``8bit`` or ``4bit``.
        compute_dtype: of everything that is not quantized, and of 4-bit products (8-bit ones are float16 always).
        unquantized: modules left alone, see ``modules_outside``: selection reads the tower's projections, and the
            projector may be trained.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    check_quantization(quantization)
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(unquantized))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=list(unquantized),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
    )


def compute_dtype(dtype: str | torch.dtype, config: Any) -> torch.dtype:
    """The dtype asked for, or the checkpoint's own for ``auto`` (float32 where it names none).

    Raises:
        ConfigError: the checkpoint is quantized already.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            "model.quantization: the checkpoint is quantized already (its config.json has a quantization_config); set"
            " model.quantization=null to load it as it is, or take the unquantized checkpoint."
        )
    if isinstance(dtype, torch.dtype):
        return dtype
    return config.dtype or torch.float32


def modules_outside(model: nn.Module, part: nn.Module) -> list[str]:
    """Names of the topmost modules that hold nothing of a part: what to leave alone so that only the part changes."""
    part_name = next(name for name, module in model.named_modules() if module is part)
    steps = part_name.split(".")
    above = {".".join(steps[:count]) for count in range(len(steps) + 1)}
    parents = above - {part_name}
    return [name for name, _ in model.named_modules() if name not in above and name.rpartition(".")[0] in parents]
