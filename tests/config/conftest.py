"""Fixtures that call the entry scripts."""

from tests.config.kit import command, run

__all__ = ["command", "run"]
