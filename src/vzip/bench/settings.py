"""The settings of one measurement: ``key=value`` words in, checked values out, all mistakes named at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from vzip.bench import shapes
from vzip.bench.shapes import BenchModel
from vzip.compressors import Compressor, TokenBudget
from vzip.errors import ConfigError, VzipError, nearest
from vzip.methods import find_method
from vzip.models.families.mini_gemini import MiniGeminiConfig
from vzip.pruners import FastV

BUDGETS: dict[str, tuple[int, int]] = {
    "192tok": (162, 30),
    "128tok": (108, 20),
    "64tok": (54, 10),
    "32tok": (27, 5),
    "17tok": (14, 3),
}
"""Names of budgets: dominant and contextual tokens per crop (the paper's Tables 8 and 9) or, for 17, per frame, whose
split the paper does not give: this is configs/budget/17tok.yaml's."""

DEFAULT_COMPRESSOR = "visionzip"
METHODS = ("vanilla", "vzip", "eager_maps", "fastv")
DEFAULT_METHODS = METHODS[:3]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS = ("auto", "random", "pretrained")


@dataclass(frozen=True)
class Mode:
    """One way of measuring: what it takes of the settings.

    Attributes:
        flag: the option that asks for it; empty for the usual one.
        name: of its results' file and directory.
        defaults: its own, where they differ from ``BenchSettings``.
        unused: keys that have no meaning in it.
        methods, dtypes: that it can measure.
    """

    flag: str
    name: str
    defaults: Mapping[str, object] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    methods: tuple[str, ...] = METHODS
    dtypes: tuple[str, ...] = tuple(DTYPES)


PASSES = Mode("", "bench")
_TRAINABLE: dict[str, tuple[str, ...]] = {"methods": ("vanilla", "vzip"), "dtypes": ("float32", "bfloat16")}
TRAIN = Mode(
    "--train",
    "train",
    {"methods": ("vanilla", "vzip"), "batch_size": 16, "prompt_tokens": 256},
    ("num_crops", "num_new_tokens", "pruner"),
    **_TRAINABLE,
)
MEMORY = Mode(
    "--memory",
    "memory",
    {"methods": ("vzip",), "batch_size": 16, "prompt_tokens": 256, "num_new_tokens": 128},
    ("num_crops", "repeats", "warmup", "weights", "pruner"),
    **_TRAINABLE,
)
MODES = (PASSES, TRAIN, MEMORY)

HELP = {
    "model": f"tiny, {', '.join(shapes.SHAPES)} (clip_l_336: the tower alone), or a directory",
    "weights": "auto | random | pretrained (auto: random for bare shapes, pretrained for tiny and directories)",
    "budget": f"auto | {' | '.join(BUDGETS)} | D+C: dominant and contextual tokens per crop (auto: 64tok; LLaVA-NeXT: "
    "32tok; Video-LLaVA: 17tok)",
    "compressor": "what the method vzip compresses by: an option of configs/compressor",
    "methods": "comma-separated, of vanilla, vzip, eager_maps, fastv (every visual token enters, FastV drops)",
    "pruner": "K:keep of the method fastv: layers that see every visual token, and how many (or what fraction) go on",
    "dtype": "auto | float32 | bfloat16 | float16 (auto: bfloat16 on a GPU, float32 on a CPU)",
    "device": "auto | cpu | cuda | cuda:N",
    "batch_size": "prompts in a batch",
    "num_crops": "tower inputs in each prompt: images, crops of one image (LLaVA-NeXT) or frames of one video "
    "(Video-LLaVA); 0: the model's own (1, 5, 8)",
    "num_new_tokens": "tokens decoded after the first one",
    "prompt_tokens": "text tokens in each prompt or conversation, placeholders not counted",
    "repeats": "measured rounds",
    "warmup": "rounds before them that are thrown away",
    "threads": "CPU threads; 0: torch's default",
    "seed": "of the random weights, images and prompts",
    "out": "directory for bench.json and bench.png; auto: runs/bench/...",
    "overwrite": "true | false: whether an existing out directory may be written to",
}


@dataclass(frozen=True)
class BenchSettings:
    """One measurement; see ``HELP`` for what each value means."""

    model: str = "tiny"
    weights: str = "auto"
    compressor: str = DEFAULT_COMPRESSOR
    budget: str = "auto"
    methods: tuple[str, ...] = DEFAULT_METHODS
    pruner: str = "2:0.5"
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 1
    num_crops: int = 0
    num_new_tokens: int = 8
    prompt_tokens: int = 60
    repeats: int = 5
    warmup: int = 1
    threads: int = 0
    seed: int = 0
    out: str = "auto"
    overwrite: bool = False

    @property
    def torch_device(self) -> torch.device:
        """The device measured on."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32

    def token_budget(self, model: BenchModel) -> tuple[str, TokenBudget]:
        """Returns the budget's name and counts per crop."""
        name = model.default_budget if self.budget == "auto" else self.budget
        dominant, contextual = BUDGETS[name] if name in BUDGETS else map(int, name.split("+"))
        return name, TokenBudget(num_dominant=dominant, num_contextual=contextual)

    def method(self, model: BenchModel) -> Compressor:
        """What the method ``vzip`` compresses by; ConfigError where there is none of that name."""
        return find_method(self.compressor).build(self.token_budget(model)[1])

    def fastv(self) -> FastV:
        """What the method ``fastv`` drops by; ConfigError for values that cannot be."""
        layers, _, keep = self.pruner.partition(":")
        if not re.fullmatch(r"\d+", layers) or not re.fullmatch(r"\d+|\d*\.\d+", keep):
            raise ConfigError(f"pruner={self.pruner}: must be K:keep, as 2:166 or 2:0.5.")
        return FastV(int(layers), float(keep) if "." in keep else int(keep))

    def weights_of(self, model: BenchModel) -> str:
        """Returns ``random`` or ``pretrained``."""
        return model.default_weights if self.weights == "auto" else self.weights

    def crops_per_prompt(self, model: BenchModel) -> int:
        """Returns the number of tower inputs in each prompt."""
        return self.num_crops or model.num_crops

    def out_directory(self, model: BenchModel, mode: Mode = PASSES) -> Path:
        """Returns where the results go."""
        if self.out != "auto":
            return Path(self.out).expanduser()
        name = Path(self.model).name
        dtype = str(self.torch_dtype).removeprefix("torch.")
        part = "vzip" if mode is PASSES else mode.name
        if self.compressor != DEFAULT_COMPRESSOR:
            part += f"-{self.compressor}"
        return Path("runs", "bench", name, f"{part}-{self.token_budget(model)[0]}-{dtype}-{self.torch_device.type}")


_LARGEST = 2**32 - 1  # the largest seed of NumPy, and more than any of the others can be
_MINIMUM = {
    "batch_size": 1,
    "num_crops": 0,
    "num_new_tokens": 1,
    "prompt_tokens": 1,
    "repeats": 1,
    "warmup": 0,
    "threads": 0,
    "seed": 0,
}


def default_word(key: str, mode: Mode = PASSES) -> str:
    """Returns a key's default the way a user writes it."""
    value = mode.defaults.get(key, getattr(BenchSettings(), key))
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def parse(words: Sequence[str], mode: Mode = PASSES) -> BenchSettings:
    """Reads ``key=value`` words, for one way of measuring.

    Raises:
        ConfigError: with every mistake of the line, one a row.
    """
    known = [field.name for field in fields(BenchSettings)]
    keys = ", ".join(known)
    values: dict[str, object] = {}
    problems: list[str] = []
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            problems.append(f"{word!r} is not of the form key=value{nearest(key, known)}; keys: {keys}")
        elif key not in known:
            problems.append(f"unknown key {key!r}{nearest(key, known)}; keys: {keys}")
        elif key in values:
            problems.append(f"{key} is given twice")
        elif key in mode.unused:
            problems.append(f"{key}={text}: has no meaning with {mode.flag}; leave it out")
        else:
            values[key] = _value(key, text, problems)
            _check_mode(key, text, mode, problems)
    if (compressor := values.get("compressor", DEFAULT_COMPRESSOR)) != DEFAULT_COMPRESSOR:
        chosen = values.setdefault("methods", tuple(m for m in _default_methods(mode) if m != "eager_maps"))
        if isinstance(chosen, tuple) and "eager_maps" in chosen and not problems:
            problems.append(
                f"methods={','.join(chosen)}: eager_maps is the published way of {DEFAULT_COMPRESSOR}; leave it out"
                f" with compressor={compressor}"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    given: dict[str, Any] = {**mode.defaults, **values}  # _value gave each key the type of its field
    return BenchSettings(**given)


def _default_methods(mode: Mode) -> tuple[str, ...]:
    chosen = mode.defaults.get("methods", DEFAULT_METHODS)
    assert isinstance(chosen, tuple)
    return chosen


def _check_mode(key: str, text: str, mode: Mode, problems: list[str]) -> None:
    """Names what the other ways of measuring know and this one does not."""
    if key == "methods":
        other = [method for method in text.split(",") if method in METHODS and method not in mode.methods]
        problems += [f"methods={text}: {mode.flag} has no {m}; methods: {', '.join(mode.methods)}" for m in other]
    elif key == "dtype" and text in DTYPES and text not in mode.dtypes:
        problems.append(f"dtype={text}: nothing trains in it; {mode.flag} takes auto, {', '.join(mode.dtypes)}")
    elif key == "device" and mode is not PASSES and re.fullmatch(r"cuda:[1-9]\d*", text):
        problems.append(
            f"device={text}: {mode.flag} trains, and a training takes the first device it sees; hide the others with"
            f" CUDA_VISIBLE_DEVICES={text.partition(':')[2]}, and set device=cuda"
        )


def _value(key: str, text: str, problems: list[str]) -> object:
    """Converts one value; what is wrong with it goes into ``problems``."""
    if key in _MINIMUM:
        if not re.fullmatch(r"\d+", text) or int(text) < _MINIMUM[key]:
            problems.append(f"{key}={text}: must be a whole number of at least {_MINIMUM[key]}")
            return 0
        if int(text) > _LARGEST:
            problems.append(f"{key}={text}: must be a whole number of at most {_LARGEST}")
            return 0
        return int(text)
    if key == "overwrite":
        if text not in ("true", "false"):
            problems.append(f"overwrite={text}: must be true or false")
        return text == "true"
    if key == "methods":
        chosen = tuple(dict.fromkeys(text.split(",")))
        problems += [
            f"methods={text}: unknown method {m!r}{nearest(m, METHODS)}; methods: {', '.join(METHODS)}"
            for m in chosen
            if m not in METHODS
        ]
        return chosen
    if key == "model":
        try:
            shapes.resolve(text)
        except VzipError as error:
            problems.append(str(error))
    elif key == "budget":
        _check_budget(text, problems)
    elif key == "compressor":
        _check_compressor(text, problems)
    elif key == "pruner":
        try:
            BenchSettings(pruner=text).fastv()
        except ConfigError as error:
            problems.append(str(error))
    elif key == "device":
        _check_device(text, problems)
    elif key in ("dtype", "weights"):
        allowed = ("auto", *DTYPES) if key == "dtype" else WEIGHTS
        if text not in allowed:
            problems.append(f"{key}={text}: must be one of {', '.join(allowed)}{nearest(text, allowed)}")
    elif not text:
        problems.append(f"{key}= is empty: {HELP[key]}")
    return text


def _check_compressor(text: str, problems: list[str]) -> None:
    try:
        if not find_method(text).has_budget:
            problems.append(f"compressor={text}: compresses nothing; the method 'vanilla' is measured beside it always")
    except ConfigError as error:
        problems.append(str(error))


def _check_budget(text: str, problems: list[str]) -> None:
    if text == "full":
        problems.append(
            "budget=full is the method 'vanilla', which is always measured: methods=vanilla measures it alone"
        )
    elif re.fullmatch(r"\d+\+\d+", text):
        try:
            TokenBudget(*map(int, text.split("+")))
        except ConfigError as error:
            problems.append(f"budget={text}: {error}")
    elif text != "auto" and text not in BUDGETS:
        hint = f" (did you mean '{text}tok'?)" if f"{text}tok" in BUDGETS else nearest(text, BUDGETS)
        problems.append(
            f"budget={text}: must be auto, one of {', '.join(BUDGETS)}, or counts per crop as DOMINANT+CONTEXTUAL such "
            f"as 54+10{hint}"
        )


def _check_device(text: str, problems: list[str]) -> None:
    if text not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", text):
        problems.append(f"device={text}: must be auto, cpu, cuda or cuda:N")
    elif text.startswith("cuda"):
        index = int(text.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            problems.append(
                f"device={text}: this machine's torch sees {torch.cuda.device_count()} CUDA devices; use cpu"
            )


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
    element_bytes = settings.torch_dtype.itemsize
    vision = model.vision_config
    num_rows = (vision.image_size // vision.patch_size) ** 2 + 1
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
