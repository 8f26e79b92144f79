"""Attention scores and keys from one layer's query and key projections.

Shapes: N crops, L tokens of the vision tower (CLS included where there is one), H heads, d = head width, P patches.
Every function takes projections as the tower's ``q_proj`` and ``k_proj`` return them, ``[N, L, H * d]``, so the tower
itself may run any attention kernel. Half precision is raised to float32 before anything is compared; float64 stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of the largest attention block held at once (float32: 64 MiB), whatever the batch and the tower.
MAX_BLOCK_ELEMENTS = 16 * 1024 * 1024


def at_least_float32(x: Tensor) -> Tensor:
    """Returns ``x`` in float32, or unchanged if it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def split_heads(projection: Tensor, num_heads: int) -> Tensor:
    """``[N, L, H * d]`` -> ``[N, H, L, d]`` (a view)."""
    return projection.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def cls_attention(queries: Tensor, keys: Tensor, num_heads: int, scale: float, shown: Tensor | None = None) -> Tensor:
    """Attention the CLS query pays to every patch, summed over heads (VisionZip, Eq. 3; sum as published code does).

    Args:
        queries: ``[N, >=1, H * d]``, unscaled; only row 0 (CLS) is read.
        keys: ``[N, L, H * d]``, unscaled, CLS first.
        num_heads: H.
        scale: factor on the products, ``d ** -0.5`` in CLIP.
        shown: bool ``[N, L]``, the keys there are; None: all.

    Returns:
        ``[N, P]`` with P = L - 1. The softmax runs over all L keys, so a head's row sums to 1 minus CLS's own share.
    """
    query = split_heads(at_least_float32(queries[:, :1]), num_heads) * scale
    key = split_heads(at_least_float32(keys), num_heads)
    products = query @ key.transpose(-1, -2)  # [N, H, 1, L]
    if shown is not None:
        products = products.masked_fill(~shown[:, None, None], float("-inf"))
    row = torch.softmax(products, dim=-1)
    return row[:, :, 0, 1:].sum(dim=1)


def received_attention(
    queries: Tensor, keys: Tensor, num_heads: int, scale: float, chunk_size: int | None = None
) -> Tensor:
    """Mean attention every token receives, over heads and queries: the score for towers without CLS (VisionZip, A.2).

    The maps ``[N, H, L, L]`` never exist: queries are taken in chunks and only the running sum ``[N, L]`` is kept.

    Args:
        queries: ``[N, L, H * d]``, unscaled.
        keys: ``[N, L, H * d]``, unscaled.
        num_heads: H.
        scale: factor on the products.
        chunk_size: queries per step; by default as many as keep one block below ``MAX_BLOCK_ELEMENTS``, and never all.

    Returns:
        ``[N, L]``; each row sums to 1.
    """
    num_crops, num_queries, _ = queries.shape
    if chunk_size is None:
        row_elements = max(1, num_crops * num_heads * keys.shape[1])
        chunk_size = max(1, min(MAX_BLOCK_ELEMENTS // row_elements, (num_queries + 1) // 2))
    key = split_heads(at_least_float32(keys), num_heads).transpose(-1, -2)
    total = key.new_zeros(num_crops, keys.shape[1])
    for chunk in queries.split(chunk_size, dim=1):
        query = split_heads(at_least_float32(chunk), num_heads) * scale
        total = total + torch.softmax(query @ key, dim=-1).sum(dim=(1, 2))
    return total / (num_heads * num_queries)


def causal_rows(queries: Tensor, keys: Tensor, query_index: Tensor, scale: float) -> Tensor:
    """Softmax rows of some queries of a causal language model, over the tokens up to each query's own.

    Args:
        queries: ``[H, Q, d]``.
        keys: ``[G, L, d]``; each serves ``H / G`` neighbouring heads.
        query_index: int64 ``[Q]``, where in 0..L-1 each query stands.
        scale: factor on the products.

    Returns:
        float32 or float64 ``[H, Q, L]``; rows sum to 1, later tokens have 0.
    """
    keys = at_least_float32(keys).repeat_interleave(queries.shape[0] // keys.shape[0], dim=0)
    products = at_least_float32(queries) @ keys.transpose(-1, -2) * scale
    later = torch.arange(keys.shape[1], device=keys.device) > query_index[:, None]
    return products.masked_fill(later, float("-inf")).softmax(dim=-1)


def key_norms(keys: Tensor, num_heads: int) -> Tensor:
    """Euclidean norm of every token's unscaled key, averaged over heads: ``[N, L, H * d]`` -> ``[N, L]``."""
    return at_least_float32(keys).unflatten(-1, (num_heads, -1)).norm(dim=-1).mean(dim=-1)


def mean_keys(keys: Tensor, num_heads: int) -> Tensor:
    """Mean over heads of the unscaled keys, the similarity metric of the merge: ``[N, L, H * d]`` -> ``[N, L, d]``."""
    return at_least_float32(keys).unflatten(-1, (num_heads, -1)).mean(dim=2)
