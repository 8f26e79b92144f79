"""Compression methods and controls; torch only. A new method is a new file here and a config in configs/compressor."""

from .base import Budgeted, ChosenUnits, CompressedTokens, Compressor, FractionBudget, Selection, TokenBudget, TopScores
from .controls import ContextualOnly, DominantOnly, Identity, RandomTokens, UniformTokens
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .vision import Signal, VisionOutput, VisionShape
from .visionzip import VisionZip
from .vscan import VScan

__all__ = [
    "Budgeted",
    "ChosenUnits",
    "CompressedTokens",
    "Compressor",
    "ContextualOnly",
    "DivPrune",
    "DominantOnly",
    "FasterVLM",
    "FractionBudget",
    "Identity",
    "RandomTokens",
    "Selection",
    "Signal",
    "TokenBudget",
    "TopScores",
    "UniformTokens",
    "VScan",
    "VisionOutput",
    "VisionShape",
    "VisionZip",
]
