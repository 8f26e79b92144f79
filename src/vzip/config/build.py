"""Turns a composed ``DictConfig`` into plain arguments; behind this file nobody sees a ``DictConfig``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from vzip import demo
from vzip.config.full_budget import full_is_vanilla
from vzip.config.options import RECIPE_GROUP, config_dir, option_values, options
from vzip.config.overrides import check_overrides
from vzip.config.run_directory import (
    RESULT_KEYS,
    budget_label,
    recipe_changes,
    run_directory,
    training_directory,
    value_of,
)
from vzip.config.same_run import same_run
from vzip.config.schema import AUTO, OF_VIDEOS
from vzip.config.validate import (
    BUILT_IN,
    TRAINED,
    VIDEO,
    build_compressor,
    build_pruner,
    has_a_directory,
    validate,
)
from vzip.errors import CheckpointError, ConfigError, RunExistsError, nearest
from vzip.evaluation.benchmarks.task_names import refuse_unknown
from vzip.installed import check_quantization, program
from vzip.keys import raise_all
from vzip.option_files import FRACTIONS, is_fraction
from vzip.paths import expanded
from vzip.results.files import check_writable
from vzip.results.record import RECORD_NAME

if TYPE_CHECKING:
    from vzip.compressors import Compressor
    from vzip.pruners import Pruner
    from vzip.train.settings import LaunchSettings

logger = logging.getLogger(__name__)

SWEEP_CACHE_GIB = 4.0  # some 3000 images of CLIP ViT-L/14 at 336 px in float16


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything an evaluation needs, checked, with nothing loaded.

    Attributes:
        model: keyword arguments of ``vzip.load_vlm``, compressor and pruner left out.
        launch: on how many processes; each has the whole model.
        compressor, pruner: what ``compressor=`` and ``pruner=`` name, built; None for ``pruner=none``.
        evaluation: keyword arguments of ``vzip.evaluation.run.evaluate``; ``include_path`` may still be ``built-in`` or
            ``video``.
        num_threads: CPU threads for torch; None leaves torch's choice.
        scenes_dir: where the generated benchmark lives; None for the project's cache.
        video_root: the folder of the video benchmarks, or None.
        tower_cache_gib: memory for the vision tower's outputs; 0: none are kept.
        finished: the record of this very run, if there is one and it is to be taken; None: the run is to be made.
    """

    model: dict[str, Any]
    launch: LaunchSettings
    compressor: Compressor
    evaluation: dict[str, Any]
    num_threads: int | None
    scenes_dir: str | None
    video_root: str | None
    tower_cache_gib: float
    pruner: Pruner | None = None
    finished: dict[str, Any] | None = None

    def include_path(self) -> str | None:
        """The folder of task files; the generated and the video benchmarks are prepared if they are asked for.

        Raises:
            ConfigError, ManifestError: the video benchmarks are asked for, and their files are not there or not whole.
            MissingPackageError: lmms-eval is not installed; said before anything is prepared for it.
        """
        from vzip.evaluation.lmms_eval import model as lmms  # noqa: F401

        path = self.evaluation["include_path"]
        if path == VIDEO:
            from vzip.evaluation.benchmarks import video_qa

            return str(video_qa.prepare(self.video_root, self.evaluation["tasks"]))
        if path != BUILT_IN:
            return path
        from vzip.demo import benchmark

        return str(benchmark.prepare(None if self.scenes_dir is None else Path(self.scenes_dir).expanduser()))

    @property
    def dry_run(self) -> bool:
        """Whether to stop before anything is loaded or written."""
        return bool(self.evaluation["resolved_config"]["dry_run"])

    def as_it_stands_now(self) -> EvaluationPlan:
        """The plan, or that it is done: another job that runs at the same time may have been this very run."""
        run_dir = self.evaluation["run_dir"]
        if self.finished is not None or self.evaluation["overwrite"] or not (run_dir / RECORD_NAME).exists():
            return self
        return replace(self, finished=same_run(run_dir, self.evaluation["resolved_config"]))

    def check_tasks(self, include_path: str | None, tasks: Sequence[str] | None = None) -> None:
        """Finds every task and the hub with its data, so that what is missing is an error before the model is loaded.

        Args:
            include_path: the folder of task files.
            tasks: those to find; None: all.

        Raises:
            ConfigError: an unknown task, a folder without tasks, or a limit that a task cannot have.
            ManifestError: data on a hub that cannot be reached.
            MissingPackageError: lmms-eval is not installed.
        """
        from vzip.evaluation.benchmarks.catalog import find_tasks
        from vzip.evaluation.benchmarks.question_groups import check_limit
        from vzip.evaluation.benchmarks.task_data import check_data
        from vzip.evaluation.lmms_eval import model as lmms  # noqa: F401  says what to install if lmms-eval is missing

        check_limit(self.evaluation["tasks"], self.evaluation["limit"])
        from loguru import logger as lmms_eval_logger  # comes with lmms-eval, which tells of each file it cannot use

        lmms_eval_logger.disable("lmms_eval")
        try:
            names = self.evaluation["tasks"] if tasks is None else tasks
            manager = find_tasks(names, include_path)
            if not self.dry_run:
                check_data(manager, names)
        finally:
            lmms_eval_logger.enable("lmms_eval")


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The composed configuration as plain containers, interpolations resolved, missing values as ``???``."""
    container = OmegaConf.to_container(cfg, resolve=True)
    if not isinstance(container, dict):
        raise ConfigError("the configuration must be a mapping; start from configs/eval.yaml or configs/train.yaml.")
    return {str(key): value for key, value in container.items()}


def evaluation_plan(cfg: DictConfig, of_sweep: bool = False) -> EvaluationPlan:
    """Checks a composed evaluation and says what it will do.

    Args:
        cfg: composed.
        of_sweep: it is a job of a sweep: a record of this very run is taken instead of refused, the vision tower's
            outputs are kept for the other jobs, and ``budget=full`` is vanilla whatever the compressor.

    Raises:
        ConfigError: naming every problem of the configuration.
        CheckpointError: as ``check_assembled``.
        RunExistsError: the run directory holds a record and ``overwrite`` is false.
        RunWriteError: the run directory cannot be written.
    """
    directory = config_dir()
    config = full_is_vanilla(resolved(cfg), directory) if of_sweep else resolved(cfg)
    if not of_sweep and has_a_directory(config):
        _refuse_recorded(run_directory(config, directory), config)  # before torch is imported to judge the rest
    validate(config)
    check_quantization(config["model"]["quantization"])
    check_assembled(config["model"])
    config["launcher"] = one_process(config["launcher"])
    launch = replace(launch_of(config), strategy="ddp")  # sharing weights out is for training
    if of_sweep:
        _one_process_a_job(launch)
    run_dir = run_directory(config, directory)
    projector = tuned_weights(config, directory)
    config["recipe"] = unchanged_recipe(config, "eval")
    config["paths"]["run_dir"] = str(run_dir)
    # A changed budget must not stand in the record under the name of the file it started from.
    keys = [key for key in RESULT_KEYS["budget"] if key not in FRACTIONS or is_fraction(config["budget"])]
    budget = {key: value_of(config, "budget", key) for key in keys}
    config["budget"] = {"name": budget_label(config["budget"], directory), **budget}
    model, evaluation = config["model"], config["eval"]
    model |= tuned_record(projector) | adapter_record(model["adapter_path"])
    finished = None
    if of_sweep and (run_dir / RECORD_NAME).exists() and not config["overwrite"]:
        finished = same_run(run_dir, config)
    if finished is None:
        _refuse_recorded(run_dir, config, " of other settings" if of_sweep else "")
    _refuse_unknown_tasks(evaluation["tasks"], evaluation["include_path"])
    if not config["dry_run"]:
        check_writable(run_dir)
    cache_gib = evaluation["tower_cache_gib"]
    asked = {key: value for key, value in evaluation["gen_kwargs"].items() if value is not None}
    include_path = evaluation["include_path"]
    if include_path not in (None, BUILT_IN, VIDEO):
        include_path = str(Path(include_path).expanduser())
    return EvaluationPlan(
        model={**load_arguments(model), "device_map": _device_map(model["device_map"], launch.device)},
        launch=launch,
        compressor=build_compressor(config["compressor"]),
        evaluation={
            "tasks": list(evaluation["tasks"]),
            "limit": evaluation["limit"],
            "batch_size": evaluation["batch_size"],
            "num_workers": evaluation["num_workers"],
            "visual_cache_gib": evaluation["visual_cache_gib"],
            "on_problem": evaluation["on_problem"],
            "trackers": tuple(evaluation["trackers"]),
            "include_path": include_path,
            "gen_kwargs": asked or None,
            "seed": config["seed"],
            "system_prompt": model["system_prompt"],
            "run_dir": run_dir,
            "overwrite": config["overwrite"],
            "resolved_config": config,
        },
        num_threads=launch.num_threads,
        scenes_dir=config["paths"]["scenes_dir"],
        video_root=config["paths"]["video_root"],
        tower_cache_gib=cache_gib if cache_gib is not None else SWEEP_CACHE_GIB if of_sweep else 0.0,
        pruner=build_pruner(config["pruner"]),
        finished=finished,
    )


def _refuse_recorded(run_dir: Path, config: Mapping[str, Any], what: str = "") -> None:
    if (run_dir / RECORD_NAME).exists() and not config["overwrite"]:
        raise RunExistsError(
            f"{run_dir} already holds a record (run.json){what}: set overwrite=true to replace it, or paths.run_dir=DIR"
            " to write elsewhere."
        )


def _refuse_unknown_tasks(tasks: Sequence[str], include_path: str | None) -> None:
    """Names no file has, before lmms-eval is imported; ``check_tasks`` looks at the tasks themselves."""
    if include_path == VIDEO:
        return
    folder = None if include_path is None else Path(include_path).expanduser()
    if include_path == BUILT_IN:
        folder = Path(demo.__path__[0]) / "tasks"
    if folder is None or folder.is_dir():
        refuse_unknown(tasks, folder)


def _one_process_a_job(launch: LaunchSettings) -> None:
    """Raises ConfigError for a sweep whose jobs are of several processes."""
    if launch.num_processes != 1 or launch.num_machines != 1 or "RANK" in os.environ:
        raise ConfigError(
            f"launcher.num_processes={launch.num_processes}: a job of a sweep is one process. To use several GPUs run"
            " the jobs beside each other (hydra/launcher=joblib), or evaluate without -m."
        )


def _device_map(device_map: Any, device: str) -> Any:
    """Where this process's model goes, by ``model.device_map`` and ``launcher.device``."""
    if device == "cpu":
        return None
    if "RANK" not in os.environ:
        return device_map
    from vzip.evaluation.answering.processes import own_device

    return own_device(device_map)


