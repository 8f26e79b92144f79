"""`python -m vzip chat`: a dialogue on the standard input, with its errors and its interruptions."""

from __future__ import annotations

import io
import sys

import pytest
from PIL import Image

import vzip
from vzip import cli
from vzip.demo import benchmark
from vzip.demo.render import render
from vzip.models.chat.session import ChatSession


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two image files of the built-in benchmark: a white cross; a black star and a green circle."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "cross.png", folder / "two words.png"]
    for path, number in zip(paths, (0, 2), strict=True):
        render(benchmark.test_scenes()[number]).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command over some lines; returns its exit code, its output and what it wrote on standard error."""

    def run(lines: list[str], *words: str, interactive: bool = False) -> tuple[int, str, str]:
        stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(stdin, "isatty", lambda: interactive)
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        code = cli.main(["chat", "--max-new-tokens", "6", *words])
        return code, *capsys.readouterr()

    return run


def test_a_dialogue_answers_as_the_session_does(say, scenes) -> None:
    questions = ["What shape is the white object?", "Is there a star in the picture?", "What color is the star?"]
    code, out, _ = say([*questions[:2], f"/image {scenes[1]}", questions[2]], "--image", scenes[0], "budget=128tok")
    chat = vzip.load_vlm("vzip/tiny", compressor=vzip.VisionZip(vzip.TokenBudget(108, 20))).chat()
    pictures = [[Image.open(scenes[0])], [], [Image.open(scenes[1])]]
    expected = [f"({scenes[0]}: 128 visual tokens, 576 without compression)"]
    for question, new in zip(questions, pictures, strict=True):
        if question == questions[2]:
            expected += [f"> /image {scenes[1]}", f"({scenes[1]}: 128 visual tokens, 576 without compression)"]
        answer = chat.ask(question, new, max_new_tokens=6)
        num_visual_tokens = sum(picture.num_visual_tokens for picture in chat.visuals)
        told = f"({num_visual_tokens} visual tokens in a dialogue of {chat.num_cached_tokens} tokens)"
        expected += [f"> {question}", answer, told]
    assert code == 0 and out.splitlines() == [*expected, "> "]


def test_lines_that_cannot_be_answered_are_named_and_the_dialogue_goes_on(say, scenes, tmp_path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    lines = [
        "/imag x",
        "/image",
        "/video clip.mp4",
        f"/image {tmp_path}/none.png",
        f"/image {tmp_path}/text.png",
        "what [bold]is[/] <image>?",
    ]
    code, out, _ = say([*lines, "", "Is there a star in the picture?"], "--image", scenes[0])
    assert code == cli.USER_ERROR
    for said in (
        "ConfigError: /imag: no such command (did you mean '/image'?)",
        "ConfigError: /image needs a file: /image FILE.",
        "UnsupportedModelError: LlavaForConditionalGeneration has no video tower",
        f"ImageError: {tmp_path}/none.png: no such image file.",
        f"ImageError: {tmp_path}/text.png: not an image",
        "> what [bold]is[/] <image>?\nPromptError: The question holds '<image>'",
        "(64 visual tokens in a dialogue of",
    ):
        assert said in out
    # At a terminal a mistyped line is seen and mended, and is no failure of the command.
    code, out, _ = say(lines[:2], interactive=True)
    assert code == 0 and "/imag x" not in out.replace("/imag: ", "").splitlines()[0]


def test_a_reset_forgets_the_images(say, scenes) -> None:
    question = "Is there a star in the picture?"
    code, out, _ = say([question, "/reset", question], "--image", scenes[0])
    assert code == 0 and "(begun anew, without images and videos)" in out
    assert "(64 visual tokens in a" in out and "(0 visual tokens in a" in out


def test_an_interrupted_answer_ends_the_turn_and_not_the_command(say, scenes, monkeypatch) -> None:
    real, calls = ChatSession.ask, []

    def ask(self, question, **settings):
        calls.append(question)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(self, question, **settings)

    monkeypatch.setattr(ChatSession, "ask", ask)
    code, out, _ = say(["Is there a cross?", "Is there a star?"], "--image", scenes[0])
    assert code == 0 and "(stopped; this turn is forgotten)" in out and "(64 visual tokens in a dialogue" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "no/such.png"], "ImageError: no/such.png: no such image file"),
        (["--video", "no/such.mp4"], "VideoError: no/such.mp4: no such video file"),
        (["--max-new-tokens", "0"], "ConfigError: --max-new-tokens=0: must be 1 or more"),
        (["--model", "tyni"], "did you mean 'tiny'"),
        (["budget.num_dominant=0"], "budget.num_dominant"),
    ],
)
def test_bad_words_are_refused_before_loading(say, monkeypatch, words, said) -> None:
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(vzip, "load_vlm", load)
    code, _, error = say([], *words)
    assert code == cli.USER_ERROR and said in error


def test_the_system_prompt_of_the_model_comes_first(say, scenes, monkeypatch) -> None:
    sessions: list[ChatSession] = []
    begin = ChatSession.__init__

    def record(self, *arguments):
        sessions.append(self)
        begin(self, *arguments)

    monkeypatch.setattr(ChatSession, "__init__", record)
    assert say(["Is there a star?"], "model.system_prompt=Be brief.")[0] == 0
    assert sessions[0].messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


def test_lines_that_are_not_utf8_do_not_end_the_command(monkeypatch, capsys) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"Is there a st\xffar?\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.main(["chat", "--max-new-tokens", "2"]) == 0
    assert "Is there a st\ufffdar?" in capsys.readouterr().out
