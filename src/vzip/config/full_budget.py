"""What ``budget=full`` means beside a compressor: an error in one run, the vanilla run in a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vzip.config.options import option_values
from vzip.option_files import COUNTS, is_fraction


def full_is_vanilla(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A sweep's job with the whole budget and a compressor that needs counts, as ``compressor=none``.

    So ``-m budget=full,64tok compressor=visionzip,random`` is a grid: its full jobs are one vanilla run, which the
    retention of the others is relative to.

    Args:
        config: composed and resolved.
        directory: the configuration folder.

    Returns:
        the configuration itself if it is no such job.
    """
    compressor, budget = config.get("compressor"), config.get("budget")
    if not isinstance(compressor, dict) or not isinstance(budget, dict) or "budget" not in compressor:
        return config
    if is_fraction(budget) or any(budget.get(key) is not None for key in COUNTS):
        return config
    return {**config, "compressor": option_values(directory, "compressor", "none")}
