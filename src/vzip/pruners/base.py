"""What a pruner sees and returns, and what it needs of a language model.

A pruner drops tokens at the input of some of the language model's layers. To add a method, subclass ``Pruner`` in a new
file: name its ``cuts``, its ``schedule``, and write ``cut`` for one prompt. Batches, padding, masks, positions and the
cache are the business of ``vzip.pruners.context``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vzip.errors import ConfigError, UnsupportedModelError
from vzip.ops.attention import causal_rows

# cos and sin of a layer's rotary embedding, each [.., B, L, d].
PositionEmbeddings = tuple[Tensor, Tensor]


class Decoder(ABC):
    """The layers of a language model; filled by the family, which knows every attribute path.

    Attributes:
        text_model: the module whose forward runs all layers; called with ``inputs_embeds``.
        layers: its layers, in order. Each is called with its input first and the rest by name.
        config: the text model's configuration.
    """

    text_model: nn.Module
    layers: Sequence[nn.Module]
    config: Any

    @abstractmethod
    def rotary(self, hidden: Tensor, position_ids: Tensor) -> PositionEmbeddings:
        """The position embeddings that layers get for these ids ``[.., B, L]``; ``hidden`` gives type and device."""

    @abstractmethod
    def norm(self, hidden: Tensor) -> Tensor:
        """The norm behind the last layer."""

    @abstractmethod
    def queries(self, layer: int, hidden: Tensor, position_embeddings: PositionEmbeddings) -> Tensor:
        """Queries of a layer's input ``[B, L, d_text]``, after the rotary embedding: ``[B, H, L, d]``."""

    @abstractmethod
    def keys(self, layer: int, hidden: Tensor, position_embeddings: PositionEmbeddings) -> Tensor:
        """Keys likewise, as the cache holds them: ``[B, G, L, d]`` with G groups of heads."""

    @abstractmethod
    def scale(self, layer: int) -> float:
        """The factor on the products of queries and keys."""

    def split_added(self, arguments: Mapping[str, Any], cut: int) -> tuple[dict[str, Any], dict[int, Tensor]]:
        """Takes from a text model's arguments what it would add to its tokens between layers, from a cut on.

        Args:
            arguments: of its forward.
            cut: the first layer whose input is shortened.

        Returns:
            The arguments without that; and for each later layer what belongs to its input before anything is dropped,
            ``[B, L, d_text]``.
        """
        return dict(arguments), {}


@dataclass(frozen=True)
class LayerInput:
    """What one layer got of one prompt.

    Attributes:
        hidden: ``[1, L, d_text]``.
        position_embeddings: of these tokens.
        keys: ``[G, P + L, d]``: of the P tokens that the cache held before, then of these.
    """

    hidden: Tensor
    position_embeddings: PositionEmbeddings
    keys: Tensor


@dataclass
class PromptState:
    """One prompt at the input of a layer where a pruner cuts: no batch, no padding.

    In a dialogue only the new tokens are shown, and only they can be dropped; attention runs over the earlier ones too.

    Attributes:
        layer: the layer whose input is cut.
        decoder: the language model.
        hidden: ``[L, d_text]``, that input.
        visual_index: int64 ``[L]``: the number of the image (or video) that a token belongs to, -1 for text.
        embeds: ``[T, d_text]``, the input of layer 0, before any cut.
        embeds_visual_index: int64 ``[T]``, of these.
        text: int64, positions of the text in ``hidden``.
        images: for each image its positions in ``hidden``; all index tensors are on the device of ``hidden``.
    """

    layer: int
    decoder: Decoder
    hidden: Tensor
    visual_index: Tensor
    embeds: Tensor
    embeds_visual_index: Tensor
    text: Tensor
    images: list[Tensor]
    read_layer: Callable[[int], LayerInput] = field(repr=False)

    def attention_rows(self, layer: int, query_index: Tensor | Sequence[int]) -> Tensor:
        """Softmax rows of some of the prompt's queries; no attention map is built.

        Args:
            layer: this one or the one before.
            query_index: positions in ``hidden``; negative ones count from the end.

        Returns:
            float32 (or float64) ``[H, Q, L]``, over this prompt's tokens. In a dialogue the rest of a row's sum of 1
            lies on earlier tokens.
        """
        got = self._input_of(layer)
        num_tokens = self.hidden.shape[0]
        index = torch.as_tensor(query_index, device=got.hidden.device) % num_tokens
        cos, sin = (part[..., index.to(part.device), :] for part in got.position_embeddings)
        queries = self.decoder.queries(layer, got.hidden[:, index], (cos, sin))[0]
        num_past, device = got.keys.shape[1] - num_tokens, got.keys.device
        rows = causal_rows(queries.to(device), got.keys, (index + num_past).to(device), self.decoder.scale(layer))
        return rows[..., num_past:].to(self.hidden.device)

    def keys(self, layer: int) -> Tensor:
        """Keys of the prompt's tokens after the rotary embedding, ``[G, L, d]``; layers as in ``attention_rows``."""
        return self._input_of(layer).keys[:, -self.hidden.shape[0] :].to(self.hidden.device)

    def position_embeddings(self, layer: int) -> PositionEmbeddings:
        """cos and sin of the prompt's tokens, ``[L, d]``; layers as in ``attention_rows``."""
        cos, sin = (part[0].to(self.hidden.device) for part in self._input_of(layer).position_embeddings)
        return cos, sin

    def _input_of(self, layer: int) -> LayerInput:
        if layer not in (self.layer - 1, self.layer):
            raise ValueError(
                f"layer {layer}: at the input of layer {self.layer} only it and the one before can be read"
            )
        return self.read_layer(layer)


