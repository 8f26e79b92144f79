"""Pruners drop visual tokens inside the language model. A new one is a new file here and a config in configs/pruner."""

from .base import Cut, Decoder, PromptState, Pruner
from .dart import DART
from .fastv import FastV
from .pyramiddrop import PyramidDrop, VScanStage2
from .sparsevlm import SparseVLM, SparseVLMByRank, SparseVLMPlus

__all__ = [
    "DART",
    "Cut",
    "Decoder",
    "FastV",
    "PromptState",
    "Pruner",
    "PyramidDrop",
    "SparseVLM",
    "SparseVLMByRank",
    "SparseVLMPlus",
    "VScanStage2",
]
