"""Every method of configs/compressor, built: the one list that the tests of methods run over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import vzip

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "compressor"
METHODS = tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def build(name: str, budget: vzip.TokenBudget, **settings: Any) -> vzip.Compressor:
    """A method as its file has it, with a budget (where it takes one) and other settings."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert values.pop("name") == name
    method = getattr(vzip, values.pop("_target_").removeprefix("vzip."))
    own = {key: value for key, value in values.items() if key != "budget" and not str(value).startswith("${")}
    return method(**({"budget": budget} if "budget" in values else {}), **{**own, **settings})