@dataclass(frozen=True)
class Cut:
    """What goes on to the next layers.

    Attributes:
        index: int64 ``[K]``, positions in ``hidden`` in the order in which tokens enter; ``-1 - j`` is new row j. The
            prompt's last token must stay the last.
        new_rows: ``[J, d_text]``, tokens that were not there before (merged ones); needs ``repacked``.
        new_visual_index: int64 ``[J]``, the image that each of them stands for.
        positions: whether tokens keep the position ids they came with, or are numbered anew without gaps. Ids of
            several axes are always kept, since they say where in an image a token is; a new row has the last token's.
    """

    index: Tensor
    new_rows: Tensor | None = None
    new_visual_index: Tensor | None = None
    positions: Literal["original", "repacked"] = "original"


class Pruner(ABC):
    """A method that drops visual tokens inside the language model, while the prompt is read and never later.

    Attributes:
        pooled: whether the images of a prompt share one budget; ``schedule`` is then of all of them together.
        makes_rows: whether a cut has new rows.
        budget: visual tokens of an image that layers attend to on average, in place of the arguments of
            ``set_by_budget``, which then follow from it by the method's own rule; an image that has no more keeps all.
            None: those arguments say.
        set_by_budget: arguments that a budget decides; none where the method takes no budget.
    """

    pooled: bool = False
    makes_rows: ClassVar[bool] = False
    budget: int | None = None
    set_by_budget: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        """The arguments that count: a budget where there is one, else those that it would decide."""
        if not is_dataclass(self):
            return super().__repr__()
        left_out = ("budget",) if self.budget is None else self.set_by_budget
        shown = (f"{own.name}={getattr(self, own.name)!r}" for own in fields(self) if own.name not in left_out)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    @abstractmethod
    def cuts(self) -> tuple[int, ...]:
        """The layers, 1 or more and ascending, at whose input tokens are dropped."""

    @abstractmethod
    def schedule(self, num_visual: int, num_layers: int) -> list[int] | None:
        """Visual tokens of an image of ``num_visual`` that each layer attends to; None where data decide.

        Needs no tensors. A run whose measured numbers are others fails.

        Raises:
            ConfigError: a budget that the method cannot meet.
        """

    @abstractmethod
    def cut(self, state: PromptState) -> Cut:
        """Chooses what goes on at ``state.layer``. Must not change the state."""

    def average(self, num_visual: int, num_layers: int) -> float | None:
        """The schedule's mean over layers: what tables compare methods by."""
        schedule = self.schedule(num_visual, num_layers)
        return None if schedule is None else sum(schedule) / num_layers

    def check_fits(self, config: Any) -> None:
        """All that can be checked from the text model's configuration.

        Raises:
            ConfigError: a cut at a layer that the model does not have.
            UnsupportedModelError: layers that see a sliding window only.
        """
        num_layers = config.num_hidden_layers
        outside = [cut for cut in self.cuts if not 1 <= cut < num_layers]
        if outside or list(self.cuts) != sorted(set(self.cuts)):
            raise ConfigError(
                f"pruner={self}: cuts at the input of layer {', '.join(map(str, outside or self.cuts))}, but the"
                f" language model has the layers 0 to {num_layers - 1}, and 1 to {num_layers - 1} can be cut at, in"
                " ascending order: pruner.K or pruner.layers sets them."
            )
        window = getattr(config, "sliding_window", None)
        if window is not None or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise UnsupportedModelError(
                f"pruner={self}: the language model's layers see a sliding window (sliding_window={window} in the"
                " text_config of its config.json), which would be counted over other tokens once some are dropped. Use"
                " a model without one, or pruner=none."
            )
