"""The configuration folder: its groups, and what Hydra's files may call."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from vzip.installed import checkout
from vzip.option_files import header, option_values, options, split_of

__all__ = ["RECIPE_GROUP", "config_dir", "groups", "header", "option_values", "options"]

RECIPE_GROUP = "exp"

# In configs: ${minus:64,${budget.num_dominant}}, so that a search over one count keeps the sum.
OmegaConf.register_new_resolver("minus", lambda a, b: a - b, replace=True)


def _half(which: str, num_tokens: object) -> int | None:
    """In configs/budget/tokens.yaml; None for what is no number of tokens, which its key's rule refuses."""
    return split_of(num_tokens)[f"num_{which}"] if type(num_tokens) is int and num_tokens > 1 else None


OmegaConf.register_new_resolver("half", _half, replace=True)


def config_dir() -> Path:
    """Returns ``configs`` of the checkout, or of the wheel.

    Raises:
        ConfigError: vzip was installed without it.
    """
    return checkout() / "configs"


def groups(directory: Path) -> list[str]:
    """Names of the option groups, recipes and Hydra's own groups left out."""
    return sorted(p.name for p in directory.iterdir() if p.is_dir() and p.name not in (RECIPE_GROUP, "hydra"))
