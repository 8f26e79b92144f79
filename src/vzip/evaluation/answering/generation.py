"""Generation settings: what a task or a user may ask for, normalised to what ``generate`` is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vzip.errors import ConfigError, nearest

# LLaVA's own scripts generate at most this many tokens where they say nothing; several lmms-eval tasks say nothing.
DEFAULT_MAX_NEW_TOKENS = 128

FORWARDED = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "length_penalty",
)
_SAMPLING_ONLY = ("temperature", "top_p", "top_k")
# Written into lmms-eval's task files for its own LLaVA wrapper. Here `model.preprocess` decides how images are
# treated; it holds for all tasks of a run and stands in the record.
_ABOUT_OTHER_WRAPPERS = ("image_aspect_ratio",)


@dataclass(frozen=True)
class GenerationSettings:
    """Hashable, so that requests can be grouped by it.

    Attributes:
        until: the answer ends before the first occurrence of any of these.
        kwargs: sorted (name, value) pairs for ``generate``.
    """

    until: tuple[str, ...]
    kwargs: tuple[tuple[str, Any], ...]


def check_overrides(gen_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """A user's ``gen_kwargs`` without its null entries (null: what the task says).

    Raises:
        ConfigError: a name that is not a generation setting.
    """
    given = {key: value for key, value in (gen_kwargs or {}).items() if value is not None}
    allowed = (*FORWARDED, "until")
    for key in given:
        if key not in allowed:
            raise ConfigError(
                f"gen_kwargs.{key}={given[key]!r}: no such generation setting{nearest(key, allowed)};"
                f" allowed are {', '.join(allowed)}. Change eval.gen_kwargs."
            )
    return given


def settings_for(task: str, of_task: Mapping[str, Any], overrides: Mapping[str, Any]) -> GenerationSettings:
    """Merges a task's generation settings with the user's (which win).

    Greedy unless the task or the user asks for sampling, by ``do_sample`` or by a temperature above 0; sampling-only
    settings are dropped where nothing is sampled, as they have no effect then.

    Raises:
        ConfigError: the task file has a setting this adapter does not know.
    """
    merged = {key: value for key, value in of_task.items() if value is not None and key not in _ABOUT_OTHER_WRAPPERS}
    if "max_gen_toks" in merged:  # lm-evaluation-harness's older name
        merged.setdefault("max_new_tokens", merged.pop("max_gen_toks"))
    merged.update(overrides)
    unknown = [key for key in merged if key not in (*FORWARDED, "until")]
    if unknown:
        raise ConfigError(
            f"task {task}: generation_kwargs.{unknown[0]}={merged[unknown[0]]!r} is not known here"
            f"{nearest(unknown[0], FORWARDED)}; allowed are {', '.join(FORWARDED)}, until. Change the task's file."
        )
    until = merged.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(str(item) for item in until)

    merged.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    temperature = merged.get("temperature")
    sample = bool(merged.get("do_sample", temperature is not None and temperature > 0))
    sample = sample and temperature != 0  # a temperature of 0 is greedy, whatever do_sample says
    merged["do_sample"] = sample
    if not sample:
        for key in _SAMPLING_ONLY:
            merged.pop(key, None)
    return GenerationSettings(tuple(text for text in until if text), tuple(sorted(merged.items())))


def cut_at(text: str, until: tuple[str, ...]) -> str:
    """``text`` up to the first occurrence of any of ``until``, without surrounding blanks."""
    ends = [position for stop in until if (position := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()
