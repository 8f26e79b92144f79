"""Every key that a configuration may hold, for evaluation and training alike.

The YAML files carry the values. The groups ``compressor`` and ``pruner`` are open: their keys are the arguments of
their ``_target_``. The groups ``train`` and ``launcher`` are described by ``vzip.train.settings``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vzip.keys import (
    SEED,
    SHARE,
    Key,
    Rule,
    key,
    keys_of,
    number,
    once_each,
    one_of,
    optional,
    text,
    texts,
    whole_number,
)
from vzip.train.settings import LaunchSettings, TrainSettings

AUTO = "auto"  # of launcher
OPEN_GROUPS = ("compressor", "pruner")
OF_VIDEOS = ("fps", "min_frame_pixels", "max_frame_pixels")  # of model, where videos are sampled by their seconds
# Where to run, how many at once, what is told: of model, budget and eval all other settings change results.
NOT_RESULTS = frozenset({"name", "assembled_from", "device_map", "num_tower_tokens", "limit", "batch_size"})
NOT_RESULTS |= {"num_workers", "tower_cache_gib", "visual_cache_gib", "on_problem", "trackers"}


@dataclass(frozen=True)
class RunSettings:
    """The keys outside of all groups."""

    recipe: str | None = key("the recipe, whose file sets it", what="the name of a file in configs/exp")
    seed: int = key("seed of every random choice", rule=SEED)
    dry_run: bool = key("check everything, print what would be done, and stop before anything is loaded or written")
    overwrite: bool = key("replace the record of an earlier run in the same run directory")


@dataclass(frozen=True)
class ModelSettings:
    """The ``model`` group."""

    name_or_path: str = key("the weights", what="a hub id, a checkpoint directory or vzip/tiny")
    revision: str | None = key(
        "of the weights; null: the newest", what="a commit, tag or branch of the hub's repository"
    )
    assembled_from: list[str] | None = key(
        "what scripts/assemble_llava.py makes the directory of; null: it is not made here",
        rule=Rule("a list of vision tower and language model", lambda v: texts("").allows(v) and len(v) == 2),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("dtype of the weights; auto: the checkpoint's")
    device_map: str | dict[str, Any] | None = key(
        "where the model goes; null: the CPU",
        rule=Rule(
            "auto, cpu, cuda, cuda:0 ..., or a mapping of modules to devices", lambda v: isinstance(v, str | dict)
        ),
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = key("attention of the language model")
    quantization: Literal["8bit", "4bit"] | None = key("of the language model alone (bitsandbytes); null: none")
    preprocess: Literal["llava", "hf"] | None = key(
        "llava: pad to a square (LLaVA-NeXT: the scripts' tiles), as the published scripts; hf: the checkpoint's own"
        " processor (crops; LLaVA-NeXT: other tiles on small images); null: as the checkpoint was trained"
    )
    drop_padding: bool = key("LLaVA-NeXT: patches of mere padding are never selected; as published they are")
    row_newline: bool = key("LLaVA-NeXT: the newline token after each row, on top of the budget; published: none")
    num_frames: int | None = key(
        "frames of a video, spread over it; null: 8, of Qwen's models by model.fps", at_least=1
    )
    fps: float | None = key(
        "Qwen2.5-VL, Qwen3-VL: frames taken of each second of a video; null: the checkpoint's own, else 2",
        rule=optional(Rule("a number above 0", lambda v: number(0).allows(v) and v > 0)),
    )
    min_frame_pixels: int | None = key(
        "Qwen2.5-VL, Qwen3-VL: to which the frames of a video are resized at least; null: the checkpoint's own",
        at_least=1,
    )
    max_frame_pixels: int | None = key("the same at most", at_least=1)
    drop_cls: bool = key("Mini-Gemini: compress mined patches alone; else CLS, which is not mined, is the first kept")
    positions: Literal["original", "repacked"] | None = key(
        "of visual tokens: original: the position ids that their places have without compression; repacked: 0, 1, 2,"
        " ... over what is left; null: the family's own (LLaVA repacked, Qwen2.5-VL original)"
    )
    compile: list[Literal["tower", "prefill", "decode"]] | None = key(
        "under torch.compile: what a second call of the same shapes gains and the first pays for; numbers may differ in"
        " their last digits; null: nothing",
        at_least=1,
    )
    adapter_path: str | None = key(
        "put on top; null: none", what="a directory with a PEFT checkpoint (LoRA), or a hub id"
    )
    system_prompt: str | None = key("text before each question; null: none", what="a text")
    projector: str | None = key(
        "tuned weights; null: none",
        what="a directory that train.py wrote, trained: this command line's own, or a hub id (owner/name@revision)",
    )
    num_tower_tokens: int | None = key(
        "of a tower input, CLS among them: the most a budget can be; null: read from the checkpoint", at_least=1
    )


def _tokens(minimum: int) -> Rule:
    """Null stands for "no budget" in budget=full."""
    allows = optional(whole_number(minimum)).allows
    return Rule(f"a whole number of tokens a crop, {minimum} or more (not a ratio)", allows)


@dataclass(frozen=True, kw_only=True)
class ScopedSettings:
    """What every ``budget`` has."""

    scope: Literal["crop", "video"] = key(
        "of a video: crop: a budget for each frame (Qwen: temporal step); video: one for all of them together",
        default="crop",
    )


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(ScopedSettings):
    """The ``budget`` group."""

    num_dominant: int | None = key("dominant tokens: kept by their scores, CLS among them", rule=_tokens(1))
    num_contextual: int | None = key("contextual tokens: what the others are merged into", rule=_tokens(0))


def _fraction(name: str) -> Rule:
    return Rule(f"a fraction of the patches, 0 to 1, as budget.{name}=0.05", SHARE.allows)


@dataclass(frozen=True, kw_only=True)
class FractionBudgetSettings(ScopedSettings):
    """The ``budget`` group for fractions of what a crop has."""

    dominant: float = key("of budget=fraction: share of the patches that are dominant", rule=_fraction("dominant"))
    contextual: float = key("of budget=fraction: contextual, likewise", rule=_fraction("contextual"))


@dataclass(frozen=True, kw_only=True)
class CountedBudgetSettings(BudgetSettings):
    """The ``budget`` group for a number of tokens that is split as the paper splits its own."""

    num_tokens: int = key(
        "of budget=tokens: dominant and contextual together, 5.4 to 1",
        rule=Rule("a whole number of tokens a crop, 2 or more, as budget.num_tokens=48", whole_number(2).allows),
    )


@dataclass(frozen=True)
class GenerationSettings:
    """``eval.gen_kwargs``: what is asked of each answer."""

    max_new_tokens: int | None = key("tokens an answer may have", at_least=1, default=None)
    do_sample: bool | None = key("draw tokens instead of taking the likeliest", default=None)
    temperature: float | None = key("divides the logits of drawn tokens", default=None)
    top_p: float | None = key("share of the probability that tokens are drawn from", default=None)
    num_beams: int | None = key("beams of a beam search", at_least=1, default=None)
    until: list[str] | None = key("what ends it", what="a list of strings at which an answer ends", default=None)


@dataclass(frozen=True)
class EvalSettings:
    """The ``eval`` group."""

    tasks: list[str] = key(
        "the benchmarks", rule=once_each(texts("a list of at least one task name, as eval.tasks=[pope,gqa]"))
    )
    limit: int | None = key("samples a task; null: all (a limited run is recorded as provisional)", at_least=1)
    batch_size: int | Literal["auto"] = key(
        "questions generated together, halved when memory does not suffice; auto: as many as fit (from 64, on a CPU 8)",
        at_least=1,
    )
    num_workers: int = key("threads that read images and videos ahead, in each process; 0: none")
    include_path: str | None = key(
        "one's own tasks, the generated scenes (built-in), those in paths.video_root (video); null: lmms-eval's alone",
        what="a folder of lmms-eval task files (their code is run), built-in or video",
    )
    visual_cache_gib: float = key(
        "memory for visual tokens of images that several questions show, on the model's device; 0: each batch encodes"
        " its own",
        rule=number(0),
    )
    tower_cache_gib: float | None = key("memory for tower outputs between a sweep's jobs; null: 4 in a sweep, else 0")
    on_problem: Literal["refuse", "skip"] = key(
        "an image or video that cannot be read: refuse (once all else is answered), or leave the question out"
    )
    trackers: list[Literal["wandb"]] = key("what is told of the finished run: scores, retention, a few answers")
    gen_kwargs: GenerationSettings = key("how answers are generated; null: what the task says", what="a mapping")


@dataclass(frozen=True)
class PathSettings:
    """The ``paths`` group."""

    runs_dir: str = key("of <task>/<recipe or model>/<compressor>-<budget>/seed<k>/run.json", what="a directory")
    run_dir: str | None = key("the record's own directory; null: one in paths.runs_dir", what="a directory")
    scenes_dir: str | None = key("the generated benchmark's data; null: the project's own cache", what="a directory")
    video_root: str | None = key("the video benchmarks, see data_manifests/video_qa.json", what="a directory")
    features_dir: str | None = key(
        "what data.cache_features keeps; null: the project's own cache", what="a directory", default=None
    )


@dataclass(frozen=True, kw_only=True)
class CachedSettings:
    """What every ``data`` with images has."""

    cache_features: bool = key(
        "keep what the frozen vision tower and the compressor make of each image in paths.features_dir, for the next"
        " epoch and the next run; changes no more than the last bits",
        default=False,
    )


@dataclass(frozen=True, kw_only=True)
class LlavaJsonSettings(CachedSettings):
    """The ``data`` group for a file in LLaVA's format."""

    json: str = key("conversations with their images", what="a file in LLaVA's format, as data.json=FILE")
    image_root: str | None = key("null: the file's own", what="the folder that the file's image paths start from")
    fraction: float | str = key(
        "share of the samples, by a hash of each one and data.subset_seed: any order and any machine choose the same",
        rule=Rule(
            "a number above 0 and at most 1, as 0.1 or 1/10",
            lambda v: isinstance(v, int | float | str) and not isinstance(v, bool),
        ),
    )
    subset_seed: int = key("seed of data.fraction")
    keep_text_only: bool = key("whether samples without an image count (they cannot change the projector)")
    on_problem: Literal["refuse", "skip"] = key("at missing images, broken records; skip says how many there were")


