"""A part of a data set, chosen by a rule that needs no list and no order.

A sample is in the part if a hash of the seed and its key, read as a number between 0 and 1, lies below the fraction.
The key (``Record.key``) stands for the sample's id, images and words, so

- where the sample lies in the file, what else the file holds and which machine asks make no difference;
- samples that share an id (LLaVA's mixture gives all conversations about one COCO image the same) are drawn each for
  itself, and a sample without an id is drawn by its content;
- records that agree in id, images and words are one sample: all of them are in, or none;
- with one seed, a smaller part lies inside every larger one.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
from rich.table import Table

from vzip.errors import ConfigError

from .llava_json import LlavaJson

_HASH_BITS = 64


def choose(data: LlavaJson, fraction: float | str = 1.0, seed: int = 0, *, keep_text_only: bool = True) -> np.ndarray:
    """Indices of the samples in the part, ascending: int64 ``[chosen]``.

    Args:
        data: the data set.
        fraction: the expected share, above 0 and at most 1. ``"1/10"`` and ``0.1`` choose the same samples.
        seed: another seed draws another part, independent of this one.
        keep_text_only: whether samples without an image can be chosen. The others' draw does not depend on it.

    Raises:
        ConfigError: a fraction out of range, a seed that is no whole number, or nothing left to train on.
    """
    share = _share(fraction)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"data.subset_seed={seed!r}: must be a whole number.")
    threshold = int(share * 2**_HASH_BITS)
    drawn = np.fromiter((_draw(key, seed) < threshold for key in map(bytes, data.keys)), dtype=bool, count=len(data))
    if not keep_text_only:
        drawn &= data.num_images > 0
    indices = np.flatnonzero(drawn)
    if not indices.size:
        allowed = len(data) if keep_text_only else int((data.num_images > 0).sum())
        raise ConfigError(
            f"data.fraction={fraction}, data.subset_seed={seed}: chose none of {allowed} samples of {data.path}. Ask"
            " for a larger fraction" + ("." if keep_text_only else ", or keep the text-only samples.")
        )
    return indices


def source_table(data: LlavaJson, indices: np.ndarray, *, max_rows: int = 20) -> Table:
    """Samples of the whole and of the part by source, to be printed; sources beyond ``max_rows`` are summed up."""
    whole, part = data.count_sources(), data.count_sources(indices)
    table = Table("source", title=f"{len(indices):,} of {len(data):,} samples", title_justify="left")
    for heading in ("all", "chosen", "share %"):
        table.add_column(heading, justify="right")
    names = list(whole)
    rows = [(name, whole[name], part.get(name, 0)) for name in names[:max_rows]]
    rest = names[max_rows:]
    if rest:
        rows.append((f"{len(rest)} others", sum(whole[n] for n in rest), sum(part.get(n, 0) for n in rest)))
    rows.append(("total", len(data), len(indices)))
    for name, num_all, num_chosen in rows:
        if name == "total":
            table.add_section()
        table.add_row(name, f"{num_all:,}", f"{num_chosen:,}", f"{100 * num_chosen / num_all:.2f}")
    return table


def _draw(key: bytes, seed: int) -> int:
    """A whole number in [0, 2^64) that depends on key and seed alone."""
    digest = hashlib.sha256(f"{seed}:{key.hex()}".encode("ascii")).digest()
    return int.from_bytes(digest[: _HASH_BITS // 8], "big")


def _share(fraction: float | str) -> Fraction:
    """The fraction as an exact number; a float counts as the decimal it is written as."""
    try:
        share = Fraction(str(fraction))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ConfigError(f"data.fraction={fraction!r}: must be a number above 0 and at most 1, such as 0.1 or 1/10.")
    return share
