"""The page on the screen: Gradio's widgets around ``Page``. Imported by the command alone."""

from __future__ import annotations

import html
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while it is imported

import gradio as gr

from .page import Choice, Page, View
from .studio import MIN_TOKENS, Studio, slider_step
from .visits import Visits

MAX_UPLOAD = "64mb"
MAX_WAITING = (
    128  # acts of all visitors, each step of a slider that moves being one; further ones are told that the page is full
)
NUM_AT_ONCE = 8  # acts; the model answers one at a time
UPLOADS_KEPT_S = 600
# Fonts of the visitor's own machine: nothing is fetched from elsewhere.
FONT, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
CSS = """
.gradio-container {max-width: 1280px !important; margin: 0 auto !important}
footer, #vanilla button[aria-label="Clear"], #compressed button[aria-label="Clear"] {display: none !important}
#status:has(p) {border-left: 4px solid #d97706; padding: 2px 10px}
.facts {font-size: 0.9em; min-height: 1.6em}
#examples .grid-container {grid-template-columns: repeat(6, minmax(0, 1fr)) !important; gap: 6px; padding: 0}
#examples .grid-wrap {overflow: hidden}
#examples button {aspect-ratio: 1; height: auto !important}
#seen img {cursor: crosshair}
@media (max-width: 800px) {.sides {flex-direction: column} .sides > * {min-width: 0 !important; width: 100%}}
"""


def build(studio: Studio, page: Page, title: str, method: str, num_tokens: int) -> gr.Blocks:
    """The page as Gradio's blocks, queue included.

    Args:
        studio, page: what it does.
        title: the model's name.
        method, num_tokens: what the controls say at first.
    """
    visits, or_a_video = Visits(), " or a video" if studio.takes_videos else ""
    with gr.Blocks(
        title=f"vzip: {title}", analytics_enabled=False, delete_cache=(UPLOADS_KEPT_S, UPLOADS_KEPT_S)
    ) as ui:
        gr.Markdown(
            f"## Fewer visual tokens, side by side\n`{title}` answers with all visual tokens of an image{or_a_video},"
            " and with as many as you leave it."
        )
        status = gr.HTML("", elem_id="status")
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=2, min_width=320):
                file = gr.File(label=f"Drop an image{or_a_video}", height=140, elem_id="file")
                gr.Markdown("Or choose an example:")
                shown = gr.Gallery(
                    [example.image for example in page.examples],
                    show_label=False,
                    columns=6,
                    height=96,
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    format="png",
                    elem_id="examples",
                )
                seen = gr.Image(show_label=False, format="png", buttons=[], interactive=False, elem_id="seen")
                caption = gr.Markdown("", elem_id="caption")
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    chosen = gr.Dropdown(list(studio.methods), value=method, label="Method", elem_id="method")
                    tokens = gr.Slider(
                        MIN_TOKENS,
                        studio.max_tokens,
                        value=num_tokens,
                        step=slider_step(studio.max_tokens, num_tokens),
                        label="Visual tokens",
                        buttons=[],
                        elem_id="tokens",
                    )
                overlay = gr.Image(
                    show_label=False, format="png", buttons=["fullscreen"], interactive=False, elem_id="overlay"
                )
                with gr.Row(elem_classes="sides"):
                    vanilla, vanilla_facts = _side("Vanilla", "vanilla")
                    compressed, compressed_facts = _side("Compressed", "compressed")
                with gr.Row(equal_height=True):
                    question = gr.Textbox(
                        label="Question", placeholder="Ask about it", scale=4, lines=1, max_lines=4, elem_id="question"
                    )
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
                    anew = gr.Button("Reset", scale=1, min_width=80, elem_id="anew")
        gr.Markdown(
            "First token: from the vision tower's output, which both sides share, to the first token of the answer."
            " KV memory: of the whole prompt, text included. Files are deleted as soon as they are read.",
            elem_classes="facts",
        )

        controls: list[Any] = [chosen, tokens]
        outputs = [seen, caption, overlay, vanilla, compressed, vanilla_facts, compressed_facts, question, status]

        def act(run: Callable[..., Iterator[View]]) -> Callable[..., Iterator[Any]]:
            """What Gradio calls for an act that takes the visit, values, and the choice."""

            def told(of: str, values: tuple[Any, ...]) -> Iterator[Any]:
                *own, name, count = values
                for view in run(visits.of(of), *own, Choice(str(name), int(count))):
                    yield _outputs(view)

            return told

        def opened(path: str | None, name: str, count: float, request: gr.Request) -> Iterator[Any]:
            if path is not None:
                yield from act(page.open_file)(str(request.session_hash), (Path(path), name, count))

        def example(name: str, count: float, request: gr.Request, event: gr.SelectData) -> Iterator[Any]:
            yield from act(page.open_example)(str(request.session_hash), (int(event.index), name, count))

        def asked(text: str, name: str, count: float, request: gr.Request) -> Iterator[Any]:
            yield from act(page.ask)(str(request.session_hash), (text or "", name, count))

        def changed(name: str, count: float, request: gr.Request) -> Iterator[Any]:
            yield from act(page.change)(str(request.session_hash), (name, count))

        def clicked(request: gr.Request, event: gr.SelectData) -> Iterator[Any]:
            x, y = event.index
            for view in page.click(visits.of(str(request.session_hash)), float(x), float(y)):
                yield _outputs(view)

        def forgotten(request: gr.Request) -> Iterator[Any]:
            for view in page.begin_anew(visits.of(str(request.session_hash))):
                yield _outputs(view)

        def left(request: gr.Request) -> None:
            visits.end(str(request.session_hash))

        settings: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "multiple", "api_visibility": "private"}
        file.upload(opened, [file, *controls], outputs, **settings).then(
            lambda: None, None, file, show_progress="hidden", api_visibility="private"
        )
        shown.select(example, controls, outputs, **settings)
        gr.on([ask.click, question.submit], asked, [question, *controls], outputs, **settings)
        gr.on([chosen.change, tokens.change], changed, controls, outputs, **settings)
        seen.select(clicked, None, outputs, **settings)
        anew.click(forgotten, None, outputs, **settings)
        ui.unload(left)
    ui.queue(max_size=MAX_WAITING, default_concurrency_limit=NUM_AT_ONCE, api_open=False)
    return ui


