"""A model without its weights, and bitsandbytes' layers by formula."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vzip.bench import shapes
from vzip.bench.shapes import BenchModel
from vzip.compressors import Compressor
from vzip.models.families import FamilyOptions
from vzip.models.vlm import CompressedVlm


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        config: Hugging Face's.
        compressor: the method.
        options: of the family.
        quantization: of the language model's linear layers: None, ``8bit`` or ``4bit``.
        attn_implementation: as Hugging Face's.
    """

    config: Any
    compressor: Compressor
    options: FamilyOptions = field(default_factory=FamilyOptions)
    quantization: str | None = None
    attn_implementation: str = "sdpa"

    def on_meta_device(self, dtype: torch.dtype) -> CompressedVlm:
        """The model on torch's meta device, quantized if it is to be."""
        vlm = self._wrap(shapes.build_meta(BenchModel("", self.config, ""), dtype))
        if self.quantization is not None:
            for module in list(vlm.adapter.language_model.modules()):
                for name, linear in module.named_children():
                    if isinstance(linear, nn.Linear):
                        module.set_submodule(name, QuantizedLinear(linear, self.quantization))
        return vlm

    def with_random_weights(self, device: torch.device, dtype: torch.dtype) -> CompressedVlm:
        """The model itself, unquantized."""
        return self._wrap(shapes.build_random(BenchModel("", self.config, ""), device, dtype))

    def _wrap(self, model: PreTrainedModel) -> CompressedVlm:
        if self.attn_implementation == "eager":  # flash attention takes what SDPA takes, and needs a GPU to be chosen
            model.set_attn_implementation("eager")
        return CompressedVlm(model, self.compressor, **vars(self.options))


class QuantizedLinear(nn.Linear):
    """Takes the memory of a linear layer of bitsandbytes, and computes nothing.

    4-bit weights (NF4) are half a byte with a float32 scale for 64 of them, 8-bit ones (LLM.int8) a byte with a scale
    a row. A product unpacks the whole weight, forward and backward. Only the 8-bit product keeps its input, out of
    gradient checkpointing's sight.
    """

    def __init__(self, linear: nn.Linear, quantization: str) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = self.shape = linear.weight.shape
        self.keeps_input = quantization == "8bit"
        numbers, rows = linear.weight.numel(), len(linear.weight)
        packed, scales = (numbers, rows) if self.keeps_input else (numbers // 2, numbers // 64)
        self.weight = nn.Parameter(linear.weight.new_empty(packed, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", linear.weight.new_empty(scales, dtype=torch.float32))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = _UnpackedProduct.apply(x, self.shape, self.keeps_input)
        return product if self.bias is None else product + self.bias


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: torch.Size, keeps_input: bool) -> Tensor:
        ctx.shape, ctx.kept = shape, x if keeps_input else None
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None
