"""Which lmms-eval tasks there are: the built-in ones and those of a folder of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, UnsupportedModelError, nearest

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager


def find_tasks(tasks: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """A task manager that knows every name in ``tasks``.

    A folder of one's own is read first: where it holds all the names, lmms-eval's own 1,700 task files are not read at
    all, which saves seconds. A name that both define is refused, because lmms-eval would silently take its own.

    Raises:
        ConfigError: ``include_path`` is no folder or holds no task, an unknown name, a name defined twice.
        UnsupportedModelError: a task that is not answered by generated text.
    """
    from lmms_eval.tasks import TaskManager

    own = None
    if include_path is not None:
        folder = Path(include_path)
        if not folder.is_dir():
            raise ConfigError(f"include_path={str(include_path)!r}: no such folder. Change eval.include_path.")
        own = TaskManager(verbosity="ERROR", include_path=str(folder), include_defaults=False, model_name="vzip")
        if not own.all_tasks:
            raise ConfigError(
                f"include_path={str(include_path)!r}: no lmms-eval task file (*.yaml with a `task:`) in it or below it."
                " Change eval.include_path."
            )
        if set(tasks) <= set(own.all_tasks):
            _check_generative(own, tasks)
            return own
    everything = TaskManager(
        verbosity="ERROR", include_path=None if own is None else str(include_path), model_name="vzip"
    )
    for name in tasks:
        if name not in everything.all_tasks:
            known = everything.all_tasks
            raise ConfigError(
                f"task {name!r} is not known{nearest(name, known)}. There are {len(known)} names in lmms-eval"
                + (f" and {str(include_path)!r}" if own else "; eval.include_path names a folder of your own tasks")
                + ". Change eval.tasks."
            )
        if own is not None and name in own.all_tasks and _path_of(own, name) != _path_of(everything, name):
            raise ConfigError(
                f"task {name!r} of {_path_of(own, name)} has the name of a built-in task of lmms-eval, which would be"
                " run instead. Give yours another name."
            )
    _check_generative(everything, tasks)
    return everything


def _path_of(manager: TaskManager, name: str) -> str:
    return str(manager.task_index[name]["yaml_path"])


def task_config(manager: TaskManager, name: str) -> dict[str, Any]:
    """The task's file with its includes, functions resolved. Empty for tags and tasks made by Python classes."""
    from lmms_eval.utils import load_yaml_config

    entry = manager.task_index[name]
    if entry["type"] != "task":
        return {}
    return load_yaml_config(entry["yaml_path"], mode="full")


def _check_generative(manager: TaskManager, tasks: Sequence[str]) -> None:
    for name in tasks:
        output_type = task_config(manager, name).get("output_type", "generate_until")
        if output_type != "generate_until":
            raise UnsupportedModelError(
                f"task {name} has output_type {output_type}; vzip evaluates generated answers (generate_until) only."
                " Change eval.tasks."
            )
