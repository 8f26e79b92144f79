"""Figure 8: a longer video at equal cost: as many visual tokens for few whole frames or for many compressed ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from vzip.compressors.base import Compressor
from vzip.models.vlm import CompressedVlm
from vzip.results.stats import mean_interval

from .drawing import Drawing

REPEATS = 3  # of the time to the first token, after one that is not counted
MAX_SHOWN = 9  # frames of an arm that are drawn
MIB = 2**20


@dataclass(frozen=True)
class Arm:
    """A way to spend the visual tokens: so many frames of a video under a method."""

    name: str
    compressor: Compressor
    num_frames: int


@dataclass(frozen=True)
class Clip:
    """A question about a video.

    Attributes:
        name: of the file, or whatever tells it from others.
        inputs: what the model reads for the frames at these numbers, and how the question is put.
        num_available: frames that the video has.
        sample: numbers of the frames that so many are.
        frames: as images, for the drawing.
        question, answer: the answer is None where it is not known.
    """

    name: str
    inputs: Callable[[CompressedVlm, int], dict[str, Any]]
    num_available: int
    sample: Callable[[int], Sequence[int]]
    frames: Callable[[Sequence[int]], Sequence[Image.Image]]
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Cost:
    """What an arm takes, measured on one video.

    Attributes:
        num_visual_tokens: that entered the language model.
        kv_cache_bytes: of the cache after the prompt.
        first_token_ms: median time from pixel values to the first token, preprocessing left out.
    """

    num_visual_tokens: int
    kv_cache_bytes: int
    first_token_ms: float


@dataclass(frozen=True)
class Asked:
    """One video under one arm."""

    arm: str
    num_frames: int
    video: str
    question: str
    reference: str | None
    answer: str
    num_visual_tokens: int


@torch.inference_mode()
def ask(vlm: CompressedVlm, arm: Arm, clip: Clip, max_new_tokens: int) -> Asked:
    """The greedy answer of an arm."""
    vlm.compressor = arm.compressor
    inputs = clip.inputs(vlm, arm.num_frames)
    new = vlm.generate(**inputs, questions=[clip.question], max_new_tokens=max_new_tokens, do_sample=False)
    tokenizer = vlm.processor.tokenizer  # type: ignore[union-attr]
    answer = tokenizer.decode(new[0], skip_special_tokens=True).strip()
    num_tokens = sum(vlm.last_num_visual_tokens)
    return Asked(arm.name, arm.num_frames, clip.name, clip.question, clip.answer, answer, num_tokens)


@torch.inference_mode()
def measure(vlm: CompressedVlm, arm: Arm, clip: Clip, repeats: int = REPEATS) -> Cost:
    """What the prompt of an arm takes."""
    vlm.compressor = arm.compressor
    inputs = clip.inputs(vlm, arm.num_frames)
    times, cache = [], None
    for _ in range(repeats + 1):
        started = time.perf_counter()
        made = vlm.generate(
            **inputs, questions=[clip.question], max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        )
        made.sequences.tolist()  # waits for the device
        times.append(1000 * (time.perf_counter() - started))
        cache = made.past_key_values
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # type: ignore[union-attr]
    return Cost(sum(vlm.last_num_visual_tokens), num_bytes, statistics.median(times[1:]))


def is_right(one: Asked) -> bool:
    """But for case and a full stop."""
    return one.answer.strip(" .").lower() == str(one.reference).strip(" .").lower()


def share_right(asked: Sequence[Asked], arm: str) -> tuple[float, float, float]:
    """Percent of an arm's answers that are right, and the ends of its 95 % interval (bootstrap over videos)."""
    values = np.array([100.0 * is_right(one) for one in asked if one.arm == arm])
    low, high = mean_interval(values) if len(values) > 1 else (values[0], values[0])
    return float(values.mean()), float(low), float(high)


