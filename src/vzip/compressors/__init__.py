"""Compression methods and controls; torch only. A new method is a new file here and a config in configs/compressor."""

from .base import Budgeted, ChosenUnits, CompressedTokens, Compressor, FractionBudget, Selection, TokenBudget, TopScores
from .controls import (
    ContextualOnly,
    DominantOnly,
    Identity,
    LeastAttended,
    Pooled,
    RandomTokens,
    UniformTokens,
    ZeroImage,
)
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .holov import HoloV
from .prumerge import PruMerge, PruMergePlus
from .prunesid import PruneSid
from .scope import Scope
from .vision import Signal, VisionOutput, VisionShape
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vscan import VScan
from .zooprune import ZooPrune

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
    "HoloV",
    "Identity",
    "LeastAttended",
    "Pooled",
    "PruMerge",
    "PruMergePlus",
    "PruneSid",
    "RandomTokens",
    "Scope",
    "Selection",
    "Signal",
    "TokenBudget",
    "TopScores",
    "UniformTokens",
    "VScan",
    "VisPruner",
    "VisionOutput",
    "VisionShape",
    "VisionZip",
    "ZeroImage",
    "ZooPrune",
]
