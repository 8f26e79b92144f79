"""Every key that a configuration may hold, for evaluation and training alike.

The YAML files carry the values. The groups ``compressor`` and ``pruner`` are open: their keys are the arguments of
their ``_target_``. The groups ``train`` and ``launcher`` are described by ``vzip.train.settings``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vzip.keys import (
    BOOL,
    Key,
    Rule,
    key,
    keys_of,
    mapping,
    number,
    one_of,
    optional,
    or_auto,
    subset_of,
    text,
    texts,
    whole_number,
)
from vzip.train.settings import LaunchSettings, TrainSettings

AUTO = "auto"  # of launcher
OPEN_GROUPS = ("compressor", "pruner")
_DIRECTORY = text("a directory")


@dataclass(frozen=True)
class RunSettings:
    """The keys outside of all groups."""

    recipe: str | None = key(optional(text("the name of a file in configs/exp")), "the recipe; that file sets it")
    seed: int = key(whole_number(0), "seed of every random choice")
    dry_run: bool = key(BOOL, "check everything, print what would be done, and stop before anything is loaded")
    overwrite: bool = key(BOOL, "replace the record of an earlier run in the same run directory")


@dataclass(frozen=True)
class ModelSettings:
    """The ``model`` group."""

    name_or_path: str = key(text("a hub id, a checkpoint directory or vzip/tiny"), "where the weights come from")
    revision: str | None = key(
        optional(text("a commit, tag or branch of the hub's repository")), "commit of the weights; null: the newest"
    )
    assembled_from: list[str] | None = key(
        optional(Rule("a list of vision tower and language model", lambda v: texts("").allows(v) and len(v) == 2)),
        "what scripts/assemble_llava.py makes the directory of; null: it is not made here",
    )
    dtype: str = key(one_of("auto", "float32", "bfloat16", "float16"), "dtype of the weights; auto: the checkpoint's")
    device_map: str | dict[str, Any] | None = key(
        optional(
            Rule("auto, cpu, cuda, cuda:0 ..., or a mapping of modules to devices", lambda v: isinstance(v, str | dict))
        ),
        "where the model goes; null: the CPU",
    )
    attn_implementation: str = key(one_of("sdpa", "eager", "flash_attention_2"), "attention of the language model")
    quantization: str | None = key(
        optional(one_of("8bit", "4bit")), "bits of the language model's weights, by bitsandbytes; null: not quantized"
    )
    preprocess: str = key(
        one_of("llava", "hf"),
        "llava: pad to a square (LLaVA-NeXT: the scripts' tiles), as the published scripts; hf: the checkpoint's own"
        " processor (crops; LLaVA-NeXT: other tiles on small images)",
    )
    projector: str | None = key(
        optional(text("a directory that train.py wrote, or trained: this command line's own")),
        "tuned weights in place of the checkpoint's; null: none",
    )
    adapter_path: str | None = key(
        optional(text("a directory with a PEFT checkpoint (LoRA), or a hub id")),
        "layers put on top of the model; null: none",
    )
    drop_padding: bool = key(
        BOOL, "LLaVA-NeXT: patches of mere padding are not selected; the published code selects them like others"
    )
    row_newline: bool = key(
        BOOL, "LLaVA-NeXT: the newline token after each row of patches, on top of the budget; published: none"
    )
    num_frames: int | None = key(
        optional(whole_number(1)),
        "Video-LLaVA: frames of a video, evenly spread from its first to its last; null: 8",
    )
    drop_cls: bool = key(
        BOOL, "Mini-Gemini: compress the mined patches alone; else CLS, which is not mined, is the first kept token"
    )
    num_tower_tokens: int | None = key(
        optional(whole_number(1)),
        "tokens of one tower input, CLS among them, which the budget is held against before anything is loaded; null:"
        " read from the checkpoint's own config",
    )
    system_prompt: str | None = key(optional(text("a text")), "text before each question; null: none")


# Null stands for "no budget" in budget=full.
def _tokens(minimum: int) -> Rule:
    allows = optional(whole_number(minimum)).allows
    return Rule(f"a whole number of tokens a crop, {minimum} or more (not a ratio)", allows)


@dataclass(frozen=True)
class BudgetSettings:
    """The ``budget`` group."""

    num_dominant: int | None = key(_tokens(1), "dominant tokens: kept by their scores, CLS among them")
    num_contextual: int | None = key(_tokens(0), "contextual tokens: the others merged into so many")


@dataclass(frozen=True)
class GenerationSettings:
    """``eval.gen_kwargs``: what is asked of each answer."""

    max_new_tokens: int | None = key(optional(whole_number(1)), "tokens an answer may have", default=None)
    do_sample: bool | None = key(optional(BOOL), "draw tokens instead of taking the likeliest", default=None)
    temperature: float | None = key(optional(number(0.0)), "divides the logits of drawn tokens", default=None)
    top_p: float | None = key(
        optional(number(0.0)), "share of the probability that tokens are drawn from", default=None
    )
    num_beams: int | None = key(optional(whole_number(1)), "beams of a beam search", default=None)
    until: list[str] | None = key(
        optional(texts("a list of strings at which an answer ends")), "the answer is cut off there", default=None
    )


@dataclass(frozen=True)
class EvalSettings:
    """The ``eval`` group."""

    tasks: list[str] = key(
        texts("a list of at least one task name, as eval.tasks=[pope,gqa]"), "benchmarks that are run"
    )
    limit: int | None = key(
        optional(whole_number(1)), "samples a task; null: all (a limited run is recorded as provisional)"
    )
    batch_size: int | str = key(
        or_auto(whole_number(1)),
        "questions generated together, halved when memory does not suffice; auto: as many as fit (tries 64 first, on a"
        " CPU 8)",
    )
    num_workers: int = key(whole_number(0), "threads that read images and videos ahead, in each process; 0: none")
    include_path: str | None = key(
        optional(text("a folder of lmms-eval task files, built-in or video")),
        "tasks besides lmms-eval's: one's own, the generated scenes, the video benchmarks in paths.video_root",
    )
    tower_cache_gib: float | None = key(
        optional(number(0.0)),
        "memory for outputs of the vision tower, kept between the jobs of a sweep; null: 4 in a sweep, else 0 (off)",
    )
    on_problem: str = key(
        one_of("refuse", "skip"),
        "at an image or video that cannot be read: refuse, once all else is answered; skip: leave the question out"
        " of the score",
    )
    trackers: list[str] = key(
        subset_of("wandb", empty=True),
        "what is told of the finished run: scores, retention over the runs beside it, a few answers with their images",
    )
    gen_kwargs: dict[str, Any] = key(
        mapping("a mapping"), "how answers are generated; null: what the task says", nested=GenerationSettings
    )


@dataclass(frozen=True)
class PathSettings:
    """The ``paths`` group."""

    runs_dir: str = key(
        _DIRECTORY, "where records go: <runs_dir>/<task>/<recipe or model>/<compressor>-<budget>/seed<k>"
    )
    run_dir: str | None = key(optional(_DIRECTORY), "the record's own directory; null: one in paths.runs_dir")
    scenes_dir: str | None = key(optional(_DIRECTORY), "data of the generated benchmark; null: the project's own cache")
    video_root: str | None = key(
        optional(_DIRECTORY),
        "data of the video benchmarks (eval=paper_video), fetched by hand: see data_manifests/video_qa.json",
    )


@dataclass(frozen=True)
class LlavaJsonSettings:
    """The ``data`` group for a file in LLaVA's format."""

    json: str = key(text("a file in LLaVA's format, as data.json=FILE"), "conversations, each with its image or video")
    image_root: str | None = key(
        optional(text("the folder that the file's image paths start from")),
        "where the images are; null: the file's folder",
    )
    fraction: float | str = key(
        Rule(
            "a number above 0 and at most 1, as 0.1 or 1/10",
            lambda v: isinstance(v, int | float | str) and not isinstance(v, bool),
        ),
        "share of the samples, by a hash of each one and data.subset_seed: any order and any machine choose the same",
    )
    subset_seed: int = key(whole_number(0), "seed of data.fraction")
    keep_text_only: bool = key(BOOL, "whether samples without an image count (they cannot change the projector)")
    on_problem: str = key(
        one_of("refuse", "skip"), "at missing images and broken records: refuse to start, or skip them and say how many"
    )


