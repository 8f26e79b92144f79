"""The settings of one measurement: ``key=value`` overrides in, checked values out, all mistakes named at once.

Models, budgets, compressors and pruners are those of ``configs`` and named as for eval.py, but read without Hydra.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vzip.errors import ConfigError, VzipError, nearest
from vzip.installed import checkout
from vzip.keys import SEED, SHARE, Rule, check_value, key, keys_of, one_of, raise_all, show
from vzip.methods import budgets, find_budget, find_method, method_names
from vzip.option_files import FRACTIONS, options, read_yaml

if TYPE_CHECKING:  # torch and transformers take seconds, which --help and a refused key need not wait for
    import torch
    from transformers import PretrainedConfig

    from vzip.bench.shapes import BenchModel
    from vzip.compressors import Compressor, FractionBudget, TokenBudget
    from vzip.pruners import Pruner

_NO_SHAPES = ("llava_local", "tiny")  # of configs/model: directories
SHAPE_NAMES = ("clip_l_336", *(n for n in options(checkout() / "configs", "model") if n not in _NO_SHAPES))
BUDGETS = budgets()
COMPRESSORS = method_names()
PRUNERS = method_names("pruner")
DEFAULT_COMPRESSOR = "visionzip"
NO_PRUNER = "none"
DEFAULT_METHODS = ("vanilla", "vzip", "eager_maps")
COMPILED = "compiled"
METHODS = (*DEFAULT_METHODS, *PRUNERS, COMPILED)
DTYPES = ("float32", "bfloat16", "float16")
FRACTION = "fraction"
_COUNTED = r"\d+\+\d+|\d*\.\d+\+\d*\.\d+"


@dataclass(frozen=True)
class Mode:
    """One way of measuring: what it takes of the settings.

    Attributes:
        flag: the option that asks for it; empty for the usual one.
        name: of its results' file and directory.
        defaults: its own, where they differ from ``BenchSettings``.
        unused: keys that have no meaning in it.
        rules: its own, where it takes less than the others.
    """

    flag: str
    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    rules: Mapping[str, Rule] = field(default_factory=dict)


def _trained(flag: str) -> dict[str, Rule]:
    return {
        "methods": one_of("vanilla", "vzip", note=f" with {flag}"),
        "dtype": one_of("auto", "float32", "bfloat16", note=f" with {flag}, which trains"),
        "device": Rule(
            f"auto, cpu or cuda with {flag}, since a training takes the first device it sees; hide the others with"
            " CUDA_VISIBLE_DEVICES=N",
            lambda v: re.fullmatch(r"auto|cpu|cuda(:0)?", v) is not None,
        ),
    }


PASSES = Mode("", "bench")
TRAIN = Mode(
    "--train",
    "train",
    {"methods": ("vanilla", "vzip"), "batch_size": 16, "prompt_tokens": 256},
    ("num_crops", "num_new_tokens", "pruner", "compile"),
    _trained("--train"),
)
MEMORY = Mode(
    "--memory",
    "memory",
    {"methods": ("vzip",), "batch_size": 16, "prompt_tokens": 256, "num_new_tokens": 128},
    ("num_crops", "repeats", "warmup", "weights", "pruner", "compile"),
    _trained("--memory"),
)

CURVES = Mode(
    "--curves",
    "curves",
    {"methods": ("vanilla", "vzip"), "batch_size": 64, "num_crops": 128, "repeats": 3, "warmup": 0},
    ("methods", "budget", "pruner", "compressor", "weights", "compile"),
)


@dataclass(frozen=True)
class BenchSettings:
    """One measurement.

    Attributes:
        method_settings: of compressor and pruner, where they are not the file's: ``compressor.merge_rule=mean``; of the
            budget its ``scope``.
    """

    model: str = key(
        "what is measured (clip_l_336: the tower alone)",
        rule=Rule(f"tiny, one of {', '.join(SHAPE_NAMES)}, or a directory", bool),
        default="tiny",
    )
    weights: Literal["auto", "random", "pretrained"] = key("auto: random for bare shapes alone", default="auto")
    compressor: str = key(
        "what the method vzip compresses by; its settings as compressor.merge_rule=mean",
        rule=one_of(*COMPRESSORS, note=" (all tokens: methods=vanilla)"),
        default=DEFAULT_COMPRESSOR,
    )
    budget: str = key(
        "tokens a crop; auto: 64tok (LLaVA-NeXT: 32tok, Video-LLaVA: 17tok); budget.scope=video: of all its frames",
        rule=Rule(
            f"auto, one of {', '.join(BUDGETS)}, any number as 48tok, counts a crop as DOMINANT+CONTEXTUAL, such as"
            " 54+10, or fractions of its patches likewise, as 0.65+0.05 (all tokens: methods=vanilla)",
            lambda v: v == "auto" or find_budget(v) is not None or re.fullmatch(_COUNTED, v) is not None,
            tuple(BUDGETS),
        ),
        default="auto",
    )
    methods: tuple[str, ...] = key(
        "several with commas; a pruner's: every visual token enters, and it drops",
        rule=one_of(*METHODS),
        default=DEFAULT_METHODS,
    )
    pruner: str = key(
        "one of the methods, too; its settings as pruner.K=2 pruner.keep=166",
        rule=one_of(NO_PRUNER, *PRUNERS),
        default=NO_PRUNER,
    )
    compile: tuple[str, ...] = key(
        "several with commas; measured as the method compiled, which is vzip with these under torch.compile",
        rule=one_of("tower", "prefill", "decode"),
        default=(),
    )
    dtype: str = key("auto: bfloat16 on a GPU, float32 on a CPU", rule=one_of("auto", *DTYPES), default="auto")
    device: str = key(
        "auto: CUDA if there is one",
        rule=Rule("auto, cpu, cuda or cuda:N", lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?", v) is not None),
        default="auto",
    )
    batch_size: int = key("prompts in a batch", at_least=1, default=1)
    num_crops: int = key(
        "tower inputs a prompt: images, crops of one image, frames; of Qwen's models 1: an image, more: a video of so"
        " many temporal steps; 0: 1, 5, 8 by model",
        default=0,
    )
    num_new_tokens: int = key("tokens decoded after the first one", at_least=1, default=8)
    prompt_tokens: int = key("text tokens a prompt or conversation, placeholders not counted", at_least=1, default=60)
    repeats: int = key("measured rounds", at_least=1, default=5)
    warmup: int = key("rounds before them that are thrown away", default=1)
    threads: int = key("CPU threads; 0: torch's default", default=0)
    seed: int = key("seed of the random weights, images and prompts", rule=SEED, default=0)
    out: str = key("for bench.json and bench.png; auto: runs/bench/...", what="a directory", default="auto")
    overwrite: bool = key("whether an existing out directory may be written to", default=False)
    method_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def torch_device(self) -> torch.device:
        """The device measured on."""
        import torch

        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        import torch

        usual = "bfloat16" if self.torch_device.type == "cuda" else "float32"
        dtype: torch.dtype = getattr(torch, usual if self.dtype == "auto" else self.dtype)
        return dtype

    def token_budget(self, model: BenchModel) -> tuple[str, TokenBudget | FractionBudget]:
        """Returns the budget's name and what it keeps of a crop."""
        name = model.default_budget if self.budget == "auto" else self.budget
        scope = self.method_settings.get("budget", {}).get("scope", "crop")
        return name + ("" if scope == "crop" else f"_scope-{scope}"), _budget_of(name, scope)

    def method(self, model: BenchModel | None = None) -> Compressor:
        """What the method ``vzip`` compresses by (by default with any budget); ConfigError for wrong settings."""
        budget = _budget_of(next(iter(BUDGETS)), "crop") if model is None else self.token_budget(model)[1]
        built: Compressor = find_method(self.compressor).build(budget, **self.method_settings.get("compressor", {}))
        return built

    def built_pruner(self) -> Pruner | None:
        """What the method of the pruner's name drops by; ConfigError for wrong settings."""
        settings = self.method_settings.get("pruner", {})
        if self.pruner == NO_PRUNER:
            if settings:
                raise ConfigError(
                    f"pruner.{min(settings)}: pruner=none has no settings; add pruner=NAME, one of"
                    f" {', '.join(PRUNERS)}."
                )
            return None
        built: Pruner = find_method(self.pruner, "pruner").build(**settings)
        return built

    @property
    def reads_as_published(self) -> bool:
        """Whether the compressor reads what the published code does, which ``eager_maps`` is."""
        return self.compressor == DEFAULT_COMPRESSOR and self.method().reads() == BenchSettings().method().reads()

    def weights_of(self, model: BenchModel) -> str:
        """Returns ``random`` or ``pretrained``."""
        return model.default_weights if self.weights == "auto" else self.weights

    def crops_per_prompt(self, model: BenchModel) -> int:
        """Returns the number of tower inputs in each prompt."""
        return self.num_crops or model.num_crops

    def usual_methods(self, mode: Mode) -> tuple[str, ...]:
        """The methods that are measured where none are named."""
        names: tuple[str, ...] = mode.defaults.get("methods", DEFAULT_METHODS)
        if not self.reads_as_published:
            names = tuple(name for name in names if name != "eager_maps")
        names = names if self.pruner == NO_PRUNER else (*names, self.pruner)
        return (*names, COMPILED) if self.compile else names

    def labels(self) -> list[str]:
        """The compressor's and the pruner's name, each with its settings that are not the file's."""
        chosen = {"compressor": self.compressor, "pruner": self.pruner}
        files = {g: find_method(name, g) for g, name in chosen.items() if name != NO_PRUNER}
        return [file.label(self.method_settings.get(group, {})) for group, file in files.items()]

    def out_directory(self, mode: Mode = PASSES) -> Path:
        """Returns where the results go: another folder for other methods or settings of theirs."""
        if self.out != "auto":
            return Path(self.out).expanduser()
        from vzip.bench import shapes

        model = shapes.resolve(self.model)
        parts = ["vzip" if mode is PASSES else mode.name, *self.labels()]
        parts = [part for part in parts if part not in (DEFAULT_COMPRESSOR, NO_PRUNER)]
        if set(self.methods) != set(self.usual_methods(mode)):
            parts.append("only-" + "+".join(sorted(self.methods, key=METHODS.index)))
        parts += [f"{COMPILED}-{'+'.join(self.compile)}"] if self.compile else []
        dtype = str(self.torch_dtype).removeprefix("torch.")
        parts += [self.token_budget(model)[0], dtype, self.torch_device.type]
        return Path("runs", "bench", Path(self.model).name, "-".join(parts))


