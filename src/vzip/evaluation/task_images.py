"""The images of lmms-eval's tasks by themselves, each once, without a model and without an answer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vzip.errors import ConfigError
from vzip.media.images import load_image

from .answering.visuals import UNUSABLE
from .lmms_eval.harness import check_lmms_eval, quiet_logger

logger = logging.getLogger(__name__)

Named = tuple[str, Image.Image]


def open_tasks(tasks: Sequence[str], include_path: str | Path | None) -> Iterator[Named]:
    """Loads the tasks' data and returns an iterator over their images; one is decoded at a time.

    Several questions about one image count once, which its content tells.

    Returns:
        names, as ``textvqa_val, question 3``, and images as RGB.

    Raises:
        ManifestError: the data cannot be had: no network, not in the cache, not whole.
        ConfigError, UnsupportedModelError, MissingPackageError: as ``find_tasks``; a task without images.
    """
    from .benchmarks.task_data import check_data

    found = load_tasks(tasks, include_path, check_data)
    order = sorted(found, key=lambda name: tasks.index(name) if name in tasks else len(tasks))  # lmms-eval has its own
    return _images({name: found[name] for name in order})


def load_tasks(
    tasks: Sequence[str], include_path: str | Path | None, check: Callable[[Any, Sequence[str]], None]
) -> dict[str, Any]:
    """lmms-eval's tasks with their data, by name; of groups their members.

    Args:
        tasks: their names.
        include_path: a folder of task files of one's own; the code that they name is run.
        check: given lmms-eval's ``TaskManager`` and the names before any data is loaded; raises where it must not be.

    Raises:
        ManifestError: the data cannot be had.
        ConfigError, UnsupportedModelError, MissingPackageError: as ``find_tasks``.
    """
    check_lmms_eval()
    from lmms_eval.tasks import get_task_dict
    from tenacity import RetryError

    from .benchmarks.catalog import find_tasks
    from .benchmarks.task_data import naming_data_errors

    with quiet_logger(), naming_data_errors(tasks):
        manager = find_tasks(tasks, include_path)
        check(manager, tasks)
        try:
            return dict(_single(get_task_dict(list(tasks), manager, "chat")))
        except RetryError as error:  # lmms-eval wraps data loading in retries, which hide what went wrong
            cause = error.last_attempt.exception()
            raise cause if cause is not None else error from error


def _single(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Tasks by name, those of groups among them."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _single(task)
        else:
            yield str(name), task


def _images(tasks: Mapping[str, Any]) -> Iterator[Named]:
    seen: set[bytes] = set()
    for task_name, task in tasks.items():
        for number, doc in enumerate(task.eval_docs):
            name = f"{task_name}, question {number}"
            try:
                shown = task.doc_to_visual(doc)
                visuals = shown if isinstance(shown, list | tuple) else [shown]
                if not all(isinstance(visual, Image.Image) for visual in visuals):
                    raise ConfigError(
                        f"task {name} shows something else than images, which a vision tower alone is not given. Give"
                        " another task by eval.tasks=[...], or a folder by --images DIR."
                    )
                images = [load_image(visual) for visual in visuals]
            except UNUSABLE as error:
                logger.warning("left out: task %s: %s", name, error)
                continue
            for image in images:
                digest = hashlib.blake2b(image.tobytes() + repr(image.size).encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield name, image