def draw(
    arms: Sequence[Arm], clip: Clip, asked: Sequence[Asked], costs: Sequence[Cost], model: str, note: str
) -> Drawing:
    """A row of frames an arm, at their place in the video, with its answer; below what each costs.

    Args:
        arms: in order; the first is the model without compression.
        clip: the video that is drawn, one of those asked about.
        asked: of every arm, the drawn video's first.
        costs: of every arm, on the drawn video.
        model: by name.
        note: what the videos are, for the caption.
    """
    from matplotlib.figure import Figure  # slow to import; only figures need it

    known = all(one.reference is not None for one in asked)
    num_videos = len({one.video for one in asked})
    figure = Figure(figsize=(10, 1.55 * len(arms) + 3.1), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.55 * len(arms), 2.6])  # type: ignore[misc]
    rows = above.subplots(len(arms), 1, squeeze=False)[:, 0]
    for axes, arm, cost in zip(rows, arms, costs, strict=True):
        first = next(one for one in asked if one.arm == arm.name)
        index = list(clip.sample(arm.num_frames))
        shown = [index[n] for n in sorted(set(np.linspace(0, len(index) - 1, MAX_SHOWN, dtype=int).tolist()))]
        ratio = _draw_frames(axes, clip.frames(shown), shown, index, clip.num_available)
        each = f"{cost.num_visual_tokens / arm.num_frames:g}"
        counted = f"{arm.num_frames} frame{'s' * (arm.num_frames > 1)} x {each} = {cost.num_visual_tokens} tokens"
        mark = (" (right)" if is_right(first) else " (wrong)") if first.reference is not None else ""
        said = first.answer if len(first.answer) <= 160 else f"{first.answer[:157]}..."
        axes.set_title(
            f"{arm.name}, {counted}: {said or '(no words)'}{mark}", fontsize=10, loc="left", parse_math=False, wrap=True
        )
        axes.set_box_aspect(ratio)
    rows[-1].set_xlabel(f"frame of {clip.num_available}; ticks: the frames that are seen", fontsize=9)
    above.suptitle(f"{model}: {clip.question}", parse_math=False, wrap=True)

    panels = [
        ("visual tokens", [float(cost.num_visual_tokens) for cost in costs]),
        ("key-value cache, MiB", [cost.kv_cache_bytes / MIB for cost in costs]),
        ("time to first token, ms", [cost.first_token_ms for cost in costs]),
    ]
    all_axes = below.subplots(1, len(panels) + known, squeeze=False)[0]
    names = [f"{arm.name}\n{arm.num_frames} fr." for arm in arms]
    colors = [f"C{number}" for number in range(len(arms))]
    for axes, (title, values) in zip(all_axes, panels, strict=False):
        axes.bar_label(
            axes.bar(names, values, color=colors),
            [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values],
            fontsize=8,
        )
        axes.set_title(title, fontsize=10)
    if known:
        found = [share_right(asked, arm.name) for arm in arms]
        spread = [[mean - low for mean, low, _ in found], [high - mean for mean, _, high in found]]
        axes = all_axes[-1]
        axes.bar(names, [mean for mean, *_ in found], yerr=spread, capsize=3, color=colors)
        axes.set_title(f"right, % of {num_videos} videos", fontsize=10)
        axes.set_ylim(0, 105)
    for axes in all_axes:
        axes.tick_params(axis="x", labelsize=7)
        axes.margins(y=0.15)
    lines: list[dict[str, Any]] = []
    for one in asked:
        cost = next(cost for arm, cost in zip(arms, costs, strict=True) if arm.name == one.arm)
        lines.append(vars(one) | {"kv_cache_bytes": cost.kv_cache_bytes, "first_token_ms": cost.first_token_ms})
    return Drawing(figure, lines, caption(arms, asked, costs, model, note))


def _draw_frames(
    axes: Any, images: Sequence[Image.Image], shown: Sequence[int], index: Sequence[int], num_available: int
) -> float:
    """Thumbnails at their place in the video, moved apart where they would overlap; returns height to width."""
    width = 1 / MAX_SHOWN
    ratio = max(image.height / image.width for image in images) * width
    places = [number / max(1, num_available - 1) * (1 - width) for number in shown]
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + width)
    places = [place - max(0.0, places[-1] + width - 1) for place in places]
    for place, image in zip(places, images, strict=True):
        small = image.convert("RGB")
        small.thumbnail((160, 160))
        axes.imshow(np.asarray(small), extent=(place + 0.002, place + width - 0.002, 0, 1), aspect="auto")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([(n / max(1, num_available - 1)) * (1 - width) + width / 2 for n in sorted(set(index))], [])
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    return ratio


def caption(arms: Sequence[Arm], asked: Sequence[Asked], costs: Sequence[Cost], model: str, note: str) -> str:
    """What was asked and measured, and what came of it."""
    lines = [
        f"Figure 8 of arXiv 2412.04467, measured: {model} on {note}. Every arm sees the same video and question, with"
        " frames spread evenly over it: few whole ones or many compressed ones for as many visual tokens or fewer."
        " Greedy answers. Key-value cache: after the prompt. Time to the first token: from pixel values, vision tower"
        f" included, median of {REPEATS} on the video that is drawn, decoding and preprocessing left out: the more"
        " frames, the more the vision tower has to do, which equal tokens do not make equal."
    ]
    known = all(one.reference is not None for one in asked)
    for arm, cost in zip(arms, costs, strict=True):
        text = (
            f"{arm.name}, {arm.num_frames} frame{'s' * (arm.num_frames > 1)}: {cost.num_visual_tokens} visual tokens,"
            f" {cost.kv_cache_bytes / MIB:.2f} MiB, {cost.first_token_ms:.0f} ms"
        )
        if known:
            mean, low, high = share_right(asked, arm.name)
            text += f"; right {mean:.1f} % [{low:.1f}, {high:.1f}]"
        else:
            text += f": {next(one for one in asked if one.arm == arm.name).answer or '(no words)'}"
        lines.append(f"{text}.")
    return "\n".join(lines)
