"""Which lmms-eval tasks there are: the built-in ones and those of a folder of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
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
    built_in = built_in_tasks()
    own_names = set() if own is None else set(own.all_tasks)
    known = sorted({*built_in.all_tasks, *own_names})
    for name in tasks:
        if name not in known:
            raise ConfigError(
                f"task {name!r} is not known{nearest(name, known)}. There are {len(known)} names in lmms-eval"
                + (f" and {str(include_path)!r}" if own else "; eval.include_path names a folder of your own tasks")
                + ". Change eval.tasks."
            )
        if name in own_names and name in built_in.all_tasks:
            raise ConfigError(
                f"task {name!r} of {str(include_path)!r} has the name of a built-in task of lmms-eval, which would be"
                " run instead. Give yours another name."
            )
    manager = built_in
    if own_names & set(tasks):  # some from each
        manager = TaskManager(verbosity="ERROR", include_path=str(include_path), model_name="vzip")
    _check_generative(manager, tasks)
    return manager


@cache
def built_in_tasks() -> TaskManager:
    """lmms-eval's own tasks; read once a process, for it takes seconds."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(verbosity="ERROR", model_name="vzip")


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
