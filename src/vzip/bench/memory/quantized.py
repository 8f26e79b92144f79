"""What bitsandbytes' layers keep and what they make on the way, with nothing computed: for estimates without weights.

Sizes and order are those of bitsandbytes 0.50 (``autograd/_functions.py``: ``MatMul4Bit``, ``MatMul8bitLt``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NF4_BLOCK = 64  # weights that share a float32 scale


class _In4Bit(torch.autograd.Function):
    """The weight is unpacked whole for every product, forward and backward; the input is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ grads[0].new_empty(ctx.shape), None


class _In8Bit(torch.autograd.Function):
    """The input is rounded to integers, the products are summed in int32; the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.x, ctx.shape = x, shape
        rounded = x.half().to(torch.int8)
        return rounded.new_empty((*x.shape[:-1], shape[0]), dtype=torch.int32).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ grads[0].new_empty(ctx.shape), None


class PretendedQuantizedLinear(nn.Linear):
    """Stands for a linear layer as bitsandbytes replaces it.

    Args:
        linear: the layer, unquantized.
        quantization: ``4bit`` (NF4) or ``8bit`` (LLM.int8).
        compute_dtype: of 4-bit products.
    """

    def __init__(self, linear: nn.Linear, quantization: str, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype if quantization == "4bit" else None  # 8-bit ones keep the input's
        self.product: Any = _In4Bit if quantization == "4bit" else _In8Bit
        weight, count = linear.weight, linear.weight.numel()
        packed, num_scales = (count // 2, count // NF4_BLOCK) if quantization == "4bit" else (count, len(weight))
        self.weight = nn.Parameter(weight.new_empty(packed, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scales", weight.new_empty(num_scales, dtype=torch.float32))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        given = x if self.compute_dtype is None else x.to(self.compute_dtype)
        made = self.product.apply(given, (self.out_features, self.in_features)).to(x.dtype)
        return made if self.bias is None else made + self.bias


def quantize(model: nn.Module, part: nn.Module, quantization: str, compute_dtype: torch.dtype) -> None:
    """Replaces the linear layers of a part in place, as bitsandbytes does: for a model that only estimates."""
    inside = {id(module) for module in part.modules()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
    for name, module in linear.items():
        model.set_submodule(name, PretendedQuantizedLinear(module, quantization, compute_dtype))
