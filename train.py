"""Trains: a projector for compressed visual tokens, or more of a model.

python train.py +exp=tiny_64tok                            the built-in model's projector at 64 tokens, here, in minutes
python train.py +exp=llava15_7b_64tok                      a fine-tuned row of the paper's tables, on the GPUs there are
python train.py +exp=llava15_7b_64tok dry_run=true         what that would do: data, steps, launcher, memory
python train.py train=projector data=llava_json data.json=FILE data.image_root=DIR model=...   one's own data

Then: python eval.py with the same overrides and model.projector=trained.
"""

from __future__ import annotations

from vzip import starting

if __name__ == "__main__":
    starting.begin()  # before the imports that take their time

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vzip.cli.entry import entry_point
from vzip.config.launching import launching
from vzip.config.options import own_folder_overrides
from vzip.config.training import checked, tuning_plan
from vzip.config.training_preview import outlook


@entry_point("train")
def main(cfg: DictConfig) -> None:
    config = checked(cfg)
    found = launching(config)
    plan = tuning_plan(found.config)
    if not found.is_told:
        print(outlook(plan, found), flush=True)
    if config["dry_run"]:
        return None
    from vzip.train.distributed import check_devices
    from vzip.train.launch import launch_command, run_command
    from vzip.train.loop import prepare, train

    check_devices(plan.launch)
    overrides = [*own_folder_overrides(), *HydraConfig.get().overrides.task, *found.words]
    command = launch_command(plan.launch, Path(__file__).resolve(), overrides)
    if command is not None:
        prepare(plan)  # whatever is wrong is said once, by this process
        return run_command(command)
    train(plan)


if __name__ == "__main__":
    main()
