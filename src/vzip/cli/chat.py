"""A dialogue about images and videos in the terminal; questions are lines of the standard input.

python -m vzip chat --image photo.jpg
python -m vzip chat --image photo.jpg budget=32tok --model llava15_7b
python -m vzip chat --video clip.mp4 budget=17tok --model video_llava_7b
printf 'What color is the star?\\nWhat does the sign say?\\n' | python -m vzip chat --image photo.jpg

A line is a question, or one of
  /image FILE   adds an image to the next question
  /video FILE   adds a video to the next question (docs/families.md says which models take one)
  /reset        begins anew, without turns, images and videos
Ctrl-C stops an answer (the turn is forgotten), or ends with exit code 130 where none is being given; ctrl-D ends.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vzip.config.build import chat_plan, refuse_unused
from vzip.errors import ConfigError, VzipError, nearest
from vzip.media.images import load_image
from vzip.media.video import check_video

if TYPE_CHECKING:
    from vzip.models.chat.layout import EncodedVisual
    from vzip.models.chat.session import ChatSession

COMMANDS = ("/image", "/video", "/reset")
FAILED = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--video", type=Path, action="append", default=[], metavar="FILE", help="likewise")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="as for eval.py: budget=32tok, compressor=none budget=full ..."
    )
    parser.add_argument("--model", default="tiny", help="a name in configs/model (default: tiny)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most tokens of an answer (default: 256)")


def main(arguments: argparse.Namespace) -> int:
    """Reads lines until the input ends; everything that can be wrong is checked before the model is loaded.

    Returns:
        0, or 2 if the input was no terminal and some line of it could not be answered.
    """
    refuse_unused(arguments.settings)
    model, compressor, system_prompt = chat_plan([f"model={arguments.model}", *arguments.settings])
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}: must be 1 or more.")
    images = [(str(path), load_image(path)) for path in arguments.image]
    for path in arguments.video:
        check_video(path)

    import vzip

    if arguments.video:
        from vzip.models.load import check_takes_videos

        check_takes_videos(model["name_or_path"], model["revision"])
    vlm = vzip.load_vlm(**model, compressor=compressor)
    terminal = _Terminal(vlm.chat(system_prompt), arguments.max_new_tokens)
    for name, image in images:
        terminal.tell(name, terminal.chat.add_image(image, len(images)))
    for path in arguments.video:
        terminal.tell(str(path), terminal.chat.add_video(path))
    terminal.run()
    return FAILED if terminal.num_failed and not terminal.interactive else 0


class _Terminal:
    """A dialogue on the standard input and output."""

    def __init__(self, chat: ChatSession, max_new_tokens: int) -> None:
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.interactive = sys.stdin.isatty()
        self.num_failed = 0

    def run(self) -> None:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a line that is not UTF-8 is a strange question, not a crash
        while True:
            try:
                line = self.console.input("> ").strip()
            except EOFError:
                self.console.print()
                return
            if not self.interactive:
                self.console.print(line)
            if line:
                self._follow(line)

    def tell(self, name: str, added: EncodedVisual) -> None:
        """Says how many tokens an image or video is that was added for the next question."""
        self._remark(f"{name}: {added.num_visual_tokens} visual tokens, {added.num_vanilla_tokens} without compression")

    def _follow(self, line: str) -> None:
        try:
            if line.startswith("/"):
                self._command(*line.split(maxsplit=1))
            else:
                self._ask(line)
        except VzipError as error:
            self.num_failed += 1
            self.console.print(f"{type(error).__name__}: {error}", style="red")
        except KeyboardInterrupt:
            self.console.print()
            self._remark("stopped; this turn is forgotten")

    def _command(self, command: str, rest: str = "") -> None:
        if command not in COMMANDS:
            raise ConfigError(
                f"{command}: no such command{nearest(command, COMMANDS)}; commands: /image FILE, /video FILE, /reset. A"
                " question begins with anything but /."
            )
        if command == "/reset":
            self.chat.reset()
            self._remark("begun anew, without images and videos")
        elif not rest:
            raise ConfigError(f"{command} needs a file: {command} FILE.")
        elif command == "/image":
            self.tell(rest, self.chat.add_image(load_image(Path(rest))))
        else:
            self.tell(rest, self.chat.add_video(Path(rest)))

    def _ask(self, question: str) -> None:
        answer = self.chat.ask(
            question, max_new_tokens=self.max_new_tokens, on_text=lambda text: self.console.print(text, end="")
        )
        self.console.print("" if answer else "(no words)")
        num_visual_tokens = sum(visual.num_visual_tokens for visual in self.chat.visuals)
        self._remark(f"{num_visual_tokens} visual tokens in a dialogue of {self.chat.num_cached_tokens} tokens")

    def _remark(self, text: str) -> None:
        self.console.print(f"({text})", style="dim")
