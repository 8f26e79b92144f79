"""What visitors of the page do and see, without Gradio: the acts of ``Page`` on the built-in model."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts.make_random_model import FAMILIES, build
from tests.media.clips import write

import vzip
from vzip.demo.page.page import MAX_QUESTION, NO_MEDIUM, Choice, Page, View, examples, facts
from vzip.demo.page.studio import MIN_TOKENS, Answer, Medium, Studio, SupersededError, slider_step
from vzip.demo.page.visits import Visit, Visits
from vzip.methods import method_names
from vzip.option_files import split_of

HERE = Choice("visionzip", 64)


@pytest.fixture(scope="module")
def vlm() -> vzip.CompressedVlm:
    return vzip.load_vlm("vzip/tiny", dtype="float32")


@pytest.fixture(scope="module")
def page(vlm: vzip.CompressedVlm) -> Page:
    return Page(Studio(vlm, max_new_tokens=6), examples(3))


@pytest.fixture
def num_runs(vlm: vzip.CompressedVlm) -> Iterator[list[int]]:
    """One item each time the tower runs."""
    found: list[int] = []
    handle = vlm.adapter.tower.layers[0].register_forward_hook(lambda *_: found.append(1))
    yield found
    handle.remove()


def last(views: Iterator[View]) -> View:
    """What stands on the screen after all of them."""
    shown = View()
    for view in views:
        for name, value in vars(view).items():
            if value is not None:
                object.__setattr__(shown, name, value)
    return shown


def compressor(num_tokens: int) -> vzip.VisionZip:
    return vzip.VisionZip(vzip.TokenBudget(**split_of(num_tokens)))


def test_the_slider_changes_overlay_and_answer_and_never_runs_the_tower(page, num_runs) -> None:
    visit, image = Visit(), Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 60).convert("RGB")
    page.examples.append(page.examples[0].__class__(image, "What is it?"))  # nobody has looked at it yet
    first = last(page.open_example(visit, 3, HERE))
    assert len(num_runs) == 1
    last(page.ask(visit, "What color is the star?", HERE))
    overlays, told = [np.asarray(first.overlay)], []
    for count in (576, 320, 128, 16):
        view = last(page.change(visit, Choice("visionzip", count)))
        assert view.compressed_facts.startswith(f"{count} visual tokens ({100 * count / 576:.0f} %)")
        assert view.vanilla is None, "the vanilla answer stays"
        overlays.append(np.asarray(view.overlay))
        told.append(view.compressed_facts)
    last(page.change(visit, Choice("divprune", 64)))
    assert len(num_runs) == 1
    assert all(a.shape != b.shape or (a != b).any() for number, a in enumerate(overlays) for b in overlays[:number])
    last(page.click(visit, 10, 10))
    last(page.click(visit, 200, 10))
    assert len(num_runs) == 2, "once for all clicks"
    last(page.change(visit, Choice("flowcut", 64)))
    assert len(num_runs) > 2, "which acts inside of the tower"


def test_answers_are_those_of_a_dialogue_with_each_compressor_over_several_turns(page) -> None:
    visit, asked = Visit(), ["What word is written on the sign?", "Is there a star in the picture?"]
    last(page.open_example(visit, 1, HERE))
    for question in asked:
        shown = last(page.ask(visit, question, HERE))
    for side, own in (("vanilla", vzip.Identity()), ("compressed", compressor(64))):
        chat = vzip.load_vlm("vzip/tiny", dtype="float32", compressor=own).chat()
        chat.add_image(page.examples[1].image)
        expected = [(question, chat.ask(question, max_new_tokens=6)) for question in asked]
        assert getattr(shown, side) == expected
    view = last(page.change(visit, Choice("visionzip", 16)))
    assert view.compressed[0] == shown.compressed[0] and view.compressed[1][0] == asked[1]


def test_costs_are_measured(page, vlm) -> None:
    visit = Visit()
    last(page.open_example(visit, 0, HERE))
    last(page.ask(visit, "Is there a cross in the picture?", HERE))
    text, config = visit.turns[0], vlm.model.config.text_config
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for answer, count in ((text.vanilla, 576), (text.compressed, 64)):
        assert answer.num_visual_tokens == count and answer.first_token_ms > 0
        assert answer.kv_bytes % per_token == 0
    assert text.vanilla.kv_bytes - text.compressed.kv_bytes == (576 - 64) * per_token
    prompt = vlm.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text.question}]}],
        add_generation_prompt=True,
    )
    num_text = len(vlm.processor.tokenizer(prompt).input_ids) - 1  # BOS counted, the placeholder not
    assert text.compressed.kv_bytes == (64 + num_text) * per_token


def test_facts_say_how_much_less() -> None:
    vanilla = Answer("a", 576, 200.0, 4 * 2**20)
    assert facts(vanilla) == "576 visual tokens · first token after 200 ms · KV memory 4.0 MiB"
    assert facts(Answer("a", 64, 50.0, 2**19), vanilla) == (
        "64 visual tokens (11 %) · first token after 50 ms (25 %) · KV memory 512 KiB (12 %)"
    )
    assert facts(Answer()) == ""


def test_answers_come_piece_by_piece(page) -> None:
    visit = Visit()
    last(page.open_example(visit, 1, HERE))
    said = [view.vanilla[-1][1] for view in page.ask(visit, "What word is written on the sign?", HERE) if view.vanilla]
    assert said[0] == "" and said[-1] == visit.turns[0].vanilla.text != ""
    assert all(after.startswith(before) for before, after in itertools.pairwise(said))


def test_every_method_that_the_model_takes_is_offered_and_works(page) -> None:
    assert set(page.studio.methods) == set(method_names()) - {"cdpruner"}  # which needs CLIP's text model
    visit = Visit()
    last(page.open_example(visit, 0, HERE))
    for method in page.studio.methods:
        visit.turns = []
        view = last(page.change(visit, Choice(method, 64)))
        waits = f"{method} looks at the question: ask one to see what it keeps."
        assert view.status == (waits if page.studio.compressor(method, 64).reads_text else ""), method
        assert view.overlay is not None


@pytest.mark.parametrize(
    ("question", "sentence"),
    [("  ", "The question is empty: type one."), ("x" * (MAX_QUESTION + 1), "1,001 characters, and 1,000 are allowed")],
)
def test_questions_that_cannot_be_are_sentences(page, question, sentence) -> None:
    visit = Visit()
    assert last(page.ask(visit, question, HERE)).status == NO_MEDIUM
    last(page.open_example(visit, 0, HERE))
    assert sentence in last(page.ask(visit, question, HERE)).status
    assert not visit.turns


def test_what_fails_within_a_turn_leaves_the_dialogue_and_the_question(page) -> None:
    visit = Visit()
    last(page.open_example(visit, 0, HERE))
    last(page.ask(visit, "What is it?", HERE))
    shown = last(page.ask(visit, "Is <image> here?", HERE))
    assert "leave it out" in shown.status and shown.question == "Is <image> here?"
    assert [turn.question for turn in visit.turns] == ["What is it?"] and len(shown.vanilla) == 1
    shown = last(page.change(visit, Choice("visionzip", 10_000)))
    assert "10000" in shown.status and shown.compressed is None and visit.turns[0].compressed


@pytest.mark.parametrize("name", ["text.png", "clip.mp4"])
def test_a_wrong_file_is_a_sentence_without_its_place_and_is_deleted(page, tmp_path: Path, name: str) -> None:
    path, visit = tmp_path / name, Visit()
    path.write_text("no image")
    status = last(page.open_file(visit, path, HERE)).status
    assert status == f"{name}: no image that can be read, and this model takes images only. Choose another."
    assert visit.medium is None and not path.exists()


def test_an_upload_is_deleted_once_it_is_read_and_gives_what_the_image_gives(page, tmp_path: Path) -> None:
    path, visit = tmp_path / "scene.png", Visit()
    page.examples[1].image.save(path)
    shown = last(page.open_file(visit, path, HERE))
    assert not path.exists()
    other = last(page.open_example(Visit(), 1, HERE))
    assert (np.asarray(shown.overlay) == np.asarray(other.overlay)).all() and shown.seen.size == (336, 336)


def test_a_click_shows_the_attention_of_that_patch_and_a_second_one_the_image(page) -> None:
    visit = Visit()
    assert last(page.click(visit, 3, 3)).status == NO_MEDIUM
    plain = last(page.open_example(visit, 0, HERE)).seen
    view = last(page.click(visit, 14 * 7 + 5, 14 * 3 + 9))
    assert visit.patch == 3 * 24 + 7 and view.caption.startswith("Patch 4, 8 (row, column)")
    assert (np.asarray(view.seen) == np.asarray(visit.attention.drawn(3 * 24 + 7))).all()
    assert (np.asarray(last(page.click(visit, 14 * 7 + 1, 14 * 3 + 1)).seen) == np.asarray(plain)).all()


def test_an_answer_that_nobody_waits_for_ends_at_the_next_token(page) -> None:
    medium, told = page.studio.open_image(page.examples[0].image), []
    with pytest.raises(SupersededError):
        page.studio.answer(medium, [], "What is it?", compressor(64), told.append, lambda: not told)
    assert len(told) == 1


def test_a_new_wish_ends_the_last_and_both_answers_come_in_the_end(page) -> None:
    visit = Visit()
    last(page.open_example(visit, 0, HERE))
    asking = page.ask(visit, "Is there a cross in the picture?", HERE)
    next(asking)
    shown = last(page.change(visit, Choice("visionzip", 128)))  # before anything was answered
    assert shown.vanilla[0][1] and shown.compressed_facts.startswith("128 ")
    assert not [view for view in asking if view.compressed_facts or view.vanilla_facts]
    assert visit.turns[0].compressed.num_visual_tokens == 128


def test_a_file_that_is_read_slowly_does_not_take_the_place_of_what_was_opened_since(
    page, tmp_path, monkeypatch
) -> None:
    visit, path, read = Visit(), tmp_path / "scene.png", page.studio.open_file
    page.examples[1].image.save(path)

    def slowly(given: Path) -> object:
        medium = read(given)
        last(page.open_example(visit, 0, HERE))
        return medium

    monkeypatch.setattr(page.studio, "open_file", slowly)
    assert not list(page.open_file(visit, path, HERE))
    assert visit.medium.image is page.examples[0].image and not path.exists()

    def meanwhile(given: Path) -> object:  # the slider moves
        list(page.change(visit, Choice("visionzip", 128)))
        return read(given)

    monkeypatch.setattr(page.studio, "open_file", meanwhile)
    page.examples[1].image.save(path)
    shown = last(page.open_file(visit, path, HERE))
    assert shown.overlay is not None and visit.medium.image is not page.examples[0].image


def test_the_attention_of_an_image_is_not_kept_for_the_one_opened_meanwhile(page, monkeypatch) -> None:
    visit, attention = Visit(), page.studio.attention
    last(page.open_example(visit, 0, HERE))

    def slowly(medium: Medium) -> object:
        found = attention(medium)
        last(page.open_example(visit, 1, HERE))
        return found

    monkeypatch.setattr(page.studio, "attention", slowly)
    assert not list(page.click(visit, 3, 3))
    assert visit.attention is None and visit.patch is None


def test_visitors_at_once_have_each_their_own_answers(page) -> None:
    alone, visits = [], [Visit() for _ in range(3)]
    for number in range(3):
        last(page.open_example(visit := Visit(), number, HERE))
        alone.append(last(page.ask(visit, "What word is written on the sign?", HERE)).compressed)
    together: dict[int, object] = {}

    def come(number: int) -> None:
        last(page.open_example(visits[number], number, HERE))
        together[number] = last(page.ask(visits[number], "What word is written on the sign?", HERE)).compressed

    threads = [threading.Thread(target=come, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(3)] == alone
    assert len({str(said) for said in alone}) == 3


def test_a_question_asked_before_the_last_is_answered_keeps_the_last(page) -> None:
    first, second = "Is there a cross in the picture?", "What word is written on the sign?"
    visit, alone = Visit(), Visit()
    for each in (visit, alone):
        last(page.open_example(each, 1, HERE))
    asking = page.ask(visit, first, HERE)
    while not next(asking).vanilla_facts:
        pass
    assert visit.turns[0].compressed is None
    shown = last(page.ask(visit, second, HERE))
    assert not list(asking)
    last(page.ask(alone, first, HERE))
    expected = last(page.ask(alone, second, HERE))
    assert [question for question, _ in shown.compressed] == [first, second]
    assert (shown.vanilla, shown.compressed) == (expected.vanilla, expected.compressed)


def test_the_same_question_pressed_twice_is_one_turn(page) -> None:
    visit = Visit()
    last(page.open_example(visit, 0, HERE))
    next(page.ask(visit, "What is it?", HERE))
    last(page.ask(visit, "What is it?", HERE))
    assert len(visit.turns) == 1
    last(page.ask(visit, "What is it?", HERE))
    assert len(visit.turns) == 2, "once it was answered it may be asked again"


def test_what_fails_after_another_question_was_asked_leaves_that_alone(page, monkeypatch) -> None:
    visit, answer = Visit(), page.studio.answer
    last(page.open_example(visit, 0, HERE))

    def fail(*args: object, **kwargs: object) -> Answer:
        visit.begin()  # another act, which asks
        visit.ask("And now?")
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(page.studio, "answer", fail)
    assert last(page.ask(visit, "What is it?", HERE)).status == ""
    assert [turn.question for turn in visit.turns] == ["What is it?", "And now?"]
    monkeypatch.setattr(page.studio, "answer", answer)


@pytest.mark.parametrize(
    ("most", "chosen", "step"), [(576, 64, 16), (729, 64, 1), (196, 64, 12), (576, 50, 2), (16, 16, 16)]
)
def test_the_slider_reaches_every_token_and_what_was_asked_for(most: int, chosen: int, step: int) -> None:
    assert slider_step(most, chosen) == step
    assert {most, chosen} <= set(range(MIN_TOKENS, most + 1, step))


def test_visits_are_bounded_and_end() -> None:
    visits = Visits(most=2)
    first, second = visits.of("a"), visits.of("b")
    waits = first.begin()
    assert visits.of("a") is first
    visits.of("c")
    assert len(visits) == 2 and visits.of("a") is first and visits.of("b") is not second
    visits.end("a")
    assert not waits() and visits.of("a") is not first


def test_memory_that_does_not_suffice_is_a_sentence(page, monkeypatch) -> None:
    visit = Visit()
    last(page.open_example(visit, 0, HERE))

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sentence = "The device's memory does not suffice"
    with monkeypatch.context() as broken:
        broken.setattr(page.studio, "answer", fail)
        shown = last(page.ask(visit, "What is it?", HERE))
    assert shown.status.startswith(sentence) and shown.question == "What is it?" and not visit.turns
    answered = last(page.ask(visit, "What is it?", HERE))
    with monkeypatch.context() as broken:
        broken.setattr(page.studio, "answer", fail)
        shown = last(page.change(visit, Choice("visionzip", 128)))
    assert shown.status.startswith(sentence) and shown.compressed == answered.compressed and len(visit.turns) == 1
    monkeypatch.setattr(page.studio, "overlay", fail)
    assert last(page.change(visit, HERE)).status.startswith(sentence)


def test_a_video_is_asked_about_frame_by_frame_and_its_middle_one_is_drawn(tmp_path: Path) -> None:
    model, processor = build("video_llava")
    vlm = vzip.CompressedVlm(model, vzip.Identity(), processor)
    page, visit, path = Page(Studio(vlm, max_new_tokens=3), []), Visit(), write(tmp_path / "clip.mp4")
    runs: list[int] = []
    vlm.adapter.frame_tower.layers[0].register_forward_hook(lambda *_: runs.append(1))
    choice = Choice("visionzip", 16)
    shown = last(page.open_file(visit, path, choice))
    assert not path.exists() and visit.medium.kind == "video"
    assert shown.caption == "A frame from the middle of the video." and shown.status == ""
    last(page.ask(visit, "What is it?", choice))
    num_frames = vlm.num_frames
    assert visit.turns[0].compressed.num_visual_tokens == num_frames * 16
    before = shown.overlay.tobytes()
    shown = last(page.change(visit, Choice("visionzip", 32)))
    assert visit.turns[0].compressed.num_visual_tokens == num_frames * 32
    assert shown.overlay.tobytes() != before and len(runs) == 1
    assert "this is a video" in last(page.click(visit, 3, 3)).status


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model, processor = build(family)
    page = Page(Studio(vzip.CompressedVlm(model, vzip.Identity(), processor), max_new_tokens=3), examples(1))
    visit, choice = Visit(), Choice("visionzip", 8)
    assert {"visionzip", "divprune", "random"} <= set(page.studio.methods)
    shown = last(page.open_example(visit, 0, choice))
    assert shown.status == "" and shown.overlay is not None and shown.seen is not None
    assert last(page.ask(visit, "What is it?", choice)).status == ""
    turn = visit.turns[0]
    assert turn.compressed.num_visual_tokens < turn.vanilla.num_visual_tokens
    assert turn.compressed.kv_bytes < turn.vanilla.kv_bytes
    shown = last(page.click(visit, 5, 5))
    assert "CLIP or SigLIP kind" in shown.status or shown.caption.startswith("Patch 1, 1")
