"""Mini-Gemini under its public name; the family's own folder is ``vzip.models.families.mini_gemini``."""

from .families.mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration, MiniGeminiModel, PatchInfoMining

__all__ = ["MiniGeminiConfig", "MiniGeminiForConditionalGeneration", "MiniGeminiModel", "PatchInfoMining"]
