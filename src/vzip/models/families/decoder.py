"""The layers of the language models that the families hold, for pruners."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vzip.errors import UnsupportedModelError
from vzip.pruners.base import Decoder, PositionEmbeddings

from ..devices import execution_device, fetched

# Pre-norm layers, projections without norms of their own, one rotary embedding for all layers.
SERVED = ("llama", "mistral", "qwen2")


class LlamaDecoder(Decoder):
    """Llama, Vicuna, Mistral, Qwen2."""

    def __init__(self, text_model: nn.Module) -> None:
        self.text_model = text_model
        self.config: Any = text_model.config
        self.layers = list(text_model.get_submodule("layers").children())

    @staticmethod
    def check_config(config: Any) -> None:
        """Raises UnsupportedModelError for a language model of another kind."""
        if config.model_type not in SERVED:
            raise UnsupportedModelError(
                f"The language model is a {config.model_type}; tokens can be dropped inside {', '.join(SERVED)}. Use"
                " pruner=none."
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
        heads = projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        cos, sin = (part.to(device) for part in position_embeddings)
        rotated: Tensor = apply_rotary_pos_emb(heads, heads, cos, sin)[0]
        return rotated