def launch_of(config: Mapping[str, Any]) -> LaunchSettings:
    """The ``launcher`` group as an object; what ``launcher=auto`` leaves open as for one process."""
    from vzip.train.settings import LaunchSettings

    launcher = one_process(config["launcher"])
    return LaunchSettings(**{key: value for key, value in launcher.items() if key != "name"})


def one_process(launcher: Mapping[str, Any]) -> dict[str, Any]:
    """The ``launcher`` group; what ``launcher=auto`` leaves open as in configs/launcher/inline.yaml."""
    if launcher["name"] != AUTO:
        return dict(launcher)
    inline = option_values(config_dir(), "launcher", "inline")
    return {key: inline[key] if value is None else value for key, value in launcher.items()}


def check_assembled(model: Mapping[str, Any]) -> None:
    """Refuses a model that is to be put together first.

    Raises:
        CheckpointError: its directory is not there.
    """
    made_of, directory = model["assembled_from"], model["name_or_path"]
    if made_of is not None and not Path(directory).expanduser().is_dir():
        raise CheckpointError(
            f"model.name_or_path={directory}: no such directory. model={model['name']} is put together here, once:"
            f" python scripts/assemble_llava.py {' '.join(made_of)} {directory}. If you have it elsewhere, set"
            " model.name_or_path=DIR."
        )


