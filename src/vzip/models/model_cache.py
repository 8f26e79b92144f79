"""One loaded model for many runs: the jobs of a sweep differ in budget and method far more often than in the model."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Mapping
from typing import Any

import torch

from vzip.compressors.base import Compressor
from vzip.pruners.base import Pruner

from .load import load_vlm
from .towers.cache import TowerCache
from .vlm import CompressedVlm

_LOG = logging.getLogger(__name__)


class ModelKeeper:
    """Loads a model, or hands out the last one if it is asked for again.

    At most one model is held: before another is loaded the last one is let go.
    """

    def __init__(self) -> None:
        self._arguments: dict[str, Any] = {}
        self._vlm: CompressedVlm | None = None

    def load(
        self,
        arguments: Mapping[str, Any],
        compressor: Compressor,
        tower_cache_gib: float = 0.0,
        pruner: Pruner | None = None,
    ) -> CompressedVlm:
        """The model with this compressor and pruner; it is the caller's until the next call.

        Args:
            arguments: keyword arguments of ``load_vlm``, compressor and pruner left out. A model is the same if all
                are.
            compressor, pruner: the methods.
            tower_cache_gib: memory for the vision tower's outputs (see ``TowerCache``); 0 keeps none. Outputs kept
                under the same limit for earlier runs of the model stay.

        Raises:
            what ``load_vlm`` raises; ConfigError for a compressor that does not fit.
        """
        if self._vlm is None or dict(arguments) != self._arguments:
            self.release()
            _LOG.info("loading %s", arguments["name_or_path"])
            self._vlm = load_vlm(**arguments, compressor=compressor, pruner=pruner)
            self._arguments = copy.deepcopy(dict(arguments))
        self._vlm.compressor, self._vlm.pruner = compressor, pruner
        _set_tower_cache(self._vlm, tower_cache_gib)
        return self._vlm

    def release(self) -> None:
        """Lets the model go and returns its memory."""
        if self._vlm is not None:
            self._vlm = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _set_tower_cache(vlm: CompressedVlm, max_gib: float) -> None:
    adapter = vlm.adapter
    if max_gib > 0 and "tower" in vlm.compiled_parts:
        _LOG.warning(
            "model.compile=tower: what a graph computes is not kept, so eval.tower_cache_gib does nothing here"
        )
        max_gib = 0
    if max_gib == 0:
        adapter.tower_cache = None
    elif adapter.tower_cache is None or adapter.tower_cache.max_gib != max_gib:
        adapter.tower_cache = TowerCache(max_gib)
    if adapter.tower_cache is not None:
        adapter.tower_cache.start_counting()


# The process's own: Hydra calls the function of every job of a sweep anew.
KEEPER = ModelKeeper()
