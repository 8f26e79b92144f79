"""Tuned weights to a hub: which files, without anything private, and their way there in one commit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vzip.errors import CheckpointError, ConfigError, RunExistsError, RunWriteError
from vzip.json_files import from_json, read_json, to_json

from ..hub import BUILT_IN_NAME, TIMEOUT_S, HttpError, is_hub_id
from .digests import DIGESTS_NAME, check_digests, digests_file, sha256
from .lora_training import WEIGHTS_NAME as LORA_WEIGHTS_NAME
from .tuned import FORMAT, HEADER_NAME, LORA_NAME, WEIGHTS_NAME, read_header, read_tensors

CARD_NAME = "README.md"
_LORA_CONFIG = "adapter_config.json"
# Of a header; the machine and the launcher of a training are nobody else's concern.
_PUBLIC = (
    *("format", "compressor", "compressors", "parts", "lora", "commit", "versions", "step", "validation_loss"),
    *("num_parameters", "sha256", "lora_sha256"),
)
# A path from the root, of a home or of a drive; the slashes of an address come after a colon or another slash.
_PATH = re.compile(r"(?<![\w:/.\\>-])(?:~/[\w.]|/(?:[\w.+@-]+/)+[\w.+@-]|[A-Za-z]:\\{1,2}\w)[^\s\"'`|<>]*")
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}")
_ESCAPED = re.compile(r"\\([/`*_{}\[\]<>|#])")  # in Markdown and JSON
_OURS = re.compile(
    "|".join(
        [
            *(re.escape(name) for name in (CARD_NAME, DIGESTS_NAME, HEADER_NAME, WEIGHTS_NAME, ".gitattributes")),
            rf"{LORA_NAME}/.*",
        ]
    )
)


@dataclass(frozen=True)
class Target:
    """Where on the hub.

    Attributes:
        hub_id: owner and name.
        revision: the branch; None: the main one.
        private: a repository that is made is private; one that is there already must be.
        replace: put new tuned weights in the place of others, which stay in the repository's history.
    """

    hub_id: str
    revision: str | None = None
    private: bool = False
    replace: bool = False

    @property
    def name(self) -> str:
        """As ``model.projector`` takes it."""
        return self.hub_id + (f"@{self.revision}" if self.revision else "")


def tuned_files(directory: Path, base: tuple[str, str | None]) -> tuple[dict[str, Path | bytes], dict[str, Any]]:
    """The files of tuned weights that others need, by name, and their header; every weight is read and checked.

    No optimizer, no settings of the machine, and the base model under its public name.

    Args:
        directory: that training wrote.
        base: public name and revision of the base model.

    Raises:
        CheckpointError: it holds no tuned weights, or damaged ones.
    """
    if directory.name.startswith(".") and directory.name.endswith((".writing", ".old")):
        raise CheckpointError(
            f"{directory}: was being written when the training stopped, and may lack a part. Push the directory beside"
            " it without the dot, or let the training finish (the same command goes on)."
        )
    header = read_header(directory)[1]
    if (directory / DIGESTS_NAME).is_file():
        check_digests(directory, "Copy or train it again.")
    for name, key in ((WEIGHTS_NAME, "sha256"), (f"{LORA_NAME}/{LORA_WEIGHTS_NAME}", "lora_sha256")):
        if key in header and sha256(directory / name) != header[key]:
            raise CheckpointError(f"{directory / name}: damaged (its SHA-256 is not the header's); train it again.")
    read_tensors(directory)  # whole, and finite
    public = {key: header[key] for key in _PUBLIC if key in header}
    if isinstance(under := header.get("loaded_lora"), dict):  # of a directory its name alone
        name = str(under.get("name_or_path"))
        public["loaded_lora"] = {**under, "name_or_path": name if is_hub_id(name) else Path(name).name}
    public["base"] = {**header["base"], "name_or_path": base[0], "revision": base[1]}
    files: dict[str, Path | bytes] = {WEIGHTS_NAME: directory / WEIGHTS_NAME}
    if "lora_sha256" in header:
        config = read_json(directory / LORA_NAME / _LORA_CONFIG)
        files[f"{LORA_NAME}/{_LORA_CONFIG}"] = to_json({**config, "base_model_name_or_path": base[0]}, indent=2) + b"\n"
        files[f"{LORA_NAME}/{LORA_WEIGHTS_NAME}"] = directory / LORA_NAME / LORA_WEIGHTS_NAME
    files[HEADER_NAME] = to_json(public, indent=1) + b"\n"
    files[DIGESTS_NAME] = digests_file({name: _digest(content) for name, content in sorted(files.items())})
    return files, public


def refuse_private(files: Mapping[str, Path | bytes]) -> None:
    """Refuses texts that hold a path of this machine or a token.

    Raises:
        ConfigError: naming file and place; a token is not shown.
    """
    for name, content in files.items():
        if isinstance(content, Path):
            continue  # tensors: names and numbers
        text = _ESCAPED.sub(r"\1", content.decode("utf-8", "replace"))
        if _TOKEN.search(text):
            raise ConfigError(f"{name}: would hold what looks like an access token. Take it out of the run's settings.")
        if (found := _PATH.search(text)) is not None:
            raise ConfigError(
                f"{name}: would tell a path of this machine ({found[0]}). Where the training or the record names it,"
                " name something public instead (--base HUB_ID for the base model), or leave --record out."
            )


def size_of(content: Path | bytes) -> int:
    """Bytes."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


