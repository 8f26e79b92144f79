"""From overrides to what ``python -m vzip memory`` estimates and measures; nothing is loaded to find out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir

from vzip.config.build import launch_of, load_arguments, one_process, resolved
from vzip.config.options import config_dir
from vzip.config.overrides import check_overrides
from vzip.config.several_budgets import at_largest_budget, check_is_one_of_them, spelled_out
from vzip.config.training import settings_of, tuning_plan
from vzip.config.validate import build_compressor, validate
from vzip.errors import ConfigError
from vzip.evaluation.answering.batching import AUTO, AUTO_ON_GPU

if TYPE_CHECKING:
    from vzip.bench.memory.model_shape import ModelShape
    from vzip.bench.memory.workload import Workload
    from vzip.models.vlm import CompressedVlm
    from vzip.train.settings import LaunchSettings, TrainSettings

TEXT_TOKENS = 256  # of a prompt where nothing else is said
NEW_TOKENS = 128


@dataclass(frozen=True)
class MemoryPlan:
    """What is asked about, checked, with nothing loaded.

    Attributes:
        config: the composed configuration.
        shape: the model without weights.
        load: what is on a device at once.
        num_visual: visual tokens of each image (or video).
        train: the training's settings; None: an inference.
        launch: on what it is carried out.
    """

    config: Mapping[str, Any]
    shape: ModelShape
    load: Workload
    num_visual: int
    train: TrainSettings | None
    launch: LaunchSettings

    @property
    def num_processes(self) -> int:
        """Over all machines."""
        return self.launch.num_processes * (self.launch.num_machines or 1)

    @property
    def fits_batch(self) -> bool:
        """Whether the batch is to be as large as fits."""
        return self.train is None and self.config["eval"]["batch_size"] == AUTO


def memory_plan(
    overrides: list[str], inference: bool = False, length: int | None = None, num_new_tokens: int | None = None
) -> MemoryPlan:
    """Composes overrides as train.py would.

    Args:
        overrides: ``group=option``, ``key=value``, ``+exp=RECIPE``.
        inference: of a recipe that trains.
        length: see ``Workload``; None: the training's longest, or a prompt of 256 text tokens.
        num_new_tokens: of an answer; None: the configuration's, or 128.

    Raises:
        ConfigError: naming every problem of the overrides; a length or number that cannot be.
        CheckpointError: a checkpoint whose configuration is not to be had.
        UnsupportedModelError: a model of another kind.
    """
    overrides = spelled_out(overrides, "train")
    check_overrides(overrides, config_dir(), "train")
    with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
        config = resolved(compose("train", overrides))
    validate(config)
    import torch  # only now, as what brings it along: wrong overrides are refused at once

    from vzip.bench.memory.workload import Workload, check_length, num_visual_tokens

    config["launcher"] = one_process(config["launcher"])
    trains = "kind" in config["train"] and not inference
    if trains:
        check_is_one_of_them(config)
        config = at_largest_budget(config)
    _check_asked(config["train"], trains, length, num_new_tokens)
    train, launch = settings_of(config) if trains else (None, launch_of(config))
    shape = model_shape(config["model"], config["compressor"])
    num_frames = None if trains else config["model"]["num_frames"]
    num_visual = num_visual_tokens(shape.on_meta_device(torch.float32), num_frames)
    if train is not None:
        load = _training_load(config, launch.batch_size, length or train.max_length)
    else:
        evaluation = config["eval"]
        count = AUTO_ON_GPU if evaluation["batch_size"] == AUTO else evaluation["batch_size"]
        wanted = num_new_tokens or evaluation["gen_kwargs"]["max_new_tokens"] or NEW_TOKENS
        load = Workload(count, 1, length or num_visual + TEXT_TOKENS, wanted, num_frames)
    check_length(load.length, num_visual)
    return MemoryPlan(config, shape, load, num_visual, train, launch)


def _check_asked(train: Mapping[str, Any], trains: bool, length: int | None, num_new_tokens: int | None) -> None:
    """Raises ConfigError for options that go neither with each other nor with the training."""
    for name, value in (("--length", length), ("--new-tokens", num_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be 1 or more.")
    if trains and num_new_tokens is not None:
        raise ConfigError(
            f"--new-tokens={num_new_tokens}: a training generates none; leave it out, or add --inference."
        )
    if trains and length is not None and length > train["max_length"]:
        raise ConfigError(f"--length={length}: conversations are cut at train.max_length={train['max_length']}.")


def _training_load(config: Mapping[str, Any], batch_size: int, length: int) -> Workload:
    from vzip.bench.memory.workload import Workload

    data = config["data"]
    return Workload(batch_size, data["num_questions"] if data.get("kind") == "scenes" else 1, length)


def model_shape(model: Mapping[str, Any], compressor: Mapping[str, Any]) -> ModelShape:
    """The ``model`` and ``compressor`` groups without weights; published models' configurations are known here.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: as ``memory_plan``.
    """
    from vzip.bench.memory.model_shape import ModelShape
    from vzip.bench.shapes import name_of, resolve
    from vzip.compressors.base import check_reads_no_text
    from vzip.models.families import FamilyOptions, adapter_class_for_config
    from vzip.models.hub import Checkpoint
    from vzip.models.load import read_config, resolve_checkpoint

    if model["adapter_path"] is not None:
        raise ConfigError(
            f"model.adapter_path={model['adapter_path']}: its layers are in no configuration, so they cannot be counted"
            " here. Set it to null; LoRA that trains is counted (train=projector_lora)."
        )
    if (published := name_of(model["name_or_path"])) is not None:
        config = resolve(published).config
    else:
        source = resolve_checkpoint(model["name_or_path"])
        checkpoint = Checkpoint(source, model["revision"], key="model.name_or_path")
        config = read_config(checkpoint.directory)
    options = FamilyOptions(**{each.name: model[each.name] for each in fields(FamilyOptions)})
    built = build_compressor(compressor)
    check_reads_no_text(built, "memory is estimated without one")
    adapter_class_for_config(config).check_settings(config, built, options, model["num_frames"])
    return ModelShape(config, built, options, model["quantization"], model["attn_implementation"])


def training_estimate(config: Mapping[str, Any]) -> Callable[[LaunchSettings, int], int]:
    """What a training needs, for any launcher: the one door through which ``launcher=auto`` asks.

    Args:
        config: composed, valid, with a training; its ``launcher`` group is not looked at.

    Returns:
        Bytes at the peak on each device by launch settings, all of them given, and number of processes over all
        machines. Conversations as long as they may be; LoRA layers of ``model.adapter_path`` are not counted.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: as ``memory_plan``.
    """
    from vzip.bench.memory.estimate import estimate_training
    from vzip.models.families import adapter_class_for_config

    shape = model_shape({**config["model"], "adapter_path": None}, config["compressor"])
    train = settings_of(config)[0]
    adapter_class_for_config(shape.config).check_template(train.template)

    def needs(launch: LaunchSettings, num_processes: int) -> int:
        load = _training_load(config, launch.batch_size, train.max_length)
        return estimate_training(shape, train, launch, load, num_processes).total()

    return needs


def estimate(plan: MemoryPlan) -> Counter[str]:
    """The peak, bytes by what they are for; nothing is loaded. Raises as ``vzip.bench.memory.estimate``."""
    from vzip.bench.memory.estimate import estimate_inference, estimate_training

    if plan.train is None:
        return estimate_inference(plan.shape, _dtype(plan), plan.load)
    return estimate_training(plan.shape, plan.train, plan.launch, plan.load, plan.num_processes)


def estimate_fitting(plan: MemoryPlan, device_bytes: float) -> tuple[MemoryPlan, Counter[str]]:
    """The peak of an inference, its batch halved until it fits, as ``eval.batch_size=auto`` does on such a device."""
    while (peak := estimate(plan)).total() > device_bytes and plan.load.num_images > 1:
        plan = replace(plan, load=replace(plan.load, num_images=(plan.load.num_images + 1) // 2))
    return plan, peak


def check_measurable(plan: MemoryPlan) -> None:
    """Refuses, before anything is built, what one process on this machine cannot do."""
    from vzip.train.distributed import uses_cuda

    launcher, quantization = plan.config["launcher"], plan.shape.quantization
    uses_cuda(plan.launch.device)
    if plan.train is not None and (plan.num_processes > 1 or plan.launch.strategy != "single"):
        raise ConfigError(
            f"--measure with launcher={launcher['name']}: only a single process is measured. Add launcher=inline, or"
            " leave --measure out."
        )
    if quantization is not None and not _is_here(plan):
        raise ConfigError(
            f"--measure with model.quantization={quantization}: bitsandbytes quantizes a checkpoint while it is read,"
            " so it must be here: model.name_or_path=DIR."
        )


def measure(plan: MemoryPlan) -> int:
    """Bytes at the peak of a real step or answer on this machine, with random weights where there is no checkpoint."""
    from vzip.bench.memory.measure import measure_inference, measure_training

    vlm, train, launch = _real_model(plan), plan.train, plan.launch
    if train is None:
        return measure_inference(vlm, plan.load)
    num_batches = min(2, launch.accumulation(train.samples_per_step, 1))  # further ones leave what the second left
    return measure_training(vlm, replace(train, samples_per_step=num_batches * launch.batch_size), launch, plan.load)


def _real_model(plan: MemoryPlan) -> CompressedVlm:
    import torch

    import vzip
    from vzip.train.distributed import uses_cuda

    if not _is_here(plan):
        device = torch.device("cuda" if uses_cuda(plan.launch.device) else "cpu")
        return plan.shape.with_random_weights(device, _dtype(plan))
    model = {**plan.config["model"], "projector": None}
    if plan.train is not None:
        return tuning_plan({**plan.config, "model": model}).load_model(plan.train.precision)
    return vzip.load_vlm(**load_arguments(model), compressor=plan.shape.compressor)


def _is_here(plan: MemoryPlan) -> bool:
    """Whether the checkpoint itself lies on this machine."""
    from vzip.models.load import resolve_checkpoint

    return isinstance(resolve_checkpoint(plan.config["model"]["name_or_path"]), Path)


def _dtype(plan: MemoryPlan) -> Any:
    """Of the weights that do not train."""
    from vzip.models.load import DTYPES
    from vzip.models.weights.quantization import compute_dtype

    name = plan.config["model"]["dtype"] if plan.train is None else plan.train.precision
    return compute_dtype(DTYPES[name], plan.shape.config)
