"""`python -m vzip demo serve`: what is refused before gradio and the model are loaded; `demo` stays."""

from __future__ import annotations

import socket
import sys
import types

import pytest

from vzip import cli
from vzip.cli import page
from vzip.demo import page as demo_page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "0"], "--port=0: must be 1 to 65535"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0: must be 1 or more"),
        (["--host", "203.0.113.7"], "nobody can listen there"),
        (["--host", 70 * "a"], "nobody can listen there"),
        (["--model", "tinny"], "did you mean 'tiny'?"),
        (["budget=3toks"], "budget=3toks"),
        (["compressor=none", "budget=full"], "compressor=none: the page has the model without compression"),
        (["compressor.merge_rule=mean"], "compressor.merge_rule=mean: the page has methods as their files set them"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(capsys, monkeypatch, words, said) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setitem(sys.modules, "vzip.demo.page.widgets", None)
    assert cli.main(["demo", "serve", *(words if "--port" in words else ["--port", _free(), *words])]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["demo", "serve", "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"--host=127.0.0.1 --port={port}: nobody can listen there" in error and "Name another port" in error


def test_without_gradio_it_says_what_installs_it(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vzip.demo.page.widgets", raising=False)
    assert cli.main(["demo", "serve", "--port", _free()]) == 2
    assert "`demo serve` needs the package gradio" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "method", "num_tokens"),
    [
        ([], "visionzip", 64),
        (["compressor=merge_dropped", "budget=128tok"], "merge_dropped", 128),
        (["budget=fraction", "budget.dominant=0.25", "budget.contextual=0.05"], "visionzip", 144 + 28),
        (["compressor=cdpruner", "budget=32tok"], "visionzip", 32),  # CLIP's text model is not at hand
    ],
)
def test_the_controls_stand_where_the_settings_say(monkeypatch, words, method, num_tokens) -> None:
    shown: list[object] = []
    widgets = types.ModuleType("widgets")
    widgets.serve = lambda studio, page, title, *controls: shown.extend(controls[:2])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vzip.demo.page.widgets", widgets)
    monkeypatch.setattr(demo_page, "widgets", widgets, raising=False)
    monkeypatch.setattr(page, "_until_terminated", lambda: None)
    assert cli.main(["demo", "serve", "--port", _free(), *words]) == 0
    assert shown == [method, num_tokens]


def test_others_than_this_machine_are_warned_of(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(page._LOG, "warning", lambda message, *values: said.append(message % values))
    page._check_address("127.0.0.1", int(_free()))
    page._check_address("localhost", int(_free()))
    assert not said
    page._check_address("0.0.0.0", int(_free()))
    assert "--host=0.0.0.0: everyone who reaches this machine can use the page" in said[0]


def test_demo_without_serve_is_the_table(capsys) -> None:
    assert cli.main(["demo", "--limit", "0"]) == 2
    assert "--limit=0: must be 1 or more" in capsys.readouterr().err


def _free() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])
