"""Compression methods and controls; torch only. A new method is a new file here and a config in configs/compressor."""

from .base import Budgeted, ChosenUnits, CompressedTokens, Compressor, Selection, TopScores
from .budget import FractionBudget, TokenBudget
from .cdpruner import CDPruner
from .controls import (
    ContextualOnly,
    DominantOnly,
    Identity,
    LeastAttended,
    Pooled,
    RandomTokens,
    Resized,
    UniformTokens,
    ZeroImage,
)
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .flowcut import FlowCut
from .holov import HoloV
from .mmtok import MMTok
from .prumerge import PruMerge, PruMergePlus
from .prunesid import PruneSid
from .scope import Scope
from .vision import Signal, VisionOutput, VisionShape
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vscan import VScan
from .wrappers import MergeDropped, WithoutOutliers
from .zooprune import ZooPrune

__all__ = [
    "Budgeted",
    "CDPruner",
    "ChosenUnits",
    "CompressedTokens",
    "Compressor",
    "ContextualOnly",
    "DivPrune",
    "DominantOnly",
    "FasterVLM",
    "FlowCut",
    "FractionBudget",
    "HoloV",
    "Identity",
    "LeastAttended",
    "MMTok",
    "MergeDropped",
    "Pooled",
    "PruMerge",
    "PruMergePlus",
    "PruneSid",
    "RandomTokens",
    "Resized",
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
    "WithoutOutliers",
    "ZeroImage",
    "ZooPrune",
]
