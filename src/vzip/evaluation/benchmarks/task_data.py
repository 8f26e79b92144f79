"""Data sets of lmms-eval's tasks: whether the hub has them to give, asked once and before a model is loaded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from vzip.errors import ManifestError
from vzip.models.hub import HUB_ID, TIMEOUT_S, HttpError

from .catalog import members_of, task_config

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

_LOGIN = (
    "lmms-eval asks the hub for it under a user's name. Run `hf auth login`, or set HF_TOKEN; any account's token will"
    " do for the public data sets."
)
_FETCH = "fetch it where there is a network, with `python -m vzip prefetch`."


def _offline() -> str:
    """What to do without a network."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE=1 is set and the data is not in this cache (HF_HOME names another): {_FETCH}"
    return (
        "If the data is in the local cache already, set HF_HUB_OFFLINE=1 (and HF_HOME, if the cache is elsewhere); else"
        f" {_FETCH}"
    )


def check_data(manager: TaskManager, tasks: Sequence[str]) -> None:
    """Makes one short request if a task's data comes from the hub; lmms-eval would try for minutes.

    What has answered once in this process is not asked again. With ``HF_HUB_OFFLINE=1`` nothing is asked: what is not
    in the cache is an error when it is loaded.

    Raises:
        ManifestError: the hub cannot be reached, or a task wants a token and there is none.
    """
    if constants.HF_HUB_OFFLINE:
        return
    remote = [(name, config) for name, config in _configs(manager, tasks) if is_remote(config)]
    if not remote:
        return
    name, path = remote[0][0], remote[0][1]["dataset_path"]
    try:
        _ask_hub(path)
    except (HttpError, OSError) as error:
        raise ManifestError(
            f"task {name}: its data set {path} is on the hub, which cannot be reached"
            f" ({_first_line(error)}). {_offline()}"
        ) from error
    wanting = [name for name, config in remote if (config.get("dataset_kwargs") or {}).get("token") is True]
    if wanting and get_token() is None:
        raise ManifestError(f"task {wanting[0]}: its data set {path} is on the hub, and {_LOGIN}")


@functools.cache  # an error is not kept
def _ask_hub(path: str) -> None:
    # An error's status is an answer too: what it means for this data set is seen when it is loaded.
    with contextlib.suppress(HfHubHTTPError):
        HfApi().dataset_info(path, timeout=TIMEOUT_S)


@contextlib.contextmanager
def naming_data_errors(tasks: Sequence[str]) -> Iterator[None]:
    """Turns what is raised for data that cannot be had into ManifestError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ManifestError(f"the data of {', '.join(tasks)} is on the hub, and {_LOGIN}") from error
    except (ConnectionError, HttpError, DatasetsError) as error:
        raise ManifestError(
            f"the data of {', '.join(tasks)} cannot be had: {_first_line(error)}. {_offline()}"
        ) from error


def _configs(manager: TaskManager, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task's file; groups by their tasks."""
    for name in names:
        if (members := members_of(manager, name)) is not None:
            yield from _configs(manager, members)
        else:
            yield name, task_config(manager, name)


def is_remote(config: dict[str, Any]) -> bool:
    path = str(config.get("dataset_path"))
    on_disk = (config.get("dataset_kwargs") or {}).get("load_from_disk") or Path(path).exists()
    return HUB_ID.fullmatch(path) is not None and not on_disk


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