def _side(label: str, name: str) -> tuple[gr.Chatbot, gr.Markdown]:
    with gr.Column(min_width=280):
        dialogue = gr.Chatbot(
            label=label,
            height=240,
            render_markdown=False,
            buttons=[],
            feedback_options=None,
            layout="bubble",
            elem_id=name,
        )
        return dialogue, gr.Markdown("", elem_id=f"{name}-facts", elem_classes="facts")


def _outputs(view: View) -> list[Any]:
    """In the order of the widgets; what a view leaves alone stays."""
    status = view.status and f'<p role="alert">{html.escape(view.status)}</p>'
    sides = [None if said is None else _messages(said) for said in (view.vanilla, view.compressed)]
    values = [view.seen, view.caption, view.overlay, *sides, view.vanilla_facts, view.compressed_facts, view.question]
    return [gr.skip() if value is None else value for value in [*values, status]]


def _messages(said: list[tuple[str, str]]) -> list[dict[str, str]]:
    """As Gradio takes them: it would show HTML in a question or an answer, and fetch what that names."""
    messages = []
    for question, answer in said:
        for role, text in (("user", question), ("assistant", answer or "…")):
            messages.append({"role": role, "content": html.escape(text, quote=False)})
    return messages


def serve(
    studio: Studio,
    page: Page,
    title: str,
    method: str,
    num_tokens: int,
    host: str,
    port: int,
    ready: Callable[[str], None],
) -> None:
    """Serves the page until it is interrupted; all files that it made, uploads included, are deleted then.

    Args:
        studio, page, title, method, num_tokens: as for ``build``.
        host, port: where it listens.
        ready: called with the address once it does.
    """
    with tempfile.TemporaryDirectory(prefix="vzip-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        ui = build(studio, page, title, method, num_tokens)
        ui.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            theme=gr.themes.Default(font=FONT, font_mono=MONO),
            css=CSS,
        )
        try:
            ready(f"http://{host}:{port}")
            threading.Event().wait()
        finally:
            ui.close(verbose=False)
