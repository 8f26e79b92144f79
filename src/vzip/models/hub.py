"""Files of a hub's repository: from the network where there is one, else from the local cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import httpx
from huggingface_hub import hf_hub_download, snapshot_download

from vzip.errors import CheckpointError


def resolve_revision(source: Path | str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a hub id stands for (without network: in the cache); None for a directory.

    All files are then read from that commit, and records name it. Raises what the hub's client raises.
    """
    if isinstance(source, Path):
        return None
    return Path(hf_hub_download(source, "config.json", revision=revision)).parent.name


def fetch(hub_id: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The local folder of a repository's files.

    Args:
        hub_id: owner and name.
        patterns: of the files that are needed.
        revision: branch, tag or commit.

    Raises:
        CheckpointError: they cannot be fetched, and the cache has no folder of that revision.
    """
    download = partial(snapshot_download, hub_id, revision=revision, allow_patterns=list(patterns))
    try:
        return Path(download())
    except (OSError, ValueError, httpx.TransportError) as error:
        # The client looks into its cache by itself for branches, but not, in all versions, for commits.
        try:
            return Path(download(local_files_only=True))
        except (OSError, ValueError):
            first_line = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{hub_id} is neither in the local cache nor could it be fetched from the hub ({first_line})."
            ) from error
