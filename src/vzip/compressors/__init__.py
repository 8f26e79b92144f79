"""Compression methods and controls; torch only. A new method is a new file here and a config in configs/compressor."""

from .base import CompressedTokens, Compressor, TokenBudget, VisionOutput
from .controls import ContextualOnly, DominantOnly, Identity, RandomTokens, UniformTokens
from .visionzip import VisionZip

__all__ = [
    "CompressedTokens",
    "Compressor",
    "ContextualOnly",
    "DominantOnly",
    "Identity",
    "RandomTokens",
    "TokenBudget",
    "UniformTokens",
    "VisionOutput",
    "VisionZip",
]
