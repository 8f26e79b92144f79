"""Pruners drop visual tokens inside the language model. A new one is a new file here and a config in configs/pruner."""

from .base import Cut, Decoder, PromptState, Pruner
from .fastv import FastV

__all__ = ["Cut", "Decoder", "FastV", "PromptState", "Pruner"]
