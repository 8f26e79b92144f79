"""Whether a run directory holds the very run that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vzip.config.run_directory import recipe_changes


def same_run(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record in a run directory if it is of these settings, else None.

    Where and how fast it ran, and the code it ran with, are not compared.

    Raises:
        ManifestError: a record that cannot be read.
    """
    from vzip.results.record import read_record

    record = read_record(run_dir)
    recorded = record.get("config") or {}
    try:
        same = recorded["seed"] == config["seed"] and recorded["eval"]["limit"] == config["eval"]["limit"]
        same = same and _checksums(recorded["model"]) == _checksums(config["model"])
        same = same and recorded["compressor"] == config["compressor"]  # its seed too, which a directory's name lacks
        return record if same and not recipe_changes(recorded, config) else None
    except KeyError:  # recorded by a version with other settings
        return None


def _checksums(model: Mapping[str, Any]) -> dict[str, Any]:
    """What tells weights apart that were written to one place one after the other."""
    return {key: value for key, value in model.items() if key.endswith("_sha256")}
