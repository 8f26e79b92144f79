"""One line a step, to standard error; results go to standard output."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler


def setup(level: int = logging.INFO) -> None:
    """Shows vzip's own messages; other libraries keep to warnings. Calling it again changes only the level."""
    logger = logging.getLogger("vzip")
    logger.setLevel(level)
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        console = Console(stderr=True)
        logger.addHandler(RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S"))
        logger.propagate = False
