"""From a composed configuration to a training: what is checked, where it goes, what will be loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vzip.config.build import check_assembled, launch_of, load_arguments, resolved
from vzip.config.options import RECIPE_GROUP, config_dir
from vzip.config.run_directory import RESULT_KEYS, training_directory
from vzip.config.several_budgets import at_each_budget, at_largest_budget, check_is_one_of_them
from vzip.config.validate import TRAINED, build_compressor, has_a_directory, validate
from vzip.errors import ConfigError
from vzip.installed import check_quantization, program
from vzip.train.settings import refuse_finished

if TYPE_CHECKING:
    from vzip.data.collate import TrainingSet
    from vzip.models.vlm import CompressedVlm
    from vzip.train.loop import TrainPlan
    from vzip.train.settings import LaunchSettings, TrainSettings


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The composed training as plain containers; one at several budgets at the largest of them.

    Raises:
        ConfigError: naming every problem, or that nothing is to be trained.
        CheckpointError: a model that is to be put together first.
        RunExistsError: the training is finished, and ``overwrite`` is false.
    """
    config = resolved(cfg)
    if not config.get("overwrite") and has_a_directory(config):
        refuse_finished(training_directory(config, config_dir()))  # before torch is imported to judge the rest
    validate(config)
    train, data = config["train"], config["data"]
    if train["name"] == "none":
        what = f"+{RECIPE_GROUP}={config['recipe']}" if config["recipe"] else f"model={config['model']['name']}"
        raise ConfigError(
            f"nothing to train: {what} goes with train=none. Add train=projector and data=..., or choose a recipe that"
            f" trains: {program('train')} +exp=tiny_64tok."
        )
    if "kind" not in data:
        raise ConfigError(
            f"train={train['name']} needs data to train on, but data={data['name']}: choose data=llava_json"
            " data.json=FILE, data=llava_mix665k_tenth or data=scenes_dialogues."
        )
    check_quantization(config["model"]["quantization"])
    if "_target_" in config["pruner"]:
        raise ConfigError(
            f"pruner={config['pruner']['name']}: nothing is dropped inside the language model while it trains; set"
            " pruner=none, and evaluate what was trained with the pruner."
        )
    if config["model"]["compile"] is not None:
        raise ConfigError(
            f"model.compile={'+'.join(config['model']['compile'])}: is of answering, and a training computes other"
            " graphs. Set model.compile=null, and evaluate what was trained with it."
        )
    check_assembled(config["model"])
    check_is_one_of_them(config)
    return at_largest_budget(config)


def tuning_plan(config: Mapping[str, Any]) -> TrainPlan:
    """What ``vzip.train.loop.train`` needs; nothing is loaded.

    Raises:
        ConfigError: settings that contradict one another.
    """
    model = config["model"]
    settings, launch = settings_of(config)
    run_dir = training_directory(config, config_dir())
    if launch.num_machines == 1:
        launch.accumulation(settings.samples_per_step, launch.num_processes)
    if settings.lora is not None and model["adapter_path"] is not None:
        raise ConfigError(
            f"train.lora on top of model.adapter_path={model['adapter_path']}: a model has one set of LoRA layers at a"
            " time. Merge the first into the weights (PEFT's merge_and_unload), or set either to null."
        )
    from vzip.compressors.base import check_reads_no_text

    compressor = build_compressor(config["compressor"])
    check_reads_no_text(compressor, "a training encodes each image once for all its conversations")
    several: tuple[Any, ...] = ()
    if settings.budgets is not None:
        several = tuple(build_compressor(each["compressor"]) for each in at_each_budget(config))
    features_dir = _features_dir(config, settings, launch, several or (compressor,))
    start = None if model["projector"] == TRAINED else model["projector"]
    # What a training's model is; the precision is training's own, and the start is named apart.
    identity_keys = [key for key in RESULT_KEYS["model"] if key not in ("dtype", "projector", "compile")]
    from vzip.train.loop import TrainPlan  # only here: it takes its time

    return TrainPlan(
        load_data=data_loader(config["data"]),
        load_model=_model_loader(model, compressor, start, launch.device),
        train=settings,
        launch=launch,
        run_dir=run_dir,
        seed=config["seed"],
        overwrite=config["overwrite"],
        system_prompt=model["system_prompt"],
        name_or_path=model["name_or_path"],
        skip_unreadable=config["data"].get("on_problem") == "skip",
        identity={
            "model": {**{key: model[key] for key in identity_keys}, "projector": start},
            "compressor": " or ".join(map(repr, several or (compressor,))),
            # Where features come from parts no runs: one may go on with or without.
            "data": {key: value for key, value in config["data"].items() if key != "cache_features"},
        },
        compressors=several,
        features_dir=features_dir,
    )


