"""Trains the built-in model from nothing: `make tiny`, about an hour and a half on two cores.

One objective throughout, on generated pictures: the answers to about eight questions a picture, the contrast between the
CLS token and the picture's caption, which caption words CLS can name, and what each patch shows. Half the edge length
first, the benchmark's 336 pixels last. The language model always sees every visual token: compression has no part here.

Every batch follows from its step's number, and the state is saved as it goes: a killed run continues with the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from vzip.demo.packing import PackedBatch, Packer
from vzip.demo.render import CHARACTERS, NUM_PATCH_LABELS, patch_labels, render, sign_label, thing_label
from vzip.demo.scenes import (
    TASKS,
    TRAIN_SEEDS,
    Scene,
    counting_pairs,
    existence_questions,
    sample_scene,
    training_questions,
)
from vzip.demo.tiny_model import WIDTH, build_model, build_processor, prompt

NUM_QUESTIONS = 8
VALIDATION_SEEDS = (2_500_000_000, 2_600_000_000)  # neither trained on nor in the benchmark
PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass(frozen=True)
class Stage:
    """`num_steps` batches of `batch_size` pictures of `canvas` pixels a side; the peak learning rate of the stage.

    Without `answers` the language model does not run: the vision tower learns alone, several times faster.
    """

    canvas: int
    batch_size: int
    num_steps: int
    learning_rate: float
    answers: bool = True


STAGES = (Stage(112, 32, 1000, 1.2e-3, answers=False), Stage(168, 16, 1100, 1e-3), Stage(336, 8, 800, 7e-4))
WARMUP_STEPS = 100


class Heads(nn.Module):
    """What training needs besides the model, and the model does without afterwards."""

    def __init__(self, vocabulary: int, layers: int = 2):
        super().__init__()
        self.words = nn.Embedding(vocabulary, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.text_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.image_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.named = nn.Linear(WIDTH, NUM_PATCH_LABELS)
        self.shows = nn.Linear(WIDTH, NUM_PATCH_LABELS)
        self.letter = nn.Linear(WIDTH, 1 + len(CHARACTERS))
        self.patch_norm = nn.LayerNorm(WIDTH)
        self.log_temperature = nn.Parameter(torch.tensor(2.0))
        nn.init.normal_(self.words.weight, std=0.05)

    def caption_vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.text(self.words(ids), src_key_padding_mask=~mask)
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.text_out(pooled).float(), dim=-1)


@dataclass
class Batch:
    pixel_values: Tensor
    labels: Tensor  # [B, patches]
    characters: Tensor  # [B, patches]
    named: Tensor  # [B, NUM_PATCH_LABELS], 1 for what the scene holds
    captions: list[str]
    packed: PackedBatch


def to_pixels(scenes: list[Scene]) -> Tensor:
    """[B, 3, canvas, canvas], normalised as CLIP's processor does."""
    raw = np.stack([np.asarray(render(scene)) for scene in scenes])
    return (torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD


def make_batch(seeds: range | list[int], canvas: int, packer: Packer, questions=training_questions) -> Batch:
    scenes = [sample_scene(seed, canvas) for seed in seeds]
    shown = [patch_labels(scene) for scene in scenes]
    named = torch.zeros(len(scenes), NUM_PATCH_LABELS)
    for row, scene in enumerate(scenes):
        named[row, [thing_label(t) for t in scene.things]] = 1
        if scene.sign:
            named[row, sign_label(scene.sign)] = 1
    asked = [questions(s, np.random.RandomState(s.seed ^ 0xA5C), NUM_QUESTIONS) for s in scenes]
    return Batch(
        to_pixels(scenes),
        torch.from_numpy(np.stack([s[0].ravel() for s in shown])),
        torch.from_numpy(np.stack([s[1].ravel() for s in shown])),
        named,
        [scene.caption() for scene in scenes],
        packer.pack(asked, (canvas // 14) ** 2),
    )


def run_tower(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the input and the output of the select layer, and the last CLS state, [B, 1 + patches, d] and [B, d]."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixel_values).permute(0, 2, 3, 1)
    rows, full = patches.shape[1], embeddings.image_size // embeddings.patch_size
    first = (full - rows) // 2
    # A small picture takes the middle of the position grid: its patches are as far apart as in a large one, and its
    # middle lines are the same, so what is learned of neighbours and of "left" holds when the pictures grow.
    positions = embeddings.position_embedding.weight
    window = positions[1:].view(full, full, -1)[first : first + rows, first : first + rows]
    cls = (embeddings.class_embedding + positions[0]).expand(len(patches), 1, -1)
    hidden = torch.cat([cls, (patches + window).flatten(1, 2)], dim=1)
    states = [tower.pre_layrnorm(hidden)]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], attention_mask=None))
    return states[-3], states[-2], tower.post_layernorm(states[-1][:, 0])


def answer_logits(model: LlavaForConditionalGeneration, features: Tensor, packed: PackedBatch) -> Tensor:
    """Runs the language model on all visual tokens and the packed questions; logits at the answers [A, vocabulary]."""
    visual = model.model.multi_modal_projector(features[:, 1:])
    embeds = model.get_input_embeddings()(packed.input_ids)
    start, stop = packed.image_start, packed.image_start + packed.num_visual_tokens
    embeds = torch.cat([embeds[:, :start].to(visual.dtype), visual, embeds[:, stop:].to(visual.dtype)], dim=1)
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=packed.attention_mask, position_ids=packed.position_ids, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[packed.answer_index[:, 0], packed.answer_index[:, 1]]).float()


