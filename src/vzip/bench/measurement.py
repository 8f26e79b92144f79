"""What every measurement is written as; without torch, which the help of ``bench serve`` needs not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vzip.results.files import make_folder, write_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """A whole measurement, of whatever kind; ``to_json`` is what is written.

    Attributes:
        model: its name.
        settings: as given, with what ``auto`` came to under ``resolved``.
        resolved: device, dtype, budget, weights and crops in effect.
        environment: command, code, versions and hardware.
        methods: results by name.
        notes: what a reader must know.
    """

    model: str
    settings: dict[str, Any]
    resolved: dict[str, Any]
    environment: dict[str, Any]
    methods: dict[str, Any]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for ``json.dump``."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Writes the whole measurement, samples included; RunWriteError if that cannot be."""
        make_folder(path.parent)
        write_json(path, self.to_json())
