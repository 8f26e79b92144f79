"""Evaluates a model with compressed visual tokens.

python eval.py                                        the built-in model on its benchmark, VisionZip at 64 tokens
python eval.py compressor=none budget=full            the same without compression
python eval.py -m budget=192tok,128tok,64tok          a sweep
python eval.py launcher=ddp launcher.num_processes=2   on two devices (torchrun or accelerate launch will do as well)
python eval.py model=llava15_7b eval=quick            another model, other benchmarks (a hub and a GPU)
python eval.py model=llava15_7b dry_run=true          checks and tells what would be done, and stops
python eval.py +exp=llava15_7b_64tok                  a row of the paper's tables; `python -m vzip list` shows them all
"""

from __future__ import annotations

from vzip import starting

if __name__ == "__main__":
    starting.begin()  # before the imports that take their time

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vzip.cli.entry import entry_point
from vzip.config.build import EvaluationPlan, evaluation_plan
from vzip.config.options import own_folder_overrides
from vzip.config.preview import stop_dry, tell
from vzip.sweep.execute import run_plan
from vzip.sweep.sweep import alone_in, check_objective, in_sweep

logger = logging.getLogger("vzip.eval")


@entry_point("eval")
def main(cfg: DictConfig) -> float | None:
    plan = evaluation_plan(cfg, of_sweep=in_sweep())
    check_objective(plan.evaluation["tasks"])
    if in_sweep() or plan.dry_run:
        tell(plan, briefly=in_sweep())
    if plan.dry_run:
        stop_dry(plan)
        return None
    if in_sweep():
        with alone_in(plan.evaluation["run_dir"]):
            return act(plan.as_it_stands_now())

    from vzip.train.distributed import check_devices
    from vzip.train.launch import launch_command, run_command

    check_devices(plan.launch)
    command = launch_command(
        plan.launch, Path(__file__).resolve(), [*own_folder_overrides(), *HydraConfig.get().overrides.task]
    )
    if command is not None:
        plan.check_tasks(plan.include_path())  # one message before they start, not one of each
        run_command(command)
        return None
    tell(plan)
    return act(plan)


def act(plan: EvaluationPlan) -> float | None:
    """Evaluates, or takes the record of the same run, and prints it; returns what an optimising sweep maximises."""
    # Imported only now: the configuration is judged before torch, transformers and lmms-eval cost their seconds.
    from vzip.report.table import print_record
    from vzip.results.sweep_summary import average_score

    if plan.finished is None:
        record = run_plan(plan)
    else:
        logger.info("%s holds this very run: taken from its record", plan.evaluation["run_dir"])
        record = plan.finished
    print_record(record)
    return average_score(record) if record else None  # of several processes only the first has one


if __name__ == "__main__":
    main()
