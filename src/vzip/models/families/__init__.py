"""The families served. A new one is a file here and an entry in ``ADAPTERS``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from vzip.errors import UnsupportedModelError, nearest

from .base import Adapter, VisualInputs
from .internvl.adapter import InternVlAdapter
from .llava.adapter import LlavaAdapter
from .llava_next.adapter import LlavaNextAdapter
from .llava_onevision.adapter import LlavaOnevisionAdapter
from .mini_gemini.adapter import MiniGeminiAdapter
from .options import FamilyOptions
from .original.checkpoint import OriginalCheckpoint
from .qwen2_5_vl.adapter import Qwen2_5VlAdapter
from .qwen3_vl.adapter import Qwen3VlAdapter
from .video_llava.adapter import PublishedVideoLlavaAdapter, VideoLlavaAdapter

# Subclasses before their base: a Mini-Gemini model is a LLaVA model to isinstance, a published Video-LLaVA a stock one.
ADAPTERS: tuple[type[Adapter], ...] = (
    MiniGeminiAdapter,
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    PublishedVideoLlavaAdapter,
    VideoLlavaAdapter,
    Qwen2_5VlAdapter,
    Qwen3VlAdapter,
    InternVlAdapter,
)

# What any family's processor may return beside the text.
INPUT_NAMES = frozenset(name for adapter in ADAPTERS for name in adapter.input_names)

__all__ = [
    "ADAPTERS",
    "INPUT_NAMES",
    "Adapter",
    "FamilyOptions",
    "InternVlAdapter",
    "LlavaAdapter",
    "LlavaNextAdapter",
    "LlavaOnevisionAdapter",
    "MiniGeminiAdapter",
    "PublishedVideoLlavaAdapter",
    "Qwen2_5VlAdapter",
    "Qwen3VlAdapter",
    "VideoLlavaAdapter",
    "VisualInputs",
    "adapter_class_for_config",
    "adapter_for_model",
    "original_checkpoint",
]


def _unsupported(name: str) -> UnsupportedModelError:
    names = [adapter.model_class.__name__ for adapter in ADAPTERS]
    return UnsupportedModelError(
        f"Model class {name} has no adapter{nearest(name, names)}; supported are {', '.join(names)}. A new family is a"
        " folder in vzip/models/families."
    )


def original_checkpoint(directory: Path) -> OriginalCheckpoint | None:
    """The checkpoint if it is in its authors' layout, None where it is in Hugging Face's.

    Raises:
        ValueError: its config.json cannot be read.
    """
    found = (adapter.original(directory) for adapter in ADAPTERS)
    return next((original for original in found if original is not None), None)


def adapter_for_model(model: nn.Module, options: FamilyOptions | None = None) -> Adapter:
    """The adapter for a loaded Hugging Face model, found by its class.

    Raises:
        ConfigError: options that the family does not have.
        UnsupportedModelError: no adapter for this class, its vision tower or its settings.
    """
    for adapter in ADAPTERS:
        if isinstance(model, adapter.model_class):
            return adapter(model, options)
    raise _unsupported(type(model).__name__)


def adapter_class_for_config(config: Any) -> type[Adapter]:
    """The adapter class for a Hugging Face configuration, before any weights are read.

    Raises:
        UnsupportedModelError: no adapter, or a checkpoint written by other code than transformers.
    """
    wanted = list(config.architectures or [])
    for adapter in ADAPTERS:
        if type(config) is not adapter.model_class.config_class:
            continue
        if wanted and adapter.model_class.__name__ not in wanted:
            # The original LLaVA repositories call their format "llava" too; their weights have other names.
            raise UnsupportedModelError(
                f"config.json names the architecture {', '.join(wanted)}, which transformers does not load as"
                f" {adapter.model_class.__name__}. Use the converted checkpoint (its name usually ends in -hf, such as"
                " llava-hf/llava-1.5-7b-hf)."
            )
        adapter.check_config(config)
        return adapter
    raise _unsupported(wanted[0] if wanted else type(config).__name__)
