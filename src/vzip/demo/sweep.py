"""Many methods and budgets over the scenes benchmark, with one pass of the vision tower for all of them.

Answers are those of `eval.py` setting by setting (a test holds the two against each other), and so are the units that
the bootstrap draws. `eval.py` asks through lmms-eval; this runs where only the core requirements are installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.base import Compressor
from vzip.compressors.budget import TokenBudget
from vzip.compressors.controls import Identity, RandomTokens, UniformTokens
from vzip.compressors.visionzip import VisionZip
from vzip.demo.benchmark import load_rows
from vzip.demo.questions import TASKS
from vzip.demo.scoring import METRICS, Result, normalise
from vzip.models.inputs import encode_prompts
from vzip.models.splice import plan_splice, splice
from vzip.models.towers.cache import TowerCache
from vzip.models.vlm import CompressedVlm
from vzip.progress import Progress
from vzip.results.score_units import Units, units_of
from vzip.results.stats import retention_interval
from vzip.results.token_count import TokenCountError

MAX_NEW_TOKENS = 8
CACHE_GIB = 1.0
BUDGETS = (TokenBudget(162, 30), TokenBudget(108, 20), TokenBudget(54, 10), TokenBudget(27, 5))  # as configs/budget


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    method: str
    num_tokens: int
    compressor: Compressor


def settings(num_patches: int, seed: int = 0) -> list[Setting]:
    """Vanilla, then VisionZip and the controls at each budget."""
    rows = [Setting("vanilla", num_patches, Identity())]
    for budget in BUDGETS:
        rows.append(Setting("VisionZip", budget.num_tokens, VisionZip(budget)))
        rows.append(Setting("random", budget.num_tokens, RandomTokens(budget, seed)))
        rows.append(Setting("uniform", budget.num_tokens, UniformTokens(budget)))
    return rows


def by_image(folder: Path) -> list[list[tuple[str, dict]]]:
    """For each image all its questions: (task, row)."""
    grouped: dict[str, list[tuple[str, dict]]] = {}
    for task in TASKS:
        for row in load_rows(folder, task):
            grouped.setdefault(row["image"], []).append((task, row))
    return list(grouped.values())


@torch.inference_mode()
def run_sweep(
    vlm: CompressedVlm, folder: Path, rows: Sequence[Setting], batch_size: int = 8, limit: int | None = None
) -> dict[Setting, dict[str, list[Result]]]:
    """Answers every question of the benchmark under every setting.

    Args:
        vlm: the model; its compressor is the last setting's afterwards, and its tower's outputs are not kept.
        folder: from `benchmark.prepare`.
        rows: the settings.
        batch_size: images at a time; each has about four questions.
        limit: only the first so many images.

    Returns:
        for each setting and task the results in the benchmark's order.

    Raises:
        TokenCountError: an image entered the language model with another number of tokens than the setting's.
    """
    images = by_image(folder)[:limit]
    found: dict[Setting, dict[str, list[Result]]] = {setting: {task: [] for task in TASKS} for setting in rows}
    processor: Any = vlm.processor
    with Progress(f"answering under {len(rows)} settings", "images", len(images)) as progress:
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            asked = [item for items in batch for item in items]
            texts = [processor.apply_chat_template(turns(row), add_generation_prompt=True) for _, row in asked]
            prompts = encode_prompts(processor.tokenizer, texts, [])
            shown = vlm.preprocess_images([Image.open(folder / items[0][1]["image"]) for items in batch])
            image_of = [number for number, items in enumerate(batch) for _ in items]
            vlm.adapter.tower_cache = TowerCache(CACHE_GIB)  # of this batch: the next one shows other images
            for setting in rows:
                vlm.compressor = setting.compressor
                encoded = vlm.encode_images(**shown)  # once, for all its questions
                if any(len(tokens) != setting.num_tokens for tokens in encoded):
                    raise TokenCountError(f"{setting} produced {[len(tokens) for tokens in encoded]} visual tokens")
                said = answers(vlm, prompts, [encoded[number] for number in image_of])
                for (task, row), text in zip(asked, said, strict=True):
                    found[setting][task].append(Result(answer=row["answer"], said=normalise(text), pair=row["pair"]))
            progress.advance(len(batch))
    vlm.adapter.tower_cache = None
    return found


def answers(vlm: CompressedVlm, prompts: dict[str, Tensor], images: Sequence[Tensor]) -> list[str]:
    """Greedy answers to prompts that show an image each, given as its visual tokens."""
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    plan = plan_splice(ids, mask, vlm.adapter.image_token_id, [1] * len(images), padding_side="left")
    prepared = splice(plan, ids, vlm.adapter.embed_tokens, images)
    new = vlm.model.generate(
        inputs_embeds=prepared.inputs_embeds,
        attention_mask=prepared.attention_mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    processor: Any = vlm.processor
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)


def turns(row: dict) -> list[dict[str, Any]]:
    """The conversation that asks a question about its image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}]


@dataclass(frozen=True)
class Score:
    """A setting's scores in percent by task, their mean, and retention of vanilla in percent with its 95 % interval."""

    tasks: dict[str, float]
    average: float
    retention: float
    low: float
    high: float


def units(task: str, results: Sequence[Result]) -> Units:
    """What the bootstrap draws: questions, or for MME's score pairs of them."""
    metric = METRICS[task].__name__
    found = units_of(metric, [{"doc_id": number, "scores": {metric: row}} for number, row in enumerate(results)])
    assert found is not None
    return found


def score(results: dict[str, list[Result]], vanilla: dict[str, list[Result]]) -> Score:
    """Scores a setting against vanilla on the same questions; retention is the mean of the tasks' ratios."""
    ours, base = ({task: units(task, rows) for task, rows in run.items()} for run in (results, vanilla))
    tasks = {task: METRICS[task](rows) for task, rows in results.items()}
    point, low, high = retention_interval(
        {task: (own.values, base[task].values) for task, own in ours.items()},
        {task: own.aggregate for task, own in ours.items() if own.aggregate is not None},
    )
    return Score(tasks, sum(tasks.values()) / len(tasks), 100 * point, 100 * low, 100 * high)
