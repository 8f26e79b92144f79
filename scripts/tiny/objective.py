"""What the built-in model is trained to do: answer, match its caption, name what it sees, say what each patch shows.

CLS is to name what the image shows twice: from its last state, and from nothing but what it gathers from the patches
in the select layer. Without the second, CLS may do its looking in earlier layers, and the attention that VisionZip
reads leaves things out (measured on the first weights shipped: a third of the object patches outside the top 54).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scripts.tiny.labels import NUM_PATCH_LABELS, caption, patch_labels, sign_label, thing_label
from scripts.tiny.model import WIDTH
from scripts.tiny.packing import PackedBatch, Packer
from scripts.tiny.questions import training_questions
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from vzip.demo.questions import Question
from vzip.demo.render import CHARACTERS, render
from vzip.demo.scenes import Scene, sample_scene
from vzip.ops.attention import split_heads

NUM_QUESTIONS = 8
Asker = Callable[[Scene, np.random.RandomState, int], list[Question]]
PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


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
        self.gathered = nn.Linear(WIDTH, NUM_PATCH_LABELS)
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

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor | PackedBatch)}
        return replace(self, **moved)


def to_pixels(scenes: list[Scene]) -> Tensor:
    """[B, 3, canvas, canvas], normalised as CLIP's processor does."""
    raw = np.stack([np.asarray(render(scene)) for scene in scenes])
    return (torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD


def make_batch(
    seeds: Sequence[int],
    canvas: int,
    packer: Packer,
    questions: Asker = training_questions,
    num_questions: int = NUM_QUESTIONS,
) -> Batch:
    scenes = [sample_scene(seed, canvas) for seed in seeds]
    shown = [patch_labels(scene) for scene in scenes]
    named = torch.zeros(len(scenes), NUM_PATCH_LABELS)
    for row, scene in enumerate(scenes):
        named[row, [thing_label(t) for t in scene.things]] = 1
        if scene.sign:
            named[row, sign_label(scene.sign)] = 1
    asked = [questions(s, np.random.RandomState(s.seed ^ 0xA5C), num_questions) for s in scenes]
    return Batch(
        to_pixels(scenes),
        torch.from_numpy(np.stack([s[0].ravel() for s in shown])),
        torch.from_numpy(np.stack([s[1].ravel() for s in shown])),
        named,
        [caption(scene) for scene in scenes],
        packer.pack(asked, (canvas // 14) ** 2),
    )


def run_tower(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the input and the output of the select layer, and the last CLS state, [B, 1 + patches, d] and [B, d]."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixel_values).permute(0, 2, 3, 1)
    rows, full = patches.shape[1], embeddings.image_size // embeddings.patch_size
    first = (full - rows) // 2
    # A small image takes the middle of the position grid: its patches are as far apart as in a large one, and its
    # middle lines are the same, so what is learned of neighbours and of "left" holds when the images grow.
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


def answer_loss(model: LlavaForConditionalGeneration, selected: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy over the answers' tokens."""
    return F.cross_entropy(answer_logits(model, selected, batch.packed), batch.packed.answer_ids)


def losses(
    model: LlavaForConditionalGeneration,
    heads: Heads,
    batch: Batch,
    tokenizer: Any,
    vision: bool = True,
    answers: bool = True,
) -> dict[str, Tensor]:
    """All loss terms, weighted: the vision tower's, which is frozen without `vision`, and that of the answers."""
    if not vision:
        with torch.no_grad():
            selected = run_tower(model, batch.pixel_values)[1]
        return {"answers": answer_loss(model, selected, batch)}
    layer_input, selected, last_cls = run_tower(model, batch.pixel_values)
    captions = tokenizer(batch.captions, padding=True, return_tensors="pt").to(batch.labels.device)
    text = heads.caption_vectors(captions.input_ids, captions.attention_mask.bool())
    image = F.normalize(heads.image_out(last_cls).float(), dim=-1)
    similarity = image @ text.T * heads.log_temperature.clamp(max=4.6).exp()
    target = torch.arange(len(image), device=image.device)
    contrast = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    gathered = cls_gathers(model, layer_input)[1]
    name = partial(F.binary_cross_entropy_with_logits, target=batch.named, reduction="none")
    named, from_patches = name(heads.named(last_cls).float()), name(heads.gathered(gathered).float())
    patches = heads.patch_norm(selected[:, 1:])
    weight = torch.ones(NUM_PATCH_LABELS, device=image.device)
    weight[0] = 0.1  # nine patches of ten show only background
    shows = F.cross_entropy(heads.shows(patches).float().flatten(0, 1), batch.labels.flatten(), weight=weight)
    letter_weight = torch.ones(1 + len(CHARACTERS), device=image.device)
    letter_weight[0] = 0.05
    letters = heads.letter(patches).float().flatten(0, 1)
    letter = F.cross_entropy(letters, batch.characters.flatten(), weight=letter_weight)
    terms = {}
    if answers:
        terms["answers"] = answer_loss(model, selected, batch)
    return terms | {
        "contrast": 0.25 * contrast,
        "named": 0.1 * named.sum(1).mean(),
        "gathered": 0.1 * from_patches.sum(1).mean(),
        "shows": 0.3 * shows,
        "letter": 0.3 * letter,
    }


def cls_gathers(model: LlavaForConditionalGeneration, layer_input: Tensor) -> tuple[Tensor, Tensor]:
    """CLS attention to the patches in the select layer and what it brings: [B, heads, patches] and [B, d].

    CLS's attention to itself takes its share of the softmax and brings nothing.
    """
    layer = model.model.vision_tower.encoder.layers[-2]
    normed = layer.layer_norm1(layer_input)
    split = partial(split_heads, num_heads=layer.self_attn.num_heads)
    query, key = split(layer.self_attn.q_proj(normed[:, :1])), split(layer.self_attn.k_proj(normed))
    attention = torch.softmax(query.float() @ key.float().mT * layer.self_attn.scale, dim=-1)[..., 1:]
    value = split(layer.self_attn.v_proj(normed[:, 1:]))
    gathered = layer.self_attn.out_proj((attention.to(value.dtype) @ value).transpose(1, 2).flatten(2))
    return attention[:, :, 0], gathered[:, 0]
