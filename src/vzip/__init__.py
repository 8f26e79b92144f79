"""vzip: visual token compression for vision-language models, wrapped around Hugging Face and never editing it.

Public names load on first use, so that `import vzip` costs nothing and a machine without transformers can still use
the compressors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compressors import (
        CDPruner,
        CompressedTokens,
        Compressor,
        ContextualOnly,
        DivPrune,
        DominantOnly,
        FasterVLM,
        FlowCut,
        FractionBudget,
        HoloV,
        Identity,
        LeastAttended,
        MergeDropped,
        MMTok,
        Pooled,
        PruMerge,
        PruMergePlus,
        PruneSid,
        RandomTokens,
        Resized,
        Scope,
        TokenBudget,
        UniformTokens,
        VisionOutput,
        VisionZip,
        VisPruner,
        VScan,
        WithoutOutliers,
        ZeroImage,
        ZooPrune,
    )
    from .models.freeze import train_projector_only
    from .models.load import load_vlm
    from .models.vlm import CompressedVlm
    from .pruners import (
        DART,
        FastV,
        Pruner,
        PyramidDrop,
        SparseVLM,
        SparseVLMByRank,
        SparseVLMPlus,
        VScanStage2,
    )
    from .train.trainer import TrainerCollator

__version__ = "0.1.0"

__all__ = [
    "DART",
    "CDPruner",
    "CompressedTokens",
    "CompressedVlm",
    "Compressor",
    "ContextualOnly",
    "DivPrune",
    "DominantOnly",
    "FastV",
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
    "Pruner",
    "PyramidDrop",
    "RandomTokens",
    "Resized",
    "Scope",
    "SparseVLM",
    "SparseVLMByRank",
    "SparseVLMPlus",
    "TokenBudget",
    "TrainerCollator",
    "UniformTokens",
    "VScan",
    "VScanStage2",
    "VisPruner",
    "VisionOutput",
    "VisionZip",
    "WithoutOutliers",
    "ZeroImage",
    "ZooPrune",
    "load_vlm",
    "train_projector_only",
]

_HOME_OF = {name: ".compressors" for name in __all__}
_HOME_OF["CompressedVlm"] = ".models.vlm"
_HOME_OF["load_vlm"] = ".models.load"
_HOME_OF["train_projector_only"] = ".models.freeze"
_HOME_OF["TrainerCollator"] = ".train.trainer"
_PRUNERS = ("DART", "FastV", "Pruner", "PyramidDrop", "SparseVLM", "SparseVLMByRank", "SparseVLMPlus", "VScanStage2")
_HOME_OF |= {name: ".pruners" for name in _PRUNERS}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vzip' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