def losses(
    model: LlavaForConditionalGeneration, heads: Heads, batch: Batch, tokenizer, answers: bool = True
) -> dict[str, Tensor]:
    """All loss terms, already weighted; the language model runs only for `answers`."""
    _, selected, last_cls = run_tower(model, batch.pixel_values)
    captions = tokenizer(batch.captions, padding=True, return_tensors="pt")
    text = heads.caption_vectors(captions.input_ids, captions.attention_mask.bool())
    image = F.normalize(heads.image_out(last_cls).float(), dim=-1)
    similarity = image @ text.T * heads.log_temperature.clamp(max=4.6).exp()
    target = torch.arange(len(image))
    contrast = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    named = F.binary_cross_entropy_with_logits(heads.named(last_cls).float(), batch.named, reduction="none")
    patches = heads.patch_norm(selected[:, 1:])
    weight = torch.ones(NUM_PATCH_LABELS)
    weight[0] = 0.1  # nine patches of ten show only background
    shows = F.cross_entropy(heads.shows(patches).float().flatten(0, 1), batch.labels.flatten(), weight=weight)
    letter_weight = torch.ones(1 + len(CHARACTERS))
    letter_weight[0] = 0.05
    letters = heads.letter(patches).float().flatten(0, 1)
    letter = F.cross_entropy(letters, batch.characters.flatten(), weight=letter_weight)
    terms = {}
    if answers:
        terms["answers"] = F.cross_entropy(answer_logits(model, selected, batch.packed), batch.packed.answer_ids)
    return terms | {
        "contrast": 0.25 * contrast,
        "named": 0.1 * named.sum(1).mean(),
        "shows": 0.3 * shows,
        "letter": 0.3 * letter,
    }


def cls_attention(model: LlavaForConditionalGeneration, layer_input: Tensor) -> Tensor:
    """CLS attention of the select layer summed over heads [B, patches], for the log."""
    layer = model.model.vision_tower.encoder.layers[-2]
    normed = layer.layer_norm1(layer_input)
    heads = layer.self_attn.num_heads

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2).float()

    query, key = split(layer.self_attn.q_proj(normed[:, :1])), split(layer.self_attn.k_proj(normed))
    return torch.softmax(query @ key.mT * layer.self_attn.scale, dim=-1)[:, :, 0, 1:].sum(1)


@torch.no_grad()
def validate(model, packer: Packer, canvas: int, num_pictures: int = 96) -> dict[str, float]:
    """Share of questions answered right (greedily) by task, and where the CLS token looks, on held-out pictures."""

    def benchmark_questions(scene, rng, count):
        closed = [q for pair in counting_pairs(scene, rng) for q in pair]
        return existence_questions(scene, rng) + closed + training_questions(scene, rng, count)

    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    shares: list[Tensor] = []
    for first in range(0, num_pictures, 16):
        last = min(first + 16, num_pictures)
        seeds = range(VALIDATION_SEEDS[0] + first, VALIDATION_SEEDS[0] + last)
        batch = make_batch(seeds, canvas, packer, benchmark_questions)
        layer_input, selected, _ = run_tower(model, batch.pixel_values)
        hit = answer_logits(model, selected, batch.packed).argmax(-1) == batch.packed.answer_ids
        missed = set(batch.packed.question_of[~hit].tolist())
        for number, question in enumerate(batch.packed.questions):
            if question.kind != "open":
                right[question.task].append(number not in missed)
        attention = cls_attention(model, layer_input)
        foreground = (batch.labels > 0).float()
        top = attention.topk(26, dim=1).indices
        shares.append(
            torch.stack(
                [(attention * foreground).sum(1) / attention.sum(1), foreground.gather(1, top).mean(1), foreground.mean(1)]
            ).mean(1)
        )
    attention_share, top_share, area = torch.stack(shares).mean(0).tolist()
    scores = {task: round(100 * sum(hits) / len(hits), 1) for task, hits in right.items()}
    return {
        **scores,
        "cls_attention_on_objects": round(attention_share, 3),
        "objects_among_top26": round(top_share, 3),
        "objects_of_area": round(area, 3),
    }


