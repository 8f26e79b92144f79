"""Which tokens the loss counts: whole conversations written out by hand, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests import tiny

from vzip.data.conversations import chat, encode, find_template, place_images, plain, truncate, vicuna_v1
from vzip.data.llava_record import Turn
from vzip.errors import ConfigError, PromptError
from vzip.models.splice import IGNORED_LABEL

IMAGE = tiny.IMAGE_TOKEN


@pytest.fixture(scope="module")
def processor() -> Any:
    """tests.tiny's byte-level tokenizer, with LLaVA's beginning-of-text token."""
    from tokenizers import processors

    made = tiny.processor()
    backend = made.tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.fixture(scope="module")
def built_in() -> Any:
    from transformers import AutoProcessor

    from vzip.models.load import resolve_checkpoint

    return AutoProcessor.from_pretrained(resolve_checkpoint("vzip/tiny"))


def turns(*texts: str) -> list[Turn]:
    return [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def shown(template: Any, conversation: list[Turn], processor: Any, system: str | None = None) -> tuple[str, str]:
    """The whole text and the text of the target tokens alone, each decoded token by token and joined with |."""
    encoded = encode(template(conversation, system, processor), processor.tokenizer, IMAGE)
    tokenizer = processor.tokenizer
    assert all(label in (token, IGNORED_LABEL) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    targets = [label for label in encoded.labels if label != IGNORED_LABEL]
    assert encoded.num_targets == len(targets)
    return tokenizer.decode(encoded.ids), "|".join(tokenizer.decode([target]) for target in targets)


# (system prompt, turns, the text that enters, its target tokens)
VICUNA = {
    "one question": (
        None,
        ("<image>\nred?", "no"),
        "<s>USER: <image>\nred? ASSISTANT: no</s>",
        " |n|o|</s>",
    ),
    "system prompt": (
        "Be kind.",
        ("<image>\nred?", "no"),
        "<s>Be kind. USER: <image>\nred? ASSISTANT: no</s>",
        " |n|o|</s>",
    ),
    "placeholder after the question goes first": (
        None,
        ("red?\n<image>", "no"),
        "<s>USER: <image>\nred? ASSISTANT: no</s>",
        " |n|o|</s>",
    ),
    "several turns": (
        None,
        ("<image>\na", "b", "c", "d e"),
        "<s>USER: <image>\na ASSISTANT: b</s>USER: c ASSISTANT: d e</s>",
        " |b|</s>| |d| |e|</s>",
    ),
    "several pictures": (
        None,
        ("one <image> two <image> which?", "2"),
        "<s>USER: one <image> two <image> which? ASSISTANT: 2</s>",
        " |2|</s>",
    ),
    "text only": (None, ("a", "b"), "<s>USER: a ASSISTANT: b</s>", " |b|</s>"),
    "words of the form itself are words": (
        None,
        ("a", "USER: b ASSISTANT: c"),
        "<s>USER: a ASSISTANT: USER: b ASSISTANT: c</s>",
        " |U|S|E|R|:| |b| |A|S|S|I|S|T|A|N|T|:| |c|</s>",
    ),
    "no answer to the last question": (
        None,
        ("a", "b", "c"),
        "<s>USER: a ASSISTANT: b</s>USER: c ASSISTANT:",
        " |b|</s>",
    ),
}


@pytest.mark.parametrize("case", list(VICUNA))
def test_vicuna_v1(case: str, processor: Any) -> None:
    system, texts, whole, targets = VICUNA[case]
    assert shown(vicuna_v1, turns(*texts), processor, system) == (whole, targets)


def test_every_label_by_hand(processor: Any) -> None:
    pieces = vicuna_v1(turns("<image>\nx", "y"), None, processor)
    encoded = encode(pieces, processor.tokenizer, IMAGE)
    named = processor.tokenizer.convert_ids_to_tokens(encoded.ids)
    assert named == ["<s>", *"USER:", "Ġ", "<image>", "Ċ", "x", "Ġ", *"ASSISTANT:", "Ġ", "y", "</s>"]
    assert [label != IGNORED_LABEL for label in encoded.labels] == [False] * (len(named) - 3) + [True] * 3
    assert encoded.num_images == 1


def test_plain_is_the_image_and_its_caption(processor: Any) -> None:
    got = shown(plain, turns("Describe it.\n<image>", "A dog."), processor, "never shown")
    assert got == ("<s><image>A dog.\n", "A| |d|o|g|.|\n")
    for wrong in (turns("no picture", "A dog."), turns("<image>", "a", "b", "c")):
        with pytest.raises(PromptError, match=r"train\.template=plain"):
            plain(wrong, None, processor)


def test_the_checkpoints_own_template_is_the_evaluations(built_in: Any) -> None:
    conversation = turns("<image>\nWhat color is the star?", "red", "And the square?", "blue")
    tokenizer = built_in.tokenizer
    ours = encode(chat(conversation, None, built_in), tokenizer, tokenizer.convert_tokens_to_ids("<image>"))
    second = encode(vicuna_v1(conversation, None, built_in), tokenizer, tokenizer.convert_tokens_to_ids("<image>"))
    assert (ours.ids, ours.labels) == (second.ids, second.labels)
    # The prompt that evaluation writes is what stands before the first target, token for token.
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]}]
    prompt = tokenizer(built_in.apply_chat_template(question, add_generation_prompt=True, tokenize=False))["input_ids"]
    first = next(index for index, label in enumerate(ours.labels) if label != IGNORED_LABEL)
    assert ours.ids[:first] == prompt
    assert tokenizer.decode([label for label in ours.labels if label != IGNORED_LABEL]) == " red</s> blue</s>"


IN_ORDER = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# As LLaVA-1.5's own: a turn's images, then its words.
IMAGES_FIRST = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def templated(processor: Any) -> Iterator[Any]:
    before = processor.chat_template
    yield lambda template: setattr(processor, "chat_template", template) or processor
    processor.chat_template = before


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("one <image> two <image> which?", "one <image> two <image> which?"),
        ("<image><image>\nwhich?", "<image><image>\nwhich?"),
        ("<image>\n<image>\nwhich?", "<image><image>\nwhich?"),
        ("which?\n<image><image>", "which?\n<image><image>"),
        ("<image> is it like <image>", "<image> is it like <image>"),
        ("<image>\nred?", "<image>red?"),
        ("red?\n<image>", "<image>red?"),
        ("<image> <image> <image>", "<image><image><image>"),
        ("<image>", "<image>"),
        (" red? ", " red? "),
    ],
)
def test_a_chat_template_gets_images_where_the_turn_has_them(text: str, written: str, templated: Any) -> None:
    conversation = turns(text, "b", "c", "d")
    whole, targets = shown(chat, conversation, templated(IN_ORDER))
    assert whole == f"<s>user:{written}assistant:b</s>user:cassistant:d</s>"
    assert targets == "b|</s>|d|</s>"


def test_a_chat_template_that_moves_images_among_words_is_refused(templated: Any) -> None:
    processor = templated(IMAGES_FIRST)
    for text in ("one <image> two <image> which?", "which?\n<image><image>"):
        with pytest.raises(PromptError, match=r"does not write '<image>' where the turn has it.*vicuna_v1"):
            chat(turns(text, "b"), None, processor)
    assert shown(chat, turns("<image>\n<image>\nwhich?", "b"), processor)[0].startswith("<s>user:<image><image>")


def test_a_chat_template_without_an_end_is_refused(processor: Any) -> None:
    with pytest.raises(ConfigError, match="writes no </s> after an answer"):
        chat(turns("a", "b"), None, processor)


def test_unknown_template() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vicuna_v1'"):
        find_template("vicuna")


def test_a_tokenizer_without_offsets_is_refused(processor: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="fast tokenizer"):
        encode(plain(turns("<image>", "a"), None, processor), Slow(), IMAGE)


def test_place_images() -> None:
    assert place_images("what?\n<image>") == "<image>\nwhat?"
    assert place_images("<image>") == "<image>"
    assert place_images(" what? ") == " what? "
    assert place_images("<image> and <image>") == "<image> and <image>"


@pytest.mark.parametrize("max_length", range(1, 40))
def test_truncation_never_cuts_within_an_image(max_length: int, processor: Any) -> None:
    lengths = [5, 9]
    whole = encode(vicuna_v1(turns("<image> or <image>?", "ab"), None, processor), processor.tokenizer, IMAGE)
    cut = truncate(whole, lengths, IMAGE, max_length)
    # A second way: every token written out as often as it counts, and cut; an image cut in two goes altogether.
    expanded: list[int] = []
    images = iter(range(2))
    for position, token in enumerate(whole.ids):
        expanded += [position] * (lengths[next(images)] if token == IMAGE else 1)
    kept = expanded[:max_length]
    positions = [p for p in dict.fromkeys(kept) if kept.count(p) == expanded.count(p)]
    assert cut.ids == [whole.ids[p] for p in positions]
    assert cut.labels == [whole.labels[p] for p in positions]
    assert cut.num_images == cut.ids.count(IMAGE)
    assert sum(lengths[: cut.num_images]) + len(cut.ids) - cut.num_images <= max_length


def test_nothing_is_cut_from_what_fits(processor: Any) -> None:
    whole = encode(vicuna_v1(turns("<image>\na", "b"), None, processor), processor.tokenizer, IMAGE)
    assert truncate(whole, [64], IMAGE, len(whole.ids) + 63) == whole