def load_arguments(model: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``vzip.load_vlm``, the compressor left out, from the ``model`` group."""
    of_family = ("drop_padding", "row_newline", "num_frames", "drop_cls", "positions", *OF_VIDEOS)
    on_top = ("projector", "adapter_path")
    keys = ("revision", "dtype", "device_map", "attn_implementation", "quantization", "preprocess", "compile")
    name_or_path = model["name_or_path"]
    if name_or_path.startswith("~"):
        name_or_path = str(Path(name_or_path).expanduser())
    return {"name_or_path": name_or_path, **{key: model[key] for key in (*keys, *on_top, *of_family)}}


def tuned_weights(config: Mapping[str, Any], directory: Path) -> str | None:
    """The directory of tuned weights that ``model.projector`` means, or None.

    Raises:
        ConfigError: ``trained``, but nothing is trained with these overrides, or it is not there yet.
    """
    projector = config["model"]["projector"]
    if projector != TRAINED:
        return None if projector is None else str(expanded(projector))
    if "kind" not in config["train"]:
        raise ConfigError(
            f"model.projector={TRAINED}: train={config['train']['name']} trains no projector. Give the overrides that"
            " train.py was given (a recipe, or train=...), or the directory that it wrote."
        )
    final = training_directory(config, directory) / "final"
    if not final.is_dir():
        raise ConfigError(
            f"model.projector={TRAINED}: {final} is not there. Run `{program('train')} {_recipe_word(config)}` first"
            " (with the same further overrides), or name the directory that it wrote."
        )
    return str(final)


def tuned_record(projector: str | None) -> dict[str, Any]:
    """What a record says of tuned weights, so that two trainings into one directory are told apart.

    A hub's are named with their commit, of which they are then loaded.

    Raises:
        CheckpointError: the directory holds no tuned weights.
    """
    if projector is None:
        return {}
    from vzip.models.weights.tuned import on_hub, read_header

    folder, header = read_header(projector)
    if (hosted := on_hub(projector)) is not None:
        projector = f"{hosted[0]}@{folder.name}"
    several = {"projector_compressors": header["compressors"]} if header.get("compressors") else {}
    return {"projector": projector, "projector_sha256": header["sha256"], **several}


def adapter_record(adapter_path: str | None) -> dict[str, Any]:
    """The same of a PEFT checkpoint.

    Raises:
        CheckpointError: it holds no weights, or is not to be had.
    """
    if adapter_path is None:
        return {}
    from vzip.models.weights.lora import peft_weights_sha256

    return {"adapter_sha256": peft_weights_sha256(adapter_path)}


def model_plan(words: Sequence[str]) -> tuple[dict[str, Any], Compressor]:
    """Composes overrides as eval.py would; returns ``vzip.load_vlm``'s arguments and, apart, the compressor.

    Raises:
        ConfigError: naming every problem of the overrides; nothing has been loaded.
    """
    return chat_plan(words)[:2]


# What of a command line a dialogue or a single question has no use for, and what says the same there.
_NOT_OF_A_DIALOGUE = {
    "eval": "benchmarks are asked by eval.py",
    "launcher": "the device is model.device_map",
    "data": "nothing is trained",
    "train": "nothing is trained",
    "paths": "no run directory is written",
    "dry_run": "no run is begun",
    "overwrite": "no run directory is written",
}


def refuse_unused(words: Sequence[str]) -> None:
    """Refuses settings of ``eval.py`` that a question or a dialogue would silently leave out.

    Raises:
        ConfigError: naming each, and what to give instead.
    """
    problems = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        why = _NOT_OF_A_DIALOGUE.get(key.partition(".")[0])
        if why is not None:
            if key == "eval.gen_kwargs.max_new_tokens":
                why = "an answer's length is --max-new-tokens N"
            elif key.startswith("eval.gen_kwargs."):
                why = "answers are greedy"
            problems.append(f"{word}: has no effect here ({why}); leave it out.")
    raise_all(problems)


def chat_plan(words: Sequence[str]) -> tuple[dict[str, Any], Compressor, str | None]:
    """As ``model_plan``, and the model's system prompt (None: none)."""
    directory = config_dir()
    check_overrides(words, directory, "eval")
    with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
        config = resolved(compose("eval", list(words)))
    validate(config)
    model = {**config["model"], "projector": tuned_weights(config, directory)}
    arguments = {**load_arguments(model), "pruner": build_pruner(config["pruner"])}
    return arguments, build_compressor(config["compressor"]), model["system_prompt"]


def recorded_method(record: Mapping[str, Any]) -> tuple[dict[str, Any], Compressor]:
    """``vzip.load_vlm``'s arguments and, apart, the compressor of a finished run, by its record.

    A record may come from elsewhere: only classes that the options of ``configs/compressor`` name are made.

    Raises:
        ConfigError: a record without configuration, or one that this version does not read.
        CheckpointError: as ``check_assembled``.
    """
    config, directory = record.get("config"), config_dir()
    if not config:
        raise ConfigError("its record holds no configuration, so what it ran is not known.")
    files = [option_values(directory, "compressor", name) for name in options(directory, "compressor")]
    known = {"vzip.TokenBudget", "vzip.FractionBudget", *(target for file in files for target in _targets(file))}
    unknown = set(_targets(config.get("compressor"))) - known
    if unknown:
        raise ConfigError(f"its method is {', '.join(sorted(unknown))}, which no file of configs/compressor names.")
    try:
        check_assembled(config["model"])
        arguments = load_arguments({**config["model"], "projector": tuned_weights(config, directory)})
        return arguments, build_compressor(config["compressor"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"its configuration is not one of this version ({error}).") from error


def _targets(values: Any) -> Iterator[str]:
    """Every class that values name, however deep."""
    inside = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        if key == "_target_":
            yield str(value)
        yield from _targets(value)


def unchanged_recipe(config: Mapping[str, Any], primary: str) -> str | None:
    """The recipe's name if every setting that changes results is still the recipe's, else None, with a warning.

    A changed run keeps its directory under the recipe's name (the compressor's and the budget's part tells them
    apart), but its record must not be held against the recipe's expected numbers.

    Raises:
        ConfigError: ``recipe`` names no file in configs/exp.
    """
    name = config["recipe"]
    if name is None:
        return None
    known = options(config_dir(), RECIPE_GROUP)
    if name not in known:
        raise ConfigError(f"recipe={name}: no such recipe{nearest(name, known)}; recipes: {', '.join(known)}.")
    recipe = resolved(compose(primary, [f"+{RECIPE_GROUP}={name}"]))
    changes = recipe_changes(config, recipe)
    if not changes:
        return str(name)
    logger.warning("not the recipe %s any more, and not recorded as such: %s", name, "; ".join(changes))
    return None


def _recipe_word(config: Mapping[str, Any]) -> str:
    return f"+{RECIPE_GROUP}={config['recipe']}" if config["recipe"] else ""
