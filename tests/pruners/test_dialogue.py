"""Dialogues with a pruner: each turn against plain loops over the whole dialogue, which know no cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tests import tiny
from tests.pruners.methods import PRUNERS, PlainLoops

import vzip
from vzip.errors import ConfigError
from vzip.models.chat.session import ChatSession

K, KEEP = 2, 3
BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


def picture(seed: int) -> Image.Image:
    values = torch.randint(0, 256, (60, 90, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


TURNS = [
    ("What is it?", [picture(0)]),
    ("And that?", []),
    ("What changed?", [picture(1), picture(2)]),
    ("Which is it?", []),
]


def session(
    pruner: Any, template: str = tiny.CHAT_TEMPLATE
) -> tuple[vzip.CompressedVlm, ChatSession, list[torch.Tensor]]:
    """A dialogue, and the logits of each forward in it."""
    processor = tiny.processor()
    processor.chat_template = template
    model = tiny.llava(vocab_size=320, num_text_layers=4)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor, pruner=pruner)
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: logits.append(output[0, -1]))
    return vlm, vlm.chat(), logits


def by_plain_loops(vlm: vzip.CompressedVlm, chat: ChatSession, new: list[int], plain: PlainLoops) -> torch.Tensor:
    """Logits of a turn's new tokens; ``plain`` remembers what went on of earlier turns' images."""
    ids = chat._layout.lay_out(chat.messages[:-1], chat.visuals)
    owner = [*chat._layout.visual_index(ids)[0].tolist(), *[-1] * (len(new) - 1)]
    embeds = chat._layout.embed([*ids, *new[:-1]], chat.visuals, vlm.adapter.embed_tokens)[0]
    return plain.logits(embeds, owner, len(ids))


@pytest.mark.parametrize("pruner", PRUNERS, ids=str)
def test_every_turn_equals_plain_loops_over_the_dialogue(pruner):
    vlm, chat, logits = session(pruner)
    plain = PlainLoops(vlm, pruner)
    for question, pictures in TURNS:
        logits.clear()
        chat.ask(question, pictures, max_new_tokens=6)
        got = torch.stack(logits)
        expected = by_plain_loops(vlm, chat, got.argmax(dim=-1).tolist(), plain)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        lengths = [layer.get_seq_length() for layer in chat._cache.layers]
        dropped = {layer: plain.num_tokens - len(names) for layer, names in plain.after.items()}
        assert {layer: lengths[0] - lengths[layer] for layer in dropped} == dropped and max(dropped.values()) > 0
    assert len(plain.chosen) == 3 * len(pruner.cuts)


@pytest.mark.parametrize("later", [None, vzip.FastV(1, 2), vzip.PyramidDrop([1, 3], [4, 2])], ids=str)
def test_what_was_dropped_stays_dropped_whatever_follows(later):
    """A turn of text after the pruner was taken away or replaced goes on from the pruned cache, as if it were there."""
    answers = []
    for pruner in (vzip.FastV(K, KEEP), later):
        vlm, chat, logits = session(vzip.FastV(K, KEEP))
        chat.ask(*TURNS[0], max_new_tokens=4)
        vlm.pruner = pruner
        logits.clear()
        chat.ask("And that?", max_new_tokens=4)
        answers.append(torch.stack(logits))
    torch.testing.assert_close(*answers, atol=1e-5, rtol=0)


def test_a_pruner_that_comes_later_prunes_what_comes_with_it():
    vlm, chat, _ = session(None)
    chat.ask(*TURNS[0], max_new_tokens=4)
    vlm.pruner = vzip.PyramidDrop([1, 3], [4, 2])
    chat.ask("What changed?", [picture(1)], max_new_tokens=4)
    lengths = [layer.get_seq_length() for layer in chat._cache.layers]
    assert [lengths[0] - length for length in lengths] == [0, 5, 5, 7]


def test_a_turn_that_fails_leaves_the_dialogue_as_it_was():
    for where in (1, 3, 6):  # forwards: in the prompt, while decoding, in the next layers
        vlm, chat, logits = session(vzip.FastV(K, KEEP))
        untouched = session(vzip.FastV(K, KEEP))
        for one in (chat, untouched[1]):
            one.ask(*TURNS[0], max_new_tokens=4)
        calls = 0

        def fail(*_: Any, where: int = where) -> None:
            nonlocal calls
            calls += 1
            if calls == where:
                raise MemoryError("no room")

        handle = vlm.model.get_submodule("model.language_model.layers")[3].mlp.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            chat.ask("What changed?", [picture(1)], max_new_tokens=8)
        handle.remove()
        logits.clear()
        untouched[2].clear()
        for one in (chat, untouched[1]):
            one.ask("What changed?", [picture(2)], max_new_tokens=4)
        torch.testing.assert_close(torch.stack(logits), torch.stack(untouched[2]), atol=1e-5, rtol=0)


def test_a_template_that_rewrites_earlier_turns_prunes_anew():
    """Nothing of the cache can be kept, so that the images are read again, now with the later question."""
    vlm, chat, logits = session(vzip.FastV(K, KEEP), "{{ messages | length }}" + tiny.CHAT_TEMPLATE)
    chat.ask(*TURNS[0], max_new_tokens=4)
    logits.clear()
    chat.ask("And that?", max_new_tokens=4)
    got = torch.stack(logits)
    expected = by_plain_loops(vlm, chat, got.argmax(dim=-1).tolist(), PlainLoops(vlm, vlm.pruner))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_repacked_positions_go_on_where_the_cache_ends():
    """All that is dropped leaves no gap: the next turn's ids are its tokens' places in the cache of each layer."""
    vlm, chat, _ = session(vzip.PyramidDrop([1, 3], [4, 2]))
    seen: list[torch.Tensor] = []
    rotary: Any = vlm.model.get_submodule("model.language_model.rotary_emb")
    rotary.register_forward_hook(
        lambda _m, args, kwargs, _out: seen.append([*args, *kwargs.values()][-1]), with_kwargs=True
    )
    chat.ask(*TURNS[0], max_new_tokens=2)
    seen.clear()
    chat.ask("And that?", max_new_tokens=1)
    after = [layer.get_seq_length() for layer in chat._cache.layers]
    assert len(seen) == 3 and after[0] - after[3] == 7
    assert [int(ids[0, -1]) + 1 for ids in seen] == [after[0], after[1], after[3]]


def test_generation_that_cannot_be_pruned_is_refused():
    vlm, chat, _ = session(vzip.FastV(K, KEEP))
    vlm.model.generation_config.prefill_chunk_size = 4
    with pytest.raises(ConfigError, match="prefill_chunk_size=4"):
        chat.ask(*TURNS[0])
    assert chat.messages == []
