"""Every method of configs/compressor, built: the one list that the tests of methods run over."""

from __future__ import annotations

from typing import Any

import vzip
from vzip.methods import find_method, method_files

METHODS = tuple(method_files())


def build(name: str, budget: vzip.TokenBudget, **settings: Any) -> vzip.Compressor:
    """A method as its file has it, with a budget (where it takes one) and other settings."""
    return find_method(name).build(budget, **settings)
