"""One line a step, to standard error; results go to standard output."""

from __future__ import annotations

import logging


def setup(level: int = logging.INFO) -> None:
    """Shows vzip's own messages; other libraries keep to warnings. Calling it again changes only the level."""
    logger = logging.getLogger("vzip")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