def check_target(api: Any, target: Target, header: Mapping[str, Any]) -> None:
    """Asks the hub whether the upload may be; nothing is written.

    Args:
        api: a ``huggingface_hub.HfApi``.
        target: where to.
        header: of the weights.

    Raises:
        ConfigError: nobody is logged in; the repository is public and should be private.
        CheckpointError: the hub has no such base model.
        RunExistsError: the repository holds something else.
        RunWriteError: the hub does not answer.
    """
    with _telling(target, "nothing was uploaded"):
        try:
            api.whoami()
        except (LocalTokenNotFoundError, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in (401, 403):
                raise
            raise ConfigError(
                f"--to {target.hub_id}: nobody is logged in to the hub, or the token is not valid. Run `hf auth login`,"
                " or set HF_TOKEN to a token with the right to write. Nothing was uploaded."
            ) from error
        _check_base(api, header["base"])
        try:
            info = api.model_info(target.hub_id, timeout=TIMEOUT_S)
        except RepositoryNotFoundError:
            return
        if target.private and not info.private:
            raise ConfigError(
                f"--private: {target.hub_id} is on the hub already, and public. Make it private there, or name another"
                " repository. Nothing was uploaded."
            )
        _refuse_foreign(target, info)
        if target.revision is not None:
            try:
                info = api.model_info(target.hub_id, revision=target.revision, timeout=TIMEOUT_S)
            except RevisionNotFoundError:
                return  # a new branch begins at what the main one holds, whose weights stay there
            _refuse_foreign(target, info)
        _refuse_other_weights(api, target, header, info)


def upload(api: Any, target: Target, files: Mapping[str, Path | bytes], message: str) -> str:
    """Uploads in one commit, so that the repository has all of it or is as it was; returns the commit's address.

    Args:
        api, target: as for ``check_target``, which comes first.
        files: by name.
        message: of the commit.

    Raises:
        RunWriteError: the upload failed. It may be repeated.
    """
    with _telling(target, "the repository is as it was, and the files here are untouched"):
        api.create_repo(target.hub_id, private=target.private or None, exist_ok=True)
        if target.revision is not None:
            api.create_branch(target.hub_id, branch=target.revision, exist_ok=True)
        there = _names(api.model_info(target.hub_id, revision=target.revision, timeout=TIMEOUT_S))
        stale = [name for name in there if name.startswith(f"{LORA_NAME}/") and name not in files]
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]  # of the weights that were there
        made = api.create_commit(target.hub_id, operations, commit_message=message, revision=target.revision)
        return str(made.commit_url)


def _check_base(api: Any, base: Mapping[str, Any]) -> None:
    name, revision = base["name_or_path"], base["revision"]
    if name == BUILT_IN_NAME:
        return
    try:
        api.model_info(name, revision=revision, timeout=TIMEOUT_S)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"the base model {name}{at} is not on the hub, so nobody could use these weights. Give it as --base"
            " HUB_ID or --base HUB_ID@REVISION. Nothing was uploaded."
        ) from error


def _names(info: Any) -> list[str]:
    return [sibling.rfilename for sibling in info.siblings or ()]


def _refuse_foreign(target: Target, info: Any) -> None:
    foreign = sorted(name for name in _names(info) if not _OURS.fullmatch(name))
    if foreign:
        raise RunExistsError(
            f"--to {target.name}: the repository holds other files ({', '.join(foreign[:4])}"
            f"{', ...' if len(foreign) > 4 else ''}), {len(foreign)} in all. Name a repository of its own for these"
            " weights. Nothing was uploaded."
        )


def _refuse_other_weights(api: Any, target: Target, header: Mapping[str, Any], info: Any) -> None:
    names = _names(info)
    there: Any = None
    if HEADER_NAME in names:
        try:
            there = from_json(Path(api.hf_hub_download(target.hub_id, HEADER_NAME, revision=info.sha)).read_bytes())
        except (EntryNotFoundError, ValueError):
            there = None
    elif not {WEIGHTS_NAME, CARD_NAME} & set(names):
        return  # made, and empty
    same = isinstance(there, dict) and there.get("format") == FORMAT
    same = same and all(there.get(key) == header.get(key) for key in ("sha256", "lora_sha256"))
    if not same and not target.replace:
        what = f"other tuned weights (step {there.get('step')})" if isinstance(there, dict) else "something else"
        raise RunExistsError(
            f"--to {target.name}: the repository holds {what} already. Give --replace to put these in their place (the"
            " others stay in its history), --revision BRANCH, or another name. Nothing was uploaded."
        )


@contextmanager
def _telling(target: Target, what_is_left: str) -> Iterator[None]:
    """Turns what the client raises into one sentence."""
    try:
        yield
    except (ConfigError, CheckpointError, RunExistsError):
        raise
    except (HttpError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunWriteError(
            f"--to {target.name}: the hub refuses or does not answer ({type(error).__name__}: {reason});"
            f" {what_is_left}. Check name, network and your right to write there, and run the same command again."
        ) from error


def _digest(content: Path | bytes) -> str:
    return sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
