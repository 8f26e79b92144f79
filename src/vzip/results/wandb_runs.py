"""Runs in Weights & Biases: one a run directory, online for who is logged in, else on disk; never a question."""

from __future__ import annotations

import logging
import netrc
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vzip.installed import missing_package

from .files import replace_file

logger = logging.getLogger(__name__)

# At the end of a run: how long a tracker may take to bring the rest of it to its place.
CLOSE_SECONDS = 60.0
_WANDB_URL = "https://api.wandb.ai"


def check_wandb(key: str) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        MissingPackageError: naming the setting ``key`` that asks for it.
    """
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise missing_package(f"{key}=[wandb]", "wandb", error, otherwise="leave it out") from error


def start_wandb(run_dir: Path, config: Mapping[str, Any]) -> Any:
    """Starts or takes up the wandb run of a directory; where the server cannot be reached it is kept on disk.

    Raises:
        wandb.Error, OSError: it cannot be kept on disk either.
    """
    import wandb

    settings: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": 30.0}
    if "finish_timeout" in wandb.Settings.model_fields:  # from 0.26 on; bounds the wait at the process's end too
        settings["finish_timeout"] = CLOSE_SECONDS
    arguments: dict[str, Any] = {
        "project": "vzip",
        "name": "/".join(run_dir.parts[-3:]),
        "dir": str(run_dir),
        "config": dict(config),
        "id": _run_id(run_dir),
    }
    arguments["mode"] = wandb_mode()
    if arguments["mode"] == "online":
        try:
            return wandb.init(**arguments, resume="allow", settings=wandb.Settings(**settings))
        except wandb.Error as error:
            logger.warning("wandb does not get to its server (%s)", error)
            wandb.teardown()  # lets go of the run's id
            arguments["mode"] = "offline"
    if arguments["mode"] == "offline":
        logger.info("wandb keeps this run in %s; `wandb sync` sends it", run_dir / "wandb")
    return wandb.init(**arguments, settings=wandb.Settings(**settings))


def wandb_mode() -> str:
    """``online`` for somebody who is logged in, else ``offline``: wandb must never ask for a login.

    ``WANDB_MODE=offline`` and ``disabled`` count.
    """
    asked = os.environ.get("WANDB_MODE", "online")
    if asked != "online":
        return asked
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_entry() else "offline"


def _has_netrc_entry() -> bool:
    """Whether `wandb login` has left its mark."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _WANDB_URL)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(run_dir: Path) -> str:
    """The same as long as the directory holds the same run."""
    path = run_dir / "wandb" / "run_id"
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch("[0-9a-f]{16}", known):  # none yet, or a damaged one
        path.parent.mkdir(exist_ok=True)
        known = secrets.token_hex(8)
        replace_file(path, known)
    return known


def trouble() -> tuple[type[Exception], ...]:
    """What a tracker may raise without being the run's business; wandb's own error where wandb is installed."""
    usual = (OSError, RuntimeError, ValueError)
    try:
        import wandb
    except ImportError:
        return usual
    return (*usual, wandb.Error)
