"""Figure 7: two turns about one image. Which methods still answer the second question when the first came before?

A method that reads the text chooses tokens by the question that comes with the image, and in the next turn has no
others; one that does not read it has the same tokens for every question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from vzip.compressors.base import Compressor
from vzip.models.vlm import CompressedVlm
from vzip.pruners.base import Pruner
from vzip.results.stats import mean_interval

from .drawing import Drawing

VANILLA = "vanilla"
TURNS = ("alone", "second")  # asked alone, or after another question
TURN_LABELS = ("asked alone", "asked after another question")


@dataclass(frozen=True)
class Method:
    """A method by its name in the figure."""

    name: str
    compressor: Compressor
    pruner: Pruner | None


@dataclass(frozen=True)
class Dialogue:
    """Two questions about an image, and the answer to the second one where it is known."""

    name: str
    load: Callable[[], Image.Image]
    first: str
    second: str
    answer: str | None = None


@dataclass(frozen=True)
class Asked:
    """One dialogue under one method.

    Attributes:
        method, image, first, second, reference: what was asked of whom; the reference is None where it is not known.
        first_answer: to the first question.
        alone: the second question's answer in a dialogue of its own.
        after: its answer as the second turn.
        num_visual_tokens: that entered the language model.
        mean_tokens: the same on average over its layers, by the method's schedule where it has one.
    """

    method: str
    image: str
    first: str
    second: str
    reference: str | None
    first_answer: str
    alone: str
    after: str
    num_visual_tokens: int
    mean_tokens: float


@torch.inference_mode()
def ask(
    vlm: CompressedVlm,
    method: Method,
    dialogue: Dialogue,
    max_new_tokens: int,
    system_prompt: str | None = None,
) -> Asked:
    """Holds both dialogues; the key-value cache is kept between turns, as a person's dialogue does."""
    vlm.compressor, vlm.pruner = method.compressor, method.pruner
    image = dialogue.load()
    chat = vlm.chat(system_prompt)
    alone = chat.ask(dialogue.second, [image], max_new_tokens=max_new_tokens)
    chat.reset()
    first = chat.ask(dialogue.first, [image], max_new_tokens=max_new_tokens)
    after = chat.ask(dialogue.second, max_new_tokens=max_new_tokens)
    num_tokens = sum(visual.num_visual_tokens for visual in chat.visuals)
    num_layers = vlm.model.config.get_text_config().num_hidden_layers
    layers = method.pruner.schedule(num_tokens, num_layers) if method.pruner is not None else None
    mean = sum(layers) / num_layers if layers is not None else float(num_tokens)
    asked = (dialogue.first, dialogue.second, dialogue.answer)
    return Asked(method.name, dialogue.name, *asked, first, alone, after, num_tokens, mean)


def shares(asked: Sequence[Asked], method: str, of_truth: bool) -> dict[str, np.ndarray]:
    """For each turn of the second question, by dialogue, 1 where the answer is right: the reference's, or vanilla's."""
    own = [one for one in asked if one.method == method]
    base = [one for one in asked if one.method == VANILLA]
    found = {}
    for turn, said in zip(TURNS, ("alone", "after"), strict=True):
        pairs = [
            (getattr(one, said), one.reference if of_truth else getattr(other, said))
            for one, other in zip(own, base, strict=True)
        ]
        found[turn] = np.array([float(_plain(a) == _plain(str(b))) for a, b in pairs])
    return found


def _plain(answer: str) -> str:
    return answer.strip().strip(".").strip().lower()


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean, over dialogues; of one dialogue the value itself."""
    return mean_interval(values) if len(values) > 1 else (float(values.mean()), float(values.mean()))


def draw(asked: Sequence[Asked], model: str) -> Drawing:
    """Two bars a method: the second question alone, and after another one."""
    from matplotlib.figure import Figure  # slow to import; only figures need it

    methods = list(dict.fromkeys(one.method for one in asked))
    truths = [True, False] if all(one.reference is not None for one in asked) else [False]
    figure = Figure(figsize=(1 + 1.35 * len(methods) * len(truths), 4), layout="constrained")
    labels = {method: f"{method}\n{_mean_tokens(asked, method):.0f} tokens" for method in methods}
    for axes, of_truth in zip(figure.subplots(1, len(truths), squeeze=False)[0], truths, strict=True):
        shown = methods if of_truth else [method for method in methods if method != VANILLA]
        for turn_number, (turn, label) in enumerate(zip(TURNS, TURN_LABELS, strict=True)):
            for place, method in enumerate(shown):
                values = shares(asked, method, of_truth)[turn]
                low, high = interval(values)
                mean = float(values.mean())
                spread = [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]
                look = {"color": f"C{turn_number}", "capsize": 3, "width": 0.38, "label": label if place == 0 else None}
                axes.bar(place + 0.4 * (turn_number - 0.5), 100 * mean, yerr=spread, **look)
        axes.set_xticks(range(len(shown)), [labels[method] for method in shown], fontsize=9)
        axes.set_ylim(0, 105)
        axes.set_ylabel("answers that are right, %" if of_truth else "answers that are vanilla's, %")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
    num = len({(one.image, one.first, one.second) for one in asked})
    figure.suptitle(f"{model}: the second question about an image, {num} dialogue{'s' * (num != 1)}", parse_math=False)
    return Drawing(figure, [vars(one) for one in asked], caption(asked, model))


def _mean_tokens(asked: Sequence[Asked], method: str) -> float:
    return float(np.mean([one.mean_tokens for one in asked if one.method == method]))


def caption(asked: Sequence[Asked], model: str) -> str:
    """What was measured, with the difference that another question before makes."""
    methods = list(dict.fromkeys(one.method for one in asked))
    of_truth = all(one.reference is not None for one in asked)
    num = len({(one.image, one.first, one.second) for one in asked})
    text = (
        f"Figure 7 of arXiv 2412.04467, counted: {num} dialogue{'s' * (num != 1)} of two questions about one image each"
        f" with {model}."
        " The second question is asked alone, and as the second turn, with the key-value cache of the first; a method"
        " inside the language model has chosen by the first question then. Greedy answers; compared but for case and a"
        " full stop. Bars: 95 %, bootstrap over dialogues. Tokens: those of an image in the language model, on average"
        " over its layers by the method's schedule."
    )
    lines = [text]
    for truth in [True, False] if of_truth else [False]:
        for method in methods:
            if not truth and method == VANILLA:
                continue
            found = shares(asked, method, truth)
            change = found["second"] - found["alone"]
            low, high = interval(change)
            kind = "right" if truth else "as vanilla in the same place"
            lines.append(
                f"{method}: {kind} {100 * found['alone'].mean():.1f} % alone, {100 * found['second'].mean():.1f} %"
                f" second; difference {100 * change.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points."
            )
    return "\n".join(lines)
