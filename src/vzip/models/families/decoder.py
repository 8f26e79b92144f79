"""The layers of the language models that the families hold, for pruners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vzip.errors import UnsupportedModelError
from vzip.pruners.base import Decoder, PositionEmbeddings

from ..devices import execution_device, fetched

# Pre-norm layers, projections without norms of their own, one rotary embedding for all layers.
SERVED = ("llama", "mistral", "qwen2")


class LlamaDecoder(Decoder):
    """Llama, Vicuna, Mistral, Qwen2."""

    served: ClassVar[tuple[str, ...]] = SERVED

    def __init__(self, text_model: nn.Module) -> None:
        self.text_model = text_model
        self.config: Any = text_model.config
        self.layers = list(text_model.get_submodule("layers").children())

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Raises UnsupportedModelError for a language model of another kind."""
        if config.model_type not in cls.served:
            raise UnsupportedModelError(
                f"The language model is a {config.model_type}; tokens can be dropped inside {', '.join(cls.served)}."
                " Use pruner=none."
            )

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> PositionEmbeddings:
        cos, sin = self.text_model.get_submodule("rotary_emb")(hidden, position_ids)
        return cos, sin

    def norm(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.text_model.get_submodule("norm")(hidden)
        return normed

    def queries(self, layer: int, hidden: Tensor, position_embeddings: PositionEmbeddings) -> Tensor:
        return self._project(layer, "q_proj", hidden, position_embeddings)

    def keys(self, layer: int, hidden: Tensor, position_embeddings: PositionEmbeddings) -> Tensor:
        return self._project(layer, "k_proj", hidden, position_embeddings)

    def scale(self, layer: int) -> float:
        scaling: Any = self.layers[layer].get_submodule("self_attn").scaling
        return float(scaling)

    def _project(self, layer: int, name: str, hidden: Tensor, position_embeddings: PositionEmbeddings) -> Tensor:
        module = self.layers[layer]
        norm, projection = module.get_submodule("input_layernorm"), module.get_submodule(f"self_attn.{name}")
        device = execution_device(projection)
        with fetched(norm, projection):
            projected = projection(norm(hidden.to(device)))
        attention: Any = module.get_submodule("self_attn")
        heads = self._normed(layer, name, projected.unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
        cos, sin = (part.to(device) for part in position_embeddings)
        rotated: Tensor = apply_rotary_pos_emb(heads, heads, cos, sin)[0]
        return rotated

    def _normed(self, layer: int, name: str, heads: Tensor) -> Tensor:
        """Queries or keys ``[B, L, H, d]`` before the rotary embedding."""
        return heads


class MRopeDecoder(LlamaDecoder):
    """Qwen2.5-VL's and Qwen3-VL's: positions in three axes, which are one rotary embedding; norms of queries and keys.

    Qwen3-VL adds a plane to the visual tokens behind each of its first layers (see ``models/families/qwen3_vl``).
    """

    served = ("qwen2_5_vl_text", "qwen3_vl_text")

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> PositionEmbeddings:
        axes = position_ids if position_ids.ndim == 3 else position_ids[None]
        return super().rotary(hidden, axes[-3:])  # a fourth one before them is the text's, for masks

    def split_added(self, arguments: Mapping[str, Any], cut: int) -> tuple[dict[str, Any], dict[int, Tensor]]:
        planes, rest = arguments.get("deepstack_visual_embeds"), dict(arguments)
        if planes is None or len(planes) <= cut:
            return rest, {}
        rest["deepstack_visual_embeds"] = list(planes[:cut])
        is_visual, embeds = arguments["visual_pos_masks"], arguments["inputs_embeds"]
        added = {}
        for layer, plane in enumerate(planes[cut:], start=cut + 1):
            rows = embeds.new_zeros(embeds.shape)
            rows[is_visual.to(rows.device)] = plane.to(rows)
            added[layer] = rows
        return rest, added

    def _normed(self, layer: int, name: str, heads: Tensor) -> Tensor:
        attention = self.layers[layer].get_submodule("self_attn")
        own = dict(attention.named_children()).get(f"{name[0]}_norm")
        if own is None:
            return heads
        with fetched(own):
            normed: Tensor = own(heads)
        return normed
