"""Finds everything wrong with a composed configuration, before anything is loaded or written."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vzip.config import schema
from vzip.config.options import config_dir, option_values, options
from vzip.config.several_budgets import at_each_budget, budget_problems
from vzip.errors import ConfigError, VzipError, nearest
from vzip.keys import SHARE, check_group, check_value, raise_all, show
from vzip.option_files import COUNTS, FRACTIONS, is_fraction
from vzip.paths import expanded, is_file, is_folder

BUILT_IN = "built-in"
VIDEO = "video"  # of eval.include_path: the benchmarks in paths.video_root
TRAINED = "trained"
_PATH_STARTS = ("/", "./", "../", "~")


def validate(config: Mapping[str, Any]) -> None:
    """Checks a composed configuration, resolved to plain containers.

    Raises:
        ConfigError: naming every problem at once.
    """
    raise_all(find_problems(config))


def find_problems(config: Mapping[str, Any], deeply: bool = True) -> list[str]:
    """Every problem of a configuration, in the order of the keys; not ``deeply``: what torch is not needed to tell."""
    problems, is_whole = _key_problems(config)
    if deeply and is_whole and isinstance(config["compressor"], Mapping):
        problems += _check_compressor(_with_usable_seed(config), config["budget"], config["pruner"])
        problems += [] if problems else budget_problems(config)
        for each in [config] if problems else [config, *at_each_budget(config)]:
            unfit = _check_budget_fits(each["model"], each["compressor"], each["budget"])
            problems += [problem for problem in unfit if problem not in problems]
        problems += _check_family(config["model"], config["compressor"])
        problems += _check_pruner(config["model"], config["pruner"])
        problems += _check_paths(config["model"], config["eval"])
        problems += _check_video_root(config["eval"], config["paths"])
    return problems


def has_a_directory(config: Mapping[str, Any]) -> bool:
    """Whether nothing is wrong that can be told without importing a method, and so torch: keys, values and names."""
    problems, is_whole = _key_problems(config)
    if not is_whole or problems or _check_paths(config["model"], config["eval"]):
        return False
    methods = [(group, config.get(group)) for group in schema.OPEN_GROUPS]
    return all(isinstance(method, Mapping) and not check_name(group, method) for group, method in methods)


def _key_problems(config: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Wrong, unknown and missing keys, and whether none is missing."""
    problems: list[str] = []
    allowed = [*schema.TOP, *schema.GROUPS, *schema.OPEN_GROUPS]
    for key, value in config.items():
        if key in schema.TOP:
            problems += check_value(key, value, schema.TOP[key].rule)
        elif key in schema.GROUPS:
            problems += check_group(key, value, schema.keys_for(key, value) if isinstance(value, Mapping) else {})
        elif key not in schema.OPEN_GROUPS:
            problems.append(f"{key}: no such key{nearest(key, allowed)}; allowed: {', '.join(allowed)}.")
    absent = [key for key in allowed if key not in config]
    problems += [f"{key}: missing from the configuration; start from configs/base.yaml." for key in absent]
    return problems, not absent


def _with_usable_seed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The compressor; a seed that it has from the run, and that is reported as the run's, is not reported twice."""
    compressor, seed = config["compressor"], config["seed"]
    borrowed = compressor.get("seed") == seed and not schema.TOP["seed"].rule.allows(seed)
    return {**compressor, "seed": 0} if borrowed else compressor


