"""Many methods and budgets over the scenes benchmark, with one pass of the vision tower for all of them.

Answers are those of `eval.py` setting by setting (a test holds the two against each other); what is saved is the work
that every setting shares: reading the image, preprocessing it and running the tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vzip.bench.settings import BUDGETS
from vzip.compressors.base import Compressor, TokenBudget
from vzip.compressors.controls import Identity, RandomTokens, UniformTokens
from vzip.compressors.visionzip import VisionZip
from vzip.demo.benchmark import load_rows
from vzip.demo.questions import TASKS
from vzip.demo.scoring import METRICS, Result, normalise
from vzip.models.splice import plan_splice, splice
from vzip.models.towers.cache import TowerCache
from vzip.models.vlm import CompressedVlm
from vzip.progress import Progress
from vzip.results.stats import retention_interval

MAX_NEW_TOKENS = 8
CACHE_GIB = 1.0
PICTURE_BUDGETS = ("192tok", "128tok", "64tok", "32tok")  # the others are for the frames of a video


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    method: str
    num_tokens: int
    compressor: Compressor


def settings(num_patches: int, seed: int = 0) -> list[Setting]:
    """Vanilla, then VisionZip and the controls at each budget."""
    rows = [Setting("vanilla", num_patches, Identity())]
    for name in PICTURE_BUDGETS:
        budget = TokenBudget(*BUDGETS[name])
        rows.append(Setting("VisionZip", budget.num_tokens, VisionZip(budget)))
        rows.append(Setting("random", budget.num_tokens, RandomTokens(budget, seed)))
        rows.append(Setting("uniform", budget.num_tokens, UniformTokens(budget)))
    return rows


def by_picture(folder: Path) -> dict[str, list[tuple[str, int, dict]]]:
    """All questions of each image: (task, position within the task, row)."""
    grouped: dict[str, list[tuple[str, int, dict]]] = {}
    for task in TASKS:
        for position, row in enumerate(load_rows(folder, task)):
            grouped.setdefault(row["image"], []).append((task, position, row))
    return grouped


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
    """
    pictures = list(by_picture(folder).items())[:limit]
    template: Any = vlm.processor
    found: dict[Setting, dict[str, list[tuple[int, Result]]]] = {s: {task: [] for task in TASKS} for s in rows}
    with Progress(f"answering under {len(rows)} settings", "images", len(pictures)) as progress:
        for batch in batches(pictures, batch_size):
            opened = [Image.open(folder / name).convert("RGB") for name, _ in batch]
            pixels = vlm.preprocess_images(opened)["pixel_values"]
            vlm.adapter.tower_cache = TowerCache(CACHE_GIB)  # of this batch: the next one shows other images
            asked = [(index, item) for index, (_, items) in enumerate(batch) for item in items]
            texts = [
                template.apply_chat_template(
                    [
                        {
                            "role": "user",
                            "content": [{"type": "image"}, {"type": "text", "text": item[2]["question"]}],
                        }
                    ],
                    add_generation_prompt=True,
                )
                for _, item in asked
            ]
            encoded = template.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
            for setting in rows:
                vlm.compressor = setting.compressor
                images = vlm.encode_images(pixels)
                if any(len(image) != setting.num_tokens for image in images):
                    raise RuntimeError(f"{setting} produced {[len(image) for image in images]} visual tokens")
                for (_, (task, position, row)), said in zip(asked, answers(vlm, encoded, images, asked), strict=True):
                    result = Result(answer=row["answer"], said=normalise(said), pair=row["pair"])
                    found[setting][task].append((position, result))
            progress.advance(len(batch))
    vlm.adapter.tower_cache = None
    return {s: {t: [r for _, r in sorted(v, key=lambda p: p[0])] for t, v in d.items()} for s, d in found.items()}


def answers(vlm: CompressedVlm, encoded: Any, images: list[torch.Tensor], asked: Sequence) -> list[str]:
    """Greedy answers to prompts whose images are already visual tokens."""
    per_prompt = [images[index] for index, _ in asked]
    token = vlm.adapter.image_token_id
    lengths = [vlm.adapter.geometry.num_patches] * len(per_prompt)
    plan = plan_splice(encoded.input_ids, encoded.attention_mask, token, lengths, padding_side="left")
    prepared = splice(plan, encoded.input_ids, vlm.adapter.embed_tokens, per_prompt, token)
    new = vlm.model.generate(
        inputs_embeds=prepared.inputs_embeds,
        attention_mask=prepared.attention_mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    processor: Any = vlm.processor
    return processor.tokenizer.batch_decode(new, skip_special_tokens=True)


@dataclass(frozen=True)
class Score:
    """A setting's scores in percent by task, their mean, and retention of vanilla in percent with its 95 % interval."""

    tasks: dict[str, float]
    average: float
    retention: float
    low: float
    high: float


def units(task: str, results: Sequence[Result]) -> np.ndarray:
    """What the bootstrap draws: for F1 [n, 2] (hits, said + true), for MME one value a pair, else one a question."""
    if task == "existence":
        return np.array(
            [(r["said"] == r["answer"] == "yes", (r["said"] == "yes") + (r["answer"] == "yes")) for r in results], float
        )
    right = np.array([r["said"] == r["answer"] for r in results], float)
    if task != "counting":
        return right
    pairs: dict[str, list[float]] = {}
    for r, hit in zip(results, right, strict=True):
        pairs.setdefault(r["pair"], []).append(hit)
    return np.array([(np.mean(twins) + all(twins)) / 2 for twins in pairs.values()])


def f1_of_units(rows: np.ndarray) -> float:
    return 2 * rows[:, 0].sum() / max(1.0, rows[:, 1].sum())


def score(results: dict[str, list[Result]], vanilla: dict[str, list[Result]]) -> Score:
    """Scores a setting against vanilla on the same questions; retention is the mean of the tasks' ratios."""
    tasks = {task: METRICS[task](rows) for task, rows in results.items()}
    paired = {task: (units(task, rows), units(task, vanilla[task])) for task, rows in results.items()}
    point, low, high = retention_interval(paired, {"existence": f1_of_units})
    return Score(tasks, sum(tasks.values()) / len(tasks), 100 * point, 100 * low, 100 * high)
