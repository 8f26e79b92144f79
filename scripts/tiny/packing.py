"""Many questions about one image in one sequence, each blind to the others.

The image's 576 visual tokens dominate a sequence, so asking eight questions costs little more than asking one. Every
question block attends to the common prefix and to itself alone, and its positions start where the prefix ends: to the
model each block is the single-question prompt that the benchmark will use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from scripts.tiny.model import IMAGE_TOKEN, prompt
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vzip.demo.questions import Question


@dataclass
class PackedBatch:
    """B sequences of T tokens, of which the first P (with V visual ones from `image_start`) are common to all.

    input_ids, position_ids [B, T]; attention_mask [B, 1, T, T], True where a query may look; answer_index [A, 2] the
    (row, column) of every position that predicts an answer token; answer_ids [A] those tokens; question_of [A] which
    question each belongs to, counted over the batch; questions: those questions.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    image_start: int
    num_visual_tokens: int
    answer_index: Tensor
    answer_ids: Tensor
    question_of: Tensor
    questions: list[Question]

    def to(self, device: torch.device) -> PackedBatch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


class Packer:
    """Tokenizes questions once and packs them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        ids = tokenizer(prompt("?")).input_ids
        self.prefix = ids[: ids.index(self.image_id)]
        self.cache: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def block(self, question: Question) -> tuple[list[int], list[int]]:
        key = (question.text, question.answer)
        if key not in self.cache:
            asked = self.tokenizer(prompt(question.text)).input_ids
            whole = self.tokenizer(f"{prompt(question.text)} {question.answer}</s>").input_ids
            assert whole[: len(asked)] == asked, "the answer's tokens must not merge with the prompt's"
            self.cache[key] = (asked[len(self.prefix) + 1 :], whole[len(asked) :])
        return self.cache[key]

    def pack(self, asked: list[list[Question]], num_visual_tokens: int) -> PackedBatch:
        start = len(self.prefix) + num_visual_tokens
        rows, positions, blocks, index, targets, owner = [], [], [], [], [], []
        questions: list[Question] = []
        for row, row_questions in enumerate(asked):
            ids = self.prefix + [self.image_id] * num_visual_tokens
            position, block = list(range(start)), [0] * start
            for number, question in enumerate(row_questions, 1):
                question_ids, answer_ids = self.block(question)
                first = len(ids) + len(question_ids) - 1  # the last prompt token predicts the first answer token
                index += [(row, first + i) for i in range(len(answer_ids))]
                targets += answer_ids
                owner += [len(questions)] * len(answer_ids)
                questions.append(question)
                ids = ids + question_ids + answer_ids
                position += range(start, start + len(question_ids) + len(answer_ids))
                block += [number] * (len(question_ids) + len(answer_ids))
            rows.append(ids)
            positions.append(position)
            blocks.append(block)
        length = -(-max(map(len, rows)) // 16) * 16
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([r + [pad] * (length - len(r)) for r in rows])
        position_ids = torch.tensor([p + [0] * (length - len(p)) for p in positions])
        block_ids = torch.tensor([b + [-1] * (length - len(b)) for b in blocks])
        same = block_ids[:, :, None] == block_ids[:, None, :]
        visible = (same | (block_ids[:, None, :] == 0)) & torch.ones(length, length, dtype=torch.bool).tril()
        return PackedBatch(
            input_ids,
            position_ids,
            visible[:, None],
            len(self.prefix),
            num_visual_tokens,
            torch.tensor(index),
            torch.tensor(targets),
            torch.tensor(owner),
            questions,
        )