KEYS = keys_of(BenchSettings)


def shown_defaults(mode: Mode = PASSES) -> dict[str, str]:
    """Each key's default the way a user writes it."""
    values = {name: mode.defaults.get(name, getattr(BenchSettings(), name)) for name in KEYS}
    return {name: ",".join(value) if isinstance(value, tuple) else show(value) for name, value in values.items()}


def parse(words: Sequence[str], mode: Mode = PASSES) -> BenchSettings:
    """Reads ``key=value`` overrides, for one way of measuring.

    Raises:
        ConfigError: with every mistake of the line.
    """
    given: dict[str, Any] = {}
    of_methods: dict[str, dict[str, Any]] = {"compressor": {}, "pruner": {}, "budget": {}}
    problems: list[str] = []
    for word in words:
        name, separator, value = word.partition("=")
        group, dot, own = name.partition(".")
        own, values = (own, of_methods.get(group)) if dot else (name, given)
        if not separator:
            problems.append(f"{word!r} is not of the form key=value{nearest(name, KEYS)}; keys: {', '.join(KEYS)}")
        elif values is None or not (dot or name in KEYS):
            problems.append(f"unknown key {name!r}{nearest(name, KEYS)}; keys: {', '.join(KEYS)}")
        elif own in values:
            problems.append(f"{name} is given twice")
        elif group in mode.unused:
            problems.append(f"{word}: has no meaning with {mode.flag}; leave it out")
        else:
            try:
                values[own] = read_yaml(value) if dot else _value(name, value)
            except ConfigError as error:
                problems.append(f"{name}={value}: {error}")
    _read_budget(given, of_methods["budget"], problems)
    for name in list(given):
        if wrong := _problems_of(name, given[name], mode.rules.get(name, KEYS[name].rule)):
            problems += wrong
            del given[name]  # the rest is judged without it
            of_methods.pop(name, None)
    named = [method for method in given.get("methods", ()) if method in PRUNERS]
    given.setdefault("pruner", named[0] if named else NO_PRUNER)
    given["method_settings"] = {group: values for group, values in of_methods.items() if values}
    settings = BenchSettings(**{**mode.defaults, **given})
    if of_methods.get("compressor") or of_methods.get("pruner") or not problems:  # their classes bring torch along
        for build in (settings.method, settings.built_pruner):
            try:
                build()
            except ConfigError as error:
                problems.append(str(error))
    raise_all(problems)
    if "methods" not in given:
        return replace(settings, methods=settings.usual_methods(mode))
    shown = f"methods={','.join(settings.methods)}"
    if named != [settings.pruner] and (named or settings.pruner != NO_PRUNER):
        raise ConfigError(f"{shown} pruner={settings.pruner}: the pruner must be one of the methods, and no other.")
    if (COMPILED in settings.methods) != bool(settings.compile):
        raise ConfigError(
            f"{shown} compile={','.join(settings.compile)}: the method {COMPILED} runs what compile names (tower,"
            " prefill, decode): give both or neither."
        )
    if "eager_maps" in settings.methods and not settings.reads_as_published:
        raise ConfigError(
            f"{shown}: eager_maps is the published way of {DEFAULT_COMPRESSOR}; leave it out with"
            f" compressor={settings.labels()[0]}."
        )
    return settings


