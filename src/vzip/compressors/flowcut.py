"""FlowCut: patches dropped between the layers of the vision tower, step by step (NeurIPS 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vzip.ops.attention import at_least_float32, cls_attention, mean_keys

from .base import PresentPatches
from .plan import LayerState, TowerPlan, TowerPruner, TowerUse
from .vision import VisionShape


@dataclass(frozen=True)
class FlowCut(PresentPatches):
    """Drops patches after every second layer of the vision tower, until ``budget.num_tokens`` are left; CLS as well.

    A patch is judged in each layer by CLS's attention to it and by how like CLS's value its own is (both as shares),
    times the length of its value; the average with the layer before's judgement counts. How many go follows from
    how evenly CLS attends (see ``FlowPruner``), so the layers' work depends on the image, the count of tokens does not.

    Other than in the published code (TungChintao/FlowCut @ a2ecd24), where a batch shares the largest of its images'
    cuts, an image's result is its own; all is computed in float32; and of an image in crops each crop keeps the whole
    budget, where theirs keeps half of it and then drops more inside the language model, by the question.
    The host waits for the number of patches at every cut.
    """

    tower_use: ClassVar[TowerUse] = "pruned"

    def plan(self, shape: VisionShape) -> TowerPlan:
        return TowerPlan(pruner=FlowPruner(self.num_tokens(shape)))


@dataclass(frozen=True)
class FlowPruner(TowerPruner):
    """FlowCut's rule.

    Cuts are two layers apart, the last one a layer before the end. A cut with r layers to go until the last drops
    (surplus / sqrt(r)) * (1 - e ** 2) patches, rounded to the nearest number (halves to even), where e is the entropy
    of CLS's attention over the patches, relative to that of an even one.
    """

    num_tokens: int

    def cuts(self, num_layers: int) -> Sequence[int]:
        last = max(num_layers - 2, 0)
        return range(last % 2, last + 1, 2)

    def judge(self, state: LayerState) -> tuple[Tensor, Tensor]:
        attention = _share(cls_attention(state.queries, state.keys, state.num_heads, state.scale, state.shown))
        likeness = _share(cls_attention(state.values, state.values, state.num_heads, 1.0, state.shown))
        length = mean_keys(state.values, state.num_heads)[:, 1:].abs().sum(dim=-1)
        score = (attention + likeness) * length
        if state.carried is not None:
            score = (state.carried + score) / 2
        count = at_least_float32(state.num_patches)
        evenness = torch.special.entr(attention).sum(dim=-1) / count.clamp(min=2).log()
        layers_to_go = max(self.cuts(state.num_layers)[-1] - state.index, 1)
        surplus = (count - self.num_tokens).clamp(min=0)
        dropped = (surplus / math.sqrt(layers_to_go) * (1 - evenness**2)).round().long()
        return score, dropped


def _share(attention: Tensor) -> Tensor:
    return functional.normalize(attention, p=1, dim=-1)
