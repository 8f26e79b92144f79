"""Carries out an evaluation plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir

from vzip.config.build import EvaluationPlan, evaluation_plan
from vzip.config.options import config_dir
from vzip.log import keeping
from vzip.results.owner import owning

logger = logging.getLogger("vzip.eval")


def run_plan(plan: EvaluationPlan) -> dict[str, Any]:
    """Loads the model, unless the last plan of this process had the same, and evaluates it; returns the record.

    Raises:
        VzipError: for what the user can mend.
    """
    # Imported only now: the configuration was judged before torch, transformers and lmms-eval cost their seconds.
    import torch

    from vzip.evaluation.answering.resume import kept_answers
    from vzip.evaluation.run import check_run_dir, evaluate
    from vzip.models.model_cache import KEEPER

    if plan.num_threads is not None:
        torch.set_num_threads(plan.num_threads)
    directory = plan.evaluation["run_dir"]
    with owning(directory), keeping(lambda: kept_answers(directory)):
        check_run_dir(directory, overwrite=plan.evaluation["overwrite"])  # another process may just have ended
        include_path = plan.include_path()
        plan.check_tasks(include_path)
        vlm = KEEPER.load(plan.model, plan.compressor, plan.tower_cache_gib, plan.pruner)
        method = plan.compressor if plan.pruner is None else f"{plan.compressor} and {plan.pruner}"
        logger.info("evaluating %s with %s into %s", ", ".join(plan.evaluation["tasks"]), method, directory)
        return evaluate(vlm, **{**plan.evaluation, "include_path": include_path})


def evaluate_words(words: Sequence[str]) -> dict[str, Any]:
    """As ``python eval.py`` with these overrides of one process, in this one.

    Raises:
        VzipError: for what the user can mend.
    """
    from vzip.train.distributed import check_devices

    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        plan = evaluation_plan(compose("eval", list(words)))
    check_devices(plan.launch)
    return run_plan(plan)
