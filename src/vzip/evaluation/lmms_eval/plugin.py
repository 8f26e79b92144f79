"""What lmms-eval finds through the entry point ``lmms_eval.models``: `lmms-eval --model vzip --model_args ...`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "vzip"


def manifests() -> list[ModelManifest]:
    """The one model this package brings; the class is imported only when it is chosen.

    lmms-eval asks before it reads task files, so with ``--include_path .../vzip/evaluation/tasks`` it runs vzip's too.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    from vzip.evaluation.benchmarks.catalog import allow_installed

    allow_installed()
    return [ModelManifest(model_id=MODEL_ID, chat_class_path="vzip.config.model_args.VzipByArguments")]
