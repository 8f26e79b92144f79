"""Trains what can be trained: in this version the built-in model, from scratch.

python train.py +exp=tiny_from_scratch
"""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from vzip.config.build import training_plan
from vzip.config.entry import entry_point

logger = logging.getLogger("vzip.train")


@entry_point("train")
def main(cfg: DictConfig) -> None:
    plan = training_plan(cfg)

    from vzip.demo import train_tiny

    logger.info("training the built-in model into %s", plan["out"])
    train_tiny.train(**plan)


if __name__ == "__main__":
    main()
