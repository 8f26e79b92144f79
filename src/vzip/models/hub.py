"""Checkpoints on disk: a directory as it is, a hub's repository fetched, or taken from the local cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError

from vzip.errors import CheckpointError
from vzip.json_files import read_json

# Base of all that the hub's client raises for a request that fails: of httpx up to its version 1, of httpx2 from 2 on.
HttpError: type[Exception] = HfHubHTTPError.__bases__[0]
# The model in the package, named as a hub's are.
BUILT_IN_NAME = "vzip/tiny"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Of the one request that finds out whether the hub can be reached.
TIMEOUT_S = 5.0
_MAX_HUB_ID = 96  # the hub's own rule, and that two dashes or dots stand in none
# What the loaders of Hugging Face and torch raise for files that are damaged or say what cannot be.
READ_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
    UnpicklingError,
)
_SETTINGS = (".json", ".jinja", ".txt", ".model")
_LLAVA_OWN = ("non_lora_trainables.bin", "mm_projector.bin")  # beside LoRA layers in either format
_OPEN_CLIP = "open_clip_pytorch_model.bin"
# Of a repository of tuned weights (vzip.models.weights.tuned): the file by which it is known, and its folder of LoRA.
TUNED_HEADER, TUNED_LORA = "tuned.json", "lora"
# By which a folder of the local cache is known; the hub's list of files is not there to tell what else it must have.
_CONFIGS = ["config.json", "adapter_config.json", "open_clip_config.json", TUNED_HEADER]


def built_in_folder() -> Path:
    """Where the model in the package is."""
    return Path(__file__).parents[1] / "demo" / "tiny"


def public_name(source: Path | str) -> str:
    """What a checkpoint was loaded from, the model in the package by its name."""
    return BUILT_IN_NAME if Path(source) == built_in_folder() else str(source)


def is_hub_id(name: str) -> bool:
    """Whether a text can be the name of a repository on the hub: owner and name."""
    return HUB_ID.fullmatch(name) is not None and len(name) <= _MAX_HUB_ID and ".." not in name and "--" not in name


def shards_of(index: Path) -> set[str]:
    """The weight files that an index (``model.safetensors.index.json``) lists, all beside it.

    Raises:
        CheckpointError: it cannot be read, or lists something else.
    """
    try:
        of_tensors = read_json(index)["weight_map"]
        names = set(of_tensors.values())
        odd = [name for name in names if not isinstance(name, str) or not name or Path(name).name != name]
        if odd or not names:
            raise ValueError(f"weight_map names {odd[0]!r:.80}" if odd else "weight_map is empty")
        return names
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: not a readable weight index ({type(error).__name__}: {error}). It must have a weight_map from"
            " each tensor to the file beside it that holds it; download it again."
        ) from error


def needed_files(names: Iterable[str], weights: bool = True) -> list[str]:
    """Of a repository's files those that are read here: settings, processor, tokenizer, and the weights.

    Of tuned weights also those of the LoRA layers that were trained with them.

    Args:
        names: all its files, with their folders.
        weights: in one format, where the repository has several; False: none.
    """
    names = list(names)
    top = [name for name in names if "/" not in name]
    if TUNED_HEADER in top:
        top += [name for name in names if name.startswith(f"{TUNED_LORA}/")]
    settings = [name for name in top if name.endswith(_SETTINGS)]
    if not weights:
        return settings
    if _OPEN_CLIP in top:
        return [*settings, _OPEN_CLIP]
    ending = ".safetensors" if any(name.endswith(".safetensors") for name in top) else ".bin"
    return [*settings, *(name for name in top if name.endswith(ending) or name in _LLAVA_OWN)]


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
