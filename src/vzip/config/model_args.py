"""`--model_args` of `lmms-eval --model vzip`: every setting of model and compressor, none of them silent.

    lmms-eval --model vzip --tasks pope --model_args \\
        pretrained=llava-hf/llava-1.5-7b-hf,num_dominant=54,num_contextual=10,dtype=float16

Compressors are those of ``configs/compressor``, pruners those of ``configs/pruner`` (``pruner=fastv,K=2,keep=0.25``),
their settings the arguments of their classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import vzip
from vzip import log
from vzip.config.schema import OPEN_GROUPS
from vzip.errors import ConfigError, VzipError, nearest
from vzip.evaluation.answering.batching import check_batch_size
from vzip.evaluation.answering.visuals import EncodedCache
from vzip.evaluation.lmms_eval.model import VzipLmms
from vzip.keys import raise_all
from vzip.methods import MethodFile, method_files
from vzip.models.load import load_vlm
from vzip.option_files import COUNTS, FRACTIONS

if TYPE_CHECKING:
    from vzip.compressors import Compressor
    from vzip.pruners import Pruner

DEFAULT_COMPRESSOR = "visionzip"  # where counts are given
_OF_ADAPTER = ("system_prompt", "batch_size", "visual_cache_gib")


class VzipByArguments(VzipLmms):
    """What lmms-eval makes of ``--model vzip``; the way from Python is ``vzip.evaluation.run.evaluate``."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> VzipLmms:
        """Loads the model that ``--model_args`` describes.

        Raises:
            SystemExit: with code 2, a user's error being printed. lmms-eval's command line catches every exception, and
                would end with code 0.
        """
        try:
            return VzipLmms(**load_from_arg_string(arg_string, additional_config or {}))
        except VzipError as error:
            raise SystemExit(log.tell_error(error)) from error


def build_compressor(args: Mapping[str, Any]) -> Compressor:
    """The compressor that ``args`` describe: VisionZip where they name none but give counts.

    Raises:
        ConfigError: naming every problem: an unknown or missing name, a missing count, a setting that this compressor
            does not have; or what its class refuses.
    """
    known = method_files()
    counts = {key: args[key] for key in (*COUNTS, *FRACTIONS) if key in args}
    name = args.get("compressor", DEFAULT_COMPRESSOR if counts else None)
    if name not in known:
        unknown = f"={name!r} is not known{nearest(str(name), known)}"
        given = " is missing, and so are counts" if name is None else unknown
        raise ConfigError(
            f"model_args: compressor{given}; allowed are {', '.join(known)}. num_dominant=54,num_contextual=10 alone"
            f" are {DEFAULT_COMPRESSOR} with 64 visual tokens a crop, compressor=none is the model without compression."
        )
    entry, problems = known[name], []
    elsewhere = {key for other in known.values() for key in other.settings} - entry.settings.keys()
    elsewhere -= _settings_of("pruner", args.get("pruner"))
    for key in sorted(elsewhere & args.keys()):
        problems.append(f"model_args: {key}={args[key]!r} has no meaning for compressor={name}; take it out.")
    names = FRACTIONS if counts.keys() & set(FRACTIONS) else COUNTS
    missing = [key for key in names if key not in counts]
    if not entry.has_budget and "scope" in args:
        problems.append(f"model_args: scope={args['scope']!r}: compressor={name} has no budget; take it out.")
    if not entry.has_budget and counts:
        problems.append(f"model_args: compressor={name} keeps every token, so {', '.join(counts)} cannot be given.")
    elif entry.has_budget and missing:
        problems.append(
            f"model_args: compressor={name} needs {' and '.join(missing)}, e.g. num_dominant=54,num_contextual=10 for"
            " 64 visual tokens a crop, or dominant=0.65,contextual=0.05 for 70 % of any image's."
        )
    elif both := counts.keys() - set(names):
        problems.append(
            f"model_args: {', '.join(sorted(both))} beside {' and '.join(names)}: give counts or fractions."
        )
    raise_all(problems)
    if "scope" in args:
        counts["scope"] = args["scope"]
    kind = vzip.FractionBudget if names is FRACTIONS else vzip.TokenBudget
    return entry.build(kind(**counts) if entry.has_budget else None, **_given(entry, args))


