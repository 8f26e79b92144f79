"""Every method of configs/compressor, built: the one list that the tests of methods run over."""

from __future__ import annotations

import zlib
from typing import Any

import vzip
from vzip.methods import find_method, method_files

METHODS = tuple(method_files())


class Words:
    """A processor whose tokenizer takes every word for one of a small vocabulary's."""

    @property
    def tokenizer(self) -> Words:
        return self

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [5 + zlib.crc32(word.encode()) % 50 for word in text.split()]}


# Of several lengths after stop words are left out; a text-aware method keeps other units for another one.
QUESTIONS = ("Is there a red car to the left of the tree?", "What is it?", "Count the small green boats and two dogs.")


def build(name: str, budget: vzip.TokenBudget, **settings: Any) -> vzip.Compressor:
    """A method as its file has it, with a budget (where it takes one) and other settings.

    ``text_encoder`` names a checkpoint of the hub, so the language model's embeddings stand in unless another is given.
    """
    if "text_encoder" in find_method(name).settings:
        settings = {"text_encoder": None, **settings}
    return find_method(name).build(budget, **settings)