def _budget_of(name: str, scope: Any) -> TokenBudget | FractionBudget:
    """What a budget's name, counts or fractions stand for; ConfigError as its class."""
    from vzip.compressors import FractionBudget, TokenBudget

    if "." in name:
        dominant, contextual = map(float, name.split("+"))
        return FractionBudget(dominant, contextual, scope)
    num_dominant, num_contextual = find_budget(name) or map(int, name.split("+"))
    return TokenBudget(num_dominant, num_contextual, scope)


def _read_budget(given: dict[str, Any], own: dict[str, Any], problems: list[str]) -> None:
    """Takes out of ``own`` what eval.py's words say of a budget: ``budget=fraction budget.dominant=0.65 ...``."""
    fractions = {part: own.pop(part) for part in FRACTIONS if part in own}
    if given.get("budget") == FRACTION:
        if len(fractions) == len(FRACTIONS) and all(map(SHARE.allows, fractions.values())):
            given["budget"] = "+".join(f"{float(fractions[part]):f}".rstrip("0").ljust(3, "0") for part in FRACTIONS)
            return
        given["budget"] = "auto"
        problems.append(
            "budget=fraction: needs fractions of a crop's patches, as budget.dominant=0.65 budget.contextual=0.05"
        )
    elif fractions:
        problems.append(f"budget.{min(fractions)}: goes with budget=fraction alone")
    for name, value in own.items():
        if name != "scope":
            problems.append(f"unknown key 'budget.{name}'{nearest(name, ('scope',))}; a budget has scope here")
        else:
            problems.extend(check_value("budget.scope", value, one_of("crop", "video")))
    if problems:
        own.clear()


