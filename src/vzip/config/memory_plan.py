"""From words to what ``python -m vzip memory`` estimates and measures; nothing is loaded to find out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir

from vzip.config.build import launch_of, load_arguments, one_process, resolved
from vzip.config.options import config_dir
from vzip.config.overrides import check_overrides
from vzip.config.training import FROM_SCRATCH, settings_of, tuning_plan
from vzip.config.validate import build_compressor, validate
from vzip.errors import ConfigError
from vzip.evaluation.answering.batching import AUTO, AUTO_ON_GPU

if TYPE_CHECKING:
    from vzip.bench.memory.ledger import Peak
    from vzip.bench.memory.workload import ModelShape, Workload
    from vzip.models.vlm import CompressedVlm
    from vzip.train.settings import LaunchSettings

TEXT_TOKENS = 256  # of a prompt where nothing else is said
NEW_TOKENS = 128


@dataclass(frozen=True)
class MemoryPlan:
    """What is asked about, checked, with nothing loaded.

    Attributes:
        config: the composed configuration.
        shape: the model without weights.
        load: what is on a device at once.
        num_visual: visual tokens of each picture (or video).
        trains: a training; else an inference.
    """

    config: Mapping[str, Any]
    shape: ModelShape
    load: Workload
    num_visual: int
    trains: bool

    @property
    def dtype(self) -> Any:
        """Of the weights that do not train."""
        from vzip.models.load import DTYPES
        from vzip.models.weights.quantization import compute_dtype

        name = self.config["train"]["precision"] if self.trains else self.config["model"]["dtype"]
        return compute_dtype(DTYPES[name], self.shape.config)

    @property
    def num_processes(self) -> int:
        """Over all machines."""
        launcher = self.config["launcher"]
        return int(launcher["num_processes"] * (launcher["num_machines"] or 1))

    @property
    def halves(self) -> bool:
        """Whether the batch is to be as large as fits."""
        return not self.trains and self.config["eval"]["batch_size"] == AUTO

    @property
    def on_cuda(self) -> bool:
        """Whether the devices are GPUs; they need not be here."""
        import torch

        device = self.config["launcher"]["device"]
        return device == "cuda" or (device == "auto" and torch.cuda.is_available())

    @property
    def is_here(self) -> bool:
        """Whether the checkpoint itself lies on this machine."""
        from vzip.models.load import resolve_checkpoint

        return isinstance(resolve_checkpoint(self.config["model"]["name_or_path"]), Path)


def memory_plan(
    words: list[str], inference: bool = False, length: int | None = None, num_new_tokens: int | None = None
) -> MemoryPlan:
    """Composes the words as train.py would.

    Args:
        words: ``group=option``, ``key=value``, ``+exp=RECIPE``.
        inference: of a recipe that trains.
        length: see ``vzip.bench.memory.workload.Workload``; None: the training's longest, or a prompt of 256 words.
        num_new_tokens: of an answer; None: the configuration's, or 128.

    Raises:
        ConfigError: naming every problem of the words; a length or number that cannot be.
        CheckpointError: a checkpoint whose configuration is not to be had.
        UnsupportedModelError: a model of another kind.
    """
    from vzip.bench.memory.workload import check_length, visual_tokens

    config = _composed(words)
    trains = "kind" in config["train"] and not inference
    _check_asked(config["train"], trains, inference, length, num_new_tokens)
    shape = model_shape(config["model"], config["compressor"])
    load = _load(config, trains, length, num_new_tokens)
    num_visual = visual_tokens(shape, load)
    load = replace(load, length=load.length or num_visual + TEXT_TOKENS)
    check_length(load.length, num_visual)
    return MemoryPlan(config, shape, load, num_visual, trains)


def _composed(words: list[str]) -> dict[str, Any]:
    directory = config_dir()
    check_overrides(words, directory, "train")
    with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
        config = resolved(compose("train", words))
    validate(config)
    config["launcher"] = one_process(config["launcher"])
    return config


def _check_asked(
    train: Mapping[str, Any], trains: bool, inference: bool, length: int | None, num_new_tokens: int | None
) -> None:
    """Raises ConfigError for options that go neither with each other nor with the training."""
    if train["name"] == FROM_SCRATCH and not inference:
        raise ConfigError(
            f"train={FROM_SCRATCH}: the built-in model's own training has its batches in vzip.demo.train_tiny and no"
            " estimate. Choose a recipe that tunes (+exp=tiny_64tok), or ask for --inference."
        )
    for name, value in (("--length", length), ("--new-tokens", num_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: must be 1 or more.")
    if trains and num_new_tokens is not None:
        raise ConfigError(
            f"--new-tokens={num_new_tokens}: a training generates none; leave it out, or add --inference."
        )
    if trains and length is not None and length > train["max_length"]:
        raise ConfigError(f"--length={length}: conversations are cut at train.max_length={train['max_length']}.")


def _load(config: Mapping[str, Any], trains: bool, length: int | None, num_new_tokens: int | None) -> Workload:
    """What is on a device at once; length 0 stands for a prompt whose picture is not known yet."""
    from vzip.bench.memory.workload import Workload

    if trains:
        data = config["data"]
        per_picture = data["num_questions"] if data.get("kind") == "scenes" else 1
        return Workload(launch_of(config).batch_size, per_picture, length or config["train"]["max_length"])
    evaluation = config["eval"]
    wanted = num_new_tokens or evaluation["gen_kwargs"]["max_new_tokens"] or NEW_TOKENS
    count = AUTO_ON_GPU if evaluation["batch_size"] == AUTO else evaluation["batch_size"]
    return Workload(count, 1, length or 0, wanted, config["model"]["num_frames"])


def model_shape(model: Mapping[str, Any], compressor: Mapping[str, Any]) -> ModelShape:
    """The ``model`` and ``compressor`` groups without weights; published models' configurations are known here.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: as ``memory_plan``.
    """
    from vzip.bench.memory.workload import ModelShape
    from vzip.bench.shapes import SHAPES
    from vzip.models.families import FamilyOptions, adapter_class_for_config
    from vzip.models.hub import Checkpoint
    from vzip.models.load import reach, read_config, resolve_checkpoint

    if model["adapter_path"] is not None:
        raise ConfigError(
            f"model.adapter_path={model['adapter_path']}: its layers are in no configuration, so they cannot be counted"
            " here. Set it to null; LoRA that trains is counted (train=projector_lora)."
        )
    known = {make().checkpoint: make for make in SHAPES.values()}
    if model["name_or_path"] in known:
        config = known[model["name_or_path"]]().config
    else:
        source = resolve_checkpoint(model["name_or_path"])
        checkpoint = Checkpoint(source, model["revision"], key="model.name_or_path")
        config = reach(source, lambda: read_config(checkpoint.directory))
    options = FamilyOptions(**{key: model[key] for key in ("drop_padding", "row_newline", "drop_cls")})
    built = build_compressor(compressor)
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
    from vzip.bench.memory.workload import Workload

    shape = model_shape({**config["model"], "adapter_path": None}, config["compressor"])
    train, data = settings_of(config)[0], config["data"]
    per_picture = data["num_questions"] if data["kind"] == "scenes" else 1

    def needs(launch: LaunchSettings, num_processes: int) -> int:
        load = Workload(launch.batch_size, per_picture, train.max_length)
        return estimate_training(shape, train, launch, load, num_processes, launch.device == "cuda").total

    return needs


def estimate(plan: MemoryPlan) -> Peak:
    """The peak by what it is for; nothing is loaded. Raises as ``vzip.bench.memory.estimate``."""
    from vzip.bench.memory.estimate import estimate_inference, estimate_training

    if not plan.trains:
        return estimate_inference(plan.shape, plan.dtype, plan.load)
    train, launch = settings_of(plan.config)
    return estimate_training(plan.shape, train, launch, plan.load, plan.num_processes, plan.on_cuda)


def estimate_halving(plan: MemoryPlan, device_bytes: float) -> tuple[MemoryPlan, Peak]:
    """The peak of an inference, its batch halved until it fits, as ``eval.batch_size=auto`` does on such a device."""
    while (peak := estimate(plan)).total > device_bytes and plan.load.num_pictures > 1:
        plan = replace(plan, load=replace(plan.load, num_pictures=(plan.load.num_pictures + 1) // 2))
    return plan, peak


def measure(plan: MemoryPlan) -> int:
    """Bytes at the peak of a real step or answer on this machine, with random weights where there is no checkpoint."""
    from vzip.bench.memory.measure import measure_inference, measure_training

    vlm = _real_model(plan)
    if not plan.trains:
        return measure_inference(vlm, plan.load)
    train, launch = settings_of(plan.config)
    num_batches = min(2, launch.accumulation(train.samples_per_step, 1))  # further ones leave what the second left
    return measure_training(vlm, replace(train, samples_per_step=num_batches * launch.batch_size), launch, plan.load)


def check_measurable(plan: MemoryPlan) -> None:
    """Refuses, before anything is built, what one process on this machine cannot do."""
    from vzip.train.distributed import uses_cuda

    launcher, model = plan.config["launcher"], plan.config["model"]
    uses_cuda(launcher["device"])
    if plan.trains and (plan.num_processes > 1 or launcher["strategy"] != "single"):
        raise ConfigError(
            f"--measure with launcher={launcher['name']}: only a single process is measured. Add launcher=inline, or"
            " leave --measure out."
        )
    if model["quantization"] is not None and not plan.is_here:
        raise ConfigError(
            f"--measure with model.quantization={model['quantization']}: bitsandbytes quantizes a checkpoint while it"
            " is read, so it must be here: model.name_or_path=DIR."
        )


def _real_model(plan: MemoryPlan) -> CompressedVlm:
    import torch

    import vzip
    from vzip.train.distributed import uses_cuda

    if plan.is_here:
        model = {**plan.config["model"], "projector": None}
        if plan.trains:
            return tuning_plan({**plan.config, "model": model}).load_model(plan.config["train"]["precision"])
        return vzip.load_vlm(**load_arguments(model), compressor=plan.shape.compressor)
    device = torch.device("cuda" if uses_cuda(plan.config["launcher"]["device"]) else "cpu")
    return plan.shape.with_random_weights(device, plan.dtype)
