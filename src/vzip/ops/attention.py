"""Attention scores and keys from one layer's query and key projections.

Shapes: N crops, L tokens of the vision tower (CLS included where there is one), H heads, d = head width, P patches.
Every function takes projections as the tower's ``q_proj`` and ``k_proj`` return them, ``[N, L, H * d]``, so the tower
itself may run any attention kernel. Half precision is raised to float32 before anything is compared; float64 stays.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Elements of an attention block: on a CPU it stays in the cache (float32: 4 MiB), elsewhere fewer are started (16 MiB).
CPU_BLOCK_ELEMENTS = 2**20
BLOCK_ELEMENTS = 2**22


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
    queries: Tensor, keys: Tensor, num_heads: int, scale: float, block_elements: int | None = None
) -> Tensor:
    """Mean attention every token receives, over heads and queries: the score for towers without CLS (VisionZip, A.2).

    The maps ``[N, H, L, L]`` never exist, not even one of them: blocks of queries are taken of one head after another
    (of small maps several at once), and only the running sums are kept.

    Args:
        queries: ``[N, L, H * d]``, unscaled.
        keys: ``[N, L, H * d]``, unscaled.
        num_heads: H.
        scale: factor on the products.
        block_elements: most elements of a block, though it has a query at least and never all; by default what suits
            the device.

    Returns:
        ``[N, L]``; each row sums to 1.
    """
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    if block_elements is None:
        block_elements = CPU_BLOCK_ELEMENTS if queries.device.type == "cpu" else BLOCK_ELEMENTS
    num_rows = max(1, min(block_elements // num_keys, (num_queries + 1) // 2))
    num_maps = max(1, block_elements // (num_rows * num_keys))
    query = split_heads(at_least_float32(queries) * scale, num_heads).flatten(0, 1)  # [N * H, L, d]
    key = split_heads(at_least_float32(keys), num_heads).flatten(0, 1).transpose(-1, -2)
    received = []
    for rows, columns in zip(query.split(num_maps), key.split(num_maps), strict=True):
        blocks = (torch.softmax(block @ columns, dim=-1).sum(dim=1) for block in rows.split(num_rows, dim=1))
        received.append(functools.reduce(torch.add, blocks))
    return torch.cat(received).unflatten(0, (-1, num_heads)).mean(dim=1) / num_queries


def query_rows(queries: Tensor, keys: Tensor, num_heads: int, scale: float, query_index: Tensor) -> Tensor:
    """Where some tokens' attention goes: their softmax rows, mean over heads.

    Args:
        queries, keys: ``[N, L, H * d]``, unscaled.
        num_heads: H.
        scale: factor on the products.
        query_index: int64 ``[Q]``, rows of ``queries``; with a CLS token the first patch is row 1.

    Returns:
        ``[N, Q, L]``; each row sums to 1.
    """
    query = split_heads(at_least_float32(queries[:, query_index]) * scale, num_heads)
    key = split_heads(at_least_float32(keys), num_heads)
    return torch.softmax(query @ key.transpose(-1, -2), dim=-1).mean(dim=1)


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
