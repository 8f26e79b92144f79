"""Trains the built-in model from nothing: `make tiny`, 106 minutes on two cores that others shared.

First the vision tower alone: the contrast between the CLS token and the image's caption, which of the caption's words
CLS can name, and what each patch shows. Then, with the tower frozen, the projector and the language model: the answers
to about twenty questions an image, on small images, on the benchmark's 336 pixels, and on sizes between. The
language model always sees every visual token: compression has no part in training.

Every batch follows from its step's number, and the state is saved as it goes: a killed run goes on with the same bits.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scripts.tiny.labels import caption
from scripts.tiny.model import build_model, build_processor, prompt
from scripts.tiny.objective import (
    NUM_QUESTIONS,
    Asker,
    Heads,
    answer_logits,
    cls_gathers,
    losses,
    make_batch,
    run_tower,
)
from scripts.tiny.packing import Packer
from scripts.tiny.questions import most_questions, placing_questions, training_questions
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vzip.compressors.base import check_seed
from vzip.demo.questions import (
    TASKS,
    Question,
    counting_pairs,
    existence_questions,
)
from vzip.demo.scenes import TRAIN_SEEDS, Scene, sample_scene
from vzip.models.weights.digests import check_digests, write_digests
from vzip.models.weights.tuned import atomic_directory
from vzip.progress import Progress
from vzip.results.owner import owning
from vzip.train.checkpoint import save_state, trim_metrics

VALIDATION_SEEDS = (2_500_000_000, 2_600_000_000)  # neither trained on nor in the benchmark


@dataclass(frozen=True)
class Stage:
    """`num_steps` batches with the peak learning rate of the stage.

    `batches` are the (pixels a side, images) of its batches, taken in turn. Without `answers` the language model does
    not run: the vision tower learns alone, several times faster. Without `vision` the tower is frozen, and the language
    model and the projector learn alone. `questions` draws what is asked about an image.
    """

    batches: tuple[tuple[int, int], ...]
    num_steps: int
    learning_rate: float
    vision: bool = True
    answers: bool = True
    num_questions: int = NUM_QUESTIONS
    questions: Asker = training_questions

    @property
    def largest_canvas(self) -> int:
        return max(canvas for canvas, _ in self.batches)


# The last stage mixes image sizes, so that the language model does not come to rely on 576 visual tokens most of
# which show background: compression leaves few, and most of them show something.
STAGES = (
    Stage(((112, 32),), 1000, 1.2e-3, answers=False),
    Stage(((336, 16),), 100, 8e-4, answers=False),
    Stage(((168, 16),), 900, 2e-3, vision=False, num_questions=20, questions=most_questions),
    Stage(((168, 16),), 800, 1.5e-3, vision=False, num_questions=22, questions=placing_questions),
    Stage(((336, 8),), 500, 1e-3, vision=False, num_questions=22, questions=placing_questions),
    Stage(
        ((112, 18), (168, 16), (224, 12), (336, 8)),
        1200,
        1e-3,
        vision=False,
        num_questions=22,
        questions=placing_questions,
    ),
)
STATE_NAME = "state.pt"  # in run_dir/state
WARMUP_STEPS = 100  # or a fifth of the stage, whichever is shorter


@torch.no_grad()
def validate(
    model: LlavaForConditionalGeneration, packer: Packer, stage: Stage, num_images: int = 96
) -> dict[str, float]:
    """Where the CLS token looks, and the share of questions answered right (greedily) by task, on held-out images."""

    def benchmark_questions(scene: Scene, rng: np.random.RandomState, count: int) -> list[Question]:
        closed = [q for pair in counting_pairs(scene, rng) for q in pair]
        return existence_questions(scene, rng) + closed + training_questions(scene, rng, count)

    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    shares: list[Tensor] = []
    for first in range(0, num_images, 16):
        last = min(first + 16, num_images)
        seeds = range(VALIDATION_SEEDS[0] + first, VALIDATION_SEEDS[0] + last)
        batch = make_batch(seeds, stage.largest_canvas, packer, benchmark_questions).to(model.device)
        layer_input, selected, _ = run_tower(model, batch.pixel_values)
        if stage.answers:
            hit = answer_logits(model, selected, batch.packed).argmax(-1) == batch.packed.answer_ids
            missed = set(batch.packed.question_of[~hit].tolist())
            for number, question in enumerate(batch.packed.questions):
                if question.kind != "open":
                    right[question.task].append(number not in missed)
        attention = cls_gathers(model, layer_input)[0].sum(1)
        foreground = (batch.labels > 0).float()
        top = attention.topk(53, dim=1).indices  # what VisionZip keeps beside CLS at 64 tokens
        shares.append(
            torch.stack(
                [
                    (attention * foreground).sum(1) / attention.sum(1),
                    foreground.gather(1, top).sum(1) / foreground.sum(1).clamp(min=1),
                    foreground.mean(1),
                ]
            ).mean(1)
        )
    attention_share, top_share, area = torch.stack(shares).mean(0).tolist()
    scores = {task: round(100 * sum(hits) / len(hits), 1) for task, hits in right.items() if hits}
    return {
        **scores,
        "cls_attention_on_objects": round(attention_share, 3),
        "objects_within_top53": round(top_share, 3),
        "objects_of_area": round(area, 3),
    }


def learning_rate(step: int, stages: tuple[Stage, ...]) -> tuple[float, Stage, int]:
    """Returns the rate, stage and step within the stage: linear warm-up and cosine to a twentieth in each stage."""
    for stage in stages:
        if step < stage.num_steps:
            warm = min(1.0, (step + 1) / max(1, min(WARMUP_STEPS, stage.num_steps // 5)))
            decay = 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / stage.num_steps))
            return float(stage.learning_rate * warm * decay), stage, step
        step -= stage.num_steps
    raise ValueError("step is beyond the last stage")


def tokenizer_texts(num_scenes: int = 3000) -> list[str]:
    """Dialogues and captions of training images, the tokenizer's corpus."""
    texts = []
    for index in range(num_scenes):
        scene = sample_scene(TRAIN_SEEDS[1] - 1 - index)
        texts.append(caption(scene))
        for question in training_questions(scene, np.random.RandomState(index), NUM_QUESTIONS):
            texts.append(f"{prompt(question.text)} {question.answer}")
    return texts


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Writes the checkpoint in half precision, which keeps it under 12 MB; loading restores float32."""
    half = {k: v.to(torch.float16) for k, v in model.state_dict().items()}
    with atomic_directory(out) as work:
        model.save_pretrained(work, state_dict=half)
        processor.save_pretrained(work)


def train(
    run_dir: Path,
    out: Path,
    stages: tuple[Stage, ...] = STAGES,
    seed: int = 0,
    save_every: int = 100,
    num_validation_images: int = 96,
) -> None:
    """Trains, or continues, and writes the checkpoint to `out` and the log to `run_dir/log.jsonl`."""
    with owning(run_dir):
        _train(run_dir, out, stages, seed, save_every, num_validation_images)


def _train(
    run_dir: Path, out: Path, stages: tuple[Stage, ...], seed: int, save_every: int, num_validation_images: int
) -> None:
    processor = build_processor(tokenizer_texts())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(processor, seed).to(device)
    heads = Heads(len(processor.tokenizer)).to(device)
    packer = Packer(processor.tokenizer)
    parameters = [*model.parameters(), *heads.parameters()]
    decayed, plain = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    saved, log_file, step = run_dir / "state", run_dir / "log.jsonl", 0
    if saved.exists():
        check_digests(saved, "Remove this directory to begin anew.")
        state = torch.load(saved / STATE_NAME, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        trim_metrics(log_file, step)
    total = sum(stage.num_steps for stage in stages)
    with Progress("training", "steps", total, done=step) as progress, log_file.open("a") as log:
        started, images = time.perf_counter(), 0
        sums: dict[str, float] = {}
        while step < total:
            rate, stage, stage_step = learning_rate(step, stages)
            canvas, batch_size = stage.batches[stage_step % len(stage.batches)]
            first = TRAIN_SEEDS[0] + seed * 100_000_000 + step * 64
            seeds = range(first, first + batch_size)
            batch = make_batch(seeds, canvas, packer, stage.questions, stage.num_questions).to(device)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16):
                terms = losses(model, heads, batch, processor.tokenizer, stage.vision, stage.answers)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            images += batch_size
            for name, value in {**terms, "grad_norm": norm}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            progress.advance(note=f"{canvas} px, loss {torch.stack(list(terms.values())).sum().item():.2f}")
            if step % 50 == 0 or step == total:
                count = 50 if step % 50 == 0 else step % 50
                row: dict[str, Any] = {
                    "step": step,
                    "canvas": stage.largest_canvas,
                    "learning_rate": float(f"{rate:.3g}"),
                }
                row |= {name: round(value / count, 4) for name, value in sums.items()}
                row["images_per_s"] = round(images / (time.perf_counter() - started), 1)
                if step % 200 == 0 or step == total:
                    with torch.autocast(device.type, torch.bfloat16):
                        row["validation"] = validate(model, packer, stage, num_validation_images)
                log.write(json.dumps(row) + "\n")
                log.flush()
                started, images, sums = time.perf_counter(), 0, {}
            if step % save_every == 0 or step == total:
                states = {"model": model.state_dict(), "heads": heads.state_dict()}
                with atomic_directory(saved) as work:
                    save_state({**states, "optimizer": optimizer.state_dict(), "step": step}, work / STATE_NAME)
                    write_digests(work)
    save(model, processor, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/tiny"), help="state and log; a rerun continues")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/checkpoint"), help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_seed(arguments.seed, "--seed")
    train(arguments.run_dir, arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
