"""One way to tokenize: a first token written once, none behind, at every door that a prompt comes through."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tests import tiny
from tokenizers.processors import TemplateProcessing

import vzip
from vzip.cli import ask
from vzip.data.conversations import chat, encode
from vzip.data.llava_record import Turn
from vzip.evaluation.answering.generation import GenerationSettings
from vzip.evaluation.answering.questions import Preparer, Question
from vzip.models.tokens import tokenize

# As Llama 3's: the template writes the first token, and the tokenizer would add another.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
WRITTEN = "<s>user:<image>red?assistant:"
PICTURE = Image.new("RGB", (8, 8))


def wrapped(form: str, template: str = TEMPLATE) -> vzip.CompressedVlm:
    """A LLaVA whose tokenizer puts special tokens around a text as ``form`` says."""
    processor = tiny.processor()
    processor.chat_template = template
    specials = [("<s>", 1), ("</s>", 2)]
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=specials)
    return vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.Identity(), processor)


def by_hand(vlm: vzip.CompressedVlm) -> str:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]
    processor: Any = vlm.processor
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return decoded(vlm, vlm.build_inputs([text], [[PICTURE]])["input_ids"][0])


def by_ask(vlm: vzip.CompressedVlm) -> str:
    return decoded(vlm, ask.build_inputs(vlm, "red?", [PICTURE], [])["input_ids"][0])


def by_evaluation(vlm: vzip.CompressedVlm) -> str:
    content = [{"type": "image", "url": PICTURE}, {"type": "text", "text": "red?"}]
    request: Any = SimpleNamespace(args=("", lambda _row: [{"role": "user", "content": content}], {}, 0, "t", "s"))
    question = Question(("t", 0, 0), GenerationSettings((), ()), "red?", request)
    (((chunk,), _),) = Preparer(vlm, {"t": {"s": [None]}}, None).prepare([[question]], 1).batches
    assert chunk.prompts is not None
    return decoded(vlm, chunk.prompts["input_ids"][0])


def by_chat(vlm: vzip.CompressedVlm) -> str:
    session = vlm.chat()
    session.ask("red?", [PICTURE], max_new_tokens=1)
    shown = [vlm.adapter.image_token_id if i <= -2 else i for i in session._cached_ids]
    return decoded(vlm, shown).replace("<image>" * 64, "<image>")


def by_training(vlm: vzip.CompressedVlm) -> str:
    processor: Any = vlm.processor
    pieces = chat([Turn("user", "<image>\nred?"), Turn("assistant", "no")], None, processor)
    encoded = encode(pieces, processor.tokenizer, vlm.adapter.image_token_id)
    assert decoded(vlm, [label for label in encoded.labels if label >= 0]) == "no</s>"
    assert decoded(vlm, encoded.ids).endswith("no</s>")
    return decoded(vlm, encoded.ids).partition("no</s>")[0]


def decoded(vlm: vzip.CompressedVlm, ids: Any) -> str:
    processor: Any = vlm.processor
    return processor.tokenizer.decode(ids)


DOORS = [by_hand, by_ask, by_evaluation, by_chat, by_training]


@pytest.mark.parametrize("form", ["<s> $A", "$A", "<s> $A </s>"])
@pytest.mark.parametrize("door", DOORS)
def test_a_template_that_writes_the_first_token_gets_no_second(door: Callable[..., str], form: str) -> None:
    assert door(wrapped(form)) == WRITTEN


@pytest.mark.parametrize(("form", "first"), [("<s> $A", "<s>"), ("$A", ""), ("<s> $A </s>", "<s>"), ("$A </s>", "")])
@pytest.mark.parametrize("door", DOORS)
def test_one_that_does_not_gets_the_tokenizers_and_no_end(door: Callable[..., str], form: str, first: str) -> None:
    vlm = wrapped(form, TEMPLATE.removeprefix("{{ bos_token }}"))
    assert door(vlm) == first + WRITTEN.removeprefix("<s>")


def test_blanks_before_the_first_token_and_characters_of_each() -> None:
    processor: Any = wrapped("<s> $A </s>").processor
    assert processor.tokenizer.decode(tokenize(processor.tokenizer, "\n<s>a")[0]) == "\n<s>a"
    ids, spans = tokenize(processor.tokenizer, "ab", with_spans=True)
    assert (len(ids), spans) == (3, [(0, 0), (0, 1), (1, 2)])