@dataclass(frozen=True, kw_only=True)
class ScenesSettings(CachedSettings):
    """The ``data`` group for generated images."""

    num_images: int = key("number of generated images", at_least=1)
    num_questions: int = key("questions an image at most; one pass of the vision tower serves them all", at_least=1)


TOP: Mapping[str, Key] = keys_of(RunSettings)
NAME = {"name": Key(text("the option's name"), "the file's own")}
GROUPS: Mapping[str, Mapping[str, Key]] = {
    "model": NAME | keys_of(ModelSettings),
    "budget": NAME | keys_of(BudgetSettings),
    "data": NAME,
    "train": NAME,
    "eval": NAME | keys_of(EvalSettings),
    "launcher": NAME | keys_of(LaunchSettings),
    "paths": keys_of(PathSettings),
}


def _kind(name: str, settings: type) -> Mapping[str, Key]:
    return NAME | {"kind": Key(one_of(name), "of the option's settings")} | keys_of(settings)


# Groups whose options are of different kinds, with keys of their own; an option without a kind has a name only.
KINDS: Mapping[str, Mapping[str, Mapping[str, Key]]] = {
    "data": {"llava_json": _kind("llava_json", LlavaJsonSettings), "scenes": _kind("scenes", ScenesSettings)},
    "budget": {
        "counted": _kind("counted", CountedBudgetSettings),
        "fraction": _kind("fraction", FractionBudgetSettings),
    },
    "train": {"tune": _kind("tune", TrainSettings)},
}


def keys_for(group: str, values: Mapping[str, Any]) -> Mapping[str, Key]:
    """The keys of a group's values: those of their kind, where the group's options are of several.

    In ``launcher=auto`` a null stands for what train.py chooses.
    """
    if group == "launcher" and values.get("name") == AUTO:
        return {name: replace(own, rule=optional(own.rule)) for name, own in GROUPS[group].items()}
    return KINDS.get(group, {}).get(str(values.get("kind")), GROUPS[group])


def keys_in(group: str) -> Mapping[str, Key]:
    """All keys that options of a group have, whatever their kind."""
    found = dict(GROUPS.get(group, {}))
    for keys in KINDS.get(group, {}).values():
        found |= keys
    return found


def known_keys() -> list[str]:
    """Every dotted key of the schema; the open groups' own keys are not among them."""
    return [*TOP, *(name for group in GROUPS for name in _dotted(group, keys_in(group)))]


def _dotted(prefix: str, keys: Mapping[str, Key]) -> list[str]:
    names = []
    for name, own in keys.items():
        names += [f"{prefix}.{name}", *_dotted(f"{prefix}.{name}", own.nested)]
    return names
