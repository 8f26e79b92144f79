"""Evaluates a model with compressed visual tokens.

python eval.py                                        the built-in model on its benchmark, VisionZip at 64 tokens
python eval.py compressor=none budget=full            the same without compression
python eval.py -m budget=192tok,128tok,64tok          a sweep
python eval.py launcher=ddp launcher.num_processes=2   on two devices (torchrun or accelerate launch will do as well)
python eval.py model=llava15_7b eval=quick            another model, other benchmarks (a hub and a GPU)
python eval.py +exp=llava15_7b_64tok                  a row of the paper's tables; `python -m vzip list` shows them all
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vzip.config.build import evaluation_plan
from vzip.config.entry import entry_point

logger = logging.getLogger("vzip.eval")


@entry_point("eval")
def main(cfg: DictConfig) -> None:
    plan = evaluation_plan(cfg)

    from vzip.train.distributed import check_devices
    from vzip.train.launch import launch_command, run_command

    check_devices(plan.launch)
    command = launch_command(plan.launch, Path(__file__).resolve(), list(HydraConfig.get().overrides.task))
    if command is not None:
        sys.exit(run_command(command))

    # Imported only now: the configuration is judged before torch, transformers and lmms-eval cost their seconds.
    import torch

    import vzip
    from vzip.evaluation.run import evaluate
    from vzip.report.table import print_record

    if plan.num_threads is not None:
        torch.set_num_threads(plan.num_threads)
    include_path = plan.include_path()
    plan.check_tasks(include_path)
    logger.info("loading %s with %s", plan.model["name_or_path"], plan.compressor)
    vlm = vzip.load_vlm(**plan.model, compressor=plan.compressor)
    logger.info("evaluating %s into %s", ", ".join(plan.evaluation["tasks"]), plan.evaluation["run_dir"])
    record = evaluate(vlm, **{**plan.evaluation, "include_path": include_path})
    print_record(record)


if __name__ == "__main__":
    main()
