"""Floating point operations, counted twice: by torch on the meta device, and by closed formulas.

Convention: one multiply-add is two operations. Matrix products, convolutions and attention count; normalisations,
activations, softmax and sorting do not. Attention counts in full, not halved for causality. Papers that quote half of
these numbers count multiply-adds (LLaVA-1.5-7B at 576 visual tokens: 4.4 T against 8.8 T).

On the meta device tensors have shapes but no contents, so counting a 7B model takes no memory and a fraction of a
second; on the CPU torch's counter misses its fused attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import PretrainedConfig

from vzip.models.towers.structure import geometry_from_config

CONVENTION = (
    "1 multiply-add = 2 FLOPs; matrix products, convolution and attention only; attention in full (not causal-halved)"
)

GATED_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text")
"""Text model types whose layer is q, k, v, o projections and a gated three-matrix MLP, as the formula below counts."""


def count(run: Callable[[], object]) -> int:
    """Returns the operations of one call, by torch's counter.

    Inputs and weights should be on the meta device, but for what depends on the contents.
    """
    mapping = {
        torch.ops.aten.bmm: _batched_product,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.no_grad(), counter:
        run()
    return int(counter.get_total_flops())


def _batched_product(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """torch's count of ``[B, m, k] @ [B, k, n]``, but nothing for k = 1, which multiplies and adds nothing up.

    transformers 5.17 writes the angles of rotary positions so, 5.23 as the plain multiplication it is.
    """
    return 0 if a[-1] == 1 else 2 * a[0] * a[1] * a[2] * b[-1]


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """torch's count of fused attention, which it has for no CPU."""
    return int(sdpa_flop_count(query, key, value))


def tower_formula(config: PretrainedConfig, *, num_layers: int, num_crops: int, has_cls: bool) -> int:
    """Returns the operations of a vision transformer's patch embedding and first ``num_layers`` layers.

    Args:
        config: a CLIP, SigLIP or InternVL vision configuration.
        num_layers: layers that run; fewer than the tower has when it stops after the select layer.
        num_crops: inputs in the batch.
        has_cls: whether a CLS token is added to the patches.
    """
    dim, mlp_dim = config.hidden_size, config.intermediate_size
    geometry = geometry_from_config(config)
    num_patches = geometry.num_patches
    num_tokens = num_patches + int(has_cls)
    embedding = 2 * num_patches * (config.num_channels * geometry.patch_size**2) * dim
    projections = 2 * num_tokens * (4 * dim * dim + 2 * dim * mlp_dim)
    attention = 2 * 2 * num_tokens * num_tokens * dim
    return num_crops * (embedding + num_layers * (projections + attention))


def scoring_formula(config: PretrainedConfig, *, num_crops: int, has_cls: bool) -> int:
    """Returns the operations of the scores of one layer, over all heads.

    With a CLS token that is one row of query-key products; without one, all rows.
    """
    num_tokens = geometry_from_config(config).num_patches + int(has_cls)
    num_queries = 1 if has_cls else num_tokens
    return num_crops * 2 * num_queries * num_tokens * config.hidden_size


def convnext_formula(config: PretrainedConfig, *, image_size: int, num_images: int) -> int:
    """Returns the operations of a ConvNeXt's stem and stages, as Mini-Gemini's high-resolution tower runs them.

    Args:
        config: a ConvNeXt configuration.
        image_size: side of the square image, a multiple of the whole tower's stride.
        num_images: in the batch.
    """
    side = image_size // config.patch_size
    operations = 2 * side**2 * config.num_channels * config.patch_size**2 * config.hidden_sizes[0]
    before = config.hidden_sizes[0]
    for number, (width, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        if number > 0:  # a 2 x 2 convolution of stride 2 between stages
            side //= 2
            operations += 2 * side**2 * 4 * before * width
        depthwise, widen_and_narrow = 49 * width, 2 * 4 * width * width
        operations += depth * 2 * side**2 * (depthwise + widen_and_narrow)
        before = width
    return num_images * operations


def mining_formula(*, num_patches: int, window: int, patch_dim: int, num_channels: int, num_images: int) -> int:
    """Returns the operations of patch info mining with its projections on the patches' side.

    Args:
        num_patches: of an image.
        window: high-resolution positions each patch looks at, more than one.
        patch_dim: width of a patch token.
        num_channels: of the high-resolution features.
        num_images: in the batch.
    """
    projections = patch_dim * patch_dim + 2 * patch_dim * num_channels  # query; keys'; values'
    attention = 2 * window * num_channels
    return num_images * 2 * num_patches * (projections + attention)


def projector_formula(*, num_tokens: int, vision_dim: int, text_dim: int) -> int:
    """Returns the operations of LLaVA's projector: two linear layers with an activation between them.

    Args:
        num_tokens: rows.
        vision_dim: their width.
        text_dim: of the language model.
    """
    return 2 * num_tokens * (vision_dim * text_dim + text_dim * text_dim)


def head_width(config: PretrainedConfig) -> int:
    """Returns the width of a decoder's attention head; not every configuration names it."""
    named = config.to_dict().get("head_dim")
    return named or config.hidden_size // config.num_attention_heads


def decoder_formula(
    config: PretrainedConfig, *, num_new: int, num_past: int, num_logits: int, batch_size: int = 1
) -> int | None:
    """Returns the operations of a Llama-type decoder that reads ``num_new`` tokens after ``num_past`` cached ones.

    Args:
        config: the text configuration; grouped key and value heads are taken into account.
        num_new: tokens in this call: all of them for prefill, one for a decoding step.
        num_past: tokens already in the cache.
        num_logits: positions whose vocabulary scores are computed (one when generating, all when scoring).
        batch_size: sequences in the batch.

    Returns:
        The operations, or None for a model type the formula does not describe.
    """
    if config.model_type not in GATED_DECODERS:
        return None
    dim, num_heads = config.hidden_size, config.num_attention_heads
    num_kv_heads = config.num_key_value_heads or num_heads
    head_dim = head_width(config)
    weights = 2 * dim * num_heads * head_dim + 2 * dim * num_kv_heads * head_dim + 3 * dim * config.intermediate_size
    attention = 2 * 2 * num_new * (num_new + num_past) * num_heads * head_dim
    head = 2 * num_logits * dim * config.vocab_size
    return batch_size * (config.num_hidden_layers * (2 * num_new * weights + attention) + head)