def _features_dir(
    config: Mapping[str, Any], settings: TrainSettings, launch: LaunchSettings, compressors: Sequence[Any]
) -> Path | None:
    """Where features of images are kept; None: nowhere.

    Raises:
        ConfigError: they would not be the same in each step, or processes would wait for one another.
    """
    if not config["data"].get("cache_features"):
        return None
    from vzip.data.llava_index import cache_folder
    from vzip.train.features import KEY, check_method

    if "vision_tower" in settings.parts:
        raise ConfigError(
            f"{KEY}: train.parts={list(settings.parts)} trains the vision tower, so what it makes of an image changes"
            " with each step. Set data.cache_features=false, or take vision_tower out of train.parts."
        )
    if launch.strategy == "zero3":
        raise ConfigError(
            f"{KEY} with launcher.strategy=zero3: it shares the tower's weights out, so all processes must run it"
            " together, and those that find their images' features would not. Set data.cache_features=false, or"
            " launcher.strategy=zero2."
        )
    for compressor in compressors:
        check_method(compressor)
    folder = config["paths"].get("features_dir")
    return cache_folder() / "features" if folder is None else Path(folder).expanduser()


def settings_of(config: Mapping[str, Any]) -> tuple[TrainSettings, LaunchSettings]:
    """The ``train`` and ``launcher`` groups as objects.

    Raises:
        ConfigError: settings of ``train`` that contradict one another, or the model's attention.
    """
    from vzip.models.sharing import check_attention
    from vzip.train.settings import TrainSettings

    settings = TrainSettings.of_group(config["train"])
    if settings.share_images:
        check_attention(config["model"]["attn_implementation"])
    return settings, launch_of(config)


def data_loader(data: Mapping[str, Any], cache: str | None = None) -> Callable[[], TrainingSet]:
    """What opens the ``data`` group's samples; ``cache`` is the folder of a file's index, by default the user's."""

    def load() -> TrainingSet:
        if data["kind"] == "scenes":
            from vzip.demo.dialogues import SceneDialogues

            return SceneDialogues(data["num_images"], data["num_questions"])
        from vzip.data.llava_set import LlavaSet

        return LlavaSet(
            data["json"],
            data["image_root"],
            fraction=data["fraction"],
            seed=data["subset_seed"],
            keep_text_only=data["keep_text_only"],
            on_problem=data["on_problem"],
            cache=cache,
        )

    return load


def _model_loader(
    model: Mapping[str, Any], compressor: Any, start: str | None, device: str
) -> Callable[[str], CompressedVlm]:
    def load(precision: str) -> CompressedVlm:
        import os

        import vzip
        from vzip.train.distributed import uses_cuda

        arguments = load_arguments({**model, "projector": start})
        # The processes place the model themselves; only quantised weights must be put on their device as they are read.
        own = int(os.environ.get("LOCAL_RANK", "0")) if uses_cuda(device) else "cpu"
        arguments |= {"dtype": precision, "device_map": None if model["quantization"] is None else {"": own}}
        return vzip.load_vlm(**arguments, compressor=compressor)

    return load
