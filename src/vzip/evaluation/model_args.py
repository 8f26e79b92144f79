"""`--model_args` of `lmms-eval --model vzip`: every setting of model and compressor, none of them silent.

    lmms-eval --model vzip --tasks pope --model_args \\
        pretrained=llava-hf/llava-1.5-7b-hf,compressor=visionzip,num_dominant=54,num_contextual=10,dtype=float16
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, nearest

from .batching import check_batch_size

if TYPE_CHECKING:
    from vzip.compressors import Compressor

_OF_LOADER = (
    *("revision", "dtype", "device_map", "attn_implementation", "quantization", "preprocess"),
    *("drop_padding", "row_newline", "num_frames", "drop_cls", "adapter_path"),
)
_OF_ADAPTER = ("system_prompt", "batch_size")
_OPTIONS = ("merge_rule", "score", "score_layer", "targets", "keep_cls", "seed")
_OF_COMPRESSOR = ("compressor", "num_dominant", "num_contextual", *_OPTIONS)
ALLOWED = ("pretrained", *_OF_COMPRESSOR, *_OF_LOADER, *_OF_ADAPTER)
COMPRESSORS = ("visionzip", "random", "uniform", "dominant_only", "contextual_only", "none")
# Which of the optional settings a compressor takes; any other one is refused.
_OPTIONS_OF = {"visionzip": _OPTIONS, "random": ("seed",)}


def build_compressor(args: dict[str, Any]) -> Compressor:
    """The compressor that ``args`` name; see ``_OF_COMPRESSOR``.

    Raises:
        ConfigError: an unknown or missing name, a missing count, or a setting this compressor does not have.
    """
    import vzip

    name = args.get("compressor")
    if name not in COMPRESSORS:
        given = "is missing" if name is None else f"={name!r} is not known{nearest(str(name), COMPRESSORS)}"
        raise ConfigError(f"model_args: compressor {given}; allowed are {', '.join(COMPRESSORS)}.")
    options = {key: args[key] for key in _OPTIONS if key in args}
    layer = options.get("score_layer")
    if isinstance(layer, float) and layer.is_integer():
        options["score_layer"] = int(layer)  # lmms-eval reads -3 as a fraction
    for key, value in options.items():
        if key not in _OPTIONS_OF.get(name, ()):
            raise ConfigError(f"model_args: {key}={value!r} has no meaning for compressor={name}; take it out.")
    counts = {key: args[key] for key in ("num_dominant", "num_contextual") if key in args}
    if name == "none":
        if counts:
            raise ConfigError(f"model_args: compressor=none keeps every token, so {', '.join(counts)} cannot be given.")
        return vzip.Identity()
    missing = {"num_dominant", "num_contextual"} - set(counts)
    if missing:
        raise ConfigError(
            f"model_args: compressor={name} needs {' and '.join(sorted(missing))}, e.g. num_dominant=54,"
            "num_contextual=10 for 64 visual tokens per crop."
        )
    classes = {
        "visionzip": vzip.VisionZip,
        "random": vzip.RandomTokens,
        "uniform": vzip.UniformTokens,
        "dominant_only": vzip.DominantOnly,
        "contextual_only": vzip.ContextualOnly,
    }
    return classes[name](vzip.TokenBudget(**counts), **options)


def load_from_arg_string(arg_string: str, from_command_line: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``VzipLmms`` from lmms-eval's two sources of settings.

    Args:
        arg_string: `--model_args`.
        from_command_line: lmms-eval's own options (batch_size, max_batch_size, device), None where not given.

    Raises:
        ConfigError: a setting that is unknown, missing or cannot be used here.
    """
    from lmms_eval.utils import simple_parse_args_string

    import vzip

    args: dict[str, Any] = simple_parse_args_string(arg_string)
    for key, value in args.items():
        if key not in ALLOWED:
            raise ConfigError(
                f"model_args: {key}={value!r} is not known{nearest(key, ALLOWED)}; allowed are {', '.join(ALLOWED)}."
            )
    if "pretrained" not in args:
        raise ConfigError("model_args: pretrained is missing: a hub name or the directory of a checkpoint.")
    outside = {key: value for key, value in from_command_line.items() if value is not None}
    if "max_batch_size" in outside:
        raise ConfigError(f"max_batch_size={outside['max_batch_size']}: give batch_size=N, or auto.")
    compressor = build_compressor(args)

    loader = {key: args[key] for key in _OF_LOADER if key in args}
    if "device" in outside:
        if "device_map" in loader:
            raise ConfigError(f"device={outside['device']} and device_map={loader['device_map']}: give one of them.")
        loader["device_map"] = str(outside["device"])
    batch_size = args.get("batch_size", outside.get("batch_size", 1))
    if isinstance(batch_size, str):
        batch_size = check_batch_size(int(batch_size) if batch_size.isdecimal() else batch_size)
    vlm = vzip.load_vlm(str(args["pretrained"]), compressor=compressor, **loader)
    return {"vlm": vlm, "batch_size": batch_size, "system_prompt": args.get("system_prompt")}
