"""The images of lmms-eval's questions, opened again after a run by who looks at its answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vzip.errors import ImageError, ManifestError, VzipError
from vzip.media.images import load_image

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def sample_images(
    task: str, include_path: str | Path | None = None
) -> Callable[[Mapping[str, Any]], Sequence[Image.Image]]:
    """What opens the images of a row of ``samples.jsonl`` of a task.

    Nothing is downloaded. It raises ImageError for a question that has another text in the data, or shows no image
    (but a video).

    Args:
        task: lmms-eval's name.
        include_path: a folder of task files of one's own; the code that they name is run.

    Raises:
        MissingPackageError, ConfigError, UnsupportedModelError: as ``find_tasks``.
        ManifestError: the data is not on this machine.
    """
    if not {"huggingface_hub", "datasets"} & sys.modules.keys():  # they read it when they are imported
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    from huggingface_hub import constants

    from vzip.evaluation.benchmarks.catalog import task_config
    from vzip.evaluation.benchmarks.task_data import is_remote
    from vzip.evaluation.task_images import load_tasks

    def check(manager: Any, names: Sequence[str]) -> None:
        if not constants.HF_HUB_OFFLINE and is_remote(task_config(manager, task)):
            raise ManifestError(
                f"task {task}: its data is on the hub; with HF_HUB_OFFLINE=1 this cache is looked into."
            )

    try:
        found = load_tasks([task], include_path, check)[task]
    except (ValueError, TypeError) as error:  # what `datasets` says of a cache that another version of it wrote
        if isinstance(error, VzipError):
            raise
        raise ManifestError(f"task {task}: its data is not at hand: {error}") from error

    def images(row: Mapping[str, Any]) -> Sequence[Image.Image]:
        number = row["doc_id"]
        if not isinstance(number, int) or not 0 <= number < len(found.eval_docs):
            raise ImageError(f"task {task}: the data that is here has no question {number}.")
        doc = found.eval_docs[number]
        if str(found.doc_to_text(doc)).strip() not in row["question"]:
            raise ImageError(f"task {task}, question {number}: has another text in the data that is here.")
        try:
            visuals = found.doc_to_visual(doc)
        except SystemExit as error:  # what several of lmms-eval's tasks do where a video is missing
            raise ImageError(f"task {task}, question {number}: {error}") from error
        shown = [one for one in visuals if isinstance(one, Image.Image)]
        if not shown:
            raise ImageError(f"the question is about {'a video' if visuals else 'no image'}.")
        return [load_image(one) for one in shown]

    return images
