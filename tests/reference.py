"""VisionZip written a second time: plain Python loops over floats, one crop at a time, sharing no code with vzip.

Slow and obvious on purpose. Everything is a Python float (float64).
"""

from __future__ import annotations

import math


def softmax(values: list[float]) -> list[float]:
    """Of one row."""
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def heads_of(row: list[float], num_heads: int) -> list[list[float]]:
    """Cuts a projection row into heads."""
    width = len(row) // num_heads
    return [row[head * width : (head + 1) * width] for head in range(num_heads)]


def dot(a: list[float], b: list[float]) -> float:
    """Inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def attention_map(queries: list[list[float]], keys: list[list[float]], num_heads: int, scale: float):
    """Full softmax maps: [head][query][key]."""
    q = [heads_of(row, num_heads) for row in queries]
    k = [heads_of(row, num_heads) for row in keys]
    return [[softmax([scale * dot(query[head], key[head]) for key in k]) for query in q] for head in range(num_heads)]


def scores(queries, keys, num_heads: int, scale: float, has_cls: bool) -> list[float]:
    """With CLS: its row over the patches, summed over heads. Without: mean attention received."""
    maps = attention_map(queries, keys, num_heads, scale)
    length = len(keys)
    if has_cls:
        return [sum(maps[head][0][key] for head in range(num_heads)) for key in range(1, length)]
    return [
        sum(maps[head][query][key] for head in range(num_heads) for query in range(length)) / (num_heads * length)
        for key in range(length)
    ]


def key_metric(keys: list[list[float]], num_heads: int) -> list[list[float]]:
    """Mean of the keys over heads."""
    return [[sum(column) / num_heads for column in zip(*heads_of(row, num_heads), strict=True)] for row in keys]


def dominant(attention: list[float], num_dominant: int, has_cls: bool) -> list[int]:
    """Rows kept, ascending; equal scores go to the lower patch."""
    num_patches = num_dominant - 1 if has_cls else num_dominant
    best = sorted(range(len(attention)), key=lambda patch: (-attention[patch], patch))[:num_patches]
    return ([0] if has_cls else []) + sorted(patch + (1 if has_cls else 0) for patch in best)


def visionzip(
    hidden: list[list[float]],
    attention: list[float],
    metric: list[list[float]],
    num_dominant: int,
    num_contextual: int,
    has_cls: bool,
    rule: str,
    positions: list[int] | None = None,
) -> tuple[list[list[float]], list[int], list[int]]:
    """One crop: tokens, kept rows, and for each row the contextual token it went into (-1: none).

    ``positions``: where the targets are among the remaining rows; None: evenly spaced.
    """
    kept = dominant(attention, num_dominant, has_cls)
    merge_index = [-1] * len(hidden)
    if num_contextual == 0:
        return [hidden[row] for row in kept], kept, merge_index
    rest = [row for row in range(len(hidden)) if row not in kept]
    step = max(1, len(rest) // num_contextual)
    targets = [rest[number] for number in positions or [number * step for number in range(num_contextual)]]
    groups: list[list[int]] = [[] for _ in targets]
    for row in rest:
        if row in targets:
            merge_index[row] = targets.index(row)
            continue
        best, best_cosine = 0, -math.inf
        for number, target in enumerate(targets):
            norms = math.sqrt(dot(metric[row], metric[row])) * math.sqrt(dot(metric[target], metric[target]))
            cosine = dot(metric[row], metric[target]) / norms
            if cosine > best_cosine:  # strictly: the lower target keeps a tie
                best, best_cosine = number, cosine
        groups[best].append(row)
        merge_index[row] = best
    contextual = []
    for target, group in zip(targets, groups, strict=True):
        token = []
        for column, value in enumerate(hidden[target]):
            total = sum(hidden[row][column] for row in group)
            if rule == "sum":
                token.append(value + (total / len(group) if group else 0.0))
            else:
                token.append((value + total) / (len(group) + 1))
        contextual.append(token)
    return [hidden[row] for row in kept] + contextual, kept, merge_index