def _check_compressor(compressor: Mapping[str, Any], budget: Mapping[str, Any], pruner: Any) -> list[str]:
    name = compressor.get("name", compressor.get("_target_"))
    target = compressor.get("_target_")
    if not isinstance(target, str):
        return [f"compressor={show(name)}: the file must name its class in _target_, as vzip.VisionZip."]
    problems = _check_arguments("compressor", target, compressor) or check_name("compressor", compressor)
    names = FRACTIONS if is_fraction(budget) else COUNTS
    counts = [budget.get(key) for key in names]
    if "budget" not in compressor:
        takes_it = isinstance(pruner, Mapping) and pruner.get("budget") is not None  # as its average over the layers
        if names is FRACTIONS:
            problems.append(
                f"compressor={name} keeps every visual token, but budget={budget.get('name')} asks for fractions of"
                " them: set budget=full, or a compressor that takes a budget. A pruner's average over the layers is a"
                " number of tokens (budget=64tok); in fractions it is pruner.keep=0.5."
            )
        elif any(count is not None for count in counts) and not takes_it:
            problems.append(
                f"compressor={name} keeps every visual token, but budget={budget.get('name')} asks for"
                f" {show(counts[0])} dominant + {show(counts[1])} contextual: set budget=full, or choose a compressor"
                " (one that takes a budget, as configs/compressor/visionzip.yaml) or a pruner (as pruner=fastv, whose"
                " average over the layers it then is)."
            )
    elif any(count is None for count in counts) and (names is FRACTIONS or "num_tokens" in budget):
        return problems  # reported already: the counts follow from it
    elif any(count is None for count in counts):
        problems.append(
            f"compressor={name} needs a budget, but budget={budget.get('name')} names no counts: set budget=64tok (or"
            " another), or compressor=none for a run without compression."
        )
    return problems or _check_construction(compressor, budget)


def check_name(group: str, method: Mapping[str, Any]) -> list[str]:
    """Records and run directories are told apart by a method's ``name``, which must be that of its own file."""
    name, known = method.get("name"), options(config_dir(), group)
    if name is None:
        return [f"{group}.name: missing; a file in configs/{group} begins with its own name."]
    if name not in known:
        hint = nearest(str(name), known)
        return [f"{group}.name={show(name)}: must be the name of its file in configs/{group}{hint}."]
    of_file = option_values(config_dir(), group, name).get("_target_")
    if of_file == method.get("_target_"):
        return []
    return [
        f"{group}.name={name}: is that of configs/{group}/{name}.yaml, whose _target_ is {of_file} and not"
        f" {method.get('_target_')}; a file's name and its `name` must be the same."
    ]