def _settings_of(group: str, name: Any) -> set[str]:
    """Settings of the method that another group's option names, if there is one: methods may share a name, as seed."""
    known = method_files(group)
    return set(known[name].settings) if name in known else set()


def _given(entry: MethodFile, args: Mapping[str, Any]) -> dict[str, Any]:
    """What ``args`` say of a method's own settings; lmms-eval reads -3 as a fraction, where the file has none."""
    given = {key: args[key] for key in entry.settings if key in args}
    for key, value in given.items():
        if isinstance(value, float) and value.is_integer() and not isinstance(entry.settings[key], float):
            given[key] = int(value)
    return given


def build_pruner(args: Mapping[str, Any]) -> Pruner | None:
    """The pruner that ``args`` name, or None.

    Raises:
        ConfigError: an unknown name, a setting without its pruner; or what its class refuses.
    """
    known, name = method_files("pruner"), args.get("pruner", "none")
    if name != "none" and name not in known:
        names = ("none", *known)
        raise ConfigError(
            f"model_args: pruner={name!r} is not known{nearest(str(name), names)}; allowed are {', '.join(names)}."
        )
    settings = {} if name == "none" else known[name].settings
    elsewhere = {key for entry in known.values() for key in entry.settings} - settings.keys()
    elsewhere -= _settings_of("compressor", args.get("compressor", DEFAULT_COMPRESSOR))
    raise_all(
        [
            f"model_args: {key}={args[key]!r} has no meaning for pruner={name}; take it out, or choose its pruner."
            for key in sorted(elsewhere & args.keys())
        ]
    )
    if name == "none":
        return None
    built: Pruner = known[name].build(**{key: args[key] for key in settings if key in args})
    return built


def load_from_arg_string(arg_string: str, from_command_line: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``VzipLmms`` from lmms-eval's two sources of settings.

    Args:
        arg_string: `--model_args`.
        from_command_line: lmms-eval's own options (batch_size, max_batch_size, device), None where not given.

    Raises:
        ConfigError: naming every setting that is unknown, missing or cannot be used here.
        VzipError: as ``vzip.load_vlm``.
    """
    from lmms_eval.utils import simple_parse_args_string

    args: dict[str, Any] = simple_parse_args_string(arg_string)
    outside = {key: value for key, value in from_command_line.items() if value is not None}
    of_loader = [key for key in inspect.signature(load_vlm).parameters if key not in ("name_or_path", *OPEN_GROUPS)]
    of_methods = [key for group in OPEN_GROUPS for file in method_files(group).values() for key in file.settings]
    allowed = ("pretrained", *OPEN_GROUPS, *COUNTS, *FRACTIONS, "scope", *of_methods, *of_loader, *_OF_ADAPTER)
    problems = [
        f"model_args: {key}={value!r} is not known{nearest(key, allowed)}; allowed are {', '.join(allowed)}."
        for key, value in args.items()
        if key not in allowed
    ]
    if "pretrained" not in args:
        problems.append("model_args: pretrained is missing: a hub name or the directory of a checkpoint.")
    if "max_batch_size" in outside:
        problems.append(f"max_batch_size={outside['max_batch_size']}: give batch_size=N, or auto.")
    loader = {key: args[key] for key in of_loader if key in args}
    if "device" in outside and "device_map" in loader:
        problems.append(f"device={outside['device']} and device_map={loader['device_map']}: give one of them.")
    elif "device" in outside:
        loader["device_map"] = str(outside["device"])
    batch_size = args.get("batch_size", outside.get("batch_size", 1))
    try:
        batch_size = check_batch_size(int(batch_size) if str(batch_size).isdecimal() else batch_size)
    except ConfigError as error:
        problems.append(str(error))
    of_adapter = {key: args[key] for key in ("visual_cache_gib",) if key in args}
    try:
        EncodedCache(of_adapter.get("visual_cache_gib", 0))
    except ConfigError as error:
        problems.append(str(error))
    raise_all(problems)
    if (pruner := build_pruner(args)) is not None:
        loader["pruner"] = pruner
    compressor = build_compressor(args)
    vlm = vzip.load_vlm(str(args["pretrained"]), compressor=compressor, **loader)
    return {"vlm": vlm, "batch_size": batch_size, "system_prompt": args.get("system_prompt"), **of_adapter}