def _value(name: str, value: str) -> Any:
    """What a user typed, as the type of the key's default; what cannot be stays as it is, for the rule to refuse."""
    default = getattr(BenchSettings(), name)
    if isinstance(default, tuple):
        return tuple(dict.fromkeys(value.split(",")))
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(value, value)
    return value if isinstance(default, str) else read_yaml(value)


def _problems_of(name: str, value: Any, rule: Rule) -> list[str]:
    """What is wrong with a key's value: by its rule, and by what is on this machine."""
    values = value if isinstance(value, tuple) else (value,)
    broken = [problem for one in values for problem in check_value(name, one, rule)]
    if broken:
        return broken
    try:
        if name == "model" and value not in SHAPE_NAMES:
            from vzip.bench import shapes

            shapes.resolve(value)
        elif name == "budget" and "+" in value:
            _budget_of(value, "crop")
    except VzipError as error:
        return [f"budget={value}: {error}" if name == "budget" else str(error)]
    if name == "device" and value.startswith("cuda"):
        import torch

        if int(value[5:] or 0) >= torch.cuda.device_count():
            return [f"device={value}: this machine's torch sees {torch.cuda.device_count()} CUDA devices; use cpu"]
    return []


def estimate_bytes(settings: BenchSettings, model: BenchModel, num_parameters: int, num_visual_tokens: int) -> int:
    """Estimates the largest memory a measurement needs, before anything is allocated.

    Counts the weights, the float32 copy of a half-precision tower that the equality check makes, every attention map
    and hidden state that ``eager_maps`` keeps, the cache, and a language model layer's activations. An estimate from
    above: the parts do not all peak together.

    Args:
        settings: the measurement.
        model: its model.
        num_parameters: of the whole model.
        num_visual_tokens: the most of a prompt over the methods; 0 for a bare tower.
    """
    from vzip.models.families.mini_gemini import MiniGeminiConfig

    element_bytes = settings.torch_dtype.itemsize
    vision = model.vision_config
    num_rows = model.rows_per_crop
    num_inputs = settings.batch_size * settings.crops_per_prompt(model)
    needed = num_parameters * element_bytes
    # A tower layer's activations: input, normalised copy, q, k, v, output and the MLP's middle, twice.
    needed += num_inputs * num_rows * (6 * vision.hidden_size + 2 * vision.intermediate_size) * element_bytes
    if "eager_maps" in settings.methods:
        map_elements = num_inputs * vision.num_attention_heads * num_rows**2
        needed += vision.num_hidden_layers * (map_elements + num_inputs * num_rows * vision.hidden_size) * element_bytes
        needed += 2 * map_elements * 4  # scores and their float32 softmax, of the layer at work
        if element_bytes < 4:
            needed += 4 * tower_parameters(vision)
    if isinstance(model.config, MiniGeminiConfig):
        # The first stage's widened features, or all stages' joined ones, of which the last were float32 on the way.
        widths, positions = model.config.high_res_config.hidden_sizes, (model.config.high_res_image_size // 4) ** 2
        needed += num_inputs * positions * (sum(widths) * (2 * element_bytes + 4) + 8 * widths[0] * element_bytes)
    if not model.tower_only:
        text = model.config.text_config
        num_tokens = settings.batch_size * (num_visual_tokens + settings.prompt_tokens)
        cached = num_tokens + settings.batch_size * settings.num_new_tokens
        needed += 2 * text.num_hidden_layers * cached * text.hidden_size * element_bytes
        needed += num_tokens * (8 * text.hidden_size + 3 * text.intermediate_size) * element_bytes
    return needed


def tower_parameters(config: PretrainedConfig) -> int:
    """Returns the number of weights of a vision transformer, norms and biases left out."""
    dim = config.hidden_size
    num_rows = (config.image_size // config.patch_size) ** 2 + 1
    per_layer = 4 * dim * dim + 2 * dim * config.intermediate_size
    return config.num_hidden_layers * per_layer + dim * (config.num_channels * config.patch_size**2 + num_rows)