def _check_construction(compressor: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    """Builds the compressor, which is cheap, so that what its class refuses is reported with everything else."""
    keys = schema.keys_in("budget")
    names = FRACTIONS if is_fraction(budget) else COUNTS
    if "budget" in compressor and not all(keys[key].rule.allows(budget.get(key)) for key in names):
        return []  # reported already, as a value of the budget
    try:
        build_compressor(compressor)
    except ConfigError as error:
        return [str(error)]
    return []


def build_pruner(pruner: Mapping[str, Any]) -> Any:
    """Instantiates the pruner group; None for ``pruner=none``. Raises as ``build_compressor``."""
    return build_compressor(pruner, "pruner") if "_target_" in pruner else None


def build_compressor(compressor: Mapping[str, Any], group: str = "compressor") -> Any:
    """Instantiates the compressor group; ``name`` is for people and run directories only.

    Raises:
        ConfigError: the class refuses its arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate({key: value for key, value in compressor.items() if key != "name"})
    except InstantiationException as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(f"{group}={compressor.get('name')}: {error.__cause__ or error}") from error


def _check_arguments(group: str, target: str, values: Mapping[str, Any]) -> list[str]:
    from vzip.compressors import Compressor
    from vzip.pruners.base import Pruner

    module_name, _, class_name = target.rpartition(".")
    base, example = (Compressor, "vzip.VisionZip") if group == "compressor" else (Pruner, "vzip.FastV")
    try:
        built = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        return [f"{group}._target_={target}: cannot be imported ({error}); it must be a class, as {example}."]
    if not inspect.isclass(built) or not issubclass(built, base):
        return [
            f"{group}._target_={target}: is no {base.__name__}; it must be a class derived from"
            f" vzip.{base.__name__}, as {example}."
        ]
    parameters = inspect.signature(built).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return []
    unknown = [key for key in values if key not in parameters and key not in ("name", "_target_")]
    return [
        f"{group}.{key}: {target} has no such argument{nearest(key, parameters)};"
        f" allowed: {', '.join(parameters) or 'none'}."
        for key in unknown
    ]


def _check_pruner(model: Mapping[str, Any], pruner: Any) -> list[str]:
    """Arguments and values of a pruner, and whether the language model of a checkpoint's directory can have it."""
    if not isinstance(pruner, Mapping) or not isinstance(pruner.get("_target_", ""), str):
        return [f"pruner={show(pruner)}: must be one of the group's options, whose file names a class in _target_."]
    if "_target_" not in pruner:
        extra = [key for key in pruner if key != "name"]
        names = ", ".join(name for name in options(config_dir(), "pruner") if name != pruner.get("name"))
        return [
            f"pruner.{key}: pruner={pruner.get('name')} has no settings; add pruner=NAME, one of {names}."
            for key in extra
        ]
    if problems := _check_arguments("pruner", pruner["_target_"], pruner) or check_name("pruner", pruner):
        return problems
    if problems := _check_set_by_budget(pruner):
        return problems
    try:
        built = build_pruner(pruner)
    except ConfigError as error:
        return [str(error)]
    from vzip.models.families import adapter_class_for_config
    from vzip.models.hub import BUILT_IN_NAME
    from vzip.models.load import read_config, resolve_checkpoint

    source = str(model.get("name_or_path"))
    if source != BUILT_IN_NAME and not is_file(expanded(source) / "config.json"):
        return []  # a hub id: load_vlm looks, before it loads any weight
    try:
        config = read_config(Path(resolve_checkpoint(source)))
        adapter_class_for_config(config).check_pruner(config, built)
    except VzipError as error:
        return [str(error)]
    except (ValueError, OSError):
        pass  # the check of the budget, or load_vlm, says so
    return []


def _check_set_by_budget(pruner: Mapping[str, Any]) -> list[str]:
    """A budget that is a pruner's average decides some of its arguments: they cannot be given too."""
    if pruner.get("budget") is None:
        return []
    module_name, _, class_name = pruner["_target_"].rpartition(".")
    keys = getattr(importlib.import_module(module_name), class_name).set_by_budget
    usual = option_values(config_dir(), "pruner", pruner["name"])
    return [
        f"pruner.{key}={show(pruner[key])}: with compressor=none the budget ({pruner['budget']} tokens) is the pruner's"
        f" average over the layers and decides {key}. Leave it out, or set budget=full."
        for key in keys
        if key in pruner and pruner[key] != usual.get(key)
    ]


def _check_budget_fits(model: Mapping[str, Any], compressor: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    """Holds the budget against the vision tower: by the option's own fact, or by the checkpoint's configuration."""
    in_fractions = is_fraction(budget)
    counts = [budget.get(key) for key in (FRACTIONS if in_fractions else COUNTS)]
    if "budget" not in compressor or not all(SHARE.allows(c) if in_fractions else isinstance(c, int) for c in counts):
        return []
    if budget.get("scope") == "video":
        return []  # of all frames: how many these have, the videos will say
    available, total = model.get("num_tower_tokens"), sum(count for count in counts if isinstance(count, int))
    if isinstance(available, int) and not in_fractions:
        if total <= available:
            return []
        return [
            f"budget.num_dominant={counts[0]} + budget.num_contextual={counts[1]} = {total} visual tokens a crop, but"
            f" the vision tower of model={model.get('name')} produces {available} (CLS included): choose smaller"
            " counts, or compressor=none budget=full. A budget is for each crop: LLaVA-NeXT cuts an image into up to"
            " 5, so its 640 visual tokens an image are budget=128tok (108 + 20)."
        ]
    folder = expanded(str(model.get("name_or_path")))
    if not is_file(folder / "config.json"):
        return []  # a hub id without the fact: load_vlm compares, before it loads any weight
    from vzip.models.families import adapter_class_for_config
    from vzip.models.load import read_config

    try:
        config = read_config(folder)
        geometry = adapter_class_for_config(config).check_config(config)
        if geometry is not None:
            build_compressor(compressor).num_tokens(geometry.shape())
    except VzipError as error:
        return [str(error)]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        return [f"model.name_or_path={folder}: its config.json cannot be used ({type(error).__name__}: {error})."]
    return []


def _check_family(model: Mapping[str, Any], compressor: Mapping[str, Any]) -> list[str]:
    """Holds options that only some families have against the compressor, and against a checkpoint's own directory."""
    switches = {key: model.get(key) for key in ("drop_padding", "row_newline", "drop_cls")}
    num_frames, positions = model.get("num_frames"), model.get("positions")
    of_videos = {key: model.get(key) for key in schema.OF_VIDEOS}
    wrong_value = not all(isinstance(value, bool) for value in switches.values())
    given = {"num_frames": num_frames, "positions": positions, **of_videos}
    wrong_value = wrong_value or not all(schema.GROUPS["model"][key].rule.allows(v) for key, v in given.items())
    if wrong_value or not (any(switches.values()) or any(value is not None for value in given.values())):
        return []
    from vzip.models.families import FamilyOptions, adapter_class_for_config
    from vzip.models.families.options import check_drop_padding

    problems = []
    try:
        settings: dict[str, Any] = {**{key: bool(value) for key, value in switches.items()}, **of_videos}
        options = FamilyOptions(**settings, positions=positions)
    except ConfigError as error:
        return [str(error)]
    try:
        check_drop_padding(build_compressor(compressor), options.drop_padding)
    except ConfigError as error:
        problems.append(str(error))
    folder = expanded(str(model.get("name_or_path")))
    if not is_file(folder / "config.json"):
        return problems  # a hub id: load_vlm looks, before it loads any weight
    from vzip.models.load import read_config

    try:
        family = adapter_class_for_config(read_config(folder))
        family.check_options(options, num_frames)
        family.check_positions(options, model.get("attn_implementation"))
    except ConfigError as error:
        problems.append(str(error))
    except (VzipError, ValueError, OSError):
        pass  # no checkpoint of ours: the check of the budget, or load_vlm, says so
    return problems


def _check_paths(model: Mapping[str, Any], evaluation: Mapping[str, Any]) -> list[str]:
    problems = []
    source = model.get("name_or_path")
    if isinstance(source, str) and source.startswith(_PATH_STARTS) and not is_folder(expanded(source)):
        problems.append(f"model.name_or_path={source}: no such directory.")
    tuned = model.get("projector")
    hosted = isinstance(tuned, str) and _may_be_hub_id(tuned.partition("@")[0])
    if isinstance(tuned, str) and tuned != TRAINED and not hosted and not is_folder(expanded(tuned)):
        problems.append(
            f"model.projector={tuned}: no such directory. It must be one that train.py wrote (runs/train/.../final),"
            f" {TRAINED} for what `train.py` with these overrides wrote, or a hub id (owner/name, owner/name@revision)."
        )
    adapter = model.get("adapter_path")
    if isinstance(adapter, str) and not is_folder(expanded(adapter)) and not _may_be_hub_id(adapter):
        problems.append(
            f"model.adapter_path={adapter}: no such directory. It must be one that PEFT wrote (adapter_config.json and"
            " weights), or a hub id."
        )
    folder = evaluation.get("include_path")
    if isinstance(folder, str) and folder not in (BUILT_IN, VIDEO) and not is_folder(expanded(folder)):
        problems.append(
            f"eval.include_path={folder}: no such directory; it must hold lmms-eval task files (*.yaml),"
            f" or be {BUILT_IN} for the generated benchmark, {VIDEO} for the video benchmarks in paths.video_root."
        )
    return problems


def _check_video_root(evaluation: Mapping[str, Any], paths: Mapping[str, Any]) -> list[str]:
    """Only where a directory is named: composing a recipe, as `python -m vzip table` does, needs no videos."""
    root = paths.get("video_root")
    if evaluation.get("include_path") != VIDEO or not isinstance(root, str) or is_folder(expanded(root)):
        return []
    return [f"paths.video_root={root}: no such directory. It must hold what data_manifests/video_qa.json describes."]


def _may_be_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).parent.is_dir()