def learning_rate(step: int, stages: tuple[Stage, ...]) -> tuple[float, Stage, int]:
    """Returns the rate, stage and step within the stage: linear warm-up and cosine to a twentieth in each stage."""
    for stage in stages:
        if step < stage.num_steps:
            warm = min(1.0, (step + 1) / WARMUP_STEPS)
            decay = 0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / stage.num_steps))
            return float(stage.learning_rate * warm * decay), stage, step
        step -= stage.num_steps
    raise ValueError("step is beyond the last stage")


def tokenizer_texts(num_scenes: int = 3000) -> list[str]:
    """Dialogues and captions of training pictures, the tokenizer's corpus."""
    texts = []
    for index in range(num_scenes):
        scene = sample_scene(TRAIN_SEEDS[1] - 1 - index)
        texts.append(scene.caption())
        for question in training_questions(scene, np.random.RandomState(index), NUM_QUESTIONS):
            texts.append(f"{prompt(question.text)} {question.answer}")
    return texts


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Writes the checkpoint in half precision, which keeps it under 12 MB; loading restores float32."""
    out.mkdir(parents=True, exist_ok=True)
    half = {k: v.to(torch.float16) for k, v in model.state_dict().items()}
    model.save_pretrained(out, state_dict=half)
    processor.save_pretrained(out)


def train(
    run_dir: Path,
    out: Path,
    stages: tuple[Stage, ...] = STAGES,
    seed: int = 0,
    save_every: int = 100,
    num_validation_pictures: int = 96,
) -> None:
    """Trains, or continues, and writes the checkpoint to `out` and the log to `run_dir/log.jsonl`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    processor = build_processor(tokenizer_texts())
    model = build_model(processor, seed)
    heads = Heads(len(processor.tokenizer))
    packer = Packer(processor.tokenizer)
    parameters = [*model.parameters(), *heads.parameters()]
    decayed, plain = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    state_file, log_file, step = run_dir / "state.pt", run_dir / "log.jsonl", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        kept = [line for line in log_file.read_text().splitlines() if json.loads(line)["step"] <= step]
        log_file.write_text("".join(line + "\n" for line in kept))
    total = sum(stage.num_steps for stage in stages)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, log_file.open("a") as log:
        bar = progress.add_task("training", total=total, completed=step)
        started, pictures, sums = time.perf_counter(), 0, {}
        while step < total:
            rate, stage, _ = learning_rate(step, stages)
            first = TRAIN_SEEDS[0] + seed * 100_000_000 + step * 64
            batch = make_batch(range(first, first + stage.batch_size), stage.canvas, packer)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                terms = losses(model, heads, batch, processor.tokenizer, stage.answers)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            pictures += stage.batch_size
            for name, value in {**terms, "grad_norm": norm}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            progress.update(bar, completed=step, description=f"{stage.canvas} px, loss {sum(terms.values()).item():.2f}")
            if step % 50 == 0 or step == total:
                count = 50 if step % 50 == 0 else step % 50
                row = {"step": step, "canvas": stage.canvas, "learning_rate": float(f"{rate:.3g}")}
                row |= {name: round(value / count, 4) for name, value in sums.items()}
                row["pictures_per_s"] = round(pictures / (time.perf_counter() - started), 1)
                if step % 200 == 0 or step == total:
                    with torch.autocast("cpu", torch.bfloat16):
                        row["validation"] = validate(model, packer, stage.canvas, num_validation_pictures)
                log.write(json.dumps(row) + "\n")
                log.flush()
                started, pictures, sums = time.perf_counter(), 0, {}
            if step % save_every == 0 or step == total:
                states = {"model": model.state_dict(), "heads": heads.state_dict()}
                torch.save({**states, "optimizer": optimizer.state_dict(), "step": step}, state_file.with_suffix(".new"))
                os.replace(state_file.with_suffix(".new"), state_file)
    save(model, processor, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/tiny"), help="state and log; a rerun continues")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny/checkpoint"), help="where the checkpoint goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.run_dir, arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
