"""A prompt at a cut with attention, keys and embeddings written by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from vzip.pruners import PromptState


class State(PromptState):
    """``owner``: the image of each token, -1 text; the rest as a test needs it, of any layer."""

    def __init__(
        self,
        layer: int,
        owner: list[int],
        attention: Any = None,  # [H, L, L]
        keys: Any = None,  # [G, L, d]
        hidden: Any = None,
        embeds: Any = None,
        turn: float = 0.0,  # degrees of one frequency's angle from token to token
    ) -> None:
        index = torch.tensor(owner)
        rows = torch.arange(len(owner)).float()[:, None] if hidden is None else torch.tensor(hidden).float()
        super().__init__(
            layer=layer,
            decoder=SimpleNamespace(norm=lambda x: x, layers=range(8)),  # type: ignore[arg-type]
            hidden=rows,
            visual_index=index,
            embeds=rows if embeds is None else torch.tensor(embeds).float(),
            embeds_visual_index=index,
            text=(index == -1).nonzero()[:, 0],
            images=[(index == image).nonzero()[:, 0] for image in sorted({*owner} - {-1})],
            read_layer=lambda _: None,  # type: ignore[arg-type, return-value]
        )
        self.attention = torch.tensor(attention or [[[0.0]]]).float()
        self.given_keys = torch.tensor(keys or [[[0.0]]]).float()
        angle = torch.arange(len(owner))[:, None] * math.radians(turn) * torch.ones(1, 2)
        self.embeddings = angle.cos(), angle.sin()
        self.layers_read: list[int] = []

    def attention_rows(self, layer: int, query_index: Any) -> torch.Tensor:
        self.layers_read.append(layer)
        return self.attention[:, torch.as_tensor(query_index)]

    def keys(self, layer: int) -> torch.Tensor:
        self.layers_read.append(layer)
        return self.given_keys

    def position_embeddings(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers_read.append(layer)
        return self.embeddings


def rows(last: dict[int, list[float]], length: int) -> list[list[float]]:
    """An attention map of which some rows are given, the rest zeros."""
    return [last.get(row, [0.0] * length) for row in range(length)]