@dataclass(frozen=True)
class ScenesSettings:
    """The ``data`` group for generated images."""

    num_pictures: int = key(whole_number(1), "number of generated images")
    num_questions: int = key(
        whole_number(1),
        "questions an image at most, asked independently; one pass of the vision tower serves them all",
    )


TOP: Mapping[str, Key] = keys_of(RunSettings)
NAME = {"name": Key(text("the option's name"), "the file's own")}
GROUPS: Mapping[str, Mapping[str, Key]] = {
    "model": NAME | keys_of(ModelSettings),
    "budget": NAME | keys_of(BudgetSettings),
    "data": NAME,
    "train": NAME,
    "eval": NAME | keys_of(EvalSettings),
    "launcher": NAME | keys_of(LaunchSettings),
    "paths": NAME | keys_of(PathSettings),
}


def _kind(name: str, settings: type) -> Mapping[str, Key]:
    return NAME | {"kind": Key(one_of(name), "of the option's settings")} | keys_of(settings)


# Groups whose options are of different kinds, with keys of their own; an option without a kind has a name only.
KINDS: Mapping[str, Mapping[str, Mapping[str, Key]]] = {
    "data": {"llava_json": _kind("llava_json", LlavaJsonSettings), "scenes": _kind("scenes", ScenesSettings)},
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
        names += [f"{prefix}.{name}", *_dotted(f"{prefix}.{name}", own.nested or {})]
    return names
