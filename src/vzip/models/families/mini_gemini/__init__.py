"""Mini-Gemini (MGM), which transformers has no class for: two vision towers, patch info mining, projector, Vicuna."""

from .config import MiniGeminiConfig
from .high_res_tower import HighResTower
from .mining import PatchInfoMining
from .modeling import MiniGeminiForConditionalGeneration, MiniGeminiModel

__all__ = [
    "HighResTower",
    "MiniGeminiConfig",
    "MiniGeminiForConditionalGeneration",
    "MiniGeminiModel",
    "PatchInfoMining",
]
