"""Checkpoints on disk: a directory as it is, a hub's repository fetched, or taken from the local cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from vzip.errors import CheckpointError

# Base of all that the hub's client raises for a request that fails: of httpx up to its version 1, of httpx2 from 2 on.
HttpError: type[Exception] = HfHubHTTPError.__bases__[0]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Of the one request that finds out whether the hub can be reached.
TIMEOUT_S = 5.0
_SETTINGS = (".json", ".jinja", ".txt", ".model")
_OPEN_CLIP = "open_clip_pytorch_model.bin"
# By which a folder of the local cache is known; the hub's list of files is not there to tell what else it must have.
_CONFIGS = ["config.json", "adapter_config.json", "open_clip_config.json"]


def needed_files(names: Iterable[str], weights: bool = True) -> list[str]:
    """Of a repository's files those that are read here: settings, processor, tokenizer, and the weights.

    Args:
        names: all its files, with their folders.
        weights: in one format, where the repository has several; False: none.
    """
    top = [name for name in names if "/" not in name]
    settings = [name for name in top if name.endswith(_SETTINGS)]
    if not weights:
        return settings
    if _OPEN_CLIP in top:
        return [*settings, _OPEN_CLIP]
    ending = ".safetensors" if any(name.endswith(".safetensors") for name in top) else ".bin"
    return [*settings, *(name for name in top if name.endswith(ending))]


class Checkpoint:
    """The files of a checkpoint, brought to this machine as they are needed.

    The hub is asked once, with a short time limit. If it cannot be reached, everything comes from the local cache. All
    files are of one commit.

    Attributes:
        source: a directory, or a hub id (owner and name).
        revision: branch, tag or commit of a hub id; None: the main branch.
    """

    def __init__(self, source: Path | str, revision: str | None = None, key: str | None = None) -> None:
        """Reaches for nothing yet.

        Args:
            source, revision: see the class.
            key: the setting that named it, for messages.
        """
        self.source = source
        self.revision = revision
        self._key = key

    @cached_property
    def directory(self) -> Path:
        """Where its small files are: configuration, processor, tokenizer.

        Raises:
            CheckpointError: neither the hub nor the local cache has them.
        """
        return self.source if isinstance(self.source, Path) else self._fetch(weights=False)

    @property
    def commit(self) -> str | None:
        """The commit that all files are of; None for a directory. Raises as ``directory``."""
        return None if isinstance(self.source, Path) else self.directory.name

    def fetch_weights(self) -> Path:
        """Brings the weights, in one format if the repository has two; returns ``directory``. Raises as it does."""
        return self.source if isinstance(self.source, Path) else self._fetch(weights=True, commit=self.commit)

    def _fetch(self, weights: bool, commit: str | None = None) -> Path:
        """The local folder; without ``commit`` of what ``revision`` stands for, which the cache then remembers."""
        hub_id = str(self.source)
        names, problem = self._reached
        try:
            return Path(
                snapshot_download(
                    hub_id,
                    revision=commit or self.revision,
                    allow_patterns=needed_files(names, weights) if problem is None else _CONFIGS,
                    local_files_only=problem is not None,
                )
            )
        except (HttpError, OSError, ValueError) as error:
            reason = str(problem or error).strip().splitlines() or [type(problem or error).__name__]
            name = f"{self._key}={hub_id}" if self._key else hub_id
            at = f" at revision {self.revision}" if self.revision else ""
            raise CheckpointError(
                f"{name}: the checkpoint{at} is neither in the local cache ({constants.HF_HUB_CACHE}) nor could it be"
                f" fetched from the hub ({reason[0]}). Check name, revision and network. On a machine without a"
                " network: fetch it elsewhere and bring that cache here (HF_HOME=DIR HF_HUB_OFFLINE=1), or give a"
                f" directory instead, as {self._key or 'model.name_or_path'}=DIR."
            ) from error

    @cached_property
    def _reached(self) -> tuple[list[str], Exception | None]:
        """The hub's list of the files, asked for once; or no names, and what went wrong."""
        try:
            info = HfApi().model_info(str(self.source), revision=self.revision, timeout=TIMEOUT_S)
        except (HttpError, OSError, ValueError) as error:
            return [], error
        return [sibling.rfilename for sibling in info.siblings or ()], None
